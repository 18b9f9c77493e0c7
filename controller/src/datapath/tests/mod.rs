//! Tests that need the inside of this room: system calls made to fail, one after the other.

pub(super) mod faults;

mod flows;
mod halfway;
/// Once in this crate: places are numbered by it.
#[path = "../../../tests/datapath_support/mod.rs"]
pub(crate) mod support;
