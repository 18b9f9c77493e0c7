//! What arrives at a frontend's port: which backend a load balancing rule or an inbound NAT rule sends it to.

use super::{Context, NO_SLOT, WAY_IN};
use crate::classify::{entry, entry16};
use crate::env::Env;
use crate::family::Family;
use crate::flow::{self, FLAG_RESET};
use crate::layout::Control;
use crate::policy::{
    AT_GUEST, DISTRIBUTE_FLOW, DISTRIBUTE_SOURCE_PROTOCOL, Endpoint, Header, LISTENER_FLOATING,
    LISTENER_RESET, Listener,
};
use crate::reason::Reason;

/// Chooses the backend of a new flow and writes its address into `ctx.new`.
#[inline(always)]
pub fn choose<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    control: &Control,
    head: &Header,
    listener: u32,
) -> Result<(), Reason> {
    let p = entry::<E, Listener>(env, ctx.generation, head.listeners, listener).ok_or(Reason::Internal)?;
    // SAFETY: `entry` points into a page.
    let listener = unsafe { &*p };
    let slot = if listener.mask == 0 { 0 } else { client::<F>(ctx, control, listener.distribution) };
    let at = listener.first_slot + (slot & listener.mask);
    let backend = entry16(env, ctx.generation, head.slots, at).ok_or(Reason::Internal)?;
    if backend == 0 {
        return Err(Reason::NoBackend);
    }
    if listener.flags & LISTENER_RESET != 0 {
        ctx.flow_flags = FLAG_RESET;
    }
    ctx.idle_class = listener.idle_class;
    arrive::<F, E>(env, ctx, head, backend - 1, listener.flags & LISTENER_FLOATING != 0)?;
    ctx.new.destination_port = listener.backend_port;
    Ok(())
}

/// The packet goes to this endpoint.
#[inline(always)]
pub fn arrive<F: Family, E: Env>(
    env: &E,
    ctx: &mut Context,
    head: &Header,
    backend: u32,
    floating: bool,
) -> Result<(), Reason> {
    let p = entry::<E, Endpoint>(env, ctx.generation, head.endpoints, backend).ok_or(Reason::Internal)?;
    if !floating {
        // SAFETY: `entry` points into a page.
        let address = F::of_endpoint(unsafe { &*p });
        F::set_new_destination(ctx, address);
    }
    ctx.to = backend;
    ctx.way = WAY_IN;
    Ok(())
}

/// The flow that is judged again goes where it went: its guest, and the tuple it is translated to.
#[inline(always)]
pub fn as_before<F: Family, E: Env>(env: &E, ctx: &mut Context) -> Result<(), Reason> {
    if ctx.again == NO_SLOT {
        return Err(Reason::Internal);
    }
    let record = flow::record::<F, E>(env, ctx.again).ok_or(Reason::Internal)?;
    // SAFETY: `record` points into the table; that it still is the flow that was hit is checked before it is used.
    let (peer, hop) = unsafe {
        F::load_new(ctx, record);
        ((*record).peer, (*record).next_hop())
    };
    let peer = flow::record::<F, E>(env, peer).ok_or(Reason::Internal)?;
    let hop = env.next_hop(hop as u32).ok_or(Reason::Internal)?;
    // SAFETY: as above; the element lives as long as the map.
    let (network, address) = unsafe { ((*peer).key.network, F::of_next_hop(&*hop)) };
    let at = F::endpoint(env, ctx.generation, network, address);
    if at >> 24 != AT_GUEST {
        return Err(Reason::NoGuest);
    }
    ctx.to = at & 0xff_ffff;
    ctx.way = WAY_IN;
    Ok(())
}

/// What tells clients apart, as a number.
#[inline(always)]
fn client<F: Family>(ctx: &Context, control: &Control, distribution: u8) -> u32 {
    let mut key = *F::key(ctx);
    if distribution != DISTRIBUTE_FLOW {
        let protocol = if distribution == DISTRIBUTE_SOURCE_PROTOCOL { ctx.key.protocol } else { 0 };
        F::only_addresses(&mut key, protocol);
    }
    // Not the bits that choose the flow's bucket.
    (F::hash(&key, &[control.seed[1], !control.seed[0]]) >> 16) as u32
}
