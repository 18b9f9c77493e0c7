//! Real TCP: a server that echoes and remembers its peers, and clients that connect from inside a namespace.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, PipeReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, listen,
    setsockopt, socket, sockopt,
};

use super::namespace::Namespace;
use super::server::{Background, lock, wait_ready, wait_ready_until};

/// A TCP server that sends back what it gets and remembers who connected; stops when dropped.
#[derive(Debug)]
pub struct TcpEcho {
    address: SocketAddr,
    seen: Arc<Seen>,
    _server: Background,
}

#[derive(Debug, Default)]
struct Seen {
    peers: Mutex<Vec<SocketAddr>>,
    open: AtomicUsize,
}

impl TcpEcho {
    /// Listens on `address` inside `namespace`; port 0 lets the kernel choose.
    ///
    /// It takes thousands of connections, so the process's limit of open files is raised to its maximum.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        raise_open_files();
        let listener = namespace.enter(|| listen_on(address))?;
        let address = listener.local_addr()?;
        let seen = Arc::new(Seen::default());
        let record = Arc::clone(&seen);
        let server = Background::spawn("tcp-echo", move |stop| {
            if let Err(error) = serve(&listener, &stop, &record) {
                panic!("TCP echo server on {address}: {error}");
            }
        })?;
        Ok(TcpEcho { address, seen, _server: server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address and port of every connection accepted, in order: what the peer looks like from here.
    pub fn peers(&self) -> Vec<SocketAddr> {
        lock(&self.seen.peers).clone()
    }

    /// How many connections are open now, as far as the server was told.
    pub fn open_connections(&self) -> usize {
        self.seen.open.load(Ordering::Relaxed)
    }
}

/// A listener with a backlog for a thousand connections at once (std's is 128).
pub(super) fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let fd = stream_socket(address)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(4096)?)?;
    Ok(TcpListener::from(fd))
}

struct Connection {
    stream: TcpStream,
    pending: VecDeque<u8>,
    finished: bool,
}

fn serve(listener: &TcpListener, stop: &PipeReader, seen: &Seen) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut wanted = vec![(stop.as_fd(), PollFlags::POLLIN), (listener.as_fd(), PollFlags::POLLIN)];
        wanted.extend(connections.iter().map(|connection| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !connection.finished);
            flags.set(PollFlags::POLLOUT, !connection.pending.is_empty());
            (connection.stream.as_fd(), flags)
        }));
        let ready = wait_ready(&wanted)?;
        if !ready[0].is_empty() {
            return Ok(());
        }
        let mut events = ready[2..].iter();
        connections.retain_mut(|connection| {
            events.next().is_none_or(|events| events.is_empty())
                || connection.serve(&mut buffer).unwrap_or(false)
        });
        if !ready[1].is_empty() {
            loop {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        stream.set_nonblocking(true)?;
                        lock(&seen.peers).push(peer);
                        connections.push(Connection { stream, pending: VecDeque::new(), finished: false });
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // The peer reset it before we looked.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        seen.open.store(connections.len(), Ordering::Relaxed);
    }
}

impl Connection {
    /// Reads what is there and writes what it can; whether the connection goes on.
    fn serve(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        while !self.finished {
            match self.stream.read(buffer) {
                Ok(0) => self.finished = true,
                Ok(read) => self.pending.extend(&buffer[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while !self.pending.is_empty() {
            match self.stream.write(self.pending.as_slices().0) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(!self.finished)
    }
}

/// What became of an exchange over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpOutcome {
    /// The client's own address and port, before any translation.
    pub local: SocketAddr,
    /// What came back; equal to what was sent.
    pub echoed: Vec<u8>,
}

/// Connects from inside `namespace` to an echo server, sends `payload`, reads it back and closes.
///
/// # Errors
/// By kind: `TimedOut` (no answer), `ConnectionRefused` and `ConnectionReset`, `UnexpectedEof` (closed
/// early),
/// `InvalidData` (something else came back), `AddrInUse` (the source port).
pub fn tcp_exchange(
    namespace: &Namespace,
    source_port: Option<u16>,
    destination: SocketAddr,
    payload: &[u8],
    timeout: Duration,
) -> io::Result<TcpOutcome> {
    let deadline = Instant::now() + timeout;
    let mut stream = tcp_connect(namespace, source_port, destination, timeout)?;
    let local = stream.local_addr()?;
    stream.set_write_timeout(Some(left_until(deadline)?))?;
    stream.write_all(payload).map_err(as_timeout)?;
    let mut echoed = vec![0; payload.len()];
    let mut filled = 0;
    while filled < echoed.len() {
        stream.set_read_timeout(Some(left_until(deadline)?))?;
        match stream.read(&mut echoed[filled..]).map_err(as_timeout)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => filled += read,
        }
    }
    if echoed != payload {
        return Err(io::Error::new(ErrorKind::InvalidData, "the echo differs from what was sent"));
    }
    Ok(TcpOutcome { local, echoed })
}

/// Opens a connection from inside `namespace`, from any port or a given one; the stream is blocking.
///
/// # Errors
/// As [`tcp_exchange`].
pub fn tcp_connect(
    namespace: &Namespace,
    source_port: Option<u16>,
    destination: SocketAddr,
    timeout: Duration,
) -> io::Result<TcpStream> {
    tcp_connect_from(namespace, source_port.map(|port| any_address(destination, port)), destination, timeout)
}

/// The same from an address of the namespace's own; port 0 lets the kernel choose.
///
/// # Errors
/// As [`tcp_exchange`].
pub fn tcp_connect_from(
    namespace: &Namespace,
    source: Option<SocketAddr>,
    destination: SocketAddr,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let deadline = Instant::now() + timeout;
    let socket = namespace.enter(|| begin_connect_from(source, destination))?;
    loop {
        let ready = wait_ready_until(&[(socket.as_fd(), PollFlags::POLLOUT)], Some(deadline))?;
        if !ready[0].is_empty() {
            break;
        }
        left_until(deadline)?;
    }
    let stream = finish_connect(socket)?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Starts connecting without waiting, in the calling thread's namespace.
pub(super) fn begin_connect(source_port: Option<u16>, destination: SocketAddr) -> io::Result<OwnedFd> {
    begin_connect_from(source_port.map(|port| any_address(destination, port)), destination)
}

/// The same from an address of the namespace's own; port 0 lets the kernel choose.
pub(super) fn begin_connect_from(source: Option<SocketAddr>, destination: SocketAddr) -> io::Result<OwnedFd> {
    let fd = stream_socket(destination)?;
    if let Some(source) = source {
        // A port whose last connection is in TIME-WAIT may be used again, as a test that repeats itself does.
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    }
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(destination)) {
        Ok(()) | Err(nix::Error::EINPROGRESS) => Ok(fd),
        Err(errno) => Err(errno.into()),
    }
}

/// The result of a connect that has become writable or has failed; the stream is still non-blocking.
pub(super) fn finish_connect(socket: OwnedFd) -> io::Result<TcpStream> {
    match getsockopt(&socket, sockopt::SocketError)? {
        0 => Ok(TcpStream::from(socket)),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The unspecified address of the same family.
pub(super) fn any_address(like: SocketAddr, port: u16) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}

/// Time left, as socket timeouts want it: never zero, which would mean forever.
pub(super) fn left_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left.max(Duration::from_millis(1))) }
}

/// A blocking socket whose timeout passed says `WouldBlock`; we say `TimedOut`.
pub(super) fn as_timeout(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { ErrorKind::TimedOut.into() } else { error }
}

fn stream_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?)
}

/// Raises the soft limit of open files to the hard one; best effort.
pub(super) fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, which is ours.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 && limit.rlim_cur < limit.rlim_max
    {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads one rlimit, which is ours.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}
