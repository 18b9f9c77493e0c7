//! Both families, peerings, routes, the rules before the groups, and what a policy may take of memory.

mod compile_support;

use std::net::{IpAddr, Ipv4Addr};

use compile_support::*;
use portcullis::compile::lookup::{Image, endpoint_value, space_value};
use portcullis::compile::{Compiled, Ownership, Registry, RulesetOf, compile, tag_prefixes};
use portcullis::policy::network::{
    AddressMatch, Direction, IpConfiguration, Network, OnRuleChange, PlatformService, Route, RouteHop,
    RouteTable, RuleProtocol, SecurityRule, ServiceTag, TagDefinition, TransportProtocol,
};
use portcullis_common::policy::{
    AT_GUEST, AT_HOST, IN_APPLIANCE, IN_GATEWAY, IN_NETWORK, IN_NOWHERE, IN_PLATFORM, IN_WORLD,
    space_value as value,
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn add_v6(network: &mut Network, interface: usize, address: &str) {
    let subnet = network.interfaces[interface].addresses[0].subnet;
    network.interfaces[interface].addresses.push(IpConfiguration {
        name: "ipconfig6".into(),
        address: ip(address),
        subnet,
        public_address: None,
        application_groups: Vec::new(),
    });
}

fn route(name: &str, prefix: &str, next_hop: RouteHop) -> Route {
    Route { name: name.into(), prefix: prefix.parse().unwrap(), next_hop }
}

/// `network(2)` with IPv6, peered with `far`, whose only guest is `fw`.
fn peered() -> Network {
    let mut net = network(2);
    net.virtual_networks[0].address_space.push("fd00:1::/48".parse().unwrap());
    net.subnets[0].prefixes.push("fd00:1::/64".parse().unwrap());
    net.subnets[0].gateways.push(ip("fd00:1::1"));
    add_v6(&mut net, 0, "fd00:1::4");
    net.virtual_networks.push(virtual_network("far", 65535, &["172.16.0.0/16", "fd00:2::/48"]));
    net.virtual_networks[0].peers = vec![1];
    net.virtual_networks[1].peers = vec![0];
    net.subnets.push(subnet("far", 1, "172.16.0.0/24", "172.16.0.1", None));
    net.interfaces.push(guest("fw", Ipv4Addr::new(172, 16, 0, 4), 1, None));
    net
}

fn at(compiled: &Compiled, network: u16, address: &str) -> (u32, u32) {
    let value = endpoint_value(compiled, network, ip(address));
    (value >> 24, value & 0xff_ffff)
}

#[test]
fn an_ipv6_configuration_is_an_endpoint_of_its_own_with_a_next_hop_of_its_own() {
    let net = peered();
    let mut host = facts(&net);
    host.addresses = ["::1", "fd00:1::99", "2001:db8::7"].map(ip).into();
    let compiled = compile(&net, &host, &mut Registry::default(), &Ownership::default(), 1).unwrap();
    assert_eq!(compiled.members, ["vm1/ipconfig1", "vm1/ipconfig6", "vm2/ipconfig1", "fw/ipconfig1"]);
    assert_eq!(at(&compiled, 1, "fd00:1::4"), (AT_GUEST, 1));
    assert_eq!(at(&compiled, 1, "10.0.0.6"), (AT_GUEST, 2));
    assert_eq!(at(&compiled, 1, "fd00:1::1"), (AT_HOST, 0), "the gateway");
    assert_eq!(at(&compiled, 1, "fd00:1::99"), (AT_HOST, 0), "the host's own, inside the space");
    assert_eq!(at(&compiled, 0, "2001:db8::7"), (AT_HOST, 0));
    assert_eq!(at(&compiled, 0, "::1"), (0, 0));
    let image = Image { pages: &compiled.pages };
    let (v4, v6) = (image.endpoint(0), image.endpoint(1));
    assert_eq!((v6.address, v6.network, v6.alloc[0].segments), (0, 1, 0));
    assert_eq!(v6.address6[0].to_ne_bytes(), [0xfd, 0, 0, 1]);
    assert_eq!(v6.address6[3].to_ne_bytes(), [0, 0, 0, 4]);
    assert_eq!(v4.address6, [0; 4]);
    assert!(v4.alloc[0].ports > 0, "IPv4 has its SNAT ports as before");
    let hop = compiled.guest_hops.iter().find(|hop| hop.name == "vm1/ipconfig6").unwrap();
    assert_eq!((hop.index, hop.address), (v6.next_hop, ip("fd00:1::4")));
    assert_ne!(v4.next_hop, v6.next_hop);
    assert_eq!(compiled.endpoints6.len(), 5, "the host's address inside the space is known in both");
}

#[test]
fn a_subnet_reaches_its_own_network_its_peers_and_what_its_routes_say() {
    let mut net = peered();
    let appliance = |address| RouteHop::VirtualAppliance(ip(address));
    net.route_tables.push(RouteTable {
        name: "rt".into(),
        widen_virtual_network: false,
        routes: vec![
            route("default", "0.0.0.0/0", appliance("172.16.0.4")),
            route("default6", "::/0", RouteHop::None),
            route("onprem", "192.168.0.0/16", RouteHop::VirtualNetworkGateway),
            route("nobody", "192.168.7.0/24", appliance("10.0.9.9")),
            route("out", "198.51.100.0/24", RouteHop::Internet),
            route("local", "172.16.5.0/24", RouteHop::VnetLocal),
            route("override", "fd00:2::/48", appliance("fd00:1::4")),
        ],
    });
    net.subnets.push(subnet("routed", 0, "10.0.32.0/24", "10.0.32.1", None));
    net.subnets.push(subnet("routed too", 0, "10.0.33.0/24", "10.0.33.1", None));
    net.subnets[2].route_table = Some(0);
    net.subnets[3].route_table = Some(0);
    net.interfaces.push(guest("vm3", Ipv4Addr::new(10, 0, 32, 4), 2, None));
    net.interfaces.push(guest("vm4", Ipv4Addr::new(10, 0, 33, 4), 3, None));
    net.platform.services.push(PlatformService {
        name: "dns".into(),
        address: Ipv4Addr::new(168, 63, 129, 16),
        protocol: TransportProtocol::All,
        port: 53,
    });
    let compiled = fresh(&net);
    let image = Image { pages: &compiled.pages };
    assert_eq!((image.endpoint(0).routing, image.endpoint(3).routing), (1, 65535), "their networks' ids");
    let routed = image.endpoint(4).routing;
    assert_eq!(routed, 65534, "the highest that is no network's");
    assert_eq!(image.endpoint(5).routing, routed, "one for all subnets with the table");

    let seen = |routing, address| space_value(&compiled, routing, ip(address));
    for routing in [1, routed] {
        assert_eq!(
            seen(routing, "10.0.200.1"),
            value(IN_NETWORK, 1),
            "a default route captures no own space"
        );
        assert_eq!(seen(routing, "172.16.0.9"), value(IN_NETWORK, 65535));
        assert_eq!(seen(routing, "fd00:1::9"), value(IN_NETWORK, 1));
        assert_eq!(seen(routing, "168.63.129.16"), value(IN_PLATFORM, 0));
    }
    assert_eq!(seen(1, "1.1.1.1"), 0);
    assert_eq!(seen(1, "fd00:2::9"), value(IN_NETWORK, 65535));
    assert_eq!(seen(routed, "1.1.1.1"), value(IN_APPLIANCE, 3), "fw's endpoint, in the peer");
    assert_eq!(seen(routed, "2001:db8::1"), value(IN_NOWHERE, 0));
    assert_eq!(seen(routed, "192.168.1.1"), value(IN_GATEWAY, 0));
    assert_eq!(seen(routed, "192.168.7.1"), value(IN_NOWHERE, 0), "no guest has that address");
    assert_eq!(seen(routed, "198.51.100.1"), value(IN_WORLD, 0));
    assert_eq!(seen(routed, "172.16.5.1"), value(IN_NETWORK, 1));
    assert_eq!(seen(routed, "fd00:2::9"), value(IN_APPLIANCE, 1), "a route equal to a system route wins");
    assert_eq!(seen(0, "172.16.5.1"), value(IN_NETWORK, 0));
    assert_eq!(seen(0, "192.168.1.1"), 0);
    assert_eq!(compiled.warnings.len(), 1);
    assert_eq!(compiled.warnings[0].place, "routeTables/rt/routes/nobody");
    assert!(compiled.warnings[0].message.contains("no ip configuration has 10.0.9.9"));

    let tag = |net: &Network| tag_prefixes(net, 2, ServiceTag::VirtualNetwork);
    let written: Vec<String> = tag(&net).iter().map(ToString::to_string).collect();
    let inside =
        ["10.0.0.0/16", "168.63.129.16/32", "172.16.0.0/16", "192.168.0.0/16", "fd00:1::/48", "fd00:2::/48"];
    assert_eq!(written, inside);
    net.route_tables[0].widen_virtual_network = true;
    let written: Vec<String> = tag(&net).iter().map(ToString::to_string).collect();
    assert_eq!(written, ["0.0.0.0/0", "fd00:1::/48", "fd00:2::/48"], "::/0 leads nowhere");
}

#[test]
fn subnets_from_which_tags_mean_the_same_share_their_rulesets() {
    let mut net = network(3);
    net.groups = vec![group("g", vec![])];
    for (number, routes) in [
        vec![route("out", "198.51.100.0/24", RouteHop::Internet)],
        vec![route("onprem", "192.168.0.0/16", RouteHop::VirtualNetworkGateway)],
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("rt{number}");
        net.route_tables.push(RouteTable { name: name.clone(), routes, widen_virtual_network: false });
        let prefix = format!("10.0.{}.0/24", 32 + number);
        net.subnets.push(subnet(&name, 0, &prefix, &format!("10.0.{}.1", 32 + number), Some(0)));
        net.subnets[number + 1].route_table = Some(number);
        net.interfaces[number + 1].addresses[0].subnet = number + 1;
    }
    net.subnets[0].group = Some(0);
    let compiled = fresh(&net);
    let subnets: Vec<_> = compiled.contexts.iter().map(|context| context.subnets.clone()).collect();
    assert_eq!(subnets, [vec![0, 1], vec![2]], "a route to the Internet changes no tag");
    assert_eq!(compiled.rulesets.len(), 4);
    let image = Image { pages: &compiled.pages };
    assert_eq!(image.endpoint(0).subnet_inbound, image.endpoint(1).subnet_inbound);
    assert_ne!(image.endpoint(0).routing, image.endpoint(1).routing);
    assert_ne!(image.endpoint(0).subnet_inbound, image.endpoint(2).subnet_inbound);
}

#[test]
fn the_rules_before_the_groups_are_listed_under_names_of_their_own_and_kms_ends_under_forced_tunnelling() {
    let mut net = network(2);
    assert_eq!(Image { pages: &fresh(&net).pages }.endpoint(0).platform_outbound, 0, "there are none");
    net.platform.allow_kms = true;
    net.platform.block_smtp = true;
    for (name, port) in [("dns", 53), ("agent", 80)] {
        net.platform.services.push(PlatformService {
            name: name.into(),
            address: Ipv4Addr::new(168, 63, 129, 16),
            protocol: TransportProtocol::All,
            port,
        });
    }
    let routes = vec![route("all", "0.0.0.0/0", RouteHop::VirtualNetworkGateway)];
    net.route_tables.push(RouteTable { name: "tunnel".into(), routes, widen_virtual_network: false });
    net.subnets.push(subnet("tunnelled", 0, "10.0.32.0/24", "10.0.32.1", None));
    net.subnets[1].route_table = Some(0);
    net.interfaces[1].addresses[0].subnet = 1;
    net.groups = vec![group("platformRules", vec![])];
    let mut registry = Registry::default();
    let compiled = compile(&net, &facts(&net), &mut registry, &Ownership::default(), 1).unwrap();
    let own: Vec<_> = compiled.rules.iter().filter(|r| r.priority < 100).collect();
    let names: Vec<_> = own.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["AllowPlatformService-dns", "AllowPlatformService-agent", "AllowKms", "BlockSmtp25"]);
    for rule in own {
        assert_eq!(rule.group, "platformRules");
        assert_eq!(registry.rule_key(rule.id), Some(format!("platformRules/{}", rule.name).as_str()));
    }
    let image = Image { pages: &compiled.pages };
    let of = |endpoint| {
        let number = image.endpoint(endpoint).platform_outbound;
        (compiled.rulesets[number as usize - 1].of, image.ruleset(number).rules)
    };
    assert_eq!(of(0), (RulesetOf::Platform { kms: true }, 6));
    assert_eq!(of(1), (RulesetOf::Platform { kms: false }, 5));
}

#[test]
fn a_tag_is_one_list_however_many_rules_name_it() {
    let prefixes: Vec<_> = (0..2000u32).map(|i| format!("20.{}.{}.0/25", i / 256, i % 256)).collect();
    let prefixes = prefixes.iter().map(|p| p.parse().unwrap());
    let prefixes = prefixes.chain((0..500).map(|i| format!("2603:{i:x}::/32").parse().unwrap()));
    let mut net = network(1);
    net.tags.push(TagDefinition { name: "Big".into(), prefixes: prefixes.collect() });
    net.tags
        .push(TagDefinition { name: "Unused".into(), prefixes: vec!["21.0.0.0/24".parse().unwrap()].into() });
    net.interfaces[0].group = Some(0);
    let named = |count: u16| {
        let rule = |i| SecurityRule {
            source: vec![AddressMatch::Tag(ServiceTag::Named(0))],
            destination_ports: vec![(i, i)],
            protocol: RuleProtocol::Tcp,
            ..rule(Direction::Inbound, &format!("r{i}"), 100 + i)
        };
        let mut net = net.clone();
        net.groups = vec![group("g", (0..count).map(rule).collect())];
        fresh(&net)
    };
    let (one, many) = (named(1), named(1000));
    assert_eq!(one.prefixes, many.prefixes);
    assert_eq!((one.prefixes6.len(), many.prefixes6.len()), (501, 501), "and the Internet");
    let grown = many.pages.len() - one.pages.len();
    assert!(grown < 1100, "a row for each port, nothing for the tag's 2,500 prefixes: {grown} pages");
}

#[test]
fn a_policy_that_takes_too_much_memory_is_refused_with_what_it_would_take() {
    let mut random = Random::new(5);
    let mut net = network(40);
    for i in 0..40 {
        let mut address =
            || AddressMatch::Prefix(IpAddr::from([11, 0, random.next() as u8, random.next() as u8]).into());
        let rule = |p| SecurityRule {
            source: vec![address()],
            destination: vec![address()],
            ..rule(Direction::Inbound, &format!("r{p}"), p)
        };
        net.groups.push(group(&format!("g{i}"), (100..600).map(rule).collect()));
        net.interfaces[i].group = Some(i);
    }
    let needed = fresh(&net).memory_bytes.div_ceil(1 << 20);
    assert!(needed > 6, "{needed} MiB");
    net.limits.policy_memory_mib = needed as u32;
    fresh(&net);
    for allowed in [needed as u32 - 1, 1] {
        net.limits.policy_memory_mib = allowed;
        let mut registry = Registry::default();
        let refused = compile(&net, &facts(&net), &mut registry, &Ownership::default(), 1).unwrap_err();
        assert_eq!(registry, Registry::default());
        assert_eq!(refused[0].place, "limits/policyMemoryMiB");
        let expected = format!("would take {needed} MiB of kernel memory");
        assert!(refused[0].message.contains(&expected), "{}", refused[0].message);
        assert!(refused[0].message.contains(&format!("allows {allowed} MiB")), "{}", refused[0].message);
    }
}

#[test]
fn flows_are_stamped_with_the_generation_and_judged_again_only_if_the_policy_says_so() {
    let mut net = network(1);
    let of = |net: &Network, generation| {
        let compiled =
            compile(net, &facts(net), &mut Registry::default(), &Ownership::default(), generation).unwrap();
        (compiled.settings.epoch, compiled.settings.reevaluate)
    };
    assert_eq!(of(&net, 0x1_2345), (0x345, 0));
    net.on_rule_change = OnRuleChange::Reevaluate;
    assert_eq!(of(&net, 4096), (0, 4096));
}
