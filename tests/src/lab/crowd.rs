//! Tens of thousands of TCP connections at once, from many source addresses of one namespace, each with a word of its
//! own. What [`super::TcpHold`] does for hundreds.
//!
//! Both ends of them are in this process, and a container's limit of open files is often 20,000. It holds for a table
//! of descriptors, so each of a few threads has one of its own (unshare(2), `CLONE_FILES`), and what is opened in a
//! thread stays in it.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, RawFd};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::namespace::Namespace;
use super::server::wait_ready_until;
use super::tcp::{begin_connect_from, raise_open_files};

/// What one connection says, and must hear back.
pub type Word = u64;
pub(super) const WORD: usize = size_of::<Word>();

/// Threads at either end.
pub(super) const SHARDS: u32 = 3;
/// Connects begun at once by a thread: the ring of a veth with NAPI takes 256 packets and the rest is lost, and found
/// again only a second later.
const AT_ONCE: usize = 64;
/// How long they are waited for before the next are begun.
const PACE: Duration = Duration::from_millis(20);

/// Gives the calling thread a table of descriptors of its own, with standard input, output, error and `keep` in it.
///
/// Others' descriptors are closed in it only, so that no pipe stays open for our sake. From here on the thread must not
/// touch what was opened before, nor let go of what it opens.
pub(super) fn own_descriptors(keep: Option<RawFd>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    let kept = keep.map_or(2, |fd| fd as u32);
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: takes three integers; the table is this thread's alone, and it uses none of what is closed.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

pub(super) fn wait(epoll: &Epoll, events: &mut [EpollEvent], milliseconds: u16) -> io::Result<usize> {
    match epoll.wait(events, milliseconds) {
        Err(nix::Error::EINTR) => Ok(0),
        other => Ok(other?),
    }
}

/// What a thread is asked to do with its connections.
type Order = Box<dyn FnOnce(&mut Shard) + Send>;

/// Connections that stay open until they are closed or this is dropped.
#[derive(Debug)]
pub struct Crowd {
    /// `None` once they are to end.
    orders: Option<Vec<Sender<Order>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Crowd {
    /// Nobody yet; connections will come from inside `namespace`.
    pub fn new(namespace: &Namespace) -> io::Result<Self> {
        raise_open_files();
        let (mut orders, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..SHARDS {
            let (order, taken) = mpsc::channel::<Order>();
            let namespace = namespace.clone();
            let work = move || {
                namespace.enter(move || {
                    let mut shard = Shard::new().expect("a thread may have a table of its own");
                    while let Ok(order) = taken.recv() {
                        order(&mut shard);
                    }
                });
            };
            threads.push(std::thread::Builder::new().name("lab-crowd".to_owned()).spawn(work)?);
            orders.push(order);
        }
        Ok(Crowd { orders: Some(orders), threads })
    }

    /// Who said this word to a [`super::CrowdEcho`].
    pub fn who(word: Word) -> u32 {
        (word >> 32) as u32
    }

    /// Lets every thread do `work`, all at once, and waits for them.
    ///
    /// # Panics
    /// If one of them did.
    fn each<T: Send + 'static>(
        &self,
        work: impl Fn(u32, &mut Shard) -> T + Clone + Send + 'static,
    ) -> Vec<T> {
        let (answer, answers) = mpsc::channel();
        for (number, order) in (0..).zip(self.orders.iter().flatten()) {
            let (work, answer) = (work.clone(), answer.clone());
            let sent = order.send(Box::new(move |shard| _ = answer.send(work(number, shard))));
            sent.expect("a thread of the crowd ended; its message is above");
        }
        drop(answer);
        let all: Vec<T> = answers.iter().collect();
        assert_eq!(all.len(), SHARDS as usize, "a thread of the crowd panicked; its message is above");
        all
    }

    /// Begins a connection from each of these sources (port 0: the kernel chooses), a few at a time, without waiting
    /// for those that get no answer. `who` is how the caller names it.
    pub fn connect(&self, sources: &[(u32, SocketAddr)], destination: SocketAddr) -> io::Result<()> {
        let sources = sources.to_vec();
        self.each(move |number, shard| {
            let mine: Vec<_> = sources.iter().filter(|(who, _)| who % SHARDS == number).copied().collect();
            shard.connect(&mine, destination)
        })
        .into_iter()
        .collect()
    }

    /// Takes note of connections that are established, until there are `count` or `timeout` has passed; how many there
    /// are.
    pub fn settle(&self, timeout: Duration, count: usize) -> io::Result<usize> {
        let deadline = Instant::now() + timeout;
        loop {
            let some = self.each(|_, shard| {
                shard.settle(PACE, |_| false)?;
                Ok::<_, io::Error>(shard.clients.values().filter(|client| client.established).count())
            });
            let now = some.into_iter().sum::<io::Result<usize>>()?;
            if now >= count || Instant::now() >= deadline {
                return Ok(now);
            }
        }
    }

    /// Established connections of each that has any.
    pub fn established(&self) -> BTreeMap<u32, usize> {
        let all = self.each(|_, shard| {
            let mut count = BTreeMap::new();
            for client in shard.clients.values().filter(|client| client.established) {
                *count.entry(client.who).or_default() += 1;
            }
            count
        });
        all.into_iter().flatten().collect()
    }

    /// Each established connection says its word; counted are those that hear it back, by who they are.
    pub fn echo(&self, timeout: Duration) -> io::Result<BTreeMap<u32, usize>> {
        let deadline = Instant::now() + timeout;
        let all =
            self.each(move |_, shard| shard.echo(deadline)).into_iter().collect::<io::Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Gives up those that are not established: they send no more.
    pub fn give_up(&self) {
        self.each(|_, shard| shard.clients.retain(|_, client| client.established));
    }

    /// Closes the connections of those whose number is below `who`, and gives up what they began.
    pub fn close_below(&self, who: u32) {
        self.each(move |_, shard| shard.clients.retain(|_, client| client.who >= who));
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.orders = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("a thread of the crowd panicked; its message is above");
            }
        }
    }
}

/// The connections of one thread.
struct Shard {
    epoll: Epoll,
    clients: HashMap<u64, Client>,
    next: u64,
}

struct Client {
    who: u32,
    stream: TcpStream,
    established: bool,
}

impl Client {
    /// Who speaks, and in which of his connections.
    fn word(&self, token: u64) -> Word {
        u64::from(self.who) << 32 | token
    }
}

impl Shard {
    fn new() -> io::Result<Self> {
        own_descriptors(None)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Shard { epoll, clients: HashMap::new(), next: 0 })
    }

    fn connect(&mut self, sources: &[(u32, SocketAddr)], destination: SocketAddr) -> io::Result<()> {
        for some in sources.chunks(AT_ONCE) {
            let first = self.next;
            for (who, source) in some {
                let stream = TcpStream::from(begin_connect_from(Some(*source), destination)?);
                self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLOUT, self.next))?;
                self.clients.insert(self.next, Client { who: *who, stream, established: false });
                self.next += 1;
            }
            self.settle(PACE, |shard| {
                (first..shard.next).all(|t| shard.clients.get(&t).is_none_or(|client| client.established))
            })?;
        }
        Ok(())
    }

    /// Takes note of connections that are established, until `done` or `timeout` has passed.
    fn settle(&mut self, timeout: Duration, done: impl Fn(&Shard) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        let mut events = vec![EpollEvent::empty(); 256];
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let milliseconds = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
            let ready = wait(&self.epoll, &mut events, milliseconds)?;
            for event in &events[..ready] {
                let Some(client) = self.clients.get_mut(&event.data()) else { continue };
                self.epoll.delete(&client.stream)?;
                match client.stream.take_error()? {
                    None => client.established = true,
                    // Gone, and counted by nobody: what the caller counts is who is there.
                    Some(_) => _ = self.clients.remove(&event.data()),
                }
            }
        }
        Ok(())
    }

    fn echo(&mut self, deadline: Instant) -> io::Result<BTreeMap<u32, usize>> {
        let mut count = BTreeMap::new();
        let mut all: Vec<_> = self.clients.iter_mut().filter(|(_, client)| client.established).collect();
        for some in all.chunks_mut(AT_ONCE) {
            for (token, client) in &mut *some {
                // What fails here is not heard back.
                let _ = client.stream.write_all(&client.word(**token).to_be_bytes());
            }
            for (token, client) in some {
                let (mut word, mut filled) = ([0; WORD], 0);
                while filled < WORD && Instant::now() < deadline {
                    match client.stream.read(&mut word[filled..]) {
                        Ok(0) => break,
                        Ok(read) => filled += read,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {
                            wait_ready_until(&[(client.stream.as_fd(), PollFlags::POLLIN)], Some(deadline))?;
                        }
                        Err(_) => break,
                    }
                }
                if filled == WORD && Word::from_be_bytes(word) == client.word(**token) {
                    *count.entry(client.who).or_default() += 1;
                }
            }
        }
        Ok(count)
    }
}
