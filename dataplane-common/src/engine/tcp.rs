//! What a TCP segment does to its live flow, if it is more than data or its acknowledgement in an established connection: the
//! only packets that touch the other half.

use super::{Context, Side, forward};
use crate::atomic;
use crate::clock::passed;
use crate::env::Env;
use crate::family::Family;
use crate::flow::{self, Ctl, FLAG_FORWARD, LIVE};
use crate::layout::HalfRecord;
use crate::tcp_state::{self, Segment, State, Timer, Tracked};

/// How often a change of state is tried again that another CPU has come between.
const TRIES: u32 = 3;

/// Moves the flow in slot `index`, whose control word was `before`, to the state after this packet. In the kernel it is behind
/// [`Env::tcp_turn`].
#[inline(always)]
pub fn turn<F: Family, E: Env>(env: &E, ctx: &Context, index: u32, before: Ctl) {
    let Some(control) = env.control() else { return };
    // SAFETY: the control element lives as long as the map.
    let settings = forward::settings(unsafe { &*control }, ctx.generation);
    let Some(record) = flow::record::<F, E>(env, index) else { return };
    let generation = before.generation();
    // SAFETY: `record` points into the table.
    let Some(other) = flow::record::<F, E>(env, unsafe { (*record).peer }) else { return };
    let segment = Segment {
        flags: ctx.tcp_flags,
        forward: before.flags() & FLAG_FORWARD != 0,
        guest: ctx.side == Side::Guest as u8,
        sequence: ctx.tcp_sequence,
        end: ctx.tcp_end,
        acknowledgement: u32::from_be(ctx.tcp_ack),
    };
    // SAFETY: both point into the table; a slot that has become another flow's is left alone, and the grace excludes that
    // it does so meanwhile.
    unsafe {
        let peer = flow::ctl(other);
        if peer.phase() != LIVE || peer.generation() != generation {
            return;
        }
        let known = Tracked {
            bits: before.tcp(),
            own: u32::from_be((*record).ack),
            other: u32::from_be((*other).ack),
        };
        let (after, timer) = tcp_state::after(known, &segment);
        if after.bits != known.bits {
            change(record, generation, known.bits, after.bits);
            change(other, generation, known.bits, after.bits);
        }
        if after.own != known.own {
            (*record).ack = after.own.to_be();
        }
        if after.other != known.other {
            (*other).ack = after.other.to_be();
        }
        if timer == Timer::Keep {
            return;
        }
        let span = match tcp_state::state(after.bits) {
            State::HalfOpen => settings.tcp_half_open,
            State::Established => forward::idle(settings, before.idle()),
            State::Transitory => settings.tcp_transitory,
            State::Closing | State::Closed => settings.tcp_fin,
            State::Reset => settings.tcp_reset,
        };
        let deadline = ctx.now.wrapping_add(span);
        if timer != Timer::Shorten || passed(deadline, (*record).deadline) {
            (*record).deadline = deadline;
        }
        if timer == Timer::Set || (timer == Timer::Shorten && passed(deadline, (*other).deadline)) {
            (*other).deadline = deadline;
        }
    }
}

/// Sets and clears in one half the bits that differ, unless the slot has become another flow's. What another CPU sets
/// meanwhile stays.
///
/// # Safety
/// `record` points into the flow table.
#[inline(always)]
unsafe fn change(record: *mut HalfRecord, generation: u32, from: u8, to: u8) {
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        // SAFETY: the caller vouches for `record`; the exchange fails on a slot that is another flow's.
        unsafe {
            let seen = flow::ctl(record);
            if seen.phase() != LIVE || seen.generation() != generation {
                return;
            }
            let next = seen.with_tcp(seen.tcp() & !(from & !to) | (to & !from));
            if atomic::compare_exchange(&raw mut (*record).ctl, seen.0, next.0) == seen.0 {
                return;
            }
        }
    }
}
