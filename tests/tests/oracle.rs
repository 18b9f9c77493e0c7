//! The engine against the linear model: 100,000 packets from the corners of random policies, both levels, both directions.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use portcullis::policy;
use portcullis::policy::network::{AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag};
use portcullis_common::engine::{Hook, Verdict};
use portcullis_tests::backend::{Backend as _, HostBackend};
use portcullis_tests::lab::{Craft, TcpFlags};
use portcullis_tests::model::{self, Decision};
use portcullis_tests::random::Random;

const GUESTS: [(&str, &str, &str); 4] = [
    ("vm1", "10.0.1.4", "a"),
    ("vm2", "10.0.1.5", "a"),
    ("vm3", "10.0.2.4", "b"),
    ("vm4", "10.0.2.132", "b"),
];
const RULES: usize = 20;

/// The rules of each group in the order of their priorities, as YAML.
type Groups = [Vec<(String, String)>; 4];

/// Narrow rules first, mostly: otherwise the wide ones shadow them and nothing is learned. At the end wide ones, as
/// people write them.
fn random_groups(random: &mut Random) -> Groups {
    std::array::from_fn(|g| {
        let mut rules: Vec<(usize, String)> = (0..RULES).map(|_| random_rule(random, g)).collect();
        rules.sort_by_key(|(width, _)| *width);
        let mut rules: Vec<String> = rules.into_iter().map(|(_, rule)| rule).collect();
        for (direction, ports, access) in [
            ("Inbound", "'30-30000'", "Allow"),
            ("Inbound", "'35000-65535'", "Deny"),
            ("Outbound", "'30-30000'", "Allow"),
            ("Outbound", "'20000-65535'", "Deny"),
        ] {
            rules.push(format!(
                "direction: {direction}, access: {access}, protocol: '*', sourceAddressPrefix: '*', \
                 destinationAddressPrefix: '*', sourcePortRange: '*', destinationPortRange: {ports}"
            ));
        }
        rules.into_iter().enumerate().map(|(i, rule)| (format!("r{i}"), rule)).collect()
    })
}

/// Four guests with instance-level IPs, a group on each subnet and on two NICs.
fn yaml_of(groups: &Groups) -> String {
    let mut yaml = String::from(
        "virtualNetworks:\n  - name: v\n    addressSpace: { addressPrefixes: [10.0.0.0/16] }\n    subnets:\n      \
         - { name: a, addressPrefix: 10.0.1.0/24, networkSecurityGroup: g0 }\n      \
         - { name: b, addressPrefix: 10.0.2.0/24, networkSecurityGroup: g1 }\nnetworkInterfaces:\n",
    );
    for (i, (name, address, subnet)) in GUESTS.iter().enumerate() {
        let group =
            if i % 2 == 0 { format!("    networkSecurityGroup: g{}\n", 2 + i / 2) } else { String::new() };
        let _ = write!(
            yaml,
            "  - name: {name}\n    device: {name}\n    macAddress: 02:00:00:00:00:0{i}\n{group}    \
             ipConfigurations: [{{ subnet: {subnet}, privateIPAddress: {address}, publicIPAddress: p{i} }}]\n"
        );
    }
    yaml.push_str("publicIPAddresses:\n");
    for i in 0..4 {
        let _ = writeln!(yaml, "  - {{ name: p{i}, ipAddress: 203.0.113.{}, announce: proxy }}", 20 + i);
    }
    yaml.push_str("uplinks:\n  - { device: up }\nnetworkSecurityGroups:\n");
    for (g, rules) in groups.iter().enumerate() {
        let _ = write!(yaml, "  - name: g{g}\n    securityRules:\n");
        for (i, (name, rule)) in rules.iter().enumerate() {
            let _ = writeln!(yaml, "      - {{ priority: {}, name: {name}, {rule} }}", 100 + i * 7);
        }
    }
    yaml
}

fn parse(yaml: &str) -> Network {
    policy::parse("random.yaml", yaml).unwrap_or_else(|e| panic!("{e}\n{yaml}")).network
}

/// A policy most of whose rules decide something: those that no packet of a first draw meets are left out.
fn random_policy(random: &mut Random) -> String {
    let mut groups = random_groups(random);
    let network = parse(&yaml_of(&groups));
    let mut met = BTreeSet::new();
    for _ in 0..3000 {
        let Some((_, asked)) = draw(random, &network) else { continue };
        for (decision, _) in asked {
            met.insert(decision.rule);
        }
    }
    for (g, rules) in groups.iter_mut().enumerate() {
        rules.retain(|(name, rule)| {
            let direction = if rule.contains("Inbound") { "Inbound" } else { "Outbound" };
            met.contains(&format!("g{g}/{direction}/securityRules/{name}"))
        });
    }
    yaml_of(&groups)
}

/// A packet of IPv4, as the groups see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    protocol: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    source_port: u16,
    destination_port: u16,
}

impl Flow {
    fn of_any_family(&self) -> model::Flow {
        model::Flow {
            protocol: self.protocol,
            source: self.source.into(),
            destination: self.destination.into(),
            source_port: self.source_port,
            destination_port: self.destination_port,
        }
    }
}

/// A packet from the corner of some rule, and what each group it meets says of it, up to the first deny.
fn draw(random: &mut Random, network: &Network) -> Option<(Flow, Vec<(Decision, usize)>)> {
    let guests: Vec<Ipv4Addr> = GUESTS.iter().map(|g| g.1.parse().expect("a literal")).collect();
    let group = random.below(4);
    // A group on a NIC is met by its one guest only.
    let met_by = match group {
        0 => &guests[0..2],
        1 => &guests[2..4],
        2 => &guests[0..1],
        _ => &guests[2..3],
    };
    let rules = &network.groups[group].rules;
    let rule = &rules[random.below(rules.len())];
    let flow = corner_flow(random, rule, met_by);
    let mut decisions = Vec::new();
    for (group, direction) in asked(network, &flow, &guests)? {
        let decision = model::decide(network, group, direction, 0, &flow.of_any_family());
        let allow = decision.allow;
        decisions.push((decision, group));
        if !allow {
            break;
        }
    }
    Some((flow, decisions))
}

fn random_rule(random: &mut Random, group: usize) -> (usize, String) {
    let mut width = random.below(3);
    // On the guests' side something that the guests who meet this group have.
    let local: &[&'static str] = match group {
        0 => &["10.0.1.4", "10.0.1.5", "10.0.1.4/31", "10.0.1.0/24", "VirtualNetwork", "'*'"],
        1 => &["10.0.2.4", "10.0.2.132", "10.0.2.0/25", "10.0.2.128/25", "VirtualNetwork", "'*'"],
        2 => &["10.0.1.4", "10.0.1.4/31", "10.0.1.0/25", "VirtualNetwork", "'*'"],
        _ => &["10.0.2.4", "10.0.2.4/30", "10.0.2.0/25", "VirtualNetwork", "'*'"],
    };
    let remote = [
        "10.0.1.4",
        "10.0.2.4",
        "10.0.2.0/24",
        "198.51.100.7",
        "198.51.100.0/25",
        "198.51.100.128/25",
        "8.0.0.0/7",
        "100.0.0.0/10",
        "192.0.2.1",
        "192.0.2.0/24",
        "Internet",
        "VirtualNetwork",
        "'*'",
    ];
    let side = |random: &mut Random, of: &[&'static str], width: &mut usize| {
        let at = random.below(of.len());
        *width += at * 8 / of.len();
        of[at]
    };
    let inbound = random.chance(50);
    let (mine, theirs) = (side(random, local, &mut width), side(random, &remote, &mut width));
    let (source, destination) = if inbound { (theirs, mine) } else { (mine, theirs) };
    let protocol = random.pick(&["Tcp", "Tcp", "Udp", "Udp", "Icmp", "'*'"]);
    let ports = |random: &mut Random, width: &mut usize| match random.below(4) {
        0 => {
            *width += 4;
            "'*'".to_owned()
        }
        1 => {
            let lo = random.below(65000);
            *width += 2;
            format!("{lo}-{}", lo + random.below(500))
        }
        _ => random.pick(&["22", "80", "443", "5432", "0", "65535", "1024-2047"]).to_owned(),
    };
    let (source_port, destination_port) = if protocol == "Icmp" {
        width += 3;
        ("'*'".to_owned(), "'*'".to_owned())
    } else {
        (
            if random.chance(70) { "'*'".to_owned() } else { ports(random, &mut width) },
            ports(random, &mut width),
        )
    };
    let access = if random.chance(60) { "Allow" } else { "Deny" };
    let direction = if inbound { "Inbound" } else { "Outbound" };
    let text = format!(
        "direction: {direction}, access: {access}, protocol: {protocol}, \
         sourceAddressPrefix: {source}, destinationAddressPrefix: {destination}, \
         sourcePortRange: {source_port}, destinationPortRange: {destination_port}"
    );
    (width, text)
}

/// An address at a corner of one side of a rule.
fn corner_address(random: &mut Random, terms: &[AddressMatch]) -> Ipv4Addr {
    let outside = [
        [198, 51, 100, 7],
        [198, 51, 100, 200],
        [8, 8, 8, 8],
        [100, 63, 255, 255],
        [192, 0, 2, 1],
        [9, 255, 255, 255],
    ];
    match &terms[random.below(terms.len())] {
        AddressMatch::Prefix(ipnet::IpNet::V4(net)) => {
            let (lo, hi) = (u32::from(net.network()), u32::from(net.broadcast()));
            let choices =
                [lo, hi, lo.wrapping_sub(1), hi.wrapping_add(1), lo + (random.next() as u32) % (hi - lo + 1)];
            choices[if random.chance(80) { [0, 1, 4][random.below(3)] } else { 2 + random.below(2) }].into()
        }
        AddressMatch::Tag(ServiceTag::VirtualNetwork) => {
            GUESTS[random.below(4)].1.parse().expect("a literal")
        }
        _ => outside[random.below(outside.len())].into(),
    }
}

fn corner_port(random: &mut Random, ranges: &[(u16, u16)]) -> u16 {
    let (lo, hi) = ranges[random.below(ranges.len())];
    match random.below(10) {
        0 => lo.wrapping_sub(1),
        1 => hi.wrapping_add(1),
        2..=4 => hi,
        5 | 6 => lo + (random.next() as u16) % (hi - lo).max(1),
        _ => lo,
    }
}

/// A packet near this rule, with a guest on the side where the gateway meets it.
fn corner_flow(random: &mut Random, rule: &SecurityRule, guests: &[Ipv4Addr]) -> Flow {
    let mut flow = Flow {
        protocol: match rule.protocol {
            RuleProtocol::Tcp => 6,
            RuleProtocol::Udp => 17,
            RuleProtocol::Icmp => 1,
            _ => [6, 17, 1, 47][random.below(4)],
        },
        source: corner_address(random, &rule.source),
        destination: corner_address(random, &rule.destination),
        source_port: corner_port(random, &rule.source_ports),
        destination_port: corner_port(random, &rule.destination_ports),
    };
    let near = |random: &mut Random, terms: &[AddressMatch]| {
        let fitting: Vec<Ipv4Addr> = guests
            .iter()
            .copied()
            .filter(|g| {
                terms
                    .iter()
                    .any(|t| !matches!(t, AddressMatch::Prefix(ipnet::IpNet::V4(n)) if !n.contains(g)))
            })
            .collect();
        let from = if fitting.is_empty() { guests } else { &fitting };
        from[random.below(from.len())]
    };
    match rule.direction {
        Direction::Outbound => flow.source = near(random, &rule.source),
        Direction::Inbound => flow.destination = near(random, &rule.destination),
    }
    if flow.protocol == 1 || flow.protocol == 47 {
        (flow.source_port, flow.destination_port) = (0, 0);
    }
    flow
}

struct Tally {
    packets: usize,
    defaults: usize,
    rules: usize,
    matched: usize,
}

/// Runs packets against one policy; every packet meets a gateway without flows.
fn one_policy(random: &mut Random, packets: usize, tally: &mut Tally) {
    let yaml = random_policy(random);
    let network = parse(&yaml);
    let mut backend = HostBackend::new(&yaml).unwrap();
    let guests: Vec<Ipv4Addr> = GUESTS.iter().map(|g| g.1.parse().unwrap()).collect();
    let mut matched = BTreeSet::new();
    let mut tick = 1000;
    let mut done = 0;
    while done < packets {
        let Some((flow, decisions)) = draw(random, &network) else { continue };
        done += 1;
        // Long after every deadline: the flow of an earlier packet with the same tuple is gone.
        tick += 10_000;
        backend.env.set_now(tick);
        let expected = decisions.last().map_or((true, None), |(d, _)| (d.allow, Some(d.rule.clone())));
        assert_eq!(engine(&mut backend, &flow, &guests), expected, "{flow:?}\n{yaml}");
        tally.packets += 1;
        tally.defaults += usize::from(expected.1.is_some_and(|rule| rule.contains("/default")));
        matched.extend(decisions.into_iter().map(|(d, _)| d.rule));
    }
    tally.rules += network.groups.iter().map(|g| g.rules.len()).sum::<usize>();
    tally.matched += matched.iter().filter(|rule| rule.contains("/securityRules/")).count();
}

/// The groups a flow meets, in order; `None` when the gateway has other reasons to refuse it.
fn asked(network: &Network, flow: &Flow, guests: &[Ipv4Addr]) -> Option<Vec<(usize, Direction)>> {
    let place = |a: Ipv4Addr| guests.iter().position(|g| *g == a);
    let octets = |a: Ipv4Addr| a.octets();
    let in_vnet = |a: Ipv4Addr| octets(a)[..2] == [10, 0];
    let usable = |a: Ipv4Addr| {
        place(a).is_some()
            || (!in_vnet(a) && !matches!(octets(a)[0], 0 | 127 | 224..) && octets(a)[..3] != [203, 0, 113])
    };
    if !usable(flow.source) || !usable(flow.destination) || flow.source == flow.destination {
        return None;
    }
    // DHCP is decided before the groups.
    if flow.protocol == 17 && (flow.source_port == 67 || flow.destination_port == 67) {
        return None;
    }
    let (from, to) = (place(flow.source), place(flow.destination));
    if from.is_none() && to.is_none() {
        return None;
    }
    let groups = |guest: usize| {
        let interface = &network.interfaces[guest];
        (interface.group, network.subnets[interface.addresses[0].subnet].group)
    };
    let mut asked = Vec::new();
    if let Some(guest) = from {
        let (nic, subnet) = groups(guest);
        asked.extend([nic, subnet].into_iter().flatten().map(|g| (g, Direction::Outbound)));
    }
    if let Some(guest) = to {
        let (nic, subnet) = groups(guest);
        asked.extend([subnet, nic].into_iter().flatten().map(|g| (g, Direction::Inbound)));
    }
    Some(asked)
}

/// What the engine says: allowed?, and the rule that decided.
fn engine(backend: &mut HostBackend, flow: &Flow, guests: &[Ipv4Addr]) -> (bool, Option<String>) {
    let place = |a: Ipv4Addr| guests.iter().position(|g| *g == a);
    let (mac, device, destination) = match (place(flow.source), place(flow.destination)) {
        (Some(guest), _) => ([2, 0, 0, 0, 0, guest as u8], GUESTS[guest].0, flow.destination),
        (None, Some(guest)) => ([2, 0, 0, 0, 0xff, 1], "up", [203, 0, 113, 20 + guest as u8].into()),
        (None, None) => unreachable!("one side is a guest"),
    };
    let craft = Craft::new(mac, flow.source, [2, 0, 0, 0, 0xaa, 0], destination);
    let frame = match flow.protocol {
        6 => craft.tcp(flow.source_port, flow.destination_port, TcpFlags::SYN, 1, 0, b""),
        17 => craft.udp(flow.source_port, flow.destination_port, b""),
        1 => craft.echo_request(7, 1, b""),
        other => {
            let mut frame = craft.udp(0, 0, b"12345678");
            frame[23] = other;
            frame
        }
    };
    let index = backend.gateway().devices[device].ifindex;
    let (verdict, _, ctx) = backend.env.packet(&frame, index, Hook::Tc, false);
    let rule = backend.gateway().registry.rule_key(ctx.rule).map(str::to_owned);
    (matches!(verdict, Verdict::Redirect(_) | Verdict::Neighbour(..)), rule)
}

fn hundred_thousand(seed: u64) {
    let mut random = Random(seed | 1);
    let mut tally = Tally { packets: 0, defaults: 0, rules: 0, matched: 0 };
    for _ in 0..25 {
        one_policy(&mut random, 4000, &mut tally);
    }
    let covered = tally.matched * 100 / tally.rules;
    let defaults = tally.defaults * 100 / tally.packets;
    println!(
        "seed {seed}: {} packets, {covered} % of rules matched first, {defaults} % ended in a default rule",
        tally.packets
    );
    assert_eq!(tally.packets, 100_000);
    assert!(covered >= 80, "only {covered} % of the rules were the first match of any packet (seed {seed})");
    assert!(defaults <= 30, "{defaults} % of the packets ended in a default rule (seed {seed})");
}

#[test]
fn the_engine_agrees_with_the_linear_model_on_a_fixed_seed() {
    hundred_thousand(0x5eed);
}

#[test]
fn the_engine_agrees_with_the_linear_model_on_a_random_seed() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    hundred_thousand(now.as_nanos() as u64);
}
