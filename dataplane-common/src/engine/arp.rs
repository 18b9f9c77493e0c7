//! ARP: answered for the virtual network towards guests and for proxied addresses towards the world; learned from
//! guests, and only what belongs to them.

use super::{Context, Verdict, drop, owner, pass};
use crate::env::Env;
use crate::family::V4;
use crate::layout::WORLD;
use crate::packet::arp::{self, REPLY, REQUEST};
use crate::packet::{Packet, parse};
use crate::policy::{AT_PROXY, IN_NETWORK, IN_PLATFORM};
use crate::reason::Reason;

#[inline(always)]
pub fn from_guest<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let network = ctx.key.network;
    if !packet.pull(14 + 28) {
        return drop(env, ctx, Reason::Malformed);
    }
    let Some(message) = arp::read(packet, ctx) else { return drop(env, ctx, Reason::Malformed) };
    ctx.key.source = message.sender;
    ctx.key.destination = message.target;
    // A probe (RFC 5227) has no sender address; it asks whether an address is free. Silence says yes, and nobody else
    // can have a guest's address here.
    if message.sender == 0 {
        return if message.sender_mac == ctx.source_mac {
            drop_quietly(env, ctx)
        } else {
            drop(env, ctx, Reason::SpoofedArp)
        };
    }
    if message.sender_mac != ctx.source_mac
        || owner::find::<V4, E>(env, ctx, message.sender, &message.sender_mac, true).is_none()
    {
        return drop(env, ctx, Reason::SpoofedArp);
    }
    match message.operation {
        REQUEST
            if message.target != message.sender
                && matches!(
                    env.space(ctx.generation, network, message.target) >> 24,
                    IN_NETWORK | IN_PLATFORM
                ) =>
        {
            let mac = ctx.device_mac;
            if !arp::answer(packet, ctx, &mac) {
                return drop(env, ctx, Reason::Malformed);
            }
            env.count(Reason::ArpAnswered, ctx.length);
            Verdict::Redirect(ctx.ifindex)
        }
        // The kernel may be waiting for it (it resolves guests when the host talks to them).
        REPLY => pass(env, ctx, Reason::ArpLearned),
        // An announcement, or a question for an address outside: learned, and nobody's business.
        _ => drop_quietly(env, ctx),
    }
}

/// ARP on an uplink is the kernel's, but for addresses that the policy says we answer for.
#[inline(always)]
pub fn from_uplink<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    if !packet.pull(14 + 28) || parse::l3_offset(ctx) != 14 {
        return pass(env, ctx, Reason::NotOurs);
    }
    let Some(message) = arp::read(packet, ctx) else { return pass(env, ctx, Reason::NotOurs) };
    if message.operation == REQUEST
        && message.target != message.sender
        && env.endpoint(ctx.generation, WORLD, message.target) >> 24 & AT_PROXY != 0
    {
        let mac = ctx.device_mac;
        if arp::answer(packet, ctx, &mac) {
            env.count(Reason::ArpAnswered, ctx.length);
            return Verdict::Redirect(ctx.ifindex);
        }
    }
    pass(env, ctx, Reason::NotOurs)
}

#[inline(always)]
fn drop_quietly<E: Env>(env: &E, ctx: &Context) -> Verdict {
    env.count(Reason::ArpLearned, ctx.length);
    Verdict::Drop
}
