//! The flow table: finding, inserting, publishing and freeing half-records (ADR 0001).
//!
//! Anyone may read a record at any time; only the owner of a slot (who moved its control word to BUSY) writes key and
//! body; deadlines and counts are written by whoever forwards a packet. A slot is recycled only [`clock::GRACE`] after
//! both directions' deadlines, and its generation changes then.

use crate::atomic;
use crate::classify::lowest_bit;
use crate::clock::{self, passed};
use crate::env::Env;
use crate::family::Family;
use crate::layout::{BUCKET_SLOTS, Control, FlowKey, HalfRecord};
use crate::quota;

/// The control word: `generation:32 | phase:8 | tcp:8 | idle:8 | flags:8`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ctl(pub u64);

pub const FREE: u8 = 0;
/// Taken; the key is being written.
pub const BUSY: u8 = 1;
/// The key stands; its owner is looking whether another slot has it too.
pub const TENTATIVE: u8 = 2;
pub const LIVE: u8 = 3;
/// Ended by the operator or by a rule: absent at once, its slot reusable after the grace.
pub const ENDED: u8 = 4;

/// This direction is the one that opened the flow.
pub const FLAG_FORWARD: u8 = 1;
/// The flow has a port of its own from SNAT.
pub const FLAG_SNAT: u8 = 2;
/// A [`crate::layout::KIND_MAPPING`] pair stands behind the flow and must outlive it.
pub const FLAG_MAPPED: u8 = 4;
/// Both sides get a RST when the flow idles out (`enableTcpReset`).
pub const FLAG_RESET: u8 = 8;

impl Ctl {
    #[inline(always)]
    pub const fn new(generation: u32, phase: u8, tcp: u8, idle: u8, flags: u8) -> Self {
        Self(
            (generation as u64) << 32
                | (phase as u64) << 24
                | (tcp as u64) << 16
                | (idle as u64) << 8
                | flags as u64,
        )
    }
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    #[inline(always)]
    pub const fn phase(self) -> u8 {
        (self.0 >> 24) as u8
    }
    #[inline(always)]
    pub const fn tcp(self) -> u8 {
        (self.0 >> 16) as u8
    }
    #[inline(always)]
    pub const fn idle(self) -> u8 {
        (self.0 >> 8) as u8
    }
    #[inline(always)]
    pub const fn flags(self) -> u8 {
        self.0 as u8
    }
    #[inline(always)]
    pub const fn with_phase(self, phase: u8) -> Self {
        Self(self.0 & !(0xff << 24) | (phase as u64) << 24)
    }
    /// The word of a flow that has ended: it counts for nobody any more, see [`crate::quota`].
    #[inline(always)]
    pub const fn ended(self) -> Self {
        Self(self.with_phase(ENDED).0 & !(FLAG_FORWARD as u64))
    }
    #[inline(always)]
    pub const fn with_tcp(self, tcp: u8) -> Self {
        Self(self.0 & !(0xff << 16) | (tcp as u64) << 16)
    }
}

/// Mixes the key with the table's secrets. Not cryptographic: what it guards against is an outsider who picks keys
/// that share a bucket without knowing the secrets.
#[inline(always)]
pub fn hash(key: &FlowKey, seed: &[u64; 2]) -> u64 {
    let [a, b] = words(key);
    let mut h = (a ^ seed[0]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^= h >> 32;
    h = (h ^ b ^ seed[1]).wrapping_mul(0xd6e8_feb8_6659_fd93);
    h ^= h >> 29;
    h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ h >> 32
}

/// The key as two words, for comparing.
#[inline(always)]
pub fn words(key: &FlowKey) -> [u64; 2] {
    [
        key.source as u64 | (key.destination as u64) << 32,
        key.source_port as u64
            | (key.destination_port as u64) << 16
            | (key.network as u64) << 32
            | (key.protocol as u64) << 48
            | (key.kind as u64) << 56,
    ]
}

/// Where a key may stand: two buckets and the slot at which probing begins in either.
#[derive(Clone, Copy)]
pub struct Places {
    pub first: u32,
    pub second: u32,
    pub start: u32,
}

#[inline(always)]
pub fn places(hash: u64, mask: u32) -> Places {
    let first = (hash >> 32) as u32 & mask;
    Places { first, second: (first ^ ((hash >> 8) as u32 | 1)) & mask, start: hash as u32 & 7 }
}

/// The record with this index.
#[inline(always)]
pub fn record<F: Family, E: Env>(env: &E, index: u32) -> Option<*mut HalfRecord> {
    let bucket = F::bucket(env, index >> 3)?;
    // SAFETY: just looked up.
    Some(unsafe { F::slot(bucket, index & 7) })
}

/// # Safety
/// `r` points into the flow table.
#[inline(always)]
pub(crate) unsafe fn has_words(r: *mut HalfRecord, key: [u64; 2]) -> bool {
    atomic::step();
    // SAFETY: the key is the first 16 bytes of the aligned record; each word is read once.
    unsafe {
        let p = r.cast::<u64>();
        core::ptr::read_volatile(p) == key[0] && core::ptr::read_volatile(p.add(1)) == key[1]
    }
}

/// # Safety
/// `r` points into the flow table, and the caller owns the slot.
#[inline(always)]
pub(crate) unsafe fn write_words(r: *mut HalfRecord, key: [u64; 2]) {
    // SAFETY: as above.
    unsafe {
        let p = r.cast::<u64>();
        atomic::step();
        core::ptr::write_volatile(p, key[0]);
        atomic::step();
        core::ptr::write_volatile(p.add(1), key[1]);
    }
}

/// # Safety
/// `r` points into the flow table.
#[inline(always)]
pub unsafe fn ctl(r: *const HalfRecord) -> Ctl {
    // SAFETY: the caller vouches for `r`.
    Ctl(unsafe { atomic::load(&raw const (*r).ctl) })
}

/// Has the other direction kept the flow alive until `slack` ticks before now?
#[inline(always)]
fn peer_alive<F: Family, E: Env>(env: &E, peer: u32, generation: u32, now: u32, slack: u32) -> bool {
    let Some(p) = record::<F, E>(env, peer) else { return false };
    // SAFETY: `p` points into the table.
    unsafe {
        let c = ctl(p);
        c.phase() == LIVE && c.generation() == generation && !passed((*p).deadline.wrapping_add(slack), now)
    }
}

/// Is this LIVE record's flow alive? One cache line unless this direction alone has been silent for too long.
///
/// # Safety
/// `r` points into the flow table.
#[inline(always)]
pub unsafe fn alive<F: Family, E: Env>(env: &E, r: *const HalfRecord, now: u32) -> bool {
    // SAFETY: the caller vouches for `r`.
    unsafe { !passed((*r).deadline, now) || peer_alive::<F, E>(env, (*r).peer, ctl(r).generation(), now, 0) }
}

/// May the slot be taken? Free, dead for longer than the grace, or abandoned with its key written (which no program does).
///
/// # Safety
/// `r` points into the flow table.
#[inline(always)]
pub unsafe fn reusable<F: Family, E: Env>(env: &E, r: *const HalfRecord, c: Ctl, now: u32) -> bool {
    // SAFETY: the caller vouches for `r`.
    unsafe {
        if c.phase() == FREE {
            return true;
        }
        if !passed((*r).deadline.wrapping_add(clock::GRACE), now) {
            return false;
        }
        match c.phase() {
            LIVE => !peer_alive::<F, E>(env, (*r).peer, c.generation(), now, clock::GRACE),
            ENDED => true,
            // Its deadline is that of whoever had the slot before, until its owner has written his own.
            BUSY => false,
            _ => passed((*r).deadline.wrapping_add(8 * clock::GRACE), now),
        }
    }
}

/// Finds the live record of a key.
#[inline(always)]
pub fn find<F: Family, E: Env>(
    env: &E,
    control: &Control,
    key: &F::Key,
    now: u32,
) -> Option<(u32, *mut HalfRecord)> {
    let at = places(F::hash(key, &control.seed), F::mask(control));
    let mut bucket = at.first;
    for _ in 0..2 {
        let p = F::bucket(env, bucket)?;
        for i in 0..BUCKET_SLOTS as u32 {
            let n = (at.start + i) & 7;
            // SAFETY: `p` was just looked up, `n` is below eight.
            unsafe {
                let r = F::slot(p, n);
                if F::has_key(r, key) && ctl(r).phase() == LIVE && alive::<F, E>(env, r, now) {
                    return Some((bucket << 3 | n, r));
                }
            }
        }
        bucket = at.second;
    }
    None
}

/// A slot taken for a key and not yet published, or why not. One word, so that it crosses a BPF-to-BPF call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken(pub u64);

impl Taken {
    /// The key is in the table already (or being inserted by another CPU).
    pub const EXISTS: Taken = Taken(u64::MAX);
    /// Both buckets are full of live flows.
    pub const FULL: Taken = Taken(u64::MAX - 1);
    /// Other CPUs took the free slots under our hands.
    pub const CONTENDED: Taken = Taken(u64::MAX - 2);

    #[inline(always)]
    const fn new(index: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | index as u64)
    }
    #[inline(always)]
    pub const fn is_slot(self) -> bool {
        // Slot indices stay below 2^31, the three errors do not.
        self.0 as u32 >> 31 == 0
    }
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0 as u32
    }
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The grace of a record that has died with the very key that is to be inserted ([`clock::GRACE`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grace {
    /// Nobody has the key until it is over: who had it may not be who wants it, and packets for him may be under way.
    Kept,
    /// Whose the key is follows from the key, as with a guest's own tuple: the record is taken over where it stands.
    Waived,
}

/// What one look over both buckets found.
#[derive(Clone, Copy)]
struct Scan {
    /// Index of a slot other than `except` that has the key, or `NOWHERE`.
    same: u32,
    /// Index of the first reusable slot, or `NOWHERE`.
    room: u32,
}

const NOWHERE: u32 = u32::MAX;

/// `notes` is a word of scratch memory for which slots are free. It is memory and no variable because the verifier does
/// not follow what is in a map: sixteen branches that each set a bit would be 65,536 states to it.
///
/// # Safety
/// `notes` can be written and nobody else uses it meanwhile.
#[inline(always)]
unsafe fn scan<F: Family, E: Env>(
    env: &E,
    at: Places,
    key: &F::Key,
    now: u32,
    except: u32,
    notes: *mut u32,
) -> Scan {
    let mut found = Scan { same: NOWHERE, room: NOWHERE };
    // SAFETY: the caller vouches for `notes`.
    unsafe { notes.write_volatile(0) };
    let mut bucket = at.first;
    for which in 0..2 {
        let Some(p) = F::bucket(env, bucket) else { return found };
        for i in 0..BUCKET_SLOTS as u32 {
            let n = (at.start + i) & 7;
            let index = bucket << 3 | n;
            // SAFETY: `p` was just looked up, `n` is below eight; the caller vouches for `notes`.
            unsafe {
                let r = F::slot(p, n);
                let c = ctl(r);
                // Within the grace a dead flow's key still counts: its port is not handed out while a packet of it may
                // be under way.
                if reusable::<F, E>(env, r, c, now) {
                    notes.write_volatile(notes.read_volatile() | 1 << (which * 8 + i));
                } else if index != except && c.phase() >= TENTATIVE && F::has_key(r, key) {
                    found.same = index;
                    return found;
                }
            }
        }
        bucket = at.second;
    }
    // SAFETY: as above.
    let free = unsafe { notes.read_volatile() } as u64;
    let (mut free, second) = (free & 0xff, free >> 8 & 0xff);
    let mut bucket = at.first;
    if bits(free) <= CROWDED && bits(second) > bits(free) {
        free = second;
        bucket = at.second;
    }
    if free != 0 {
        found.room = bucket << 3 | ((at.start + lowest_bit(free)) & 7);
    }
    found
}

/// Number of bits set in a byte.
#[inline(always)]
const fn bits(byte: u64) -> u32 {
    let pairs = byte - (byte >> 1 & 0x55);
    let nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33);
    ((nibbles + (nibbles >> 4)) & 0xf) as u32
}

/// With so few slots free in the first bucket of a key the second is looked at. 2 of 8: at half load then one key in
/// twenty stands in its second bucket (and costs a cache line more) and none finds both full; with 0 it is one in a
/// hundred, but 122 of half a million find both full (simulated, half a million keys).
const CROWDED: u32 = 2;

/// Takes a slot for `key` if no live flow has it: insert-if-absent. The slot is TENTATIVE until [`publish`] or
/// [`withdraw`]; until then nobody finds it, and nobody else can insert the key.
///
/// A record that has died with this key and is in its grace is in the way, or is taken over if `grace` is waived. Who still works
/// with a copy of it then sends under what the flow was; what he writes afterwards, a later deadline, is written to a flow of the same key.
///
/// # Safety
/// `notes` is a word that can be written and that nobody else uses meanwhile; see [`scan`].
#[inline(always)]
pub unsafe fn insert<F: Family, E: Env>(
    env: &E,
    key: &F::Key,
    now: u32,
    grace: Grace,
    notes: *mut u32,
) -> Taken {
    let Some(control) = env.control() else { return Taken::FULL };
    // SAFETY: the control element lives as long as the map.
    let control = unsafe { &*control };
    let at = places(F::hash(key, &control.seed), F::mask(control));
    let mut tries = 0;
    while tries < 3 {
        tries += 1;
        // SAFETY: the caller vouches for `notes`.
        let found = unsafe { scan::<F, E>(env, at, key, now, NOWHERE, notes) };
        let again = found.same != NOWHERE;
        if again && grace == Grace::Kept {
            return Taken::EXISTS;
        }
        let index = if again { found.same } else { found.room };
        if index == NOWHERE {
            return Taken::FULL;
        }
        let Some(r) = record::<F, E>(env, index) else { return Taken::FULL };
        // SAFETY: `r` points into the table; after the exchange the slot is ours.
        unsafe {
            let before = ctl(r);
            if again {
                if before.phase() == TENTATIVE || (before.phase() == LIVE && alive::<F, E>(env, r, now)) {
                    return Taken::EXISTS;
                }
                if before.phase() < LIVE || !F::has_key(r, key) {
                    continue;
                }
            } else if !reusable::<F, E>(env, r, before, now) {
                continue;
            }
            let generation = before.generation().wrapping_add(1);
            if env.dry_run() {
                return Taken::new(index, generation);
            }
            let tentative = Ctl::new(generation, TENTATIVE, 0, 0, 0);
            let first = if again { tentative } else { tentative.with_phase(BUSY) };
            if atomic::compare_exchange(&raw mut (*r).ctl, before.0, first.0) != before.0 {
                continue;
            }
            quota::recycled(env, r, before);
            (*r).deadline = now;
            if !again {
                F::write_key(r, key);
                atomic::exchange(&raw mut (*r).ctl, tentative.0);
            }
            if scan::<F, E>(env, at, key, now, index, notes).same != NOWHERE {
                atomic::exchange(&raw mut (*r).ctl, tentative.with_phase(FREE).0);
                return Taken::EXISTS;
            }
            return Taken::new(index, generation);
        }
    }
    Taken::CONTENDED
}

/// Gives a taken slot back, unused.
#[inline(always)]
pub fn withdraw<F: Family, E: Env>(env: &E, taken: Taken) {
    if env.dry_run() {
        return;
    }
    if let Some(r) = record::<F, E>(env, taken.index()) {
        // SAFETY: the slot is ours until the exchange.
        unsafe { atomic::exchange(&raw mut (*r).ctl, Ctl::new(taken.generation(), FREE, 0, 0, 0).0) };
    }
}

/// The generation both halves of a new flow carry: one that neither slot has had.
#[inline(always)]
pub fn common_generation(a: Taken, b: Taken) -> u32 {
    if a.generation().wrapping_sub(b.generation()) as i32 > 0 { a.generation() } else { b.generation() }
}

/// What [`publish`] writes besides the key.
#[derive(Clone, Copy, Default)]
pub struct Body {
    pub peer: u32,
    pub deadline: u32,
    /// Made by [`crate::layout::hops`].
    pub hops: u32,
    /// Of IPv6 the last 32 bits; the caller writes the rest ([`Family::set_new`]) while the slot is its own.
    pub new_source: u32,
    pub new_destination: u32,
    pub new_source_port: u16,
    pub new_destination_port: u16,
    pub rule: u32,
    /// See [`HalfRecord::ack`].
    pub ack: u32,
}

/// Fills a taken slot and makes it findable, with a full barrier before.
#[inline(always)]
pub fn publish<F: Family, E: Env>(env: &E, taken: Taken, body: &Body, ctl: Ctl) {
    if env.dry_run() {
        return;
    }
    let Some(r) = record::<F, E>(env, taken.index()) else { return };
    // SAFETY: the slot is ours until the exchange.
    unsafe {
        (*r).peer = body.peer;
        (*r).deadline = body.deadline;
        (*r).hops = body.hops;
        (*r).new_source = body.new_source;
        (*r).new_destination = body.new_destination;
        atomic::step();
        (*r).new_source_port = body.new_source_port;
        (*r).new_destination_port = body.new_destination_port;
        atomic::step();
        (*r).rule = body.rule;
        (*r).packets = 0;
        (*r).bytes_low = 0;
        (*r).ack = body.ack;
        atomic::exchange(&raw mut (*r).ctl, ctl.0);
    }
}

/// Ends the flow of a slot, both directions, if it still is of this generation. What its packets were counted as
/// stays readable until the slots are used again.
#[inline(always)]
pub fn end<F: Family, E: Env>(env: &E, index: u32, generation: u32, now: u32) {
    if env.dry_run() {
        return;
    }
    let mut at = index;
    for _ in 0..2 {
        let Some(r) = record::<F, E>(env, at) else { return };
        // SAFETY: `r` points into the table; the exchange fails on a slot that has become another flow's.
        unsafe {
            let seen = ctl(r);
            if seen.phase() != LIVE || seen.generation() != generation {
                return;
            }
            (*r).deadline = now;
            at = (*r).peer;
            if atomic::compare_exchange(&raw mut (*r).ctl, seen.0, seen.ended().0) == seen.0 {
                quota::recycled(env, r, seen);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_as_the_processor_does() {
        for byte in 0..=255u64 {
            assert_eq!(bits(byte), byte.count_ones());
        }
    }
}
