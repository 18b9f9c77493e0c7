//! `cargo xtask bench`: how many packets a second, beside what the kernel can do and what nftables does, in one run.
//!
//! ```text
//!  client                     gateway                      server
//!  pcb_generate --redirect--> [XDP | TC | nftables] -----> pcb_sink: counts, drops
//!  first processor            last processor: the NAPI of the gateway's device is a thread there
//! ```
//!
//! A candidate (bare XDP redirect, nftables masquerade, Portcullis under XDP, Portcullis under TC; when asked for, a
//! minimal NAT over either kind of flow table) is measured in
//! namespaces of its own. With each number of flows all candidates are made to know the flows first, which is counted
//! and whose packets are checked, and then measured in turns: only ratios within a round mean anything on a machine
//! with neighbours.

mod candidate;
mod command;
mod cycles;
mod generator;
mod groups;
// One file for both sides of the shared maps.
#[allow(dead_code, reason = "some of it is the programs' own")]
#[path = "../../ebpf/src/layout.rs"]
mod layout;
mod napi;
mod nftables;
mod plan;
mod policy;
mod portcullis;
mod programs;
mod report;
mod rig;
mod road;
mod run;
mod statistics;
mod table;
#[cfg(test)]
mod try_it;

pub use command::{Arguments, execute};
pub use plan::{Options, Size};
pub use report::{Figure, Report, Verified};
pub use run::run;
