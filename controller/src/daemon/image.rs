//! A plan as the datapath wants it.

use std::collections::HashMap;

use portcullis_common::layout::{HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, NextHop};

use super::plan::Plan;
use crate::compile::GuestHop;
use crate::datapath::{AttachDevice, AttachPlan, PolicyImage, Role, TcBackend};
use crate::hosts::{AttachedHook, DeviceChoice, DeviceRole, Links};

/// The tables of the next generation.
pub fn policy_image(plan: &Plan) -> PolicyImage {
    let compiled = &plan.compiled;
    let choices: HashMap<u32, &DeviceChoice> = plan.choices.iter().map(|c| (c.ifindex, c)).collect();
    let hop = |hop: &GuestHop| (hop.index, guest_hop(hop, &plan.links, &choices));
    PolicyImage {
        generation: compiled.generation,
        pages: compiled.pages.clone(),
        prefixes: compiled.prefixes.clone(),
        spaces: compiled.spaces.clone(),
        prefixes6: compiled.prefixes6.clone(),
        spaces6: compiled.spaces6.clone(),
        endpoints6: compiled.endpoints6.clone(),
        endpoints: compiled.endpoints.clone(),
        devices: compiled.devices.clone(),
        guest_hops: compiled.guest_hops.iter().map(hop).collect(),
        settings: compiled.settings,
        rule_ids: compiled.rules.iter().map(|rule| rule.id).collect(),
    }
}

fn guest_hop(guest: &GuestHop, links: &Links, choices: &HashMap<u32, &DeviceChoice>) -> NextHop {
    let Some(link) = links.by_index(guest.ifindex).filter(|_| guest.ifindex != 0) else {
        // Nowhere, until its device appears: what is sent to it is dropped by name.
        return NextHop::default();
    };
    let mut flags = 0;
    if guest.mac.is_some() {
        flags |= HOP_FLAG_PINNED | HOP_FLAG_RESOLVED;
    }
    if choices.get(&guest.ifindex).is_some_and(|choice| choice.xdp_redirect_ok) {
        flags |= HOP_FLAG_XDP;
    }
    NextHop {
        ifindex: guest.ifindex,
        kind: HOP_GUEST,
        flags,
        mtu: mtu(link.mtu),
        mac: guest.mac.unwrap_or_default(),
        source_mac: guest.source_mac,
        fresh_until: 0,
        address: portcullis_common::layout::v4(guest.address),
        address6: portcullis_common::layout::v6(guest.address),
        ..NextHop::default()
    }
}

/// An MTU as next hops have it.
pub fn mtu(mtu: u32) -> u16 {
    u16::try_from(mtu).unwrap_or(u16::MAX)
}

/// Which programs go where.
pub fn attach_plan(choices: &[DeviceChoice]) -> AttachPlan {
    let device = |choice: &DeviceChoice| AttachDevice {
        ifindex: choice.ifindex,
        name: choice.name.clone(),
        role: match choice.role {
            DeviceRole::Guest => Role::Guest,
            DeviceRole::Uplink => Role::Uplink,
        },
        xdp: choice.hook == AttachedHook::Xdp,
    };
    AttachPlan { devices: choices.iter().map(device).collect(), tc: TcBackend::Auto }
}
