//! Neighbour discovery: answered for the virtual network, learned from guests, and only what belongs to them; never
//! asked of a security group. What ARP is to IPv4 ([`super::arp`]), with routers that announce themselves on top.

use super::{Context, Ended, Side, Verdict, end, owner};
use crate::env::Env;
use crate::family::{Family as _, V6};
use crate::layout::WORLD;
use crate::packet::headers::{Icmp, same_mac};
use crate::packet::nd::{
    self, NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, REDIRECT, ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION,
};
use crate::packet::{Packet, at, parse};
use crate::policy::{AT_PROXY, IN_NETWORK};
use crate::reason::Reason;

/// ICMPv6 that stays on the link.
#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let ended = match ctx.side() {
        Side::Guest => from_guest(packet, env, ctx),
        Side::Uplink => from_uplink(packet, env, ctx),
        Side::Host => Ended::Pass(Reason::FromHost),
    };
    end(env, ctx, ended)
}

/// Neighbour discovery on an uplink is the kernel's, but for addresses that the policy says we answer for.
#[inline(always)]
fn from_uplink<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Ended {
    if let Some(icmp) = at::<Icmp>(packet, parse::l4_offset(ctx))
        // SAFETY: `at` checked the bounds.
        && unsafe { (*icmp).kind } == NEIGHBOUR_SOLICITATION
        && let Some(message) = nd::read(packet, ctx)
        && !unspecified(&ctx.key6.source)
        && env.endpoint6(ctx.generation, WORLD, &message.target) >> 24 & AT_PROXY != 0
    {
        let mac = ctx.device_mac;
        if nd::answer(packet, ctx, &mac) {
            env.count(Reason::NdAnswered, ctx.length);
            return Ended::Verdict(Verdict::Redirect(ctx.ifindex));
        }
    }
    Ended::Pass(Reason::NotOurs)
}

/// fe80::/10
#[inline(always)]
fn link_local(address: &[u32; 4]) -> bool {
    u32::from_be(address[0]) >> 22 == 0xfe80 >> 6
}

#[inline(always)]
fn unspecified(address: &[u32; 4]) -> bool {
    address[0] | address[1] | address[2] | address[3] == 0
}

#[inline(always)]
fn from_guest<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Ended {
    let Some(icmp) = at::<Icmp>(packet, parse::l4_offset(ctx)) else { return Reason::Malformed.into() };
    // SAFETY: `at` checked the bounds.
    let kind = unsafe { (*icmp).kind };
    if kind == ROUTER_ADVERTISEMENT || kind == REDIRECT {
        return Reason::RouterAdvertisement.into();
    }
    let solicits = kind == NEIGHBOUR_SOLICITATION;
    if !solicits && kind != NEIGHBOUR_ADVERTISEMENT && kind != ROUTER_SOLICITATION {
        // Multicast listener reports: the datapath forwards no multicast.
        return Reason::Broadcast.into();
    }
    let message = nd::read(packet, ctx);
    if kind != ROUTER_SOLICITATION && message.is_none() {
        return Reason::Malformed.into();
    }
    let nobody = unspecified(&ctx.key6.source);
    if nobody && solicits {
        // Duplicate address detection (RFC 4862 §5.4): silence says that the address is free, and nobody else can have
        // a guest's address here.
        env.count(Reason::NdLearned, ctx.length);
        return Ended::Verdict(Verdict::Drop);
    }
    // Link-local addresses are not in the policy: they prove nothing, and nothing is learned from them.
    let honest = link_local(&ctx.key6.source) || owns(env, ctx, ctx.key6.source, solicits);
    let Some(message) = message else {
        // A router on this host, if there is one, answers; it must not learn another guest's address from the question.
        return if nobody || honest { Ended::Pass(Reason::ToHost) } else { Reason::SpoofedNd.into() };
    };
    if !honest || !says_own_mac(ctx, message.mac) {
        return Reason::SpoofedNd.into();
    }
    if !solicits {
        if !link_local(&message.target) && !owns(env, ctx, message.target, true) {
            return Reason::SpoofedNd.into();
        }
        // The kernel may be waiting for it (it resolves guests when the host talks to them).
        return Ended::Pass(Reason::NdLearned);
    }
    if env.space6(ctx.generation, ctx.key.network, &message.target) >> 24 != IN_NETWORK
        || message.target == ctx.key6.source
    {
        // For the host's own link-local address, or nobody's business.
        return Ended::Pass(Reason::ToHost);
    }
    let mac = ctx.device_mac;
    if !nd::answer(packet, ctx, &mac) {
        return Reason::Malformed.into();
    }
    env.count(Reason::NdAnswered, ctx.length);
    Ended::Verdict(Verdict::Redirect(ctx.ifindex))
}

/// Does the option, if there is one, say the address the frame came from?
#[inline(always)]
fn says_own_mac(ctx: &Context, mac: Option<[u8; 6]>) -> bool {
    match mac {
        // SAFETY: both are aligned to two bytes on the stack and in the context.
        Some(mac) => mac[0] & 1 == 0 && unsafe { same_mac(&raw const mac, &raw const ctx.source_mac) },
        None => true,
    }
}

/// Does `address` belong to a guest of this device with the frame's hardware address?
#[inline(always)]
fn owns<E: Env>(env: &E, ctx: &Context, address: [u32; 4], relearn: bool) -> bool {
    !V6::to_many(address) && owner::find::<V6, E>(env, ctx, address, &ctx.source_mac, relearn).is_some()
}
