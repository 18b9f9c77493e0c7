//! Second stage: who sends, who receives, and do the groups let it pass? Always on the private addresses.

use super::{
    Context, NOBODY, Side, Stage, Verdict, WAY_DIRECT, WAY_INSTANCE_IN, WAY_INSTANCE_OUT, WAY_SNAT, arp,
    drop, forward, pass,
};
use crate::classify::{self, entry, header};
use crate::env::Env;
use crate::layout::{Control, HOST_DNS, HOST_ECHO, NEXT_HOP_HOST, Settings, WORLD};
use crate::packet::Packet;
use crate::packet::headers::{ICMP, TCP, UDP};
use crate::packet::parse::SHAPE_OPENS;
use crate::policy::{
    AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_PROXY, Endpoint, FRONTEND_HOST, Frontend, Header,
    RULE_ALLOW, RULE_NONE,
};
use crate::reason::Reason;

const fn ip(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}

/// Instance metadata and the platform's own services: on a cloud machine a packet let out there would be answered
/// with the *host's* credentials (design §4).
const METADATA: u32 = ip(169, 254, 169, 254);
const PLATFORM: u32 = ip(168, 63, 129, 16);

/// Sources and destinations that never cross a gateway: 0/8, 127/8, 169.254/16.
#[inline(always)]
fn never_forwarded(address: u32) -> bool {
    let [a, b, _, _] = address.to_ne_bytes();
    a == 0 || a == 127 || (a == 169 && b == 254)
}

/// 224/4 and 240/4 (the limited broadcast among them).
#[inline(always)]
fn to_many(address: u32) -> bool {
    address.to_ne_bytes()[0] >= 224
}

#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    let settings = forward::settings(control, ctx.generation);
    let Some(head) = header(env, ctx.generation) else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: page 0 is the header.
    let head: &Header = unsafe { &*head };
    ctx.from = NOBODY;
    ctx.to = NOBODY;
    ctx.rule = RULE_NONE;
    ctx.ingress = 0;
    ctx.egress = 0;
    ctx.way = 0;
    ctx.idle_class = 0;
    ctx.new = crate::packet::rewrite::Tuple {
        source: ctx.key.source,
        destination: ctx.key.destination,
        source_port: ctx.key.source_port,
        destination_port: ctx.key.destination_port,
    };
    let verdict = match ctx.side() {
        Side::Guest => from_guest(env, ctx, settings),
        Side::Uplink => from_uplink(env, ctx, head),
        Side::Host => from_host(env, ctx),
    };
    let _ = packet;
    match verdict {
        Ok(()) => {}
        Err(Ended::Drop(reason)) => return drop(env, ctx, reason),
        Err(Ended::Pass(reason)) => return pass(env, ctx, reason),
    }
    match groups(env, ctx, head) {
        Ok(()) => Verdict::Next(Stage::Claim),
        Err(reason) => drop(env, ctx, reason),
    }
}

enum Ended {
    Drop(Reason),
    Pass(Reason),
}

impl From<Reason> for Ended {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Ended::Drop(reason)
    }
}

#[inline(always)]
fn from_guest<E: Env>(env: &E, ctx: &mut Context, settings: &Settings) -> Result<(), Ended> {
    let network = ctx.key.network;
    let mac = ctx.source_mac;
    let Some((from, hop)) = arp::owner(env, ctx, network, ctx.key.source, &mac, false) else {
        return Err(Reason::Spoofed.into());
    };
    ctx.from = from;
    ctx.ingress = hop;
    let destination = ctx.key.destination;
    if to_many(destination) {
        return Err(Reason::Broadcast.into());
    }
    if destination == METADATA || destination == PLATFORM {
        return Err(Reason::PlatformAddress.into());
    }
    if never_forwarded(destination) || destination == ctx.key.source {
        return Err(Reason::Martian.into());
    }
    let inside = env.in_space(ctx.generation, network, destination);
    let at = env.endpoint(ctx.generation, if inside { network } else { WORLD }, destination);
    let kind = at >> 24 & !AT_PROXY;
    if kind == AT_HOST {
        if !host_access(ctx, settings) {
            return Err(Reason::HostAccess.into());
        }
        if ctx.shape & SHAPE_OPENS == 0 {
            return Err(Reason::NoFlow.into());
        }
        ctx.egress = NEXT_HOP_HOST;
        ctx.way = WAY_DIRECT;
        return Ok(());
    }
    if ctx.shape & SHAPE_OPENS == 0 {
        return Err(Reason::NoFlow.into());
    }
    if inside {
        if kind != AT_GUEST {
            return Err(Reason::NoGuest.into());
        }
        ctx.to = at & 0xff_ffff;
        ctx.way = WAY_DIRECT;
        return Ok(());
    }
    if kind != 0 {
        return Err(Reason::Hairpin.into());
    }
    // Decided in the claim stage, after the groups: what is denied is not asked for a way out.
    ctx.way = WAY_SNAT;
    Ok(())
}

/// Does `hostAccess` open this? DNS and echo by their own switches, the rest by the list.
#[inline(always)]
fn host_access(ctx: &Context, settings: &Settings) -> bool {
    let protocol = ctx.key.protocol;
    let port = u16::from_be(ctx.key.destination_port);
    if protocol == ICMP {
        return settings.host_access & HOST_ECHO != 0;
    }
    if protocol != TCP && protocol != UDP {
        return false;
    }
    if port == 53 && settings.host_access & HOST_DNS != 0 {
        return true;
    }
    for service in &settings.services {
        if service.protocol == protocol as u16 && service.first <= port && port <= service.last {
            return true;
        }
    }
    false
}

#[inline(always)]
fn from_uplink<E: Env>(env: &E, ctx: &mut Context, head: &Header) -> Result<(), Ended> {
    let destination = ctx.key.destination;
    let at = env.endpoint(ctx.generation, WORLD, destination);
    let index = at & 0xff_ffff;
    // Nobody outside has one of our private addresses; believing it would let it in by AllowVnetInBound.
    if env.in_space(ctx.generation, WORLD, ctx.key.source)
        || never_forwarded(ctx.key.source)
        || to_many(ctx.key.source)
    {
        return Err(Reason::Martian.into());
    }
    match at >> 24 & !AT_PROXY {
        AT_INSTANCE => {
            if ctx.shape & SHAPE_OPENS == 0 {
                return Err(Reason::NoFlow.into());
            }
            let Some(endpoint) = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, index) else {
                return Err(Reason::Internal.into());
            };
            // SAFETY: `entry` points into a page.
            let endpoint = unsafe { &*endpoint };
            ctx.to = index;
            ctx.new.destination = endpoint.address;
            ctx.way = WAY_INSTANCE_IN;
            // Where the reply goes: the route back, found now so that the flow is written whole.
            ctx.ingress = env.route(ctx.key.source) as u16;
            Ok(())
        }
        AT_FRONTEND => {
            let port = u16::from_be(ctx.key.destination_port) as u32;
            let owner = classify::entry16(
                env,
                ctx.generation,
                head.owners,
                index * crate::policy::ADDRESS_UNITS + port / 8,
            );
            // Handed to the kernel, its RST would kill a live flow that this packet only seems to miss (design §4).
            // An echo reply provokes nothing, and the host's own pings take identifiers anywhere: those go up below.
            if port != 0 && owner != Some(0) && ctx.key.protocol != ICMP {
                return Err(Reason::NoFlow.into());
            }
            let Some(frontend) = entry::<E, Frontend>(env, ctx.generation, head.frontends, index) else {
                return Err(Reason::Internal.into());
            };
            // SAFETY: `entry` points into a page.
            if unsafe { (*frontend).flags } & FRONTEND_HOST != 0 {
                return Err(Ended::Pass(Reason::NotOurs));
            }
            Err(Reason::NoListener.into())
        }
        _ => Err(Reason::NoListener.into()),
    }
}

#[inline(always)]
fn from_host<E: Env>(env: &E, ctx: &mut Context) -> Result<(), Ended> {
    let at = env.endpoint(ctx.generation, ctx.key.network, ctx.key.destination);
    if at >> 24 != AT_GUEST {
        // DHCP answers go to addresses that are not leased yet, or to everyone.
        if ctx.key.protocol == UDP
            && ctx.key.source_port == u16::to_be(67)
            && ctx.key.destination_port == u16::to_be(68)
        {
            return Err(Ended::Pass(Reason::FromHost));
        }
        return Err(Reason::NoGuest.into());
    }
    if ctx.shape & SHAPE_OPENS == 0 {
        return Err(Reason::NoFlow.into());
    }
    ctx.to = at & 0xff_ffff;
    ctx.ingress = NEXT_HOP_HOST;
    ctx.way = WAY_DIRECT;
    Ok(())
}

/// Asks the sender's groups (NIC, then subnet), then the receiver's (subnet, then NIC). First deny ends.
#[inline(always)]
fn groups<E: Env>(env: &E, ctx: &mut Context, head: &Header) -> Result<(), Reason> {
    let mut asked = [0u32; 4];
    let toward_host = ctx.way == WAY_DIRECT && ctx.egress == NEXT_HOP_HOST && ctx.to == NOBODY;
    if ctx.from != NOBODY {
        let p =
            entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.from).ok_or(Reason::Internal)?;
        // SAFETY: `entry` points into a page.
        let endpoint = unsafe { &*p };
        // What the host offers its guests (`hostAccess`) is infrastructure, like Azure's DHCP and DNS: exempt.
        if !toward_host {
            asked[0] = endpoint.nic_outbound;
            asked[1] = endpoint.subnet_outbound;
        }
        if ctx.way == WAY_SNAT && endpoint.instance_address != 0 {
            ctx.way = WAY_INSTANCE_OUT;
            ctx.new.source = endpoint.instance_address;
        }
    }
    if ctx.to != NOBODY {
        let p = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.to).ok_or(Reason::Internal)?;
        // SAFETY: as above.
        let endpoint = unsafe { &*p };
        asked[2] = endpoint.subnet_inbound;
        asked[3] = endpoint.nic_inbound;
        ctx.egress = endpoint.next_hop;
    }
    // Ports are the packet's own; the destination is the private one (design §4).
    let (sport, dport) = if ctx.key.protocol == ICMP {
        (0, 0)
    } else {
        (u16::from_be(ctx.key.source_port), u16::from_be(ctx.key.destination_port))
    };
    let destination = if ctx.way == WAY_INSTANCE_IN { ctx.new.destination } else { ctx.key.destination };
    ctx.classes = classify::classes(
        env,
        ctx.generation,
        head.ports,
        ctx.key.source,
        destination,
        sport,
        dport,
        ctx.key.protocol,
    )
    .ok_or(Reason::Internal)?;
    for ruleset in asked {
        if ruleset == 0 {
            continue;
        }
        let rule = classify::decide(env, ctx, ruleset);
        if rule == 0 {
            return Err(Reason::Internal);
        }
        ctx.rule = rule & !RULE_ALLOW;
        env.count_rule(ctx.rule, ctx.length);
        if rule & RULE_ALLOW == 0 {
            return Err(Reason::DeniedByRule);
        }
    }
    Ok(())
}
