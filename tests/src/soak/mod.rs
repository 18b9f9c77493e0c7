//! `portcullis-lab soak`: everything at once, for as long as one likes, and in the end every flow and port accounted for.
//!
//! | guest | what it does |
//! | --- | --- |
//! | vm1 | the traffic of [`crate::upheaval`], of which nothing may be lost |
//! | vm2 | new connections and datagrams, one after the other ([`churn::Churn`]) |
//! | vm3 | has its link taken away and given back, opens flows and forgets them |
//! | vm4 | leaves the pool and joins it again |
//!
//! Meanwhile the daemon is killed, restarted and upgraded, and policies change ([`events`]). [`account`] waits until nothing is
//! left in the tables.

mod account;
mod churn;
mod command;
mod events;
mod stand;

pub use command::{Arguments, execute};
