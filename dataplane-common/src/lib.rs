//! Everything the kernel and userspace must agree on (design §3): packets, flows, the classifier's tables and the
//! engine that decides. It knows no aya, no maps and no hook; `engine` is generic over [`packet::Packet`] and
//! [`env::Env`] and runs unchanged under XDP, under TC and on the host.
//!
//! Byte order: addresses and ports are kept as they stand in the packet (network order) in `u32`/`u16` fields whose
//! names or types say so; everything else is native.

#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(not(target_arch = "bpf"))]
extern crate std;

pub mod atomic;
pub mod classify;
pub mod clock;
pub mod engine;
pub mod env;
pub mod family;
pub mod flow;
#[cfg(test)]
mod flow_interleavings;
pub mod layout;
pub mod opaque;
pub mod packet;
pub mod policy;
pub mod quota;
pub mod reason;
pub mod reassembly;
pub mod snat;
pub mod tcp_state;

pub use layout::*;
pub use reason::Reason;
