//! Fragments: in-order virtual reassembly (RFC 4787 REQ-14 as far as BPF allows, which cannot hold a packet back). The
//! first fragment has the ports and says them of the rest; a fragment that comes before it is dropped. Nothing is ever read
//! as ports that is not a whole header (RFC 1858, RFC 3128).

use super::{Context, Ended, Side, Verdict, end, forward};
use crate::classify::{entry, header};
use crate::env::{Env, FragmentKey, FragmentPorts};
use crate::family::Family;
use crate::flow;
use crate::layout::{Control, KIND_PORTLESS, WORLD};
use crate::packet::Packet;
use crate::packet::headers::{ICMP, ICMPV6, TCP};
use crate::packet::parse::{
    self, SHAPE_FRAGMENT, SHAPE_ICMP_ERROR, SHAPE_ICMP_LINK, SHAPE_LATER, SHAPE_ND, SHAPE_OPENS,
};
use crate::policy::{AT_FRONTEND, AT_HOST, AT_PROXY, FRONTEND_HOST, Frontend, alloc_of};
use crate::reason::Reason;

/// Ticks for which the rest of a datagram is waited for: five seconds. An endpoint waits for 30 to 60, but what is in order
/// comes at once, and identifiers are used again soon.
const PATIENCE: u32 = 75;

/// Both ports of a fragmented ICMP message that has no identifier; one that has leaves one of the two 0.
const PORTLESS: u16 = 0xffff;

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
    let network = ctx.key.network;
    if alloc_of(protocol).is_none() {
        // No ports anywhere: every fragment is judged like a whole packet.
        ctx.shape |= SHAPE_OPENS;
        if ctx.fragment & OFFSET != 0 {
            ctx.shape |= SHAPE_LATER;
        }
        return Ok(());
    }
    let mut key = FragmentKey {
        id: ctx.fragment_id,
        network,
        protocol,
        version: if F::V6 { 6 } else { 4 },
        ..FragmentKey::default()
    };
    if F::V6 {
        key.source = ctx.key6.source;
        key.destination = ctx.key6.destination;
    } else {
        key.source[0] = ctx.key.source;
        key.destination[0] = ctx.key.destination;
    }
    if ctx.fragment & OFFSET != 0 {
        // RFC 3128 §5: a second fragment that overwrites the flags of a TCP header.
        if protocol == TCP && ctx.fragment & OFFSET == 1 {
            return Err(Reason::Fragment);
        }
        let Some(ports) = env.fragment(&key) else { return Err(Reason::Fragment) };
        if crate::clock::passed(ports.until, ctx.now) {
            return Err(Reason::Fragment);
        }
        ctx.key.source_port = ports.source_port;
        ctx.key.destination_port = ports.destination_port;
        if (protocol == ICMP || protocol == ICMPV6) && ports.source_port & ports.destination_port == PORTLESS
        {
            ctx.key.source_port = 0;
            ctx.key.destination_port = 0;
            ctx.key.kind = KIND_PORTLESS;
        }
        ctx.shape |= SHAPE_LATER;
    } else {
        let l4 = parse::l4_offset(ctx);
        // The fragment ends where the frame does, or before padding; a whole header has to be in it.
        let payload = (ctx.length).saturating_sub(l4 as u32);
        if protocol == ICMPV6 {
            crate::packet::ipv6::icmpv6(packet, ctx, l4, payload)?;
        } else if protocol == ICMP {
            parse::icmp(packet, ctx, l4, payload)?;
        } else {
            parse::transport(packet, ctx, l4, payload)?;
        }
        if ctx.shape & (SHAPE_ICMP_ERROR | SHAPE_ICMP_LINK | SHAPE_ND) != 0 {
            return Err(Reason::Fragment);
        }
        if ctx.fragment & MORE != 0 && !env.dry_run() {
            let portless = if ctx.key.kind == KIND_PORTLESS { PORTLESS } else { 0 };
            let ports = FragmentPorts {
                source_port: ctx.key.source_port | portless,
                destination_port: ctx.key.destination_port | portless,
                until: ctx.now.wrapping_add(PATIENCE),
            };
            env.set_fragment(&key, ports);
        }
    }
    ctx.key6.key = ctx.key;
    Ok(())
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
        return Ended::Verdict(verdict);
    }
    if ctx.shape & SHAPE_LATER != 0 && alloc_of(ctx.key.protocol).is_some() {
        return refuse::<F, E>(env, ctx, Reason::Fragment);
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
