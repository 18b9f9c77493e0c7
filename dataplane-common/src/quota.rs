//! Nobody has the flow table to himself (ADR 0009): how many flows one guest may hold, and how many of those from outside may
//! be half-open.
//!
//! A flow counts for the guest that opened it, one from the world for the guest it goes to. It is counted when it is about to
//! be made, and given back by whoever takes its forward half's control word away from it: an insertion that takes the slot
//! over, [`crate::flow::end`], a look for dead flows here, the reaper. A flow that has died by its deadline therefore still
//! counts until somebody comes by; a guest that has as many as it may has the table looked through for such flows by its
//! own next packet ([`relieve`]), so no controller is needed for that.
//!
//! A flow from the world takes a place in a ring of an eighth of the table until the ring comes round to that place again. What stands there
//! then and is half-open still is ended, so half-open flows are never more than the ring has places, and the oldest goes first. A
//! guest that has an eighth of its quota in the ring gives up its own oldest place for a new one.

use core::marker::PhantomData;

use crate::atomic;
use crate::classify::header;
use crate::engine::{Context, Verdict, WAY_INSTANCE_OUT, adopt, drop};
use crate::env::{Budget, Env, Step};
use crate::family::{Family, V4, V6};
use crate::flow::{self, Ctl, FLAG_FORWARD, FREE, LIVE};
use crate::layout::{Control, HalfRecord, KIND_MAPPING, NEXT_HOP_HOST, WORLD, half_open_mask};
use crate::packet::headers::TCP;
use crate::reason::Reason;
use crate::tcp_state::{self, State};

/// Slots that one packet looks at for a dead flow, and packets that may do so per tick and CPU: together half a
/// millisecond in 67 at most.
const LOOK: u32 = 8192;
const LOOKS: u32 = 4;
/// Places of the ring that one packet looks at for its guest's oldest; the next packet goes on.
const PLACES: u32 = 1024;

/// What there is too much of, in [`Relief::over`].
pub const OVER_FLOWS: u8 = 1;
pub const OVER_HALF_OPEN: u8 = 2;

/// In [`Relief::place`]: the packet has reserved a place over its guest's share, so that whoever comes after it has to give one
/// up as well and cannot take what this packet makes free.
const PLACE_KEPT: u8 = 1;
/// It has given up an older one for that.
const PLACE_FREED: u8 = 2;

/// One place reserved, in [`GuestFlows::held`].
const ONE: u64 = 1 << 32 | 1;

/// What is under way for the packet's guest.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Relief {
    /// What there was too much of: `OVER_*`, 0 if nothing.
    pub over: u8,
    /// Of a place in the ring: `PLACE_*`.
    pub place: u8,
    /// Next hop of the guest that pays for the flow.
    pub payer: u16,
    /// What the guest may hold.
    pub quota: u32,
    /// The slot or place to be looked at next, and where to stop.
    pub at: u32,
    pub until: u32,
}

/// Flows that a guest holds. Below zero only after a table was adopted that was not counted.
#[inline(always)]
pub const fn held(word: u64) -> i32 {
    word as u32 as i32
}

/// Who pays for a flow seen first in `network`: the guest it goes to if it is from the world, else the guest it is from. This
/// host is [`NEXT_HOP_HOST`] and has no limit.
#[inline(always)]
pub const fn payer(network: u16, ingress: u16, next_hop: u16) -> u16 {
    if network == WORLD { next_hop } else { ingress }
}

/// Who pays for the flow of this forward half; nobody for a public port of a UDP socket ([`KIND_MAPPING`]): of those a guest
/// has no more than it owns ports.
#[inline(always)]
pub const fn counts_for(r: &HalfRecord) -> Option<u16> {
    if r.key.kind == KIND_MAPPING { None } else { Some(payer(r.key.network, r.ingress(), r.next_hop())) }
}

/// Half-open flows that a guest with this quota may have from the world.
#[inline(always)]
pub const fn share(quota: u32) -> u32 {
    if quota < 8 { 1 } else { quota / 8 }
}

/// Gives a record's place back if it is the one that counts: called by who has just made sure that nobody else does, with
/// the control word that the record had.
///
/// # Safety
/// `r` points into a flow table, and its key and hops are still those of `before`.
#[inline(always)]
pub unsafe fn recycled<E: Env>(env: &E, r: *const HalfRecord, before: Ctl) {
    if before.flags() & FLAG_FORWARD == 0 {
        return;
    }
    // SAFETY: the caller vouches for `r`.
    if let Some(hop) = counts_for(unsafe { &*r }) {
        give_back(env, hop);
    }
}

/// Counts a flow for a guest that somebody else makes than a packet: [`crate::flow::insert`] does not.
#[inline(always)]
pub fn reserve<E: Env>(env: &E, hop: u16) {
    if let Some(guest) = env.guest_flows(hop as u32) {
        // SAFETY: the element lives as long as the map.
        unsafe { atomic::add(&raw mut (*guest).held, ONE) };
    }
}

/// The other way round.
#[inline(always)]
pub fn give_back<E: Env>(env: &E, hop: u16) {
    if let Some(guest) = env.guest_flows(hop as u32) {
        // SAFETY: the element lives as long as the map.
        unsafe { atomic::add(&raw mut (*guest).held, 1u64.wrapping_neg()) };
    }
}

/// Is the packet's flow one that somebody in the world opens?
#[inline(always)]
fn from_world(ctx: &Context) -> bool {
    ctx.key.network == WORLD
}

/// Who pays for the packet's flow: of one that is adopted perhaps its receiver, whose half will be the one that counts.
#[inline(always)]
fn opener(ctx: &Context) -> u16 {
    if ctx.adopt != adopt::RECEIVER {
        return payer(ctx.key.network, ctx.ingress, ctx.egress);
    }
    let network = if ctx.way == WAY_INSTANCE_OUT { WORLD } else { ctx.to_network };
    payer(network, ctx.egress, ctx.ingress)
}

/// Reserves a place of its guest's quota for the packet's flow, and one in the ring if it is from the world; or says how the
/// packet goes on instead.
#[inline(always)]
pub fn admit<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Option<Verdict> {
    let Some(head) = header(env, ctx.generation) else { return Some(drop(env, ctx, Reason::Internal)) };
    // SAFETY: page 0 is the header; the index is below the two elements.
    let quota = unsafe { *(&raw const (*head).flow_quota).cast::<u32>().add(F::V6 as usize) };
    let hop = opener(ctx);
    let Some(guest) = env.guest_flows(hop as u32) else { return Some(drop(env, ctx, Reason::Internal)) };
    ctx.relief.payer = hop;
    ctx.relief.quota = quota;
    let limited = quota != 0 && hop > NEXT_HOP_HOST;
    let (mut over, world) = (0, from_world(ctx));
    // SAFETY: the element lives as long as the map.
    unsafe {
        let (held, waiting) = if env.dry_run() {
            (atomic::load(&raw const (*guest).held), atomic::load(&raw const (*guest).waiting))
        } else {
            let held = atomic::add(&raw mut (*guest).held, ONE);
            let reserves = world && ctx.relief.place == 0;
            (held, if reserves { atomic::add(&raw mut (*guest).waiting, 1) } else { 0 })
        };
        let full = match ctx.relief.place {
            0 => waiting as i64 >= share(quota) as i64,
            freed => freed != PLACE_FREED,
        };
        if limited && self::held(held) >= quota as i32 {
            over = OVER_FLOWS;
        }
        if limited && world && full {
            over |= OVER_HALF_OPEN;
        }
        if over == 0 {
            return None;
        }
        if !env.dry_run() {
            give_back(env, hop);
            if ctx.relief.over == 0 && over & OVER_HALF_OPEN != 0 {
                ctx.relief.place = PLACE_KEPT;
            } else if world {
                atomic::add(&raw mut (*guest).waiting, 1u64.wrapping_neg());
            }
            if ctx.relief.over != 0 {
                atomic::add(&raw mut (*guest).refused, 1);
            }
        }
    }
    if ctx.relief.over == 0 {
        ctx.relief.over = over;
        return Some(Verdict::Next(crate::engine::Stage::Relieve));
    }
    let reason = if over & OVER_FLOWS != 0 { Reason::GuestFlowQuota } else { Reason::HalfOpenQuota };
    Some(drop(env, ctx, reason))
}

/// No flow was made: what was reserved is given back.
#[inline(always)]
pub fn forgo<E: Env>(env: &E, ctx: &mut Context) {
    if env.dry_run() {
        return;
    }
    give_back(env, ctx.relief.payer);
    if from_world(ctx)
        && let Some(guest) = env.guest_flows(ctx.relief.payer as u32)
    {
        // SAFETY: the element lives as long as the map.
        unsafe { atomic::add(&raw mut (*guest).waiting, 1u64.wrapping_neg()) };
    }
}

/// What stands in a place of the ring: `generation:24 | payer:12 | slot:28`, the generation as far as it fits; 0 nothing. A payer is
/// never 0.
#[inline(always)]
const fn place(slot: u32, payer: u16, generation: u32) -> u64 {
    (generation as u64 & 0xff_ffff) << 40 | (payer as u64 & 0xfff) << 28 | slot as u64 & 0xfff_ffff
}

/// Slots a place can tell apart.
pub const PLACE_SLOTS: u32 = 1 << 28;

#[inline(always)]
const fn payer_in(place: u64) -> u16 {
    (place >> 28) as u16 & 0xfff
}

/// Puts a flow from the world, whose forward half has just been published in `slot`, into the ring, and ends what it comes in
/// the place of if that is half-open still. Not before it is published: who comes round to its place meanwhile could not end it.
#[inline(always)]
pub fn enter<F: Family, E: Env>(env: &E, ctx: &Context, control: &Control, slot: u32, generation: u32) {
    if env.dry_run() || !from_world(ctx) {
        return;
    }
    let Some(cursors) = env.cursors() else { return };
    // SAFETY: the element lives as long as the map; the index is below the two elements.
    let next = unsafe { atomic::add((&raw mut (*cursors).half_open).cast::<u64>().add(F::V6 as usize), 1) };
    let Some(p) = env.half_open(F::V6, next as u32 & half_open_mask(F::mask(control))) else { return };
    // SAFETY: as above.
    let old = unsafe { atomic::exchange(p, place(slot, ctx.relief.payer, generation)) };
    if old != 0 {
        retire::<F, E>(env, old, ctx.now);
    }
}

/// Has nobody but the side that opened the flow been heard, or of TCP only its first packets? Until it acknowledges the
/// answer, its address may be anybody's.
///
/// # Safety
/// `r` is a forward half of a flow table.
#[inline(always)]
unsafe fn half_open<F: Family, E: Env>(env: &E, r: *const HalfRecord, c: Ctl) -> bool {
    // SAFETY: the caller vouches for `r`.
    unsafe {
        if (*r).key.protocol == TCP {
            return (*r).ack == 0 || tcp_state::state(c.tcp()) == State::HalfOpen;
        }
        let Some(answers) = flow::record::<F, E>(env, (*r).peer) else { return false };
        (*answers).packets == 0
    }
}

/// A place of the ring is given up, by the one who took its word away: its flow is ended if it is half-open.
#[inline(always)]
fn retire<F: Family, E: Env>(env: &E, old: u64, now: u32) {
    let Some(guest) = env.guest_flows(payer_in(old) as u32) else { return };
    let slot = old as u32 & (PLACE_SLOTS - 1);
    let Some(r) = flow::record::<F, E>(env, slot) else { return };
    // SAFETY: the element lives as long as the map, `r` points into the table; a slot that has become another flow's has
    // another generation, which `end` looks at once more.
    unsafe {
        atomic::add(&raw mut (*guest).waiting, 1u64.wrapping_neg());
        let c = flow::ctl(r);
        let same = place(slot, payer_in(old), c.generation()) == old;
        if !same || c.phase() != LIVE || c.flags() & FLAG_FORWARD == 0 || !half_open::<F, E>(env, r, c) {
            return;
        }
        if flow::alive::<F, E>(env, r, now) {
            atomic::add(&raw mut (*guest).replaced, 1);
        }
        flow::end::<F, E>(env, slot, c.generation(), now);
    }
}

/// The stage behind a claim that found its guest's quota used up: looks for dead flows, and for the oldest half-open one, as far
/// as one packet may. Then the claim is tried once more.
#[inline(always)]
pub fn relieve<E: Env>(env: &E, ctx: &mut Context) -> Verdict {
    if ctx.v6 != 0 { relieved::<V6, E>(env, ctx) } else { relieved::<V4, E>(env, ctx) }
}

#[inline(always)]
fn relieved<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Verdict {
    let (Some(control), Some(cursors)) = (env.control(), env.cursors()) else {
        return drop(env, ctx, Reason::Internal);
    };
    let Some(guest) = env.guest_flows(ctx.relief.payer as u32) else {
        return drop(env, ctx, Reason::Internal);
    };
    if env.dry_run() {
        return Verdict::Next(F::CLAIM);
    }
    // SAFETY: the elements live as long as their maps; the indices are below two.
    unsafe {
        let mask = F::mask(&*control);
        if ctx.relief.over & OVER_FLOWS != 0 && env.spend(Budget::Relieve, ctx.now, LOOKS) {
            // Several processors may look at the same slots: each is freed once.
            let cursor = (&raw mut (*cursors).sweep).cast::<u64>().add(F::V6 as usize);
            ctx.relief.at = atomic::load(cursor) as u32;
            ctx.relief.until = (mask << 3) | 7;
            env.search::<FreeDead<F>>(ctx, LOOK);
            atomic::exchange(cursor, ctx.relief.at as u64);
        }
        if ctx.relief.over & OVER_HALF_OPEN != 0 {
            let ring = half_open_mask(mask);
            let end =
                atomic::load((&raw const (*cursors).half_open).cast::<u64>().add(F::V6 as usize)) as u32;
            let first = atomic::load(&raw const (*guest).oldest) as u32;
            // What is longer ago than one turn of the ring is not there any more.
            let turn = end.wrapping_sub(ring).wrapping_sub(1);
            ctx.relief.at = if end.wrapping_sub(first) > ring { turn } else { first };
            ctx.relief.until = end;
            env.search::<GiveUpOldest<F>>(ctx, PLACES);
            // At the end without having found any: somebody has put his flow in a place we had passed already.
            let at = if ctx.relief.at == end { turn } else { ctx.relief.at };
            atomic::exchange(&raw mut (*guest).oldest, at as u64);
        }
    }
    Verdict::Next(F::CLAIM)
}

/// One slot: freed if its flow is dead. Ends when the guest may hold more again.
struct FreeDead<F>(PhantomData<F>);

impl<F: Family, E: Env> Step<E> for FreeDead<F> {
    #[inline(always)]
    fn attempt(env: &E, ctx: &mut Context) -> bool {
        let Some(guest) = env.guest_flows(ctx.relief.payer as u32) else { return true };
        // SAFETY: the element lives as long as the map.
        if held(unsafe { atomic::load(&raw const (*guest).held) }) < ctx.relief.quota as i32 {
            return true;
        }
        let Some(r) = flow::record::<F, E>(env, ctx.relief.at & ctx.relief.until) else { return true };
        ctx.relief.at = ctx.relief.at.wrapping_add(1);
        // SAFETY: `r` points into the table. Key and hops are read before the exchange, which fails if they have become
        // another flow's.
        unsafe {
            let c = flow::ctl(r);
            if c.phase() == FREE || !flow::reusable::<F, E>(env, r, c, ctx.now) {
                return false;
            }
            let payer = counts_for(&*r);
            let free = Ctl::new(c.generation(), FREE, 0, 0, 0);
            if atomic::compare_exchange(&raw mut (*r).ctl, c.0, free.0) == c.0
                && c.flags() & FLAG_FORWARD != 0
                && let Some(hop) = payer
            {
                give_back(env, hop);
            }
        }
        false
    }
}

/// One place of the ring: given up if it is the guest's.
struct GiveUpOldest<F>(PhantomData<F>);

impl<F: Family, E: Env> Step<E> for GiveUpOldest<F> {
    #[inline(always)]
    fn attempt(env: &E, ctx: &mut Context) -> bool {
        let at = ctx.relief.at;
        let Some(control) = env.control() else { return true };
        if at == ctx.relief.until {
            return true;
        }
        // SAFETY: the control element lives as long as the map.
        let ring = half_open_mask(F::mask(unsafe { &*control }));
        let Some(p) = env.half_open(F::V6, at & ring) else { return true };
        ctx.relief.at = at.wrapping_add(1);
        // SAFETY: as above.
        let old = unsafe { atomic::load(p) };
        if old == 0 || payer_in(old) != ctx.relief.payer {
            return false;
        }
        // Who takes the word away gives up the place.
        // SAFETY: as above.
        if unsafe { atomic::compare_exchange(p, old, 0) } != old {
            return false;
        }
        retire::<F, E>(env, old, ctx.now);
        ctx.relief.place = PLACE_FREED;
        true
    }
}

#[cfg(test)]
#[path = "quota_tests.rs"]
mod tests;
