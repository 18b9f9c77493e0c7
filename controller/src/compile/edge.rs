//! Everything that stands at an address or a device: guests, public addresses, gateways, next hops.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use portcullis_common::layout::{DEVICE_GUEST, DEVICE_UPLINK, Device, WORLD, v4, v6};
use portcullis_common::policy::{
    AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_LISTENER, AT_PROXY, AT_UNUSED, Endpoint, EndpointKey,
    EndpointKey6, FRONTEND_HOST, Frontend, Listener, Segment, endpoint_value,
};

use super::error::CompileError;
use super::facts::HostFacts;
use super::listeners::ListenerOf;
use super::outbound::OutboundOf;
use super::registry::Registry;
use crate::policy::network::{Announce, Network, PublicAddress};

/// Where to find a guest: goes into the next-hop table at `index`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestHop {
    pub index: u16,
    /// `vm1/ipconfig1`.
    pub name: String,
    /// 0 while the device does not exist.
    pub ifindex: u32,
    pub address: IpAddr,
    /// Pinned by the policy; else to be learned from the guest.
    pub mac: Option<[u8; 6]>,
    /// What the guest knows its gateway by.
    pub source_mac: [u8; 6],
}

/// The name of a guest's address everywhere: `vm1/ipconfig1`.
pub(super) fn member_name(network: &Network, interface: usize, configuration: usize) -> String {
    let interface = &network.interfaces[interface];
    format!("{}/{}", interface.name, interface.addresses[configuration].name)
}

/// The name of its next hop in the registry.
pub(super) fn hop_key(network: &Network, interface: usize, configuration: usize) -> String {
    format!("guest:{}", member_name(network, interface, configuration))
}

/// The configurations of a policy in the order of their endpoints: (interface, configuration).
pub(super) fn guests(network: &Network) -> impl Iterator<Item = (usize, usize)> + '_ {
    let interfaces = network.interfaces.iter().enumerate();
    interfaces.flat_map(|(i, interface)| (0..interface.addresses.len()).map(move |c| (i, c)))
}

/// Where the shared address of guests without another way out stands in the policy.
pub(super) const DEFAULT_OUTBOUND: &str = "defaultOutbound";

/// Keys and values of an endpoints map.
type Entries<K> = Vec<(K, u32)>;

/// The tables of this room under construction.
pub(super) struct Edge<'a> {
    pub network: &'a Network,
    pub facts: &'a HostFacts,
    /// Network id of each virtual network.
    pub network_ids: Vec<u16>,
    pub endpoints: Vec<Endpoint>,
    /// Name of each endpoint.
    pub names: Vec<String>,
    /// Endpoint of each (interface, configuration).
    pub numbers: HashMap<(usize, usize), u32>,
    pub hops: Vec<GuestHop>,
    pub devices: Vec<Device>,
    pub missing_devices: Vec<String>,
    pub frontends: Vec<Frontend>,
    pub frontend_numbers: BTreeMap<IpAddr, u32>,
    pub outbound: Vec<OutboundOf>,
    pub units: Vec<u32>,
    pub segments: Vec<Segment>,
    pub listeners: Vec<Listener>,
    /// The same for people.
    pub listeners_of: Vec<ListenerOf>,
    pub slots: Vec<u16>,
    pub owners: Vec<u16>,
    pub reserved_ports: Vec<(u16, u16)>,
    /// (network, address) -> value of the endpoints map.
    at: BTreeMap<(u16, IpAddr), u32>,
    /// Public address, port and protocol -> listener.
    pub listening: BTreeMap<(IpAddr, u16, u8), u32>,
    /// Public address, protocol, and ports that are a rule's whether or not anybody is behind them: first and last.
    pub listener_ports: Vec<(IpAddr, u8, u16, u16)>,
    pub errors: Vec<CompileError>,
}

impl<'a> Edge<'a> {
    pub fn new(network: &'a Network, facts: &'a HostFacts, network_ids: Vec<u16>) -> Self {
        Self {
            network,
            facts,
            network_ids,
            endpoints: Vec::new(),
            names: Vec::new(),
            numbers: HashMap::new(),
            hops: Vec::new(),
            devices: Vec::new(),
            missing_devices: Vec::new(),
            frontends: Vec::new(),
            frontend_numbers: BTreeMap::new(),
            outbound: Vec::new(),
            units: Vec::new(),
            segments: Vec::new(),
            listeners: Vec::new(),
            listeners_of: Vec::new(),
            slots: Vec::new(),
            owners: Vec::new(),
            reserved_ports: Vec::new(),
            at: BTreeMap::new(),
            listening: BTreeMap::new(),
            listener_ports: Vec::new(),
            errors: Vec::new(),
        }
    }

    pub fn error(&mut self, place: String, message: String) {
        self.errors.push(CompileError::new(place, message));
    }

    /// One endpoint for each configuration. Their rulesets and routing ids are filled in by the caller.
    pub fn guests(&mut self, registry: &mut Registry) {
        for (i, c) in guests(self.network) {
            let interface = &self.network.interfaces[i];
            let configuration = &interface.addresses[c];
            let address = configuration.address;
            let name = member_name(self.network, i, c);
            let place = || format!("networkInterfaces/{}", interface.name);
            let network_id = self.network_ids[self.network.subnets[configuration.subnet].network];
            let next_hop = match registry.next_hop(&hop_key(self.network, i, c)) {
                Ok(index) => index,
                Err(full) => return self.error(place(), full.to_string()),
            };
            let number = self.endpoints.len() as u32;
            if number >= u32::from(u16::MAX) {
                return self.error(place(), "more than 65,535 ip configurations".into());
            }
            match self.at.entry((network_id, address)) {
                Entry::Vacant(free) => _ = free.insert(endpoint_value(AT_GUEST, number)),
                Entry::Occupied(_) => {
                    self.error(place(), format!("{name}: another ip configuration has {address} too"));
                    continue;
                }
            }
            let device = self.facts.devices.get(&interface.device);
            self.hops.push(GuestHop {
                index: next_hop,
                name: name.clone(),
                ifindex: device.map_or(0, |d| d.ifindex),
                address,
                mac: interface.mac,
                source_mac: device.map_or([0; 6], |d| d.answers_with()),
            });
            self.endpoints.push(Endpoint {
                address: v4(address),
                address6: v6(address),
                network: network_id,
                routing: network_id,
                next_hop,
                v6: u8::from(address.is_ipv6()),
                instance: u8::from(self.instance(i, c).is_some()),
                instance_address: self.instance(i, c).map_or([0; 4], |public| words(public.address)),
                gateway: self.gateway(configuration.subnet, address).map_or([0; 4], words),
                ..Endpoint::default()
            });
            self.numbers.insert((i, c), number);
            self.names.push(name);
        }
    }

    /// The instance-level address of a configuration.
    pub fn instance(&self, interface: usize, configuration: usize) -> Option<&'a PublicAddress> {
        let configuration = &self.network.interfaces[interface].addresses[configuration];
        let public = &self.network.public_addresses[configuration.public_address?];
        (configuration.address.is_ipv4() == public.address.is_ipv4()).then_some(public)
    }

    /// The gateway a guest with this address has in its subnet.
    fn gateway(&self, subnet: usize, address: IpAddr) -> Option<IpAddr> {
        let gateways = &self.network.subnets[subnet].gateways;
        gateways.iter().copied().find(|gateway| gateway.is_ipv6() == address.is_ipv6())
    }

    /// The endpoint of the guest that has an address in a virtual network.
    pub fn guest_at(&self, network: u16, address: IpAddr) -> Option<u32> {
        let value = *self.at.get(&(network, address))?;
        (value >> 24 == AT_GUEST).then_some(value & 0xff_ffff)
    }

    /// The devices that get programs. One that does not exist yet is only listed.
    pub fn devices(&mut self) {
        let mut wanted: BTreeMap<&str, (u8, u16)> = BTreeMap::new();
        let mut guests: BTreeMap<&str, usize> = BTreeMap::new();
        for uplink in &self.network.uplinks {
            wanted.insert(&uplink.device, (DEVICE_UPLINK, WORLD));
        }
        for interface in &self.network.interfaces {
            *guests.entry(&interface.device).or_default() += 1;
            for configuration in &interface.addresses {
                let place = format!("networkInterfaces/{}", interface.name);
                let network = self.network_ids[self.network.subnets[configuration.subnet].network];
                match *wanted.entry(&interface.device).or_insert((DEVICE_GUEST, network)) {
                    (DEVICE_UPLINK, _) => {
                        self.error(place, format!("device {} is an uplink", interface.device));
                    }
                    (_, other) if other != network => {
                        let message =
                            format!("device {} carries guests of two virtual networks", interface.device);
                        self.error(place, message);
                    }
                    _ => {}
                }
            }
        }
        for (name, (kind, network)) in wanted {
            match self.facts.devices.get(name) {
                Some(facts) => self.devices.push(Device {
                    ifindex: facts.ifindex,
                    kind,
                    network,
                    mac: facts.answers_with(),
                    strict: if kind == DEVICE_UPLINK || guests.get(name).is_some_and(|n| *n > 1) {
                        u32::MAX
                    } else {
                        0
                    },
                    ..Device::default()
                }),
                None => self.missing_devices.push(name.into()),
            }
        }
    }

    /// Instance-level addresses, frontends, and what is left of the public addresses.
    pub fn public_addresses(&mut self) {
        for (i, c) in guests(self.network) {
            let (Some(public), Some(&number)) = (self.instance(i, c), self.numbers.get(&(i, c))) else {
                continue;
            };
            let value = endpoint_value(AT_INSTANCE | proxy(public), number);
            if self.at.insert((WORLD, public.address), value).is_some() {
                let message = format!("{} is already the address of another ip configuration", public.name);
                self.error(format!("networkInterfaces/{}", self.network.interfaces[i].name), message);
            }
        }
        for balancer in &self.network.load_balancers {
            for frontend in &balancer.frontends {
                let place =
                    || format!("loadBalancers/{}/frontendIPConfigurations/{}", balancer.name, frontend.name);
                for &public in &frontend.public_addresses {
                    self.frontend(public, place);
                }
            }
        }
        for &public in self.network.default_outbound.iter().flat_map(|d| &d.public_addresses) {
            self.frontend(public, || DEFAULT_OUTBOUND.into());
        }
        for public in &self.network.public_addresses {
            // The host's own address stays the host's while no part of the policy takes it.
            let kind = if public.announce == Announce::Address { AT_HOST } else { AT_UNUSED | proxy(public) };
            self.at.entry((WORLD, public.address)).or_insert(endpoint_value(kind, 0));
        }
    }

    /// A public address that several guests leave under, or behind which something listens.
    fn frontend(&mut self, public: usize, place: impl Fn() -> String) {
        let public = &self.network.public_addresses[public];
        if self.frontend_numbers.contains_key(&public.address) {
            return;
        }
        let number = self.frontends.len() as u32;
        if number > u32::from(u16::MAX) {
            return self.error(place(), "more than 65,536 frontend addresses".into());
        }
        let value = endpoint_value(AT_FRONTEND | proxy(public), number);
        if self.at.insert((WORLD, public.address), value).is_some() {
            self.error(place(), format!("{} is an instance-level public IP already", public.name));
        }
        let flags = if public.announce == Announce::Address { FRONTEND_HOST } else { 0 };
        self.frontends.push(Frontend {
            address: v4(public.address),
            flags,
            address6: v6(public.address),
            ..Frontend::default()
        });
        self.frontend_numbers.insert(public.address, number);
    }

    /// Gateways of subnets, and the host's own addresses.
    pub fn host_addresses(&mut self) {
        for subnet in &self.network.subnets {
            let id = self.network_ids[subnet.network];
            for &gateway in &subnet.gateways {
                let value = *self.at.entry((id, gateway)).or_insert(endpoint_value(AT_HOST, 0));
                if value != endpoint_value(AT_HOST, 0) {
                    let network = &self.network.virtual_networks[subnet.network].name;
                    let place = format!("virtualNetworks/{network}/subnets/{}", subnet.name);
                    self.error(place, format!("the gateway {gateway} is the address of a guest"));
                }
            }
        }
        for &address in self.facts.addresses.iter().filter(|a| !a.is_loopback()) {
            self.at.entry((WORLD, address)).or_insert(endpoint_value(AT_HOST, 0));
            // A destination inside the sender's virtual network is looked up there only.
            for (network, &id) in self.network.virtual_networks.iter().zip(&self.network_ids) {
                if network.address_space.iter().any(|space| space.contains(&address)) {
                    self.at.entry((id, address)).or_insert(endpoint_value(AT_HOST, 0));
                }
            }
        }
    }

    /// The entries of the endpoints maps of both families, by network and address.
    pub fn entries(&self) -> (Entries<EndpointKey>, Entries<EndpointKey6>) {
        let mut of4 = Vec::new();
        let mut of6 = Vec::new();
        let mut entry = |network, address: IpAddr, port: u16, protocol, value| match address {
            IpAddr::V4(_) => of4.push((
                EndpointKey {
                    address: v4(address),
                    network,
                    port: port.to_be(),
                    protocol,
                    ..EndpointKey::default()
                },
                value,
            )),
            IpAddr::V6(_) => of6.push((
                EndpointKey6 {
                    address: v6(address),
                    network,
                    port: port.to_be(),
                    protocol,
                    ..EndpointKey6::default()
                },
                value,
            )),
        };
        for (&(network, address), &value) in &self.at {
            entry(network, address, 0, 0, value);
        }
        for (&(address, port, protocol), &listener) in &self.listening {
            entry(WORLD, address, port, protocol, endpoint_value(AT_LISTENER, listener));
        }
        (of4, of6)
    }
}

fn proxy(public: &PublicAddress) -> u32 {
    if public.announce == Announce::Proxy { AT_PROXY } else { 0 }
}

/// An address as endpoints have it: of IPv4 the first word.
fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(_) => [v4(address), 0, 0, 0],
        IpAddr::V6(_) => v6(address),
    }
}
