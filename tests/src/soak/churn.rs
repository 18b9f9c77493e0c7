//! New flows, one after the other, each of which has to succeed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use super::stand::{SERVER, TCP_PORT, UDP_PORT};
use crate::lab::{Namespace, tcp_exchange, udp_exchange};

/// For one exchange. A connection's first segments may be late, a datagram that is lost is lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// Source ports of datagrams: the first, and how many. Fewer than the ports that a guest owns.
const SOCKETS: (u16, u16) = (20_000, 800);
/// Between two exchanges: new flows are to be seen, not to fill the machine.
const PAUSE: Duration = Duration::from_millis(5);

/// What has been exchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Exchanged {
    pub connections: u64,
    pub datagrams: u64,
    /// Of either; each a packet that policy allows and nobody got.
    pub failed: u64,
    /// The first failures, in words.
    pub failures: Vec<String>,
}

#[derive(Default)]
struct Counts {
    connections: AtomicU64,
    datagrams: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

/// A guest that opens flows until this is dropped.
pub struct Churn {
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

impl Churn {
    /// Starts it.
    pub fn start(guest: &Namespace) -> Self {
        let counts = Arc::new(Counts::default());
        let run = |tcp: bool| {
            let (guest, counts) = (guest.clone(), Arc::clone(&counts));
            std::thread::spawn(move || exchange(&guest, &counts, tcp))
        };
        let threads = vec![run(true), run(false)];
        Churn { counts, threads }
    }

    /// So far.
    pub fn exchanged(&self) -> Exchanged {
        let of = |count: &AtomicU64| count.load(SeqCst);
        Exchanged {
            connections: of(&self.counts.connections),
            datagrams: of(&self.counts.datagrams),
            failed: of(&self.counts.failed),
            failures: self.counts.failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.counts.stopped.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn exchange(guest: &Namespace, counts: &Counts, tcp: bool) {
    let mut number = 0u64;
    while !counts.stopped.load(SeqCst) {
        number += 1;
        let payload = number.to_be_bytes();
        let result = if tcp {
            let server = SocketAddr::from((SERVER, TCP_PORT));
            tcp_exchange(guest, None, server, &payload, PATIENCE).map(|_| &counts.connections)
        } else {
            let server = SocketAddr::from((SERVER, UDP_PORT));
            // A datagram's port is held for four minutes, so there are only so many sockets.
            let socket = SOCKETS.0 + (number % u64::from(SOCKETS.1)) as u16;
            udp_exchange(guest, Some(socket), server, &payload, PATIENCE).map(|_| &counts.datagrams)
        };
        match result {
            Ok(count) => _ = count.fetch_add(1, SeqCst),
            Err(error) => {
                counts.failed.fetch_add(1, SeqCst);
                let mut failures = counts.failures.lock().unwrap_or_else(PoisonError::into_inner);
                if failures.len() < 10 {
                    failures
                        .push(format!("{} {number}: {error}", if tcp { "connection" } else { "datagram" }));
                }
            }
        }
        std::thread::sleep(PAUSE);
    }
}
