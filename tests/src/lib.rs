//! The lab and the oracles that Portcullis is tested with (design §7).

pub mod backend;
pub mod bench;
pub mod claiming;
pub mod classbench;
pub mod edge;
pub mod frontends;
pub mod hostile;
pub mod icmp_error;
pub mod lab;
pub mod lan;
pub mod ledger;
pub mod model;
pub mod occupancy;
pub mod quickstart;
pub mod random;
pub mod release;
pub mod rfc_model;
pub mod site;
pub mod soak;
mod stop;
pub mod stream;
pub mod tcp_table;
pub mod upheaval;
