//! Sending a packet of a known flow: deadlines, translation, next hop.

use core::marker::PhantomData;

use super::{Context, Side, Stage, Verdict, claim, drop, pass};
use crate::clock::passed;
use crate::env::{Budget, Env};
use crate::family::Family;
use crate::flow::{self, Ctl, FLAG_FORWARD, FLAG_MAPPED, LIVE};
use crate::layout::{
    Control, EPOCH_SHIFT, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, HOP_HOST, HOP_LOOP, HOP_WORLD,
    HalfRecord, NEXT_HOP_HOST, NEXT_HOP_LOOP, NextHop, Settings,
};
use crate::packet::headers::{TCP, UDP, same_mac};
use crate::packet::parse::{SHAPE_ICMP_ERROR, SHAPE_LATER};
use crate::packet::rewrite::{forwarded6, translate, translate6};
use crate::packet::{Packet, parse};
use crate::reason::Reason;
use crate::tcp_state;

/// The settings of the generation this packet is decided by.
#[inline(always)]
pub fn settings(control: &Control, generation: u32) -> &Settings {
    // SAFETY: two elements, the index is a parity.
    unsafe { &*control.settings.as_ptr().add((generation & 1) as usize) }
}

/// Ticks of silence the flow survives.
#[inline(always)]
pub fn idle(settings: &Settings, class: u8) -> u32 {
    // SAFETY: the index is below the sixteen elements.
    unsafe { *settings.idle.as_ptr().add((class & 15) as usize) }
}

/// The last tick of a UDP or echo mapping of which a flow has just moved. It outlives its flows by the hold, and is ahead
/// of them by an eighth of the idle time and a little, see [`touch`].
#[inline(always)]
pub fn mapping_deadline(settings: &Settings, class: u8, protocol: u8, now: u32) -> u32 {
    let span = idle(settings, class);
    let hold = if protocol == UDP { settings.udp_hold } else { 0 };
    now.wrapping_add(span).wrapping_add((span >> 3) | 1).wrapping_add(hold)
}

/// How a packet can leave by a next hop right now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exit {
    Send,
    /// The kernel has to resolve the neighbour.
    Resolve,
    ToHost,
    /// Back in from the world.
    Loop,
    Nowhere,
}

#[inline(always)]
fn exit(hop: &NextHop, now: u32) -> Exit {
    match hop.kind {
        HOP_HOST => Exit::ToHost,
        HOP_LOOP => Exit::Loop,
        HOP_GUEST | HOP_WORLD => {
            if hop.flags & HOP_FLAG_RESOLVED != 0 && (hop.fresh_until == 0 || !passed(hop.fresh_until, now)) {
                Exit::Send
            } else {
                Exit::Resolve
            }
        }
        _ => Exit::Nowhere,
    }
}

/// Forwards a packet that hit `record`. `None`: the record was recycled while we read it, the packet is a miss.
#[inline(always)]
pub(super) fn established<F: Family, P: Packet, E: Env>(
    packet: &P,
    env: &E,
    ctx: &mut Context,
    control: &Control,
    index: u32,
    record: *mut HalfRecord,
) -> Option<Verdict> {
    // SAFETY: `record` points into the table; the copy is checked against the generation below.
    let (before, next_hop, ingress, rule) = unsafe {
        let before = flow::ctl(record);
        F::load_new(ctx, record);
        let r = &*record;
        (before, r.next_hop(), r.ingress(), r.rule)
    };
    // SAFETY: as above.
    let again = unsafe { flow::ctl(record) };
    if before.phase() != LIVE || again.generation() != before.generation() {
        return None;
    }
    if !speaks(env, ctx, ingress)? {
        return Some(drop(env, ctx, Reason::Spoofed));
    }
    let settings = settings(control, ctx.generation);
    if settings.reevaluate != 0
        && rule >> EPOCH_SHIFT != settings.epoch
        && before.flags() & FLAG_FORWARD != 0
        && env.spend(Budget::Reevaluate, ctx.now, settings.reevaluate)
    {
        // The initiator's packet, and the rules have changed since it was judged; answers cannot trigger this.
        ctx.again = index;
        ctx.again_generation = before.generation();
        return Some(Verdict::Next(F::CLASSIFY));
    }
    ctx.egress = next_hop;
    let verdict = send::<F, P, E>(packet, env, ctx, Reason::Forwarded);
    if stays::<F>(ctx, verdict) {
        return Some(verdict);
    }
    touch::<F, E>(env, ctx, settings, index, record, before);
    Some(verdict)
}

/// Has the packet not been sent, or not been sent yet? Then it does not count in its flow.
#[inline(always)]
fn stays<F: Family>(ctx: &Context, verdict: Verdict) -> bool {
    verdict == Verdict::Drop || verdict == Verdict::Next(F::REFUSE) || (ctx.xdp() && verdict == Verdict::Pass)
}

/// May the packet's sender speak in a flow whose packets come from `ingress`? `None`: there is no such next hop.
#[inline(always)]
pub(super) fn speaks<E: Env>(env: &E, ctx: &Context, ingress: u16) -> Option<bool> {
    if ctx.side == Side::Guest as u8 {
        // The address is in the key; that it comes from this guest and not from a neighbour is checked here.
        let from = env.next_hop(ingress as u32)?;
        // SAFETY: the element lives as long as the map.
        let from = unsafe { &*from };
        // SAFETY: both stand at even addresses in records whose layout is fixed.
        let same = unsafe { same_mac(&raw const from.mac, &raw const ctx.source_mac) };
        Some(from.ifindex == ctx.ifindex && same)
    } else if ctx.side == Side::Host as u8 {
        // Through a host that forwards a stranger could speak in a live flow of two guests.
        Some(ingress == NEXT_HOP_HOST)
    } else {
        // A flow that never leaves has no packets from outside.
        Some((ingress == NEXT_HOP_LOOP) == (ctx.looped != 0))
    }
}

/// Forwards a packet of a live flow that was judged again and may pass: the flow stays as it is, under the rule that
/// allows it now.
#[inline(always)]
pub(super) fn allowed_again<F: Family, P: Packet, E: Env>(
    packet: &P,
    env: &E,
    ctx: &mut Context,
    control: &Control,
) -> Verdict {
    let Some(record) = flow::record::<F, E>(env, ctx.again) else { return drop(env, ctx, Reason::Internal) };
    let settings = settings(control, ctx.generation);
    // SAFETY: `record` points into the table; the generation tells whether it still is the flow that was judged.
    let (before, peer) = unsafe { (flow::ctl(record), (*record).peer) };
    if before.phase() != LIVE || before.generation() != ctx.again_generation {
        return drop(env, ctx, Reason::NoFlow);
    }
    if !env.dry_run() {
        let stamp = claim::stamped(ctx, settings);
        // SAFETY: as above; a word that is written whole.
        unsafe { (*record).rule = stamp };
        if let Some(other) = flow::record::<F, E>(env, peer) {
            // SAFETY: as above.
            unsafe {
                if flow::ctl(other).generation() == ctx.again_generation {
                    (*other).rule = stamp;
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe {
        F::load_new(ctx, record);
        ctx.egress = (*record).next_hop();
    }
    let verdict = send::<F, P, E>(packet, env, ctx, Reason::Forwarded);
    if !stays::<F>(ctx, verdict) {
        touch::<F, E>(env, ctx, settings, ctx.again, record, before);
    }
    verdict
}

/// Translates the packet to `ctx.new` and sends it by `ctx.egress`; counts it as `reason`.
#[inline(always)]
pub fn send<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context, reason: Reason) -> Verdict {
    send_as::<F, E>(env, ctx, reason, &ByFlow::<F, P>(packet, PhantomData))
}

/// How a packet is written before it is sent.
pub(super) trait Translation {
    /// Writes it, with the hardware addresses of the next hop; there is none on the way back in. `false`: the headers are not
    /// where they should be.
    fn write(&self, ctx: &Context, hop: Option<&NextHop>) -> bool;
    /// Why the packet, being longer than `mtu`, cannot be sent as it is, see [`parse::too_big`].
    fn too_big(&self, ctx: &Context, mtu: u32) -> Option<Reason>;
}

/// As the flow says: from the context's key to its `new`.
struct ByFlow<'a, F, P>(&'a P, PhantomData<F>);

impl<F: Family, P: Packet> Translation for ByFlow<'_, F, P> {
    #[inline(always)]
    fn write(&self, ctx: &Context, hop: Option<&NextHop>) -> bool {
        rewrite::<F, P>(self.0, ctx, hop)
    }

    #[inline(always)]
    fn too_big(&self, ctx: &Context, mtu: u32) -> Option<Reason> {
        parse::too_big::<F>(self.0, ctx, mtu)
    }
}

/// [`send`] with a translation of the caller's.
#[inline(always)]
pub(super) fn send_as<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    reason: Reason,
    translation: &impl Translation,
) -> Verdict {
    if ctx.side == Side::Host as u8 {
        // Host and guest talk without translation; the kernel is already sending it.
        return pass(env, ctx, if reason == Reason::Forwarded { Reason::FromHost } else { reason });
    }
    let Some(hop) = env.next_hop(ctx.egress as u32) else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the element lives as long as the map.
    let hop = unsafe { &*hop };
    let exit = exit(hop, ctx.now);
    match exit {
        Exit::ToHost => {
            return pass(env, ctx, if reason == Reason::Forwarded { Reason::ToHost } else { reason });
        }
        Exit::Nowhere => return drop(env, ctx, Reason::Unresolved),
        _ => {}
    }
    if ctx.ttl <= 1 {
        return unsent::<F, E>(env, ctx, Reason::TtlExpired);
    }
    // Without a look at the packet for nearly all: what is not longer than the link takes, with its Ethernet header.
    if ctx.length > hop.mtu as u32 + 14
        && let Some(reason) = translation.too_big(ctx, hop.mtu as u32)
    {
        // Under XDP nothing can be fragmented, nor come back in: TC decides again.
        if ctx.xdp() && (reason == Reason::Fragmented || exit == Exit::Loop) {
            return Verdict::Pass;
        }
        ctx.mtu = hop.mtu as u32;
        return unsent::<F, E>(env, ctx, reason);
    }
    match exit {
        Exit::Loop => back_in(env, ctx, translation),
        Exit::Send => {
            if ctx.xdp() && hop.flags & HOP_FLAG_XDP == 0 {
                return Verdict::Pass;
            }
            let ifindex = hop.ifindex;
            if !translation.write(ctx, Some(hop)) {
                return drop(env, ctx, Reason::Malformed);
            }
            env.count(reason, ctx.length);
            Verdict::Redirect(ifindex)
        }
        _ => {
            if ctx.xdp() {
                return Verdict::Pass;
            }
            let (ifindex, guest) = (hop.ifindex, hop.kind == HOP_GUEST);
            let address = if guest { hop.address } else { 0 };
            if !translation.write(ctx, Some(hop)) {
                return drop(env, ctx, Reason::Malformed);
            }
            env.count(reason, ctx.length);
            if F::V6 && guest { Verdict::Neighbour6(ifindex) } else { Verdict::Neighbour(ifindex, address) }
        }
    }
}

/// The packet cannot go on, and its sender is told, unless it is an error itself (RFC 1122 §3.2.2).
#[inline(always)]
fn unsent<F: Family, E: Env>(env: &E, ctx: &mut Context, reason: Reason) -> Verdict {
    if ctx.shape & SHAPE_ICMP_ERROR != 0 {
        return drop(env, ctx, reason);
    }
    ctx.refused = reason as u8;
    Verdict::Next(F::REFUSE)
}

/// A guest's packet to one of our own public addresses: under its public source it begins anew as if it came from the
/// world (ADR 0007). Under XDP it is left to TC untouched, which can do it: a packet that is translated half cannot be
/// handed up.
#[inline(always)]
fn back_in<E: Env>(env: &E, ctx: &mut Context, translation: &impl Translation) -> Verdict {
    if ctx.xdp() {
        return Verdict::Pass;
    }
    if ctx.looped != 0 {
        return drop(env, ctx, Reason::Internal);
    }
    if !translation.write(ctx, None) {
        return drop(env, ctx, Reason::Malformed);
    }
    ctx.looped = 1;
    Verdict::Next(Stage::Loop)
}

/// Puts the flow's addresses and ports and the next hop's hardware addresses on.
#[inline(always)]
fn rewrite<F: Family, P: Packet>(packet: &P, ctx: &Context, hop: Option<&NextHop>) -> bool {
    let (l3, l4) = (parse::l3_offset(ctx), parse::l4_offset(ctx));
    let ports = ctx.shape & SHAPE_LATER == 0;
    if !F::V6 {
        return translate(packet, l3, l4, &ctx.key, &ctx.new, hop, ports);
    }
    let kept = ctx.new6.source == ctx.key6.source
        && ctx.new6.destination == ctx.key6.destination
        && ctx.new.source_port == ctx.key.source_port
        && ctx.new.destination_port == ctx.key.destination_port;
    match hop {
        Some(hop) if kept => forwarded6(packet, l3, hop),
        _ => translate6(packet, l3, l4, &ctx.key6, &ctx.new, &ctx.new6, hop, ports),
    }
}

/// Counts the packet in its half and keeps the flow alive, or moves it towards its end.
#[inline(always)]
fn touch<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    settings: &Settings,
    index: u32,
    record: *mut HalfRecord,
    before: Ctl,
) {
    if env.dry_run() {
        return;
    }
    // SAFETY: `record` points into the table. A recycled slot would get one count too many and, at most, one deadline
    // that its own first packet had set a moment ago: harmless, and excluded by the grace.
    let r = unsafe { &mut *record };
    r.packets = r.packets.wrapping_add(1);
    let low = r.bytes_low.wrapping_add(ctx.length);
    if low < r.bytes_low {
        // The uppermost byte of a little-endian word (`HalfRecord::hops`); the hops beside it stay as they are.
        // SAFETY: the fourth of four bytes.
        let high = unsafe { (&raw mut r.hops).cast::<u8>().add(3) };
        // SAFETY: as above.
        unsafe { *high = (*high).wrapping_add(1) };
    }
    r.bytes_low = low;
    let now = ctx.now;
    if ctx.key.protocol == TCP {
        if !tcp_state::plain(before.tcp(), ctx.tcp_flags) {
            return F::tcp_turn(env, ctx, index, before);
        }
        r.ack = ctx.tcp_ack;
    }
    let span = idle(settings, before.idle());
    let deadline = now.wrapping_add(span);
    let old = r.deadline;
    r.deadline = deadline;
    // The mapping must outlive the flow; it is touched once in an eighth of the idle time or more often, ahead by as much. No
    // branch here depends on how long ago the last packet was: that is chance, and guessed wrong every other time.
    if before.flags() & FLAG_MAPPED != 0 && (old ^ deadline) & !below(span >> 4) != 0 {
        let deadline = mapping_deadline(settings, before.idle(), ctx.key.protocol, now);
        extend_mapping::<F, E>(env, ctx, before, deadline);
    }
}

/// All bits from the highest one of `n` down: one less than a power of two.
#[inline(always)]
const fn below(n: u32) -> u32 {
    let n = n | n >> 1;
    let n = n | n >> 2;
    let n = n | n >> 4;
    let n = n | n >> 8;
    n | n >> 16
}

/// Moves the deadline of the mapping behind a UDP or echo flow.
#[inline(always)]
fn extend_mapping<F: Family, E: Env>(env: &E, ctx: &mut Context, c: Ctl, deadline: u32) {
    // Either direction knows the public side of the mapping: (address, port) the world sees.
    if c.flags() & FLAG_FORWARD != 0 {
        F::claim_outside(ctx, F::new_source(ctx), ctx.new.source_port);
    } else {
        F::claim_outside(ctx, F::destination(ctx), ctx.key.destination_port);
    }
    let Some(control) = env.control() else { return };
    // SAFETY: the control element lives as long as the map.
    if let Some((_, mapping)) = flow::find::<F, E>(env, unsafe { &*control }, F::claimed(ctx), ctx.now) {
        // SAFETY: `mapping` points into the table.
        unsafe { (*mapping).deadline = deadline };
    }
}
