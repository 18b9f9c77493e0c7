//! SNAT: which of a member's ports to try, in which order.
//!
//! A member owns sets of 8-port units, its *segments*, used up one after the other (one frontend after the other, or all
//! in one). Within a segment candidates are start + i·stride modulo the number of its ports, start from a keyed hash,
//! stride coprime to that number: a permutation, so every port is tried before a flow is refused and there are no
//! clusters to walk through (field.md §5.2).

use core::marker::PhantomData;

use crate::classify::entry;
use crate::engine::Context;
use crate::env::{Env, Step};
use crate::family::Family;
use crate::flow::{Grace, Taken};
use crate::layout::WORLD;
use crate::opaque::opaque;
use crate::policy::{Alloc, Frontend, Header, Segment, UNIT_PORTS};

/// Candidates one packet may try. Whoever owns more goes on where this packet stopped with the next one.
pub const ATTEMPTS: u32 = 1024;

/// Segments of an allocation; the compiler joins what is beyond.
pub const SEGMENTS: u32 = 16;

/// The search for a port: which ports, where it stands, what it found. Kept in the packet's context.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Search {
    /// Decides start and stride in every segment.
    pub hash: u64,
    /// Found: the reverse record's slot, in the words of [`Taken`].
    pub slot: u64,
    /// The segment candidates are from: its first unit, number of ports (at least 8), and the number of ports in those
    /// before it.
    pub first_unit: u32,
    pub ports: u32,
    pub before: u32,
    pub start: u32,
    pub stride: u32,
    /// The segment after it, and how many there are from there on.
    pub next_segment: u32,
    pub segments_left: u32,
    /// The candidate to be tried next; those before it have been, by this packet or an earlier one.
    pub next: u32,
    /// The candidate to stop at.
    pub limit: u32,
    /// Pages of the policy image.
    pub segments_page: u32,
    pub units_page: u32,
    pub frontends_page: u32,
    /// 0 nothing found (yet), [`FOUND`], or [`FULL`]: some candidate had no room in the flow table.
    pub outcome: u32,
}

/// Buckets of the histogram of candidates tried: 1, 2, 3-4, 5-8, … up to 1,024, and more.
pub const TRIED_BUCKETS: u32 = 12;

/// The bucket of a claim that succeeded at its `n`-th candidate: bucket `b` counts those up to 2^b.
#[inline(always)]
pub const fn tried_bucket(n: u32) -> u32 {
    let mut bucket = 0;
    while bucket < TRIED_BUCKETS - 1 && n > 1 << bucket {
        bucket += 1;
    }
    bucket
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

/// Index of candidate `i` among the segment's ports.
#[inline(always)]
pub const fn candidate(search: &Search, i: u32) -> u32 {
    modulo(search.start as u64 + i as u64 * search.stride as u64, search.ports)
}

/// Begins a search for the packet's flow among the candidates from `skipped` to below `limit`. A port of one's own is chosen by
/// the inside socket, one that is shared between destinations by the whole tuple.
#[inline(always)]
pub fn begin<F: Family>(
    ctx: &mut Context,
    header: &Header,
    seed: &[u64; 2],
    alloc: &Alloc,
    skipped: u32,
    limit: u32,
) {
    if ctx.mapped == 0 {
        F::claim_own(ctx);
    } else {
        F::claim_inside(ctx);
    }
    let hash = F::hash(F::claimed(ctx), &[seed[1], seed[0]]);
    let segments = alloc.segments as u32;
    ctx.search = Search {
        hash,
        next_segment: alloc.first_segment,
        segments_left: if segments < SEGMENTS { segments } else { SEGMENTS },
        next: skipped,
        limit,
        segments_page: header.segments,
        units_page: header.units,
        frontends_page: header.frontends,
        ..Search::default()
    };
}

/// Goes on to the next segment; `false` if there is none.
#[inline(always)]
fn advance<E: Env>(env: &E, ctx: &mut Context) -> bool {
    let generation = ctx.generation;
    let search = &mut ctx.search;
    if search.segments_left == 0 {
        return false;
    }
    let Some(segment) = entry::<E, Segment>(env, generation, search.segments_page, search.next_segment)
    else {
        return false;
    };
    // SAFETY: `entry` points into a page.
    let (first_unit, units) = unsafe { ((*segment).first_unit, (*segment).units) };
    search.before += search.ports;
    search.first_unit = first_unit;
    search.ports = units * UNIT_PORTS;
    search.start = modulo(search.hash >> 32, search.ports);
    search.stride = stride(search.ports, search.hash as u32);
    search.next_segment += 1;
    search.segments_left -= 1;
    true
}

/// One candidate: insert the claim if absent. Or one step to the next segment; so a search takes up to [`SEGMENTS`] more
/// steps than it tries candidates.
pub struct TryPort<F>(PhantomData<F>);

impl<F: Family, E: Env> Step<E> for TryPort<F> {
    #[inline(always)]
    fn attempt(env: &E, ctx: &mut Context) -> bool {
        let wanted = ctx.search.next;
        if wanted >= ctx.search.limit {
            return true;
        }
        let within = wanted - ctx.search.before;
        if within >= ctx.search.ports {
            return !advance(env, ctx);
        }
        ctx.search.next = wanted + 1;
        let index = candidate(&ctx.search, within);
        let unit = ctx.search.first_unit + index / UNIT_PORTS;
        let Some(unit) = entry::<E, u32>(env, ctx.generation, ctx.search.units_page, unit) else {
            return true;
        };
        // SAFETY: `entry` points into a page.
        let unit = unsafe { *unit };
        let Some(frontend) = entry::<E, Frontend>(env, ctx.generation, ctx.search.frontends_page, unit >> 16)
        else {
            return true;
        };
        // SAFETY: as above.
        let address = F::of_frontend(unsafe { &*frontend });
        let port = (((unit & 0xffff) * UNIT_PORTS + index % UNIT_PORTS) as u16).to_be();
        F::set_new_source(ctx, address);
        ctx.new.source_port = port;
        // The claim is the key of the answers (ADR 0001), or of the mapping's outer side.
        if ctx.mapped == 0 {
            F::claim_answer(ctx, WORLD);
        } else {
            F::claim_outside(ctx, address, port);
        }
        // Another socket may have had the port, so its grace is kept.
        let taken = F::insert(env, ctx, Grace::Kept);
        if taken.is_slot() {
            ctx.search.slot = taken.0;
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
    fn the_histogram_has_a_bucket_for_each_power_of_two() {
        let of = [1, 2, 3, 4, 5, 1023, 1024, 1025, 60_000].map(tried_bucket);
        assert_eq!(of, [0, 1, 2, 2, 3, 10, 10, 11, 11]);
    }

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
