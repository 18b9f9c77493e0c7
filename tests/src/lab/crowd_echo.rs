//! The server of a [`super::Crowd`]: what [`super::TcpEcho`] does for hundreds by poll(2), for tens of thousands by
//! epoll.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::crowd::{SHARDS, WORD, Word, own_descriptors, wait};
use super::namespace::Namespace;
use super::server::lock;
use super::tcp::{listen_on, raise_open_files};

/// Connections one thread takes; together they take 45,000.
const SHARE: usize = 15_000;
/// How often a thread looks whether it is to stop, milliseconds.
const LOOK: u16 = 20;
const LISTENER: u64 = u64::MAX;

/// A server that sends back what it hears and remembers who said it; stops when dropped.
#[derive(Debug)]
pub struct CrowdEcho {
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    // The threads have copies in tables of their own; this one is dropped after they have ended.
    _listener: Arc<TcpListener>,
}

/// What a [`CrowdEcho`] knows.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// What each connection that is open now said last, by its peer as seen from here.
    pub open: BTreeMap<SocketAddr, Word>,
    /// Peers that said different words in one connection: two speakers behind one address and port.
    pub mixed: Vec<SocketAddr>,
}

impl CrowdEcho {
    /// Listens on `address` inside `namespace`.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        raise_open_files();
        let listener = Arc::new(namespace.enter(|| listen_on(address))?);
        let (heard, stop) = (Arc::<Mutex<Heard>>::default(), Arc::<AtomicBool>::default());
        let mut threads = Vec::new();
        for _ in 0..SHARDS {
            let (listener, heard, stop) = (Arc::clone(&listener), Arc::clone(&heard), Arc::clone(&stop));
            let serve = move || {
                own_descriptors(Some(listener.as_raw_fd()))?;
                serve(&listener, &stop, &heard)
            };
            threads.push(std::thread::Builder::new().name("lab-crowd-echo".to_owned()).spawn(serve)?);
        }
        Ok(CrowdEcho { heard, stop, threads, _listener: listener })
    }

    /// What it has heard so far.
    pub fn heard(&self) -> Heard {
        lock(&self.heard).clone()
    }
}

impl Drop for CrowdEcho {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !matches!(ended, Ok(Ok(()))) && !std::thread::panicking() {
                panic!("an echo server for a crowd: {ended:?}");
            }
        }
    }
}

struct Speaker {
    stream: TcpStream,
    peer: SocketAddr,
    /// Bytes of a word that is not whole yet.
    begun: Vec<u8>,
}

fn serve(listener: &TcpListener, stop: &AtomicBool, heard: &Mutex<Heard>) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let (mut speakers, mut next, mut listens) = (HashMap::new(), 0u64, false);
    let mut events = vec![EpollEvent::empty(); 256];
    while !stop.load(Relaxed) {
        if listens != (speakers.len() < SHARE) {
            listens = !listens;
            if listens {
                epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
            } else {
                epoll.delete(listener)?;
            }
        }
        let ready = wait(&epoll, &mut events, LOOK)?;
        for event in &events[..ready] {
            if event.data() == LISTENER {
                // A few at a time, so that the threads share them.
                if let Some((stream, peer)) = accept(listener)? {
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, next))?;
                    speakers.insert(next, Speaker { stream, peer, begun: Vec::new() });
                    next += 1;
                }
            } else if let Some(speaker) = speakers.get_mut(&event.data())
                && !speaker.serve(heard)
            {
                lock(heard).open.remove(&speaker.peer);
                // Closing takes it out of the epoll set.
                speakers.remove(&event.data());
            }
        }
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    match listener.accept() {
        Ok((stream, peer)) => {
            stream.set_nonblocking(true)?;
            Ok(Some((stream, peer)))
        }
        // Another thread was faster, or the peer reset it before we looked.
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Speaker {
    /// Answers the words that have come; whether the connection goes on.
    fn serve(&mut self, heard: &Mutex<Heard>) -> bool {
        let mut buffer = [0; 64];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(read) => self.begun.extend(&buffer[..read]),
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
            while let Some((word, rest)) = self.begun.split_first_chunk::<WORD>() {
                let said = Word::from_be_bytes(*word);
                // A few bytes always fit an empty send buffer.
                if self.stream.write_all(word).is_err() {
                    return false;
                }
                self.begun = rest.to_vec();
                let mut heard = lock(heard);
                if heard.open.insert(self.peer, said).is_some_and(|before| before != said) {
                    heard.mixed.push(self.peer);
                }
            }
        }
    }
}
