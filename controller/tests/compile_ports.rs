//! Preallocation of SNAT ports: tiers, stability, capacity.

mod compile_support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use compile_support::*;
use portcullis::compile::lookup::Image;
use portcullis::compile::ports::{
    Allocated, EXCEEDS_AVAILABLE, Ground, LiveUnits, NOT_A_MULTIPLE, Ownership, Pool, TCP, UDP, UnitSet,
    allocate, tier,
};
use portcullis::compile::{CompileError, Registry, compile};
use portcullis::policy::network::{Allocation, Announce, Frontend, Network, TransportProtocol};
use portcullis_common::policy::{ALLOC_TCP, ALLOC_UDP};

const FRONT: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 100)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 101)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 102)),
];

fn pool(members: impl IntoIterator<Item = usize>, frontends: usize, ports: u32) -> Pool {
    Pool {
        place: "loadBalancers/lb/outboundRules/out".into(),
        protocol: TransportProtocol::All,
        frontends: FRONT[..frontends].to_vec(),
        members: members.into_iter().map(|i| format!("vm{i}/ipconfig1")).collect(),
        allocated_outbound_ports: ports,
        allocation: Allocation::Min1024,
    }
}

/// Hands out ports where these flows live, at second 1,000, with an hour to drain.
fn with(
    previous: &Ownership,
    pools: &[Pool],
    live: &LiveUnits,
    now: u64,
) -> Result<Allocated, Vec<CompileError>> {
    let whole = || [UnitSet::whole_address(), UnitSet::whole_address()];
    let ground = Ground {
        addresses: FRONT.map(|address| (address, whole())).into(),
        exists: pools.iter().flat_map(|pool| &pool.members).map(String::as_str).collect(),
        live,
        now,
        drain_seconds: 3600,
    };
    allocate(previous.clone(), pools, &ground)
}

fn quietly(previous: &Ownership, pools: &[Pool]) -> Result<Ownership, Vec<CompileError>> {
    with(previous, pools, &LiveUnits::new(), 1000).map(|allocated| allocated.ownership)
}

fn from_nothing(pool: Pool) -> Ownership {
    quietly(&Ownership::default(), &[pool]).unwrap()
}

/// Units in use of each member for TCP; panics if a unit is not eligible or UDP differs.
fn by_member(ownership: &Ownership) -> BTreeMap<&str, BTreeSet<(IpAddr, u16)>> {
    let of = |protocol| {
        let mut members: BTreeMap<&str, BTreeSet<_>> = BTreeMap::new();
        for (address, _, unit, owner) in ownership.iter().filter(|unit| unit.1 == protocol) {
            assert!((128..8128).contains(&unit), "unit {unit} holds ports outside 1024..65023");
            if owner.draining_until.is_none() {
                members.entry(&owner.member).or_default().insert((address, unit));
            }
        }
        members
    };
    assert_eq!(of(TCP), of(UDP));
    of(TCP)
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
    let error = quietly(&Ownership::default(), &[pool(0..1001, 1, 0)]).unwrap_err();
    assert!(error[0].message.contains("at most 1,000"), "{}", error[0]);
}

#[test]
fn more_frontends_give_more_ports_but_never_more_than_1024_and_fill_one_after_the_other() {
    for (frontends, ports) in [(1, 512), (2, 1024), (3, 1024)] {
        let ownership = from_nothing(pool(0..100, frontends, 0));
        assert!(by_member(&ownership).values().all(|u| u.len() * 8 == ports), "{frontends}");
    }
    let ownership = from_nothing(pool(0..100, 2, 0));
    assert_eq!(ownership.frontends[&FRONT[0]].tcp.len(), 8000, "the first is full");
    assert_eq!(ownership.frontends[&FRONT[1]].udp.len(), 100 * 128 - 8000);
}

#[test]
fn manual_ports_are_as_asked_until_the_address_is_full() {
    let owned =
        |members, frontends, ports| quietly(&Ownership::default(), &[pool(0..members, frontends, ports)]);
    assert_eq!(owned(1, 1, 64_000).unwrap().units_of("vm0/ipconfig1", TCP).len(), 8000);
    assert!(owned(2, 1, 32_000).is_ok());
    assert!(owned(2, 2, 64_000).is_ok());
    assert!(owned(2000, 1, 32).is_ok(), "the limit of 1,000 members is the table's, not the ports'");
    let error = owned(7, 1, 10_000).unwrap_err();
    assert_eq!(error[0].code, Some(EXCEEDS_AVAILABLE), "Azure's own example");
    assert_eq!(owned(1, 1, 100).unwrap_err()[0].code, Some(NOT_A_MULTIPLE));
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
fn the_image_says_of_every_port_whose_it_is_and_of_every_guest_which_units_it_has() {
    let mut net = network(120);
    net.public_addresses.push(public("second", "203.0.113.101", Announce::Routed));
    net.load_balancers[0].frontends.push(Frontend { name: "second".into(), public_addresses: vec![1] });
    net.load_balancers[0].outbound_rules[0].frontends = vec![1, 0];
    let compiled = fresh(&net);
    let image = Image { pages: &compiled.pages };
    assert_eq!(image.header().endpoints_used, 120);
    assert_eq!(image.header().frontends_used, 2);
    let address_of = |f| IpAddr::from(image.frontend(f).address.to_ne_bytes());
    for number in 0..120 {
        let endpoint = image.endpoint(number);
        let name = &compiled.members[number as usize];
        for (which, protocol) in [(ALLOC_TCP, TCP), (ALLOC_UDP, UDP)] {
            let units = image.units(&endpoint, which);
            assert_eq!(units.len(), 512 / 8);
            let expected: BTreeSet<_> = compiled.ownership.units_of(name, protocol).into_iter().collect();
            let found: BTreeSet<_> = units.iter().map(|&(f, u)| (address_of(f), u as u16)).collect();
            assert_eq!(found, expected);
            assert!(
                units.iter().all(|&(f, _)| f == 1),
                "61,440 ports fit on the frontend the rule names first"
            );
        }
    }
    for frontend in 0..2 {
        for port in 0..=65535u16 {
            for protocol in [TCP, UDP] {
                let owner = image.owner(frontend, protocol == UDP, port);
                let owner = owner.map(|endpoint| compiled.members[endpoint as usize].as_str());
                let expected = compiled.ownership.owner(address_of(frontend), protocol, port);
                assert_eq!(owner, expected.map(|owner| owner.member.as_str()));
            }
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
