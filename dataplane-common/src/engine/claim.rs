//! Third stage: the way out, the claim of a port, both halves of the flow, and the first packet on its way.

use super::{
    Context, NO_SLOT, Side, Verdict, WAY_IN, WAY_INSTANCE_OUT, WAY_SNAT, adopt, forward, fragments, mapping,
    refuse,
};
use crate::classify::{entry, header};
use crate::env::{Env, Refusal};
use crate::family::Family;
use crate::flow::{self, Body, Ctl, FLAG_FORWARD, FLAG_MAPPED, FLAG_RESET, FLAG_SNAT, Grace, LIVE, Taken};
use crate::layout::{
    Control, EPOCH_SHIFT, FLOW_RULE, IDLE_ICMP, IDLE_OTHER, IDLE_TCP, IDLE_UDP, NAT_TCP_BY_SOCKET,
    NEXT_HOP_HOST, NEXT_HOP_LOOP, Settings, WORLD, hops,
};
use crate::packet::Packet;
use crate::packet::headers::{ICMP, ICMPV6, TCP, UDP};
use crate::policy::{ALLOC_RESET, Alloc, Endpoint, Header, alloc_of};
use crate::quota;
use crate::reason::Reason;
use crate::snat::{self, TryPort};
use crate::tcp_state;

/// Ticks for which a refused claim is not tried again: a port that frees itself is found a quarter of a second later,
/// and an exhausted guest cannot buy 1,024 look-ups with every SYN.
const REFUSAL: u32 = 4;
/// Ticks for which it is remembered how far a search got: longer than TCP waits with its first retransmissions.
const RESUME: u32 = 75;

#[inline(always)]
pub fn run<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return super::drop(env, ctx, Reason::Internal) };
    // SAFETY: the control element lives as long as the map.
    let control: &Control = unsafe { &*control };
    if ctx.again != NO_SLOT {
        fragments::opened(env, ctx);
        return forward::allowed_again::<F, P, E>(packet, env, ctx, control);
    }
    if adopt::migrating(control) {
        return super::drop(env, ctx, Reason::NoFlow);
    }
    open::<F, P, E>(packet, env, ctx, control)
}

/// Makes the flow, and sends the packet that opens it.
#[inline(always)]
fn open<F: Family, P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context, control: &Control) -> Verdict {
    let settings = forward::settings(control, ctx.generation);
    if ctx.idle_class == 0 {
        ctx.idle_class = match ctx.key.protocol {
            TCP => IDLE_TCP,
            UDP => IDLE_UDP,
            ICMP | ICMPV6 => IDLE_ICMP,
            _ => IDLE_OTHER,
        };
    }
    // What goes no further opens nothing.
    if ctx.ttl <= 1 && ctx.side != Side::Host as u8 && ctx.egress != NEXT_HOP_HOST {
        ctx.refused = Reason::TtlExpired as u8;
        return Verdict::Next(F::REFUSE);
    }
    if let Some(otherwise) = quota::admit::<F, E>(env, ctx) {
        return otherwise;
    }
    let made = if ctx.way != WAY_SNAT {
        direct::<F, E>(env, ctx, control, settings)
    } else {
        translated::<F, E>(env, ctx, control, settings)
    };
    let Err(reason) = made else {
        fragments::opened(env, ctx);
        let reason = if ctx.adopt == 0 { Reason::NewFlow } else { Reason::Adopted };
        return forward::send::<F, P, E>(packet, env, ctx, reason);
    };
    quota::forgo(env, ctx);
    if reason == Reason::SnatExhausted || reason == Reason::SnatRefused {
        ctx.refused = reason as u8;
        return Verdict::Next(F::REFUSE);
    }
    refuse::or_drop::<F, E>(env, ctx, settings, reason)
}

/// Why a slot could not be had, as the packet's reason.
#[inline(always)]
fn refusal(taken: Taken) -> Reason {
    if taken == Taken::FULL { Reason::TableFull } else { Reason::Contended }
}

/// Takes the slot of the packet's own direction.
#[inline(always)]
fn insert_forward<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Taken {
    F::claim_own(ctx);
    F::insert(env, ctx, Grace::Waived)
}

/// Takes the slot of the answers, as they are seen in `network`. A public port in it is the socket's, which its mapping keeps longer
/// than any flow, or no guest's.
#[inline(always)]
fn insert_answer<F: Family, E: Env>(env: &E, ctx: &mut Context, network: u16) -> Taken {
    F::claim_answer(ctx, network);
    F::insert(env, ctx, Grace::Waived)
}

/// Finds the way to the world, unless the packet comes back in.
#[inline(always)]
fn find_route<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Result<(), Reason> {
    if ctx.egress != NEXT_HOP_LOOP {
        ctx.egress = F::route(env, F::destination(ctx)) as u16;
    }
    if ctx.egress == 0 { Err(Reason::NoRoute) } else { Ok(()) }
}

/// Flows that need no port of their own: between guests, with the host, by an instance-level public IP, from the world.
#[inline(always)]
fn direct<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    control: &Control,
    settings: &Settings,
) -> Result<(), Reason> {
    let mut network = ctx.to_network;
    if ctx.way == WAY_INSTANCE_OUT {
        find_route::<F, E>(env, ctx)?;
        network = WORLD;
    } else if ctx.way == WAY_IN && ctx.ingress == 0 {
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
    // Without a branch: the verifier would follow all that comes after it twice.
    let flags = (ctx.mapped & 1) * FLAG_MAPPED;
    publish::<F, E>(env, ctx, settings, forward, reverse, flags);
    let generation = flow::common_generation(forward, reverse);
    quota::enter::<F, E>(env, ctx, control, forward.index(), generation);
    if flags != 0 {
        mapping::entered::<F, E>(env, ctx, settings);
    }
    Ok(())
}

/// Flows under a load balancer's address or the shared one, with a port claimed from those the guest owns.
#[inline(always)]
fn translated<F: Family, E: Env>(
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
    let Some(which) = alloc_of(ctx.key.protocol) else {
        let any = endpoint.alloc[0].segments | endpoint.alloc[1].segments;
        return Err(if any == 0 { Reason::NoOutboundMethod } else { Reason::NoPorts });
    };
    // SAFETY: the index is below the three elements.
    let alloc = unsafe { &*endpoint.alloc.as_ptr().add(which) };
    if alloc.segments == 0 {
        return Err(Reason::NoOutboundMethod);
    }
    find_route::<F, E>(env, ctx)?;
    if alloc.idle_class != 0 && which != crate::policy::ALLOC_ECHO {
        ctx.idle_class = alloc.idle_class;
    }
    if alloc.flags & ALLOC_RESET != 0 {
        ctx.flow_flags = FLAG_RESET;
    }
    ctx.mapped = (ctx.key.protocol != TCP || settings.nat & NAT_TCP_BY_SOCKET != 0) as u8;
    if ctx.mapped == 0 {
        let forward = insert_forward::<F, E>(env, ctx);
        if !forward.is_slot() {
            return Err(refusal(forward));
        }
        if let Err(reason) = search::<F, E>(env, ctx, head, control, alloc) {
            flow::withdraw::<F, E>(env, forward);
            return Err(reason);
        }
        publish::<F, E>(env, ctx, settings, forward, Taken(ctx.search.slot), FLAG_SNAT);
        return Ok(());
    }
    map_socket::<F, E>(env, ctx, head, control, settings, alloc)?;
    let forward = insert_forward::<F, E>(env, ctx);
    if !forward.is_slot() {
        return Err(refusal(forward));
    }
    let reverse = insert_answer::<F, E>(env, ctx, WORLD);
    if !reverse.is_slot() {
        flow::withdraw::<F, E>(env, forward);
        return Err(refusal(reverse));
    }
    publish::<F, E>(env, ctx, settings, forward, reverse, FLAG_SNAT | FLAG_MAPPED);
    Ok(())
}

/// Tries the guest's ports until one can be claimed; it is then in `ctx.new`.
#[inline(always)]
fn search<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    control: &Control,
    alloc: &Alloc,
) -> Result<(), Reason> {
    let mut key = F::refusal(ctx, &control.seed, ctx.mapped == 0);
    if let Some(refused) = env.refused(&key)
        && refused.resume == 0
        && !crate::clock::passed(refused.until, ctx.now)
    {
        return Err(Reason::SnatRefused);
    }
    // Every socket has its own order of candidates, so how far a search got is remembered by socket.
    let mut skipped = 0;
    if alloc.ports > snat::ATTEMPTS {
        key.source_port = ctx.key.source_port;
        if let Some(stopped) = env.refused(&key)
            && stopped.resume < alloc.ports
            && !crate::clock::passed(stopped.until, ctx.now)
        {
            skipped = stopped.resume;
        }
    }
    let most = skipped.wrapping_add(snat::ATTEMPTS);
    let limit = if alloc.ports < most { alloc.ports } else { most };
    snat::begin::<F>(ctx, head, &control.seed, alloc, skipped, limit);
    env.search::<TryPort<F>>(ctx, snat::ATTEMPTS + snat::SEGMENTS);
    if ctx.search.outcome == snat::FOUND {
        env.tried(ctx.search.next);
        if skipped != 0 && !env.dry_run() {
            // The next flow from this socket begins with its first candidate.
            env.refuse(&key, Refusal { until: ctx.now.wrapping_sub(1), resume: skipped });
        }
        return Ok(());
    }
    if ctx.search.outcome == snat::FULL {
        return Err(Reason::TableFull);
    }
    // Exhausted is who has had the last port tried (design §5). Who has not is told nothing: a RST would end what the next
    // SYN may open.
    let (reason, refusal) = if limit == alloc.ports {
        key.source_port = 0;
        (Reason::SnatExhausted, Refusal { until: ctx.now.wrapping_add(REFUSAL), resume: 0 })
    } else {
        (Reason::SnatSearching, Refusal { until: ctx.now.wrapping_add(RESUME), resume: limit })
    };
    if !env.dry_run() {
        env.refuse(&key, refusal);
    }
    Err(reason)
}

/// The public address and port that an inside socket or echo identifier has for itself, claimed if it has none yet; in `ctx.new`.
#[inline(always)]
fn map_socket<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    control: &Control,
    settings: &Settings,
    alloc: &Alloc,
) -> Result<(), Reason> {
    F::claim_inside(ctx);
    let deadline = mapping::opened(settings, ctx.idle_class, ctx.key.protocol, ctx.now);
    if let Some((_, mapping)) = flow::find::<F, E>(env, control, F::claimed(ctx), ctx.now) {
        // SAFETY: `mapping` points into the table; a mapping lives for its grace at least, so the copy is whole.
        unsafe {
            F::load_new(ctx, mapping);
            if !env.dry_run() {
                (*mapping).deadline = deadline;
            }
        }
        let destination = F::destination(ctx);
        F::set_new_destination(ctx, destination);
        ctx.new.destination_port = ctx.key.destination_port;
        return Ok(());
    }
    let forward = F::insert(env, ctx, Grace::Waived);
    if !forward.is_slot() {
        return Err(refusal(forward));
    }
    if let Err(reason) = search::<F, E>(env, ctx, head, control, alloc) {
        flow::withdraw::<F, E>(env, forward);
        return Err(reason);
    }
    let reverse = Taken(ctx.search.slot);
    let generation = flow::common_generation(forward, reverse);
    let mut body = Body {
        peer: reverse.index(),
        deadline,
        hops: hops(ctx.egress, ctx.ingress),
        new_source: ctx.new.source,
        new_source_port: ctx.new.source_port,
        rule: ctx.rule,
        ..Body::default()
    };
    let (public, own) = (F::new_source(ctx), F::source(ctx));
    let ctl = Ctl::new(generation, LIVE, 0, ctx.idle_class, FLAG_FORWARD | FLAG_SNAT);
    put::<F, E>(env, forward, &body, ctl, public, own);
    body.peer = forward.index();
    body.new_source = 0;
    body.new_source_port = 0;
    body.new_destination = ctx.key.source;
    body.new_destination_port = ctx.key.source_port;
    put::<F, E>(env, reverse, &body, Ctl::new(generation, LIVE, 0, ctx.idle_class, FLAG_SNAT), public, own);
    Ok(())
}

/// Publishes one half with the addresses of its translation.
#[inline(always)]
fn put<F: Family, E: Env>(
    env: &E,
    taken: Taken,
    body: &Body,
    ctl: Ctl,
    source: F::Address,
    destination: F::Address,
) {
    if F::V6
        && !env.dry_run()
        && let Some(r) = flow::record::<F, E>(env, taken.index())
    {
        // SAFETY: the slot is ours until it is published.
        unsafe { F::set_new(r, source, destination) };
    }
    flow::publish::<F, E>(env, taken, body, ctl);
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
    let flags = flags | ctx.flow_flags;
    let generation = flow::common_generation(forward, reverse);
    let (tcp, span, expected) = if ctx.adopt != 0 {
        // Where the receiver is will be known when it speaks.
        (tcp_state::OPENED | tcp_state::ANSWERED, forward::idle(settings, ctx.idle_class), 0)
    } else if ctx.key.protocol == TCP {
        (tcp_state::OPENED, settings.tcp_half_open, tcp_state::named(ctx.tcp_end).to_be())
    } else {
        (0, forward::idle(settings, ctx.idle_class), 0)
    };
    let deadline = ctx.now.wrapping_add(span);
    let rule = stamped(ctx, settings);
    let opened_back = if ctx.adopt == adopt::RECEIVER { FLAG_FORWARD } else { 0 };
    let there = Body {
        peer: reverse.index(),
        deadline,
        hops: hops(ctx.egress, ctx.ingress),
        new_source: ctx.new.source,
        new_destination: ctx.new.destination,
        new_source_port: ctx.new.source_port,
        new_destination_port: ctx.new.destination_port,
        rule,
        ack: if ctx.adopt != 0 { ctx.tcp_ack } else { 0 },
    };
    let back = Body {
        peer: forward.index(),
        deadline,
        hops: hops(ctx.ingress, ctx.egress),
        new_source: ctx.key.destination,
        new_destination: ctx.key.source,
        new_source_port: ctx.key.destination_port,
        new_destination_port: ctx.key.source_port,
        rule,
        ack: expected,
    };
    put::<F, E>(
        env,
        reverse,
        &back,
        Ctl::new(generation, LIVE, tcp, ctx.idle_class, flags | opened_back),
        F::destination(ctx),
        F::source(ctx),
    );
    put::<F, E>(
        env,
        forward,
        &there,
        Ctl::new(generation, LIVE, tcp, ctx.idle_class, flags | (opened_back ^ FLAG_FORWARD)),
        F::new_source(ctx),
        F::new_destination(ctx),
    );
    if let Some(r) = flow::record::<F, E>(env, forward.index())
        && !env.dry_run()
    {
        // SAFETY: `r` points into the table; the packet that opens the flow counts in it.
        unsafe {
            (*r).packets = 1;
            (*r).bytes_low = ctx.length;
        }
    }
}

/// The rule as a record has it, with the epoch it was asked in.
#[inline(always)]
pub(super) fn stamped(ctx: &Context, settings: &Settings) -> u32 {
    ctx.rule & FLOW_RULE | settings.epoch << EPOCH_SHIFT
}
