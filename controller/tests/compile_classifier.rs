//! The classifier's image against a plain linear first match over the policy.

mod compile_support;

use std::net::{IpAddr, Ipv4Addr};

use compile_support::*;
use ipnet::{IpNet, Ipv4Net};
use portcullis::compile::lookup::{self, PacketKey, classify, matches};
use portcullis::compile::{Compiled, HostFacts, Ownership, Registry, compile};
use portcullis::policy::network::{
    Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag, VirtualNetwork,
};

const PROTOCOLS: [u8; 8] = [6, 6, 17, 17, 1, 50, 51, 47];

/// First match, straight from the documentation; shares nothing with the compiler.
mod oracle {
    use super::*;

    pub fn decide(
        network: &Network,
        group: usize,
        direction: Direction,
        vnet: usize,
        key: &PacketKey,
    ) -> (String, bool) {
        let vnet = &network.virtual_networks[vnet];
        let mut rules: Vec<&SecurityRule> =
            network.groups[group].rules.iter().filter(|r| r.direction == direction).collect();
        rules.sort_by_key(|r| r.priority);
        for rule in rules {
            if rule_matches(rule, vnet, key) {
                return (format!("securityRules/{}", rule.name), rule.access == Access::Allow);
            }
        }
        let (inside_source, inside_destination) = (
            tag(ServiceTag::VirtualNetwork, vnet, key.source),
            tag(ServiceTag::VirtualNetwork, vnet, key.destination),
        );
        let (name, allow) = match direction {
            Direction::Inbound if inside_source && inside_destination => ("AllowVnetInBound", true),
            Direction::Inbound if key.source == Ipv4Addr::new(168, 63, 129, 16) => {
                ("AllowAzureLoadBalancerInBound", true)
            }
            Direction::Inbound => ("DenyAllInBound", false),
            Direction::Outbound if inside_source && inside_destination => ("AllowVnetOutBound", true),
            Direction::Outbound if tag(ServiceTag::Internet, vnet, key.destination) => {
                ("AllowInternetOutBound", true)
            }
            Direction::Outbound => ("DenyAllOutBound", false),
        };
        (format!("defaultSecurityRules/{name}"), allow)
    }

    fn rule_matches(rule: &SecurityRule, vnet: &VirtualNetwork, key: &PacketKey) -> bool {
        let (protocol, portless) = match rule.protocol {
            RuleProtocol::Any => (true, false),
            RuleProtocol::Tcp => (key.protocol == 6, false),
            RuleProtocol::Udp => (key.protocol == 17, false),
            RuleProtocol::Icmp => (key.protocol == 1, true),
            RuleProtocol::Esp => (key.protocol == 50, true),
            RuleProtocol::Ah => (key.protocol == 51, true),
        };
        let port = |ranges: &[(u16, u16)], p: u16| portless || ranges.iter().any(|&(a, b)| a <= p && p <= b);
        let side = |terms: &[AddressMatch], address: Ipv4Addr| {
            terms.iter().any(|term| match term {
                AddressMatch::Any => true,
                AddressMatch::Prefix(net) => net.contains(&IpAddr::V4(address)),
                AddressMatch::Tag(t) => tag(*t, vnet, address),
                AddressMatch::Application(_) => todo!(),
            })
        };
        protocol
            && side(&rule.source, key.source)
            && side(&rule.destination, key.destination)
            && port(&rule.source_ports, key.source_port)
            && port(&rule.destination_ports, key.destination_port)
    }

    fn tag(tag: ServiceTag, vnet: &VirtualNetwork, address: Ipv4Addr) -> bool {
        let platform = address == Ipv4Addr::new(168, 63, 129, 16);
        let inside = vnet.address_space.iter().any(|net| net.contains(&IpAddr::V4(address)));
        let [a, b, ..] = address.octets();
        let special = matches!(a, 0 | 10 | 127 | 224..)
            || (a == 100 && b & 0xc0 == 64)
            || (a == 169 && b == 254)
            || (a == 172 && b & 0xf0 == 16)
            || (a == 192 && b == 168);
        match tag {
            ServiceTag::VirtualNetwork => inside || platform,
            ServiceTag::Internet => !inside && !platform && !special,
            ServiceTag::AzureLoadBalancer => platform,
            _ => todo!(),
        }
    }
}

fn random_prefix(random: &mut Random) -> Ipv4Net {
    // Few bits vary, so that prefixes nest and repeat.
    let bases =
        [0x0a00_0000, 0x0a01_0200, 0xcb00_7100, 0xa83f_8110, 0xc0a8_0000, 0x1400_0000, 0xffff_ff00, 0];
    let base: u32 = *random.pick(&bases);
    let len = *random.pick(&[0, 1, 4, 8, 9, 12, 16, 22, 24, 25, 28, 30, 31, 32, 32, 32]);
    let noise = random.next() as u32 & *random.pick(&[0, 0xff, 0xf0f, 0x0100_00ff]);
    Ipv4Net::new(Ipv4Addr::from(base ^ noise), len).unwrap().trunc()
}

fn random_side(random: &mut Random) -> Vec<AddressMatch> {
    if random.chance(25) {
        return vec![AddressMatch::Any];
    }
    let one = |random: &mut Random| match random.below(12) {
        0 => AddressMatch::Tag(ServiceTag::VirtualNetwork),
        1 => AddressMatch::Tag(ServiceTag::Internet),
        2 => AddressMatch::Tag(ServiceTag::AzureLoadBalancer),
        3 => prefix("2001:db8::/32"),
        _ => AddressMatch::Prefix(IpNet::V4(random_prefix(random))),
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

fn random_rule(random: &mut Random, direction: Direction, priority: u16) -> SecurityRule {
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
        source: random_side(random),
        destination: random_side(random),
        source_ports: random_ports(random),
        destination_ports: random_ports(random),
        ..rule(direction, &format!("r{priority}"), priority)
    }
}

fn random_network(random: &mut Random, most_rules: usize) -> Network {
    let mut network = Network {
        virtual_networks: vec![
            virtual_network("private", 1, &["10.0.0.0/8"]),
            virtual_network("twin", 2, &["10.0.0.0/16", "192.168.0.0/24"]),
            virtual_network("public-space", 3, &["20.0.0.0/16", "203.0.113.0/28", "fd00::/8"]),
        ],
        subnets: vec![
            subnet("a", 0, "10.9.0.0/24", "10.9.0.1", Some(0)),
            subnet("b", 1, "10.0.9.0/24", "10.0.9.1", Some(1)),
            subnet("c", 2, "20.0.9.0/24", "20.0.9.1", Some(2)),
        ],
        interfaces: vec![
            guest("vm1", Ipv4Addr::new(10, 9, 0, 4), 0, Some(1)),
            guest("vm2", Ipv4Addr::new(10, 0, 9, 4), 1, Some(3)),
            guest("vm3", Ipv4Addr::new(20, 0, 9, 4), 2, Some(1)),
        ],
        ..Network::default()
    };
    for g in 0..4 {
        let mut rules = Vec::new();
        for direction in [Direction::Inbound, Direction::Outbound] {
            let mut priorities: Vec<u16> =
                (0..random.below(most_rules)).map(|i| 100 + i as u16 * 3).collect();
            // As in a file: in no order.
            for i in (1..priorities.len()).rev() {
                priorities.swap(i, random.below(i + 1));
            }
            rules.extend(priorities.into_iter().map(|p| random_rule(random, direction, p)));
        }
        network.groups.push(group(&format!("group{g}"), rules));
    }
    network
}

/// An address at or beside an edge of something that a rule names.
fn corner_address(random: &mut Random, terms: &[AddressMatch]) -> Ipv4Addr {
    let corners = [0x0a00_0001, 0xa83f_8110, 0xcb00_7105, 0x1400_0001, 0x0808_0808, 0, u32::MAX, 0xa9fe_a9fe];
    let address = match random.pick(terms) {
        AddressMatch::Prefix(IpNet::V4(net)) if random.chance(90) => {
            let edge = if random.chance(50) { net.network() } else { net.broadcast() };
            u32::from(edge).wrapping_add(*random.pick(&[0, 0, 0, 1, u32::MAX]))
        }
        _ if random.chance(80) => *random.pick(&corners),
        _ => random.next() as u32,
    };
    address.into()
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

fn corner_packet(random: &mut Random, rules: &[SecurityRule]) -> PacketKey {
    let any = rule(Direction::Inbound, "any", 100);
    let rule = if rules.is_empty() { &any } else { random.pick(rules) };
    let protocol = match rule.protocol {
        RuleProtocol::Tcp if random.chance(90) => 6,
        RuleProtocol::Udp if random.chance(90) => 17,
        _ => *random.pick(&PROTOCOLS),
    };
    let with_ports = matches!(protocol, 6 | 17);
    PacketKey {
        source: corner_address(random, &rule.source),
        destination: corner_address(random, &rule.destination),
        source_port: if with_ports { corner_port(random, &rule.source_ports) } else { 0 },
        destination_port: if with_ports { corner_port(random, &rule.destination_ports) } else { 0 },
        protocol,
    }
}

/// Asks every ruleset of a compiled policy about corner packets; answers how many were decided by an own rule.
fn compare(random: &mut Random, network: &Network, compiled: &Compiled, packets: usize) -> usize {
    let mut own = 0;
    for (number, info) in (1u32..).zip(&compiled.rulesets) {
        for _ in 0..packets {
            let key = corner_packet(random, &network.groups[info.group].rules);
            let expected = oracle::decide(network, info.group, info.direction, info.network, &key);
            let index = classify(compiled, number, &key).expect("the last default rule matches everything");
            let (id, allow) = lookup::rule(compiled, number, index);
            let rule = compiled.rules.iter().find(|r| r.id == id).unwrap();
            assert_eq!((rule.name.clone(), allow), expected, "{info:?} {key:?}");
            assert_eq!(rule.access == Access::Allow, allow);
            assert_eq!(matches(compiled, number, index, &key), [true; 5]);
            own += usize::from(rule.priority <= 4096);
        }
    }
    own
}

fn agrees_with_the_oracle(mut random: Random) {
    let mut own = 0;
    let mut total = 0;
    for round in 0..60 {
        let network = random_network(&mut random, if round % 10 == 0 { 400 } else { 40 });
        let compiled = fresh(&network);
        own += compare(&mut random, &network, &compiled, 400);
        total += compiled.rulesets.len() * 400;
    }
    println!("{total} packets, {own} decided by a rule of the policy, the others by default rules");
    assert!(own * 2 > total, "the packets should mostly meet rules");
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
    let full = |random: &mut Random, d| (100..=4096).map(|p| random_rule(random, d, p)).collect::<Vec<_>>();
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
    let number =
        1 + compiled.rulesets.iter().position(|r| r.group == 1 && r.direction == Direction::Inbound).unwrap()
            as u32;
    for port in 99..=4097u16 {
        let key = PacketKey {
            source: Ipv4Addr::new(192, 0, 2, 1),
            destination: Ipv4Addr::new(10, 9, 0, 4),
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
        let (source, destination) = (Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(10, 0, 0, 5));
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
    one.groups[1].rules = (100..1100).map(|p| random_rule(&mut random, Direction::Inbound, p)).collect();
    let mut two = one.clone();
    let mut copy = two.groups[1].clone();
    copy.name = "copy".into();
    two.groups.push(copy);
    two.interfaces.push(guest("vm4", Ipv4Addr::new(10, 9, 0, 5), 0, Some(4)));
    let (one, two) = (fresh(&one), fresh(&two));
    assert!(two.pages.len() - one.pages.len() < 20, "{} -> {}", one.pages.len(), two.pages.len());
}
