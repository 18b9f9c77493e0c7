//! Stages whose real content is still to come: ICMP errors and fragments of IPv4 are refused under their own names,
//! never leaked, and left to the kernel where they are the host's. IPv6 refuses them in [`super::entry6`].

use super::{Context, Side, Verdict, drop, pass};
use crate::classify::{entry, header};
use crate::env::Env;
use crate::layout::WORLD;
use crate::packet::Packet;
use crate::packet::parse::SHAPE_ICMP_ERROR;
use crate::policy::{AT_FRONTEND, AT_HOST, AT_PROXY, FRONTEND_HOST, Frontend};
use crate::reason::Reason;

/// ICMP that is not echo.
#[inline(always)]
pub fn icmp<P: Packet, E: Env>(_packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let reason = if ctx.shape & SHAPE_ICMP_ERROR != 0 { Reason::IcmpError } else { Reason::IcmpType };
    refuse(env, ctx, reason)
}

/// Any fragment.
#[inline(always)]
pub fn fragment<P: Packet, E: Env>(_packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    refuse(env, ctx, Reason::Fragment)
}

/// Drops it, unless it comes from outside for the host.
#[inline(always)]
fn refuse<E: Env>(env: &E, ctx: &mut Context, reason: Reason) -> Verdict {
    if ctx.side() != Side::Uplink {
        return drop(env, ctx, reason);
    }
    let at = env.endpoint(ctx.generation, WORLD, ctx.key.destination);
    match at >> 24 & !AT_PROXY {
        0 | AT_HOST => pass(env, ctx, Reason::NotOurs),
        AT_FRONTEND => {
            let Some(head) = header(env, ctx.generation) else { return drop(env, ctx, Reason::Internal) };
            // SAFETY: page 0 is the header.
            let page = unsafe { (*head).frontends };
            let shared = match entry::<E, Frontend>(env, ctx.generation, page, at & 0xff_ffff) {
                // SAFETY: `entry` points into a page.
                Some(frontend) => unsafe { (*frontend).flags & FRONTEND_HOST != 0 },
                None => false,
            };
            if shared { pass(env, ctx, Reason::NotOurs) } else { drop(env, ctx, reason) }
        }
        _ => drop(env, ctx, reason),
    }
}
