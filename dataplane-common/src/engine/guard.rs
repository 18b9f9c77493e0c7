//! The last thing on an uplink: nothing leaves with a source inside a virtual network (design §1, promise 1).

use core::mem::offset_of;

use super::{Context, Verdict, drop};
use crate::env::Env;
use crate::layout::WORLD;
use crate::packet::parse::{self, Layer3};
use crate::packet::wire::load32;
use crate::packet::{Packet, arp, at, headers::Ipv4, ipv6::Ipv6};
use crate::reason::Reason;

/// Judges a packet about to leave on an uplink, whoever sends it. It trusts no mark and no earlier program.
#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return Verdict::Pass };
    // SAFETY: the control element lives as long as the map.
    ctx.generation = unsafe { core::ptr::read_volatile(&raw const (*control).generation) };
    ctx.length = packet.length_at_least();
    ctx.v6 = 0;
    let source = match parse::ethernet(packet, ctx).map(|(layer3, _)| layer3) {
        Some(Layer3::Ipv4) => {
            if !packet.pull(ctx.l3 as u32 + 20) {
                return Verdict::Pass;
            }
            let Some(ip) = at::<Ipv4>(packet, parse::l3_offset(ctx)) else { return Verdict::Pass };
            // SAFETY: `at` checked the bounds.
            unsafe { load32::<{ offset_of!(Ipv4, source) }, _>(ip) }
        }
        Some(Layer3::Arp) => {
            if !packet.pull(ctx.l3 as u32 + 28) {
                return Verdict::Pass;
            }
            let Some(message) = arp::read(packet, ctx) else { return Verdict::Pass };
            message.sender
        }
        Some(Layer3::Ipv6) => return ipv6(packet, env, ctx),
        _ => return Verdict::Pass,
    };
    if !env.outside(ctx.generation, source) {
        ctx.now = env.now();
        ctx.key.source = source;
        return drop(env, ctx, Reason::Untranslated);
    }
    Verdict::Pass
}

/// Neighbour discovery has its sender in the IPv6 header, so one look is enough.
#[inline(always)]
fn ipv6<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    if !packet.pull(ctx.l3 as u32 + 40) {
        return Verdict::Pass;
    }
    let Some(ip) = at::<Ipv6>(packet, parse::l3_offset(ctx)) else { return Verdict::Pass };
    // SAFETY: `at` checked the bounds.
    let source = unsafe { (*ip).source };
    if env.space6(ctx.generation, WORLD, &source) != 0 {
        ctx.now = env.now();
        ctx.key6.source = source;
        ctx.v6 = 1;
        return drop(env, ctx, Reason::Untranslated);
    }
    Verdict::Pass
}
