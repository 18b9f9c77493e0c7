//! The host's network devices.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};

use super::netlink::explained;
use super::xdp_features::{XdpFeatures, xdp_features};
use super::{Host, ethtool};

/// What a device is, as far as the choice of hook cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// No rtnetlink kind: a NIC, real or the hypervisor's.
    Physical,
    Veth,
    Tap,
    /// A tun device: it carries IP packets without Ethernet, so no policy can use it.
    Tun,
    Bridge,
    Vlan,
    Bond,
    Loopback,
    /// Any other kind, by the kernel's name for it (`macvlan`, `dummy`, `vxlan`, …).
    Other(String),
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Physical => "NIC",
            Self::Veth => "veth",
            Self::Tap => "tap",
            Self::Tun => "tun",
            Self::Bridge => "bridge",
            Self::Vlan => "VLAN device",
            Self::Bond => "bond",
            Self::Loopback => "loopback",
            Self::Other(kind) => kind,
        })
    }
}

/// The other end of a veth (or the lower device of a VLAN).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// In the peer's own namespace.
    pub ifindex: u32,
    pub in_another_namespace: bool,
}

/// One device at the time of the snapshot.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    pub name: String,
    pub ifindex: u32,
    /// Its own hardware address; zeros when it has none.
    pub mac: [u8; 6],
    /// The address guests behind it send to: the bridge's when this is a bridge port, else its own. A bridge without
    /// an address of its own takes its ports', so this changes when ports come and go (`HostEvent::Link`).
    pub gateway_mac: [u8; 6],
    /// Bytes of IP packet, without the Ethernet header.
    pub mtu: u32,
    pub kind: LinkKind,
    /// Administratively up (IFF_UP), which does not say that there is a carrier.
    pub up: bool,
    /// IFF_LOWER_UP: the carrier is there.
    pub carrier: bool,
    /// ifindex of the bridge, bond or VRF it belongs to.
    pub master: Option<u32>,
    /// ARPHRD type of the device; 1 is Ethernet.
    pub layer: u16,
    pub peer: Option<Peer>,
    /// The driver's name, asked for NICs only.
    pub driver: Option<String>,
    /// `None` when the kernel is too old to say (before 6.3).
    pub xdp: Option<XdpFeatures>,
}

impl Link {
    pub fn has_ethernet(&self) -> bool {
        self.layer == libc::ARPHRD_ETHER
    }
}

/// A snapshot of all devices of the namespace, by name.
#[derive(Debug, Clone, Default)]
pub struct Links {
    by_name: BTreeMap<String, Link>,
}

impl Links {
    /// From devices gathered otherwise (tests); computes nothing.
    pub fn from_links(links: impl IntoIterator<Item = Link>) -> Self {
        Self { by_name: links.into_iter().map(|link| (link.name.clone(), link)).collect() }
    }

    pub fn get(&self, name: &str) -> Option<&Link> {
        self.by_name.get(name)
    }

    pub fn by_index(&self, ifindex: u32) -> Option<&Link> {
        self.by_name.values().find(|link| link.ifindex == ifindex)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Link> {
        self.by_name.values()
    }

    /// The bridge this device is a port of, if any.
    pub fn bridge_of(&self, link: &Link) -> Option<&Link> {
        self.by_index(link.master?).filter(|master| master.kind == LinkKind::Bridge)
    }

    /// The device a policy names, or an error that says why it cannot be used.
    pub fn usable(&self, name: &str) -> Result<&Link> {
        let Some(link) = self.get(name) else {
            bail!(
                "there is no device `{name}` on this host: create it first, or correct the name in the policy"
            );
        };
        if !link.has_ethernet() {
            bail!(
                "device `{name}` has no Ethernet header (it is a {}, ARPHRD type {}): Portcullis forwards Ethernet \
                 frames only; use a tap, veth, bridge port or NIC instead",
                link.kind,
                link.layer
            );
        }
        Ok(link)
    }
}

impl Host {
    /// All devices of this namespace, as they are now.
    ///
    /// Must be called from a thread in the namespace `self` was opened in: XDP features and driver names come
    /// through sockets of the calling thread.
    pub async fn links(&self) -> Result<Links> {
        let messages: Vec<LinkMessage> = self
            .handle()
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(explained)
            .context("cannot list this host's devices")?;
        let features = xdp_features()?;
        let mut links: Vec<Link> =
            messages.iter().filter_map(|message| link_of(message, features.as_ref())).collect();

        let bridges: HashMap<u32, [u8; 6]> = links
            .iter()
            .filter(|link| link.kind == LinkKind::Bridge)
            .map(|link| (link.ifindex, link.mac))
            .collect();
        for link in &mut links {
            if let Some(mac) = link.master.and_then(|master| bridges.get(&master)) {
                link.gateway_mac = *mac;
            }
            if link.kind == LinkKind::Physical {
                link.driver = ethtool::driver(&link.name).ok();
            }
        }
        Ok(Links::from_links(links))
    }
}

fn link_of(message: &LinkMessage, features: Option<&HashMap<u32, XdpFeatures>>) -> Option<Link> {
    let layer = u16::from(message.header.link_layer_type);
    let ifindex = message.header.index;
    let mut name = None;
    let mut mac = [0; 6];
    let mut mtu = 0;
    let mut master = None;
    let mut peer_index = None;
    let mut elsewhere = false;
    let mut kind = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = value.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(value) => mtu = *value,
            // The attribute is there with 0 in some notifications: no master.
            LinkAttribute::Controller(value) => master = Some(*value).filter(|index| *index != 0),
            LinkAttribute::Link(value) => peer_index = Some(*value).filter(|index| *index != 0),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(Link {
        name: name?,
        ifindex,
        mac,
        gateway_mac: mac,
        mtu,
        kind: kind_of(kind, message.header.link_layer_type),
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        master,
        layer,
        peer: peer_index.map(|ifindex| Peer { ifindex, in_another_namespace: elsewhere }),
        driver: None,
        xdp: features.and_then(|features| features.get(&ifindex).copied()),
    })
}

fn kind_of(kind: Option<InfoKind>, layer: LinkLayerType) -> LinkKind {
    match kind {
        None if layer == LinkLayerType::Loopback => LinkKind::Loopback,
        None => LinkKind::Physical,
        Some(InfoKind::Veth) => LinkKind::Veth,
        // One driver for both; only the tap has Ethernet.
        Some(InfoKind::Tun) if layer == LinkLayerType::Ether => LinkKind::Tap,
        Some(InfoKind::Tun) => LinkKind::Tun,
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Vlan) => LinkKind::Vlan,
        Some(InfoKind::Bond) => LinkKind::Bond,
        Some(other) => LinkKind::Other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn a_snapshot_tells_kinds_masters_peers_and_the_bridges_address() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let guest = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", guest.name()]);
        lab.ip(&["link", "add", "w0", "type", "veth", "peer", "name", "w1"]);
        lab.ip(&["link", "add", "br0", "address", "02:00:00:00:00:42", "type", "bridge"]);
        lab.ip(&["tuntap", "add", "tap0", "mode", "tap"]);
        lab.ip(&["tuntap", "add", "tun0", "mode", "tun"]);
        lab.ip(&["link", "set", "tap0", "master", "br0"]);
        lab.ip(&["link", "set", "v0", "mtu", "1400", "up"]);

        let links = lab.run(|| async { Host::open().unwrap().links().await.unwrap() });
        let kind = |name: &str| links.get(name).unwrap().kind.clone();
        assert_eq!(kind("v0"), LinkKind::Veth);
        assert_eq!(kind("tap0"), LinkKind::Tap);
        assert_eq!(kind("tun0"), LinkKind::Tun);
        assert_eq!(kind("br0"), LinkKind::Bridge);
        assert_eq!(kind("lo"), LinkKind::Loopback);

        let (v0, w0) = (links.get("v0").unwrap(), links.get("w0").unwrap());
        assert!(v0.up && !w0.up);
        assert_eq!(v0.mtu, 1400);
        assert!(v0.peer.unwrap().in_another_namespace);
        assert_eq!(
            w0.peer,
            Some(Peer { ifindex: links.get("w1").unwrap().ifindex, in_another_namespace: false })
        );

        let (tap, bridge) = (links.get("tap0").unwrap(), links.get("br0").unwrap());
        assert_eq!(links.bridge_of(tap).unwrap().name, "br0");
        assert_eq!(tap.gateway_mac, bridge.mac);
        assert_ne!(tap.mac, tap.gateway_mac);
        assert_eq!(v0.gateway_mac, v0.mac);
    }

    #[test]
    fn a_device_without_ethernet_is_refused_with_a_reason() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["tuntap", "add", "tun0", "mode", "tun"]);
        let links = lab.run(|| async { Host::open().unwrap().links().await.unwrap() });
        let error = links.usable("tun0").unwrap_err().to_string();
        assert!(error.contains("no Ethernet") && error.contains("tun0"), "{error}");
        let error = links.usable("nosuch").unwrap_err().to_string();
        assert!(error.contains("no device `nosuch`"), "{error}");
    }
}
