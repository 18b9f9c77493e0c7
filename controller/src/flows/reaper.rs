//! The reaper: frees the slots of dead flows. The kernel does not wait for it; it keeps the table tidy and the numbers
//! true.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::datapath::{FlowTable, now_tick};

/// Between two sweeps.
const PAUSE: Duration = Duration::from_secs(1);
/// A sweep is followed by a pause of this many times its length, so that the largest table costs 2 % of one CPU.
const SHARE: u32 = 50;

/// What the reaper has found so far.
#[derive(Debug, Default)]
pub struct ReaperCounts {
    sweeps: AtomicU64,
    freed: AtomicU64,
    live: AtomicU64,
    waiting: AtomicU64,
    microseconds: AtomicU64,
    stop: AtomicBool,
}

/// The same, to be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReaperReport {
    pub sweeps: u64,
    /// Half-records freed since the start.
    pub freed: u64,
    /// Half-records alive at the last sweep.
    pub live: u64,
    /// Half-records dead, but not for long enough.
    pub waiting: u64,
    pub last_sweep_milliseconds: f64,
}

impl ReaperCounts {
    /// What is known now.
    pub fn report(&self) -> ReaperReport {
        ReaperReport {
            sweeps: self.sweeps.load(Relaxed),
            freed: self.freed.load(Relaxed),
            live: self.live.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            last_sweep_milliseconds: self.microseconds.load(Relaxed) as f64 / 1000.0,
        }
    }

    /// Ends the reaper at its next pause.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// Starts the reaper, in a thread of its own: a sweep of a large table takes tens of milliseconds, which nobody else
/// should wait for.
pub fn reap(table: &Arc<FlowTable>, counts: &Arc<ReaperCounts>) -> io::Result<()> {
    let (table, counts) = (Arc::clone(table), Arc::clone(counts));
    std::thread::Builder::new().name("reaper".to_owned()).spawn(move || work(&table, &counts)).map(drop)
}

fn work(table: &FlowTable, counts: &ReaperCounts) {
    while !counts.stop.load(Relaxed) {
        let began = Instant::now();
        let swept = table.sweep(now_tick(), |_, _| {});
        let took = began.elapsed();
        counts.sweeps.fetch_add(1, Relaxed);
        counts.freed.fetch_add(u64::from(swept.freed), Relaxed);
        counts.live.store(u64::from(swept.live), Relaxed);
        counts.waiting.store(u64::from(swept.waiting), Relaxed);
        counts.microseconds.store(took.as_micros() as u64, Relaxed);
        std::thread::sleep(PAUSE.max(took * SHARE));
    }
}
