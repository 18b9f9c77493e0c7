//! Asking the rules: the platform's own, the sender's groups (NIC, then subnet), the receiver's (subnet, then NIC).
//! The first deny ends it.

use super::{Context, NOBODY, WAY_DIRECT, WAY_IN, WAY_INSTANCE_OUT, WAY_PLATFORM, WAY_SNAT};
use crate::classify::{self, entry};
use crate::env::Env;
use crate::family::Family;
use crate::layout::NEXT_HOP_HOST;
use crate::packet::headers::{ICMP, ICMPV6};
use crate::policy::{
    DESTINATION, DESTINATION_PORT, EXEMPT_OTHER, Endpoint, Header, PROTOCOL, RULE_ALLOW, RULE_ID, RULE_NONE,
    Ruleset, SOURCE, SOURCE_PORT, protocol_class, rule_action,
};
use crate::reason::Reason;

#[inline(always)]
pub fn run<F: Family, E: Env>(env: &E, ctx: &mut Context, head: &Header) -> Result<(), Reason> {
    // The platform's rules first, then in the order of the module's first line.
    let mut asked = [0u32; 5];
    // What the host offers its guests (`hostAccess`) is infrastructure, like Azure's DHCP and DNS: exempt.
    let toward_host = ctx.way == WAY_DIRECT && ctx.egress == NEXT_HOP_HOST && ctx.to == NOBODY;
    if ctx.from != NOBODY {
        let p =
            entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.from).ok_or(Reason::Internal)?;
        // SAFETY: `entry` points into a page.
        let endpoint = unsafe { &*p };
        if !toward_host {
            asked[0] = endpoint.platform_outbound;
            asked[1] = endpoint.nic_outbound;
            asked[2] = endpoint.subnet_outbound;
        }
        if ctx.way == WAY_SNAT && endpoint.instance != 0 {
            ctx.way = WAY_INSTANCE_OUT;
            F::set_new_source(ctx, F::of_instance(endpoint));
        }
    }
    if ctx.to != NOBODY {
        let p = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.to).ok_or(Reason::Internal)?;
        // SAFETY: as above.
        let endpoint = unsafe { &*p };
        asked[3] = endpoint.subnet_inbound;
        asked[4] = endpoint.nic_inbound;
        ctx.egress = endpoint.next_hop;
        ctx.to_network = endpoint.network;
    }
    let (sender, receiver) = ends::<F>(ctx);
    classes::<F, E>(env, ctx, head, sender, receiver).ok_or(Reason::Internal)?;
    ask(env, ctx, head, asked)
}

/// The same of a packet whose *receiver* is taken to have opened the flow: its groups outbound, the sender's inbound, on
/// the tuple turned round.
#[inline(always)]
pub(super) fn run_back<F: Family, E: Env>(env: &E, ctx: &mut Context, head: &Header) -> Result<(), Reason> {
    let mut asked = [0u32; 5];
    if ctx.to != NOBODY {
        let p = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.to).ok_or(Reason::Internal)?;
        // SAFETY: `entry` points into a page.
        let endpoint = unsafe { &*p };
        asked[0] = endpoint.platform_outbound;
        asked[1] = endpoint.nic_outbound;
        asked[2] = endpoint.subnet_outbound;
    }
    if ctx.from != NOBODY {
        let p =
            entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.from).ok_or(Reason::Internal)?;
        // SAFETY: as above.
        let endpoint = unsafe { &*p };
        asked[3] = endpoint.subnet_inbound;
        asked[4] = endpoint.nic_inbound;
    }
    ctx.rule = RULE_NONE;
    // Of TCP only: there are ports.
    let inbound = ctx.way == WAY_IN;
    let destination = if inbound { F::new_destination(ctx) } else { F::destination(ctx) };
    let port = if inbound { ctx.new.destination_port } else { ctx.key.destination_port };
    let sender = (F::source(ctx), u16::from_be(ctx.key.source_port));
    classes::<F, E>(env, ctx, head, (destination, u16::from_be(port)), sender).ok_or(Reason::Internal)?;
    ask(env, ctx, head, asked)
}

#[inline(always)]
fn ask<E: Env>(env: &E, ctx: &mut Context, head: &Header, asked: [u32; 5]) -> Result<(), Reason> {
    let mut exempt = 0;
    for (i, mut ruleset) in asked.into_iter().enumerate() {
        if i == 1 && ctx.way == WAY_PLATFORM {
            // The platform's rules know the services; what they do not know is not there.
            if exempt == 0 {
                return Err(Reason::PlatformAddress);
            }
            ctx.way = WAY_DIRECT;
        }
        if exempt != 0 {
            ruleset = view(env, ctx, head, ruleset, exempt).ok_or(Reason::Internal)?;
        }
        if ruleset == 0 {
            continue;
        }
        let rule = classify::decide(env, ctx, ruleset);
        if rule == 0 {
            // Groups end in DenyAll; the platform's rules and the views on a group need not match.
            if i == 0 || exempt != 0 {
                continue;
            }
            return Err(Reason::Internal);
        }
        ctx.rule = rule & RULE_ID;
        env.count_rule(ctx.rule, ctx.length);
        if rule & RULE_ALLOW == 0 {
            return Err(if i == 0 { Reason::DeniedByPlatform } else { Reason::DeniedByRule });
        }
        if i == 0 {
            exempt = rule_action(rule);
        }
    }
    Ok(())
}

/// What is asked of a group when a platform rule exempts the packet: its rules that name the platform tag, if any.
#[inline(always)]
fn view<E: Env>(env: &E, ctx: &Context, head: &Header, ruleset: u32, exempt: u32) -> Option<u32> {
    if ruleset == 0 || exempt >= EXEMPT_OTHER {
        return Some(0);
    }
    let set = entry::<E, Ruleset>(env, ctx.generation, head.rulesets, ruleset)?;
    // SAFETY: `entry` points into a page; the index is below the three elements.
    Some(unsafe { *(*set).platform.as_ptr().add((exempt - 1) as usize % 3) })
}

/// Both ends of the tuple the rules see: of what comes in the translated destination (design §4). Ports in native order, none
/// of ICMP.
#[inline(always)]
fn ends<F: Family>(ctx: &Context) -> ((F::Address, u16), (F::Address, u16)) {
    let inbound = ctx.way == WAY_IN;
    let destination = if inbound { F::new_destination(ctx) } else { F::destination(ctx) };
    let (sport, dport) = if ctx.key.protocol == ICMP || ctx.key.protocol == ICMPV6 {
        (0, 0)
    } else {
        let port = if inbound { ctx.new.destination_port } else { ctx.key.destination_port };
        (u16::from_be(ctx.key.source_port), u16::from_be(port))
    };
    ((F::source(ctx), sport), (destination, dport))
}

/// The classes of what goes from one end to the other.
#[inline(always)]
fn classes<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    (source, sport): (F::Address, u16),
    (destination, dport): (F::Address, u16),
) -> Option<()> {
    let generation = ctx.generation;
    ctx.classes.of[SOURCE] = F::address_class(env, generation, source);
    ctx.classes.of[DESTINATION] = F::address_class(env, generation, destination);
    ctx.classes.of[SOURCE_PORT] = classify::entry16(env, generation, head.ports, sport as u32)?;
    ctx.classes.of[DESTINATION_PORT] = classify::entry16(env, generation, head.ports, dport as u32)?;
    ctx.classes.of[PROTOCOL] = protocol_class(ctx.key.protocol);
    Some(())
}
