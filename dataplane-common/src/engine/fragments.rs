//! Fragments: in-order virtual reassembly (RFC 4787 REQ-14 as far as BPF allows, which cannot hold a packet back). The
//! first fragment has the ports and says them of the rest, each of which has to begin where the one before it ended: one that
//! comes too early or overlaps is dropped. Nothing is ever read as ports that is not a whole header (RFC 1858, RFC 3128).
//!
//! What the first one says is noted once it belongs to a flow, so by its own sender, allowed.

use super::{Context, Ended, NO_SET, Side, Stage, Verdict, end, forward};
use crate::classify::{entry, header};
use crate::env::Env;
use crate::family::Family;
use crate::flow;
use crate::layout::{Control, WORLD};
use crate::packet::Packet;
use crate::packet::headers::{ICMP, ICMPV6, TCP};
use crate::packet::parse::{
    self, SHAPE_FIRST, SHAPE_FRAGMENT, SHAPE_ICMP_ERROR, SHAPE_ICMP_LINK, SHAPE_LATER, SHAPE_ND, SHAPE_OPENS,
};
use crate::policy::{AT_FRONTEND, AT_HOST, AT_PROXY, FRONTEND_HOST, Frontend, alloc_of};
use crate::reason::Reason;
use crate::reassembly::{self, Known, SPOILT};

/// In [`Context::fragment`].
const MORE: u16 = 1 << 15;
const OFFSET: u16 = 0x1fff;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let ended = match ports::<F, P, E>(packet, env, ctx) {
        Ok(()) => go_on::<F, P, E>(packet, env, ctx),
        Err(reason) => refuse::<F, E>(env, ctx, reason),
    };
    end(env, ctx, ended)
}

/// Finds the ports of a fragment: in it, or as the first one said.
#[inline(always)]
fn ports<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Result<(), Reason> {
    let protocol = ctx.key.protocol;
    let (offset, more) = (ctx.fragment & OFFSET, ctx.fragment & MORE != 0);
    let bytes = ctx.fragment_length as u32;
    ctx.recalled.slot = NO_SET;
    // All but the last are cut in units of eight bytes (RFC 791 §2.3), and none reaches beyond the longest datagram.
    if (more && bytes & 7 != 0) || (offset as u32) * 8 + bytes > 0xffff {
        return Err(Reason::Malformed);
    }
    if alloc_of(protocol).is_none() {
        // No ports anywhere: every fragment is judged like a whole packet.
        ctx.shape |= SHAPE_OPENS;
        if offset != 0 {
            ctx.shape |= SHAPE_LATER;
        }
        return Ok(());
    }
    if offset != 0 || more {
        let Some(control) = env.control() else { return Err(Reason::Internal) };
        identify::<F>(ctx);
        // SAFETY: the control element lives as long as the map.
        ctx.datagram_set = reassembly::set(ctx, unsafe { &(*control).seed });
        env.recall(ctx);
    }
    if offset != 0 {
        later::<F, E>(env, ctx)?
    } else {
        first::<F, P, E>(packet, env, ctx)?
    }
    ctx.key6.key = ctx.key;
    Ok(())
}

/// Writes `ctx.datagram`.
#[inline(always)]
fn identify<F: Family>(ctx: &mut Context) {
    ctx.datagram.id = ctx.fragment_id;
    ctx.datagram.network = ctx.key.network;
    ctx.datagram.protocol = ctx.key.protocol;
    ctx.datagram.version = if F::V6 { 6 } else { 4 };
    if F::V6 {
        ctx.datagram.source = ctx.key6.source;
        ctx.datagram.destination = ctx.key6.destination;
    } else {
        ctx.datagram.source = [ctx.key.source, 0, 0, 0];
        ctx.datagram.destination = [ctx.key.destination, 0, 0, 0];
    }
}

/// A fragment without ports: it has to be the next one of a datagram whose first one was sent.
#[inline(always)]
fn later<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Result<(), Reason> {
    let offset = ctx.fragment & OFFSET;
    // RFC 3128 §5: a second fragment that overwrites the flags of a TCP header.
    if ctx.key.protocol == TCP && offset == 1 {
        return Err(Reason::Fragment);
    }
    if ctx.recalled.slot == NO_SET {
        return Err(Reason::FragmentOutOfOrder);
    }
    let next = ctx.recalled.next();
    if next == SPOILT {
        return Err(Reason::FragmentOverlap);
    }
    if offset > next {
        return Err(Reason::FragmentOutOfOrder);
    }
    if offset < next {
        // What has gone already, once more, is a duplicate for all we know; what reaches beyond it is an overlap, and with
        // IPv6 the end of the datagram (RFC 5722 §3).
        let reaches = offset as u32 * 8 + ctx.fragment_length as u32;
        if F::V6 && reaches > next as u32 * 8 && !env.dry_run() {
            reassembly::spoil(env, ctx);
        }
        return Err(Reason::FragmentOverlap);
    }
    let known = ctx.recalled.known;
    ctx.key.source_port = known.source_port;
    ctx.key.destination_port = known.destination_port;
    ctx.key.kind = known.kind;
    ctx.shape |= SHAPE_LATER;
    Ok(())
}

/// The fragment that has the transport's header, whole (RFC 1858 §3).
#[inline(always)]
fn first<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Result<(), Reason> {
    let l4 = parse::l4_offset(ctx);
    let payload = ctx.fragment_length as u32;
    match ctx.key.protocol {
        ICMPV6 => crate::packet::ipv6::icmpv6(packet, ctx, l4, payload)?,
        ICMP => parse::icmp(packet, ctx, l4, payload)?,
        _ => parse::transport(packet, ctx, l4, payload)?,
    }
    if ctx.shape & (SHAPE_ICMP_ERROR | SHAPE_ICMP_LINK | SHAPE_ND) != 0 {
        return Err(Reason::Fragment);
    }
    if ctx.fragment & MORE == 0 {
        // One of IPv6 that is all there is (RFC 6946).
        return Ok(());
    }
    ctx.first_fragment = Known {
        source_port: ctx.key.source_port,
        destination_port: ctx.key.destination_port,
        first: (payload >> 3) as u16,
        kind: ctx.key.kind,
        pad: 0,
    };
    if ctx.recalled.slot != NO_SET {
        // The first one wins; the same once more is a duplicate.
        if ctx.recalled.next() == SPOILT || ctx.recalled.known != ctx.first_fragment {
            if F::V6 && !env.dry_run() {
                reassembly::spoil(env, ctx);
            }
            return Err(Reason::FragmentOverlap);
        }
    }
    ctx.shape |= SHAPE_FIRST;
    Ok(())
}

/// Notes a fragment of a live flow that has been sent on: only now are sender, flow and rule known.
#[inline(always)]
fn sent<E: Env>(env: &E, ctx: &mut Context, verdict: Verdict) {
    let gone = match verdict {
        Verdict::Redirect(_)
        | Verdict::Neighbour(..)
        | Verdict::Neighbour6(_)
        | Verdict::Next(Stage::Loop) => true,
        // TC decides again, and notes it.
        Verdict::Pass => !ctx.xdp(),
        _ => false,
    };
    if !gone || env.dry_run() {
        return;
    }
    if ctx.shape & SHAPE_FIRST != 0 {
        env.remember(ctx);
    } else {
        let end = (ctx.fragment & OFFSET) as u32 + (ctx.fragment_length as u32 >> 3);
        let more = ctx.fragment & MORE != 0;
        reassembly::advance(env, ctx, if more { Some(end as u16) } else { None });
    }
}

/// Notes the first fragment of a datagram whose flow has just been made, or allowed again. What is left to TC under XDP comes by
/// once more, and is the same.
#[inline(always)]
pub(super) fn opened<E: Env>(env: &E, ctx: &mut Context) {
    if ctx.shape & SHAPE_FIRST != 0 && !env.dry_run() {
        env.remember(ctx);
    }
}

/// With its ports known a fragment is a packet like others, but that only the first may open a flow.
#[inline(always)]
fn go_on<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Ended {
    let Some(control) = env.control() else { return Reason::Internal.into() };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    ctx.shape &= !SHAPE_FRAGMENT;
    let key = *F::key(ctx);
    if let Some((index, record)) = flow::find::<F, E>(env, control, &key, ctx.now)
        && let Some(verdict) = forward::established::<F, P, E>(packet, env, ctx, control, index, record)
    {
        sent(env, ctx, verdict);
        return Ended::Verdict(verdict);
    }
    if ctx.shape & SHAPE_LATER != 0 && alloc_of(ctx.key.protocol).is_some() {
        return refuse::<F, E>(env, ctx, Reason::NoFlow);
    }
    if ctx.side == Side::Uplink as u8 {
        let at = F::endpoint(env, ctx.generation, WORLD, F::destination(ctx));
        let kind = at >> 24 & !AT_PROXY;
        if kind == 0 || kind == AT_HOST {
            return Ended::Pass(Reason::NotOurs);
        }
    }
    Ended::Verdict(Verdict::Next(F::CLASSIFY))
}

/// Drops it, unless it comes from outside and may be for the host.
#[inline(always)]
pub fn refuse<F: Family, E: Env>(env: &E, ctx: &mut Context, reason: Reason) -> Ended {
    if ctx.side() != Side::Uplink {
        return reason.into();
    }
    let at = F::endpoint(env, ctx.generation, WORLD, F::destination(ctx));
    match at >> 24 & !AT_PROXY {
        0 | AT_HOST => Ended::Pass(Reason::NotOurs),
        AT_FRONTEND => {
            let Some(head) = header(env, ctx.generation) else { return Reason::Internal.into() };
            // SAFETY: page 0 is the header.
            let page = unsafe { (*head).frontends };
            let shared = match entry::<E, Frontend>(env, ctx.generation, page, at & 0xff_ffff) {
                // SAFETY: `entry` points into a page.
                Some(frontend) => unsafe { (*frontend).flags & FRONTEND_HOST != 0 },
                None => false,
            };
            if shared { Ended::Pass(Reason::NotOurs) } else { reason.into() }
        }
        _ => reason.into(),
    }
}
