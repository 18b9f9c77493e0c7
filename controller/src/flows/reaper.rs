//! The reaper: frees the slots of dead flows. The kernel does not wait for it; it keeps the table tidy and the numbers
//! true, and tells the ends of idle connections that wanted to be told ([`super::reset`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use portcullis_common::layout::NextHop;
use serde::{Deserialize, Serialize};

use super::reset::{Sender, resets};
use crate::datapath::{FlowTable, Swept, now_tick};

/// Between two sweeps.
const PAUSE: Duration = Duration::from_secs(1);
/// A sweep is followed by a pause of this many times its length, so that the largest table costs 2 % of one CPU.
const SHARE: u32 = 50;

/// What the reaper has found so far.
#[derive(Debug, Default)]
pub struct ReaperCounts {
    sweeps: AtomicU64,
    /// Of IPv4 and of IPv6.
    tables: [TableCounts; 2],
    microseconds: AtomicU64,
    /// RSTs to the ends of idle connections.
    resets_sent: AtomicU64,
    resets_withheld: AtomicU64,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct TableCounts {
    freed: AtomicU64,
    live: AtomicU64,
    waiting: AtomicU64,
}

/// The same, to be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReaperReport {
    pub sweeps: u64,
    /// For both tables together.
    pub last_sweep_milliseconds: f64,
    /// RSTs to the ends of idle connections (`enableTcpReset`).
    #[serde(default)]
    pub resets_sent: u64,
    /// RSTs over the rate of 10,000 a second, or that the kernel refused to send.
    #[serde(default)]
    pub resets_withheld: u64,
    pub ipv4: TableReport,
    pub ipv6: TableReport,
}

/// What the reaper found in one flow table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableReport {
    /// Half-records freed since the start.
    pub freed: u64,
    /// Half-records alive at the last sweep.
    pub live: u64,
    /// Half-records dead, but not for long enough.
    pub waiting: u64,
}

impl TableCounts {
    fn report(&self) -> TableReport {
        TableReport {
            freed: self.freed.load(Relaxed),
            live: self.live.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
        }
    }

    fn note(&self, swept: Swept) {
        self.freed.fetch_add(u64::from(swept.freed), Relaxed);
        self.live.store(u64::from(swept.live), Relaxed);
        self.waiting.store(u64::from(swept.waiting), Relaxed);
    }
}

impl ReaperCounts {
    /// What is known now.
    pub fn report(&self) -> ReaperReport {
        ReaperReport {
            sweeps: self.sweeps.load(Relaxed),
            last_sweep_milliseconds: self.microseconds.load(Relaxed) as f64 / 1000.0,
            resets_sent: self.resets_sent.load(Relaxed),
            resets_withheld: self.resets_withheld.load(Relaxed),
            ipv4: self.tables[0].report(),
            ipv6: self.tables[1].report(),
        }
    }

    /// Ends the reaper at its next pause.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// Finds a next hop by its index.
type Hops = dyn Fn(u16) -> Option<NextHop> + Send;

/// Starts the reaper of the tables of IPv4 and IPv6, in a thread of its own: a sweep of a large table takes tens of
/// milliseconds, which nobody else should wait for. `hops` finds the next hop with an index.
pub fn reap(
    tables: &[Arc<FlowTable>; 2],
    counts: &Arc<ReaperCounts>,
    hops: impl Fn(u16) -> Option<NextHop> + Send + 'static,
) -> io::Result<()> {
    let (tables, counts) = (tables.clone(), Arc::clone(counts));
    let run = move || work(&tables, &counts, &hops);
    std::thread::Builder::new().name("reaper".to_owned()).spawn(run).map(drop)
}

fn work(tables: &[Arc<FlowTable>; 2], counts: &ReaperCounts, hops: &Hops) {
    let mut sender = match Sender::open() {
        Ok(sender) => Some(sender),
        Err(error) => {
            log::warn!("idle connections end without a RST: {error:#}");
            None
        }
    };
    while !counts.stop.load(Relaxed) {
        let took = sweep(tables.each_ref().map(Arc::as_ref), counts, sender.as_mut(), hops);
        std::thread::sleep(PAUSE.max(took * SHARE));
    }
}

/// One sweep over the tables of IPv4 and IPv6; how long it took.
fn sweep(
    tables: [&FlowTable; 2],
    counts: &ReaperCounts,
    mut sender: Option<&mut Sender>,
    hops: &Hops,
) -> Duration {
    let began = Instant::now();
    let now = now_tick();
    for (table, counts) in tables.into_iter().zip(&counts.tables) {
        counts.note(table.sweep(now, |index, record| {
            let Some(sender) = sender.as_deref_mut() else { return };
            for reset in resets(table, index, record, now).into_iter().flatten() {
                if let Some(hop) = hops(reset.next_hop) {
                    sender.send(&reset, &hop);
                }
            }
        }));
    }
    let took = began.elapsed();
    counts.sweeps.fetch_add(1, Relaxed);
    counts.microseconds.store(took.as_micros() as u64, Relaxed);
    if let Some(sender) = sender {
        let (sent, withheld) = sender.counts();
        counts.resets_sent.store(sent, Relaxed);
        counts.resets_withheld.store(withheld, Relaxed);
    }
    took
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::kill::tests::{Put, TCP, put, with_tables};

    #[test]
    fn a_sweep_goes_over_both_tables_and_tells_them_apart() {
        with_tables(|flows, flows6| {
            put(flows, TCP);
            put(flows6, TCP);
            put(flows6, Put { slot: 2, ..TCP });
            assert!(flows6.end(2, &flows6.read(2).unwrap(), now_tick()));
            let counts = ReaperCounts::default();
            sweep([flows, flows6], &counts, None, &|_| None);
            let report = counts.report();
            assert_eq!((report.sweeps, report.ipv4.live, report.ipv4.waiting), (1, 2, 0));
            assert_eq!((report.ipv6.live, report.ipv6.waiting, report.ipv6.freed), (2, 2, 0));
            // The grace is three ticks of 67 ms.
            std::thread::sleep(Duration::from_millis(400));
            sweep([flows, flows6], &counts, None, &|_| None);
            let report = counts.report();
            assert_eq!(
                (report.sweeps, report.ipv6.live, report.ipv6.waiting, report.ipv6.freed),
                (2, 2, 0, 2)
            );
            assert_eq!(report.ipv4.freed, 0);
        });
    }
}
