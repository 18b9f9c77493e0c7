//! How long compiling takes, and what comes out. Numbers are printed; what is asserted is loose, for the machine may
//! be busy. `cargo test --release --test compile_speed -- --nocapture`

mod compile_support;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use compile_support::*;
use ipnet::{IpNet, Ipv4Net};
use portcullis::compile::{Ownership, Registry, compile};
use portcullis::policy::network::{
    AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag, TagDefinition,
};

/// Debug builds are ten times slower; they compile a tenth.
const GROUPS: usize = if cfg!(debug_assertions) { 20 } else { 200 };

/// A network with one guest behind each group.
fn with_groups(mut rules: impl FnMut(usize) -> Vec<SecurityRule>) -> Network {
    let mut net = network(GROUPS);
    for i in 0..GROUPS {
        net.groups.push(group(&format!("group{i}"), rules(i)));
        net.interfaces[i].group = Some(i);
    }
    net
}

/// A thousand rules, half of them in each direction.
fn thousand(mut rule_for: impl FnMut(Direction, u16) -> SecurityRule) -> Vec<SecurityRule> {
    let both = [Direction::Inbound, Direction::Outbound];
    both.into_iter()
        .flat_map(|d| (0..500).map(move |i| (d, 100 + i * 7)))
        .map(|(d, p)| rule_for(d, p))
        .collect()
}

/// Processor time of this process so far, all threads: what counts when the machine is busy with other things.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = behind_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

fn measure(what: &str, net: &Network) -> Duration {
    let mut registry = Registry::default();
    let facts = facts(net);
    let (start, processor) = (Instant::now(), processor_time());
    let first = compile(net, &facts, &mut registry, &Ownership::default(), 1).unwrap();
    let (first_took, first_processor) = (start.elapsed(), processor_time() - processor);
    let (start, processor) = (Instant::now(), processor_time());
    let second = compile(net, &facts, &mut registry, &first.ownership, 2).unwrap();
    let (second_took, second_processor) = (start.elapsed(), processor_time() - processor);
    println!(
        "{what}: {} groups, {} rules, {} rulesets, {} + {} prefixes: \
         {first_took:.2?} ({first_processor:.2?} of processor), \
         again {second_took:.2?} ({second_processor:.2?}); {:.1} MB",
        net.groups.len(),
        second.rules.len(),
        second.rulesets.len(),
        second.prefixes.len(),
        second.prefixes6.len(),
        second.memory_bytes as f64 / 1e6,
    );
    first_processor.max(second_processor)
}

fn net(address: u32, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new(Ipv4Addr::from(address), len).unwrap().trunc())
}

#[test]
fn two_hundred_groups_of_a_thousand_rules_compile_in_a_moment() {
    let mut random = Random::new(42);
    // Tags as in the public file: 38,400 prefixes in a few thousand distinct sets; subnets and hosts on top.
    let tags: Vec<Vec<IpNet>> = (0..40)
        .map(|_| {
            let size = [60, 300, 1000, 3000][random.below(4)];
            (0..size)
                .map(|_| net(0x1400_0000 | random.next() as u32 & 0x0fff_ffff, 20 + random.below(13) as u8))
                .collect()
        })
        .collect();
    let own: Vec<IpNet> = (0..3000)
        .map(|_| net(0x0a00_0000 | random.next() as u32 & 0xf_ffff, 24 + random.below(9) as u8))
        .collect();
    let side = |random: &mut Random| match random.below(10) {
        0 | 1 => vec![AddressMatch::Any],
        2 => random.pick(&tags).iter().map(|&n| AddressMatch::Prefix(n)).collect(),
        _ => (0..=random.below(3)).map(|_| AddressMatch::Prefix(*random.pick(&own))).collect(),
    };
    let network = with_groups(|_| {
        thousand(|direction, priority| SecurityRule {
            protocol: RuleProtocol::Tcp,
            source: side(&mut random),
            destination: side(&mut random),
            destination_ports: {
                let first = random.below(300) as u16 * 20;
                vec![(first, first + random.below(3) as u16 * 15)]
            },
            ..rule(direction, &format!("r{priority}"), priority)
        })
    });
    let took = measure("shared prefixes and tags", &network);
    assert!(took < Duration::from_secs(20));
}

#[test]
fn rules_that_have_nothing_in_common_take_longer_but_not_forever() {
    let mut address = 0x0a00_0000u32;
    let network = with_groups(|_| {
        thousand(|direction, priority| {
            address += 3;
            SecurityRule {
                source: vec![AddressMatch::Prefix(net(address, 32))],
                destination_ports: vec![(priority, priority + 5)],
                ..rule(direction, &format!("r{priority}"), priority)
            }
        })
    });
    let took = measure("every rule its own address", &network);
    assert!(took < Duration::from_secs(60));
}

/// The tags of Azure's published file, where it is at hand.
fn public_tags() -> Option<Vec<TagDefinition>> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/data/servicetags/ServiceTags_Public_20251013.json"
    );
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("skipped: no {path}");
        return None;
    };
    let file: serde_json::Value = serde_json::from_str(text.trim_start_matches('\u{feff}')).unwrap();
    let tag = |tag: &serde_json::Value| TagDefinition {
        name: tag["name"].as_str().unwrap().into(),
        prefixes: tag["properties"]["addressPrefixes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|prefix| prefix.as_str().unwrap().parse::<IpNet>().unwrap())
            .collect(),
    };
    Some(file["values"].as_array().unwrap().iter().map(tag).collect())
}

/// The case: a hundred interfaces, each in a subnet of its own, each with a group and its subnet with another,
/// a thousand rules in every one that name all tags of the public file between them.
#[test]
fn two_hundred_groups_with_the_whole_public_tag_file_compile_in_a_moment() {
    let Some(tags) = public_tags() else { return };
    let mut random = Random::new(99);
    let mut network = network(0);
    network.load_balancers.clear();
    network.subnets.clear();
    let mut named = vec![false; tags.len()];
    let groups = if cfg!(debug_assertions) { 20 } else { 200 };
    let mut next = 0;
    for g in 0..groups {
        let rules = thousand(|direction, priority| {
            let tag = next % tags.len();
            next += 1;
            named[tag] = true;
            let remote = match random.below(10) {
                0 => vec![AddressMatch::Any],
                1 => vec![AddressMatch::Tag(ServiceTag::Internet)],
                2 => vec![AddressMatch::Prefix(net(0x1400_0000 | random.next() as u32 & 0xff_ffff, 28))],
                _ => vec![AddressMatch::Tag(ServiceTag::Named(tag))],
            };
            let local = match random.below(4) {
                0 => vec![AddressMatch::Any],
                1 => vec![AddressMatch::Tag(ServiceTag::VirtualNetwork)],
                _ => vec![AddressMatch::Prefix(net(0x0a00_0000 | random.next() as u32 & 0xffff, 30))],
            };
            let (source, destination) = match direction {
                Direction::Inbound => (remote, local),
                Direction::Outbound => (local, remote),
            };
            let port = random.below(2000) as u16 * 20;
            SecurityRule {
                protocol: *random.pick(&[RuleProtocol::Tcp, RuleProtocol::Udp, RuleProtocol::Any]),
                source,
                destination,
                destination_ports: vec![(port, port + random.below(3) as u16 * 15)],
                ..rule(direction, &format!("r{priority}"), priority)
            }
        });
        network.groups.push(group(&format!("group{g}"), rules));
    }
    for i in 0..groups / 2 {
        let subnets = (format!("10.0.{i}.0/24"), format!("10.0.{i}.1"));
        network.subnets.push(subnet(&format!("s{i}"), 0, &subnets.0, &subnets.1, Some(i)));
        let address = Ipv4Addr::new(10, 0, i as u8, 4);
        network.interfaces.push(guest(&format!("vm{i}"), address, i, Some(groups / 2 + i)));
    }
    network.tags = tags;
    if !cfg!(debug_assertions) {
        assert!(named.iter().all(|&named| named));
    }
    let took = measure("the public tag file", &network);
    assert!(took < Duration::from_secs(20));
}
