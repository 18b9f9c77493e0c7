//! Endpoints, devices, next hops, spaces and settings; and numbers that stay while policies come and go.

mod compile_support;

use std::net::Ipv4Addr;

use compile_support::*;
use portcullis::compile::lookup::{Image, endpoint_value};
use portcullis::compile::{Compiled, Ownership, Registry, RulesetOf, compile};
use portcullis::policy::network::{
    Announce, Direction, Frontend, HostAccess, Network, OutboundRule, TransportProtocol,
};
use portcullis_common::clock::ticks;
use portcullis_common::layout::{DEVICE_GUEST, DEVICE_UPLINK, HOST_DNS, HOST_ECHO, IDLE_RULES, IDLE_UDP};
use portcullis_common::policy::{
    AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_PROXY, AT_UNUSED, FRONTEND_HOST, IN_NETWORK,
};

fn at(compiled: &Compiled, network: u16, address: &str) -> (u32, u32) {
    let value = endpoint_value(compiled, network, address.parse().unwrap());
    (value >> 24, value & 0xff_ffff)
}

#[test]
fn every_address_of_the_policy_and_the_host_is_known_for_what_it_is() {
    let mut net = network(2);
    net.virtual_networks.push(virtual_network("twin", 9, &["10.0.0.0/16"]));
    net.subnets.push(subnet("twin", 1, "10.0.0.0/24", "10.0.0.1", None));
    net.interfaces.push(guest("twin1", Ipv4Addr::new(10, 0, 0, 5), 1, None));
    net.public_addresses.push(public("own", "203.0.113.7", Announce::Routed));
    net.public_addresses.push(public("host", "203.0.113.8", Announce::Address));
    net.public_addresses.push(public("spare", "203.0.113.9", Announce::Proxy));
    net.public_addresses.push(public("spare-host", "203.0.113.10", Announce::Address));
    net.interfaces[2].addresses[0].public_address = Some(1);
    net.load_balancers[0].frontends.push(Frontend { name: "host".into(), public_addresses: vec![2] });
    let mut host = facts(&net);
    host.addresses =
        ["127.0.0.1", "192.0.2.1", "203.0.113.8", "10.0.0.1", "10.0.3.3"].map(|a| a.parse().unwrap()).into();
    let compiled = compile(&net, &host, &mut Registry::default(), &Ownership::default(), 1).unwrap();

    assert_eq!(at(&compiled, 1, "10.0.0.5"), (AT_GUEST, 0));
    assert_eq!(at(&compiled, 1, "10.0.0.6"), (AT_GUEST, 1));
    assert_eq!(at(&compiled, 9, "10.0.0.5"), (AT_GUEST, 2));
    assert_eq!(at(&compiled, 9, "10.0.0.6"), (0, 0), "the other network's");
    assert_eq!(at(&compiled, 1, "10.0.0.1"), (AT_HOST, 0));
    assert_eq!(at(&compiled, 9, "10.0.0.1"), (AT_HOST, 0));
    assert_eq!(at(&compiled, 1, "10.0.3.3"), (AT_HOST, 0), "no gateway, but the host's");
    assert_eq!(at(&compiled, 0, "192.0.2.1"), (AT_HOST, 0));
    assert_eq!(at(&compiled, 0, "127.0.0.1"), (0, 0));
    assert_eq!(at(&compiled, 0, "203.0.113.100"), (AT_FRONTEND | AT_PROXY, 0));
    assert_eq!(at(&compiled, 0, "203.0.113.7"), (AT_INSTANCE, 2));
    assert_eq!(at(&compiled, 0, "203.0.113.8"), (AT_FRONTEND, 1), "before the host's own use of it");
    assert_eq!(at(&compiled, 0, "203.0.113.9"), (AT_UNUSED | AT_PROXY, 0));
    assert_eq!(at(&compiled, 0, "203.0.113.10"), (AT_HOST, 0));

    let image = Image { pages: &compiled.pages };
    assert_eq!(image.frontend(0).flags, 0);
    assert_eq!(image.frontend(1).flags, FRONTEND_HOST);
    let own = image.endpoint(2);
    assert_eq!(own.instance_address[0].to_ne_bytes(), [203, 0, 113, 7]);
    assert_eq!((own.network, own.alloc[0].segments), (9, 0));
    let inside = |routing: u16| (routing, 16, [10, 0, 0, 0], IN_NETWORK << 24 | u32::from(routing));
    assert_eq!(compiled.spaces, [inside(0), inside(1), inside(9)]);
}

#[test]
fn the_four_rulesets_of_an_address_come_from_its_interface_and_its_subnet() {
    let mut net = network(3);
    net.groups = vec![group("nic", vec![]), group("sub", vec![])];
    net.interfaces[0].group = Some(0);
    net.subnets[0].group = Some(1);
    let compiled = fresh(&net);
    let image = Image { pages: &compiled.pages };
    let what = |number: u32| {
        number
            .checked_sub(1)
            .map(|i| (compiled.rulesets[i as usize].of, compiled.rulesets[i as usize].direction))
    };
    let both = image.endpoint(0);
    assert_eq!(what(both.nic_outbound), Some((RulesetOf::Group(0), Direction::Outbound)));
    assert_eq!(what(both.subnet_outbound), Some((RulesetOf::Group(1), Direction::Outbound)));
    assert_eq!(what(both.subnet_inbound), Some((RulesetOf::Group(1), Direction::Inbound)));
    assert_eq!(what(both.nic_inbound), Some((RulesetOf::Group(0), Direction::Inbound)));
    let one = image.endpoint(1);
    assert_eq!((one.nic_outbound, one.nic_inbound), (0, 0));
    assert_eq!((one.subnet_outbound, one.subnet_inbound), (both.subnet_outbound, both.subnet_inbound));
    assert_eq!(compiled.rulesets.len(), 4);
}

#[test]
fn devices_and_next_hops_carry_what_guests_know_their_gateway_by() {
    let mut net = network(2);
    net.interfaces[1].mac = Some([2, 1, 1, 1, 1, 1]);
    let mut host = facts(&net);
    host.devices.get_mut("tap-vm1").unwrap().gateway_mac = [2, 0xb, 0, 0, 0, 0];
    host.devices.remove("tap-vm2");
    let compiled = compile(&net, &host, &mut Registry::default(), &Ownership::default(), 1).unwrap();
    assert_eq!(compiled.missing_devices, ["tap-vm2"]);
    let found: Vec<_> = compiled.devices.iter().map(|d| (d.ifindex, d.kind, d.network, d.mac)).collect();
    assert_eq!(
        found,
        [(12, DEVICE_UPLINK, 0, [2, 0, 0, 0, 0, 2]), (10, DEVICE_GUEST, 1, [2, 0xb, 0, 0, 0, 0])]
    );
    let hops = &compiled.guest_hops;
    assert_eq!((hops[0].index, hops[0].name.as_str(), hops[0].ifindex), (2, "vm1/ipconfig1", 10));
    assert_eq!((hops[0].mac, hops[0].source_mac), (None, [2, 0xb, 0, 0, 0, 0]));
    assert_eq!((hops[1].index, hops[1].ifindex, hops[1].mac), (3, 0, net.interfaces[1].mac));
    assert_eq!(Image { pages: &compiled.pages }.endpoint(1).next_hop, 3);
}

#[test]
fn settings_have_the_policys_timers_services_and_idle_classes() {
    let mut net = network(4);
    net.host_access = HostAccess {
        dhcp: false,
        dns: true,
        echo: true,
        services: vec![(TransportProtocol::Tcp, 8080, 8090), (TransportProtocol::All, 123, 123)],
    };
    let second = OutboundRule {
        name: "slow".into(),
        pool: 1,
        idle_timeout_seconds: Some(7200),
        tcp_reset: false,
        protocol: TransportProtocol::Tcp,
        ..net.load_balancers[0].outbound_rules[0].clone()
    };
    let mut pool = net.load_balancers[0].pools[0].clone();
    pool.members = net.load_balancers[0].pools[0].members.split_off(2);
    net.load_balancers[0].pools.push(pool);
    net.load_balancers[0].outbound_rules.push(second);
    let compiled = fresh(&net);
    let settings = &compiled.settings;
    assert_eq!(settings.host_access, HOST_DNS | HOST_ECHO);
    let services = settings.services[..settings.services_used as usize].iter();
    let services: Vec<_> = services.map(|s| (s.protocol, s.first, s.last)).collect();
    assert_eq!(services, [(6, 8080, 8090), (6, 123, 123), (17, 123, 123)]);
    assert_eq!(settings.idle[IDLE_UDP as usize], ticks(240));
    let image = Image { pages: &compiled.pages };
    let slow = image.endpoint(3);
    assert_eq!(
        slow.alloc.map(|alloc| (alloc.segments, alloc.idle_class)),
        [(1, IDLE_RULES + 1), (0, 0), (0, 0)]
    );
    assert_eq!(settings.idle[usize::from(slow.alloc[0].idle_class)], ticks(7200));
    assert_eq!(image.endpoint(0).alloc.map(|alloc| alloc.segments), [1; 3]);
}

#[test]
fn a_thirteenth_idle_timeout_and_a_second_outbound_rule_for_an_address_are_refused() {
    let refused = |net: &Network| {
        let mut registry = Registry::default();
        let result = compile(net, &facts(net), &mut registry, &Ownership::default(), 1);
        assert_eq!(registry, Registry::default(), "a policy that is not in force takes no numbers");
        result.unwrap_err()
    };
    let mut net = network(13);
    let rule = net.load_balancers[0].outbound_rules.remove(0);
    let pool = net.load_balancers[0].pools.remove(0);
    for i in 0..13 {
        let mut pool = pool.clone();
        pool.members = vec![(i, 0)];
        net.load_balancers[0].pools.push(pool);
        let idle_timeout_seconds = Some(240 + 60 * i as u32);
        let rule = OutboundRule { pool: i, name: format!("out{i}"), idle_timeout_seconds, ..rule.clone() };
        net.load_balancers[0].outbound_rules.push(rule);
    }
    let errors = refused(&net);
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].place, "loadBalancers/lb/outboundRules/out12");
    assert!(errors[0].message.contains("12 different idle timeouts"), "{}", errors[0]);

    let mut net = network(3);
    let again = OutboundRule { name: "again".into(), ..net.load_balancers[0].outbound_rules[0].clone() };
    net.load_balancers[0].outbound_rules.push(again);
    let errors = refused(&net);
    assert_eq!(errors.len(), 3);
    assert!(errors[0].message.contains("vm1/ipconfig1 is in the pool of loadBalancers/lb/outboundRules/out"));
}

#[test]
fn impossible_devices_and_addresses_are_refused() {
    let errors = |net: &Network| {
        let errors =
            compile(net, &facts(net), &mut Registry::default(), &Ownership::default(), 1).unwrap_err();
        errors.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("\n")
    };
    let mut net = network(2);
    net.interfaces[0].device = "eth0".into();
    assert!(errors(&net).contains("networkInterfaces/vm1: device eth0 is an uplink"));

    let mut net = network(2);
    net.virtual_networks.push(virtual_network("twin", 2, &["10.0.0.0/16"]));
    net.subnets.push(subnet("twin", 1, "10.0.0.0/24", "10.0.0.1", None));
    net.interfaces[1].addresses[0].subnet = 1;
    net.interfaces[1].device = net.interfaces[0].device.clone();
    assert!(errors(&net).contains("carries guests of two virtual networks"));

    let mut net = network(2);
    net.interfaces[1].addresses[0].address = net.interfaces[0].addresses[0].address;
    assert!(errors(&net).contains("another ip configuration has 10.0.0.5 too"));

    let mut net = network(2);
    net.interfaces[1].addresses[0].address = "10.0.0.1".parse().unwrap();
    assert!(errors(&net).contains("the gateway 10.0.0.1 is the address of a guest"));

    let mut net = network(2);
    net.interfaces[1].addresses[0].public_address = Some(0);
    assert!(errors(&net).contains("web is an instance-level public IP already"));
}

#[test]
fn numbers_stay_with_their_names_whatever_comes_and_goes() {
    let mut random = Random::new(5);
    let mut registry = Registry::default();
    let mut hops = std::collections::BTreeMap::new();
    let mut rules = std::collections::BTreeMap::new();
    let mut networks = std::collections::BTreeMap::new();
    let mut ownership = Ownership::default();
    for generation in 1..60 {
        let mut net = network(20);
        // Numbered anew by whoever reads the policy.
        net.virtual_networks[0].id = 1 + (generation % 3) as u16;
        let mut rules_now = Vec::new();
        for i in 0..30 {
            if random.chance(60) {
                let priority = 100 + i * 3 + random.below(3) as u16;
                rules_now.push(rule(Direction::Inbound, &format!("rule{i}"), priority));
            }
        }
        net.groups = vec![group("g", rules_now)];
        net.subnets[0].group = Some(0);
        net.interfaces.retain(|_| random.chance(70));
        net.load_balancers[0].pools[0].members = (0..net.interfaces.len()).map(|i| (i, 0)).collect();
        let compiled = compile(&net, &facts(&net), &mut registry, &ownership, generation).unwrap();
        let text = serde_json::to_string(&registry).unwrap();
        registry = serde_json::from_str(&text).unwrap();
        for hop in &compiled.guest_hops {
            assert_eq!(*hops.entry(hop.name.clone()).or_insert(hop.index), hop.index);
            assert_eq!(registry.next_hop_key(hop.index), Some(format!("guest:{}", hop.name).as_str()));
        }
        for rule in &compiled.rules {
            let key = format!("{}/{:?}/{}", rule.group, rule.direction, rule.name);
            assert_eq!(registry.rule_key(rule.id), Some(key.as_str()));
            assert_eq!(*rules.entry(key).or_insert(rule.id), rule.id);
        }
        let id = Image { pages: &compiled.pages }.endpoint(0).network;
        assert_eq!(*networks.entry("vnet").or_insert(id), id);
        assert_eq!(registry.network_name(id), Some("vnet"));
        ownership = compiled.ownership;
    }
    assert!(rules.contains_key("g/Inbound/securityRules/rule3"));
    assert!(rules.contains_key("g/Outbound/defaultSecurityRules/AllowInternetOutBound"));
    let mut ids: Vec<u32> = rules.values().copied().collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), rules.len(), "no number twice");
}
