//! Policies made by hand, and a small random number generator, for the tests of the compiler.

#![allow(dead_code, reason = "every test file uses its own part of this")]

pub mod pools;
pub mod random_policy;

use std::net::{IpAddr, Ipv4Addr};

use portcullis::compile::{Compiled, DeviceFacts, HostFacts, Ownership, Registry, compile};
use portcullis::policy::network::{
    Access, AddressMatch, Announce, BackendPool, Direction, Frontend, Hook, Interface, IpConfiguration,
    LoadBalancer, Network, OutboundRule, PublicAddress, RuleProtocol, SecurityGroup, SecurityRule, Subnet,
    TransportProtocol, Uplink, VirtualNetwork,
};

/// xorshift64*: reproducible and good enough to pick corners with.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// Seeded by the clock; prints the seed, so that a failure can be repeated.
    pub fn from_clock() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = now.as_nanos() as u64;
        println!("seed {seed}");
        Self::new(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

pub fn prefix(text: &str) -> AddressMatch {
    AddressMatch::Prefix(text.parse().unwrap())
}

/// An Allow rule for everything; change what matters.
pub fn rule(direction: Direction, name: &str, priority: u16) -> SecurityRule {
    SecurityRule {
        name: name.into(),
        description: String::new(),
        priority,
        direction,
        access: Access::Allow,
        protocol: RuleProtocol::Any,
        source: vec![AddressMatch::Any],
        destination: vec![AddressMatch::Any],
        source_ports: vec![(0, 65535)],
        destination_ports: vec![(0, 65535)],
    }
}

pub fn group(name: &str, rules: Vec<SecurityRule>) -> SecurityGroup {
    SecurityGroup { name: name.into(), rules }
}

pub fn virtual_network(name: &str, id: u16, space: &[&str]) -> VirtualNetwork {
    VirtualNetwork {
        name: name.into(),
        id,
        address_space: space.iter().map(|s| s.parse().unwrap()).collect(),
        peers: Vec::new(),
    }
}

pub fn subnet(name: &str, network: usize, prefix: &str, gateway: &str, group: Option<usize>) -> Subnet {
    Subnet {
        default_outbound: false,
        name: name.into(),
        network,
        prefixes: vec![prefix.parse().unwrap()],
        gateways: vec![gateway.parse().unwrap()],
        group,
        route_table: None,
    }
}

/// A guest on device `tap-<name>` with one address, `ipconfig1`.
pub fn guest(name: &str, address: Ipv4Addr, subnet: usize, group: Option<usize>) -> Interface {
    Interface {
        name: name.into(),
        device: format!("tap-{name}"),
        mac: None,
        hook: Hook::Auto,
        group,
        addresses: vec![IpConfiguration {
            name: "ipconfig1".into(),
            address: IpAddr::V4(address),
            subnet,
            public_address: None,
            application_groups: Vec::new(),
        }],
    }
}

pub fn public(name: &str, address: &str, announce: Announce) -> PublicAddress {
    PublicAddress { name: name.into(), address: address.parse().unwrap(), announce }
}

/// One virtual network 10.0.0.0/16, one subnet 10.0.0.0/20, `members` guests behind an outbound rule on
/// 203.0.113.100 (proxy), uplink eth0.
pub fn network(members: usize) -> Network {
    let address = |i: usize| Ipv4Addr::from(0x0a00_0004 + i as u32);
    Network {
        virtual_networks: vec![virtual_network("vnet", 1, &["10.0.0.0/16"])],
        subnets: vec![subnet("default", 0, "10.0.0.0/20", "10.0.0.1", None)],
        interfaces: (1..=members).map(|i| guest(&format!("vm{i}"), address(i), 0, None)).collect(),
        public_addresses: vec![public("web", "203.0.113.100", Announce::Proxy)],
        load_balancers: vec![LoadBalancer {
            name: "lb".into(),
            frontends: vec![Frontend { name: "front".into(), public_addresses: vec![0] }],
            rules: vec![],
            nat_rules: vec![],
            probes: vec![],
            allocation: Default::default(),
            frontend_use: Default::default(),
            pools: vec![BackendPool { name: "pool".into(), members: (0..members).map(|i| (i, 0)).collect() }],
            outbound_rules: vec![OutboundRule {
                name: "out".into(),
                frontends: vec![0],
                pool: 0,
                protocol: TransportProtocol::All,
                allocated_outbound_ports: 0,
                idle_timeout_seconds: Some(240),
                tcp_reset: false,
            }],
        }],
        uplinks: vec![Uplink { device: "eth0".into(), hook: Hook::Auto, reserve_host_ports: false }],
        ..Network::default()
    }
}

/// A host that has all devices of a policy.
pub fn facts(network: &Network) -> HostFacts {
    let guests = network.interfaces.iter().map(|i| &i.device);
    let names = guests.chain(network.uplinks.iter().map(|u| &u.device));
    let device = |(i, name): (usize, &String)| {
        let mac = [2, 0, 0, 0, (i >> 8) as u8, i as u8];
        (name.clone(), DeviceFacts { ifindex: 10 + i as u32, mac, gateway_mac: [0; 6] })
    };
    HostFacts { devices: names.enumerate().map(device).collect(), ..HostFacts::default() }
}

/// Compiles for a host that has never seen a policy.
pub fn fresh(network: &Network) -> Compiled {
    compile(network, &facts(network), &mut Registry::default(), &Ownership::default(), 1).unwrap()
}
