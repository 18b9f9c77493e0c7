//! The kernel asked without being touched: a dry run answers what the live programs then do, and moves nothing.

use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Action, At, Backend as _, HostBackend, KernelBackend};
use portcullis_tests::lab::{Craft, Craft6, Mac, TcpFlags};
use portcullis_tests::random::Random;

/// With timers that do not run out while a busy machine takes its time: the host engine's clock stands still.
const POLICY: &str = concat!(
    include_str!("policies/both-families.yaml"),
    "\ntimeouts: { tcpHalfOpenSeconds: 3600, tcpFinSeconds: 3600, tcpResetSeconds: 3600, udpSeconds: 3600, icmpSeconds: 3600 }\n"
);
const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];
const PACKETS: usize = 600;

/// A guest's device, hardware address and addresses.
const GUESTS: [(&str, Mac, &str, &str); 3] = [
    ("vm1", [2, 0, 0, 0, 0, 1], "10.0.1.4", "fd00:1:0:1::4"),
    ("vm2", [2, 0, 0, 0, 0, 2], "10.0.1.5", "fd00:1:0:1::5"),
    ("vm3", [2, 0, 0, 0, 0, 3], "10.0.2.4", "fd00:1:0:2::4"),
];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
const ELSEWHERE: [(&str, &str); 4] = [
    ("198.51.100.7", "2001:db8::7"),
    ("10.0.1.99", "fd00:1:0:1::99"),
    ("10.0.1.1", "fd00:1:0:1::1"),
    ("169.254.169.254", "fe80::1"),
];
const PORTS: [u16; 5] = [22, 53, 80, 443, 5432];
const FLAGS: [TcpFlags; 4] = [TcpFlags::SYN, TcpFlags::SYN, TcpFlags::ACK, TcpFlags::FIN_ACK];

/// A packet of some guest, mostly honest.
fn packet(random: &mut Random) -> (&'static str, Vec<u8>) {
    let (device, mac, v4, v6) = GUESTS[random.below(3)];
    let (mut source4, mut source6) = (v4, v6);
    if random.chance(5) {
        (_, _, source4, source6) = GUESTS[random.below(3)];
    }
    let (to4, to6) = if random.chance(50) {
        let (_, _, v4, v6) = GUESTS[random.below(3)];
        (v4, v6)
    } else {
        ELSEWHERE[random.below(4)]
    };
    let (sport, dport) = (40_000 + random.below(3) as u16, PORTS[random.below(5)]);
    let flags = FLAGS[random.below(4)];
    let frame = if random.chance(50) {
        let craft = Craft::new(mac, source4.parse().unwrap(), GATEWAY, to4.parse().unwrap());
        match random.below(3) {
            0 => craft.tcp(sport, dport, flags, 1, 0, b""),
            1 => craft.udp(sport, dport, b"?"),
            _ => craft.echo_request(sport, 1, b"echo"),
        }
    } else {
        let craft = Craft6::new(mac, source6.parse().unwrap(), GATEWAY, to6.parse().unwrap());
        match random.below(4) {
            0 => craft.tcp(sport, dport, flags, 1),
            1 => craft.udp(sport, dport, b"?"),
            2 => craft.protocol(50, &[0; 8]),
            _ => craft.echo_request(sport, 1),
        }
    };
    (device, frame)
}

fn asked_and_done(backend: &mut KernelBackend) -> anyhow::Result<()> {
    let mut host = HostBackend::new(POLICY)?;
    let dry = backend.datapath.dry_run()?;
    let (v4, v6) = (backend.datapath.flow_table()?, backend.datapath.flow_table6()?);
    let mut random = Random(0x5eed);
    let mut fates = std::collections::BTreeMap::new();
    for n in 0..PACKETS {
        let (device, frame) = packet(&mut random);
        let ifindex = backend.ifindex(device)?;
        let state = |b: &KernelBackend| -> anyhow::Result<_> {
            let hops: Vec<_> = b.gateway().next_hops().iter().map(|(i, _)| *i).collect();
            let hops: Vec<_> =
                b.datapath.next_hops()?.into_iter().filter(|(i, _)| hops.contains(i)).collect();
            Ok((
                b.counters()?,
                b.rule_hits()?,
                v4.iter().collect::<Vec<_>>(),
                v6.iter().collect::<Vec<_>>(),
                hops,
            ))
        };
        let before = state(backend)?;
        let answer = dry.ingress(backend.hook(), &frame, ifindex)?;
        assert_eq!(state(backend)?, before, "packet {n}: asking has changed something");
        let again = dry.ingress(backend.hook(), &frame, ifindex)?;
        assert_eq!(again.outcome, answer.outcome, "packet {n}: asked twice");

        let done = backend.run(At::Ingress(device), &frame)?;
        let verdicts = match backend.hook() {
            Hook::Xdp => [(1, Action::Drop), (2, Action::Pass), (4, Action::Send)],
            Hook::Tc => [(2, Action::Drop), (u32::MAX, Action::Pass), (7, Action::Send)],
        };
        let said = verdicts.iter().find(|(code, _)| *code == answer.outcome.verdict).map(|(_, a)| *a);
        assert_eq!(said, Some(done.action), "packet {n}: {:?}", answer.reason);
        assert_eq!(answer.outcome.packet, done.frame, "packet {n}");
        let after = backend.counters()?;
        let moved: Vec<_> =
            after.iter().filter(|(r, n)| before.0.get(r) != Some(n)).map(|(r, _)| *r).collect();
        assert_eq!(answer.reason.into_iter().collect::<Vec<_>>(), moved, "packet {n}");
        *fates.entry(answer.reason).or_insert(0usize) += 1;

        // The engine on the host decides the same (its next hops are learned in the same order).
        if backend.hook() == Hook::Tc {
            let before = host.counters()?;
            let here = host.run(At::Ingress(device), &frame)?;
            assert_eq!(here.action, done.action, "packet {n} on the host engine");
            let after = host.counters()?;
            let here: Vec<_> =
                after.iter().filter(|(r, n)| before.get(r) != Some(n)).map(|(r, _)| *r).collect();
            assert_eq!(here, moved, "packet {n} on the host engine");
        }
    }
    println!("{:?}: {fates:?}", backend.hook());
    assert!(fates.len() >= 8, "too few fates: {fates:?}");
    Ok(())
}

#[test]
fn a_dry_run_says_what_xdp_then_does_and_moves_nothing() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Xdp, asked_and_done).unwrap();
}

#[test]
fn a_dry_run_says_what_tc_then_does_and_moves_nothing() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Tc, asked_and_done).unwrap();
}
