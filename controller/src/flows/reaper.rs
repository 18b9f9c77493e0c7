//! The reaper: frees the slots of dead flows. The kernel does not wait for it; it keeps the table tidy and the numbers
//! true, and tells the ends of idle connections that wanted to be told ([`super::reset`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use portcullis_common::clock::TICK_SHIFT;
use portcullis_common::layout::NextHop;
use serde::{Deserialize, Serialize};

use super::recount::Recount;
use super::reset::{Sender, resets};
use crate::datapath::{FlowTable, Swept, now_tick};

/// How often the reaper asks whether there is something to do.
const BEAT: Duration = Duration::from_millis(500);
/// A sweep is followed by a pause of at least this many times what it took of a CPU, so that the largest table costs 2 % of
/// one.
const SHARE: u32 = 50;
/// ... but of this many if it freed one slot in [`MANY`]: then the work is part of what new flows cost.
const SHARE_OF_MANY: u32 = 4;
const MANY: u32 = 16;
/// Packets that open no flow may shorten a life, by a FIN or a RST; no more than this late it is noticed.
const LATE: Duration = Duration::from_secs(15);

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
    corrected: AtomicU64,
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
    /// Guests whose count of flows was put right: somebody had ended between freeing a record and counting it.
    #[serde(default)]
    pub quotas_corrected: u64,
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
            quotas_corrected: self.corrected.load(Relaxed),
            ipv4: self.tables[0].report(),
            ipv6: self.tables[1].report(),
        }
    }

    /// Ends the reaper at its next pause.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// What the reaper asks the datapath.
pub trait ReapedDatapath: Send + 'static {
    /// The next hop with this index.
    fn next_hop(&self, index: u16) -> Option<NextHop>;
    /// Packets that opened a flow, and packets, since any time.
    fn traffic(&self) -> (u64, u64);
}

/// Starts the reaper of the tables of IPv4 and IPv6, in a thread of its own: a sweep of a large table takes tens of
/// milliseconds, which nobody else should wait for.
pub fn reap(
    tables: &[Arc<FlowTable>; 2],
    counts: &Arc<ReaperCounts>,
    datapath: impl ReapedDatapath,
) -> io::Result<()> {
    let (tables, counts) = (tables.clone(), Arc::clone(counts));
    let run = move || work(&tables, &counts, &datapath);
    std::thread::Builder::new().name("reaper".to_owned()).spawn(run).map(drop)
}

fn work(tables: &[Arc<FlowTable>; 2], counts: &ReaperCounts, datapath: &dyn ReapedDatapath) {
    let mut sender = match Sender::open() {
        Ok(sender) => Some(sender),
        Err(error) => {
            log::warn!("idle connections end without a RST: {error:#}");
            None
        }
    };
    let tables = tables.each_ref().map(Arc::as_ref);
    let look = || {
        let (new_flows, packets) = datapath.traffic();
        News { new_flows, packets, ended: tables.map(FlowTable::ended) }
    };
    let mut recount = Recount::default();
    while !counts.stop.load(Relaxed) {
        let before = look();
        let done = sweep(tables, counts, &mut recount, sender.as_mut(), datapath);
        let since = Instant::now();
        while !counts.stop.load(Relaxed) && !done.is_over(since.elapsed(), before, look) {
            std::thread::sleep(BEAT);
        }
    }
}

/// What says that there is something to be found in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct News {
    new_flows: u64,
    packets: u64,
    ended: [u32; 2],
}

/// How a sweep went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Done {
    /// Of a CPU.
    took: Duration,
    /// It freed many slots.
    many: bool,
    /// How long after it the first slot can be freed that was not, if nothing happens meanwhile.
    due: Option<Duration>,
}

impl Done {
    /// Is it time for the next sweep, so long after this one, before which there was this news? A table in which nothing
    /// happens is left alone until a flow in it is dead.
    fn is_over(self, since: Duration, before: News, look: impl FnOnce() -> News) -> bool {
        let share = if self.many { SHARE_OF_MANY } else { SHARE };
        if since < BEAT.max(self.took * share) {
            return false;
        }
        if self.due.is_some_and(|due| since >= due) {
            return true;
        }
        let now = look();
        (now.new_flows, now.ended) != (before.new_flows, before.ended) || (now != before && since >= LATE)
    }
}

/// One sweep over the tables of IPv4 and IPv6.
fn sweep(
    tables: [&FlowTable; 2],
    counts: &ReaperCounts,
    recount: &mut Recount,
    mut sender: Option<&mut Sender>,
    datapath: &dyn ReapedDatapath,
) -> Done {
    let (began, worked) = (Instant::now(), processor_time());
    let now = now_tick();
    let mut all = Swept::default();
    recount.begin(tables[0].guests());
    for (table, counts) in tables.into_iter().zip(&counts.tables) {
        let swept = table.sweep_counting(now, recount.held(), |index, record| {
            let Some(sender) = sender.as_deref_mut() else { return };
            for reset in resets(table, index, record, now).into_iter().flatten() {
                if let Some(hop) = datapath.next_hop(reset.next_hop) {
                    sender.send(&reset, &hop);
                }
            }
        });
        counts.note(swept);
        all.freed += swept.freed;
        all.live += swept.live + swept.waiting;
        all.due = [all.due, swept.due].into_iter().flatten().min();
    }
    let corrected = recount.end(tables[0].guests());
    counts.corrected.fetch_add(corrected, Relaxed);
    let took = processor_time().saturating_sub(worked);
    counts.sweeps.fetch_add(1, Relaxed);
    counts.microseconds.store(began.elapsed().as_micros() as u64, Relaxed);
    if let Some(sender) = sender {
        let (sent, withheld) = sender.counts();
        counts.resets_sent.store(sent, Relaxed);
        counts.resets_withheld.store(withheld, Relaxed);
    }
    let due = all.due.map(|ticks| Duration::from_nanos(u64::from(ticks) << TICK_SHIFT));
    Done { took, many: all.freed > 0 && all.freed >= all.live / MANY, due }
}

/// What this thread has used of a CPU.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::kill::tests::{Put, TCP, put, with_tables};

    struct Nothing;

    impl ReapedDatapath for Nothing {
        fn next_hop(&self, _: u16) -> Option<NextHop> {
            None
        }

        fn traffic(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    #[test]
    fn a_table_in_which_nothing_happens_is_left_alone_until_a_flow_in_it_is_dead() {
        let quiet = News { new_flows: 7, packets: 70, ended: [0, 0] };
        let done = Done { took: Duration::from_millis(40), many: false, due: Some(Duration::from_secs(200)) };
        let over = |done: Done, seconds: f64, news: News| {
            done.is_over(Duration::from_secs_f64(seconds), quiet, || news)
        };
        assert_eq!([3.0, 199.9, 200.0].map(|at| over(done, at, quiet)), [false, false, true]);
        let opened = News { new_flows: 8, packets: 71, ..quiet };
        assert_eq!([1.9, 2.0].map(|at| over(done, at, opened)), [false, true], "2 % of one CPU at most");
        let killed = News { ended: [0, 1], ..quiet };
        assert!(over(done, 2.0, killed));
        let moved = News { packets: 71, ..quiet };
        assert_eq!([14.9, 15.0].map(|at| over(done, at, moved)), [false, true], "a RST may have passed");
        let busy = Done { many: true, due: Some(Duration::ZERO), ..done };
        assert_eq!([0.4, 0.5].map(|at| over(busy, at, quiet)), [false, true]);
        let empty = Done { due: None, ..done };
        assert!(!over(empty, 1e6, quiet));
    }

    #[test]
    fn a_sweep_goes_over_both_tables_and_tells_them_apart() {
        with_tables(|flows, flows6| {
            put(flows, TCP);
            put(flows6, TCP);
            put(flows6, Put { slot: 2, ..TCP });
            assert!(flows6.end(2, &flows6.read(2).unwrap(), now_tick()));
            let counts = ReaperCounts::default();
            sweep([flows, flows6], &counts, &mut Recount::default(), None, &Nothing);
            let report = counts.report();
            assert_eq!((report.sweeps, report.ipv4.live, report.ipv4.waiting), (1, 2, 0));
            assert_eq!((report.ipv6.live, report.ipv6.waiting, report.ipv6.freed), (2, 2, 0));
            // The grace is three ticks of 67 ms.
            std::thread::sleep(Duration::from_millis(400));
            sweep([flows, flows6], &counts, &mut Recount::default(), None, &Nothing);
            let report = counts.report();
            assert_eq!(
                (report.sweeps, report.ipv6.live, report.ipv6.waiting, report.ipv6.freed),
                (2, 2, 0, 2)
            );
            assert_eq!(report.ipv4.freed, 0);
        });
    }
}
