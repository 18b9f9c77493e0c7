//! Ways out: which rule gives whom ports, for which protocol, on which addresses, and how the tables say so.

mod compile_support;

use std::net::{IpAddr, Ipv4Addr};

use compile_support::*;
use portcullis::compile::lookup::{Image, endpoint_value};
use portcullis::compile::ports::Ownership;
use portcullis::compile::{AllocationOf, Compiled, Registry, Scenario, compile};
use portcullis::policy::network::{
    Announce, BackendPool, DefaultOutbound, Frontend, FrontendUse, IpConfiguration, LoadBalancingRule,
    Network, OutboundRule, TransportProtocol,
};
use portcullis_common::layout::IDLE_RULES;
use portcullis_common::policy::{
    ALLOC_ECHO, ALLOC_RESET, ALLOC_TCP, ALLOC_UDP, AT_FRONTEND, AT_INSTANCE, AT_PROXY, Segment,
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn balancing(name: &str, pool: usize, protocol: TransportProtocol) -> LoadBalancingRule {
    LoadBalancingRule {
        name: name.into(),
        frontend: 0,
        pool,
        protocol,
        frontend_port: 80,
        backend_port: 8080,
        distribution: Default::default(),
        idle_timeout_seconds: Some(600),
        tcp_reset: true,
        floating_ip: false,
        disable_outbound_snat: false,
        probe: None,
    }
}

/// `network(members)` whose pool has no outbound rule.
fn ruleless(members: usize) -> Network {
    let mut net = network(members);
    net.load_balancers[0].outbound_rules.clear();
    net
}

fn of<'c>(compiled: &'c Compiled, member: &str, which: usize) -> Option<&'c AllocationOf> {
    let number = compiled.members.iter().position(|name| name == member).unwrap();
    compiled.outbound[number].allocations[which].as_ref()
}

/// Scenario, place behind the load balancer, ports.
fn way<'c>(compiled: &'c Compiled, member: &str, which: usize) -> Option<(Scenario, &'c str, u32)> {
    of(compiled, member, which).map(|of| (of.scenario, of.place.as_str(), of.ports))
}

fn segments(compiled: &Compiled, endpoint: u32, which: usize) -> Vec<Segment> {
    let image = Image { pages: &compiled.pages };
    let alloc = image.endpoint(endpoint).alloc[which];
    let all = alloc.first_segment..alloc.first_segment + u32::from(alloc.segments);
    all.map(|number| image.segment(number)).collect()
}

#[test]
fn an_outbound_rule_comes_before_a_load_balancing_rule_and_that_before_default_outbound_for_each_protocol() {
    let mut net = ruleless(4);
    net.subnets[0].default_outbound = true;
    net.public_addresses.push(public("default", "203.0.113.200", Announce::Routed));
    net.default_outbound = Some(DefaultOutbound { public_addresses: vec![1], idle_timeout_seconds: None });
    let balancer = &mut net.load_balancers[0];
    balancer.pools = [vec![(0, 0)], vec![(1, 0)], vec![(2, 0)]]
        .into_iter()
        .enumerate()
        .map(|(i, members)| BackendPool { name: format!("pool{i}"), members })
        .collect();
    // vm1: TCP by an outbound rule, UDP by a load balancing rule. vm2: TCP by a rule. vm3: in a pool that no rule links.
    balancer.rules = vec![
        balancing("both", 0, TransportProtocol::All),
        LoadBalancingRule { frontend_port: 81, ..balancing("web", 1, TransportProtocol::Tcp) },
    ];
    balancer.outbound_rules = vec![OutboundRule {
        name: "out".into(),
        frontends: vec![0],
        pool: 0,
        protocol: TransportProtocol::Tcp,
        allocated_outbound_ports: 2048,
        idle_timeout_seconds: None,
        tcp_reset: false,
    }];
    let compiled = fresh(&net);
    let (out, web) = ("loadBalancers/lb/outboundRules/out", "loadBalancers/lb/loadBalancingRules/web");
    let both = "loadBalancers/lb/loadBalancingRules/both";
    assert_eq!(way(&compiled, "vm1/ipconfig1", ALLOC_TCP), Some((Scenario::OutboundRule, out, 2048)));
    assert_eq!(way(&compiled, "vm1/ipconfig1", ALLOC_UDP), Some((Scenario::LoadBalancingRule, both, 1024)));
    assert_eq!(
        way(&compiled, "vm1/ipconfig1", ALLOC_ECHO),
        way(&compiled, "vm1/ipconfig1", ALLOC_TCP),
        "echo goes by the units of TCP where UDP has some too"
    );
    assert_eq!(way(&compiled, "vm2/ipconfig1", ALLOC_TCP), Some((Scenario::LoadBalancingRule, web, 1024)));
    assert_eq!(way(&compiled, "vm2/ipconfig1", ALLOC_UDP), None, "the protocols of the pool's rules only");
    assert_eq!(way(&compiled, "vm2/ipconfig1", ALLOC_ECHO), None);
    for vm in ["vm3/ipconfig1", "vm4/ipconfig1"] {
        for which in [ALLOC_TCP, ALLOC_UDP, ALLOC_ECHO] {
            assert_eq!(way(&compiled, vm, which), Some((Scenario::Default, "defaultOutbound", 1024)));
        }
        assert_eq!(of(&compiled, vm, ALLOC_TCP).unwrap().frontends, [ip("203.0.113.200")]);
    }
    let image = Image { pages: &compiled.pages };
    assert_eq!(image.endpoint(0).alloc[ALLOC_TCP].flags, 0);
    let web = image.endpoint(1).alloc[ALLOC_TCP];
    assert_eq!((web.idle_class >= IDLE_RULES, web.flags), (true, ALLOC_RESET), "those of the rule");
    assert_eq!(image.endpoint(2).alloc[ALLOC_TCP].idle_class, 0);

    // Who gives nobody ports links its pool all the same.
    net.load_balancers[0].rules[1].disable_outbound_snat = true;
    net.subnets[0].default_outbound = true;
    let compiled = fresh(&net);
    assert_eq!(way(&compiled, "vm2/ipconfig1", ALLOC_TCP), None);
    net.subnets[0].default_outbound = false;
    assert_eq!(way(&fresh(&net), "vm4/ipconfig1", ALLOC_TCP), None, "off unless asked");
}

#[test]
fn a_guest_with_an_instance_address_counts_in_its_pool_and_has_no_part_in_default_outbound() {
    let mut net = network(51);
    net.public_addresses.push(public("own", "203.0.113.7", Announce::Proxy));
    net.public_addresses.push(public("default", "203.0.113.200", Announce::Routed));
    net.interfaces[0].addresses[0].public_address = Some(1);
    let compiled = fresh(&net);
    assert_eq!(compiled.outbound[0].instance, Some(ip("203.0.113.7")));
    assert_eq!(of(&compiled, "vm2/ipconfig1", ALLOC_TCP).unwrap().ports, 512, "51 members");
    let image = Image { pages: &compiled.pages };
    assert_eq!((image.endpoint(0).instance, image.endpoint(1).instance), (1, 0));
    assert_eq!(image.endpoint(0).alloc[ALLOC_TCP].ports, 512, "as if it had none; the datapath never asks");

    net.load_balancers.clear();
    net.subnets[0].default_outbound = true;
    net.default_outbound = Some(DefaultOutbound { public_addresses: vec![2], idle_timeout_seconds: None });
    let compiled = fresh(&net);
    assert_eq!(way(&compiled, "vm1/ipconfig1", ALLOC_TCP), None);
    assert_eq!(
        way(&compiled, "vm2/ipconfig1", ALLOC_TCP),
        Some((Scenario::Default, "defaultOutbound", 1024))
    );
}

#[test]
fn default_outbound_has_azures_tiers_by_the_number_of_guests_that_need_it() {
    for (guests, ports) in [(50, 1024), (51, 512), (1000, 32)] {
        let mut net = network(guests);
        net.load_balancers.clear();
        net.subnets[0].default_outbound = true;
        let idle_timeout_seconds = Some(300);
        net.default_outbound = Some(DefaultOutbound { public_addresses: vec![0], idle_timeout_seconds });
        let compiled = fresh(&net);
        assert!(
            compiled.outbound.iter().all(|of| of.allocations[ALLOC_UDP].as_ref().unwrap().ports == ports)
        );
        let alloc = Image { pages: &compiled.pages }.endpoint(0).alloc[ALLOC_TCP];
        assert_eq!(
            compiled.settings.idle[usize::from(alloc.idle_class)],
            portcullis_common::clock::ticks(300)
        );
        assert_eq!(endpoint_value(&compiled, 0, ip("203.0.113.100")) >> 24, AT_FRONTEND | AT_PROXY);
    }
}

#[test]
fn ipv6_rules_serve_the_ipv6_configurations_of_a_pool_and_ipv6_instance_addresses_their_own() {
    let mut net = network(3);
    net.virtual_networks[0].address_space.push("fd00:1::/48".parse().unwrap());
    net.subnets[0].prefixes.push("fd00:1::/64".parse().unwrap());
    net.subnets[0].gateways.push(ip("fd00:1::1"));
    for i in 0..3 {
        net.interfaces[i].addresses.push(IpConfiguration {
            name: "v6".into(),
            address: ip(&format!("fd00:1::{}", i + 4)),
            subnet: 0,
            public_address: None,
            application_groups: Vec::new(),
        });
        net.load_balancers[0].pools[0].members.push((i, 1));
    }
    net.public_addresses.push(public("six", "2001:db8:ffff::10", Announce::Proxy));
    net.public_addresses.push(public("own6", "2001:db8:ffff::7", Announce::Routed));
    net.interfaces[2].addresses[1].public_address = Some(2);
    let balancer = &mut net.load_balancers[0];
    balancer.frontends.push(Frontend { name: "six".into(), public_addresses: vec![1] });
    let six = OutboundRule { name: "six".into(), frontends: vec![1], ..balancer.outbound_rules[0].clone() };
    balancer.outbound_rules.push(six);
    let compiled = fresh(&net);
    let (out, six) = ("loadBalancers/lb/outboundRules/out", "loadBalancers/lb/outboundRules/six");
    assert_eq!(way(&compiled, "vm1/ipconfig1", ALLOC_TCP), Some((Scenario::OutboundRule, out, 1024)));
    assert_eq!(way(&compiled, "vm1/v6", ALLOC_TCP), Some((Scenario::OutboundRule, six, 1024)));
    assert_eq!(of(&compiled, "vm1/v6", ALLOC_UDP).unwrap().frontends, [ip("2001:db8:ffff::10")]);
    let image = Image { pages: &compiled.pages };
    let v6 = image.endpoint(1);
    let units = image.units(&v6, ALLOC_UDP);
    let frontend = image.frontend(units[0].0);
    assert_eq!((units.len(), frontend.address), (128, 0));
    assert_eq!(frontend.address6[0].to_ne_bytes(), [0x20, 0x01, 0x0d, 0xb8]);
    assert_eq!(v6.gateway[3].to_ne_bytes(), [0, 0, 0, 1]);
    assert_eq!(
        endpoint_value(&compiled, 0, ip("2001:db8:ffff::10")),
        (AT_FRONTEND | AT_PROXY) << 24 | units[0].0
    );
    assert_eq!(endpoint_value(&compiled, 0, ip("2001:db8:ffff::7")), AT_INSTANCE << 24 | 5);
    assert_eq!(compiled.outbound[5].instance, Some(ip("2001:db8:ffff::7")));
    assert_eq!(image.endpoint(5).instance_address[3].to_ne_bytes(), [0, 0, 0, 7]);
}

#[test]
fn frontends_are_used_one_after_the_other_or_all_at_once_and_a_seventeenth_joins_the_sixteenth() {
    let mut net = network(1);
    net.load_balancers[0].outbound_rules[0].allocated_outbound_ports = 16;
    // A prefix: several addresses in one frontend.
    let prefix = (0..18).map(|i| public(&format!("pp/{i}"), &format!("198.51.100.{i}"), Announce::Routed));
    net.public_addresses = prefix.collect();
    net.load_balancers[0].frontends[0].public_addresses = (0..18).collect();
    // Two units on each address: as if each had been the only one for a while.
    let mut ownership = Ownership::default();
    for i in 0..18 {
        let units = ownership.frontends.entry(ip(&format!("198.51.100.{i}"))).or_default();
        let owner =
            portcullis::compile::ports::Owner { member: "vm1/ipconfig1".into(), draining_until: None };
        units.tcp.extend([(200, owner.clone()), (300, owner)]);
    }
    let compiled_with = |net: &Network| {
        let mut net = net.clone();
        net.load_balancers[0].outbound_rules[0].allocated_outbound_ports = 36 * 8;
        compile(&net, &facts(&net), &mut Registry::default(), &ownership, 1).unwrap()
    };
    let compiled = compiled_with(&net);
    let tcp = segments(&compiled, 0, ALLOC_TCP);
    assert_eq!(tcp.len(), 16);
    assert!(tcp[..15].iter().all(|segment| segment.units == 2));
    assert_eq!(tcp[15].units, 6, "the last three addresses");
    let image = Image { pages: &compiled.pages };
    let order: Vec<u32> = image.units(&image.endpoint(0), ALLOC_TCP).iter().map(|unit| unit.0).collect();
    assert!(order.is_sorted() && order.len() == 36);
    assert_eq!(segments(&compiled, 0, ALLOC_ECHO), tcp);

    net.load_balancers[0].frontend_use = FrontendUse::Spread;
    let compiled = compiled_with(&net);
    let tcp = segments(&compiled, 0, ALLOC_TCP);
    assert_eq!((tcp.len(), tcp[0].units), (1, 36));
    assert_eq!(Image { pages: &compiled.pages }.endpoint(0).alloc[ALLOC_TCP].ports, 36 * 8);
}

#[test]
fn a_pool_that_load_balancing_rules_serve_leaves_under_all_their_frontends() {
    let mut net = ruleless(100);
    net.public_addresses.push(public("second", "203.0.113.101", Announce::Proxy));
    net.load_balancers[0].frontends.push(Frontend { name: "second".into(), public_addresses: vec![1] });
    net.load_balancers[0].rules = vec![
        balancing("a", 0, TransportProtocol::Tcp),
        LoadBalancingRule { frontend: 1, ..balancing("b", 0, TransportProtocol::Tcp) },
        LoadBalancingRule { frontend: 1, ..balancing("u", 0, TransportProtocol::Udp) },
    ];
    let compiled = fresh(&net);
    let tcp = of(&compiled, "vm1/ipconfig1", ALLOC_TCP).unwrap();
    assert_eq!(
        (tcp.ports, tcp.frontends.as_slice()),
        (1024, &[ip("203.0.113.100"), ip("203.0.113.101")][..])
    );
    let udp = of(&compiled, "vm1/ipconfig1", ALLOC_UDP).unwrap();
    assert_eq!(
        (udp.ports, udp.frontends.as_slice()),
        (512, &[IpAddr::V4(Ipv4Addr::new(203, 0, 113, 101))][..])
    );
}
