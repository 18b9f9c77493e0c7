//! The classifier's image against a plain linear first match over the policy, for both families, from every subnet.

mod compile_support;
#[path = "../../tests/src/model.rs"]
#[allow(dead_code, reason = "every test file uses its own part of this")]
mod model;

use std::net::{IpAddr, Ipv4Addr};

use compile_support::*;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis::compile::lookup::{self, PacketKey, classify, matches};
use portcullis::compile::{Compiled, HostFacts, Ownership, Registry, RulesetOf, compile};
use portcullis::policy::network::{
    Access, AddressMatch, ApplicationGroup, Direction, IpConfiguration, Network, PlatformService, Route,
    RouteHop, RouteTable, RuleProtocol, SecurityRule, ServiceTag, TagDefinition, TransportProtocol,
};
use portcullis_common::policy::{
    EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM, EXEMPT_OTHER, IN_APPLIANCE, IN_GATEWAY, IN_NETWORK, IN_NOWHERE,
    IN_PLATFORM, IN_WORLD, RULE_ALLOW, RULE_ID, rule_action,
};

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

fn random_rule(random: &mut Random, network: &Network, direction: Direction, priority: u16) -> SecurityRule {
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
fn random_network(random: &mut Random, most_rules: usize) -> Network {
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
            address: IpAddr::V6(((if vnet == 2 { 0xfd00_000a } else { v6 }) << 96 | 4 + last).into()),
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
fn named_prefixes(network: &Network) -> Vec<IpNet> {
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
fn corner_address(
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

fn corner_packet(
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
fn platform_packet(random: &mut Random, network: &Network, named: &[IpNet]) -> PacketKey {
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

fn flow(key: &PacketKey) -> model::Flow {
    model::Flow {
        protocol: key.protocol,
        source: key.source,
        destination: key.destination,
        source_port: key.source_port,
        destination_port: key.destination_port,
    }
}

/// The key of the rule with an id.
fn rule_key(compiled: &Compiled, id: u32) -> String {
    let rule = compiled.rules.iter().find(|r| r.id == id).expect("every rule is listed");
    match &*rule.group {
        "platformRules" => format!("platformRules/{}", rule.name),
        group => format!("{group}/{:?}/{}", rule.direction, rule.name),
    }
}

/// Asks every group's ruleset of a compiled policy about corner packets; answers how many were asked, and how many
/// decided by an own rule.
fn compare(random: &mut Random, network: &Network, compiled: &Compiled, packets: usize) -> (usize, usize) {
    let named = named_prefixes(network);
    let (mut own, mut total) = (0, 0);
    for (number, info) in (1u32..).zip(&compiled.rulesets) {
        let RulesetOf::Group(group) = info.of else { continue };
        for _ in 0..packets {
            let key = corner_packet(random, network, &named, &network.groups[group].rules);
            let subnet = *random.pick(&compiled.contexts[info.context].subnets);
            let expected = model::decide(network, group, info.direction, subnet, &flow(&key));
            let index = classify(compiled, number, &key).expect("the last default rule matches everything");
            let (id, allow) = lookup::rule(compiled, number, index);
            assert_eq!((rule_key(compiled, id), allow), (expected.rule, expected.allow), "{info:?} {key:?}");
            assert_eq!(matches(compiled, number, index, &key), [true; 5]);
            let rule = compiled.rules.iter().find(|r| r.id == id).unwrap();
            assert_eq!(rule.access == Access::Allow, allow);
            own += usize::from(rule.priority <= 4096);
            total += 1;
        }
    }
    (total, own)
}

/// Asks the rules before the groups, and of what they exempt those of the groups that name its tag. Answers how often
/// the first, and how often the second had a word for the packet.
fn compare_platform(
    random: &mut Random,
    network: &Network,
    compiled: &Compiled,
    packets: usize,
) -> (usize, usize) {
    let named = named_prefixes(network);
    let image = lookup::Image { pages: &compiled.pages };
    let places = network.interfaces.iter().flat_map(|interface| {
        interface.addresses.iter().map(|configuration| (interface.group, configuration.subnet))
    });
    let (mut first, mut second) = (0, 0);
    for (number, (nic_group, subnet)) in places.enumerate() {
        let endpoint = image.endpoint(number as u32);
        for _ in 0..packets {
            let key = platform_packet(random, network, &named);
            let expected = model::before_groups(network, subnet, &flow(&key));
            let found = match endpoint.platform_outbound {
                0 => None,
                ruleset => classify(compiled, ruleset, &key)
                    .map(|position| lookup::rule_word(compiled, ruleset, position)),
            };
            let Some(word) = found else {
                assert_eq!(expected, model::Platform::Nothing, "{key:?}");
                continue;
            };
            first += 1;
            let rule = rule_key(compiled, word & RULE_ID);
            if word & RULE_ALLOW == 0 {
                assert_eq!((expected, rule_action(word)), (model::Platform::Blocked(rule), 0), "{key:?}");
                continue;
            }
            let exemption = match rule_action(word) {
                EXEMPT_DNS => model::Exemption::Dns,
                EXEMPT_IMDS => model::Exemption::Imds,
                EXEMPT_LKM => model::Exemption::Kms,
                EXEMPT_OTHER => model::Exemption::Other,
                other => panic!("action {other}"),
            };
            assert_eq!(expected, model::Platform::Exempt(exemption, rule), "{key:?}");
            for (group, ruleset) in [
                (nic_group, endpoint.nic_outbound),
                (network.subnets[subnet].group, endpoint.subnet_outbound),
            ] {
                let Some(group) = group else { continue };
                let expected = model::platform_tag(network, group, subnet, exemption, &flow(&key));
                let ruleset = lookup::platform_ruleset(compiled, ruleset, rule_action(word));
                let position = (ruleset != 0).then(|| classify(compiled, ruleset, &key)).flatten();
                let found = position.map(|position| lookup::rule(compiled, ruleset, position));
                second += usize::from(found.is_some());
                let found = found.map(|(id, allow)| model::Decision { rule: rule_key(compiled, id), allow });
                assert_eq!(found, expected, "{key:?}");
            }
        }
    }
    (first, second)
}

/// Looks addresses up in the spaces of every endpoint's subnet; answers how many were inside, by a route, or outside.
fn compare_spaces(
    random: &mut Random,
    network: &Network,
    compiled: &Compiled,
    addresses: usize,
) -> [usize; 3] {
    let named = named_prefixes(network);
    let image = lookup::Image { pages: &compiled.pages };
    let places: Vec<(usize, usize)> = (0..network.interfaces.len())
        .flat_map(|i| (0..network.interfaces[i].addresses.len()).map(move |c| (i, c)))
        .collect();
    let mut met = [0; 3];
    for (number, &(i, c)) in places.iter().enumerate() {
        let subnet = network.interfaces[i].addresses[c].subnet;
        let endpoint = image.endpoint(number as u32);
        for _ in 0..addresses {
            let v6 = random.chance(50);
            let address = corner_address(random, network, &named, &[AddressMatch::Any], v6);
            let value = lookup::space_value(compiled, endpoint.routing, address);
            let argument = value & 0xff_ffff;
            let found = match value >> 24 {
                0 | IN_WORLD => model::Where::Outside,
                IN_NETWORK => {
                    let vnet = network.virtual_networks.iter().position(|v| u32::from(v.id) == argument);
                    model::Where::Inside(vnet.expect("a network's id"))
                }
                IN_NOWHERE => model::Where::Nowhere,
                IN_GATEWAY => model::Where::Gateway,
                IN_PLATFORM => model::Where::Service,
                IN_APPLIANCE => {
                    let (i, c) = places[argument as usize];
                    model::Where::Appliance(i, c)
                }
                other => panic!("space of kind {other}"),
            };
            assert_eq!(found, model::locate(network, subnet, address), "{subnet} {address}");
            met[match found {
                model::Where::Inside(_) => 0,
                model::Where::Outside => 2,
                _ => 1,
            }] += 1;
            let in_any = network.virtual_networks.iter().flat_map(|v| &v.address_space);
            let expected = u32::from(in_any.into_iter().any(|n| n.contains(&address))) * (IN_NETWORK << 24);
            assert_eq!(lookup::space_value(compiled, 0, address), expected, "seen from the world");
        }
    }
    met
}

fn agrees_with_the_oracle(mut random: Random) {
    let (mut own, mut total) = (0, 0);
    let (mut platform, mut tagged) = (0, 0);
    let mut met = [0; 3];
    for round in 0..60 {
        let network = random_network(&mut random, if round % 10 == 0 { 400 } else { 40 });
        let compiled = fresh(&network);
        let (asked, decided) = compare(&mut random, &network, &compiled, 200);
        (total, own) = (total + asked, own + decided);
        let (first, second) = compare_platform(&mut random, &network, &compiled, 100);
        (platform, tagged) = (platform + first, tagged + second);
        let spaces = compare_spaces(&mut random, &network, &compiled, 100);
        (0..3).for_each(|i| met[i] += spaces[i]);
    }
    println!(
        "{total} packets, {own} decided by a rule of the policy, the others by default rules; \
         {platform} met a rule before the groups and {tagged} a rule for a platform tag; \
         {met:?} addresses inside, behind a route, outside"
    );
    assert!(own * 5 > total * 2, "many of the packets should meet rules");
    assert!(platform > 5000 && tagged > 500 && met.iter().all(|&n| n > 5000));
}

#[test]
fn every_packet_meets_the_rule_that_a_linear_search_finds() {
    agrees_with_the_oracle(Random::new(20_250_101));
}

#[test]
fn every_packet_meets_that_rule_with_a_seed_never_tried_before_too() {
    agrees_with_the_oracle(Random::from_clock());
}

#[test]
fn a_group_with_all_the_priorities_there_are_compiles_and_one_rule_more_is_refused() {
    let mut random = Random::new(7);
    let mut network = random_network(&mut random, 10);
    let of = network.clone();
    let full =
        |random: &mut Random, d| (100..=4096).map(|p| random_rule(random, &of, d, p)).collect::<Vec<_>>();
    network.groups[1].rules = full(&mut random, Direction::Inbound);
    network.groups[1].rules.extend(full(&mut random, Direction::Outbound));
    let compiled = fresh(&network);
    compare(&mut random, &network, &compiled, 500);

    // The last rules of all words must be found too: nothing but DenyAll is left for this packet.
    for r in &mut network.groups[1].rules {
        r.destination_ports = vec![(r.priority, r.priority)];
        (r.protocol, r.source_ports) = (RuleProtocol::Tcp, vec![(0, 65535)]);
        (r.source, r.destination) = (vec![AddressMatch::Any], vec![AddressMatch::Any]);
    }
    let compiled = fresh(&network);
    let number = 1 + compiled
        .rulesets
        .iter()
        .position(|r| r.of == RulesetOf::Group(1) && r.direction == Direction::Inbound)
        .unwrap() as u32;
    for port in 99..=4097u16 {
        let key = PacketKey {
            source: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            destination: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 4)),
            source_port: 1,
            destination_port: port,
            protocol: 6,
        };
        let expected = if (100..=4096).contains(&port) { usize::from(port) - 100 } else { 3999 };
        assert_eq!(classify(&compiled, number, &key), Some(expected));
    }

    network.groups[1].rules.push(rule(Direction::Inbound, "one-too-many", 100));
    let error = compile(&network, &HostFacts::default(), &mut Registry::default(), &Ownership::default(), 1);
    assert!(error.unwrap_err()[0].message.contains("4001 Inbound rules"));
}

#[test]
fn a_packet_without_ports_meets_icmp_rules_with_ranges_but_any_rules_only_if_the_range_has_0() {
    let mut network = network(1);
    network.interfaces[0].group = Some(0);
    let with = |name, priority, protocol, ports| SecurityRule {
        protocol,
        destination_ports: vec![ports],
        ..rule(Direction::Inbound, name, priority)
    };
    network.groups = vec![group(
        "g",
        vec![
            with("web", 100, RuleProtocol::Any, (80, 80)),
            with("esp", 110, RuleProtocol::Esp, (500, 500)),
            with("low", 120, RuleProtocol::Any, (0, 1023)),
        ],
    )];
    let compiled = fresh(&network);
    let number = 1 + compiled.rulesets.iter().position(|r| r.direction == Direction::Inbound).unwrap() as u32;
    let of = |protocol| {
        let [source, destination] = [[8, 8, 8, 8], [10, 0, 0, 5]].map(IpAddr::from);
        let key = PacketKey { source, destination, source_port: 0, destination_port: 0, protocol };
        classify(&compiled, number, &key).unwrap()
    };
    assert_eq!(of(50), 1);
    assert_eq!(of(1), 2);
}

#[test]
fn equal_groups_in_two_virtual_networks_share_most_of_their_tables() {
    let mut random = Random::new(3);
    let mut one = random_network(&mut random, 10);
    let of = one.clone();
    one.groups[1].rules = (100..1100).map(|p| random_rule(&mut random, &of, Direction::Inbound, p)).collect();
    let mut two = one.clone();
    let mut copy = two.groups[1].clone();
    copy.name = "copy".into();
    two.groups.push(copy);
    two.interfaces.push(guest("vm9", Ipv4Addr::new(10, 9, 0, 99), 0, Some(4)));
    let (one, two) = (fresh(&one), fresh(&two));
    assert!(two.pages.len() - one.pages.len() < 20, "{} -> {}", one.pages.len(), two.pages.len());
}
