//! Ports as state: who keeps, gives up, drains and waits when pools change (`reference/azure.md` §2.6).

mod compile_support;

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use compile_support::pools::*;
use compile_support::*;
use portcullis::compile::ports::{
    Allocated, LiveUnits, Move, MoveKind, Ownership, Pool, TCP, UDP, allocate, moves,
};
use portcullis::compile::{Registry, compile};
use portcullis::policy::network::{Allocation, TransportProtocol};

fn in_use(ownership: &Ownership, member: &str, protocol: u8) -> BTreeSet<u16> {
    ownership.units_of(member, protocol).into_iter().map(|(_, unit)| unit).collect()
}

fn drains(ownership: &Ownership, member: &str, protocol: u8) -> BTreeSet<u16> {
    let of = ownership.iter().filter(|(_, p, _, owner)| *p == protocol && owner.member == member);
    of.filter(|unit| unit.3.draining_until.is_some()).map(|unit| unit.2).collect()
}

#[test]
fn the_51st_member_halves_everybody_and_units_with_flows_drain_those_with_the_fewest_first() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let held: Vec<u16> = in_use(&fifty, "vm0/ipconfig1", TCP).into_iter().collect();
    assert_eq!(held.len() * 8, 1024);
    // vm0: 100 units with TCP flows, the first with most; the last 28 have none. UDP idle.
    let flows = held[..100].iter().enumerate().map(|(i, &unit)| ((front(0), TCP, unit), 100 - i as u32));
    let live: LiveUnits = flows.collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 10_000);
    assert_eq!(in_use(&more, "vm0/ipconfig1", TCP), held[..64].iter().copied().collect());
    assert_eq!(drains(&more, "vm0/ipconfig1", TCP), held[64..100].iter().copied().collect());
    let owner = &more.frontends[&front(0)].tcp[&held[64]];
    assert_eq!(owner.draining_until, Some(10_000 + u64::from(DRAIN)));
    assert_eq!(
        in_use(&more, "vm0/ipconfig1", UDP),
        held[..64].iter().copied().collect(),
        "ties: the highest go"
    );
    assert!(drains(&more, "vm0/ipconfig1", UDP).is_empty(), "without a flow they are free at once");
    for i in 0..51 {
        for protocol in [TCP, UDP] {
            assert_eq!(in_use(&more, &format!("vm{i}/ipconfig1"), protocol).len() * 8, 512, "vm{i}");
        }
    }
    let newcomer = in_use(&more, "vm50/ipconfig1", TCP);
    assert!(
        newcomer.iter().all(|unit| !fifty.frontends[&front(0)].tcp.contains_key(unit)),
        "nobody's before"
    );

    // Whatever lives on decides, not the order of units.
    let live: LiveUnits = held[64..].iter().map(|&unit| ((front(0), UDP, unit), 1)).collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 10_000);
    assert_eq!(in_use(&more, "vm0/ipconfig1", UDP), held[64..].iter().copied().collect());
    assert!(drains(&more, "vm0/ipconfig1", UDP).is_empty());
}

#[test]
fn a_smaller_pool_gets_more_ports_and_loses_none_and_takes_back_what_drains() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let live: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 0);
    assert_eq!(drains(&more, "vm7/ipconfig1", TCP).len(), 64);
    let back = step(&more, &[pool("vm", 0..50, 0..1)], &live, 60);
    for i in 0..50 {
        let name = format!("vm{i}/ipconfig1");
        for protocol in [TCP, UDP] {
            assert_eq!(in_use(&back, &name, protocol), in_use(&fifty, &name, protocol), "{name}");
        }
    }
    assert_eq!(back.draining().count(), 0);
}

#[test]
fn a_unit_drains_until_its_last_flow_has_ended_and_is_nobody_elses_before() {
    let pools = [pool("vm", 0..51, 0..1)];
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let all: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let draining = step(&fifty, &pools, &all, 0);
    let lost: Vec<u16> = drains(&draining, "vm0/ipconfig1", TCP).into_iter().collect();
    let mut live = all.clone();
    live.remove(&(front(0), TCP, lost[0]));
    let later = step(&draining, &pools, &live, 100);
    assert!(!later.frontends[&front(0)].tcp.contains_key(&lost[0]), "its flow has ended");
    assert_eq!(later.frontends[&front(0)].tcp[&lost[1]], draining.frontends[&front(0)].tcp[&lost[1]]);
    let end = u64::from(DRAIN);
    assert_eq!(step(&later, &pools, &live, end - 1), later);
    assert_eq!(
        step(&later, &pools, &live, end),
        later,
        "not under a flow that lives: the daemon ends those first"
    );
    live.retain(|&(address, p, unit), _| {
        later.frontends[&address].of(p).get(&unit).is_some_and(|owner| owner.draining_until.is_none())
    });
    let over = step(&later, &pools, &live, end);
    assert_eq!(over.draining().count(), 0);
    // Who leaves the pool but not the policy drains too; who leaves both has no flows to speak of.
    let left = pool("vm", 1..50, 0..1);
    let mut known = ground(std::slice::from_ref(&left), &all, 0);
    known.exists.insert("vm0/ipconfig1");
    let switched = allocate(fifty.clone(), std::slice::from_ref(&left), &known).unwrap().ownership;
    assert_eq!(drains(&switched, "vm0/ipconfig1", TCP).len(), 128);
    assert!(in_use(&switched, "vm0/ipconfig1", TCP).is_empty());
    let gone = step(&fifty, std::slice::from_ref(&left), &all, 0);
    assert!(drains(&gone, "vm0/ipconfig1", TCP).is_empty());
}

#[test]
fn newcomers_share_what_is_free_while_units_drain_and_get_the_rest_as_drains_end() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let live: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let hundred = [pool("vm", 0..100, 0..1)];
    let Allocated { ownership: tight, pools } =
        allocate(fifty.clone(), &hundred, &ground(&hundred, &live, 0)).unwrap();
    assert_eq!(pools[0].1, 512, "entitled");
    // 1,600 units are free: 32 for each of the fifty.
    for i in 50..100 {
        assert_eq!(in_use(&tight, &format!("vm{i}/ipconfig1"), TCP).len(), 32, "vm{i}");
    }
    assert_eq!(tight.draining().count(), 2 * 50 * 64);
    // The drains of ten old members end: 640 units, of which everybody gets its part.
    let mut fewer = live.clone();
    fewer.retain(|&(address, p, unit), _| {
        let owner = &tight.frontends[&address].of(p)[&unit];
        let number: usize = owner.member["vm".len()..].split('/').next().unwrap().parse().unwrap();
        number >= 10 || owner.draining_until.is_none()
    });
    let better = step(&tight, &hundred, &fewer, 60);
    for i in 50..100 {
        let units = in_use(&better, &format!("vm{i}/ipconfig1"), TCP).len();
        assert!(units == 44 || units == 45, "vm{i}: {units}");
    }
    let done = step(&better, &hundred, &LiveUnits::new(), 120);
    assert!((0..100).all(|i| in_use(&done, &format!("vm{i}/ipconfig1"), UDP).len() == 64));
    assert_eq!(done.draining().count(), 0);
    // What cannot fit even then is Azure's error, as before.
    let manual = |ports| Pool { allocated_outbound_ports: ports, ..pool("vm", 0..100, 0..1) };
    assert!(allocate(tight.clone(), &[manual(640)], &ground(&hundred, &live, 0)).is_ok());
    let errors = allocate(tight, &[manual(648)], &ground(&hundred, &live, 0)).unwrap_err();
    assert_eq!(errors[0].code, Some(portcullis::compile::ports::EXCEEDS_AVAILABLE));
}

#[test]
fn several_frontends_give_min1024_multiply_or_one_that_is_drawn_and_kept() {
    let of = |allocation| Pool { allocation, ..pool("vm", 0..60, 0..3) };
    let ports = |ownership: &Ownership, number: u8| {
        let units = ownership.units_of("vm3/ipconfig1", TCP);
        units.iter().filter(|unit| unit.0 == front(number)).count() * 8
    };
    let multiply = start(&[of(Allocation::Multiply)]);
    assert_eq!([0, 1, 2].map(|number| ports(&multiply, number)), [512; 3], "the tier on each");
    let least = start(&[of(Allocation::Min1024)]);
    assert_eq!((0..3).map(|number| ports(&least, number)).sum::<usize>(), 1024);

    let basic = of(Allocation::Basic);
    let chosen = |ownership: &Ownership| ownership.chosen[&basic.place];
    let drawn: HashSet<IpAddr> = (0..64)
        .map(|now| {
            let pools = [basic.clone()];
            let first = step(&Ownership::default(), &pools, &LiveUnits::new(), now);
            assert_eq!(first.units_of("vm3/ipconfig1", UDP).len() * 8, 512);
            assert!(first.units_of("vm3/ipconfig1", UDP).iter().all(|unit| unit.0 == chosen(&first)));
            let again = step(&first, &pools, &LiveUnits::new(), now + 1);
            assert_eq!(again, first, "for good");
            chosen(&first)
        })
        .collect();
    assert_eq!(drawn.len(), 3, "any of them");
    // It is drawn anew only when it leaves the pool.
    let first = start(std::slice::from_ref(&basic));
    let others = basic.frontends.iter().copied().filter(|address| *address != chosen(&first)).collect();
    let second = step(&first, &[Pool { frontends: others, ..basic.clone() }], &LiveUnits::new(), 7);
    assert_ne!(chosen(&second), chosen(&first));
    assert!(start(&[of(Allocation::Min1024)]).chosen.is_empty());
}

#[test]
fn tcp_and_udp_are_counted_apart_and_may_belong_to_different_pools() {
    let with = |name: &str, protocol, ports| Pool {
        protocol,
        allocated_outbound_ports: ports,
        ..pool(name, 0..2, 0..1)
    };
    let pools = [with("a", TransportProtocol::Tcp, 32_000), with("b", TransportProtocol::Udp, 32_000)];
    let ownership = start(&pools);
    assert_eq!(in_use(&ownership, "a1/ipconfig1", TCP).len(), 4000);
    assert_eq!(in_use(&ownership, "b1/ipconfig1", UDP).len(), 4000);
    assert!(in_use(&ownership, "a1/ipconfig1", UDP).is_empty());
    // All asks for as much of either, and UDP has nothing left.
    let both = [pools[1].clone(), with("c", TransportProtocol::All, 8)];
    assert!(allocate(Ownership::default(), &both, &ground(&both, &LiveUnits::new(), 0)).is_err());
}

#[test]
fn what_moves_is_told_unit_by_unit_with_the_flows_on_it() {
    let small = |members| Pool { allocated_outbound_ports: 16, ..pool("vm", members, 0..1) };
    let before = start(&[small(0..2)]);
    let halved = [Pool { allocated_outbound_ports: 8, ..pool("vm", 0..3, 0..1) }];
    let live: LiveUnits = [((front(0), TCP, 129), 5), ((front(0), TCP, 128), 9)].into();
    let after = step(&before, &halved, &live, 0);
    let told = |protocol, unit, member: &str, what| Move {
        address: front(0),
        protocol,
        unit,
        member: format!("{member}/ipconfig1"),
        what,
    };
    use MoveKind::{Drains, Frees, Gains};
    let expected = [
        told(TCP, 129, "vm0", Drains { flows: 5 }),
        told(TCP, 131, "vm1", Frees),
        told(TCP, 132, "vm2", Gains),
        told(UDP, 129, "vm0", Frees),
        told(UDP, 131, "vm1", Frees),
        told(UDP, 132, "vm2", Gains),
    ];
    assert_eq!(moves(&before, &after, &live), expected);
    let back = step(&after, &[small(0..2)], &live, 1);
    assert!(moves(&after, &back, &live).contains(&told(TCP, 129, "vm0", Gains)), "taken back");
    assert!(moves(&before, &before, &live).is_empty());
}

#[test]
fn a_compiled_policy_says_what_a_guest_has_what_it_is_owed_and_what_drains() {
    let mut net = network(50);
    let first = fresh(&net);
    let live: LiveUnits = first.ownership.iter().map(|(a, p, unit, _)| ((a, p, unit), 1)).collect();
    net = network(100);
    let mut facts = facts(&net);
    (facts.live, facts.now) = (live, 1_800_000_000);
    let second = compile(&net, &facts, &mut Registry::default(), &first.ownership, 2).unwrap();
    let of = |number: usize| {
        let of = second.outbound[number].allocations[0].as_ref().unwrap();
        (of.ports, of.entitled, of.draining)
    };
    assert_eq!((of(0), of(99)), ((512, 512, 512), (256, 512, 0)));
    let until = second.ownership.draining().map(|unit| unit.3).collect::<BTreeSet<_>>();
    assert_eq!(until, [1_800_003_600].into());
    // The drain is remembered by the disk.
    let text = serde_json::to_string(&second.ownership).unwrap();
    assert_eq!(serde_json::from_str::<Ownership>(&text).unwrap(), second.ownership);
    println!("{} bytes of JSON for {} units", text.len(), second.ownership.iter().count());
}

#[test]
fn a_thousand_members_get_their_ports_quickly() {
    let pools = [pool("vm", 0..1000, 0..1)];
    let began = Instant::now();
    let first = start(&pools);
    let from_nothing = began.elapsed();
    let began = Instant::now();
    let second = step(&first, &[pool("vm", 0..999, 0..1)], &LiveUnits::new(), 0);
    println!("1,000 members from nothing {from_nothing:?}, one leaves {:?}", began.elapsed());
    assert_eq!(second.iter().count(), 2 * 999 * 4);
    assert!(from_nothing < Duration::from_millis(250), "{from_nothing:?}");
}
