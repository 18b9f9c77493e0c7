//! Portcullis' controller: policy to tables, tables to the kernel, answers to the operator (design §3).

pub mod answers;
pub mod api;
pub mod cli;
pub mod compile;
pub mod conntrack;
pub mod daemon;
pub mod datapath;
pub mod explain;
pub mod flows;
pub mod hosts;
pub mod observe;
pub mod policy;
pub mod privileges;
pub mod probes;
