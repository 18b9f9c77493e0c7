//! Many TCP connections at once, held open: for counting ports, and for seeing that none of them breaks.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::namespace::Namespace;
use super::server::wait_ready_until;
use super::tcp::{as_timeout, begin_connect, finish_connect, left_until, raise_open_files};

/// How many connects are under way at once: a veth without NAPI queues a thousand packets and drops the rest,
/// and those would each take a second to be sent again.
const UNDER_WAY: usize = 256;

/// Connections that stay open until this is dropped.
#[derive(Debug, Default)]
pub struct TcpHold {
    streams: Vec<TcpStream>,
    failures: Vec<io::Error>,
}

impl TcpHold {
    /// Opens `count` connections from inside `namespace` to one destination. Each has `timeout` of its own
    /// from its first SYN, so `count` of them take as long as one where nothing is in the way, and `timeout`
    /// more where some get no answer. The kernel tries again after 1, 3 and 7 seconds.
    ///
    /// # Errors
    /// Only if sockets cannot be made at all; a connection that fails is counted in [`TcpHold::failures`].
    pub fn open(
        namespace: &Namespace,
        destination: SocketAddr,
        count: usize,
        timeout: Duration,
    ) -> io::Result<Self> {
        let mut hold = TcpHold::default();
        hold.open_more(namespace, destination, count, timeout)?;
        Ok(hold)
    }

    /// Opens `count` more, to the same destination or another.
    pub fn open_more(
        &mut self,
        namespace: &Namespace,
        destination: SocketAddr,
        count: usize,
        timeout: Duration,
    ) -> io::Result<()> {
        raise_open_files();
        namespace.enter(|| self.open_here(destination, count, timeout))
    }

    fn open_here(&mut self, destination: SocketAddr, count: usize, timeout: Duration) -> io::Result<()> {
        let mut to_start = count;
        // In the order of their deadlines.
        let mut under_way: VecDeque<(OwnedFd, Instant)> = VecDeque::new();
        while to_start > 0 || !under_way.is_empty() {
            while to_start > 0 && under_way.len() < UNDER_WAY {
                to_start -= 1;
                match begin_connect(None, destination) {
                    Ok(socket) => under_way.push_back((socket, Instant::now() + timeout)),
                    Err(error) => self.failures.push(error),
                }
            }
            let Some(first_deadline) = under_way.front().map(|(_, deadline)| *deadline) else { continue };
            let wanted: Vec<_> =
                under_way.iter().map(|(socket, _)| (socket.as_fd(), PollFlags::POLLOUT)).collect();
            let ready = wait_ready_until(&wanted, Some(first_deadline))?;
            let now = Instant::now();
            for events in ready {
                let Some((socket, deadline)) = under_way.pop_front() else { break };
                if !events.is_empty() {
                    match finish_connect(socket) {
                        Ok(stream) => self.streams.push(stream),
                        Err(error) => self.failures.push(error),
                    }
                } else if now >= deadline {
                    self.failures.push(io::ErrorKind::TimedOut.into());
                } else {
                    // Every one is taken from the front and put back once, so the order stays.
                    under_way.push_back((socket, deadline));
                }
            }
        }
        Ok(())
    }

    /// How many are established.
    pub fn established(&self) -> usize {
        self.streams.len()
    }

    /// Why the others failed: `TimedOut` where nothing answered.
    pub fn failures(&self) -> &[io::Error] {
        &self.failures
    }

    /// The clients' own addresses and ports, in the order they were established.
    pub fn locals(&self) -> Vec<SocketAddr> {
        self.streams.iter().filter_map(|stream| stream.local_addr().ok()).collect()
    }

    /// Sends a byte over each connection to an echo server and counts those that bring it back within
    /// `timeout` for all of them together: how many still live.
    pub fn alive(&mut self, timeout: Duration) -> usize {
        let deadline = Instant::now() + timeout;
        let sent: Vec<bool> = self.streams.iter_mut().map(|stream| stream.write_all(b"?").is_ok()).collect();
        let answers = self
            .streams
            .iter_mut()
            .zip(sent)
            .filter_map(|(stream, sent)| (sent && read_byte(stream, deadline).is_ok()).then_some(()));
        answers.count()
    }

    /// Closes `count` of them, the latest first; returns how many were.
    pub fn close(&mut self, count: usize) -> usize {
        let keep = self.streams.len().saturating_sub(count);
        self.streams.drain(keep..).count()
    }
}

fn read_byte(stream: &mut TcpStream, deadline: Instant) -> io::Result<()> {
    loop {
        match stream.read(&mut [0; 1]) {
            Ok(1) => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                left_until(deadline).map_err(as_timeout)?;
                wait_ready_until(&[(stream.as_fd(), PollFlags::POLLIN)], Some(deadline))?;
            }
            Err(error) => return Err(error),
        }
    }
}
