//! A flow refused for want of a port: counted, told, and answered as the policy wants it (`snat.onExhaustion`).

use super::{Context, Side, Verdict, forward};
use crate::classify::{entry, header};
use crate::env::{Budget, Env};
use crate::family::Family;
use crate::layout::{REFUSAL_RESET, REFUSAL_SILENT};
use crate::packet::headers::TCP;
use crate::packet::parse::SHAPE_LATER;
use crate::packet::{Packet, answer};
use crate::policy::{AT_GUEST, Endpoint};
use crate::reason::Reason;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let reason =
        if ctx.refused == Reason::SnatRefused as u8 { Reason::SnatRefused } else { Reason::SnatExhausted };
    env.count(reason, ctx.length);
    // Told once per look through the ports: who retries would use up what the others may tell.
    if reason == Reason::SnatExhausted {
        env.event(ctx, reason);
    }
    let Some(control) = env.control() else { return Verdict::Drop };
    // SAFETY: the control element lives as long as the map.
    let settings = forward::settings(unsafe { &*control }, ctx.generation);
    if settings.refusal == REFUSAL_SILENT
        || ctx.side != Side::Guest as u8
        || ctx.shape & SHAPE_LATER != 0
        || env.dry_run()
        || !env.spend(Budget::Answer, ctx.now, settings.answers)
    {
        return Verdict::Drop;
    }
    let answered = if settings.refusal == REFUSAL_RESET && ctx.key.protocol == TCP {
        answer::reset::<F>(packet, ctx)
    } else {
        match gateway::<F, E>(env, ctx) {
            Some(gateway) => answer::prohibited::<F>(packet, ctx, gateway),
            None => false,
        }
    };
    if answered { Verdict::Redirect(ctx.ifindex) } else { Verdict::Drop }
}

/// The address the guest knows its gateway by.
#[inline(always)]
fn gateway<F: Family, E: Env>(env: &E, ctx: &Context) -> Option<F::Address> {
    let at = F::endpoint(env, ctx.generation, ctx.key.network, F::source(ctx));
    if at >> 24 != AT_GUEST {
        return None;
    }
    let head = header(env, ctx.generation)?;
    // SAFETY: page 0 is the header.
    let page = unsafe { (*head).endpoints };
    let endpoint = entry::<E, Endpoint>(env, ctx.generation, page, at & 0xff_ffff)?;
    // SAFETY: `entry` points into a page.
    Some(F::of_gateway(unsafe { &*endpoint }))
}
