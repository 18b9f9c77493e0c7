//! Connections that are older than the tables (ADR 0011). For a while after the first start a TCP segment from the middle of
//! one that needs no port of its own is judged as if it opened the flow, and makes it: established.
//!
//! Nobody knows any more which side opened it. The sender is asked for first; if policy does not let it, its receiver may have
//! been the one, and the rules are asked the other way round. So nothing is let through that policy would not let be opened by
//! one of the two. A guest whose connection cannot go on is told by a RST instead of silence.

use super::{Context, NO_SLOT, Side, Verdict, WAY_DIRECT, drop, forward, groups, judge};
use crate::classify::header;
use crate::clock::passed;
use crate::env::{Budget, Env};
use crate::family::Family;
use crate::layout::{Control, NEXT_HOP_HOST, START_MIGRATING, Settings};
use crate::packet::headers::{ACK, RST, SYN, TCP};
use crate::packet::parse::SHAPE_FRAGMENT;
use crate::packet::{Packet, answer};
use crate::policy::Header;
use crate::reason::Reason;

/// [`Context::adopt`]: the sender of this packet opened the flow.
pub const SENDER: u8 = 1;
/// Its receiver did.
pub const RECEIVER: u8 = 2;

/// Are flows on their way here from other tables?
#[inline(always)]
pub fn migrating(control: &Control) -> bool {
    // SAFETY: the control element lives as long as the map; the controller writes the word whole.
    unsafe { core::ptr::read_volatile(&raw const control.start) == START_MIGRATING }
}

/// [`SENDER`] for a TCP segment that may belong to a connection older than the tables, else 0.
#[inline(always)]
pub(super) fn candidate(ctx: &Context, control: &Control) -> u8 {
    if ctx.key.protocol != TCP
        || ctx.tcp_flags & (SYN | RST | ACK) != ACK
        || ctx.shape & SHAPE_FRAGMENT != 0
        || ctx.again != NO_SLOT
    {
        return 0;
    }
    // SAFETY: as in `migrating`.
    let until = unsafe { core::ptr::read_volatile(&raw const control.start) };
    if until == 0 || until == START_MIGRATING || passed(until, ctx.now) { 0 } else { SENDER }
}

/// Is it for [`run`] to say what becomes of this refusal?
#[inline(always)]
pub(super) fn another_look(ctx: &Context, reason: Reason) -> bool {
    ctx.adopt != 0
        && matches!(
            reason,
            Reason::NoFlow | Reason::DeniedByRule | Reason::DeniedByPlatform | Reason::HostAccess
        )
}

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let settings = forward::settings(unsafe { &*control }, ctx.generation);
    if ctx.refused == Reason::HostAccess as u8 {
        // Refused before its way was noted.
        ctx.egress = NEXT_HOP_HOST;
        ctx.way = WAY_DIRECT;
    }
    if ctx.refused != Reason::NoFlow as u8 && opened_by_receiver::<F, E>(env, ctx, settings) {
        ctx.adopt = RECEIVER;
        return Verdict::Next(F::CLAIM);
    }
    // Not before: the verifier would walk through the rules once for each.
    let reason = match ctx.refused {
        r if r == Reason::NoFlow as u8 => Reason::NoFlow,
        r if r == Reason::HostAccess as u8 => Reason::HostAccess,
        r if r == Reason::DeniedByPlatform as u8 => Reason::DeniedByPlatform,
        _ => Reason::DeniedByRule,
    };
    env.count(reason, ctx.length);
    env.event(ctx, reason);
    if ctx.side == Side::Guest as u8
        && !env.dry_run()
        && env.spend(Budget::Answer, ctx.now, settings.answers)
        && answer::reset_established::<F>(packet, ctx)
    {
        return Verdict::Redirect(ctx.ifindex);
    }
    Verdict::Drop
}

/// Does policy let the packet's receiver open this flow?
#[inline(always)]
fn opened_by_receiver<F: Family, E: Env>(env: &E, ctx: &mut Context, settings: &Settings) -> bool {
    if ctx.side == Side::Host as u8 {
        return judge::host_access(ctx, settings, ctx.key.source_port);
    }
    let Some(head) = header(env, ctx.generation) else { return false };
    // SAFETY: page 0 is the header.
    let head: &Header = unsafe { &*head };
    groups::run_back::<F, E>(env, ctx, head).is_ok()
}
