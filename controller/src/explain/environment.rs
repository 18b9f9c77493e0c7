//! The engine's tables on the host, filled with the policy in force and what the datapath knows of next hops.

use std::net::IpAddr;

use portcullis_common::engine::host::HostEnv;
use portcullis_common::layout::{DEVICE_GUEST, Device, HOP_FLAG_RESOLVED, HOP_GUEST, NextHop};

use super::ends::{Ends, Sender};
use crate::daemon::{InForce, Shared};
use crate::datapath::now_tick;

/// Buckets of the flow table; it begins empty, so that the question is about a new flow.
const BUCKETS: u32 = 64;

/// Hardware address of a guest that was not heard of yet.
const SOME_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// Fills the tables. Also: the hardware address the packet has to come from.
pub fn environment(
    shared: &Shared,
    in_force: &InForce,
    ends: &Ends<'_>,
) -> anyhow::Result<(HostEnv, [u8; 6])> {
    let compiled = &in_force.compiled;
    let parity = compiled.generation & 1;
    // With the kernel's own secrets a listener's backend is the one that the kernel chooses, and so is the first port tried.
    let mut env = HostEnv::new(BUCKETS, shared.datapath().seed());
    env.control.generation = compiled.generation;
    env.control.settings[parity as usize] = compiled.settings;
    env.set_now(now_tick());
    env.policy[parity as usize] = compiled.host_policy();
    // Backends that are down were taken out in place.
    for (number, page) in compiled.slot_pages(&shared.health.down()) {
        env.policy[parity as usize].pages[number as usize] = page;
    }
    for device in &compiled.devices {
        env.set_device(parity, *device);
    }
    let (hops, routes) = {
        let datapath = shared.datapath();
        (datapath.next_hops()?, datapath.routes()?)
    };
    for (index, hop) in &hops {
        env.set_next_hop(*index, *hop);
    }
    for route in &routes {
        match route.destination {
            IpAddr::V4(address) => {
                env.routes.insert4(route.prefix_length, address.octets(), route.next_hop);
            }
            IpAddr::V6(address) => {
                env.routes6.insert6(route.prefix_length, address.octets(), route.next_hop);
            }
        }
    }
    let mac = the_guest(&mut env, in_force, ends, parity, &hops);
    Ok((env, mac))
}

/// The hardware address that a frame to the packet's first device has to be for.
pub fn device_mac(in_force: &InForce, ends: &Ends<'_>) -> [u8; 6] {
    let device = in_force.compiled.devices.iter().find(|device| device.ifindex == ends.ifindex);
    device.map_or(SOME_MAC, |device| device.mac)
}

/// Makes sure that the guest at the packet's end is there: its device, and a hardware address.
fn the_guest(
    env: &mut HostEnv,
    in_force: &InForce,
    ends: &Ends<'_>,
    parity: u32,
    hops: &[(u16, NextHop)],
) -> [u8; 6] {
    if ends.missing_device.is_some() {
        env.set_device(
            parity,
            Device {
                ifindex: ends.ifindex,
                kind: DEVICE_GUEST,
                network: ends.network,
                mac: SOME_MAC,
                ..Device::default()
            },
        );
    }
    let Sender::Guest(guest) = &ends.from else { return SOME_MAC };
    let index = guest.endpoint.next_hop;
    let known = hops.iter().find(|(known, _)| *known == index).map(|(_, hop)| *hop);
    let mut hop = known.filter(|hop| hop.ifindex == ends.ifindex).unwrap_or_default();
    let resolved = hop.flags & HOP_FLAG_RESOLVED != 0;
    if !resolved {
        let pinned = in_force.compiled.guest_hops.get(guest.number).and_then(|hop| hop.mac);
        hop.mac = pinned.unwrap_or(SOME_MAC);
        hop.flags |= HOP_FLAG_RESOLVED;
    }
    hop.ifindex = ends.ifindex;
    hop.kind = HOP_GUEST;
    hop.address = portcullis_common::layout::v4(guest.address);
    hop.address6 = portcullis_common::layout::v6(guest.address);
    env.set_next_hop(index, hop);
    hop.mac
}
