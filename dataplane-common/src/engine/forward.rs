//! Sending a packet of a known flow: deadlines, TCP state, translation, next hop.

use super::{Context, Side, Verdict, drop, pass};
use crate::atomic;
use crate::clock::passed;
use crate::env::Env;
use crate::flow::{self, Ctl, FLAG_FORWARD, FLAG_MAPPED, LIVE};
use crate::layout::{
    Control, FlowKey, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, HOP_HOST, HOP_WORLD, HalfRecord,
    KIND_MAPPING, NextHop, Settings, WORLD,
};
use crate::packet::headers::{FIN, RST, SYN, TCP, same_mac};
use crate::packet::rewrite::{Tuple, translate};
use crate::packet::{Packet, parse};
use crate::reason::Reason;
use crate::tcp_state::{self, State};

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

/// How a packet can leave by a next hop right now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exit {
    Send,
    /// The kernel has to resolve the neighbour.
    Resolve,
    ToHost,
    Nowhere,
}

#[inline(always)]
fn exit(hop: &NextHop, now: u32) -> Exit {
    match hop.kind {
        HOP_HOST => Exit::ToHost,
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
pub(super) fn established<P: Packet, E: Env>(
    packet: &P,
    env: &E,
    ctx: &mut Context,
    control: &Control,
    record: *mut HalfRecord,
) -> Option<Verdict> {
    // SAFETY: `record` points into the table; the copy is checked against the generation below.
    let (before, next_hop, ingress, new) = unsafe {
        let before = flow::ctl(record);
        let r = &*record;
        let new = Tuple {
            source: r.new_source,
            destination: r.new_destination,
            source_port: r.new_source_port,
            destination_port: r.new_destination_port,
        };
        (before, r.next_hop, r.ingress, new)
    };
    // SAFETY: as above.
    let again = unsafe { flow::ctl(record) };
    if before.phase() != LIVE || again.generation() != before.generation() {
        return None;
    }
    if ctx.side == Side::Guest as u8 {
        // The address is in the key; that it comes from this guest and not from a neighbour is checked here.
        let from = env.next_hop(ingress as u32)?;
        // SAFETY: the element lives as long as the map.
        let from = unsafe { &*from };
        // SAFETY: both stand at even addresses in records whose layout is fixed.
        let same = unsafe { same_mac(&raw const from.mac, &raw const ctx.source_mac) };
        if from.ifindex != ctx.ifindex || !same {
            return Some(drop(env, ctx, Reason::Spoofed));
        }
    }
    ctx.new = new;
    ctx.egress = next_hop;
    let verdict = send(packet, env, ctx, Reason::Forwarded);
    if verdict == Verdict::Drop || (ctx.xdp() && verdict == Verdict::Pass) {
        return Some(verdict);
    }
    touch(env, ctx, settings(control, ctx.generation), record, before);
    Some(verdict)
}

/// Translates the packet to `ctx.new` and sends it by `ctx.egress`; counts it as `reason`.
#[inline(always)]
pub fn send<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context, reason: Reason) -> Verdict {
    if ctx.side == Side::Host as u8 {
        // Host and guest talk without translation; the kernel is already sending it.
        return pass(env, ctx, if reason == Reason::Forwarded { Reason::FromHost } else { reason });
    }
    let Some(hop) = env.next_hop(ctx.egress as u32) else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the element lives as long as the map.
    let hop = unsafe { &*hop };
    let (l3, l4) = (parse::l3_offset(ctx), parse::l4_offset(ctx));
    match exit(hop, ctx.now) {
        Exit::ToHost => pass(env, ctx, if reason == Reason::Forwarded { Reason::ToHost } else { reason }),
        Exit::Nowhere => drop(env, ctx, Reason::Unresolved),
        _ if ctx.ttl <= 1 => drop(env, ctx, Reason::TtlExpired),
        Exit::Send => {
            if ctx.xdp() && hop.flags & HOP_FLAG_XDP == 0 {
                return Verdict::Pass;
            }
            let ifindex = hop.ifindex;
            if !translate(packet, l3, l4, &ctx.key, &ctx.new, Some(hop)) {
                return drop(env, ctx, Reason::Malformed);
            }
            env.count(reason, ctx.length);
            Verdict::Redirect(ifindex)
        }
        Exit::Resolve => {
            if ctx.xdp() {
                return Verdict::Pass;
            }
            let ifindex = hop.ifindex;
            let address = if hop.kind == HOP_GUEST { hop.address } else { 0 };
            if !translate(packet, l3, l4, &ctx.key, &ctx.new, Some(hop)) {
                return drop(env, ctx, Reason::Malformed);
            }
            env.count(reason, ctx.length);
            Verdict::Neighbour(ifindex, address)
        }
    }
}

/// Counts the packet in its half and keeps the flow alive, or moves it towards its end.
#[inline(always)]
fn touch<E: Env>(env: &E, ctx: &Context, settings: &Settings, record: *mut HalfRecord, before: Ctl) {
    // SAFETY: `record` points into the table. A recycled slot would get one count too many and, at most, one deadline
    // that its own first packet had set a moment ago: harmless, and excluded by the grace.
    let r = unsafe { &mut *record };
    r.packets = r.packets.wrapping_add(1);
    r.bytes += ctx.length as u64;
    let now = ctx.now;
    if ctx.key.protocol == TCP {
        if ctx.tcp_flags & (SYN | FIN | RST) != 0 {
            return tcp_turn(env, ctx, settings, record, before);
        }
        if tcp_state::state(before.tcp()) != State::Established {
            return;
        }
    }
    let span = idle(settings, before.idle());
    let deadline = now.wrapping_add(span);
    if deadline != r.deadline {
        let old = r.deadline;
        r.deadline = deadline;
        if before.flags() & FLAG_MAPPED != 0 {
            // The mapping must outlive the flow; it is touched once in an eighth of the idle time, ahead by as much.
            let step = (span >> 3) | 1;
            if deadline / step != old / step {
                extend_mapping(env, ctx, before, deadline.wrapping_add(step));
            }
        }
    }
}

/// SYN, FIN and RST: the only packets that touch the other half.
#[inline(always)]
fn tcp_turn<E: Env>(env: &E, ctx: &Context, settings: &Settings, record: *mut HalfRecord, before: Ctl) {
    let forward = before.flags() & FLAG_FORWARD != 0;
    let bits = tcp_state::after(before.tcp(), ctx.tcp_flags, forward);
    let was = tcp_state::state(before.tcp());
    let is = tcp_state::state(bits);
    if bits == before.tcp() {
        return;
    }
    let span = match is {
        State::HalfOpen => settings.tcp_half_open,
        State::Established => idle(settings, before.idle()),
        State::Closed => settings.tcp_fin,
        State::Reset => settings.tcp_reset,
    };
    let deadline = ctx.now.wrapping_add(span);
    // SAFETY: `record` points into the table.
    let peer = unsafe { (*record).peer };
    set_tcp(record, before.generation(), bits, deadline);
    if let Some(other) = flow::record(env, peer)
        // A half-closed flow only notes the FIN; any change of state moves both deadlines.
        && (is != was || bits != before.tcp())
    {
        set_tcp(other, before.generation(), bits, deadline);
    }
}

/// Writes TCP bits and deadline, unless the slot has been recycled.
#[inline(always)]
fn set_tcp(record: *mut HalfRecord, generation: u32, bits: u8, deadline: u32) {
    // SAFETY: `record` points into the table; the compare-exchange fails on a recycled slot.
    unsafe {
        let seen = flow::ctl(record);
        if seen.phase() == LIVE && seen.generation() == generation {
            atomic::compare_exchange(&raw mut (*record).ctl, seen.0, seen.with_tcp(bits).0);
            (*record).deadline = deadline;
        }
    }
}

/// Moves the deadline of the mapping behind a UDP or echo flow.
#[inline(always)]
fn extend_mapping<E: Env>(env: &E, ctx: &Context, c: Ctl, deadline: u32) {
    let forward = c.flags() & FLAG_FORWARD != 0;
    // Either direction knows the public side of the mapping: (address, port) the world sees.
    let (address, port) = if forward {
        (ctx.new.source, ctx.new.source_port)
    } else {
        (ctx.key.destination, ctx.key.destination_port)
    };
    let key = FlowKey {
        source: 0,
        destination: address,
        source_port: 0,
        destination_port: port,
        network: WORLD,
        protocol: ctx.key.protocol,
        kind: KIND_MAPPING,
    };
    let Some(control) = env.control() else { return };
    // SAFETY: the control element lives as long as the map.
    if let Some((_, mapping)) = flow::find(env, unsafe { &*control }, &key, ctx.now) {
        // SAFETY: `mapping` points into the table.
        unsafe { (*mapping).deadline = deadline };
    }
}
