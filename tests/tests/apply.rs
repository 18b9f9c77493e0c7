//! A policy is in force whole or not at all, and a change of policy loses nothing (design §1, promise 3).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net};
use portcullis::policy;
use portcullis::policy::network::{
    Access, AddressMatch, Direction, Network, RuleProtocol, SecurityGroup, SecurityRule, ServiceTag,
    TagDefinition,
};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Backend as _, KernelBackend};
use portcullis_tests::lab::{Craft, Mac};
use portcullis_tests::random::Random;

/// How often the policy changes, and how many packets at least meet it meanwhile.
const FLIPS: u32 = 1000;
const PACKETS: u64 = 1_000_000;

const VM1: Mac = [2, 0, 0, 0, 0, 1];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];

/// Two levels, of which one lets port 1001 pass and the other port 1002; `swapped` the other way round. Both ports are
/// denied under either policy, always by the level that does not let them pass; 1003 is allowed by both. Only a mixture
/// of the two would let 1001 or 1002 through, or stop 1003.
fn complementary(swapped: bool) -> String {
    let (nic, subnet) = if swapped { (1002, 1001) } else { (1001, 1002) };
    let name = if swapped { "b" } else { "a" };
    let rules = |own: u16, other: u16| {
        let rule = |priority: u16, port: u16, access: &str| {
            format!(
                "      - {{ name: {name}{port}, priority: {priority}, direction: Outbound, access: {access}, protocol: Udp, \
                 sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: {port} }}\n"
            )
        };
        rule(100, own, "Allow") + &rule(110, other, "Deny") + &rule(120, 1003, "Allow")
    };
    format!(
        "virtualNetworks:
  - name: lab
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets: [{{ name: a, addressPrefix: 10.0.1.0/24, networkSecurityGroup: subnet }}, {{ name: b, addressPrefix: 10.0.2.0/24 }}]
networkInterfaces:
  - {{ name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, networkSecurityGroup: nic, ipConfigurations: [{{ subnet: a, privateIPAddress: 10.0.1.4 }}] }}
  - {{ name: vm2, device: vm2, macAddress: 02:00:00:00:00:02, ipConfigurations: [{{ subnet: b, privateIPAddress: 10.0.2.4 }}] }}
networkSecurityGroups:
  - name: nic
    securityRules:
{}  - name: subnet
    securityRules:
{}uplinks: [{{ device: up }}]
",
        rules(nic, subnet),
        rules(subnet, nic)
    )
}

/// A hundred interfaces, each with a group of its own and in a subnet with another; a thousand rules in every one, which
/// name all tags of the public file between them.
fn two_hundred_groups(tags: Vec<TagDefinition>) -> Network {
    let mut random = Random(99);
    let mut network = policy::parse("first.yaml", &plain()).expect("a literal").network;
    let prefix = |address: u32, length| {
        AddressMatch::Prefix(IpNet::V4(Ipv4Net::new(address.into(), length).expect("a literal").trunc()))
    };
    let mut next = 0;
    for g in 0..200 {
        let mut group = SecurityGroup { name: format!("group{g}"), rules: Vec::new() };
        for n in 0..1000u16 {
            let direction = if n % 2 == 0 { Direction::Inbound } else { Direction::Outbound };
            next += 1;
            let remote = match random.below(10) {
                0 => AddressMatch::Any,
                1 => AddressMatch::Tag(ServiceTag::Internet),
                2 => prefix(0x1400_0000 | random.next() as u32 & 0xff_ffff, 28),
                _ => AddressMatch::Tag(ServiceTag::Named(next % tags.len())),
            };
            let local = match random.below(4) {
                0 => AddressMatch::Any,
                1 => AddressMatch::Tag(ServiceTag::VirtualNetwork),
                _ => prefix(0x0a00_0000 | random.next() as u32 & 0xffff, 30),
            };
            let (source, destination) =
                if direction == Direction::Inbound { (remote, local) } else { (local, remote) };
            let port = random.below(2000) as u16 * 20;
            group.rules.push(SecurityRule {
                name: format!("r{n}"),
                description: String::new(),
                priority: 100 + n,
                direction,
                access: if random.chance(50) { Access::Allow } else { Access::Deny },
                protocol: [RuleProtocol::Tcp, RuleProtocol::Udp, RuleProtocol::Any][random.below(3)],
                source: vec![source],
                destination: vec![destination],
                source_ports: vec![(0, 65535)],
                destination_ports: vec![(port, port + random.below(3) as u16 * 15)],
            });
        }
        network.groups.push(group);
    }
    for i in 0..100 {
        let mut subnet = network.subnets[0].clone();
        subnet.name = format!("s{i}");
        subnet.prefixes = vec![format!("10.0.{}.0/24", 100 + i).parse().expect("a literal")];
        subnet.gateways = vec![format!("10.0.{}.1", 100 + i).parse().expect("a literal")];
        subnet.group = Some(i);
        network.subnets.push(subnet);
        let mut guest = network.interfaces[0].clone();
        guest.name = format!("guest{i}");
        guest.group = Some(100 + i);
        guest.mac = Some([2, 0, 0, 0, 1, i as u8]);
        guest.addresses[0].address = format!("10.0.{}.4", 100 + i).parse().expect("a literal");
        guest.addresses[0].subnet = network.subnets.len() - 1;
        network.interfaces.push(guest);
    }
    network.tags = tags;
    network
}

/// Two guests without any group.
fn plain() -> String {
    "virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets: [{ name: a, addressPrefix: 10.0.1.0/24 }, { name: b, addressPrefix: 10.0.2.0/24 }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, ipConfigurations: [{ subnet: a, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: 02:00:00:00:00:02, ipConfigurations: [{ subnet: b, privateIPAddress: 10.0.2.4 }] }
uplinks: [{ device: up }]
"
    .to_owned()
}

#[test]
fn two_hundred_groups_and_the_whole_tag_file_come_into_force_and_no_live_flow_loses_a_packet() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/data/servicetags/ServiceTags_Public_20251013.json"
    );
    let text = format!("serviceTags: {{ file: '{file}' }}\n{}", plain());
    if !std::path::Path::new(file).exists() {
        println!("skipped: no {file}");
        return;
    }
    let tags = policy::parse("tags.yaml", &text).expect("the public file is in order").network.tags;
    assert_eq!(tags.len(), 3039);
    let network = two_hundred_groups(tags);
    KernelBackend::with(&plain(), &["vm1", "vm2", "up"], Hook::Xdp, |backend| {
        let ifindex = backend.ifindex("vm1")?;
        let tester = backend.datapath.tester()?;
        let stop = AtomicBool::new(false);
        let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let traffic = scope.spawn(|| -> anyhow::Result<u64> {
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                let craft = Craft::new(VM1, [10, 0, 1, 4].into(), GATEWAY, [10, 0, 2, 4].into());
                let mut sent = 0;
                while !stop.load(Relaxed) {
                    let frame = craft.udp(1000 + (sent % 100) as u16, 53, b"");
                    let verdict = tester.run(Hook::Xdp, &frame, ifindex)?.verdict;
                    anyhow::ensure!(verdict == 4, "packet {sent} of a live flow got verdict {verdict}");
                    sent += 1;
                }
                Ok(sent)
            });
            std::thread::sleep(Duration::from_millis(200));
            for time in ["the first time", "again"] {
                let start = Instant::now();
                backend.gateway.compile_next(&network)?;
                let compiled = start.elapsed();
                let image = backend.gateway.image();
                let installing = Instant::now();
                backend.datapath.install(&image)?;
                println!(
                    "{time}: compiled in {compiled:.2?}, installed in {:.2?} besides traffic; {} prefixes, {} rules, {:.1} MB",
                    installing.elapsed(),
                    image.prefixes.len() + image.prefixes6.len(),
                    image.rule_ids.len(),
                    backend.gateway.compiled.memory_bytes as f64 / 1e6
                );
            }
            assert_eq!(backend.datapath.generation(), 3, "one generation for each change");
            stop.store(true, Relaxed);
            let sent = traffic.join().expect("the traffic's thread")?;
            println!("{sent} packets of live flows, none lost");
            assert!(sent > 100_000);
            Ok(())
        })
    })
    .unwrap();
}

#[test]
fn no_packet_meets_a_mixture_of_two_policies_flipped_a_thousand_times() {
    let policies = [complementary(false), complementary(true)];
    KernelBackend::with(&policies[0], &["vm1", "vm2", "up"], Hook::Xdp, |backend| {
        let ifindex = backend.ifindex("vm1")?;
        let tester = backend.datapath.tester()?;
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let traffic = scope.spawn(|| -> anyhow::Result<[u64; 3]> {
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                let mut fates = [0; 3];
                let mut port = 0u16;
                while !stop.load(Relaxed) || sent.load(Relaxed) < PACKETS {
                    for (i, wanted) in [(0, 1), (1, 1), (2, 4)] {
                        port = port.wrapping_add(1);
                        let craft = Craft::new(VM1, [10, 0, 1, 4].into(), GATEWAY, [10, 0, 2, 4].into());
                        // Every packet is a new flow or none: few ports for the flows that live.
                        let source = if i == 2 { 20_000 + port % 1000 } else { port };
                        let frame = craft.udp(source, 1001 + i as u16, b"");
                        let verdict = tester.run(Hook::Xdp, &frame, ifindex)?.verdict;
                        anyhow::ensure!(
                            verdict == wanted,
                            "port {}: verdict {verdict}, no policy gives that",
                            1001 + i
                        );
                        fates[i] += 1;
                    }
                    sent.fetch_add(3, Relaxed);
                }
                Ok(fates)
            });
            let begun = Instant::now();
            let mut longest = Duration::ZERO;
            for flip in 1..=FLIPS {
                let start = Instant::now();
                backend.change(&policies[flip as usize % 2])?;
                longest = longest.max(start.elapsed());
                if traffic.is_finished() {
                    break;
                }
            }
            let took = begun.elapsed();
            stop.store(true, Relaxed);
            let fates = traffic.join().expect("the traffic's thread")?;
            println!(
                "{FLIPS} changes in {took:.1?} (the longest {longest:.1?}), {} packets: {fates:?}",
                fates.iter().sum::<u64>()
            );
            assert!(fates.iter().sum::<u64>() >= PACKETS);
            Ok(())
        })?;
        let hits = backend.rule_hits()?;
        let own = |letter: char| -> Vec<u64> {
            let named = hits.iter().filter(|(name, _)| name.contains(&format!("securityRules/{letter}1")));
            named.map(|(_, hits)| *hits).collect()
        };
        assert!(!own('a').is_empty(), "the first policy is in force: {hits:?}");
        assert_eq!(own('b'), [0u64; 0], "the counters of the other one's rules went with it");
        Ok(())
    })
    .unwrap();
}
