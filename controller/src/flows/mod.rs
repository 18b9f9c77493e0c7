//! Live flows: who tidies them up, and what is to be told of them.

mod kill;
mod list;
mod occupancy;
mod reaper;
mod reset;
mod snat;

pub use kill::{Ended, Selection, flush, kill};
pub use list::{
    Flow, FlowEnds, FlowList, Pair, address, end, list, live, no_guest, protocol_name, protocol_number,
};
pub use occupancy::{end_on, live_units};
pub use reaper::{ReaperCounts, ReaperReport, TableReport, reap};
pub use snat::{SnatUse, snat};
