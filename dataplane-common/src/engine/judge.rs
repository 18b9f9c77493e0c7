//! Second stage: who sends, who receives, and do the rules let it pass? Always on the private addresses.

use super::{
    Context, Ended, NO_SLOT, NOBODY, Side, Verdict, WAY_DIRECT, WAY_PLATFORM, WAY_SNAT, adopt, balance, drop,
    forward, groups, mapping, owner, pass, refuse,
};
use crate::classify::{self, entry, header};
use crate::env::Env;
use crate::family::Family;
use crate::flow;
use crate::layout::{
    Control, HOST_DNS, HOST_ECHO, KIND_PORTLESS, NAT_FILTER_BY_GROUPS, NEXT_HOP_HOST, NEXT_HOP_LOOP,
    Settings, WORLD,
};
use crate::packet::headers::{ICMP, ICMPV6, TCP, UDP};
use crate::packet::parse::{SHAPE_FLAGS, SHAPE_OPENS};
use crate::policy::{
    AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_LISTENER, AT_PROXY, Endpoint, FRONTEND_HOST, Frontend,
    Header, IN_APPLIANCE, IN_GATEWAY, IN_NETWORK, IN_NOWHERE, IN_PLATFORM, RULE_NONE, owner_entry,
};
use crate::reason::Reason;

const fn ip(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}

/// Instance metadata and the platform's own services: on a cloud machine a packet let out there would be answered
/// with the *host's* credentials (design §4).
const METADATA: u32 = ip(169, 254, 169, 254);
const PLATFORM: u32 = ip(168, 63, 129, 16);

#[inline(always)]
pub fn run<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    let settings = forward::settings(control, ctx.generation);
    let Some(head) = header(env, ctx.generation) else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: page 0 is the header.
    let head: &Header = unsafe { &*head };
    ctx.from = NOBODY;
    ctx.to = NOBODY;
    ctx.to_network = ctx.key.network;
    ctx.rule = RULE_NONE;
    ctx.ingress = 0;
    ctx.egress = 0;
    ctx.way = 0;
    ctx.idle_class = 0;
    ctx.flow_flags = 0;
    (ctx.relief.over, ctx.relief.place) = (0, 0);
    ctx.mapped = 0;
    ctx.adopt = adopt::candidate(ctx, control);
    F::keep(ctx);
    if ctx.again != NO_SLOT {
        // A live flow's packet: that it opens nothing is no objection.
        ctx.shape |= SHAPE_OPENS;
    }
    let verdict = match ctx.side() {
        Side::Guest => from_guest::<F, E>(env, ctx, head, settings),
        Side::Uplink => from_uplink::<F, E>(env, ctx, control, head),
        Side::Host => from_host::<F, E>(env, ctx),
    };
    let judged = match verdict {
        Ok(()) => groups::run::<F, E>(env, ctx, head),
        Err(Ended::Drop(reason)) => Err(reason),
        Err(Ended::Pass(reason)) => return pass(env, ctx, reason),
        Err(Ended::Verdict(verdict)) => return verdict,
    };
    match judged {
        // ICMP without an identifier: nothing in an answer would tell one guest's from another's.
        Ok(()) if ctx.way == WAY_SNAT && ctx.key.kind == KIND_PORTLESS => drop(env, ctx, Reason::IcmpType),
        Ok(()) => Verdict::Next(F::CLAIM),
        Err(reason) => {
            if ctx.again != NO_SLOT {
                flow::end::<F, E>(env, ctx.again, ctx.again_generation, ctx.now);
            }
            if adopt::another_look(ctx, reason) {
                ctx.refused = reason as u8;
                return Verdict::Next(F::ADOPT);
            }
            refuse::or_drop::<F, E>(env, ctx, settings, reason)
        }
    }
}

#[inline(always)]
fn from_guest<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    settings: &Settings,
) -> Result<(), Ended> {
    let network = ctx.key.network;
    let (source, destination) = (F::source(ctx), F::destination(ctx));
    if F::V6 && F::never_forwarded(source) {
        // Link-local: good for neighbour discovery and DHCP, which are not judged here.
        return Err(if F::to_many(destination) { Reason::Broadcast } else { Reason::Martian }.into());
    }
    let Some((from, hop)) = owner::find::<F, E>(env, ctx, source, &ctx.source_mac, false) else {
        return Err(Reason::Spoofed.into());
    };
    ctx.from = from;
    ctx.ingress = hop;
    if F::to_many(destination) {
        return Err(Reason::Broadcast.into());
    }
    let endpoint = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, from).ok_or(Reason::Internal)?;
    // SAFETY: `entry` points into a page.
    let routing = unsafe { (*endpoint).routing };
    let space = F::space(env, ctx.generation, routing, destination);
    let argument = space & 0xff_ffff;
    if space >> 24 == IN_PLATFORM {
        // The platform rules must say yes too (`groups`): they know the service.
        ctx.egress = NEXT_HOP_HOST;
        ctx.way = WAY_PLATFORM;
        return opens_anew(ctx);
    }
    if !F::V6 && (ctx.key.destination == METADATA || ctx.key.destination == PLATFORM) {
        return Err(Reason::PlatformAddress.into());
    }
    if F::never_forwarded(destination) || destination == source {
        return Err(Reason::Martian.into());
    }
    let inside = space >> 24 == IN_NETWORK;
    let at = match space >> 24 {
        IN_NETWORK => F::endpoint(env, ctx.generation, argument as u16, destination),
        IN_APPLIANCE => crate::policy::endpoint_value(AT_GUEST, argument),
        IN_NOWHERE => return Err(Reason::RouteNone.into()),
        IN_GATEWAY => return Err(Reason::NoGateway.into()),
        _ => F::endpoint(env, ctx.generation, WORLD, destination),
    };
    let kind = at >> 24 & !AT_PROXY;
    if kind == AT_HOST {
        // A peer's gateway address is not the sender's to ask.
        if inside && argument != network as u32 {
            return Err(Reason::NoGuest.into());
        }
        if !host_access(ctx, settings, ctx.key.destination_port) {
            return Err(Reason::HostAccess.into());
        }
        ctx.egress = NEXT_HOP_HOST;
        ctx.way = WAY_DIRECT;
        return opens(ctx);
    }
    opens(ctx)?;
    if inside || space >> 24 == IN_APPLIANCE {
        if kind != AT_GUEST {
            return Err(Reason::NoGuest.into());
        }
        ctx.to = at & 0xff_ffff;
        ctx.way = WAY_DIRECT;
        return Ok(());
    }
    match kind {
        0 => {}
        // Out and in again: what the sender may and how it leaves is decided as for the world.
        AT_INSTANCE | AT_FRONTEND => ctx.egress = NEXT_HOP_LOOP,
        _ => return Err(Reason::NoListener.into()),
    }
    // SAFETY: `entry` points into a page.
    if unsafe { (*endpoint).instance } == 0 {
        // By a port, and which one only the table knew that is not here.
        opens_anew(ctx)?;
    }
    // Decided in the claim stage, after the groups: what is denied is not asked for a way out.
    ctx.way = WAY_SNAT;
    Ok(())
}

/// Only what opens a conversation makes a flow, or belongs to one that may be adopted.
#[inline(always)]
fn opens(ctx: &Context) -> Result<(), Ended> {
    if ctx.adopt != 0 { Ok(()) } else { opens_anew(ctx) }
}

/// Only what opens a conversation, where a port has to be chosen for it.
#[inline(always)]
fn opens_anew(ctx: &Context) -> Result<(), Ended> {
    if ctx.shape & SHAPE_OPENS == 0 { Err(Reason::NoFlow.into()) } else { Ok(()) }
}

/// Does `hostAccess` open this port (network order)? DNS and echo by their own switches, the rest by the list.
#[inline(always)]
pub(super) fn host_access(ctx: &Context, settings: &Settings, port: u16) -> bool {
    let protocol = ctx.key.protocol;
    let port = u16::from_be(port);
    if protocol == ICMP || protocol == ICMPV6 {
        return ctx.key.kind != KIND_PORTLESS && settings.host_access & HOST_ECHO != 0;
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
fn from_uplink<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    control: &Control,
    head: &Header,
) -> Result<(), Ended> {
    let (source, destination) = (F::source(ctx), F::destination(ctx));
    if ctx.shape & SHAPE_FLAGS != 0 {
        return Err(no_tcp::<F, E>(env, ctx, head));
    }
    // Nobody outside has one of our private addresses or the platform's; believing it would let it in by
    // AllowVnetInBound or AllowAzureLoadBalancerInBound. Nor has anybody one of our public addresses: guests that leave
    // under them come back in by a way of their own.
    if stranger::<F, E>(env, ctx) {
        return Err(Reason::Martian.into());
    }
    // Where the answers go: the route back, found now so that the flow is written whole.
    ctx.ingress = if ctx.looped != 0 { NEXT_HOP_LOOP } else { F::route(env, source) as u16 };
    if ctx.again != NO_SLOT {
        return balance::as_before::<F, E>(env, ctx).map_err(Ended::Drop);
    }
    let at = F::endpoint(env, ctx.generation, WORLD, destination);
    let index = at & 0xff_ffff;
    match at >> 24 & !AT_PROXY {
        AT_INSTANCE => {
            opens(ctx)?;
            balance::arrive::<F, E>(env, ctx, head, index, false).map_err(Ended::Drop)
        }
        AT_FRONTEND => {
            let port = ctx.key.destination_port;
            let listener = F::listener(env, ctx.generation, destination, port, ctx.key.protocol);
            if listener >> 24 == AT_LISTENER {
                opens_anew(ctx)?;
                return balance::choose::<F, E>(env, ctx, control, head, listener & 0xff_ffff)
                    .map_err(Ended::Drop);
            }
            at_frontend::<F, E>(env, ctx, control, head, index)
        }
        _ => Err(Reason::NoListener.into()),
    }
}

/// What arrives with flags that no TCP sends: dropped, unless it is the host's. Its answers would be the host's RSTs.
#[inline(always)]
fn no_tcp<F: Family, E: Env>(env: &E, ctx: &Context, head: &Header) -> Ended {
    let destination = F::destination(ctx);
    let at = F::endpoint(env, ctx.generation, WORLD, destination);
    let hosts = match at >> 24 & !AT_PROXY {
        0 | AT_HOST => true,
        AT_FRONTEND => {
            let listener =
                F::listener(env, ctx.generation, destination, ctx.key.destination_port, ctx.key.protocol);
            listener >> 24 != AT_LISTENER
                && matches!(unlistened(env, ctx, head, at & 0xff_ffff), Some((false, true)))
        }
        _ => false,
    };
    if hosts { Ended::Pass(Reason::NotOurs) } else { Reason::TcpFlags.into() }
}

/// What arrives at a frontend where nothing listens.
#[inline(always)]
fn at_frontend<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    control: &Control,
    head: &Header,
    index: u32,
) -> Result<(), Ended> {
    let Some((owned, host)) = unlistened(env, ctx, head, index) else {
        return Err(Reason::Internal.into());
    };
    // The host answers pings itself, and takes what answers its own.
    let query = echo(ctx) && !host && ctx.shape & SHAPE_OPENS != 0;
    if (owned || query) && forward::settings(control, ctx.generation).nat & NAT_FILTER_BY_GROUPS != 0 {
        opens(ctx)?;
        match mapping::arrive::<F, E>(env, ctx, control) {
            Err(Reason::NoFlow) if query => {}
            arrived => return arrived.map_err(Ended::Drop),
        }
    }
    if owned {
        return Err(Reason::NoFlow.into());
    }
    if host {
        return Err(Ended::Pass(Reason::NotOurs));
    }
    Err(Reason::NoListener.into())
}

/// Of a frontend's port that nothing listens on: may it be a guest's, and is the address the host's too?
#[inline(always)]
fn unlistened<E: Env>(env: &E, ctx: &Context, head: &Header, index: u32) -> Option<(bool, bool)> {
    let port = u16::from_be(ctx.key.destination_port) as u32;
    let udp = ctx.key.protocol == UDP;
    let owner = classify::entry16(env, ctx.generation, head.owners, owner_entry(index, udp, port / 8));
    // Handed to the kernel, its RST would kill a live flow that this packet only seems to miss (design §4).
    // An echo reply provokes nothing, and the host's own pings take identifiers anywhere: those go up.
    let owned = port != 0 && owner != Some(0) && !echo(ctx);
    let frontend = entry::<E, Frontend>(env, ctx.generation, head.frontends, index)?;
    // SAFETY: `entry` points into a page.
    Some((owned, unsafe { (*frontend).flags } & FRONTEND_HOST != 0 && ctx.looped == 0))
}

/// ICMP queries of either family.
#[inline(always)]
fn echo(ctx: &Context) -> bool {
    ctx.key.protocol == ICMP || ctx.key.protocol == ICMPV6
}

/// Is the source one that nothing from outside may have?
#[inline(always)]
pub(super) fn stranger<F: Family, E: Env>(env: &E, ctx: &Context) -> bool {
    let source = F::source(ctx);
    private::<F, E>(env, ctx)
        || F::never_forwarded(source)
        || F::to_many(source)
        || (ctx.looped == 0 && public::<F, E>(env, ctx, source))
}

/// Is it a public address that guests use?
#[inline(always)]
fn public<F: Family, E: Env>(env: &E, ctx: &Context, address: F::Address) -> bool {
    matches!(F::endpoint(env, ctx.generation, WORLD, address) >> 24 & !AT_PROXY, AT_INSTANCE | AT_FRONTEND)
}

/// Is the source one that rules trust by its address: inside any virtual network, or the platform's?
#[inline(always)]
fn private<F: Family, E: Env>(env: &E, ctx: &Context) -> bool {
    F::space(env, ctx.generation, WORLD, F::source(ctx)) != 0 || (!F::V6 && ctx.key.source == PLATFORM)
}

#[inline(always)]
fn from_host<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Result<(), Ended> {
    // A host that forwards lets packets from outside leave here, with any source: only what is this host's own
    // address may say that it is inside.
    let own = F::endpoint(env, ctx.generation, ctx.key.network, F::source(ctx)) >> 24 == AT_HOST;
    if private::<F, E>(env, ctx) && !own {
        return Err(Reason::Martian.into());
    }
    let at = F::endpoint(env, ctx.generation, ctx.key.network, F::destination(ctx));
    let to_guest = at >> 24 == AT_GUEST;
    // Answers of DHCP are no group's to deny. They go to the address that is leased, to one that is not yet, or to everyone, those of
    // DHCPv6 to link-local ones; to a guest's address only from this host's own.
    let (server, client) = if F::V6 { (547, 546) } else { (67, 68) };
    if ctx.key.protocol == UDP
        && ctx.key.source_port == u16::to_be(server)
        && ctx.key.destination_port == u16::to_be(client)
        && (own || !to_guest)
    {
        return Err(Ended::Pass(Reason::FromHost));
    }
    if !to_guest {
        return Err(Reason::NoGuest.into());
    }
    opens(ctx)?;
    if ctx.adopt != 0 {
        // What the host forwards for others, perhaps through a NAT of its own, is no connection of the host's.
        let own =
            |network| F::endpoint(env, ctx.generation, network, F::source(ctx)) >> 24 & !AT_PROXY == AT_HOST;
        if !own(ctx.key.network) && !own(WORLD) {
            return Err(Reason::NoFlow.into());
        }
    }
    ctx.to = at & 0xff_ffff;
    ctx.ingress = NEXT_HOP_HOST;
    ctx.way = WAY_DIRECT;
    Ok(())
}
