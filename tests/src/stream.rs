//! Streams that must not break: numbers sent to an echo server, each awaited before the next, until told to stop.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::lab::{Namespace, tcp_connect, udp_socket};

/// How long an answer may take before the stream counts as broken: several retransmissions.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a datagram's answer is awaited before it counts as lost.
const LOST: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Progress {
    stop: AtomicBool,
    echoed: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Progress {
    fn failed(&self, error: &anyhow::Error) {
        if let Ok(mut failure) = self.failure.lock() {
            *failure = Some(format!("{error:#}"));
        }
    }
    fn failure(&self) -> Option<String> {
        self.failure.lock().ok().and_then(|failure| failure.clone())
    }
}

/// Numbers over one TCP connection.
#[derive(Debug)]
pub struct TcpStreamOfNumbers {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl TcpStreamOfNumbers {
    /// Connects from inside the namespace and begins.
    pub fn start(from: &Namespace, to: SocketAddr) -> anyhow::Result<Self> {
        let mut stream = tcp_connect(from, None, to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let progress = Arc::new(Progress::default());
        let mine = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            let mut talk = || -> anyhow::Result<()> {
                let mut number = 0u64;
                while !mine.stop.load(Ordering::Relaxed) {
                    stream.write_all(&number.to_be_bytes()).context("sending")?;
                    let mut back = [0; 8];
                    stream.read_exact(&mut back).context("reading")?;
                    ensure!(u64::from_be_bytes(back) == number, "{back:?} came back for {number}");
                    number += 1;
                    mine.echoed.store(number, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(())
            };
            talk().inspect_err(|error| mine.failed(error))
        });
        Ok(Self { progress, thread: Some(thread) })
    }

    /// Numbers that have come back.
    pub fn echoed(&self) -> u64 {
        self.progress.echoed.load(Ordering::Relaxed)
    }

    /// Why it has broken, if it has.
    pub fn failure(&self) -> Option<String> {
        self.progress.failure()
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it had broken.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.progress.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            _ => bail!("the stream's thread panicked"),
        }
    }
}

impl Drop for TcpStreamOfNumbers {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
    }
}

/// Numbers in datagrams from one UDP socket.
#[derive(Debug)]
pub struct UdpStreamOfNumbers {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<anyhow::Result<u64>>>,
}

impl UdpStreamOfNumbers {
    /// Begins, from a socket inside the namespace.
    pub fn start(from: &Namespace, to: SocketAddr) -> anyhow::Result<Self> {
        let socket = udp_socket(from, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        socket.set_read_timeout(Some(LOST))?;
        let progress = Arc::new(Progress::default());
        let mine = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            let talk = || -> anyhow::Result<u64> {
                let (mut number, mut lost, mut in_a_row) = (0u64, 0, 0);
                while !mine.stop.load(Ordering::Relaxed) {
                    // Told of errors of the moment, which count as a loss.
                    let _ = socket.send_to(&number.to_be_bytes(), to);
                    let mut back = [0; 8];
                    let came = loop {
                        match socket.recv(&mut back) {
                            Ok(8) if u64::from_be_bytes(back) == number => break true,
                            // An answer that was given up.
                            Ok(_) => {}
                            Err(_) => break false,
                        }
                    };
                    if came {
                        mine.echoed.fetch_add(1, Ordering::Relaxed);
                        in_a_row = 0;
                    } else {
                        lost += 1;
                        in_a_row += 1;
                        ensure!(
                            in_a_row < 6,
                            "{in_a_row} datagrams lost one after the other, from number {number} on"
                        );
                    }
                    number += 1;
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(lost)
            };
            talk().inspect_err(|error| mine.failed(error))
        });
        Ok(Self { progress, thread: Some(thread) })
    }

    /// Numbers that have come back.
    pub fn echoed(&self) -> u64 {
        self.progress.echoed.load(Ordering::Relaxed)
    }

    /// Why it has broken, if it has.
    pub fn failure(&self) -> Option<String> {
        self.progress.failure()
    }

    /// Ends it; how many were lost.
    ///
    /// # Errors
    /// If it had broken.
    pub fn stop(mut self) -> anyhow::Result<u64> {
        self.progress.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            _ => bail!("the stream's thread panicked"),
        }
    }
}

impl Drop for UdpStreamOfNumbers {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
    }
}
