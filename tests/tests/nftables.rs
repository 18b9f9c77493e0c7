//! The kernel programs against nftables: random policies, translated for nftables by the few lines here, and the same
//! packets through both. Each is the first packet of a flow, so neither's memory of flows has a say.
//!
//! A packet from the world has the guest's public address on the way to Portcullis and its private one on the way to
//! nftables, since groups see private addresses only.

#[path = "nftables/corners.rs"]
mod corners;
#[path = "nftables/policy.rs"]
mod policy;
#[path = "nftables/ruleset.rs"]
mod ruleset;
#[path = "nftables/yaml.rs"]
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use policy::{GUESTS, Policy, Rule};
use portcullis_common::Reason;
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Action, At, Backend as _, KernelBackend};
use portcullis_tests::lab::{Craft, Craft6, Forwarder, TcpFlags};
use portcullis_tests::random::Random;

const POLICIES: usize = 50;
const PACKETS: usize = 60;
const DEVICES: [&str; 5] = ["vm1", "vm2", "vm3", "vm4", "up"];

/// The first packet of a flow, on private addresses. ICMP has its identifier as source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packet {
    pub protocol: u8,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
}

impl Packet {
    /// What would answer it.
    fn reverse(self) -> Self {
        Packet {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }

    fn frame(&self, from: [u8; 6], to: [u8; 6], destination: IpAddr) -> Vec<u8> {
        let (sport, dport) = (self.source_port, self.destination_port);
        match (self.source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let craft = Craft::new(from, source, to, destination);
                match self.protocol {
                    6 => craft.tcp(sport, dport, TcpFlags::SYN, 1, 0, b""),
                    17 => craft.udp(sport, dport, b"?"),
                    _ => craft.echo_request(sport, 1, b""),
                }
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let craft = Craft6::new(from, source, to, destination);
                match self.protocol {
                    6 => craft.tcp(sport, dport, TcpFlags::SYN, 1),
                    17 => craft.udp(sport, dport, b"?"),
                    _ => craft.echo_request(sport, 1),
                }
            }
            _ => unreachable!("one family"),
        }
    }

    /// As nftables gets it.
    fn routed(&self) -> Vec<u8> {
        self.frame([2, 0, 0, 0, 0xcc, 2], Forwarder::MAC, self.destination)
    }

    /// As Portcullis gets it, and on which device.
    fn arriving(&self) -> (&'static str, Vec<u8>) {
        let gateway = [2, 0, 0, 0, 0xaa, 0];
        let place = |address: IpAddr| GUESTS.iter().position(|guest| guest.has(address));
        match (place(self.source), place(self.destination)) {
            (Some(guest), _) => {
                (GUESTS[guest].name, self.frame([2, 0, 0, 0, 0, guest as u8], gateway, self.destination))
            }
            (None, Some(guest)) => {
                let public = IpAddr::from([203, 0, 113, 20 + guest as u8]);
                ("up", self.frame([2, 0, 0, 0, 0xff, 1], gateway, public))
            }
            (None, None) => unreachable!("one side is a guest"),
        }
    }
}

/// A policy, packets for it, and what nftables did with each.
struct Case {
    yaml: String,
    ruleset: String,
    policy: Policy,
    packets: Vec<Packet>,
    passed: Vec<bool>,
}

/// Policies that have rules of all [`Rule::KINDS`] and allow a tenth to nine tenths of their packets, by what nftables
/// does; the others are drawn again. No packet repeats or answers one before it.
fn cases(random: &mut Random) -> (Vec<Case>, usize) {
    let router = Forwarder::build().unwrap();
    let mut known = BTreeSet::new();
    let mut cases = Vec::new();
    let mut refused = 0;
    while cases.len() < POLICIES {
        let policy = Policy::random(random);
        if (0..Rule::KINDS.len()).any(|kind| !policy.rules().any(|rule| rule.kinds()[kind])) {
            refused += 1;
            continue;
        }
        let mut packets = Vec::new();
        while packets.len() < PACKETS {
            let Some(packet) = policy.corner(random) else { continue };
            if known.insert(packet) && known.insert(packet.reverse()) {
                packets.push(packet);
            }
        }
        let ruleset = policy.ruleset();
        router.load(&ruleset).unwrap_or_else(|error| panic!("{error}\n{ruleset}"));
        let frames: Vec<Vec<u8>> = packets.iter().map(Packet::routed).collect();
        let passed = router.fates(&frames).unwrap_or_else(|error| panic!("{error}\n{packets:?}\n{ruleset}"));
        let allowed = passed.iter().filter(|passed| **passed).count();
        if !(PACKETS..=9 * PACKETS).contains(&(10 * allowed)) {
            refused += 1;
            continue;
        }
        cases.push(Case { yaml: policy.yaml(), ruleset, policy, packets, passed });
    }
    (cases, refused)
}

/// What one hook makes of all cases: how many packets differ from nftables, told in words, and how many rules decided
/// a packet or let one through: all of them, those of groups at interfaces, and those of each of [`Rule::KINDS`].
fn compare(cases: &[Case], hook: Hook) -> (Vec<String>, [usize; 7]) {
    KernelBackend::with(&cases[0].yaml, &DEVICES, hook, |backend| {
        let mut differing = Vec::new();
        let mut met = [0; 7];
        for (number, case) in cases.iter().enumerate() {
            backend.change(&case.yaml)?;
            let before = backend.rule_hits()?;
            for (packet, passed) in case.packets.iter().zip(&case.passed) {
                let (device, frame) = packet.arriving();
                let reasons = backend.counters()?;
                let outcome = backend.run(At::Ingress(device), &frame)?;
                let reason = moved(&reasons, &backend.counters()?);
                let expected = if *passed {
                    (Action::Send, Reason::NewFlow)
                } else {
                    (Action::Drop, Reason::DeniedByRule)
                };
                if (outcome.action, reason) != (expected.0, Some(expected.1)) {
                    differing.push(format!(
                        "policy {number}, {packet:?}: nftables {}, {} {:?} as {reason:?}\n{}\n{}",
                        if *passed { "passed" } else { "dropped" },
                        backend.name(),
                        outcome.action,
                        case.yaml,
                        case.ruleset,
                    ));
                }
            }
            let hits = backend.rule_hits()?;
            for (key, _) in hits.iter().filter(|(key, hits)| before.get(*key) != Some(hits)) {
                let Some(rule) = case.policy.rule(key) else { continue };
                met[0] += 1;
                met[1] += usize::from(key.starts_with("g2") || key.starts_with("g3"));
                for (met, has) in met[2..].iter_mut().zip(rule.kinds()) {
                    *met += usize::from(has);
                }
            }
        }
        Ok((differing, met))
    })
    .unwrap()
}

/// The one counter that moved.
fn moved(before: &BTreeMap<Reason, u64>, after: &BTreeMap<Reason, u64>) -> Option<Reason> {
    let mut moved = after.iter().filter(|(reason, count)| before.get(reason) != Some(count));
    let first = moved.next().map(|(reason, _)| *reason);
    first.filter(|_| moved.next().is_none())
}

fn fifty_policies(seed: u64) {
    let (cases, refused) = cases(&mut Random(seed | 1));
    let packets: Vec<&Packet> = cases.iter().flat_map(|case| &case.packets).collect();
    let allowed = cases.iter().flat_map(|case| &case.passed).filter(|passed| **passed).count();
    let shares =
        cases.iter().map(|case| case.passed.iter().filter(|passed| **passed).count() * 100 / PACKETS);
    let (least, most) = (shares.clone().min().unwrap_or(0), shares.max().unwrap_or(0));
    let six = packets.iter().filter(|packet| packet.source.is_ipv6()).count();
    let of = |protocol: &[u8]| packets.iter().filter(|packet| protocol.contains(&packet.protocol)).count();
    let rules: usize = cases.iter().map(|case| case.policy.rules().count()).sum();
    for hook in [Hook::Xdp, Hook::Tc] {
        let (differing, met) = compare(&cases, hook);
        println!(
            "seed {seed}, {hook:?}: {} policies of {rules} rules, {} of them met ({} of interfaces' groups, {:?} with {:?}; {refused} policies drawn again); \
             {} packets ({} TCP, {} UDP, {} ICMP; {six} of IPv6), {allowed} allowed ({} %, of one policy's {least} to {most} %), {} mismatches",
            cases.len(),
            met[0],
            met[1],
            &met[2..],
            Rule::KINDS,
            packets.len(),
            of(&[6]),
            of(&[17]),
            of(&[1, 58]),
            allowed * 100 / packets.len(),
            differing.len(),
        );
        assert!(met.iter().all(|met| *met >= POLICIES / 2), "seed {seed}: too few rules are met: {met:?}");
        assert!(differing.is_empty(), "seed {seed}: {}", differing[0]);
    }
    assert!(packets.len() >= 2000 && cases.len() == POLICIES);
}

#[test]
fn the_kernel_programs_and_nftables_agree_on_a_fixed_seed() {
    fifty_policies(0x5eed);
}

#[test]
fn the_kernel_programs_and_nftables_agree_on_a_random_seed() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    fifty_policies(now.as_nanos() as u64);
}
