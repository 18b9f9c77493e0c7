//! What a topology is to look like: how guests are attached, where they are, and what lies behind the uplink.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::ensure;
use ipnet::{Ipv4Net, Ipv6Net};

use super::craft::Mac;

/// How guests and the internet are attached to the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// veth with transmit offloads off at every end and GRO on at the far ends: every packet is a real
    /// segment with a real checksum, and the far ends have NAPI, so XDP may redirect into them.
    CleanVeth,
    /// veth as a container runtime leaves it: offloads on, the far ends untouched. Checksums are partial,
    /// segments large, and what XDP redirects into them is lost.
    ContainerVeth,
    /// Taps on one bridge, each with a [`super::TapGuest`] that speaks virtio-net; the uplink is a container
    /// veth.
    BridgedTaps,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// Its name, and the end of its namespace's.
    pub name: String,
    /// Device in the gateway that it is attached to. At most 15 bytes.
    pub device: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of its subnet's prefix.
    pub prefix_len: u8,
    /// Its default route, taken to be on the link. Nobody in the lab answers ARP for it: that is for what is
    /// tested.
    pub gateway: Ipv4Addr,
    /// Its address of IPv6 with its subnet's prefix, and its default route; where there is none, its namespace has no IPv6.
    /// Not for taps.
    pub ipv6: Option<(Ipv6Net, Ipv6Addr)>,
    /// More addresses on the same device.
    pub extra_addresses: Vec<Ipv4Net>,
    /// Hardware address of its end.
    pub mac: Mac,
    /// Hardware address of the gateway's end.
    pub gateway_mac: Mac,
}

impl GuestSpec {
    /// Guest `number` (from 1) on a device of the gateway: `vm1` at 10.0.0.4/24 behind 10.0.0.1, `vm2` at
    /// 10.0.0.5 ...
    ///
    /// # Panics
    /// If `number` is not in 1..=250.
    pub fn numbered(number: u8, device_prefix: &str) -> Self {
        assert!((1..=250).contains(&number), "guests are numbered from 1 to 250");
        GuestSpec {
            name: format!("vm{number}"),
            device: format!("{device_prefix}{number}"),
            // Azure keeps the first three addresses of a subnet for itself, so the first guest has .4.
            address: Ipv4Addr::new(10, 0, 0, 3 + number),
            prefix_len: 24,
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            ipv6: None,
            extra_addresses: Vec::new(),
            mac: [0x02, 0x50, 0x43, 0x00, 0x00, number],
            gateway_mac: [0x02, 0x50, 0x43, 0x01, 0x00, number],
        }
    }
}

/// A gateway, its guests and the internet. All fields may be changed before it is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologySpec {
    /// How guests and the internet are attached.
    pub links: Links,
    /// The guests; there may be none.
    pub guests: Vec<GuestSpec>,
    /// The gateway's device towards the internet. At most 15 bytes.
    pub uplink_device: String,
    /// The gateway's own address on it.
    pub uplink_address: Ipv4Net,
    /// The bridge, where guests are on one. It has no address.
    pub bridge_device: String,
    /// The internet's address on the link, and the gateway's default route.
    pub internet_address: Ipv4Net,
    /// More addresses of the internet's, on its loopback, reached through that route.
    pub internet_extra: Vec<Ipv4Addr>,
}

impl TopologySpec {
    /// Hardware address of the uplink.
    pub const UPLINK_MAC: Mac = [0x02, 0x50, 0x43, 0xff, 0x00, 0x01];
    /// Hardware address of the internet's end of it.
    pub const INTERNET_MAC: Mac = [0x02, 0x50, 0x43, 0xff, 0x00, 0x64];

    /// Topology (a): `guests` guests on clean veth, devices `pc-vm1` ...
    pub fn clean_veth(guests: u8) -> Self {
        Self::with_links(Links::CleanVeth, "pc-vm", guests)
    }

    /// Topology (b): `guests` guests on container veth, devices `pc-vm1` ...
    pub fn container_veth(guests: u8) -> Self {
        Self::with_links(Links::ContainerVeth, "pc-vm", guests)
    }

    /// Topology (c): `guests` guests on taps `pc-tap1` ... of the bridge `pc-br0`.
    pub fn bridged_taps(guests: u8) -> Self {
        Self::with_links(Links::BridgedTaps, "pc-tap", guests)
    }

    /// Topology (d), from any of the others: the host has one public address, 203.0.113.10, which is its own
    /// and the frontend alike.
    pub fn one_public_address(mut self) -> Self {
        self.uplink_address = net([203, 0, 113, 10], 24);
        self
    }

    fn with_links(links: Links, device_prefix: &str, guests: u8) -> Self {
        TopologySpec {
            links,
            guests: (1..=guests).map(|number| GuestSpec::numbered(number, device_prefix)).collect(),
            uplink_device: "pc-up".to_owned(),
            uplink_address: net([203, 0, 113, 1], 24),
            bridge_device: "pc-br0".to_owned(),
            internet_address: net([203, 0, 113, 100], 24),
            internet_extra: (1..=4).map(|last| Ipv4Addr::new(198, 51, 100, last)).collect(),
        }
    }

    /// Refuses what could not be built, before anything is.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let mut names = BTreeSet::from(["gw", "internet"]);
        let mut devices = BTreeSet::from(["lo", &self.uplink_device]);
        ensure!(self.uplink_device.len() <= 15, "device name {} is too long", self.uplink_device);
        if self.links == Links::BridgedTaps {
            ensure!(devices.insert(&self.bridge_device), "device {} is there twice", self.bridge_device);
            ensure!(self.bridge_device.len() <= 15, "device name {} is too long", self.bridge_device);
        }
        for guest in &self.guests {
            ensure!(names.insert(&guest.name), "guest {} is there twice", guest.name);
            ensure!(devices.insert(&guest.device), "device {} is there twice", guest.device);
            ensure!(guest.device.len() <= 15, "device name {} is too long", guest.device);
            ensure!(guest.prefix_len <= 32, "/{} is no IPv4 prefix", guest.prefix_len);
        }
        Ok(())
    }
}

fn net(address: [u8; 4], prefix_len: u8) -> Ipv4Net {
    Ipv4Net::new_assert(address.into(), prefix_len)
}
