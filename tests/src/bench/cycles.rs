//! TCP connect-request-close cycles by real sockets: both ends in one thread and one epoll, which never sleeps.
//!
//! A cycle is what HTTP/1.0 did: connect, a request, an answer with the server's FIN on it, the client's FIN. Eight packets
//! pass the gateway, both directions are closed by FIN, and the server's end keeps TIME-WAIT.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrIn, accept4, bind, connect, getpeername,
    listen, recv, send, setsockopt, socket, sockopt,
};

use super::napi;
use super::road::{Road, SERVERS};
use crate::stop;

/// Of each server's address.
const FIRST_PORT: u16 = 8000;
/// Of each guest's address: all that are nobody's.
const FIRST_SOURCE_PORT: u16 = 1024;
const SOURCE_PORTS: usize = 65_536 - FIRST_SOURCE_PORT as usize;
const REQUEST: [u8; 32] = *b"GET / HTTP/1.0\r\nHost: bench\r\n\r\n ";
const ANSWER: [u8; 32] = *b"HTTP/1.0 204 No Content\r\n\r\n     ";
/// Hold it back until there is more, or no more.
const MORE: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_MORE);
/// After so long without one that ends, those under way are given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Events taken from epoll at once.
const EVENTS: usize = 64;
/// A cycle without an answer for so long has lost a packet: TCP itself waits for a second.
const LOSS: Duration = Duration::from_millis(800);

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    /// Cycles that ended as they should, from the first to the last.
    pub done: u64,
    /// Cycles that were refused, reset, or heard something else.
    pub failed: u64,
    /// Those of [`Count::done`] that took so long that a packet must have been lost.
    pub slow: u64,
    /// Connections the server saw under an address that it should not see, or twice at once under the same port.
    pub strangers: u64,
}

/// The sockets. All clients of one road are made with the same [`Cycles`]; the servers listen as long as it lives.
pub(super) struct Cycles {
    epoll: Epoll,
    listeners: Vec<OwnedFd>,
    servers: Vec<SocketAddrV4>,
    guests: Vec<Ipv4Addr>,
    seen_as: Vec<Ipv4Addr>,
    /// By descriptor.
    ends: Vec<End>,
    under_way: usize,
    next: usize,
    count: Count,
}

#[derive(Clone, Copy)]
enum End {
    None,
    Listener,
    /// Since when; whether the request has been sent.
    Client(Instant, bool),
    /// Accepted before its request was there.
    Accepted,
}

/// One measurement.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    pub cycles_per_second: f64,
    /// Share of the time that the gateway's threads were running.
    pub busy: f64,
}

impl Cycles {
    /// `servers` sockets listen, spread over the server's addresses.
    pub fn listen(road: &Road, servers: u16) -> anyhow::Result<Self> {
        let each = servers.div_ceil(SERVERS.len() as u16);
        let servers: Vec<SocketAddrV4> = (0..servers)
            .map(|n| SocketAddrV4::new(SERVERS[usize::from(n / each)], FIRST_PORT + n % each))
            .collect();
        // Never more open TIME-WAITs than this in any run; a socket that finds no place would answer with a RST.
        road.server.set_sysctl("net.ipv4.tcp_max_tw_buckets", "4000000")?;
        let listeners =
            road.server.enter(|| servers.iter().map(|&at| listen_on(at)).collect::<io::Result<Vec<_>>>())?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let guests = road.guests();
        let mut cycles = Self {
            epoll,
            listeners,
            servers,
            seen_as: guests.iter().map(|&guest| road.gate.seen_as(guest)).collect(),
            guests,
            ends: Vec::new(),
            under_way: 0,
            next: 0,
            count: Count::default(),
        };
        for at in 0..cycles.listeners.len() {
            let listener = &cycles.listeners[at];
            cycles.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64))?;
            let fd = listener.as_raw_fd();
            cycles.put(fd, End::Listener);
        }
        Ok(cycles)
    }

    /// What came of all cycles so far.
    pub fn count(&self) -> Count {
        self.count
    }

    /// Exactly `cycles` of them, `at_once` at a time.
    pub fn run(&mut self, road: &Road, at_once: usize, cycles: u64) -> anyhow::Result<()> {
        road.client.enter(|| {
            let goal = self.next as u64 + cycles;
            self.turn(at_once, |own| own.next as u64 >= goal)?;
            self.end()
        })
    }

    /// As many as there can be in `window`, `at_once` at a time; `ramp` before it is not counted.
    pub fn measure(
        &mut self,
        road: &Road,
        at_once: usize,
        ramp: Duration,
        window: Duration,
    ) -> anyhow::Result<Measured> {
        road.client.enter(|| {
            napi::pin_this_thread(napi::processors().0)?;
            let until = Instant::now() + ramp;
            self.turn(at_once, |_| Instant::now() >= until)?;
            let (begin, busy, before) = (Instant::now(), road.gateway_time()?, self.count.done);
            let until = begin + window;
            self.turn(at_once, |_| Instant::now() >= until)?;
            let seconds = begin.elapsed().as_secs_f64();
            let (busy, done) =
                ((road.gateway_time()? - busy).as_secs_f64(), (self.count.done - before) as f64);
            self.end()?;
            ensure!(done > 0.0, "no connection came about within {window:?}");
            Ok(Measured { cycles_per_second: done / seconds, busy: busy / seconds })
        })
    }

    /// Cycles until `enough`; some are under way afterwards.
    fn turn(&mut self, at_once: usize, enough: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let (mut since, mut ended) = (Instant::now(), self.ended());
        while !enough(self) {
            stop::check()?;
            if ended != self.ended() {
                (since, ended) = (Instant::now(), self.ended());
            }
            ensure!(since.elapsed() < PATIENCE, "{} connections hang: {:?}", self.under_way, self.count);
            while self.under_way < at_once && !enough(self) {
                self.begin()?;
            }
            self.serve()?;
        }
        Ok(())
    }

    fn ended(&self) -> u64 {
        self.count.done + self.count.failed
    }

    /// Waits for those under way.
    fn end(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        while self.under_way > 0 {
            stop::check()?;
            ensure!(begin.elapsed() < PATIENCE, "{} connections hang: {:?}", self.under_way, self.count);
            self.serve()?;
        }
        Ok(())
    }

    /// Each guest to each server, in an order in which neither comes twice in a row. No guest uses a port again before it
    /// has used all others, so every cycle is a flow of its own for the gateway.
    fn begin(&mut self) -> anyhow::Result<()> {
        let (guests, nth) = (self.guests.len(), self.next);
        let guest = self.guests[nth % guests];
        // One further in each pass over the guests.
        let server = self.servers[(nth + nth / guests) % self.servers.len()];
        let source = SocketAddrV4::new(guest, FIRST_SOURCE_PORT + (nth / guests % SOURCE_PORTS) as u16);
        self.next += 1;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let client = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        bind(client.as_raw_fd(), &SockaddrIn::from(source)).with_context(|| format!("binding {source}"))?;
        match connect(client.as_raw_fd(), &SockaddrIn::from(server)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).with_context(|| format!("connecting from {source} to {server}")),
        }
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        self.epoll.add(&client, EpollEvent::new(interest, client.as_raw_fd() as u64))?;
        self.under_way += 1;
        self.put(into_raw(client), End::Client(Instant::now(), false));
        Ok(())
    }

    /// Goes on with what is ready. It never sleeps: to be woken across processors costs more than a packet, and would be
    /// the gateway's work.
    fn serve(&mut self) -> anyhow::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let ready = match self.epoll.wait(&mut events, 0u16) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..ready] {
            let fd = event.data() as RawFd;
            match self.ends.get(fd as usize) {
                Some(End::Listener) => self.accept(fd)?,
                Some(End::Accepted) => self.answer(fd),
                Some(&End::Client(since, asked)) => self.go_on(fd, since, asked, event.events()),
                _ => {}
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: RawFd) -> anyhow::Result<()> {
        loop {
            match accept4(listener, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC) {
                Ok(fd) => {
                    self.put(fd, End::Accepted);
                    self.answer(fd);
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::ECONNABORTED) => {}
                Err(error) => return Err(error).context("accept"),
            }
        }
    }

    /// The server's part, which is all done at once: the kernel hands over connections whose request is there.
    fn answer(&mut self, fd: RawFd) {
        let mut request = [0; REQUEST.len() + 1];
        match recv(fd, &mut request, MsgFlags::empty()) {
            Ok(n) if request[..n] == REQUEST => {
                let peer = getpeername::<SockaddrIn>(fd).map(|peer| peer.ip());
                if !peer.is_ok_and(|peer| self.seen_as.contains(&peer)) {
                    self.count.strangers += 1;
                }
                // The FIN goes with it: what is held back for more is sent when the socket is closed.
                let _ = send(fd, &ANSWER, MORE | MsgFlags::MSG_NOSIGNAL);
                self.close(fd);
            }
            // Not yet: a connection that was handed over early. Without a place in epoll it would wait for ever.
            Err(Errno::EAGAIN) => {
                // SAFETY: the descriptor is open and ours until `close`.
                let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
                if self.epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64)).is_err() {
                    self.close(fd);
                }
            }
            _ => self.close(fd),
        }
    }

    fn go_on(&mut self, fd: RawFd, since: Instant, asked: bool, events: EpollFlags) {
        let mut well = !events.intersects(EpollFlags::EPOLLERR);
        if well && !asked {
            if !events.contains(EpollFlags::EPOLLOUT) {
                return;
            }
            well = send(fd, &REQUEST, MsgFlags::MSG_NOSIGNAL).is_ok_and(|sent| sent == REQUEST.len());
            if well {
                self.put(fd, End::Client(since, true));
                return;
            }
        }
        if well {
            let mut answer = [0; ANSWER.len() + 1];
            match recv(fd, &mut answer, MsgFlags::empty()) {
                Err(Errno::EAGAIN) => return,
                got => well = got.is_ok_and(|got| answer[..got] == ANSWER),
            }
        }
        if well {
            self.count.done += 1;
            self.count.slow += u64::from(since.elapsed() > LOSS);
        } else {
            self.count.failed += 1;
        }
        self.under_way -= 1;
        self.close(fd);
    }

    fn put(&mut self, fd: RawFd, end: End) {
        let at = fd as usize;
        if self.ends.len() <= at {
            self.ends.resize(at + 1, End::None);
        }
        self.ends[at] = end;
    }

    fn close(&mut self, fd: RawFd) {
        self.put(fd, End::None);
        // SAFETY: `ends` says that it is open and ours, and now no more.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

impl Drop for Cycles {
    fn drop(&mut self) {
        for fd in 0..self.ends.len() {
            if matches!(self.ends[fd], End::Client(..) | End::Accepted) {
                self.close(fd as RawFd);
            }
        }
    }
}

fn into_raw(fd: OwnedFd) -> RawFd {
    use std::os::fd::IntoRawFd as _;
    fd.into_raw_fd()
}

fn listen_on(at: SocketAddrV4) -> io::Result<OwnedFd> {
    let listener = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    // A connection is handed over with its request, so that the server has one thing to do and not two.
    let seconds: libc::c_int = 5;
    // SAFETY: the option is an int, which lives for the call.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of_val(&seconds) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    bind(listener.as_raw_fd(), &SockaddrIn::from(at))?;
    listen(&listener, Backlog::new(1024).unwrap_or(Backlog::MAXCONN))?;
    Ok(listener)
}
