//! Listeners at frontends: load balancing rules, inbound NAT rules, their slots, and what they take from SNAT.

mod compile_support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use compile_support::*;
use portcullis::compile::lookup::{Image, listener_at};
use portcullis::compile::ports::{LiveUnits, Ownership, TCP, UDP};
use portcullis::compile::{Compiled, HostFacts, ListenerKind, Registry, compile};
use portcullis::policy::network::{
    Announce, Distribution, InboundNatRule, LoadBalancingRule, NatTarget, Network, Probe, ProbeProtocol,
    TransportProtocol,
};
use portcullis_common::policy::{
    ADDRESS_UNITS, DISTRIBUTE_SOURCE, LISTENER_FLOATING, LISTENER_RESET, PAGE_BYTES,
};

const FRONT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 100));

fn web(port: u16) -> LoadBalancingRule {
    LoadBalancingRule {
        name: format!("web{port}"),
        frontend: 0,
        pool: 0,
        protocol: TransportProtocol::Tcp,
        frontend_port: port,
        backend_port: 8080,
        distribution: Distribution::SourceIp,
        idle_timeout_seconds: Some(900),
        tcp_reset: true,
        floating_ip: false,
        disable_outbound_snat: true,
        probe: Some(0),
    }
}

fn nat(name: &str, protocol: TransportProtocol, target: NatTarget) -> InboundNatRule {
    InboundNatRule {
        name: name.into(),
        frontend: 0,
        protocol,
        backend_port: 22,
        idle_timeout_seconds: None,
        tcp_reset: false,
        floating_ip: true,
        target,
    }
}

fn balanced(members: usize) -> Network {
    let mut net = network(members);
    let balancer = &mut net.load_balancers[0];
    balancer.probes.push(Probe {
        name: "alive".into(),
        protocol: ProbeProtocol::Tcp,
        port: 8080,
        interval_seconds: 5,
        threshold: 2,
    });
    balancer.rules = vec![web(80), web(443)];
    net
}

fn with(net: &Network, change: impl FnOnce(&mut HostFacts), ownership: &Ownership) -> Compiled {
    let mut facts = facts(net);
    change(&mut facts);
    compile(net, &facts, &mut Registry::default(), ownership, 1).unwrap()
}

/// Endpoint of each slot of a listener.
fn slots(compiled: &Compiled, listener: u32) -> Vec<Option<u32>> {
    let image = Image { pages: &compiled.pages };
    let of = image.listener(listener);
    (of.first_slot..=of.first_slot + of.mask).map(|slot| image.slot(slot)).collect()
}

#[test]
fn a_load_balancing_rule_listens_at_its_port_and_sends_to_the_members_of_its_pool() {
    let mut net = balanced(3);
    net.load_balancers[0].rules.push(LoadBalancingRule {
        name: "dns".into(),
        protocol: TransportProtocol::All,
        floating_ip: true,
        probe: None,
        ..web(53)
    });
    let compiled = fresh(&net);
    let at = |port, protocol| listener_at(&compiled, FRONT, port, protocol);
    let (http, tls) = (at(80, TCP).unwrap(), at(443, TCP).unwrap());
    assert_eq!((at(80, UDP), at(81, TCP)), (None, None));
    let image = Image { pages: &compiled.pages };
    let listener = image.listener(http);
    assert_eq!(u16::from_be(listener.backend_port), 8080);
    assert_eq!((listener.distribution, listener.flags), (DISTRIBUTE_SOURCE, LISTENER_RESET));
    assert_eq!(
        compiled.settings.idle[usize::from(listener.idle_class)],
        portcullis_common::clock::ticks(900)
    );
    assert_eq!(listener.mask, 1023);
    assert_eq!(image.listener(tls).first_slot, listener.first_slot, "one pool and probe: one choice");
    let backends: BTreeSet<_> = slots(&compiled, http).into_iter().collect();
    assert_eq!(backends, [Some(0), Some(1), Some(2)].into());

    let (tcp, udp) = (image.listener(at(53, TCP).unwrap()), image.listener(at(53, UDP).unwrap()));
    assert_eq!((tcp.flags, udp.flags), (LISTENER_FLOATING | LISTENER_RESET, LISTENER_FLOATING));
    assert_eq!(
        (tcp.idle_class, udp.idle_class),
        (0, 0),
        "Azure heeds no timeout with floating IP, nor of UDP"
    );
    let of = &compiled.listeners[http as usize];
    assert_eq!(
        (of.kind, of.place.as_str()),
        (ListenerKind::LoadBalancingRule, "loadBalancers/lb/loadBalancingRules/web80")
    );
    assert_eq!(
        (of.port, of.protocol, of.backend_port, of.probe.as_deref()),
        (80, 6, 8080, Some("lb/probes/alive"))
    );
    assert_eq!(of.candidates[1], ("vm2/ipconfig1".to_owned(), 1));
}

#[test]
fn what_a_probe_takes_out_loses_its_slots_and_nothing_else_at_once_and_in_place() {
    let net = balanced(5);
    let healthy = fresh(&net);
    let down: BTreeSet<String> = ["lb/probes/alive/vm2/ipconfig1".to_owned()].into();
    let without = with(&net, |facts| facts.down = down.clone(), &Ownership::default());
    for (then, now) in slots(&healthy, 0).into_iter().zip(slots(&without, 0)) {
        if then == Some(1) { assert_ne!(now, then) } else { assert_eq!(now, then) }
    }
    // The same pages, written over those of the generation in force; and back.
    let pages = healthy.slot_pages(&down);
    assert_eq!(pages.len(), 1024 * 2 / PAGE_BYTES);
    let mut changed = healthy.clone();
    pages.into_iter().for_each(|(number, page)| changed.pages[number as usize] = page);
    assert_eq!(changed.pages, without.pages);
    healthy.slot_pages(&BTreeSet::new()).into_iter().for_each(|(n, page)| changed.pages[n as usize] = page);
    assert_eq!(changed.pages, healthy.pages);
    let all = (1..=5).map(|i| format!("lb/probes/alive/vm{i}/ipconfig1")).collect();
    let nobody = with(&net, |facts| facts.down = all, &Ownership::default());
    assert!(slots(&nobody, 0).iter().all(Option::is_none));
    assert_eq!(nobody.ownership, healthy.ownership, "no member needs to be healthy for SNAT");
}

#[test]
fn an_inbound_nat_rule_goes_to_its_member_and_a_range_gives_each_member_a_port_for_life() {
    let mut net = balanced(4);
    net.load_balancers[0].nat_rules = vec![
        nat("one", TransportProtocol::Tcp, NatTarget::Single { frontend_port: 2200, member: (2, 0) }),
        nat("all", TransportProtocol::All, NatTarget::Range { first: 2210, last: 2214, pool: 0 }),
    ];
    let ports = |compiled: &Compiled, protocol| {
        let of = |port| {
            listener_at(compiled, FRONT, port, protocol).map(|l| (port, slots(compiled, l)[0].unwrap()))
        };
        (2200..=2220).filter_map(of).collect::<BTreeMap<u16, u32>>()
    };
    let first = fresh(&net);
    assert_eq!(ports(&first, TCP), [(2200, 2), (2210, 0), (2211, 1), (2212, 2), (2213, 3)].into());
    assert_eq!(ports(&first, UDP), [(2210, 0), (2211, 1), (2212, 2), (2213, 3)].into());
    let listener = Image { pages: &first.pages }.listener(listener_at(&first, FRONT, 2210, UDP).unwrap());
    assert_eq!(
        (u16::from_be(listener.backend_port), listener.mask, listener.flags),
        (22, 0, LISTENER_FLOATING)
    );

    // vm2 leaves, which renumbers everybody behind it, and two join; by way of the disk.
    let stored: Ownership = serde_json::from_str(&serde_json::to_string(&first.ownership).unwrap()).unwrap();
    let mut next = balanced(6);
    next.interfaces.remove(1);
    next.load_balancers[0].pools[0].members = (0..5).map(|i| (i, 0)).collect();
    next.load_balancers[0].nat_rules = vec![net.load_balancers[0].nat_rules[1].clone()];
    let second = with(&next, |_| {}, &stored);
    // Endpoints now: vm1 0, vm3 1, vm4 2, vm5 3, vm6 4.
    assert_eq!(ports(&second, TCP), [(2210, 0), (2211, 3), (2212, 1), (2213, 2), (2214, 4)].into());

    let mut full = balanced(6);
    full.load_balancers[0].nat_rules = next.load_balancers[0].nat_rules.clone();
    let errors = compile(&full, &facts(&full), &mut Registry::default(), &second.ownership, 1).unwrap_err();
    assert_eq!(errors[0].place, "loadBalancers/lb/inboundNatRules/all");
    assert!(
        errors[0].message.contains("6 members, but the frontend ports 2210-2214 are only 5"),
        "{}",
        errors[0]
    );
}

#[test]
fn a_port_that_is_listened_at_takes_its_block_of_eight_from_snat_for_its_protocol() {
    let mut net = balanced(1);
    net.load_balancers[0].rules = vec![web(8080), web(8087)];
    let range = NatTarget::Range { first: 2212, last: 2217, pool: 0 };
    net.load_balancers[0].nat_rules = vec![nat("range", TransportProtocol::Udp, range)];
    let ports = |net: &Network, ports| {
        let mut net = net.clone();
        net.load_balancers[0].outbound_rules[0].allocated_outbound_ports = ports;
        compile(&net, &facts(&net), &mut Registry::default(), &Ownership::default(), 1)
    };
    let compiled = ports(&net, 63_984).unwrap();
    let image = Image { pages: &compiled.pages };
    for port in 8080..8088 {
        assert_eq!((image.owner(0, false, port), image.owner(0, true, port)), (None, Some(0)), "{port}");
    }
    assert_eq!((image.owner(0, false, 8079), image.owner(0, false, 8088)), (Some(0), Some(0)));
    for port in 2208..2224 {
        assert_eq!((image.owner(0, false, port), image.owner(0, true, port)), (Some(0), None), "{port}");
    }
    let errors = ports(&net, 64_000).unwrap_err();
    assert_eq!(
        errors.len(),
        2,
        "one unit for TCP, where both ports are in one block, and two for UDP: {errors:?}"
    );
    net.load_balancers[0].rules.clear();
    net.load_balancers[0].nat_rules.clear();
    assert!(ports(&net, 64_000).is_ok());
}

#[test]
fn a_listener_on_owned_ports_drains_them_at_once_and_the_member_gets_others() {
    let mut net = network(2);
    net.snat.drain_seconds = 600;
    let before = fresh(&net);
    let owner = before.ownership.owner(FRONT, TCP, 2000).unwrap().member.clone();
    let unit = 2000 / 8;
    net.load_balancers[0].rules = vec![LoadBalancingRule { probe: None, ..web(2000) }];
    let live: LiveUnits = [((FRONT, TCP, unit), 3)].into();
    let busy = with(&net, |facts| (facts.live, facts.now) = (live, 5000), &before.ownership);
    let drains = busy.ownership.owner(FRONT, TCP, 2000).unwrap();
    assert_eq!((drains.member.as_str(), drains.draining_until), (owner.as_str(), Some(5600)));
    assert_eq!(busy.ownership.owner(FRONT, UDP, 2000).unwrap().draining_until, None);
    let number = busy.members.iter().position(|name| *name == owner).unwrap();
    let image = Image { pages: &busy.pages };
    let endpoint = image.endpoint(number as u32);
    let (tcp, udp) = (image.units(&endpoint, 0), image.units(&endpoint, 1));
    assert_eq!((tcp.len(), udp.len()), (128, 128));
    assert!(!tcp.contains(&(0, u32::from(unit))) && udp.contains(&(0, u32::from(unit))));
    assert_eq!(image.owner(0, false, 2000), Some(number as u32), "answers to old flows have an owner still");
    assert_eq!(busy.outbound[number].allocations[0].as_ref().unwrap().draining, 8);
    // Without a flow it is nobody's at once.
    let idle = with(&net, |facts| facts.now = 5000, &before.ownership);
    assert_eq!(idle.ownership.owner(FRONT, TCP, 2000), None);
    assert_eq!(idle.ownership.units_of(&owner, TCP).len(), 128);
    assert!(Image { pages: &idle.pages }.header().owners != 0 && u32::from(unit) < ADDRESS_UNITS);
}

#[test]
fn two_rules_at_one_port_are_refused_and_reserved_ports_have_the_listeners() {
    let mut net = balanced(2);
    let taken = NatTarget::Single { frontend_port: 443, member: (0, 0) };
    net.load_balancers[0].nat_rules = vec![nat("ssh", TransportProtocol::All, taken)];
    let errors = compile(&net, &facts(&net), &mut Registry::default(), &Ownership::default(), 1).unwrap_err();
    assert_eq!(errors.len(), 1);
    assert_eq!(
        errors[0].to_string(),
        "loadBalancers/lb/inboundNatRules/ssh: TCP port 443 of 203.0.113.100 is taken by \
         loadBalancers/lb/loadBalancingRules/web443 already"
    );
    net.load_balancers[0].nat_rules.clear();
    net.public_addresses[0].announce = Announce::Address;
    net.uplinks[0].reserve_host_ports = true;
    assert_eq!(fresh(&net).reserved_ports, [(80, 80), (443, 443), (1024, 1024 + 2 * 1024 - 1)]);
}
