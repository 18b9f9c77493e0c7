//! The smallest policies the datapath takes.

#![allow(dead_code, reason = "shared by several test binaries, of which none uses everything")]

use portcullis::datapath::{AttachDevice, PolicyImage, Role};
use portcullis_common::layout::{DEVICE_GUEST, DEVICE_UPLINK, Device, HOP_GUEST, NextHop};
use portcullis_common::policy::{AT_GUEST, EndpointKey, Page, endpoint_value};

/// A policy of this generation without rules: one network, one guest at next hop 2 on device `guest`, one uplink.
pub fn image(generation: u32, guest: u32, uplink: u32) -> PolicyImage {
    let mut header = Page::default();
    let pages = 3u64;
    header.words[0] = u64::from(generation) | pages << 32;
    let device = |ifindex, kind, network| Device { ifindex, kind, network, ..Device::default() };
    let address = u32::from_ne_bytes([10, 0, 0, 4]);
    PolicyImage {
        generation,
        pages: vec![header, Page::default(), Page::default()],
        prefixes: vec![(0, [0, 0, 0, 0], 0), (8, [10, 0, 0, 0], 1)],
        spaces: vec![(1, 16, [10, 0, 0, 0], 1 << 24 | 1), (0, 16, [10, 0, 0, 0], 1 << 24)],
        endpoints: vec![(
            EndpointKey { address, network: 1, ..EndpointKey::default() },
            endpoint_value(AT_GUEST, 0),
        )],
        devices: vec![device(guest, DEVICE_GUEST, 1), device(uplink, DEVICE_UPLINK, 0)],
        guest_hops: vec![(
            2,
            NextHop { ifindex: guest, kind: HOP_GUEST, address, mtu: 1500, ..NextHop::default() },
        )],
        rule_ids: vec![7, generation + 100],
        ..PolicyImage::default()
    }
}

/// A guest's device in a plan.
pub fn guest(ifindex: u32, name: &str) -> AttachDevice {
    AttachDevice { ifindex, name: name.to_owned(), role: Role::Guest, xdp: false }
}

/// An uplink in a plan.
pub fn uplink(ifindex: u32, name: &str, xdp: bool) -> AttachDevice {
    AttachDevice { ifindex, name: name.to_owned(), role: Role::Uplink, xdp }
}
