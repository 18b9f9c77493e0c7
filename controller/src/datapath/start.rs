//! What the tables say of the time before them ([`portcullis_common::layout::Control::start`]).

use portcullis_common::clock::{passed, ticks};
use portcullis_common::layout::START_MIGRATING;

use super::flow_table::now_tick;
use super::load::Datapath;

impl Datapath {
    /// From now on, for so many seconds, TCP connections that are older than the tables may be adopted; 0: none is.
    pub fn adopt_for(&self, seconds: u32) {
        let until = if seconds == 0 { 0 } else { now_tick().wrapping_add(ticks(seconds)) };
        // The two ends of the range mean something else; a tick earlier is as good.
        self.control.set_start(if until == START_MIGRATING { until - 1 } else { until });
    }

    /// Ticks for which connections are still adopted.
    pub fn adopts_for(&self) -> u32 {
        let (until, now) = (self.control.read().start, now_tick());
        if until == 0 || until == START_MIGRATING || passed(until, now) { 0 } else { until.wrapping_sub(now) }
    }

    /// A deadline that has passed is taken out, or it would come round again in nine years.
    pub fn end_grace_if_over(&self) {
        let start = self.control.read().start;
        if start != 0 && start != START_MIGRATING && self.adopts_for() == 0 {
            self.control.set_start(0);
        }
    }
}
