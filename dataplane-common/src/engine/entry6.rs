//! First stage of an IPv6 packet, called by [`super::entry`], which has found the device and set the network.

use super::{Context, Ended, Side, Stage, Verdict, end, entry, forward};
use crate::env::Env;
use crate::family::{Family as _, V6};
use crate::flow;
use crate::layout::{HOST_DHCP, WORLD};
use crate::packet::Packet;
use crate::packet::headers::UDP;
use crate::packet::ipv6;
use crate::packet::parse::{SHAPE_FLAGS, SHAPE_FRAGMENT, SHAPE_ICMP_ERROR, SHAPE_ICMP_LINK, SHAPE_ND};
use crate::policy::{AT_HOST, AT_PROXY};
use crate::reason::Reason;

/// What is pulled in: all of a chain of extension headers that the parser follows.
const HEADERS: u32 = 0xff;

#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let ended = decide(packet, env, ctx);
    end(env, ctx, ended)
}

#[inline(always)]
fn decide<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Ended {
    let Some(control) = env.control() else { return Reason::Internal.into() };
    // SAFETY: the control element lives as long as the map.
    let control = unsafe { &*control };
    let uplink = ctx.side == Side::Uplink as u8;
    let network = ctx.key.network;
    let pulled = packet.pull(if HEADERS < ctx.length { HEADERS } else { ctx.length });
    let parsed = if pulled { ipv6::ipv6(packet, ctx) } else { Err(Reason::Malformed) };
    ctx.set_network(network);
    if let Err(reason) = parsed {
        if reason == Reason::TcpFlags && uplink {
            ctx.shape |= SHAPE_FLAGS;
            return Ended::Verdict(Verdict::Next(Stage::Classify6));
        }
        // On an uplink what we cannot read may be for the host: the kernel is the judge of that.
        return if uplink { Ended::Pass(Reason::NotOurs) } else { reason.into() };
    }
    if ctx.side == Side::Guest as u8 && ctx.key.protocol == UDP {
        // DHCPv6 (RFC 8415 §7.2): servers listen on 547, clients on 546.
        if ctx.key.source_port == u16::to_be(547) {
            return Reason::DhcpServer.into();
        }
        if ctx.key.destination_port == u16::to_be(547) && ctx.key.source_port == u16::to_be(546) {
            let open = forward::settings(control, ctx.generation).host_access & HOST_DHCP;
            return if open != 0 { Ended::Pass(Reason::ToHost) } else { Reason::HostAccess.into() };
        }
    }
    if ctx.shape & SHAPE_ND != 0 {
        return Ended::Verdict(Verdict::Next(Stage::Nd));
    }
    if ctx.shape & SHAPE_FRAGMENT != 0 {
        return Ended::Verdict(Verdict::Next(Stage::Fragment6));
    }
    if ctx.shape & (SHAPE_ICMP_ERROR | SHAPE_ICMP_LINK) != 0 {
        return Ended::Verdict(Verdict::Next(Stage::Icmp6));
    }
    if let Some((index, record)) = flow::find::<V6, E>(env, control, &ctx.key6, ctx.now)
        && let Some(verdict) = forward::established::<V6, P, E>(packet, env, ctx, control, index, record)
    {
        return Ended::Verdict(verdict);
    }
    if ctx.side == Side::Guest as u8 && entry::refused_before::<V6, E>(env, ctx, control) {
        ctx.refused = Reason::SnatRefused as u8;
        return Ended::Verdict(Verdict::Next(Stage::Refuse6));
    }
    if uplink {
        let kind = V6::endpoint(env, ctx.generation, WORLD, ctx.key6.destination) >> 24 & !AT_PROXY;
        if kind == 0 || kind == AT_HOST {
            return Ended::Pass(Reason::NotOurs);
        }
    }
    Ended::Verdict(Verdict::Next(Stage::Classify6))
}
