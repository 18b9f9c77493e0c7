//! SNAT: which of a member's ports to try, in which order.
//!
//! A member owns a set of 8-port units. Candidates are start + i·stride modulo the number of its ports, start from a
//! keyed hash, stride coprime to that number: a permutation, so the whole block is tried before a flow is refused and
//! there are no clusters to walk through (field.md §5.2).

use crate::classify::entry;
use crate::engine::Context;
use crate::env::{Env, Step};
use crate::flow::{self, Taken};
use crate::layout::{FlowKey, KIND_MAPPING, WORLD};
use crate::opaque::opaque;
use crate::packet::headers::TCP;
use crate::policy::{Frontend, Header, UNIT_PORTS};

/// Candidates one packet may try. Whoever owns more gets another window of them a second later (TCP retransmits).
pub const ATTEMPTS: u32 = 1024;

/// The search for a port: which ports, where it stands, what it found. Kept in the packet's context.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Search {
    pub first_unit: u32,
    /// Number of ports to choose from, at least 8.
    pub ports: u32,
    pub start: u32,
    pub stride: u32,
    /// Page of the units and of the frontends in the policy image.
    pub units_page: u32,
    pub frontends_page: u32,
    /// 0 nothing found (yet), [`FOUND`], or [`FULL`]: some candidate had no room in the flow table.
    pub outcome: u32,
    /// Candidates tried.
    pub tried: u32,
    /// Found: the reverse record's slot, public address and port (network order).
    pub slot: u64,
    pub address: u32,
    pub port: u16,
    pub pad: u16,
}

pub const FOUND: u32 = 1;
pub const FULL: u32 = 2;

/// Odd primes: the first that does not divide the number of ports is coprime to it (8·units, at most 65,536, has at
/// most six of them as factors).
static STRIDES: [u32; 8] = [5, 7, 11, 13, 17, 19, 23, 29];

/// A stride coprime to `ports`; which one of several depends on `seed`.
#[inline(always)]
pub fn stride(ports: u32, seed: u32) -> u32 {
    let mut i = 0;
    while i < 8 {
        let at = opaque((seed >> 16) as usize + i) & 7;
        // SAFETY: the index is below the eight elements.
        let s = unsafe { *STRIDES.as_ptr().add(at) };
        if modulo(ports as u64, s) != 0 {
            return s;
        }
        i += 1;
    }
    1
}

/// `a mod b` without the panic that dividing by zero would link in; 0 for `b` = 0.
#[inline(always)]
const fn modulo(a: u64, b: u32) -> u32 {
    if b == 0 { 0 } else { (a % b as u64) as u32 }
}

/// Index of candidate `i` among the member's ports.
#[inline(always)]
pub const fn candidate(search: &Search, i: u32) -> u32 {
    modulo(search.start as u64 + i as u64 * search.stride as u64, search.ports)
}

/// Begins a search for `ctx.key`'s flow. TCP ports are chosen by the whole tuple, UDP and echo by the inside socket.
#[inline(always)]
pub fn begin(ctx: &mut Context, header: &Header, seed: &[u64; 2], first_unit: u32, units: u32) {
    let mut key = ctx.key;
    if key.protocol != TCP {
        key.destination = 0;
        key.destination_port = 0;
    }
    let hash = flow::hash(&key, &[seed[1], seed[0]]);
    let ports = units * UNIT_PORTS;
    let mut start = modulo(hash >> 32, ports);
    if ports > ATTEMPTS {
        // Sixteen ticks are about a second: the next retransmission looks at the next window.
        start = modulo(
            start as u64 + (ctx.now >> 4) as u64 * ATTEMPTS as u64 * stride(ports, hash as u32) as u64,
            ports,
        );
    }
    ctx.search = Search {
        first_unit,
        ports,
        start,
        stride: stride(ports, hash as u32),
        units_page: header.units,
        frontends_page: header.frontends,
        ..Search::default()
    };
}

/// The key whose insertion is the claim of `port` on `address` (ADR 0001).
#[inline(always)]
pub fn claim_key(key: &FlowKey, address: u32, port: u16) -> FlowKey {
    if key.protocol == TCP {
        FlowKey {
            source: key.destination,
            destination: address,
            source_port: key.destination_port,
            destination_port: port,
            network: WORLD,
            protocol: key.protocol,
            kind: key.kind,
        }
    } else {
        FlowKey {
            source: 0,
            destination: address,
            source_port: 0,
            destination_port: port,
            network: WORLD,
            protocol: key.protocol,
            kind: KIND_MAPPING,
        }
    }
}

/// One candidate: insert the claim if absent.
pub struct TryPort;

impl<E: Env> Step<E> for TryPort {
    #[inline(always)]
    fn attempt(env: &E, ctx: &mut Context, i: u32) -> bool {
        let index = candidate(&ctx.search, i);
        ctx.search.tried = i + 1;
        let Some(unit) = entry::<E, u32>(
            env,
            ctx.generation,
            ctx.search.units_page,
            ctx.search.first_unit + index / UNIT_PORTS,
        ) else {
            return true;
        };
        // SAFETY: `entry` points into a page.
        let unit = unsafe { *unit };
        let Some(frontend) = entry::<E, Frontend>(env, ctx.generation, ctx.search.frontends_page, unit >> 16)
        else {
            return true;
        };
        // SAFETY: as above.
        let address = unsafe { (*frontend).address };
        let port = (((unit & 0xffff) * UNIT_PORTS + index % UNIT_PORTS) as u16).to_be();
        ctx.claim = claim_key(&ctx.key, address, port);
        let taken = env.insert(ctx);
        if taken.is_slot() {
            ctx.search.slot = taken.0;
            ctx.search.address = address;
            ctx.search.port = port;
            ctx.search.outcome = FOUND;
            return true;
        }
        if taken == Taken::FULL {
            // The buckets of this candidate are full; another candidate has others.
            ctx.search.outcome = FULL;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn the_order_of_candidates_is_a_permutation_of_the_whole_block() {
        for units in (1..=128).chain([1000, 4535, 8000]) {
            let ports = units * UNIT_PORTS;
            for seed in [0u32, 1 << 16, 2 << 16, 0xdead_beef] {
                let search =
                    Search { ports, start: seed % ports, stride: stride(ports, seed), ..Search::default() };
                let mut seen = vec![false; ports as usize];
                for i in 0..ports {
                    let c = candidate(&search, i) as usize;
                    assert!(!seen[c], "{ports} ports, stride {}: {c} twice", search.stride);
                    seen[c] = true;
                }
            }
        }
    }
}
