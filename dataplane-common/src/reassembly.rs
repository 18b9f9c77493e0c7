//! Datagrams of which fragments are under way: what the later fragments of each lack, and where the next one begins (RFC 4787
//! REQ-14, RFC 1858, RFC 5722). Virtual reassembly, in order: BPF cannot hold a packet back.
//!
//! A set of sixteen for each guest's device and, for what comes from outside, 4,096 more, of which a public address has 64 and
//! the sender's address says which. So nobody costs a neighbour on another device anything, whatever it sends; and in a full
//! set who sends most gives way to itself first. Nothing is noted here of a packet that has not been sent on.
//!
//! All that changes of a slot is one word, written by compare-and-exchange.

use crate::atomic;
use crate::engine::{Context, NO_SET, Side};
use crate::env::{Env, FragmentKey};

/// Ticks for which the rest of a datagram is waited for: five seconds. An endpoint waits for 30 to 60, but what is in order
/// comes at once, and identifiers are used again soon.
pub const PATIENCE: u32 = 75;
/// Clocks of two processors may differ by this much while they work.
const SLACK: u32 = 8;

/// Datagrams of one set.
pub const DATAGRAM_SLOTS: usize = 16;
/// Sets for guests' devices, each at its ifindex modulo this, as in the table of devices.
const DEVICE_SETS: u32 = 4096;
/// Sets for what comes from outside.
const WORLD_SETS: u32 = 4096;
/// Of these a public address has so many.
const ADDRESS_SETS: u32 = 64;
/// Elements of the table.
pub const DATAGRAM_SETS: u32 = DEVICE_SETS + WORLD_SETS;

/// A datagram whose first fragment has been sent on: one cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Datagram {
    /// `until:32 | version:16 | next:16`: the last tick at which it counts, a number that every owner of the slot changes, and
    /// where the next fragment begins, in units of 8 bytes, or [`BUSY`], or [`SPOILT`].
    pub ctl: u64,
    pub key: FragmentKey,
    pub known: Known,
    pub pad: u64,
}

/// What the first fragment says for the later ones. Ports in network order.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Known {
    pub source_port: u16,
    pub destination_port: u16,
    /// Length of the first fragment in units of 8 bytes.
    pub first: u16,
    /// `KIND_*` of the flow.
    pub kind: u8,
    pub pad: u8,
}

/// The datagrams that share a place.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct DatagramSet {
    pub slots: [Datagram; DATAGRAM_SLOTS],
}

const _: () = {
    assert!(size_of::<Datagram>() == 64, "a datagram is one cache line");
    assert!(size_of::<DatagramSet>() == 1024);
    assert!(ADDRESS_SETS.is_power_of_two() && WORLD_SETS.is_power_of_two() && DEVICE_SETS.is_power_of_two());
};

/// Of a key.
const WORDS: usize = size_of::<FragmentKey>() / 4;

/// A slot that is being written.
const BUSY: u16 = 0xffff;
/// Of this datagram nothing is sent any more: its fragments overlap (RFC 5722).
pub const SPOILT: u16 = 0xfffe;

/// What [`recall`] found, kept until the fragment has been sent.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Recalled {
    pub ctl: u64,
    pub known: Known,
    /// [`NO_SET`]: nothing was found, or nothing was asked.
    pub slot: u32,
    pub pad: u32,
}

impl Recalled {
    /// Where the next fragment begins.
    #[inline(always)]
    pub fn next(&self) -> u16 {
        self.ctl as u16
    }
}

#[inline(always)]
fn until(ctl: u64) -> u32 {
    (ctl >> 32) as u32
}

#[inline(always)]
fn live(ctl: u64, now: u32) -> bool {
    until(ctl).wrapping_sub(now) <= PATIENCE + SLACK
}

/// The word of the next owner of a slot.
#[inline(always)]
fn owned(before: u64, until: u32, next: u16) -> u64 {
    let version = ((before >> 16) as u16).wrapping_add(1);
    (until as u64) << 32 | (version as u64) << 16 | next as u64
}

/// The set that the packet's datagrams stand in: of its device, or of a public address and a sender.
#[inline(always)]
pub fn set(ctx: &Context, seed: &[u64; 2]) -> u32 {
    if ctx.side != Side::Uplink as u8 {
        return ctx.ifindex & (DEVICE_SETS - 1);
    }
    let source = mixed(&ctx.datagram.source, seed[0]);
    let destination = mixed(&ctx.datagram.destination, seed[1]);
    let at = destination.wrapping_mul(ADDRESS_SETS).wrapping_add(source & (ADDRESS_SETS - 1));
    DEVICE_SETS + (at & (WORLD_SETS - 1))
}

#[inline(always)]
fn mixed(address: &[u32; 4], seed: u64) -> u32 {
    let mut h = seed;
    let mut i = 0;
    while i < 4 {
        // SAFETY: the index is below the four words.
        h = (h ^ unsafe { *address.as_ptr().add(i) } as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 32;
        i += 1;
    }
    h as u32
}

/// # Safety
/// `slot` can be read. What is read may be torn: the caller compares the control word afterwards.
#[inline(always)]
unsafe fn has_key(slot: *const Datagram, key: &FragmentKey) -> bool {
    // SAFETY: the caller vouches for `slot`; aligned words.
    unsafe {
        let (a, b) = ((&raw const (*slot).key).cast::<u32>(), (&raw const *key).cast::<u32>());
        let mut differ = 0;
        let mut i = 0;
        while i < WORDS {
            differ |= a.add(i).read_volatile() ^ *b.add(i);
            i += 1;
        }
        differ == 0
    }
}

/// Looks for the datagram `ctx.datagram` in the set `ctx.datagram_set`; what is known of it is then in `ctx.recalled`.
#[inline(always)]
pub fn recall<E: Env>(env: &E, ctx: &mut Context) {
    ctx.recalled.slot = NO_SET;
    let Some(set) = env.datagrams(ctx.datagram_set) else { return };
    let slots = set.cast::<Datagram>();
    let mut i = 0;
    while i < DATAGRAM_SLOTS {
        // SAFETY: the index is below the sixteen slots; what is read is believed only if the word is the same afterwards.
        unsafe {
            let slot = slots.add(i);
            let ctl = atomic::load(&raw const (*slot).ctl);
            if live(ctl, ctx.now) && ctl as u16 != BUSY && has_key(slot, &ctx.datagram) {
                let known = (&raw const (*slot).known).read_volatile();
                if atomic::load(&raw const (*slot).ctl) == ctl {
                    ctx.recalled = Recalled { ctl, known, slot: i as u32, pad: 0 };
                    return;
                }
            }
        }
        i += 1;
    }
}

/// Is somebody writing the slot?
#[inline(always)]
fn in_work(ctl: u64, now: u32) -> bool {
    ctl as u16 == BUSY && live(ctl, now)
}

/// How well a slot can be spared, for a datagram of `source`; 0: not at all.
///
/// # Safety
/// `slot` can be read.
#[inline(always)]
unsafe fn rank(slot: *const Datagram, source: &[u32; 4], now: u32) -> u32 {
    // SAFETY: the caller vouches for `slot`.
    unsafe {
        let ctl = atomic::load(&raw const (*slot).ctl);
        if in_work(ctl, now) {
            return 0;
        }
        if !live(ctl, now) {
            return 1 << 16;
        }
        let has = (&raw const (*slot).key.source).cast::<u32>();
        let mut differ = 0;
        let mut word = 0;
        while word < 4 {
            differ |= has.add(word).read_volatile() ^ *source.as_ptr().add(word);
            word += 1;
        }
        let age = (PATIENCE + SLACK + 1).wrapping_sub(until(ctl).wrapping_sub(now)) & 0xff;
        ((differ == 0) as u32) << 8 | age
    }
}

/// Notes the datagram whose first fragment has been sent, unless it is known: the first one wins.
#[inline(always)]
pub fn remember<E: Env>(env: &E, ctx: &mut Context) {
    recall(env, ctx);
    if ctx.recalled.slot != NO_SET {
        return;
    }
    let Some(set) = env.datagrams(ctx.datagram_set) else { return };
    let slots = set.cast::<Datagram>();
    // A slot that is free; else the oldest of the same sender; else the oldest. The best so far is kept in memory, where the
    // verifier forgets it: sixteen of them in registers are more states than it follows.
    let best = &raw mut ctx.notes;
    // SAFETY: the packet's own scratch.
    unsafe { best.write_volatile(0) };
    let mut i = 0;
    while i < DATAGRAM_SLOTS {
        // SAFETY: the index is below the sixteen slots. A torn read makes a worse choice, no more.
        unsafe {
            let slot = slots.add(i);
            let rank = rank(slot, &ctx.datagram.source, ctx.now) << 4 | i as u32;
            if rank > best.read_volatile() {
                best.write_volatile(rank);
            }
        }
        i += 1;
    }
    // SAFETY: as above.
    let best = unsafe { best.read_volatile() };
    if best >> 4 == 0 {
        return;
    }
    let deadline = ctx.now.wrapping_add(PATIENCE);
    // SAFETY: the index is masked to the sixteen slots; whoever makes the word busy owns the rest of the slot.
    unsafe {
        let slot = slots.add(best as usize & (DATAGRAM_SLOTS - 1));
        let before = atomic::load(&raw const (*slot).ctl);
        let busy = owned(before, deadline, BUSY);
        if in_work(before, ctx.now) || atomic::compare_exchange(&raw mut (*slot).ctl, before, busy) != before
        {
            // Another processor was faster: this datagram's later fragments are lost.
            return;
        }
        let (to, from) = ((&raw mut (*slot).key).cast::<u32>(), (&raw const ctx.datagram).cast::<u32>());
        let mut word = 0;
        while word < WORDS {
            to.add(word).write_volatile(*from.add(word));
            word += 1;
        }
        (&raw mut (*slot).known).write_volatile(ctx.first_fragment);
        atomic::exchange(&raw mut (*slot).ctl, busy & !(BUSY as u64) | ctx.first_fragment.first as u64);
    }
}

/// Notes that the fragment that was expected has been sent: `next` is where the one after it begins, `None` that it was the last.
#[inline(always)]
pub fn advance<E: Env>(env: &E, ctx: &Context, next: Option<u16>) {
    let before = ctx.recalled.ctl;
    let after = match next {
        Some(next) => before & !0xffff | next as u64,
        None => owned(before, ctx.now.wrapping_sub(1), 0),
    };
    change(env, ctx, after);
}

/// Nothing more of this datagram is sent (RFC 5722 §3: discarded with fragments that are still to come).
#[inline(always)]
pub fn spoil<E: Env>(env: &E, ctx: &Context) {
    change(env, ctx, ctx.recalled.ctl & !0xffff | SPOILT as u64);
}

#[inline(always)]
fn change<E: Env>(env: &E, ctx: &Context, after: u64) {
    if ctx.recalled.slot == NO_SET {
        return;
    }
    let Some(set) = env.datagrams(ctx.datagram_set) else { return };
    // SAFETY: the index is masked to the sixteen slots; the exchange fails if the slot is another's meanwhile, or another
    // processor sent the same fragment.
    unsafe {
        let slot = set.cast::<Datagram>().add(ctx.recalled.slot as usize & (DATAGRAM_SLOTS - 1));
        atomic::compare_exchange(&raw mut (*slot).ctl, ctx.recalled.ctl, after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::host::HostEnv;
    use std::vec::Vec;

    fn env() -> HostEnv {
        HostEnv::new(1, [1, 2])
    }

    /// A first fragment of a guest on device 7, of 80 bytes.
    fn context(source: u32, id: u32) -> Context {
        let mut ctx = Context { now: 1000, ifindex: 7, side: Side::Guest as u8, ..Context::default() };
        ctx.datagram = FragmentKey { source: [source, 0, 0, 0], id, version: 4, ..FragmentKey::default() };
        ctx.datagram_set = set(&ctx, &[1, 2]);
        ctx.first_fragment = Known { source_port: id as u16, first: 10, ..Known::default() };
        ctx
    }

    fn known(env: &HostEnv, ctx: &mut Context) -> Option<Known> {
        recall(env, ctx);
        (ctx.recalled.slot != NO_SET).then_some(ctx.recalled.known)
    }

    #[test]
    fn the_first_one_wins_until_the_last_fragment_or_the_timeout() {
        let env = env();
        let mut ctx = context(1, 5);
        remember(&env, &mut ctx);
        let mut other = context(1, 5);
        other.first_fragment.source_port = 99;
        remember(&env, &mut other);
        assert_eq!(known(&env, &mut ctx).unwrap().source_port, 5);
        assert_eq!(ctx.recalled.next(), 10);
        advance(&env, &ctx, Some(20));
        known(&env, &mut ctx).unwrap();
        assert_eq!(ctx.recalled.next(), 20);
        // Another processor that sent the same fragment changes nothing.
        advance(
            &env,
            &Context { recalled: Recalled { ctl: ctx.recalled.ctl ^ 1, ..ctx.recalled }, ..ctx },
            None,
        );
        assert!(known(&env, &mut ctx).is_some());
        ctx.now += PATIENCE + SLACK + 1;
        assert_eq!(known(&env, &mut ctx), None, "it is not waited for any more");
        ctx.now = 1000;
        known(&env, &mut ctx).unwrap();
        advance(&env, &ctx, None);
        assert_eq!(known(&env, &mut ctx), None, "the last one has gone");
        remember(&env, &mut other);
        assert_eq!(known(&env, &mut ctx).unwrap().source_port, 99, "the identification is used again");
    }

    #[test]
    fn a_guest_fills_its_own_device_only_and_who_sends_most_gives_way_to_itself() {
        let env = env();
        let (mut neighbour, mut quiet) = (context(1, 1), context(2, 2));
        neighbour.ifindex = 8;
        neighbour.datagram_set = set(&neighbour, &[1, 2]);
        remember(&env, &mut neighbour);
        remember(&env, &mut quiet);
        for id in 0..10_000 {
            remember(&env, &mut context(3, 100 + id));
        }
        assert!(known(&env, &mut neighbour).is_some(), "on another device");
        assert!(known(&env, &mut quiet).is_some(), "beside it");
        let kept: Vec<u32> =
            (0..10_000).filter(|id| known(&env, &mut context(3, 100 + id)).is_some()).collect();
        assert_eq!(kept.len(), DATAGRAM_SLOTS - 1);
        // Who comes late into a full set finds room too.
        let mut late = context(4, 4);
        remember(&env, &mut late);
        assert!(known(&env, &mut late).is_some());
    }

    #[test]
    fn a_flood_at_one_public_address_leaves_other_addresses_their_datagrams() {
        let env = env();
        let world = |source: u32, destination: u32, id: u32| {
            let mut ctx = context(source, id);
            ctx.side = Side::Uplink as u8;
            ctx.datagram.destination[0] = destination;
            ctx.datagram_set = set(&ctx, &[1, 2]);
            assert!((DEVICE_SETS..DATAGRAM_SETS).contains(&ctx.datagram_set));
            ctx
        };
        let mut seen: Vec<u32> = (0..100_000).map(|source| world(source, 1, 1).datagram_set).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), ADDRESS_SETS as usize);
        let mut other = world(7, 2, 9);
        assert!(!seen.contains(&other.datagram_set));
        remember(&env, &mut other);
        for source in 0..100_000 {
            remember(&env, &mut world(source, 1, source));
        }
        assert!(known(&env, &mut other).is_some());
    }

    #[test]
    fn threads_that_fill_one_set_at_once_never_leave_a_datagram_with_anothers_ports() {
        let env = &env();
        std::thread::scope(|scope| {
            for thread in 0..3u32 {
                scope.spawn(move || {
                    let mut found = 0;
                    for round in 0..20_000u32 {
                        let id = round % 97 * 3 + thread;
                        remember(env, &mut context(thread, id));
                        for id in [id, round % 291] {
                            let mut ctx = context(id % 3, id);
                            if let Some(known) = known(env, &mut ctx) {
                                assert_eq!(known, ctx.first_fragment);
                                found += 1;
                            }
                        }
                    }
                    assert!(found > 10_000, "{found}");
                });
            }
        });
    }
}
