//! What a generation's tables take of the kernel's memory, and how much they may.

use portcullis_common::policy::PAGE_BYTES;

use super::Compiled;
use super::error::CompileError;
use crate::policy::network::Network;

/// A prefix in the kernel's trie: a node for it and at worst one where it branches off. A node is 40 bytes, key and
/// value behind it, from a cache of objects of 64 or 96 bytes.
const TRIE4: usize = 2 * 64;
const TRIE6: usize = 2 * 96;
/// An element of the kernel's hash map: 48 bytes, key and value behind it, and its part of the buckets.
const HASHED4: usize = 96;
const HASHED6: usize = 128;
const MIB: usize = 1 << 20;

/// Kernel memory of the tables of a policy whose pages take this much, about.
pub(super) fn kernel_bytes(compiled: &Compiled, pages: usize) -> usize {
    pages.next_multiple_of(PAGE_BYTES)
        + (compiled.prefixes.len() + compiled.spaces.len()) * TRIE4
        + (compiled.prefixes6.len() + compiled.spaces6.len()) * TRIE6
        + compiled.endpoints.len() * HASHED4
        + compiled.endpoints6.len() * HASHED6
}

/// What one generation may take, in bytes.
pub(super) fn limit(network: &Network) -> usize {
    network.limits.policy_memory_mib as usize * MIB
}

/// Refuses a policy that takes too much.
pub(super) fn check(network: &Network, bytes: usize) -> Result<(), CompileError> {
    if bytes <= limit(network) {
        return Ok(());
    }
    let (wanted, allowed) = (bytes.div_ceil(MIB), network.limits.policy_memory_mib);
    let message = format!(
        "the tables of this policy would take {wanted} MiB of kernel memory, and as much again while the next policy \
         is applied; limits.policyMemoryMiB allows {allowed} MiB for one: raise it to {wanted} or more, or let fewer \
         rules differ from group to group"
    );
    Err(CompileError::new("limits/policyMemoryMiB", message))
}
