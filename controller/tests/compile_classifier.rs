//! The classifier's image against a plain linear first match over the policy, for both families, from every subnet.

mod compile_support;
#[path = "../../tests/src/model.rs"]
#[allow(dead_code, reason = "every test file uses its own part of this")]
mod model;

use std::net::{IpAddr, Ipv4Addr};

use compile_support::random_policy::*;
use compile_support::*;
use portcullis::compile::lookup::{self, PacketKey, classify, matches};
use portcullis::compile::{Compiled, HostFacts, Ownership, Registry, RulesetOf, compile};
use portcullis::policy::network::{Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule};
use portcullis_common::policy::{
    EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM, EXEMPT_OTHER, IN_APPLIANCE, IN_GATEWAY, IN_NETWORK, IN_NOWHERE,
    IN_PLATFORM, IN_WORLD, RULE_ALLOW, RULE_ID, rule_action,
};

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
