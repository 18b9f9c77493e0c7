//! Whose address is it? The check that a guest speaks for itself, and where its hardware address is learned.

use super::Context;
use crate::classify::{entry, header};
use crate::env::Env;
use crate::family::Family;
use crate::layout::{HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, NextHop};
use crate::policy::{AT_GUEST, Endpoint};

/// The endpoint that has `address` in the packet's network, and its next hop, if it is on this device with this MAC.
///
/// A MAC that is neither in the policy nor known yet is learned: from the first packet whose source address belongs
/// to an interface of this device, and anew whenever its ARP or neighbour discovery says so (`relearn`).
#[inline(always)]
pub fn find<F: Family, E: Env>(
    env: &E,
    ctx: &Context,
    address: F::Address,
    mac: &[u8; 6],
    relearn: bool,
) -> Option<(u32, u16)> {
    let value = F::endpoint(env, ctx.generation, ctx.key.network, address);
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
        if !env.dry_run() {
            hop.mac = *mac;
            hop.flags |= HOP_FLAG_RESOLVED;
        }
    }
    Some((index, next_hop))
}
