//! Live flows: who tidies them up, and what is to be told of them.

pub mod allocations;
mod kill;
mod list;
mod occupancy;
pub mod ports;
mod reaper;
mod recount;
mod reset;
pub mod snat;
mod snat_text;
mod snat_views;

#[cfg(test)]
pub(crate) use kill::tests as on_tables;
pub use kill::{Ended, Selection, flush, kill};
pub use list::{
    Flow, FlowEnds, FlowList, Pair, address, end, list, live, no_guest, protocol_name, protocol_number,
};
pub use occupancy::{end_on, live_units};
pub use reaper::{ReapedDatapath, ReaperCounts, ReaperReport, TableReport, reap};
pub use snat::{SnatUse, snat};
pub use snat_views::{ByDestination, PortHolders, by_destination, port_holders};
