//! Mappings: the public port that an inside socket has for itself, towards everybody (RFC 4787 REQ-1, RFC 5382 REQ-1). One pair of
//! records of [`KIND_MAPPING`](crate::layout::KIND_MAPPING): the inside half is found by the socket, the outer half by the public
//! address and port. It is there as long as either half's deadline allows:
//!
//! * UDP and echo: both are moved along with the flows.
//! * TCP: the inside half stands for connections that open or have ended, and lasts as long as such a one at most. The outer half
//!   stands for the established ones, which it counts; with the last of them it gives the port back to the inside half's time.
//!   A connection that idles out is not counted down (nobody is there to do it): its port is then kept for the idle time of the
//!   last packet, which is long, but never too short.

use super::{Context, NO_SLOT, Side, WAY_IN, forward};
use crate::atomic;
use crate::clock::{GRACE, passed};
use crate::env::Env;
use crate::family::Family;
use crate::flow;
use crate::layout::{Control, HalfRecord, Settings};
use crate::packet::headers::{ICMP, ICMPV6, TCP, UDP};
use crate::policy::AT_GUEST;
use crate::reason::Reason;

/// The last tick of a UDP or echo mapping of which a flow has just moved, or of a TCP mapping with an established connection. It
/// outlives its flows by the hold, and is ahead of them by an eighth of the idle time and a little, see `forward::touch`.
#[inline(always)]
pub fn deadline(settings: &Settings, class: u8, protocol: u8, now: u32) -> u32 {
    let span = forward::idle(settings, class);
    let hold = if protocol == UDP { settings.udp_hold } else { 0 };
    now.wrapping_add(span).wrapping_add((span >> 3) | 1).wrapping_add(hold)
}

/// The last tick of a mapping over which a flow has just been opened.
#[inline(always)]
pub fn opened(settings: &Settings, class: u8, protocol: u8, now: u32) -> u32 {
    if protocol == TCP { transitory(settings, now) } else { deadline(settings, class, protocol, now) }
}

/// The last tick of a TCP mapping of which a connection has just opened or ended: as long as any of those is remembered.
#[inline(always)]
fn transitory(settings: &Settings, now: u32) -> u32 {
    let longer = |a: u32, b: u32| if a > b { a } else { b };
    let ended = longer(settings.tcp_transitory, longer(settings.tcp_fin, settings.tcp_reset));
    let span = longer(settings.tcp_half_open, ended);
    now.wrapping_add(span).wrapping_add(2 * GRACE)
}

/// What became of a flow over a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Turn {
    /// It goes on.
    Lives = 0,
    /// A TCP connection is established now, and was not before.
    Established = 1,
    /// A TCP connection is not established any more.
    Ended = 2,
    /// A TCP connection that is not established begins to wait anew: opened once more, or ended for good.
    Waits = 3,
}

/// Moves the deadline of the mapping behind a flow of this idle class. The context has the packet and its translation.
#[inline(always)]
pub fn turned<F: Family, E: Env>(env: &E, ctx: &mut Context, idle_class: u8, turn: Turn) {
    // Either direction knows the public side: a guest's packets get it, those from the world are for it.
    if ctx.side == Side::Guest as u8 {
        F::claim_outside(ctx, F::new_source(ctx), ctx.new.source_port);
    } else {
        F::claim_outside(ctx, F::destination(ctx), ctx.key.destination_port);
    }
    let Some(control) = env.control() else { return };
    // SAFETY: the control element lives as long as the map.
    let control = unsafe { &*control };
    let settings = forward::settings(control, ctx.generation);
    let Some((_, mapping)) = flow::find::<F, E>(env, control, F::claimed(ctx), ctx.now) else { return };
    let until = if turn == Turn::Ended || turn == Turn::Waits {
        transitory(settings, ctx.now)
    } else {
        deadline(settings, idle_class, ctx.key.protocol, ctx.now)
    };
    // SAFETY: `mapping` points into the table; its inside half is nobody else's for the grace after it was found alive.
    unsafe {
        if turn == Turn::Waits {
            prolong::<F, E>(env, (*mapping).peer, until);
        } else if turn == Turn::Lives || count(mapping, turn == Turn::Established) {
            (*mapping).deadline = until;
        }
    }
}

/// Moves the deadline of the inside half in slot `inside`, but not back: others may wait over the same mapping.
///
/// # Safety
/// The slot is the mapping's, and nobody else's meanwhile.
#[inline(always)]
unsafe fn prolong<F: Family, E: Env>(env: &E, inside: u32, until: u32) {
    if let Some(half) = flow::record::<F, E>(env, inside) {
        // SAFETY: `half` points into the table, and the caller vouches for whose it is.
        unsafe {
            if passed((*half).deadline, until) {
                (*half).deadline = until;
            }
        }
    }
}

/// Counts an established connection in or out; is the deadline to be moved? Not by one that ends beside others.
///
/// # Safety
/// `mapping` points to the outer half of a mapping in the flow table, whose packets are not counted: the words are free.
#[inline(always)]
unsafe fn count(mapping: *mut HalfRecord, more: bool) -> bool {
    // SAFETY: `bytes_low` and `ack` are one aligned word; the caller vouches for the rest.
    unsafe {
        let word = (&raw mut (*mapping).bytes_low).cast::<u64>();
        let mut tries = 0;
        while tries < 4 {
            tries += 1;
            let seen = atomic::load(word);
            let next = if more { seen.wrapping_add(1) } else { seen.saturating_sub(1) };
            if atomic::compare_exchange(word, seen, next) == seen {
                return more || next == 0;
            }
        }
    }
    more
}

const _: () = {
    let bytes = core::mem::offset_of!(HalfRecord, bytes_low);
    assert!(bytes.is_multiple_of(8) && core::mem::offset_of!(HalfRecord, ack) == bytes + 4);
};

/// Endpoint-independent filtering: a packet that opens a flow to a mapped port goes to the port's socket, if its guest's groups
/// say so. Nothing is refreshed by what they refuse (RFC 7857 §7). A query is for whom its identifier is mapped to (RFC 7857 §12).
#[inline(always)]
pub fn arrive<F: Family, E: Env>(env: &E, ctx: &mut Context, control: &Control) -> Result<(), Reason> {
    let query = ctx.key.protocol == ICMP || ctx.key.protocol == ICMPV6;
    let port = if query { ctx.key.source_port } else { ctx.key.destination_port };
    F::claim_outside(ctx, F::destination(ctx), port);
    let Some((_, mapping)) = flow::find::<F, E>(env, control, F::claimed(ctx), ctx.now) else {
        return Err(Reason::NoFlow);
    };
    // SAFETY: `mapping` points into the table; it was alive just now, so the slot is nobody else's for the grace.
    let (inside, socket) = unsafe {
        F::load_new(ctx, mapping);
        ((*mapping).peer, (*mapping).new_destination_port)
    };
    let Some(half) = flow::record::<F, E>(env, inside) else { return Err(Reason::Internal) };
    // SAFETY: `half` points into the table.
    let network = unsafe { (*half).key.network };
    let at = F::endpoint(env, ctx.generation, network, F::new_destination(ctx));
    if at >> 24 != AT_GUEST {
        return Err(Reason::NoGuest);
    }
    let source = F::source(ctx);
    F::set_new_source(ctx, source);
    (ctx.new.source_port, ctx.new.destination_port) =
        if query { (socket, ctx.key.destination_port) } else { (ctx.key.source_port, socket) };
    ctx.to = at & 0xff_ffff;
    ctx.way = WAY_IN;
    ctx.mapped = 1;
    ctx.search.slot = inside as u64;
    Ok(())
}

/// The flow that [`arrive`] let in has been made: its mapping lives as long.
#[inline(always)]
pub fn entered<F: Family, E: Env>(env: &E, ctx: &Context, settings: &Settings) {
    if env.dry_run() || ctx.search.slot >= NO_SLOT as u64 {
        return;
    }
    let until = opened(settings, ctx.idle_class, ctx.key.protocol, ctx.now);
    // SAFETY: the slot is the mapping's for the grace after it was found alive.
    unsafe { prolong::<F, E>(env, ctx.search.slot as u32, until) };
}
