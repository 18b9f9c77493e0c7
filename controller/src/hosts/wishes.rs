//! What a policy wants of the host: a pure function of policy, devices and chosen hooks.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::links::{Link, Links};
use super::sysctl::{RESERVED_PORTS, Ranges};
use super::{AttachedHook, DeviceChoice, HostChange, offloads};
use crate::policy::network::{Announce, Network};

/// One thing the host should have. It is made by `prepare` unless the host has it already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wish {
    Address {
        device: String,
        ifindex: u32,
        address: IpNet,
        purpose: Purpose,
    },
    /// The way from the host to a guest.
    Route {
        device: String,
        ifindex: u32,
        prefix: IpNet,
        source: IpAddr,
    },
    /// These ports, added to whatever is reserved already.
    ReservedPorts(Ranges),
    OffloadOff {
        device: String,
        ifindex: u32,
        feature: &'static str,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A public address the world asks for by ARP or neighbour discovery: any device of the host having it will do.
    Announce,
    /// A subnet's gateway on a guest's own device.
    GuestGateway,
    /// A subnet's gateway on the bridge its guests are ports of.
    BridgeGateway,
}

impl Purpose {
    /// Is the address to be no source of what the host itself sends? A gateway's of IPv4 is for its link only. A public one
    /// of IPv6 belongs to guests, and would be a source as good as the host's own (RFC 6724 §5), where of IPv4 the
    /// device's first address is taken.
    pub fn is_shy(self, address: IpNet) -> bool {
        match address {
            IpNet::V4(_) => self == Self::GuestGateway,
            IpNet::V6(_) => self == Self::Announce,
        }
    }
}

impl Wish {
    /// The key of the journal entry that making this wish true leaves behind.
    pub fn key(&self) -> String {
        self.change(String::new()).key()
    }

    /// That entry. `old` is the sysctl's present value, and unused otherwise.
    pub fn change(&self, old: String) -> HostChange {
        match self.clone() {
            Self::Address { device, ifindex, address, .. } => {
                HostChange::AddressAdded { device, ifindex, address }
            }
            Self::Route { device, ifindex, prefix, source } => {
                HostChange::RouteAdded { device, ifindex, prefix, source: Some(source) }
            }
            Self::ReservedPorts(ranges) => {
                HostChange::Sysctl { path: RESERVED_PORTS.into(), old, new: ranges.to_string(), before: None }
            }
            Self::OffloadOff { device, ifindex, feature } => {
                HostChange::Offload { device, ifindex, feature: feature.into(), old: true }
            }
        }
    }
}

/// Everything a policy wants of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    pub(super) all: Vec<Wish>,
    /// What cannot be had, for `status`.
    pub warnings: Vec<String>,
    /// Devices of the policy that do not exist (yet).
    pub missing: Vec<String>,
}

impl Wishes {
    /// Keys of all journal entries these wishes account for.
    pub fn keys(&self) -> HashSet<String> {
        self.all.iter().map(Wish::key).collect()
    }
}

/// Works out the wishes. `reserved` are the ports our frontends own on the host's own addresses; they are wished
/// for only when an uplink says `reserveHostPorts`.
pub fn wishes(network: &Network, links: &Links, choices: &[DeviceChoice], reserved: &Ranges) -> Wishes {
    let mut wishes = Wishes::default();
    announcements(network, links, &mut wishes);
    guests(network, links, &mut wishes);
    if network.uplinks.iter().any(|uplink| uplink.reserve_host_ports) && !reserved.is_empty() {
        wishes.all.push(Wish::ReservedPorts(reserved.clone()));
    }
    for choice in choices.iter().filter(|choice| choice.hook == AttachedHook::Xdp) {
        wishes.all.extend(offloads::UNWANTED_UNDER_XDP.map(|feature| Wish::OffloadOff {
            device: choice.name.clone(),
            ifindex: choice.ifindex,
            feature,
        }));
    }
    wishes
}

fn announcements(network: &Network, links: &Links, wishes: &mut Wishes) {
    let Some(uplink) = network.uplinks.first() else { return };
    let Some(link) = links.get(&uplink.device) else {
        wishes.missing.push(uplink.device.clone());
        return;
    };
    for public in network.public_addresses.iter().filter(|public| public.announce == Announce::Address) {
        wishes.all.push(Wish::Address {
            device: link.name.clone(),
            ifindex: link.ifindex,
            address: IpNet::from(public.address),
            purpose: Purpose::Announce,
        });
    }
}

fn guests(network: &Network, links: &Links, wishes: &mut Wishes) {
    let mut addresses: BTreeSet<(u32, IpNet)> = BTreeSet::new();
    let mut routes: BTreeMap<IpNet, &str> = BTreeMap::new();
    let mut missing: BTreeSet<&str> = BTreeSet::new();
    for interface in &network.interfaces {
        let Some(link) = links.get(&interface.device) else {
            missing.insert(&interface.device);
            continue;
        };
        let bridge = links.bridge_of(link);
        for configuration in &interface.addresses {
            let guest = configuration.address;
            let Some((gateway, prefix_len)) = gateway_of(network, configuration.subnet, guest) else {
                continue;
            };
            let (holder, address, purpose): (&Link, _, _) = match bridge {
                Some(bridge) => (bridge, net(gateway, prefix_len), Purpose::BridgeGateway),
                None => (link, IpNet::from(gateway), Purpose::GuestGateway),
            };
            if addresses.insert((holder.ifindex, address)) {
                wishes.all.push(Wish::Address {
                    device: holder.name.clone(),
                    ifindex: holder.ifindex,
                    address,
                    purpose,
                });
            }
            if bridge.is_some() {
                // The bridge's prefix route reaches all its ports.
                continue;
            }
            let prefix = IpNet::from(guest);
            match routes.insert(prefix, &interface.device) {
                None => wishes.all.push(Wish::Route {
                    device: link.name.clone(),
                    ifindex: link.ifindex,
                    prefix,
                    source: gateway,
                }),
                // Two virtual networks with the same prefix are normal, but the host has one routing table.
                Some(first) if first != interface.device => {
                    wishes.warnings.push(format!(
                        "the host itself reaches {guest} only on {first}, not on {}: both networks use that \
                         address (guests are not affected)",
                        interface.device
                    ));
                    routes.insert(prefix, first);
                }
                Some(_) => {}
            }
        }
    }
    wishes.missing.extend(missing.into_iter().map(str::to_string));
}

/// A subnet's first gateway of the guest's family, and the length of the prefix it lies in.
fn gateway_of(network: &Network, subnet: usize, guest: IpAddr) -> Option<(IpAddr, u8)> {
    let subnet = network.subnets.get(subnet)?;
    let gateway = *subnet.gateways.iter().find(|gateway| gateway.is_ipv4() == guest.is_ipv4())?;
    let prefix = subnet.prefixes.iter().find(|prefix| prefix.contains(&gateway));
    Some((gateway, prefix.map_or(IpNet::from(gateway).prefix_len(), IpNet::prefix_len)))
}

fn net(address: IpAddr, prefix_len: u8) -> IpNet {
    IpNet::new(address, prefix_len).unwrap_or_else(|_| IpNet::from(address))
}
