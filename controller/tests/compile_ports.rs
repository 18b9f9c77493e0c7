//! Preallocation of SNAT ports: tiers, stability, capacity.

mod compile_support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use compile_support::*;
use portcullis::compile::lookup::Image;
use portcullis::compile::ports::{
    EXCEEDS_AVAILABLE, NOT_A_MULTIPLE, Ownership, Pool, PoolFrontend, allocate, beside_host, tier,
    whole_address,
};
use portcullis::compile::{Registry, compile};
use portcullis::policy::network::{Announce, Frontend, Network};
use portcullis_common::policy::ALLOC_TCP;

const FRONT: [Ipv4Addr; 3] =
    [Ipv4Addr::new(203, 0, 113, 100), Ipv4Addr::new(203, 0, 113, 101), Ipv4Addr::new(203, 0, 113, 102)];

fn pool(members: impl IntoIterator<Item = usize>, frontends: usize, ports: u32) -> Pool {
    let frontend = |&address: &Ipv4Addr| PoolFrontend { address, eligible: whole_address() };
    Pool {
        place: "loadBalancers/lb/outboundRules/out".into(),
        frontends: FRONT[..frontends].iter().map(frontend).collect(),
        members: members.into_iter().map(|i| format!("vm{i}/ipconfig1")).collect(),
        allocated_outbound_ports: ports,
    }
}

fn from_nothing(pool: Pool) -> Ownership {
    allocate(&Ownership::default(), &[pool]).unwrap()
}

/// Units of each member; panics if a unit is not eligible.
fn by_member(ownership: &Ownership) -> BTreeMap<&str, BTreeSet<(Ipv4Addr, u16)>> {
    let mut members: BTreeMap<&str, BTreeSet<_>> = BTreeMap::new();
    for (address, units) in &ownership.frontends {
        for (unit, member) in units {
            assert!((128..8128).contains(unit), "unit {unit} holds ports outside 1024..65023");
            members.entry(member).or_default().insert((*address, *unit));
        }
    }
    members
}

#[test]
fn the_tiers_are_azures() {
    let table =
        [(1, 1024), (50, 1024), (51, 512), (100, 512), (101, 256), (200, 256), (201, 128), (400, 128)];
    let more = [(401, 64), (800, 64), (801, 32), (1000, 32)];
    for (members, ports) in table.into_iter().chain(more) {
        assert_eq!(tier(members), Some(ports), "{members}");
        let ownership = from_nothing(pool(0..members, 1, 0));
        let owned = by_member(&ownership);
        assert_eq!(owned.len(), members);
        assert!(owned.values().all(|units| units.len() * 8 == ports as usize), "{members}");
    }
    assert_eq!(tier(1001), None);
    let error = allocate(&Ownership::default(), &[pool(0..1001, 1, 0)]).unwrap_err();
    assert!(error[0].message.contains("at most 1,000"), "{}", error[0]);
}

#[test]
fn more_frontends_give_more_ports_but_never_more_than_1024_and_fill_one_after_the_other() {
    for (frontends, ports) in [(1, 512), (2, 1024), (3, 1024)] {
        let ownership = from_nothing(pool(0..100, frontends, 0));
        assert!(by_member(&ownership).values().all(|u| u.len() * 8 == ports), "{frontends}");
    }
    let ownership = from_nothing(pool(0..100, 2, 0));
    assert_eq!(ownership.frontends[&FRONT[0]].len(), 8000, "the first is full");
    assert_eq!(ownership.frontends[&FRONT[1]].len(), 100 * 128 - 8000);
}

#[test]
fn manual_ports_are_as_asked_until_the_address_is_full() {
    let owned =
        |members, frontends, ports| allocate(&Ownership::default(), &[pool(0..members, frontends, ports)]);
    assert_eq!(owned(1, 1, 64_000).unwrap().units_of("vm0/ipconfig1").len(), 8000);
    assert!(owned(2, 1, 32_000).is_ok());
    assert!(owned(2, 2, 64_000).is_ok());
    assert!(owned(2000, 1, 32).is_ok(), "the limit of 1,000 members is the table's, not the ports'");
    let error = owned(7, 1, 10_000).unwrap_err();
    assert_eq!(error[0].code, Some(EXCEEDS_AVAILABLE), "Azure's own example");
    assert_eq!(owned(1, 1, 100).unwrap_err()[0].code, Some(NOT_A_MULTIPLE));
}

#[test]
fn an_address_the_host_uses_too_has_36_280_ports_beside_the_hosts() {
    let units: Vec<u16> = beside_host((32768, 60999)).into_iter().flatten().collect();
    assert_eq!(units.len() * 8, 36_280);
    assert!(units.iter().all(|u| (u * 8..=u * 8 + 7).all(|p| p >= 1024 && !(32768..=60999).contains(&p))));
    assert_eq!((units[0], units[units.len() - 1]), (128, 8191));
    // A range that is not a multiple of 8 takes the whole units at its ends with it.
    let units: Vec<u16> = beside_host((32769, 60998)).into_iter().flatten().collect();
    assert!(!units.contains(&4096) && !units.contains(&7624) && units.contains(&7625));
    assert_eq!(beside_host((1024, 65535)), []);
}

#[test]
fn a_host_address_refuses_what_does_not_fit_beside_the_host_unless_the_ports_may_be_reserved() {
    let mut net = network(40);
    net.public_addresses[0].announce = Announce::Address;
    let compile_it =
        |net: &Network| compile(net, &facts(net), &mut Registry::default(), &Ownership::default(), 1);
    let error = compile_it(&net).unwrap_err();
    assert_eq!(error[0].code, None);
    assert_eq!(error[0].place, "loadBalancers/lb/outboundRules/out");
    assert!(error[0].message.contains("only 36280 are left"), "{}", error[0]);

    net.load_balancers[0].pools[0].members.truncate(35);
    let compiled = compile_it(&net).unwrap();
    assert!(compiled.reserved_ports.is_empty());
    let used: u32 =
        compiled.ownership.port_ranges(FRONT[0]).iter().map(|&(a, b)| u32::from(b) - u32::from(a) + 1).sum();
    assert_eq!(used, 35 * 1024);

    net = network(50);
    net.public_addresses[0].announce = Announce::Address;
    net.uplinks[0].reserve_host_ports = true;
    assert_eq!(compile_it(&net).unwrap().reserved_ports, [(1024, 1024 + 51_200 - 1)]);
}

#[test]
fn crossing_a_tier_halves_everybody_to_their_first_half_and_going_back_only_adds() {
    let fifty = from_nothing(pool(0..50, 1, 0));
    let more = allocate(&fifty, &[pool(0..51, 1, 0)]).unwrap();
    let (before, after) = (by_member(&fifty), by_member(&more));
    for (member, units) in &before {
        let first_half: BTreeSet<_> = units.iter().take(64).copied().collect();
        assert_eq!(after[member], first_half);
    }
    assert!(
        after["vm50/ipconfig1"].iter().all(|u| !fifty.frontends[&u.0].contains_key(&u.1)),
        "nobody's before"
    );
    let fewer = allocate(&more, &[pool(0..50, 1, 0)]).unwrap();
    let back = by_member(&fewer);
    for member in before.keys() {
        assert!(back[member].is_superset(&after[member]) && back[member].len() == 128);
    }
}

#[test]
fn a_thousand_joins_and_leaves_move_nobodys_units_except_by_halving() {
    for (mut random, steps) in [(Random::new(11), 1000), (Random::from_clock(), 200)] {
        let mut members: Vec<usize> = (0..45).collect();
        let mut next_name = 45;
        // A second pool on the same addresses must not be disturbed either.
        let other = |members: &[usize]| Pool {
            place: "loadBalancers/lb/outboundRules/other".into(),
            members: members.iter().map(|i| format!("other{i}/ipconfig1")).collect(),
            ..pool([], 2, 64)
        };
        let mut others: Vec<usize> = vec![0, 1, 2];
        let mut now =
            allocate(&Ownership::default(), &[pool(members.clone(), 2, 0), other(&others)]).unwrap();
        let mut growing = true;
        for step in 0..steps {
            growing = if members.len() > 260 { false } else { growing || members.len() < 30 };
            // Mostly in one direction, so that all tiers up to the fourth are crossed both ways.
            if random.chance(if growing { 75 } else { 25 }) {
                members.insert(random.below(members.len() + 1), next_name);
                next_name += 1;
            } else {
                members.remove(random.below(members.len()));
            }
            if random.chance(10) {
                others = (0..random.below(20)).collect();
            }
            let pools = [pool(members.clone(), 2, 0), other(&others)];
            let next = allocate(&now, &pools).unwrap();
            let then = std::mem::replace(&mut now, next);
            let (before, after) = (by_member(&then), by_member(&now));

            let entitled = (tier(members.len()).unwrap() as usize * 2).min(1024) / 8;
            let names: BTreeSet<&str> = pools.iter().flat_map(|p| &p.members).map(String::as_str).collect();
            assert_eq!(names, after.keys().copied().collect(), "only members own units");
            for (member, units) in &after {
                let share = if member.starts_with("other") { 8 } else { entitled };
                assert_eq!(units.len(), share, "{member} at step {step}");
                let Some(held) = before.get(member) else { continue };
                let kept: BTreeSet<_> = held.iter().take(share).copied().collect();
                assert!(units.is_superset(&kept), "{member} lost units at step {step}");
            }
        }
    }
}

#[test]
fn the_image_says_of_every_port_whose_it_is_and_of_every_guest_which_units_it_has() {
    let mut net = network(120);
    net.public_addresses.push(public("second", "203.0.113.101", Announce::Routed));
    net.load_balancers[0].frontends.push(Frontend { name: "second".into(), public_addresses: vec![1] });
    net.load_balancers[0].outbound_rules[0].frontends = vec![1, 0];
    let compiled = fresh(&net);
    let image = Image { pages: &compiled.pages };
    assert_eq!(image.header().endpoints_used, 120);
    assert_eq!(image.header().frontends_used, 2);
    let address_of = |f| Ipv4Addr::from(image.frontend(f).address.to_ne_bytes());
    for number in 0..120 {
        let endpoint = image.endpoint(number);
        let name = &compiled.members[number as usize];
        let units = image.units(&endpoint, ALLOC_TCP);
        assert_eq!(units.len(), 512 / 8);
        let expected: BTreeSet<_> = compiled.ownership.units_of(name).into_iter().collect();
        assert_eq!(units.iter().map(|&(f, u)| (address_of(f), u as u16)).collect::<BTreeSet<_>>(), expected);
        assert!(units.iter().all(|&(f, _)| f == 1), "61,440 ports fit on the frontend the rule names first");
    }
    for frontend in 0..2 {
        for port in 0..=65535u16 {
            let owner = image.owner(frontend, false, port).map(|e| compiled.members[e as usize].as_str());
            assert_eq!(owner, compiled.ownership.owner(address_of(frontend), port));
        }
    }
}

#[test]
fn ownership_survives_the_disk_and_an_equal_policy_moves_nothing() {
    let net = network(60);
    let mut registry = Registry::default();
    let first = compile(&net, &facts(&net), &mut registry, &Ownership::default(), 1).unwrap();
    let text = serde_json::to_string(&first.ownership).unwrap();
    let stored: Ownership = serde_json::from_str(&text).unwrap();
    assert_eq!(stored, first.ownership);
    let second = compile(&net, &facts(&net), &mut registry, &stored, 2).unwrap();
    assert_eq!(second.ownership, first.ownership);
    assert_eq!(second.pages[1..], first.pages[1..], "only the generation in the header differs");
}
