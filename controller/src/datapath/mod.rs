//! The only room that talks bpf(2): loads the programs, attaches them, keeps their tables.
//!
//! ```text
//! Datapath::open    adopt or make the tables, load this build's programs        load, pins, object
//!   .install        a compiled policy into the idle parity, then one flip       generation, batch
//!   .attach         put the programs on the devices, in place of earlier ones   attach, clsact
//!   .finish_migration  what came between two copies of another layout's flows   migrate, flow_writer, start
//!   .commit         the start has succeeded: forget earlier loads
//!   .reasons ...    what the kernel counted, learned, sampled                   counters, next_hops, events, inspect
//!   .dry_run        the programs once more, to ask what they would do           dry_run
//!   .flow_table     the live flows, in memory shared with the kernel            flow_table
//!   .guest_uses     how much of the flow tables each guest holds                guest_flows
//! down              all of it away, without loading anything                    down
//! ```
//!
//! Dropping a [`Datapath`] changes nothing in the kernel (design §1, promise 5): links and tables are pinned, and the
//! next [`Datapath::open`] adopts them.

mod attach;
mod batch;
mod clock;
mod clsact;
mod control;
mod counters;
mod down;
mod dry_run;
mod events;
mod flow_table;
mod flow_writer;
mod generation;
mod guest_flows;
mod inspect;
mod kernel_types;
mod load;
mod migrate;
mod next_hops;
mod object;
mod pins;
mod qdisc;
mod start;
mod sys;
mod table;
mod test_run;

#[cfg(test)]
pub(crate) mod tests;

pub use attach::{AttachDevice, AttachPlan, Attached, Hook, Role, TcBackend};
pub use clock::check_clock;
pub use counters::LOST_SLOTS;
pub use down::{abandon, down, in_use};
pub use dry_run::{Answer, DryRun};
pub use events::{AsyncEvents, Events, KernelLog};
pub use flow_table::{FlowTable, Swept, address6, now_tick};
pub use flow_writer::{FlowWriter, Written, whole};
pub use generation::{Installed, PolicyImage};
pub use guest_flows::{GuestUse, GuestUses};
pub use inspect::{HookState, ProgramInfo};
pub use load::{Datapath, LoadOptions};
pub use migrate::Migrated;
pub use next_hops::Route;
pub use pins::DEFAULT_PINS;
pub use test_run::{Outcome, Tester};
