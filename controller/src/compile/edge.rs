//! Everything that stands at an address or a device: guests, public addresses, gateways, next hops, SNAT ports.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::layout::{DEVICE_GUEST, DEVICE_UPLINK, Device, WORLD, v4, v6};
use portcullis_common::policy::{
    ADDRESS_UNITS, ALLOC_ECHO, ALLOC_TCP, ALLOC_UDP, AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_PROXY,
    AT_UNUSED, Alloc, Endpoint, EndpointKey, EndpointKey6, FRONTEND_HOST, Frontend, Listener, Segment,
    UNIT_PORTS, endpoint_value, owner_entry,
};

use super::error::CompileError;
use super::facts::HostFacts;
use super::ports::{self, Ownership, Pool, PoolFrontend};
use super::registry::Registry;
use crate::policy::network::{Announce, Network, OutboundRule, PublicAddress, TransportProtocol};

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

fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
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

/// Keys and values of an endpoints map.
type Entries<K> = Vec<(K, u32)>;

/// The tables of this room under construction.
pub(super) struct Edge<'a> {
    network: &'a Network,
    facts: &'a HostFacts,
    /// Network id of each virtual network.
    pub network_ids: Vec<u16>,
    pub endpoints: Vec<Endpoint>,
    /// Name of each endpoint.
    pub names: Vec<String>,
    /// Endpoint of each (interface, configuration).
    numbers: HashMap<(usize, usize), u32>,
    pub hops: Vec<GuestHop>,
    pub devices: Vec<Device>,
    pub missing_devices: Vec<String>,
    pub frontends: Vec<Frontend>,
    frontend_numbers: BTreeMap<Ipv4Addr, u32>,
    pub units: Vec<u32>,
    pub segments: Vec<Segment>,
    pub listeners: Vec<Listener>,
    pub slots: Vec<u16>,
    pub owners: Vec<u16>,
    pub reserved_ports: Vec<(u16, u16)>,
    /// (network, address) -> value of the endpoints map.
    at: BTreeMap<(u16, IpAddr), u32>,
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
            units: Vec::new(),
            segments: Vec::new(),
            listeners: Vec::new(),
            slots: Vec::new(),
            owners: Vec::new(),
            reserved_ports: Vec::new(),
            at: BTreeMap::new(),
            errors: Vec::new(),
        }
    }

    fn error(&mut self, place: String, message: String) {
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

    /// The instance-level address of a configuration. Only IPv4 is translated.
    fn instance(&self, interface: usize, configuration: usize) -> Option<&'a PublicAddress> {
        let configuration = &self.network.interfaces[interface].addresses[configuration];
        let public = &self.network.public_addresses[configuration.public_address?];
        (configuration.address.is_ipv4() && public.address.is_ipv4()).then_some(public)
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
        for uplink in &self.network.uplinks {
            wanted.insert(&uplink.device, (DEVICE_UPLINK, WORLD));
        }
        for interface in &self.network.interfaces {
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
                let public = &self.network.public_addresses[frontend.public_addresses[0]];
                let Some(address) = ipv4(public.address) else { continue };
                if self.frontend_numbers.contains_key(&address) {
                    continue;
                }
                let number = self.frontends.len() as u32;
                let value = endpoint_value(AT_FRONTEND | proxy(public), number);
                if self.at.insert((WORLD, public.address), value).is_some() {
                    let place =
                        format!("loadBalancers/{}/frontendIPConfigurations/{}", balancer.name, frontend.name);
                    self.error(place, format!("{} is an instance-level public IP already", public.name));
                }
                let flags = if public.announce == Announce::Address { FRONTEND_HOST } else { 0 };
                self.frontends.push(Frontend {
                    address: v4(public.address),
                    flags,
                    address6: v6(public.address),
                    ..Frontend::default()
                });
                self.frontend_numbers.insert(address, number);
            }
        }
        for public in &self.network.public_addresses {
            if public.address.is_ipv6() {
                continue;
            }
            // The host's own address stays the host's while no part of the policy takes it.
            let kind = if public.announce == Announce::Address { AT_HOST } else { AT_UNUSED | proxy(public) };
            self.at.entry((WORLD, public.address)).or_insert(endpoint_value(kind, 0));
        }
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

    /// Hands out SNAT ports to the members of outbound rules.
    pub fn outbound(&mut self, registry: &mut Registry, previous: &Ownership) -> Ownership {
        let reserve = self.network.uplinks.iter().any(|u| u.reserve_host_ports);
        let mut pools = Vec::new();
        // Number of the rule's place for each endpoint.
        let mut rule_of: HashMap<u32, String> = HashMap::new();
        for balancer in &self.network.load_balancers {
            for rule in &balancer.outbound_rules {
                let place = format!("loadBalancers/{}/outboundRules/{}", balancer.name, rule.name);
                let mut frontends: Vec<PoolFrontend> = Vec::new();
                for &frontend in &rule.frontends {
                    let public =
                        &self.network.public_addresses[balancer.frontends[frontend].public_addresses[0]];
                    let Some(address) = ipv4(public.address) else { continue };
                    if frontends.iter().any(|f| f.address == address) {
                        continue;
                    }
                    let shared = public.announce == Announce::Address && !reserve;
                    let eligible = if shared {
                        ports::beside_host(self.facts.ephemeral)
                    } else {
                        ports::whole_address()
                    };
                    frontends.push(PoolFrontend { address, eligible });
                }
                if frontends.is_empty() {
                    continue; // An IPv6 rule.
                }
                let idle_class =
                    match rule.idle_timeout_seconds.map_or(Ok(0), |seconds| registry.idle_class(seconds)) {
                        Ok(class) => class,
                        Err(full) => {
                            self.error(place.clone(), full.to_string());
                            continue;
                        }
                    };
                let mut members = Vec::new();
                for member in &balancer.pools[rule.pool].members {
                    let Some(&number) = self.numbers.get(member) else { continue };
                    if self.endpoints[number as usize].address == 0 {
                        continue; // IPv6 is not translated.
                    }
                    match rule_of.get(&number) {
                        Some(other) if *other == place => continue,
                        Some(other) => {
                            let message = format!(
                                "{} is in the pool of {other} already; an address has one outbound rule",
                                self.names[number as usize]
                            );
                            self.error(place.clone(), message);
                            continue;
                        }
                        None => _ = rule_of.insert(number, place.clone()),
                    }
                    let endpoint = &mut self.endpoints[number as usize];
                    for &which in allocations(rule) {
                        endpoint.alloc[which] = Alloc { segments: 1, idle_class, ..Alloc::default() };
                    }
                    members.push(self.names[number as usize].clone());
                }
                let allocated_outbound_ports = rule.allocated_outbound_ports;
                pools.push(Pool { place, frontends, members, allocated_outbound_ports });
            }
        }
        let ownership = match ports::allocate(previous, &pools) {
            Ok(ownership) => ownership,
            Err(errors) => {
                self.errors.extend(errors);
                return previous.clone();
            }
        };
        self.unit_tables(&pools, &ownership);
        if reserve {
            let hosts = self
                .frontend_numbers
                .iter()
                .filter(|&(_, &number)| self.frontends[number as usize].flags & FRONTEND_HOST != 0);
            self.reserved_ports = ports::merge(hosts.flat_map(|(&a, _)| ownership.port_ranges(a)).collect());
        }
        ownership
    }

    /// The same ownership twice: by endpoint, to find a port for it, and by port, to find whose it is.
    fn unit_tables(&mut self, pools: &[Pool], ownership: &Ownership) {
        let by_name: HashMap<&str, usize> =
            self.names.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
        let mut units: Vec<Vec<u32>> = vec![Vec::new(); self.endpoints.len()];
        self.owners = vec![0; self.frontends.len() * 2 * ADDRESS_UNITS as usize];
        // In the order of the rule's frontends, so that the first is used up first.
        let mut done = Vec::new();
        for frontend in pools.iter().flat_map(|pool| &pool.frontends) {
            if done.contains(&frontend.address) {
                continue;
            }
            done.push(frontend.address);
            let number = self.frontend_numbers[&frontend.address];
            for (&unit, member) in ownership.frontends.get(&frontend.address).into_iter().flatten() {
                let endpoint = by_name[member.as_str()];
                units[endpoint].push(number << 16 | u32::from(unit));
                for udp in [false, true] {
                    self.owners[owner_entry(number, udp, unit.into()) as usize] = endpoint as u16 + 1;
                }
            }
        }
        for (endpoint, units) in self.endpoints.iter_mut().zip(units) {
            let first_segment = self.segments.len() as u32;
            for alloc in endpoint.alloc.iter_mut().filter(|alloc| alloc.segments != 0) {
                alloc.first_segment = first_segment;
                alloc.ports = units.len() as u32 * UNIT_PORTS;
            }
            self.segments.push(Segment { first_unit: self.units.len() as u32, units: units.len() as u32 });
            self.units.extend(units);
        }
    }

    /// The entries of the endpoints maps of both families, by network and address.
    pub fn entries(&self) -> (Entries<EndpointKey>, Entries<EndpointKey6>) {
        let mut of4 = Vec::new();
        let mut of6 = Vec::new();
        for (&(network, address), &value) in &self.at {
            match address {
                IpAddr::V4(_) => {
                    of4.push((EndpointKey { address: v4(address), network, ..EndpointKey::default() }, value))
                }
                IpAddr::V6(_) => of6
                    .push((EndpointKey6 { address: v6(address), network, ..EndpointKey6::default() }, value)),
            }
        }
        (of4, of6)
    }
}

fn proxy(public: &PublicAddress) -> u32 {
    if public.announce == Announce::Proxy { AT_PROXY } else { 0 }
}

/// The allocations of its members that a rule fills.
fn allocations(rule: &OutboundRule) -> &'static [usize] {
    match rule.protocol {
        TransportProtocol::Tcp => &[ALLOC_TCP],
        TransportProtocol::Udp => &[ALLOC_UDP],
        TransportProtocol::All => &[ALLOC_TCP, ALLOC_UDP, ALLOC_ECHO],
    }
}

/// An address as endpoints have it: of IPv4 the first word.
fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(_) => [v4(address), 0, 0, 0],
        IpAddr::V6(_) => v6(address),
    }
}
