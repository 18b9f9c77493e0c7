//! Real UDP: a server that echoes and remembers its peers, and clients inside a namespace.

use std::io::{self, ErrorKind, PipeReader};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::namespace::Namespace;
use super::server::{Background, lock, wait_ready};
use super::tcp::{any_address, as_timeout, left_until};

/// A UDP server that sends back what it gets and remembers from whom; stops when dropped.
#[derive(Debug)]
pub struct UdpEcho {
    address: SocketAddr,
    seen: Arc<Seen>,
    _server: Background,
}

#[derive(Debug, Default)]
struct Seen {
    peers: Mutex<Vec<SocketAddr>>,
    datagrams: AtomicU64,
}

impl UdpEcho {
    /// Listens on `address` inside `namespace`; port 0 lets the kernel choose. Name an address rather than
    /// `0.0.0.0` where the namespace has several: the answer leaves from the one bound.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        let socket = udp_socket(namespace, address)?;
        let address = socket.local_addr()?;
        socket.set_nonblocking(true)?;
        let seen = Arc::new(Seen::default());
        let record = Arc::clone(&seen);
        let server = Background::spawn("udp-echo", move |stop| {
            if let Err(error) = serve(&socket, &stop, &record) {
                panic!("UDP echo server on {address}: {error}");
            }
        })?;
        Ok(UdpEcho { address, seen, _server: server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address and port of every peer, each once, in the order of their first datagrams.
    pub fn peers(&self) -> Vec<SocketAddr> {
        lock(&self.seen.peers).clone()
    }

    /// How many datagrams came.
    pub fn datagrams(&self) -> u64 {
        self.seen.datagrams.load(Ordering::Relaxed)
    }
}

fn serve(socket: &UdpSocket, stop: &PipeReader, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let ready = wait_ready(&[(stop.as_fd(), PollFlags::POLLIN), (socket.as_fd(), PollFlags::POLLIN)])?;
        if !ready[0].is_empty() {
            return Ok(());
        }
        // An error here is what ICMP said about an earlier answer, or a full buffer: not the next datagram's.
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            {
                let mut peers = lock(&seen.peers);
                if !peers.contains(&peer) {
                    peers.push(peer);
                }
            }
            seen.datagrams.fetch_add(1, Ordering::Relaxed);
            let _ = socket.send_to(&buffer[..length], peer);
        }
    }
}

/// A UDP socket inside `namespace`, bound to `address`; port 0 lets the kernel choose.
pub fn udp_socket(namespace: &Namespace, address: SocketAddr) -> io::Result<UdpSocket> {
    namespace.enter(|| UdpSocket::bind(address))
}

/// What became of an exchange over UDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpOutcome {
    /// The client's own address and port, before any translation.
    pub local: SocketAddr,
    /// What came back; equal to what was sent.
    pub echoed: Vec<u8>,
}

/// Sends one datagram from inside `namespace` to an echo server and waits for its return. It is sent once:
/// what is lost is seen.
///
/// # Errors
/// By kind: `TimedOut` (no answer, or one from another address), `ConnectionRefused` and the like (an ICMP
/// error),
/// `InvalidData` (something else came back), `AddrInUse` (the source port).
pub fn udp_exchange(
    namespace: &Namespace,
    source_port: Option<u16>,
    destination: SocketAddr,
    payload: &[u8],
    timeout: Duration,
) -> io::Result<UdpOutcome> {
    let deadline = Instant::now() + timeout;
    let socket = udp_socket(namespace, any_address(destination, source_port.unwrap_or(0)))?;
    // Connected, so that answers from elsewhere are not taken and ICMP errors are told.
    socket.connect(destination)?;
    let local = socket.local_addr()?;
    socket.send(payload)?;
    let mut buffer = vec![0; payload.len() + 1];
    socket.set_read_timeout(Some(left_until(deadline)?))?;
    let length = socket.recv(&mut buffer).map_err(as_timeout)?;
    buffer.truncate(length);
    if buffer != payload {
        return Err(io::Error::new(ErrorKind::InvalidData, "the echo differs from what was sent"));
    }
    Ok(UdpOutcome { local, echoed: buffer })
}
