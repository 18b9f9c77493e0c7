//! `cargo xtask bench`: what Portcullis does in how much time, beside the limit and beside what everybody has, in one
//! run.
//!
//! A run consists of sections ([`section::SECTIONS`]); each builds namespaces of its own, measures in rounds in which what
//! is compared takes turns, and puts figures and series into the [`Report`]. Only ratios within a round mean anything on a
//! machine with neighbours.
//!
//! Most packet rates are measured on this:
//!
//! ```text
//!  client                     gateway                      server
//!  pcb_generate --redirect--> [XDP | TC | nftables] -----> pcb_sink: counts, drops
//!  first processor            last processor: the NAPI of the gateway's device is a thread there
//! ```

mod candidate;
mod command;
mod conntrack;
mod deny;
mod document;
mod established;
mod figure;
mod flip;
mod gateway;
mod generator;
mod groups;
mod hero;
mod hero_end;
mod hero_stage;
mod idle;
mod instructions;
// One file for both sides of the shared maps.
#[allow(dead_code, reason = "some of it is the programs' own")]
#[path = "../../ebpf/src/layout.rs"]
mod layout;
mod memory;
mod napi;
mod netfilter;
mod new_flow;
mod options;
mod plan;
mod plot;
mod policy;
mod portcullis;
mod programs;
mod reaper;
mod report;
mod rig;
mod rules;
mod run;
mod section;
mod stages;
mod statistics;
mod table;

pub use command::{Arguments, execute};
pub use figure::{Better, By, Figure, Met};
pub use options::{Options, Scale};
pub use report::{Measured, Note, Report, Series, Verified};
pub use run::run;
pub use section::{REQUIRED, figures};
