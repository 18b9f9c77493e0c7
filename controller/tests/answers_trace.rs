//! The linear evaluator against the documentation's examples: what each group says, rule by rule.

mod answers_support;
mod compile_support;

use std::net::Ipv4Addr;

use answers_support::{ip, nets, route, tcp};
use compile_support::{group, guest, network, prefix, rule, subnet};
use ipnet::IpNet;
use portcullis::answers::expand::tag_prefixes;
use portcullis::answers::trace::{Level, Packet, PlatformRule, Trace, judge};
use portcullis::policy::network::{
    Access, AddressMatch, ApplicationGroup, Direction, Network, PlatformService, RouteHop, RouteTable,
    RuleProtocol, SecurityRule, ServiceTag, TransportProtocol, VirtualNetwork,
};

fn tag(tag: ServiceTag) -> Vec<AddressMatch> {
    vec![AddressMatch::Tag(tag)]
}

fn http(direction: Direction, access: Access) -> SecurityRule {
    let mut http = rule(direction, "Http", 100);
    (http.access, http.protocol, http.destination_ports) = (access, RuleProtocol::Tcp, vec![(80, 80)]);
    http
}

/// The documentation's four machines: NSG1 on Subnet1, NSG2 on the interfaces of VM1 and VM3; VM2 is in Subnet1 too.
fn four_machines(nsg1: Access, nsg2: Access) -> Network {
    let both = |access| vec![http(Direction::Inbound, access), http(Direction::Outbound, access)];
    let mut net = network(0);
    net.groups = vec![group("NSG1", both(nsg1)), group("NSG2", both(nsg2))];
    net.subnets = vec![
        subnet("Subnet1", 0, "10.0.1.0/24", "10.0.1.1", Some(0)),
        subnet("Subnet2", 0, "10.0.2.0/24", "10.0.2.1", None),
        subnet("Subnet3", 0, "10.0.3.0/24", "10.0.3.1", None),
    ];
    net.interfaces = vec![
        guest("VM1", Ipv4Addr::new(10, 0, 1, 4), 0, Some(1)),
        guest("VM2", Ipv4Addr::new(10, 0, 1, 5), 0, None),
        guest("VM3", Ipv4Addr::new(10, 0, 2, 4), 1, Some(1)),
        guest("VM4", Ipv4Addr::new(10, 0, 3, 4), 2, None),
    ];
    net
}

fn asked(net: &Network, trace: &Trace<'_>) -> Vec<(Level, String)> {
    trace.groups.iter().map(|group| (group.level, net.groups[group.group].name.clone())).collect()
}

#[test]
fn the_documentations_four_machines_are_judged_as_it_says_in_both_directions() {
    use Access::{Allow, Deny};
    let own = ["10.0.1.4", "10.0.1.5", "10.0.2.4", "10.0.3.4"];
    for (nsg1, nsg2) in [(Allow, Allow), (Allow, Deny), (Deny, Allow), (Deny, Deny)] {
        let net = four_machines(nsg1, nsg2);
        let both = if (nsg1, nsg2) == (Allow, Allow) { Allow } else { Deny };
        for (vm, expected) in [both, nsg1, nsg2, Allow].into_iter().enumerate() {
            let inbound = tcp("1.1.1.1", 40000, own[vm], 80);
            let outbound = tcp(own[vm], 40000, "1.1.1.1", 80);
            let inbound = judge(&net, (vm, 0), Direction::Inbound, &inbound);
            let outbound = judge(&net, (vm, 0), Direction::Outbound, &outbound);
            assert_eq!(
                (inbound.access, outbound.access),
                (expected, expected),
                "VM{} {nsg1:?} {nsg2:?}",
                vm + 1
            );
            let (subnet, nic) =
                ((Level::Subnet, "NSG1".to_owned()), (Level::NetworkInterface, "NSG2".to_owned()));
            let (first_in, first_out) = match vm {
                // Inbound the subnet's first, outbound the interface's; the first deny ends it.
                0 if nsg1 == Deny && nsg2 == Deny => (vec![subnet.clone()], vec![nic.clone()]),
                0 if nsg1 == Deny => (vec![subnet.clone()], vec![nic, subnet]),
                0 if nsg2 == Deny => (vec![subnet, nic.clone()], vec![nic]),
                0 => (vec![subnet.clone(), nic.clone()], vec![nic, subnet]),
                1 => (vec![subnet.clone()], vec![subnet]),
                2 => (vec![nic.clone()], vec![nic]),
                _ => (vec![], vec![]),
            };
            assert_eq!(asked(&net, &inbound), first_in);
            assert_eq!(asked(&net, &outbound), first_out);
        }
    }
}

#[test]
fn a_group_without_rules_keeps_the_internet_out_and_lets_the_network_talk() {
    let mut net = four_machines(Access::Allow, Access::Allow);
    net.groups[0].rules.clear();
    let from_world = judge(&net, (1, 0), Direction::Inbound, &tcp("1.1.1.1", 1, "10.0.1.5", 80));
    assert_eq!(from_world.access, Access::Deny);
    let names: Vec<&str> = from_world.groups[0].trials.iter().map(|trial| trial.rule.name.as_str()).collect();
    assert_eq!(names, ["AllowVnetInBound", "AllowAzureLoadBalancerInBound", "DenyAllInBound"]);
    let inside = judge(&net, (1, 0), Direction::Inbound, &tcp("10.0.3.4", 1, "10.0.1.5", 80));
    assert_eq!(inside.groups[0].matched().unwrap().name, "AllowVnetInBound");
    let probe = judge(&net, (1, 0), Direction::Inbound, &tcp("168.63.129.16", 1, "10.0.1.5", 80));
    assert_eq!(probe.access, Access::Allow);
    let out = judge(&net, (1, 0), Direction::Outbound, &tcp("10.0.1.5", 1, "1.1.1.1", 80));
    assert_eq!(out.groups[0].matched().unwrap().name, "AllowInternetOutBound");
}

#[test]
fn the_documentations_application_groups_decide_as_it_says() {
    let mut net = network(0);
    let asg = |name: &str| ApplicationGroup { name: name.into(), network: Some(0) };
    net.application_groups = vec![asg("AsgWeb"), asg("AsgLogic"), asg("AsgDb")];
    let app = |index| vec![AddressMatch::Application(index)];
    let mut web = rule(Direction::Inbound, "Allow-HTTP-Inbound-Internet", 100);
    (web.source, web.destination) = (tag(ServiceTag::Internet), app(0));
    (web.protocol, web.destination_ports) = (RuleProtocol::Tcp, vec![(80, 80)]);
    let mut logic = rule(Direction::Inbound, "Allow-Database-BusinessLogic", 110);
    (logic.source, logic.destination) = (app(1), app(2));
    (logic.protocol, logic.destination_ports) = (RuleProtocol::Tcp, vec![(1433, 1433)]);
    let mut deny = rule(Direction::Inbound, "Deny-Database-All", 120);
    (deny.access, deny.destination, deny.destination_ports) = (Access::Deny, app(2), vec![(1433, 1433)]);
    net.groups = vec![group("nsg", vec![deny, web, logic])];
    net.subnets[0].group = Some(0);
    for (i, name) in ["web", "logic", "db", "other"].into_iter().enumerate() {
        let mut guest = guest(name, Ipv4Addr::new(10, 0, 0, 4 + i as u8), 0, None);
        guest.addresses[0].application_groups = if i < 3 { vec![i] } else { vec![] };
        net.interfaces.push(guest);
    }
    let said = |place: usize, packet: Packet| {
        let trace = judge(&net, (place, 0), Direction::Inbound, &packet);
        trace.groups[0].matched().unwrap().name.clone()
    };
    let (world, web, logic, db, other) = ("1.1.1.1", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.7");
    assert_eq!(said(0, tcp(world, 1, web, 80)), "Allow-HTTP-Inbound-Internet");
    assert_eq!(said(3, tcp(world, 1, other, 80)), "DenyAllInBound", "not a member: the rule does not apply");
    assert_eq!(said(2, tcp(logic, 1, db, 1433)), "Allow-Database-BusinessLogic");
    assert_eq!(said(2, tcp(web, 1, db, 1433)), "Deny-Database-All");
    assert_eq!(said(2, tcp(web, 1, db, 1434)), "AllowVnetInBound");
    assert_eq!(said(1, tcp(web, 1, logic, 1433)), "AllowVnetInBound");
}

#[test]
fn every_rule_tried_is_shown_with_the_fields_that_matched() {
    let mut net = four_machines(Access::Allow, Access::Allow);
    let mut udp = rule(Direction::Inbound, "Udp", 90);
    (udp.protocol, udp.source) = (RuleProtocol::Udp, vec![prefix("203.0.113.0/24")]);
    (udp.source_ports, udp.destination_ports) = (vec![(53, 53)], vec![(80, 81)]);
    net.groups[0].rules.push(udp);
    let trace = judge(&net, (1, 0), Direction::Inbound, &tcp("203.0.113.9", 53, "10.0.1.5", 80));
    let trials = &trace.groups[0].trials;
    assert_eq!(trials.len(), 2);
    let fields = trials[0].fields;
    assert!(!fields.protocol_matched && fields.source_matched && fields.source_port_matched);
    assert!(fields.destination_matched && fields.destination_port_matched && !fields.all());
    assert!(trials[1].fields.all() && trials[1].rule.name == "Http");
}

#[test]
fn tags_mean_what_the_subnets_network_peers_and_routes_make_them() {
    let mut net = network(0);
    net.virtual_networks[0].address_space.extend(nets(&["fd00:1::/48"]));
    net.virtual_networks.push(VirtualNetwork {
        name: "peer".into(),
        id: 2,
        address_space: nets(&["20.0.0.0/24", "2001:470::/48"]),
        peers: vec![0],
    });
    net.virtual_networks[0].peers = vec![1];
    net.subnets.push(subnet("routed", 0, "10.0.16.0/24", "10.0.16.1", None));
    net.subnets[1].route_table = Some(0);
    net.route_tables.push(RouteTable {
        name: "rt".into(),
        routes: vec![
            route("vpn", "8.9.0.0/16", RouteHop::VirtualNetworkGateway),
            route("fw", "172.16.5.0/24", RouteHop::VirtualAppliance(ip("10.0.0.9"))),
            route("local", "10.77.0.0/16", RouteHop::VnetLocal),
            route("out", "9.9.9.0/24", RouteHop::Internet),
            route("hole", "7.7.7.0/24", RouteHop::None),
            route("all", "0.0.0.0/0", RouteHop::VirtualAppliance(ip("10.0.0.9"))),
        ],
        widen_virtual_network: false,
    });
    let text = |net: &Network, subnet, tag| -> Vec<String> {
        tag_prefixes(net, subnet, tag).iter().map(ToString::to_string).collect()
    };
    let own = ["10.0.0.0/16", "fd00:1::/48", "20.0.0.0/24", "2001:470::/48"];
    assert_eq!(text(&net, 0, ServiceTag::VirtualNetwork), [&own[..], &["168.63.129.16/32"]].concat());
    let routed = ["8.9.0.0/16", "172.16.5.0/24", "10.77.0.0/16"];
    assert_eq!(
        text(&net, 1, ServiceTag::VirtualNetwork),
        [&own[..], &routed, &["168.63.129.16/32"]].concat()
    );
    net.route_tables[0].widen_virtual_network = true;
    assert!(text(&net, 1, ServiceTag::VirtualNetwork).contains(&"0.0.0.0/0".to_owned()));
    assert!(!text(&net, 0, ServiceTag::VirtualNetwork).contains(&"0.0.0.0/0".to_owned()), "another subnet");

    let internet = tag_prefixes(&net, 1, ServiceTag::Internet);
    let has = |address: &str| internet.iter().any(|net: &IpNet| net.contains(&ip(address)));
    for public in ["1.1.1.1", "8.9.0.1", "7.7.7.7", "203.0.113.1", "2001:db8::1", "3fff::1"] {
        assert!(has(public), "{public}");
    }
    for other in [
        "10.0.0.1",
        "20.0.0.9",
        "192.168.1.1",
        "100.64.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "224.0.0.1",
        "fd00::1",
        "fe80::1",
        "2001:470::9",
    ] {
        assert!(!has(other), "{other}");
    }
    assert_eq!(text(&net, 0, ServiceTag::AzureLoadBalancer), ["168.63.129.16/32"]);
    assert_eq!(text(&net, 0, ServiceTag::AzurePlatformImds), ["169.254.169.254/32"]);
    assert_eq!(tag_prefixes(&net, 0, ServiceTag::AzurePlatformLkm), net.platform.kms_servers);
}

#[test]
fn platform_rules_decide_before_the_groups_unless_a_rule_names_their_tag() {
    let mut net = network(1);
    let mut deny = rule(Direction::Outbound, "DenyAll", 4096);
    deny.access = Access::Deny;
    net.groups = vec![group("closed", vec![deny])];
    net.subnets[0].group = Some(0);
    net.platform.services = vec![PlatformService {
        name: "dns".into(),
        address: Ipv4Addr::new(168, 63, 129, 16),
        protocol: TransportProtocol::Udp,
        port: 53,
    }];
    let said = |net: &Network, protocol: u8, to: &str, port: u16| {
        let packet = Packet { protocol, ..tcp("10.0.0.4", 40000, to, port) };
        let trace = judge(net, (0, 0), Direction::Outbound, &packet);
        (trace.platform, trace.access)
    };
    let dns = Some(PlatformRule::Service(0, Some(ServiceTag::AzurePlatformDns)));
    assert_eq!(said(&net, 17, "168.63.129.16", 53), (dns, Access::Allow));
    assert_eq!(said(&net, 6, "168.63.129.16", 53), (Some(PlatformRule::PlatformAddress), Access::Deny));
    assert_eq!(said(&net, 6, "169.254.169.254", 80), (Some(PlatformRule::PlatformAddress), Access::Deny));
    assert_eq!(said(&net, 6, "23.102.135.246", 1688), (None, Access::Deny), "KMS is off");
    net.platform.allow_kms = true;
    let kms = Some(PlatformRule::AllowKms);
    assert_eq!(said(&net, 6, "23.102.135.246", 1688), (kms, Access::Allow));
    assert_eq!(said(&net, 17, "23.102.135.246", 1688), (None, Access::Deny));

    let mut block = rule(Direction::Outbound, "NoDns", 200);
    (block.access, block.destination) = (Access::Deny, tag(ServiceTag::AzurePlatformDns));
    net.groups[0].rules.push(block);
    assert_eq!(said(&net, 17, "168.63.129.16", 53), (dns, Access::Deny), "a rule names the tag");
    assert_eq!(said(&net, 6, "23.102.135.246", 1688), (kms, Access::Allow), "but not this one's");

    net.route_tables.push(RouteTable {
        name: "rt".into(),
        routes: vec![route("all", "0.0.0.0/0", RouteHop::VirtualNetworkGateway)],
        widen_virtual_network: false,
    });
    net.subnets[0].route_table = Some(0);
    assert_eq!(said(&net, 6, "23.102.135.246", 1688), (None, Access::Deny), "a default route ends it");

    net.groups[0].rules.clear();
    assert_eq!(said(&net, 6, "1.1.1.1", 25), (None, Access::Allow));
    net.platform.block_smtp = true;
    assert_eq!(said(&net, 6, "1.1.1.1", 25), (Some(PlatformRule::BlockSmtp25), Access::Deny));
    assert_eq!(said(&net, 6, "1.1.1.1", 587), (None, Access::Allow));
    assert_eq!(said(&net, 17, "1.1.1.1", 25), (None, Access::Allow));
    assert_eq!(said(&net, 6, "10.0.0.9", 25), (None, Access::Allow), "mail inside the network");
}
