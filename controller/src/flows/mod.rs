//! Live flows: who tidies them up, and what is to be told of them.

mod list;
mod reaper;
mod snat;

pub use list::{Flow, FlowList, address, list, live, no_guest, protocol_name};
pub use reaper::{ReaperCounts, ReaperReport, reap};
pub use snat::{SnatUse, snat};
