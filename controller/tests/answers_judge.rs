//! Judging sets of packets against judging packets one by one, over random networks of both families.

mod answers_support;
mod compile_support;

use std::collections::HashMap;

use answers_support::{corners, random_network, random_packet};
use compile_support::Random;
use portcullis::answers::addresses::AddressSet;
use portcullis::answers::judge::{judge as judge_region, one_family_each};
use portcullis::answers::regions::{ANY_PORT, Protocols, Region};
use portcullis::answers::trace::{Packet, judge};
use portcullis::policy::network::{Access, Direction};

#[test]
fn a_set_of_one_packet_is_judged_as_the_packet_with_the_same_rules_tried() {
    let mut random = Random::from_clock();
    let (mut asked, mut verdicts) = (0, HashMap::<bool, usize>::new());
    for _ in 0..40 {
        let net = random_network(&mut random, 12);
        for interface in 0..net.interfaces.len() {
            let subnet = net.interfaces[interface].addresses[0].subnet;
            let corners = corners(&net, subnet);
            for _ in 0..60 {
                let packet = random_packet(&mut random, &corners);
                for direction in [Direction::Inbound, Direction::Outbound] {
                    let one = judge(&net, (interface, 0), direction, &packet);
                    let set = judge_region(&net, (interface, 0), direction, &Region::from(&packet)).unwrap();
                    assert_eq!(
                        (one.platform, one.access),
                        (set.platform, set.access),
                        "{packet:?} {direction:?}"
                    );
                    assert_eq!(one.groups.len(), set.groups.len());
                    for (one, set) in one.groups.iter().zip(&set.groups) {
                        let names = |trials: &[portcullis::answers::trace::Trial<'_>]| -> Vec<_> {
                            trials.iter().map(|trial| (trial.rule.name.clone(), trial.fields)).collect()
                        };
                        assert_eq!(names(&one.trials), names(&set.trials), "{packet:?}");
                        assert_eq!(one.matched().map(|rule| &rule.name), set.matched.map(|rule| &rule.name));
                        assert!(set.parts.is_empty());
                    }
                    asked += 1;
                    *verdicts.entry(one.access == Access::Allow).or_default() += 1;
                }
            }
        }
    }
    println!("{asked} packets, {verdicts:?}");
    assert!(verdicts.values().all(|count| count * 10 > asked), "both verdicts occur");
}

#[test]
fn a_profile_is_allowed_exactly_if_every_packet_of_it_is() {
    let mut random = Random::from_clock();
    let (mut allowed, mut denied, mut split) = (0, 0, 0);
    for _ in 0..60 {
        let net = random_network(&mut random, 5);
        let corners = corners(&net, 0);
        let packets: Vec<Packet> = (0..400).map(|_| random_packet(&mut random, &corners)).collect();
        for _ in 0..30 {
            let side = |random: &mut Random| match random.below(4) {
                0 => AddressSet::everything(),
                1 => AddressSet::from_prefixes(&answers_support::nets(&["10.0.0.0/15", "fd00:a::/32"])),
                2 => AddressSet::from_prefixes(&answers_support::nets(&["10.0.1.0/24"])),
                _ => AddressSet::single(*random.pick(&corners)),
            };
            let mut profile = Region {
                protocols: *random.pick(&[Protocols::ALL, Protocols::TCP, Protocols::UDP]),
                source: side(&mut random),
                source_ports: vec![ANY_PORT],
                destination: side(&mut random),
                destination_ports: vec![*random.pick(&[ANY_PORT, (80, 80), (25, 25), (0, 1023)])],
            };
            if one_family_each(&mut profile).is_err() {
                continue;
            }
            for direction in [Direction::Inbound] {
                let said = judge_region(&net, (0, 0), direction, &profile).unwrap();
                split += said.groups.iter().filter(|group| !group.parts.is_empty()).count();
                let inside = packets.iter().filter(|p| profile.covers(&Region::from(*p)));
                match said.access {
                    Access::Allow => {
                        allowed += 1;
                        for packet in inside {
                            let one = judge(&net, (0, 0), direction, packet);
                            assert_eq!(one.access, Access::Allow, "{packet:?} of {profile:?}");
                        }
                    }
                    Access::Deny => {
                        denied += 1;
                        // The rule named really denies some packet of the profile: found in the space, shown by the model.
                        let group = said.groups.last().unwrap();
                        let deny = group.matched.unwrap();
                        assert_eq!(deny.access, Access::Deny);
                        let witness = witness(&net, group.group, direction, deny, &profile);
                        let mut evaluator = portcullis::answers::trace::Evaluator::new(&net, 0);
                        let trace = evaluator.group(group.group, group.level, direction, &witness, None);
                        assert_eq!(trace.matched().unwrap().name, deny.name, "{witness:?}");
                        assert!(profile.covers(&Region::from(&witness)));
                    }
                }
            }
        }
    }
    println!("{allowed} profiles allowed, {denied} denied, {split} groups decided by parts");
    assert!(allowed > 20 && denied > 20 && split > 20);
}

/// A packet of the profile that this rule is the first of its group to match.
fn witness(
    net: &portcullis::policy::network::Network,
    group: usize,
    direction: Direction,
    rule: &portcullis::policy::network::SecurityRule,
    profile: &Region,
) -> Packet {
    use portcullis::answers::expand::Terms;
    use portcullis::answers::regions::{Cover, Space};
    let rules = portcullis::compile::rules::in_order(&net.groups[group], direction);
    let mut terms = Terms::new(net, 0);
    let mut regions: Vec<Region> = rules.iter().map(|rule| Region::of_rule(rule, &mut terms)).collect();
    regions.push(profile.clone());
    let at = rules.iter().position(|other| other.name == rule.name).unwrap();
    let before: Vec<usize> = (0..at).collect();
    match Space::new(&regions).covered(&[at, rules.len()], &before) {
        Cover::Left(packet) => packet,
        other => panic!("{other:?}"),
    }
}
