//! Rules that can never match: against brute force over every class of packets, and on ClassBench's thousand-rule sets.

mod answers_support;
mod compile_support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use answers_support::{ip, nets};
use compile_support::{Random, group, guest, rule, subnet, virtual_network};
use portcullis::answers::expand::Terms;
use portcullis::answers::lint::shadow::shadowed;
use portcullis::answers::lint::{Surroundings, lint};
use portcullis::answers::regions::{Cover, Region, Space};
use portcullis::answers::trace::{Evaluator, Level, Packet};
use portcullis::compile::rules::in_order;
use portcullis::policy::network::{
    Access, AddressMatch, ApplicationGroup, Direction, Network, Places, RuleProtocol, SecurityRule,
    ServiceTag,
};

const PORTS: [u16; 7] = [0, 1, 80, 81, 443, 1024, 65535];
const PROTOCOLS: [u8; 6] = [6, 17, 1, 50, 51, 47];

/// One of each kind of address that the small groups below can tell apart, in either family.
const V4: [&str; 8] =
    ["10.0.0.4", "10.0.0.5", "10.1.0.1", "168.63.129.16", "1.1.1.1", "200.0.0.1", "127.0.0.1", "192.168.0.1"];
const V6: [&str; 5] = ["fd00:1::4", "fd00:1::5", "fd00:1:0:9::1", "2001:db8::1", "fe80::1"];

fn small_network() -> Network {
    let mut net = Network {
        virtual_networks: vec![virtual_network("v", 1, &["10.0.0.0/16", "fd00:1::/48"])],
        subnets: vec![subnet("s", 0, "10.0.0.0/24", "10.0.0.1", Some(0))],
        application_groups: vec![
            ApplicationGroup { name: "web".into(), network: Some(0) },
            ApplicationGroup { name: "nobody".into(), network: None },
        ],
        interfaces: vec![guest("vm", [10, 0, 0, 4].into(), 0, None)],
        ..Network::default()
    };
    net.subnets[0].prefixes.extend(nets(&["fd00:1::/64"]));
    net.interfaces[0].addresses[0].application_groups = vec![0];
    net
}

fn small_rule(random: &mut Random, priority: u16) -> SecurityRule {
    let mut r = rule(Direction::Inbound, &format!("r{priority}"), priority);
    r.access = if random.chance(50) { Access::Allow } else { Access::Deny };
    let protocols = [
        RuleProtocol::Any,
        RuleProtocol::Any,
        RuleProtocol::Tcp,
        RuleProtocol::Udp,
        RuleProtocol::Icmp,
        RuleProtocol::Esp,
    ];
    r.protocol = *random.pick(&protocols);
    let side = |random: &mut Random| match random.below(9) {
        0..2 => vec![AddressMatch::Any],
        2 => vec![AddressMatch::Tag(ServiceTag::VirtualNetwork)],
        3 => vec![AddressMatch::Tag(ServiceTag::Internet)],
        4 => vec![AddressMatch::Application(random.below(8) / 7)],
        5 => vec![AddressMatch::Tag(ServiceTag::AzureLoadBalancer)],
        _ => {
            let prefixes = [
                "10.0.0.0/16",
                "10.0.0.4/32",
                "10.0.0.0/15",
                "0.0.0.0/0",
                "::/0",
                "fd00:1::/64",
                "fd00:1::4/128",
                "0.0.0.0/1",
                "128.0.0.0/1",
            ];
            (0..1 + random.below(3))
                .map(|_| compile_support::prefix(random.pick::<&str>(&prefixes)))
                .collect()
        }
    };
    (r.source, r.destination) = (side(random), side(random));
    let ports = |random: &mut Random| -> Vec<(u16, u16)> {
        let lists: [&[(u16, u16)]; 6] =
            [&[(0, 65535)], &[(0, 65535)], &[(80, 80)], &[(0, 80)], &[(81, 65535)], &[(80, 80), (443, 443)]];
        random.pick(&lists).to_vec()
    };
    if matches!(r.protocol, RuleProtocol::Any | RuleProtocol::Tcp | RuleProtocol::Udp) {
        (r.source_ports, r.destination_ports) = (ports(random), ports(random));
    }
    // Most rules are narrow in one or two fields only, so that some together cover another.
    if random.chance(50) {
        let any = rule(Direction::Inbound, "", 0);
        let keep = [random.below(5), random.below(5)];
        if !keep.contains(&0) {
            r.protocol = any.protocol;
        }
        if !keep.contains(&1) {
            r.source = any.source;
        }
        if !keep.contains(&2) {
            r.destination = any.destination;
        }
        let portless = matches!(r.protocol, RuleProtocol::Icmp | RuleProtocol::Esp);
        if !keep.contains(&3) || portless {
            r.source_ports = any.source_ports;
        }
        if !keep.contains(&4) || portless {
            r.destination_ports = any.destination_ports;
        }
    }
    r
}

/// Rules at random; now and then one that rules before it take together, or nearly.
fn small_rules(random: &mut Random) -> Vec<SecurityRule> {
    let mut rules: Vec<SecurityRule> = Vec::new();
    for _ in 0..2 + random.below(4) {
        let whole = small_rule(random, 0);
        let mut parts = Vec::new();
        if random.chance(60) {
            let by_port = whole.destination_ports == [(0, 65535)];
            let by_source = whole.source == [AddressMatch::Any];
            let mut part = |change: &dyn Fn(&mut SecurityRule)| {
                let mut part = whole.clone();
                part.access = small_rule(random, 0).access;
                change(&mut part);
                parts.push(part);
            };
            if by_port && matches!(whole.protocol, RuleProtocol::Tcp | RuleProtocol::Udp) {
                part(&|r| r.destination_ports = vec![(0, 80)]);
                part(&|r| r.destination_ports = vec![(81, 65535)]);
            } else if by_source {
                for prefix in ["0.0.0.0/1", "128.0.0.0/1", "::/0"] {
                    part(&|r| r.source = vec![compile_support::prefix(prefix)]);
                }
            }
            if !parts.is_empty() && random.chance(30) {
                parts.remove(0);
            }
        }
        rules.extend(parts);
        rules.push(whole);
    }
    for (i, rule) in rules.iter_mut().enumerate() {
        (rule.priority, rule.name) = (100 + i as u16, format!("r{i}"));
    }
    rules
}

/// One packet of every class.
fn all_packets() -> Vec<Packet> {
    let mut packets = Vec::new();
    for family in [&V4[..], &V6[..]] {
        for source in family {
            for destination in family {
                for protocol in PROTOCOLS {
                    let ports = if matches!(protocol, 6 | 17) { &PORTS[..] } else { &PORTS[..1] };
                    for &source_port in ports {
                        for &destination_port in ports {
                            let (source, destination) = (ip(source), ip(destination));
                            packets.push(Packet {
                                source,
                                destination,
                                source_port,
                                destination_port,
                                protocol,
                            });
                        }
                    }
                }
            }
        }
    }
    packets
}

#[test]
fn rules_that_can_never_match_are_exactly_those_that_brute_force_finds_with_the_fewest_shadows() {
    let mut random = Random::from_clock();
    let packets = all_packets();
    let (mut dead, mut empty, mut live, mut redundant, mut together) = (0, 0, 0, 0, 0);
    for _ in 0..120 {
        let mut net = small_network();
        net.groups = vec![group("g", small_rules(&mut random))];
        let rules = in_order(&net.groups[0], Direction::Inbound);
        let mut evaluator = Evaluator::new(&net, 0);
        // For each packet which rules match, as a bit each.
        let matches: Vec<u32> = packets
            .iter()
            .map(|packet| {
                let bit =
                    |(i, rule): (usize, &&SecurityRule)| u32::from(evaluator.fields(rule, packet).all()) << i;
                rules.iter().enumerate().map(bit).sum()
            })
            .collect();
        let report = lint(&net, &Places::new(), Surroundings::default());
        for (index, by) in shadowed(&net, 0, Direction::Inbound).into_iter().enumerate() {
            let name = &rules[index].name;
            let of_rule = || matches.iter().filter(|m| **m >> index & 1 == 1);
            let first_somewhere = matches.iter().any(|m| m.trailing_zeros() == index as u32);
            let about = format!("networkSecurityGroups/g/securityRules/{name}");
            let found = |code: &str| report.findings.iter().any(|f| f.code == code && f.about == about);
            match by {
                None => {
                    assert!(first_somewhere, "{name} of {:#?}", net.groups[0]);
                    live += 1;
                    // Without it: the next rule that matches decides.
                    let same = matches.iter().filter(|m| m.trailing_zeros() == index as u32).all(|m| {
                        let next = (m & !(1 << index)).trailing_zeros() as usize;
                        rules[next].access == rules[index].access
                    });
                    assert_eq!(found("PC103"), same, "{name} of {:#?}", net.groups[0]);
                    redundant += usize::from(same);
                    assert!(!found("PC101") && !found("PC102"));
                }
                Some(by) if by.is_empty() => {
                    assert_eq!(of_rule().count(), 0, "{name}");
                    assert!(found("PC102"));
                    empty += 1;
                }
                Some(by) => {
                    assert!(!first_somewhere && of_rule().count() > 0, "{name} of {:#?}", net.groups[0]);
                    assert!(found("PC101"));
                    let bit =
                        |name: &String| 1u32 << rules.iter().position(|rule| rule.name == *name).unwrap();
                    let all: u32 = by.iter().map(bit).sum();
                    assert!(of_rule().all(|m| m & all != 0), "they take all of it");
                    for one in &by {
                        assert!(of_rule().any(|m| m & (all & !bit(one)) == 0), "{one} cannot be left out");
                    }
                    dead += 1;
                    together += usize::from(by.len() > 1);
                }
            }
        }
    }
    println!(
        "{dead} rules shadowed ({together} by several together), {empty} empty, {live} live, {redundant} redundant"
    );
    assert!(dead > 50 && together > 5 && empty > 5 && live > 50 && redundant > 5);
}

#[test]
fn a_rule_is_shadowed_only_if_it_is_in_every_network_where_the_group_stands() {
    let mut net = small_network();
    net.virtual_networks.push(virtual_network("w", 2, &["10.1.0.0/16"]));
    let mut inside = rule(Direction::Inbound, "Inside", 100);
    inside.source = vec![AddressMatch::Tag(ServiceTag::VirtualNetwork)];
    let mut prefix = rule(Direction::Inbound, "Prefix", 200);
    (prefix.access, prefix.source) = (Access::Deny, vec![compile_support::prefix("10.0.0.0/16")]);
    net.groups = vec![group("g", vec![inside, prefix])];
    assert_eq!(shadowed(&net, 0, Direction::Inbound), [None, Some(vec!["Inside".to_owned()])]);
    net.subnets.push(subnet("t", 1, "10.1.0.0/24", "10.1.0.1", Some(0)));
    assert_eq!(shadowed(&net, 0, Direction::Inbound), [None, None], "10.0.0.0/16 is not inside w");
}

#[test]
fn a_rule_for_every_port_is_shadowed_by_thousands_of_rules_for_one_port_each() {
    let mut net = small_network();
    let port = |i: u16| {
        let mut r = rule(Direction::Inbound, &format!("p{i}"), 100 + i);
        r.source_ports = if i == 3990 { vec![(3990, 65535)] } else { vec![(i, i)] };
        r
    };
    let mut rules: Vec<SecurityRule> = (0..=3990).map(port).collect();
    rules.push(rule(Direction::Inbound, "all", 4096));
    net.groups = vec![group("g", rules)];
    let start = Instant::now();
    let said = shadowed(&net, 0, Direction::Inbound);
    println!("{:.2?}", start.elapsed());
    assert!(said[..3991].iter().all(Option::is_none));
    assert_eq!(said[3991].as_ref().map(Vec::len), Some(3991), "each of them is needed");
    net.groups[0].rules.remove(1234);
    assert!(shadowed(&net, 0, Direction::Inbound).iter().all(Option::is_none), "one port is left");
}

fn classbench(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/classbench").join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

/// The first `limit` rules of a ClassBench set as one group's inbound rules, in order; every other one denies.
fn read(path: &Path, limit: usize) -> Vec<SecurityRule> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut rules = Vec::new();
    for (i, line) in text.lines().take(limit).enumerate() {
        let columns: Vec<&str> = line.trim_start_matches('@').split('\t').collect();
        let ports = |text: &str| {
            let (low, high) = text.split_once(" : ").unwrap();
            vec![(low.trim().parse().unwrap(), high.trim().parse().unwrap())]
        };
        let mut r = rule(Direction::Inbound, &format!("r{i}"), 100 + i as u16);
        r.source = vec![AddressMatch::Prefix(columns[0].parse::<ipnet::IpNet>().unwrap().trunc())];
        r.destination = vec![AddressMatch::Prefix(columns[1].parse::<ipnet::IpNet>().unwrap().trunc())];
        (r.source_ports, r.destination_ports) = (ports(columns[2]), ports(columns[3]));
        r.protocol = match columns[4].split('/').next().unwrap() {
            "0x06" => RuleProtocol::Tcp,
            "0x11" => RuleProtocol::Udp,
            "0x01" => RuleProtocol::Icmp,
            "0x32" => RuleProtocol::Esp,
            "0x33" => RuleProtocol::Ah,
            _ => RuleProtocol::Any,
        };
        r.access = if i % 2 == 0 { Access::Allow } else { Access::Deny };
        rules.push(r);
    }
    rules
}

#[test]
fn classbench_groups_are_decided_exactly_and_quickly() {
    let mut random = Random::from_clock();
    for (name, limit) in
        [("acl1_1k", 1000), ("fw1_1k", 1000), ("ipc1_1k", 1000), ("acl1_10k", 3997), ("fw1_10k", 3997)]
    {
        let Some(path) = classbench(name) else { continue };
        let mut net = small_network();
        net.groups = vec![group("g", read(&path, limit))];
        let start = Instant::now();
        let said = shadowed(&net, 0, Direction::Inbound);
        let took = start.elapsed();
        let start = Instant::now();
        let report = lint(&net, &Places::new(), Surroundings::default());
        let lint_took = start.elapsed();
        let dead = said.iter().flatten().count();
        let several = said.iter().flatten().filter(|by| by.len() > 1).count();
        let undecided = report.findings.iter().filter(|f| f.code == "PC106").count();
        println!(
            "{name}: {} rules, {dead} never match ({several} shadowed by several together), shadows in {took:.2?}, \
             all of lint in {lint_took:.2?}, {undecided} undecided",
            said.len()
        );
        assert_eq!(undecided, 0);
        check(&net, &said, &mut random);
    }
}

/// Each live rule has a packet that the linear search gives to it; no packet from the corners of a shadowed one does.
fn check(net: &Network, said: &[Option<Vec<String>>], random: &mut Random) {
    let rules = in_order(&net.groups[0], Direction::Inbound);
    let mut terms = Terms::new(net, 0);
    let regions: Vec<Region> = rules.iter().map(|rule| Region::of_rule(rule, &mut terms)).collect();
    let space = Space::new(&regions);
    let mut evaluator = Evaluator::new(net, 0);
    let mut first = |packet: &Packet| {
        let trace = evaluator.group(0, Level::Subnet, Direction::Inbound, packet, None);
        trace.matched().unwrap().name.clone()
    };
    for (index, by) in said.iter().enumerate() {
        let before: Vec<usize> = (0..index).collect();
        match (space.covered(&[index], &before), by) {
            (Cover::Left(packet), None) => assert_eq!(first(&packet), rules[index].name),
            (Cover::Covered(_), Some(_)) => {
                for _ in 0..20 {
                    assert_ne!(first(&inside(rules[index], random)), rules[index].name);
                }
            }
            (cover, by) => panic!("{}: {cover:?} and {by:?}", rules[index].name),
        }
    }
}

/// A packet of a rule with single prefixes: an edge of each field or something between.
fn inside(rule: &SecurityRule, random: &mut Random) -> Packet {
    let mut address = |side: &[AddressMatch]| {
        let AddressMatch::Prefix(ipnet::IpNet::V4(net)) = side[0] else { panic!("a prefix") };
        let (low, high) = (u32::from(net.network()), u32::from(net.broadcast()));
        let between = low + (random.next() % (u64::from(high - low) + 1)) as u32;
        std::net::IpAddr::V4((*random.pick(&[low, high, between])).into())
    };
    let (source, destination) = (address(&rule.source), address(&rule.destination));
    let protocol = match rule.protocol {
        RuleProtocol::Tcp | RuleProtocol::Any => 6,
        RuleProtocol::Udp => 17,
        RuleProtocol::Icmp => 1,
        RuleProtocol::Esp => 50,
        RuleProtocol::Ah => 51,
    };
    let mut port = |ranges: &[(u16, u16)]| {
        let (low, high) = *random.pick(ranges);
        let between = low + (random.next() % (u64::from(high - low) + 1)) as u16;
        if matches!(protocol, 6 | 17) { *random.pick(&[low, high, between]) } else { 0 }
    };
    let (source_port, destination_port) = (port(&rule.source_ports), port(&rule.destination_ports));
    Packet { source, destination, source_port, destination_port, protocol }
}
