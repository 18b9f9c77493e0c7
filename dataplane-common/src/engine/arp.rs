//! ARP: answered for the virtual network towards guests and for proxied addresses towards the world; learned from
//! guests, and only what belongs to them.

use super::{Context, Verdict, drop, pass};
use crate::classify::{entry, header};
use crate::env::Env;
use crate::layout::{HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, NextHop, WORLD};
use crate::packet::arp::{self, REPLY, REQUEST};
use crate::packet::{Packet, parse};
use crate::policy::{AT_GUEST, AT_PROXY, Endpoint};
use crate::reason::Reason;

/// The endpoint that has `address` in this network, and its next hop, if it is on this device with this MAC.
///
/// A MAC that is neither in the policy nor known yet is learned: from the first packet whose source address belongs
/// to an interface of this device, and anew whenever its ARP says so.
#[inline(always)]
pub fn owner<E: Env>(
    env: &E,
    ctx: &Context,
    network: u16,
    address: u32,
    mac: &[u8; 6],
    relearn: bool,
) -> Option<(u32, u16)> {
    let value = env.endpoint(ctx.generation, network, address);
    if value >> 24 != AT_GUEST {
        return None;
    }
    let index = value & 0xff_ffff;
    let head = header(env, ctx.generation)?;
    // SAFETY: page 0 is the header.
    let endpoint = entry::<E, Endpoint>(env, ctx.generation, unsafe { (*head).endpoints }, index)?;
    // SAFETY: `entry` points into a page.
    let next_hop = unsafe { (*endpoint).next_hop };
    let hop = env.next_hop(next_hop as u32)?;
    // SAFETY: the element lives as long as the map; other CPUs may write `mac` at the same time with what they
    // learned from the same guest, and a torn read is corrected by the next packet.
    let hop: &mut NextHop = unsafe { &mut *hop };
    if hop.ifindex != ctx.ifindex {
        return None;
    }
    if hop.mac != *mac {
        if hop.flags & HOP_FLAG_PINNED != 0
            || (hop.flags & HOP_FLAG_RESOLVED != 0 && !relearn)
            || mac[0] & 1 != 0
        {
            return None;
        }
        hop.mac = *mac;
        hop.flags |= HOP_FLAG_RESOLVED;
    }
    Some((index, next_hop))
}

#[inline(always)]
pub fn from_guest<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context, network: u16) -> Verdict {
    if !packet.pull(14 + 28) {
        return drop(env, ctx, Reason::Malformed);
    }
    let Some(message) = arp::read(packet, ctx) else { return drop(env, ctx, Reason::Malformed) };
    ctx.key.source = message.sender;
    ctx.key.destination = message.target;
    ctx.key.network = network;
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
        || owner(env, ctx, network, message.sender, &message.sender_mac, true).is_none()
    {
        return drop(env, ctx, Reason::SpoofedArp);
    }
    match message.operation {
        REQUEST
            if message.target != message.sender && env.in_space(ctx.generation, network, message.target) =>
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
