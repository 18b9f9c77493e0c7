//! Live flows: who tidies them up, and what is to be told of them.

mod list;
mod reaper;
mod snat;

pub use list::{FlowList, list};
pub use reaper::{ReaperCounts, ReaperReport, reap};
pub use snat::{SnatUse, snat};
