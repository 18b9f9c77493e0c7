//! Random small networks in which every kind of term, level and platform rule occurs, and packets from their corners.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use portcullis::answers::addresses::AddressSet;
use portcullis::answers::expand::Terms;
use portcullis::answers::trace::Packet;
use portcullis::policy::network::{
    Access, AddressMatch, ApplicationGroup, Direction, IpConfiguration, Network, PlatformService, Route,
    RouteHop, RouteTable, RuleProtocol, SecurityRule, ServiceTag, TagDefinition, TransportProtocol,
};

use crate::compile_support::{Random, group, guest, rule, subnet, virtual_network};

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

pub fn route(name: &str, prefix: &str, next_hop: RouteHop) -> Route {
    Route { name: name.into(), prefix: prefix.parse().unwrap(), next_hop }
}

/// A TCP packet.
pub fn tcp(source: &str, source_port: u16, destination: &str, destination_port: u16) -> Packet {
    Packet { source: ip(source), destination: ip(destination), source_port, destination_port, protocol: 6 }
}

/// Three virtual networks (the first two peered), a route table on one subnet, application groups, two tags, both
/// families, and groups of `rules` random rules in each direction at both levels.
pub fn random_network(random: &mut Random, rules: usize) -> Network {
    let mut net = Network {
        virtual_networks: vec![
            virtual_network("a", 1, &["10.0.0.0/16", "fd00:a::/48"]),
            virtual_network("b", 2, &["10.1.0.0/16", "fd00:b::/48"]),
            virtual_network("c", 3, &["10.0.0.0/16", "20.0.0.0/24"]),
        ],
        subnets: vec![
            subnet("a1", 0, "10.0.1.0/24", "10.0.1.1", Some(0)),
            subnet("a2", 0, "10.0.2.0/24", "10.0.2.1", None),
            subnet("b1", 1, "10.1.1.0/24", "10.1.1.1", Some(1)),
            subnet("c1", 2, "10.0.1.0/24", "10.0.1.1", Some(0)),
        ],
        application_groups: vec![
            ApplicationGroup { name: "web".into(), network: Some(0) },
            ApplicationGroup { name: "db".into(), network: Some(0) },
            ApplicationGroup { name: "none".into(), network: None },
        ],
        tags: vec![
            TagDefinition {
                name: "Corp".into(),
                prefixes: nets(&["198.51.100.0/24", "10.9.0.0/16", "2001:db8:5::/48"]).into(),
            },
            TagDefinition {
                name: "Storage.West".into(),
                prefixes: nets(&["20.0.0.0/25", "52.1.0.0/16", "2603:1030::/40"]).into(),
            },
        ],
        route_tables: vec![RouteTable {
            name: "rt".into(),
            routes: vec![
                route("vpn", "192.168.7.0/24", RouteHop::VirtualNetworkGateway),
                route("fw", "0.0.0.0/0", RouteHop::VirtualAppliance(ip("10.0.1.9"))),
                route("hole", "172.20.0.0/16", RouteHop::None),
                route("out", "8.8.8.0/24", RouteHop::Internet),
                route("vpn6", "fd77::/32", RouteHop::VirtualNetworkGateway),
            ],
            widen_virtual_network: random.chance(30),
        }],
        ..Network::default()
    };
    net.virtual_networks[0].peers = vec![1];
    net.virtual_networks[1].peers = vec![0];
    net.subnets[0].prefixes.extend(nets(&["fd00:a:0:1::/64"]));
    net.subnets[1].route_table = Some(0);
    net.platform.allow_kms = random.chance(60);
    net.platform.block_smtp = random.chance(60);
    net.platform.services = vec![
        PlatformService {
            name: "dns".into(),
            address: Ipv4Addr::new(168, 63, 129, 16),
            protocol: TransportProtocol::All,
            port: 53,
        },
        PlatformService {
            name: "imds".into(),
            address: Ipv4Addr::new(169, 254, 169, 254),
            protocol: TransportProtocol::Tcp,
            port: 80,
        },
    ];
    let place =
        [("a", [10, 0, 1, 4], 0), ("b", [10, 0, 2, 4], 1), ("c", [10, 1, 1, 4], 2), ("d", [10, 0, 1, 4], 3)];
    for (i, (name, address, subnet)) in place.into_iter().enumerate() {
        net.interfaces.push(guest(&format!("vm-{name}"), address.into(), subnet, (i % 2 == 0).then_some(2)));
    }
    net.interfaces[0].addresses[0].application_groups = vec![0];
    net.interfaces[1].addresses[0].application_groups = vec![0, 1];
    net.interfaces[0].addresses.push(IpConfiguration {
        name: "ipconfig6".into(),
        address: ip("fd00:a:0:1::4"),
        subnet: 0,
        public_address: None,
        application_groups: vec![1],
    });
    for index in 0..3 {
        let mut all = Vec::new();
        for direction in [Direction::Inbound, Direction::Outbound] {
            for i in 0..rules {
                all.push(random_rule(random, direction, &format!("r{i}"), 100 + i as u16 * 7));
            }
        }
        net.groups.push(group(&format!("g{index}"), all));
    }
    net
}

pub fn random_rule(random: &mut Random, direction: Direction, name: &str, priority: u16) -> SecurityRule {
    let mut r = rule(direction, name, priority);
    r.access = if random.chance(55) { Access::Allow } else { Access::Deny };
    r.protocol = *random.pick(&[
        RuleProtocol::Any,
        RuleProtocol::Any,
        RuleProtocol::Tcp,
        RuleProtocol::Tcp,
        RuleProtocol::Udp,
        RuleProtocol::Icmp,
        RuleProtocol::Esp,
        RuleProtocol::Ah,
    ]);
    r.source = random_side(random);
    r.destination = random_side(random);
    if matches!(r.protocol, RuleProtocol::Any | RuleProtocol::Tcp | RuleProtocol::Udp) {
        r.source_ports = random_ports(random, 20);
        r.destination_ports = random_ports(random, 60);
    }
    r
}

fn random_side(random: &mut Random) -> Vec<AddressMatch> {
    let prefixes = [
        "10.0.0.0/8",
        "10.0.1.0/24",
        "10.0.1.4/32",
        "10.0.2.0/24",
        "10.1.0.0/16",
        "0.0.0.0/0",
        "0.0.0.0/1",
        "128.0.0.0/1",
        "198.51.100.7/32",
        "52.1.2.0/24",
        "fd00:a::/48",
        "fd00:a:0:1::4/128",
        "::/0",
        "2603:1030::/48",
        "168.63.129.16/32",
    ];
    let tags = [
        ServiceTag::VirtualNetwork,
        ServiceTag::VirtualNetwork,
        ServiceTag::Internet,
        ServiceTag::Internet,
        ServiceTag::AzureLoadBalancer,
        ServiceTag::AzurePlatformDns,
        ServiceTag::AzurePlatformImds,
        ServiceTag::AzurePlatformLkm,
        ServiceTag::Named(0),
        ServiceTag::Named(1),
    ];
    match random.below(10) {
        0..3 => vec![AddressMatch::Any],
        3..6 => (0..1 + random.below(3))
            .map(|_| AddressMatch::Prefix(random.pick(&prefixes).parse().unwrap()))
            .collect(),
        6..9 => vec![AddressMatch::Tag(*random.pick(&tags))],
        _ => vec![AddressMatch::Application(random.below(3))],
    }
}

fn random_ports(random: &mut Random, percent: usize) -> Vec<(u16, u16)> {
    if !random.chance(percent) {
        return vec![(0, 65535)];
    }
    let lists: [&[(u16, u16)]; 7] = [
        &[(80, 80)],
        &[(25, 25)],
        &[(53, 53), (1688, 1688)],
        &[(0, 1023)],
        &[(1024, 65535)],
        &[(22, 22), (3389, 3389)],
        &[(1, 65535)],
    ];
    random.pick(&lists).to_vec()
}

/// Addresses at the edges of everything the policy can tell apart in a subnet, and their neighbours.
pub fn corners(net: &Network, subnet: usize) -> Vec<IpAddr> {
    let mut terms = Terms::new(net, subnet);
    let mut all: Vec<IpAddr> =
        ["0.0.0.0", "255.255.255.255", "1.1.1.1", "::", "2001:db8::1", "169.254.169.254"].map(ip).to_vec();
    for group in &net.groups {
        for rule in &group.rules {
            for term in rule.source.iter().chain(&rule.destination) {
                let set: AddressSet = terms.term(term).as_ref().clone();
                for family in portcullis::answers::addresses::Family::BOTH {
                    for &(first, last) in set.ranges(family) {
                        let edges = [Some(first), Some(last), first.checked_sub(1), last.checked_add(1)];
                        all.extend(
                            edges
                                .into_iter()
                                .flatten()
                                .filter(|n| *n <= family.last())
                                .map(|n| family.address(n)),
                        );
                    }
                }
            }
        }
    }
    all.sort_unstable();
    all.dedup();
    all
}

/// A packet from corners; both ends of one family.
pub fn random_packet(random: &mut Random, corners: &[IpAddr]) -> Packet {
    let ports = [0, 1, 22, 24, 25, 26, 53, 80, 81, 1023, 1024, 1688, 3389, 65535];
    let source = *random.pick(corners);
    let destination = loop {
        let other = *random.pick(corners);
        if other.is_ipv4() == source.is_ipv4() {
            break other;
        }
    };
    let protocol = *random.pick(&[6, 6, 6, 17, 17, if source.is_ipv4() { 1 } else { 58 }, 50, 51, 47]);
    let mut port = || if matches!(protocol, 6 | 17) { *random.pick(&ports) } else { 0 };
    let (source_port, destination_port) = (port(), port());
    Packet { source, destination, source_port, destination_port, protocol }
}
