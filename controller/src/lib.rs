//! Portcullis' controller: policy to tables, tables to the kernel, answers to the operator (design §3).

pub mod policy;
