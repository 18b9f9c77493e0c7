//! The last thing on an uplink: nothing leaves with a source inside a virtual network (design §1, promise 1).

use super::{Context, Verdict, drop};
use crate::env::Env;
use crate::layout::WORLD;
use crate::packet::parse::{self, Layer3};
use crate::packet::{Packet, arp, at, headers::Ipv4};
use crate::reason::Reason;

/// Judges a packet about to leave on an uplink, whoever sends it. It trusts no mark and no earlier program.
#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return Verdict::Pass };
    // SAFETY: the control element lives as long as the map.
    ctx.generation = unsafe { core::ptr::read_volatile(&raw const (*control).generation) };
    ctx.now = env.now();
    ctx.length = packet.length();
    let source = match parse::ethernet(packet, ctx) {
        Some(Layer3::Ipv4) => {
            if !packet.pull(ctx.l3 as u32 + 20) {
                return Verdict::Pass;
            }
            let Some(ip) = at::<Ipv4>(packet, parse::l3_offset(ctx)) else { return Verdict::Pass };
            // SAFETY: `at` checked the bounds.
            unsafe { (*ip).source }
        }
        Some(Layer3::Arp) => {
            if !packet.pull(ctx.l3 as u32 + 28) {
                return Verdict::Pass;
            }
            let Some(message) = arp::read(packet, ctx) else { return Verdict::Pass };
            message.sender
        }
        _ => return Verdict::Pass,
    };
    if env.in_space(ctx.generation, WORLD, source) {
        ctx.key.source = source;
        return drop(env, ctx, Reason::Untranslated);
    }
    Verdict::Pass
}
