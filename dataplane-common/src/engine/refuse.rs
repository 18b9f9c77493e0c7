//! A flow refused for want of a port: counted, told, and answered as the policy wants it (`snat.onExhaustion`). And a packet that
//! cannot go on: it is fragmented if it may be, else its sender is told (RFC 1812 §5.3.1, RFC 1191, RFC 4443 §3.2 and §3.3).

use super::{Context, Side, Verdict, forward};
use crate::classify::{entry, header};
use crate::env::{Budget, Env};
use crate::family::Family;
use crate::layout::{REFUSAL_RESET, REFUSAL_SILENT};
use crate::packet::cut::Cut;
use crate::packet::headers::{Ethernet, TCP};
use crate::packet::parse::SHAPE_LATER;
use crate::packet::{Packet, answer, at};
use crate::policy::{AT_GUEST, Endpoint};
use crate::reason::Reason;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    if !F::V6 && ctx.refused == Reason::Fragmented as u8 {
        // On its way back in it is translated half, and would not be believed where it came from.
        if ctx.looped == 0
            && let Some(cut) = Cut::plan(packet, ctx, ctx.mtu, env.identification())
            && (env.dry_run() || packet.cut(&cut))
        {
            env.count(Reason::Fragmented, ctx.length);
            return Verdict::Drop;
        }
        // Nobody asked for it, but that is how its sender learns what to fragment itself.
        ctx.refused = Reason::TooBig as u8;
    }
    let reason = match ctx.refused {
        r if r == Reason::SnatRefused as u8 => Reason::SnatRefused,
        r if r == Reason::TtlExpired as u8 => Reason::TtlExpired,
        r if r == Reason::TooBig as u8 => Reason::TooBig,
        _ => Reason::SnatExhausted,
    };
    env.count(reason, ctx.length);
    // Told once per look through the ports: who retries would use up what the others may tell.
    if reason != Reason::SnatRefused {
        env.event(ctx, reason);
    }
    let Some(control) = env.control() else { return Verdict::Drop };
    // SAFETY: the control element lives as long as the map.
    let settings = forward::settings(unsafe { &*control }, ctx.generation);
    let unsent = reason == Reason::TtlExpired || reason == Reason::TooBig;
    if (settings.refusal == REFUSAL_SILENT && !unsent)
        || ctx.side == Side::Host as u8
        || ctx.looped != 0
        || ctx.shape & SHAPE_LATER != 0
        || to_group(packet)
        || env.dry_run()
        || !env.spend(Budget::Answer, ctx.now, settings.answers)
    {
        return Verdict::Drop;
    }
    let answered = if !unsent && settings.refusal == REFUSAL_RESET && ctx.key.protocol == TCP {
        answer::reset::<F>(packet, ctx)
    } else {
        // Who sent it knows us by the address it was sent to, a guest by its gateway's.
        let own =
            if ctx.side == Side::Guest as u8 { gateway::<F, E>(env, ctx) } else { Some(F::destination(ctx)) };
        match own {
            Some(own) if unsent => answer::unsent::<F>(packet, ctx, own, reason == Reason::TooBig),
            Some(own) => answer::prohibited::<F>(packet, ctx, own),
            None => false,
        }
    };
    if answered { Verdict::Redirect(ctx.ifindex) } else { Verdict::Drop }
}

/// Was the frame sent to several stations? Of such a one nobody is told (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)).
#[inline(always)]
fn to_group<P: Packet>(packet: &P) -> bool {
    match at::<Ethernet>(packet, 0) {
        // SAFETY: `at` checked the bounds.
        Some(ethernet) => unsafe { (*ethernet).destination[0] & 1 != 0 },
        None => true,
    }
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
