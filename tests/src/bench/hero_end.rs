//! What is left when the hero run is over: in time, nothing.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use portcullis::datapath::now_tick;
use portcullis::flows::live_units;
use portcullis_common::layout::KIND_FLOW;

use super::hero_stage::{IDLE, Stage};
use crate::stop;

/// A flow may be there no longer than this after its deadline, a port no longer than this after its own.
const LIMIT: Duration = Duration::from_secs(1);
/// A socket's mapping outlives its flows by an eighth of their time and a tick.
const MAPPINGS: Duration = Duration::from_millis(1000 * IDLE as u64 / 8 + 75);
/// The reaper has a pause between its sweeps; after this it is not coming any more.
const SWEPT: Duration = Duration::from_secs(15);

/// How long after the last flow's deadline it took.
pub(super) struct End {
    /// Until no flow was alive for the datapath.
    pub gone: Duration,
    /// Until no port of a public address was taken.
    pub free: Duration,
    /// Until the reaper had freed every slot, by its own account.
    pub swept: Duration,
}

/// Watches the flows end of which the last packet was sent at `last` or before.
pub(super) fn watch(stage: &Stage, last: Instant) -> anyhow::Result<End> {
    let deadline = last + Duration::from_secs(IDLE.into());
    thread::sleep(deadline.saturating_duration_since(Instant::now()));
    // How late it is when a look begins: it goes over the whole table, which takes its time.
    let after = || Instant::now().saturating_duration_since(deadline);
    let (mut gone, mut free) = (None, None);
    loop {
        stop::check()?;
        let table = &stage.tables[0];
        if gone.is_none() {
            let (late, now) = (after(), now_tick());
            let flows = table.iter().filter(|(_, half)| half.key.kind == KIND_FLOW);
            let alive = flows.filter(|(_, half)| table.is_alive(half, now)).count();
            ensure!(
                alive == 0 || late <= LIMIT,
                "{alive} half-records of flows are alive {late:?} after the last deadline"
            );
            gone = (alive == 0).then_some(late);
        }
        if gone.is_some() && free.is_none() {
            // Nothing is to be seen before the mappings end.
            thread::sleep(MAPPINGS.saturating_sub(after()));
            let late = after();
            let units = live_units([&stage.tables[0], &stage.tables[1]]).len();
            ensure!(
                units == 0 || late <= LIMIT * 2,
                "ports of {units} units are taken {late:?} after the last flow's deadline"
            );
            free = (units == 0).then_some(late);
        }
        let reaper = stage.reaper.report();
        let left = reaper.ipv4.live + reaper.ipv4.waiting;
        if let (Some(gone), Some(free), 0) = (gone, free, left) {
            let taken = table.iter().count();
            ensure!(taken == 0, "the reaper tells of an empty table, {taken} half-records are in it");
            return Ok(End { gone, free, swept: after() });
        }
        ensure!(
            after() < SWEPT,
            "the reaper has left {left} half-records {:?} after the last deadline",
            after()
        );
        thread::sleep(Duration::from_millis(20));
    }
}
