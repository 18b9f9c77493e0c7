//! Backend health: probes of load balancers' backends, sent as Azure sends them, from 168.63.129.16
//! (`reference/azure.md` §3).
//!
//! ```text
//! interface   the prober as the policy sees it: one more guest of each virtual network with probed backends
//! targets     a policy to what is probed, and how
//! check       one probe: a TCP handshake, or a GET that is answered 200
//! health      what the results come to: up or down, since when, why
//! runner      a thread in a network namespace of its own that sends them
//! prober      that thread and its devices as the daemon handles them
//! ```
//!
//! A prober is an interface like any other: its packets pass the datapath and the groups of the guest they go to. The
//! namespace has no name and no mount: it and the veth pairs into it live as long as the daemon, and whoever kills the
//! daemon leaves nothing to tidy. Until the next one starts, backends stay what they were.

mod check;
mod health;
mod interface;
mod prober;
mod runner;
mod targets;

pub use check::Failure;
pub use health::{Book, FILE, Health};
pub use interface::{PROBER_MAC, Prober, is_prober, probers, with_probers};
pub use prober::Probers;
#[cfg(test)]
pub use targets::tests::balanced as balanced_policy;
pub use targets::{Target, down_name, targets};
