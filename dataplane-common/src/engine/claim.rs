//! Third stage: the way out, the claim of a port, both halves of the flow, and the first packet on its way.

use super::{Context, NO_SLOT, Verdict, WAY_INSTANCE_IN, WAY_INSTANCE_OUT, WAY_SNAT, drop, forward};
use crate::classify::{entry, header};
use crate::env::Env;
use crate::family::{Family, V4};
use crate::flow::{self, Body, Ctl, FLAG_FORWARD, FLAG_MAPPED, FLAG_SNAT, LIVE, Taken};
use crate::layout::{
    Control, EPOCH_SHIFT, FLOW_RULE, FlowKey, IDLE_ICMP, IDLE_OTHER, IDLE_TCP, IDLE_UDP, KIND_MAPPING,
    Settings, WORLD,
};
use crate::packet::Packet;
use crate::packet::headers::{ICMP, ICMPV6, TCP, UDP};
use crate::policy::{Endpoint, Header, OUTBOUND_ICMP, OUTBOUND_TCP, OUTBOUND_UDP};
use crate::reason::Reason;
use crate::snat::{self, TryPort};
use crate::tcp_state;

/// Ticks for which a refused claim is not tried again: a port that frees itself is found a quarter of a second later,
/// and an exhausted guest cannot buy 1,024 look-ups with every SYN.
const REFUSAL: u32 = 4;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return drop(env, ctx, Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    let settings = forward::settings(control, ctx.generation);
    if ctx.again != NO_SLOT {
        return forward::allowed_again::<F, P, E>(packet, env, ctx, control);
    }
    ctx.idle_class = match ctx.key.protocol {
        TCP => IDLE_TCP,
        UDP => IDLE_UDP,
        ICMP | ICMPV6 => IDLE_ICMP,
        _ => IDLE_OTHER,
    };
    let made = if ctx.way != WAY_SNAT {
        direct::<F, E>(env, ctx, settings)
    } else if F::V6 {
        Err(Reason::Ipv6)
    } else {
        translated(env, ctx, control, settings)
    };
    match made {
        Ok(()) => forward::send::<F, P, E>(packet, env, ctx, Reason::NewFlow),
        Err(reason) => drop(env, ctx, reason),
    }
}

/// Why a slot could not be had, as the packet's reason.
#[inline(always)]
fn refusal(taken: Taken) -> Reason {
    if taken == Taken::FULL { Reason::TableFull } else { Reason::Contended }
}

#[inline(always)]
fn insert<F: Family, E: Env>(env: &E, ctx: &mut Context, key: &F::Key) -> Taken {
    F::set_claim(ctx, key);
    F::insert(env, ctx)
}

/// Takes the slot of the packet's own direction.
#[inline(always)]
fn insert_forward<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Taken {
    let key = *F::key(ctx);
    insert::<F, E>(env, ctx, &key)
}

/// Takes the slot of the answers, as they are seen in `network`.
#[inline(always)]
fn insert_answer<F: Family, E: Env>(env: &E, ctx: &mut Context, network: u16) -> Taken {
    let key = F::answer(ctx, network);
    insert::<F, E>(env, ctx, &key)
}

/// Flows that keep their ports: between guests, with the host, by an instance-level public IP.
#[inline(always)]
fn direct<F: Family, E: Env>(env: &E, ctx: &mut Context, settings: &Settings) -> Result<(), Reason> {
    let mut network = ctx.to_network;
    if F::V6 {
        // Nothing is translated.
    } else if ctx.way == WAY_INSTANCE_OUT {
        ctx.egress = env.route(ctx.key.destination) as u16;
        if ctx.egress == 0 {
            return Err(Reason::NoRoute);
        }
        network = WORLD;
    } else if ctx.way == WAY_INSTANCE_IN && ctx.ingress == 0 {
        return Err(Reason::NoRoute);
    }
    let forward = insert_forward::<F, E>(env, ctx);
    if !forward.is_slot() {
        return Err(refusal(forward));
    }
    let reverse = insert_answer::<F, E>(env, ctx, network);
    if !reverse.is_slot() {
        flow::withdraw::<F, E>(env, forward);
        return Err(refusal(reverse));
    }
    publish::<F, E>(env, ctx, settings, forward, reverse, 0);
    Ok(())
}

/// Flows under a load balancer's address, with a port claimed from those the member owns.
#[inline(always)]
fn translated<E: Env>(
    env: &E,
    ctx: &mut Context,
    control: &Control,
    settings: &Settings,
) -> Result<(), Reason> {
    let head = header(env, ctx.generation).ok_or(Reason::Internal)?;
    // SAFETY: page 0 is the header.
    let head: &Header = unsafe { &*head };
    let p = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, ctx.from).ok_or(Reason::Internal)?;
    // SAFETY: `entry` points into a page.
    let endpoint = unsafe { &*p };
    let wanted = match ctx.key.protocol {
        TCP => OUTBOUND_TCP,
        UDP => OUTBOUND_UDP,
        ICMP => OUTBOUND_ICMP,
        _ => return Err(if endpoint.units == 0 { Reason::NoOutboundMethod } else { Reason::NoPorts }),
    };
    if endpoint.units == 0 || endpoint.protocols & wanted == 0 {
        return Err(Reason::NoOutboundMethod);
    }
    ctx.egress = env.route(ctx.key.destination) as u16;
    if ctx.egress == 0 {
        return Err(Reason::NoRoute);
    }
    if endpoint.idle_class != 0 && ctx.key.protocol != ICMP {
        ctx.idle_class = endpoint.idle_class;
    }
    if ctx.key.protocol == TCP {
        let forward = insert_forward::<V4, E>(env, ctx);
        if !forward.is_slot() {
            return Err(refusal(forward));
        }
        if let Err(reason) = search(env, ctx, head, control, endpoint) {
            flow::withdraw::<V4, E>(env, forward);
            return Err(reason);
        }
        ctx.new.source = ctx.search.address;
        ctx.new.source_port = ctx.search.port;
        publish::<V4, E>(env, ctx, settings, forward, Taken(ctx.search.slot), FLAG_SNAT);
        return Ok(());
    }
    map_socket(env, ctx, head, control, settings, endpoint)?;
    let forward = insert_forward::<V4, E>(env, ctx);
    if !forward.is_slot() {
        return Err(refusal(forward));
    }
    let reverse = insert_answer::<V4, E>(env, ctx, WORLD);
    if !reverse.is_slot() {
        flow::withdraw::<V4, E>(env, forward);
        return Err(refusal(reverse));
    }
    publish::<V4, E>(env, ctx, settings, forward, reverse, FLAG_SNAT | FLAG_MAPPED);
    Ok(())
}

/// Tries the member's ports until one can be claimed.
#[inline(always)]
fn search<E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    control: &Control,
    endpoint: &Endpoint,
) -> Result<(), Reason> {
    let tcp = ctx.key.protocol == TCP;
    let refused = FlowKey {
        destination: if tcp { ctx.key.destination } else { 0 },
        destination_port: if tcp { ctx.key.destination_port } else { 0 },
        source_port: 0,
        ..ctx.key
    };
    if let Some(until) = env.refused_until(&refused)
        && !crate::clock::passed(until, ctx.now)
    {
        return Err(Reason::SnatRefused);
    }
    snat::begin(ctx, head, &control.seed, endpoint.first_unit, endpoint.units);
    let attempts = if ctx.search.ports < snat::ATTEMPTS { ctx.search.ports } else { snat::ATTEMPTS };
    env.search::<TryPort>(ctx, attempts);
    match ctx.search.outcome {
        snat::FOUND => Ok(()),
        snat::FULL => Err(Reason::TableFull),
        _ => {
            // With more ports than one packet tries, the next packet looks further.
            if attempts == ctx.search.ports && !env.dry_run() {
                env.refuse_until(&refused, ctx.now.wrapping_add(REFUSAL));
            }
            Err(Reason::SnatExhausted)
        }
    }
}

/// The public address and port of an inside UDP socket or echo identifier, claimed if it has none yet; in `ctx.new`.
#[inline(always)]
fn map_socket<E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    control: &Control,
    settings: &Settings,
    endpoint: &Endpoint,
) -> Result<(), Reason> {
    let inside = FlowKey { destination: 0, destination_port: 0, kind: KIND_MAPPING, ..ctx.key };
    let span = forward::idle(settings, ctx.idle_class);
    // Ahead of the flow by an eighth and a little, see `forward::touch`.
    let deadline = ctx.now.wrapping_add(span).wrapping_add((span >> 3) | 1);
    if let Some((_, mapping)) = flow::find::<V4, E>(env, control, &inside, ctx.now) {
        // SAFETY: `mapping` points into the table; a mapping lives for its grace at least, so the copy is whole.
        let m = unsafe { &mut *mapping };
        ctx.new.source = m.new_source;
        ctx.new.source_port = m.new_source_port;
        if !env.dry_run() {
            m.deadline = deadline;
        }
        return Ok(());
    }
    let forward = insert::<V4, E>(env, ctx, &inside);
    if !forward.is_slot() {
        return Err(refusal(forward));
    }
    if let Err(reason) = search(env, ctx, head, control, endpoint) {
        flow::withdraw::<V4, E>(env, forward);
        return Err(reason);
    }
    ctx.new.source = ctx.search.address;
    ctx.new.source_port = ctx.search.port;
    let reverse = Taken(ctx.search.slot);
    let generation = flow::common_generation(forward, reverse);
    let mut body = Body {
        peer: reverse.index(),
        deadline,
        next_hop: ctx.egress,
        ingress: ctx.ingress,
        new_source: ctx.search.address,
        new_source_port: ctx.search.port,
        rule: ctx.rule,
        ..Body::default()
    };
    flow::publish::<V4, E>(
        env,
        forward,
        &body,
        Ctl::new(generation, LIVE, 0, ctx.idle_class, FLAG_FORWARD | FLAG_SNAT),
    );
    body.peer = forward.index();
    body.new_source = 0;
    body.new_source_port = 0;
    body.new_destination = ctx.key.source;
    body.new_destination_port = ctx.key.source_port;
    flow::publish::<V4, E>(env, reverse, &body, Ctl::new(generation, LIVE, 0, ctx.idle_class, FLAG_SNAT));
    Ok(())
}

/// Writes both halves of the flow.
#[inline(always)]
fn publish<F: Family, E: Env>(
    env: &E,
    ctx: &Context,
    settings: &Settings,
    forward: Taken,
    reverse: Taken,
    flags: u8,
) {
    let generation = flow::common_generation(forward, reverse);
    let (tcp, span) = if ctx.key.protocol == TCP {
        (tcp_state::OPENED, settings.tcp_half_open)
    } else {
        (0, forward::idle(settings, ctx.idle_class))
    };
    let deadline = ctx.now.wrapping_add(span);
    let rule = stamped(ctx, settings);
    let there = Body {
        peer: reverse.index(),
        deadline,
        next_hop: ctx.egress,
        ingress: ctx.ingress,
        new_source: ctx.new.source,
        new_destination: ctx.new.destination,
        new_source_port: ctx.new.source_port,
        new_destination_port: ctx.new.destination_port,
        rule,
    };
    let back = Body {
        peer: forward.index(),
        deadline,
        next_hop: ctx.ingress,
        ingress: ctx.egress,
        new_source: ctx.key.destination,
        new_destination: ctx.key.source,
        new_source_port: ctx.key.destination_port,
        new_destination_port: ctx.key.source_port,
        rule,
    };
    flow::publish::<F, E>(env, reverse, &back, Ctl::new(generation, LIVE, tcp, ctx.idle_class, flags));
    flow::publish::<F, E>(
        env,
        forward,
        &there,
        Ctl::new(generation, LIVE, tcp, ctx.idle_class, flags | FLAG_FORWARD),
    );
    if let Some(r) = flow::record::<F, E>(env, forward.index())
        && !env.dry_run()
    {
        // SAFETY: `r` points into the table; the packet that opens the flow counts in it.
        unsafe {
            (*r).packets = 1;
            (*r).bytes = ctx.length as u64;
        }
    }
}

/// The rule as a record has it, with the epoch it was asked in.
#[inline(always)]
pub(super) fn stamped(ctx: &Context, settings: &Settings) -> u32 {
    ctx.rule & FLOW_RULE | settings.epoch << EPOCH_SHIFT
}
