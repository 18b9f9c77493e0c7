//! ICMP errors (RFC 5508 §4): related to a live flow by the packet they quote, and translated with it. No group is asked, and
//! the flow stays as it is: an error neither refreshes nor ends one, whoever sent it (RFC 5508 REQ-6).
//!
//! What is quoted left here, so the record to find is that of its answers as they arrive where the error did. What that
//! record does to an answer it does to the error; to the quote it does the reverse.

use super::forward::Translation;
use super::{Context, Ended, Side, Verdict, end, forward, fragments, judge};
use crate::env::Env;
use crate::family::Family;
use crate::flow::{self, LIVE};
use crate::layout::{Control, NextHop};
use crate::packet::Packet;
use crate::packet::icmp::{self, Quote};
use crate::packet::parse::SHAPE_ICMP_ERROR;
use crate::reason::Reason;

/// What of the frame is pulled in: enough for both headers with all their options.
const REACH: u32 = 0xff;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let related = if ctx.shape & SHAPE_ICMP_ERROR != 0 {
        related::<F, P, E>(packet, env, ctx)
    } else {
        Err(Reason::IcmpType)
    };
    let ended = match related {
        Ok(ended) => ended,
        // On its way back in it is a guest's, not the host's.
        Err(reason) if ctx.looped != 0 => reason.into(),
        Err(reason) => fragments::refuse::<F, E>(env, ctx, reason),
    };
    end(env, ctx, ended)
}

/// Sends the error on, or drops it; an error in the result is one about no flow of ours.
#[inline(always)]
fn related<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Result<Ended, Reason> {
    let Some(control) = env.control() else { return Err(Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    if !packet.pull(if REACH < ctx.length { REACH } else { ctx.length }) {
        return Err(Reason::Malformed);
    }
    let quote = F::quote(packet, ctx)?;
    let (peer, sender) = F::claimed_ends(ctx);
    // An error goes to whom it quotes.
    if sender != F::destination(ctx) {
        return Err(Reason::IcmpError);
    }
    let Some((_, record)) = flow::find::<F, E>(env, control, F::claimed(ctx), ctx.now) else {
        return Err(Reason::IcmpError);
    };
    // SAFETY: `record` points into the table; the copy is checked against the generation below.
    let (before, ingress) = unsafe {
        let before = flow::ctl(record);
        F::load_new(ctx, record);
        ctx.egress = (*record).next_hop();
        (before, (*record).ingress())
    };
    // SAFETY: as above.
    let again = unsafe { flow::ctl(record) };
    if before.phase() != LIVE || again.generation() != before.generation() {
        return Err(Reason::IcmpError);
    }
    if !forward::speaks(env, ctx, ingress).ok_or(Reason::IcmpError)? {
        return Ok(Reason::Spoofed.into());
    }
    let mut source = F::new_source(ctx);
    if F::source(ctx) != peer {
        // A router on the way. Behind a guest's device there is none, nor on the way out and in again.
        if ctx.side != Side::Uplink as u8 || ctx.looped != 0 {
            return Ok(Reason::Spoofed.into());
        }
        if judge::stranger::<F, E>(env, ctx) {
            return Ok(Reason::Martian.into());
        }
        source = F::source(ctx);
    }
    let translation = Related::<F, P> { packet, quote, source };
    let verdict = forward::send_as::<F, E>(env, ctx, Reason::Forwarded, &translation);
    Ok(Ended::Verdict(verdict))
}

/// An error's translation: with its quote, under a new source.
struct Related<'a, F: Family, P> {
    packet: &'a P,
    quote: Quote,
    source: F::Address,
}

impl<F: Family, P: Packet> Translation for Related<'_, F, P> {
    #[inline(always)]
    fn write(&self, ctx: &Context, hop: Option<&NextHop>) -> bool {
        icmp::translate::<F>(self.packet, ctx, &self.quote, self.source, hop)
    }

    /// No error is sent about an error.
    #[inline(always)]
    fn too_big(&self, _: &Context, _: u32) -> Option<Reason> {
        None
    }
}
