//! Random policies that use everything a rule can name, and packets from the corners of their rules.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis::compile::lookup::PacketKey;
use portcullis::policy::network::{
    Access, AddressMatch, ApplicationGroup, Direction, IpConfiguration, Network, PlatformService, Route,
    RouteHop, RouteTable, RuleProtocol, SecurityRule, ServiceTag, TagDefinition, TransportProtocol,
};

use super::{Random, group, guest, rule, subnet, virtual_network};

const PROTOCOLS: [u8; 9] = [6, 6, 17, 17, 1, 58, 50, 51, 47];

fn random_prefix(random: &mut Random) -> Ipv4Net {
    // Few bits vary, so that prefixes nest and repeat.
    let bases =
        [0x0a00_0000, 0x0a01_0200, 0xcb00_7100, 0xa83f_8110, 0xc0a8_0000, 0x1400_0000, 0xffff_ff00, 0];
    let base: u32 = *random.pick(&bases);
    let len = *random.pick(&[0, 1, 4, 8, 9, 12, 16, 22, 24, 25, 28, 30, 31, 32, 32, 32]);
    let noise = random.next() as u32 & *random.pick(&[0, 0xff, 0xf0f, 0x0100_00ff]);
    Ipv4Net::new(Ipv4Addr::from(base ^ noise), len).unwrap().trunc()
}

fn random_prefix6(random: &mut Random) -> Ipv6Net {
    let bases: [u128; 6] = [
        0xfd00_000a << 96,
        0xfd00_000a_0000_0001 << 64,
        0xfd00_000b << 96,
        0x2001_0db8 << 96,
        0x2603_1000 << 96,
        0xffff << 32,
    ];
    let len = *random.pick(&[0, 1, 3, 8, 16, 28, 32, 40, 48, 63, 64, 65, 96, 112, 127, 128, 128]);
    let noise = u128::from(random.next()) & *random.pick(&[0, 0xff, 0xf0f]);
    let high = u128::from(random.next() & *random.pick(&[0, 0, 3])) << *random.pick(&[64, 80, 96]);
    Ipv6Net::new((*random.pick(&bases) ^ noise ^ high).into(), len).unwrap().trunc()
}

fn random_net(random: &mut Random) -> IpNet {
    if random.chance(40) { random_prefix6(random).into() } else { random_prefix(random).into() }
}

fn random_side(random: &mut Random, network: &Network) -> Vec<AddressMatch> {
    if random.chance(20) {
        return vec![AddressMatch::Any];
    }
    let one = |random: &mut Random| match random.below(18) {
        0 => AddressMatch::Tag(ServiceTag::VirtualNetwork),
        1 => AddressMatch::Tag(ServiceTag::Internet),
        2 => AddressMatch::Tag(ServiceTag::AzureLoadBalancer),
        3 => AddressMatch::Tag(*random.pick(&[
            ServiceTag::AzurePlatformDns,
            ServiceTag::AzurePlatformImds,
            ServiceTag::AzurePlatformLkm,
        ])),
        4 | 5 => AddressMatch::Tag(ServiceTag::Named(random.below(network.tags.len()))),
        6 | 7 => AddressMatch::Application(random.below(network.application_groups.len())),
        _ => AddressMatch::Prefix(random_net(random)),
    };
    (0..=random.below(5)).map(|_| one(random)).collect()
}

fn random_ports(random: &mut Random) -> Vec<(u16, u16)> {
    let mut ranges: Vec<(u16, u16)> = match random.below(4) {
        0 | 1 => return vec![(0, 65535)],
        2 => {
            let port = *random.pick(&[0u16, 22, 80, 443, 65535]);
            return vec![(port, port)];
        }
        _ => (0..=random.below(3)).map(|_| (random.next() as u16, random.next() as u16)).collect(),
    };
    for range in &mut ranges {
        *range = (range.0.min(range.1), range.0.max(range.1));
    }
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.0 <= last.1.saturating_add(1) => last.1 = last.1.max(range.1),
            _ => merged.push(range),
        }
    }
    merged
}

pub fn random_rule(
    random: &mut Random,
    network: &Network,
    direction: Direction,
    priority: u16,
) -> SecurityRule {
    SecurityRule {
        access: *random.pick(&[Access::Allow, Access::Deny]),
        protocol: *random.pick(&[
            RuleProtocol::Any,
            RuleProtocol::Any,
            RuleProtocol::Tcp,
            RuleProtocol::Tcp,
            RuleProtocol::Udp,
            RuleProtocol::Icmp,
            RuleProtocol::Esp,
            RuleProtocol::Ah,
        ]),
        source: random_side(random, network),
        destination: random_side(random, network),
        source_ports: random_ports(random),
        destination_ports: random_ports(random),
        ..rule(direction, &format!("r{priority}"), priority)
    }
}

/// Three virtual networks of both families, two of them peered and one with the addresses of another; route tables,
/// tags, application groups, the platform's rules; and groups at subnets and interfaces that use all of it.
pub fn random_network(random: &mut Random, most_rules: usize) -> Network {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let mut network = Network {
        virtual_networks: vec![
            virtual_network("private", 1, &["10.0.0.0/8", "fd00:a::/32"]),
            virtual_network("peer", 2, &["192.168.0.0/24", "20.0.0.0/16", "fd00:b::/32", "2001:db8:b::/48"]),
            virtual_network("twin", 3, &["10.0.0.0/16", "203.0.113.0/28", "fd00::/8"]),
        ],
        subnets: vec![
            subnet("a", 0, "10.9.0.0/24", "10.9.0.1", Some(0)),
            subnet("routed", 0, "10.9.1.0/24", "10.9.1.1", Some(0)),
            subnet("widened", 0, "10.9.2.0/24", "10.9.2.1", Some(1)),
            subnet("b", 1, "20.0.9.0/24", "20.0.9.1", Some(1)),
            subnet("c", 2, "10.0.9.0/24", "10.0.9.1", Some(2)),
            subnet("c-routed", 2, "10.0.8.0/24", "10.0.8.1", None),
        ],
        ..Network::default()
    };
    network.virtual_networks[0].peers = vec![1];
    network.virtual_networks[1].peers = vec![0];
    for (subnet, table) in [(1, 0), (2, 1), (5, 0)] {
        network.subnets[subnet].route_table = Some(table);
    }
    for (number, (subnet, group)) in
        [(0, Some(1)), (0, None), (1, Some(3)), (2, Some(2)), (3, Some(1)), (4, Some(3)), (5, Some(2))]
            .into_iter()
            .enumerate()
    {
        let IpNet::V4(prefix) = network.subnets[subnet].prefixes[0] else { unreachable!() };
        let v4 = Ipv4Addr::from(u32::from(prefix.network()) + 4 + number as u32);
        let vnet = network.subnets[subnet].network;
        let v6 = 0xfd00_000a_u128 + vnet as u128;
        let mut interface = guest(&format!("vm{number}"), v4, subnet, group);
        // The second network's twin has the addresses of the first.
        let last = if vnet == 2 { number - 5 } else { number } as u128;
        interface.addresses.push(IpConfiguration {
            name: "ipconfig6".into(),
            address: IpAddr::V6(((if vnet == 2 { 0xfd00_000a } else { v6 }) << 96 | (4 + last)).into()),
            subnet,
            public_address: None,
            // One group per network, and one that only IPv6 is in.
            application_groups: vec![vnet, vnet + 4],
        });
        interface.addresses[0].application_groups = if number % 2 == 0 { vec![vnet] } else { vec![] };
        network.interfaces.push(interface);
    }
    let application = |name: &str, network| ApplicationGroup { name: name.into(), network };
    network.application_groups = vec![
        application("a", Some(0)),
        application("b", Some(1)),
        application("c", Some(2)),
        application("empty", None),
        application("a6", Some(0)),
        application("b6", Some(1)),
        application("c6", Some(2)),
    ];
    for i in 0..4 {
        let prefixes = (0..[1, 5, 30, 100][i]).map(|_| random_net(random)).filter(|n| n.prefix_len() > 0);
        network.tags.push(TagDefinition { name: format!("Tag{i}"), prefixes: prefixes.collect() });
    }
    for widen in [false, true] {
        let hops = [
            RouteHop::VnetLocal,
            RouteHop::Internet,
            RouteHop::None,
            RouteHop::VirtualNetworkGateway,
            RouteHop::VirtualAppliance("10.9.1.6".parse().unwrap()),
            RouteHop::VirtualAppliance("20.0.9.8".parse().unwrap()),
            RouteHop::VirtualAppliance("fd00:a::5".parse().unwrap()),
            RouteHop::VirtualAppliance("10.77.0.1".parse().unwrap()),
        ];
        let mut prefixes: Vec<IpNet> = (0..8).map(|_| random_net(random)).collect();
        prefixes.extend(["10.0.0.0/8", "20.0.0.0/16", "fd00:b::/32"].map(net));
        if random.chance(70) {
            prefixes.extend(["0.0.0.0/0", "::/0"].map(net));
        }
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes.retain(|_| random.chance(80));
        let route = |(i, prefix)| Route { name: format!("r{i}"), prefix, next_hop: *random.pick(&hops) };
        let routes = prefixes.into_iter().enumerate().map(route).collect();
        network.route_tables.push(RouteTable {
            name: format!("rt{widen}"),
            routes,
            widen_virtual_network: widen,
        });
    }
    network.platform.allow_kms = random.chance(80);
    network.platform.block_smtp = random.chance(80);
    let service = |name: &str, address: [u8; 4], protocol, port| PlatformService {
        name: name.into(),
        address: address.into(),
        protocol,
        port,
    };
    if random.chance(80) {
        network.platform.services = vec![
            service("dns", [168, 63, 129, 16], TransportProtocol::All, 53),
            service("imds", [169, 254, 169, 254], TransportProtocol::Tcp, 80),
            service("agent", [168, 63, 129, 16], TransportProtocol::Tcp, 32526),
        ];
    }
    for g in 0..4 {
        let mut rules = Vec::new();
        for direction in [Direction::Inbound, Direction::Outbound] {
            let mut priorities: Vec<u16> =
                (0..random.below(most_rules)).map(|i| 100 + i as u16 * 3).collect();
            // As in a file: in no order.
            for i in (1..priorities.len()).rev() {
                priorities.swap(i, random.below(i + 1));
            }
            rules.extend(priorities.into_iter().map(|p| random_rule(random, &network, direction, p)));
        }
        network.groups.push(group(&format!("group{g}"), rules));
    }
    network
}

/// All prefixes a policy names somewhere.
pub fn named_prefixes(network: &Network) -> Vec<IpNet> {
    let mut all: Vec<IpNet> = Vec::new();
    all.extend(network.virtual_networks.iter().flat_map(|v| &v.address_space));
    all.extend(network.route_tables.iter().flat_map(|t| &t.routes).map(|r| r.prefix));
    all.extend(network.tags.iter().flat_map(|t| t.prefixes.iter()));
    all.extend(network.interfaces.iter().flat_map(|i| &i.addresses).map(|c| IpNet::from(c.address)));
    all.extend(&network.platform.kms_servers);
    all.extend(["168.63.129.16/32", "169.254.169.254/32", "2000::/3"].map(|n| n.parse::<IpNet>().unwrap()));
    all
}

/// The first or last address of a prefix, or one beside it.
fn edge(random: &mut Random, net: &IpNet) -> IpAddr {
    let last = random.chance(50);
    let step = *random.pick(&[0, 0, 0, 1, u128::MAX]);
    match net {
        IpNet::V4(net) => {
            let edge = u32::from(if last { net.broadcast() } else { net.network() });
            IpAddr::V4(edge.wrapping_add(step as u32).into())
        }
        IpNet::V6(net) => {
            let edge = u128::from(if last { net.broadcast() } else { net.network() });
            IpAddr::V6(edge.wrapping_add(step).into())
        }
    }
}

/// An address at or beside an edge of something that a rule or the rest of the policy names.
pub fn corner_address(
    random: &mut Random,
    network: &Network,
    named: &[IpNet],
    terms: &[AddressMatch],
    v6: bool,
) -> IpAddr {
    let of_family = |net: &&IpNet| matches!(net, IpNet::V6(_)) == v6;
    let from: Vec<IpNet> = match random.pick(terms) {
        AddressMatch::Prefix(net) if random.chance(90) => vec![*net],
        AddressMatch::Tag(ServiceTag::Named(tag)) if random.chance(90) => {
            network.tags[*tag].prefixes.to_vec()
        }
        AddressMatch::Application(group) if random.chance(90) => {
            let all = network.interfaces.iter().flat_map(|i| &i.addresses);
            let members = all.filter(|c| c.application_groups.contains(group));
            members.map(|c| IpNet::from(c.address)).collect()
        }
        _ => Vec::new(),
    };
    let from: Vec<IpNet> = from.iter().filter(of_family).copied().collect();
    let named: Vec<IpNet> = named.iter().filter(of_family).copied().collect();
    match random.below(10) {
        0..=7 if !from.is_empty() => {
            let net = *random.pick(&from);
            edge(random, &net)
        }
        9 if v6 => IpAddr::V6((u128::from(random.next()) << 64 | u128::from(random.next())).into()),
        9 => IpAddr::V4((random.next() as u32).into()),
        _ => {
            let net = *random.pick(&named);
            edge(random, &net)
        }
    }
}

fn corner_port(random: &mut Random, ranges: &[(u16, u16)]) -> u16 {
    let &(first, last) = random.pick(ranges);
    match random.below(6) {
        0 => first,
        1 => last,
        2 => first.wrapping_sub(1),
        3 => last.wrapping_add(1),
        4 => *random.pick(&[0, 22, 80, 443, 65535]),
        _ => random.next() as u16,
    }
}

pub fn corner_packet(
    random: &mut Random,
    network: &Network,
    named: &[IpNet],
    rules: &[SecurityRule],
) -> PacketKey {
    let any = rule(Direction::Inbound, "any", 100);
    let rule = if rules.is_empty() { &any } else { random.pick(rules) };
    let protocol = match rule.protocol {
        RuleProtocol::Tcp if random.chance(90) => 6,
        RuleProtocol::Udp if random.chance(90) => 17,
        _ => *random.pick(&PROTOCOLS),
    };
    let with_ports = matches!(protocol, 6 | 17);
    let v6 = random.chance(40);
    PacketKey {
        source: corner_address(random, network, named, &rule.source, v6),
        destination: corner_address(random, network, named, &rule.destination, v6),
        source_port: if with_ports { corner_port(random, &rule.source_ports) } else { 0 },
        destination_port: if with_ports { corner_port(random, &rule.destination_ports) } else { 0 },
        protocol,
    }
}

/// A packet that is about the rules before the groups.
pub fn platform_packet(random: &mut Random, network: &Network, named: &[IpNet]) -> PacketKey {
    let kms: Vec<IpAddr> = network.platform.kms_servers.iter().map(IpNet::addr).collect();
    let fixed = ["168.63.129.16", "169.254.169.254"].map(|a| a.parse::<IpAddr>().unwrap());
    let (destination, port) = match random.below(4) {
        0 => (*random.pick(&fixed), *random.pick(&[53, 53, 80, 32526, 25])),
        1 => (*random.pick(&kms), 1688),
        _ => {
            let v6 = random.chance(40);
            let any = [AddressMatch::Any];
            (corner_address(random, network, named, &any, v6), *random.pick(&[25, 25, 25, 53, 80, 1688]))
        }
    };
    PacketKey {
        source: random.pick(&network.interfaces).addresses[random.below(2)].address,
        destination,
        source_port: random.next() as u16,
        destination_port: port,
        protocol: *random.pick(&[6, 6, 6, 17]),
    }
}
