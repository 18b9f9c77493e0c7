//! Peerings, route tables and IPv6 in virtual networks.

mod policy_support;

use std::net::IpAddr;

use policy_support::{accepted, changed, refused, refused_text, second_places, warned};
use portcullis::policy::network::RouteHop;

const WORLD: &str =
    "{ name: world, addressPrefix: 0.0.0.0/0, nextHopType: VirtualAppliance, nextHopIpAddress: 10.0.9.4 }";
const WEB: &str = "addressPrefixes: [10.0.1.0/24, 'fd00:1:0:1::/64']";
const SPACE: &str = "addressPrefixes: [10.0.0.0/16, 'fd00:1::/48']";
const WEB6: &str = "privateIPAddress: 'fd00:1:0:1::4'";
const TO_HUB: &str = "    virtualNetworkPeerings:\n      - { name: to-hub, remoteVirtualNetwork: hub }\n";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn peers_know_each_other() {
    let loaded = accepted(&[("remoteVirtualNetwork: spoke", "remoteVirtualNetwork: SPOKE")]);
    let peers: Vec<_> = loaded.network.virtual_networks.iter().map(|network| network.peers.clone()).collect();
    assert_eq!(peers, [vec![1], vec![0]]);
    assert!(loaded.places.contains_key("virtualNetworks/spoke/virtualNetworkPeerings/to-hub"));
    let third = "  - name: third\n    addressSpace: { addressPrefixes: [10.2.0.0/16] }\n    virtualNetworkPeerings: [{ name: h, remoteVirtualNetwork: hub }]\n\n# What leaves";
    let both =
        "- { name: z, remoteVirtualNetwork: third }\n      - { name: to-spoke, remoteVirtualNetwork: spoke }";
    let loaded =
        accepted(&[("# What leaves", third), ("- { name: to-spoke, remoteVirtualNetwork: spoke }", both)]);
    assert_eq!(loaded.network.virtual_networks[0].peers, [1, 2], "sorted, whatever the order in the file");
}

#[test]
fn a_peering_that_one_side_lacks_is_refused_with_what_to_add_there() {
    let without = [(TO_HUB, ""), (WORLD, "{ name: world, addressPrefix: 0.0.0.0/0, nextHopType: None }")];
    let findings = refused(
        &without,
        "spoke",
        "`hub` is peered with `spoke`, but `spoke` is not peered with `hub`",
        "add `virtualNetworkPeerings: [{ name: to-hub, remoteVirtualNetwork: hub }]` to `spoke`",
    );
    assert_eq!(second_places(&findings, &changed(&without)), ["spoke"], "the network that lacks it");
}

#[test]
fn peerings_name_other_networks_once() {
    let peering = "- { name: to-spoke, remoteVirtualNetwork: spoke }";
    refused(
        &[(
            peering,
            "- { name: to-spoke, remoteVirtualNetwork: spoke }\n      - { name: self, remoteVirtualNetwork: hub }",
        )],
        "hub",
        "`hub` is peered with itself",
        "name the other virtual network",
    );
    refused(
        &[(
            peering,
            "- { name: to-spoke, remoteVirtualNetwork: spoke }\n      - { name: b, remoteVirtualNetwork: Spoke }",
        )],
        "Spoke",
        "`hub` is peered with `spoke` twice",
        "remove one of them",
    );
    refused(
        &[(
            peering,
            "- { name: to-spoke, remoteVirtualNetwork: spoke }\n      - { name: b, remoteVirtualNetwork: spokes }",
        )],
        "spokes",
        "no virtual network is named `spokes`",
        "did you mean `spoke`?",
    );
    let twice =
        "- { name: P, remoteVirtualNetwork: spoke }\n      - { name: p, remoteVirtualNetwork: third }";
    let third = "  - name: third\n    addressSpace: { addressPrefixes: [10.2.0.0/16] }\n    virtualNetworkPeerings: [{ name: h, remoteVirtualNetwork: hub }]\n\n# What leaves";
    refused(
        &[(peering, twice), ("# What leaves", third)],
        "p, remote",
        "a second peering of this virtual network is named `p`",
        "rename one of them",
    );
}

#[test]
fn what_a_network_reaches_by_peerings_does_not_overlap() {
    let space = "addressPrefixes: [10.1.0.0/16]";
    let changes = [(space, "addressPrefixes: [10.1.0.0/16, 10.0.128.0/17]")];
    let findings = refused(
        &changes,
        "spoke",
        "`hub` and `spoke` are peered, but share addresses",
        "give one of them another address space",
    );
    assert_eq!(second_places(&findings, &changed(&changes)), ["10.0.0.0/16", "10.0.128.0/17"]);
    let v6 = [(space, "addressPrefixes: [10.1.0.0/16, 'fd00:1:0:8::/64']")];
    refused(&v6, "spoke", "share addresses", "another address space");
    let third = "  - name: third\n    addressSpace: { addressPrefixes: [10.1.7.0/24] }\n    virtualNetworkPeerings: [{ name: h, remoteVirtualNetwork: hub }]\n\n# What leaves";
    let hub = "- { name: to-spoke, remoteVirtualNetwork: spoke }\n      - { name: to-third, remoteVirtualNetwork: third }";
    refused(
        &[("# What leaves", third), ("- { name: to-spoke, remoteVirtualNetwork: spoke }", hub)],
        "third",
        "`hub` is peered with both `spoke` and `third`, which share addresses",
        "or remove the peering",
    );
    // Networks that are not peered may have the same prefixes.
    let alone = third.replace("    virtualNetworkPeerings: [{ name: h, remoteVirtualNetwork: hub }]\n", "");
    accepted(&[("# What leaves", &alone)]);
}

#[test]
fn a_route_table_is_read_with_every_kind_of_next_hop() {
    let network = accepted(&[]).network;
    let table = &network.route_tables[0];
    assert_eq!((table.name.as_str(), table.widen_virtual_network), ("through-firewall", false));
    assert_eq!(table.routes[0].next_hop, RouteHop::VirtualAppliance(ip("10.0.9.4")));
    assert_eq!(table.routes[0].prefix.to_string(), "0.0.0.0/0");
    assert_eq!((table.routes[1].name.as_str(), table.routes[1].next_hop), ("nowhere", RouteHop::None));
    let used: Vec<_> = network.subnets.iter().map(|subnet| subnet.route_table).collect();
    assert_eq!(used, [None, None, None, None, Some(0)]);
    for (word, hop) in [
        ("vnetlocal", RouteHop::VnetLocal),
        ("INTERNET", RouteHop::Internet),
        ("VirtualNetworkGateway", RouteHop::VirtualNetworkGateway),
    ] {
        let loaded = accepted(&[("nextHopType: None", &format!("nextHopType: {word}"))]);
        assert_eq!(loaded.network.route_tables[0].routes[1].next_hop, hop);
    }
    let loaded = accepted(&[("widenVirtualNetwork: false", "widenVirtualNetwork: true")]);
    assert!(loaded.network.route_tables[0].widen_virtual_network);
    assert!(loaded.places.contains_key("routeTables/through-firewall/routes/world"));
}

#[test]
fn an_appliance_has_an_address_that_its_users_reach_and_other_hops_have_none() {
    let hop = |text: &str| WORLD.replace("nextHopIpAddress: 10.0.9.4", text);
    refused(
        &[(WORLD, &hop("nextHopIpAddress: 10.7.0.4"))],
        "10.7.0.4",
        "10.7.0.4 is not in the address space of `spoke`, which uses `through-firewall`, nor of a peer",
        "an appliance is a guest of the same or of a peered virtual network",
    );
    warned(
        &[(WORLD, &hop("nextHopIpAddress: 10.0.9.9"))],
        "10.0.9.9",
        "no guest has the address 10.0.9.9 of this next hop",
        "packets of this route are dropped",
    );
    refused(
        &[(WORLD, "{ name: world, addressPrefix: 0.0.0.0/0, nextHopType: VirtualAppliance }")],
        "world",
        "route `world` lacks `nextHopIpAddress`",
        "add the address of the guest that is the appliance",
    );
    refused(
        &[("nextHopType: None }", "nextHopType: None, nextHopIpAddress: 10.0.9.4 }")],
        "nextHopIpAddress",
        "only a VirtualAppliance has a `nextHopIpAddress`",
        "or write `nextHopType: VirtualAppliance`",
    );
    refused(
        &[(WORLD, &hop("nextHopIpAddress: 10.0.9.0/24"))],
        "10.0.9.0/24",
        "`10.0.9.0/24` is not an IP address",
        "write the address alone",
    );
    refused(
        &[(WORLD, &WORLD.replace("0.0.0.0/0", "'::/0'"))],
        "10.0.9.4",
        "10.0.9.4 is not of the family of ::/0",
        "IPv6 to an IPv6 address",
    );
    refused(
        &[("nextHopType: None", "nextHopType: Nowhere")],
        "Nowhere",
        "`nextHopType` cannot be `Nowhere`",
        "use one of: `VnetLocal`",
    );
}

#[test]
fn route_tables_exist_and_their_routes_are_apart() {
    refused(
        &[("routeTable: through-firewall", "routeTable: trough-firewall")],
        "trough-firewall",
        "no route table is named `trough-firewall`",
        "did you mean `through-firewall`?",
    );
    let twice = [("addressPrefix: 192.0.2.0/24", "addressPrefix: 0.0.0.0/0")];
    let findings = refused(
        &twice,
        "0.0.0.0/0",
        "a second route of this table leads to 0.0.0.0/0",
        "a packet goes one way",
    );
    assert_eq!(second_places(&findings, &changed(&twice)), ["0.0.0.0/0"]);
    refused(
        &[("name: nowhere", "name: World")],
        "World",
        "a second route of this table is named `World`",
        "rename one of them",
    );
    refused(
        &[("routeTables:\n", "routeTables:\n  - { name: Through-Firewall }\n")],
        "through-firewall",
        "a second route table is named `through-firewall`",
        "rename one of them",
    );
    refused(
        &[("addressPrefix: 192.0.2.0/24", "addressPrefix: 192.0.2.1/24")],
        "192.0.2.1/24",
        "has bits set behind the /24",
        "the network is 192.0.2.0/24",
    );
    refused(
        &[("addressPrefix: 192.0.2.0/24", "addressPrefix: offices")],
        "offices",
        "routes to a service tag such as `offices` are not available",
        "write a route for each of its prefixes",
    );
    warned(
        &[("routeTables:\n", "routeTables:\n  - { name: spare }\n")],
        "spare",
        "nothing uses route table `spare`",
        "name it as `routeTable` of a subnet",
    );
}

#[test]
fn guests_have_addresses_of_both_families() {
    let network = accepted(&[]).network;
    let space: Vec<_> = network.virtual_networks[0].address_space.iter().map(ToString::to_string).collect();
    assert_eq!(space, ["10.0.0.0/16", "fd00:1::/48"]);
    assert_eq!(network.subnets[0].gateways, [ip("10.0.1.1"), ip("fd00:1:0:1::1")]);
    let addresses: Vec<_> = network.interfaces[0].addresses.iter().map(|c| c.address).collect();
    assert_eq!(addresses, [ip("10.0.1.4"), ip("fd00:1:0:1::4")]);
    // IPv4 gateways come first, also where IPv6 is written first, and the given one stands for its own prefix.
    let web = "addressPrefixes: ['fd00:1:0:1::/64', 10.0.1.0/24]\n        gateway: 'fd00:1:0:1::ff'";
    let network = accepted(&[(WEB, web)]).network;
    assert_eq!(network.subnets[0].gateways, [ip("10.0.1.1"), ip("fd00:1:0:1::ff")]);
}

#[test]
fn ipv6_ranges_that_are_no_ones_are_refused_in_address_spaces() {
    for (prefix, range, why) in [
        ("::/48", "::/8", "unspecified, loopback and reserved"),
        ("64:ff9b::/96", "::/8", "unspecified, loopback and reserved"),
        ("::ffff:10.0.0.0/112", "::ffff:0.0.0.0/96", "IPv4 addresses written as IPv6"),
        ("fe80::/64", "fe80::/10", "link-local"),
        ("ff02::/16", "ff00::/8", "multicast"),
    ] {
        let space = format!("addressPrefixes: [10.0.0.0/16, 'fd00:1::/48', '{prefix}']");
        let written = prefix.parse::<ipnet::IpNet>().unwrap();
        let range = range.parse::<ipnet::IpNet>().unwrap();
        refused(
            &[(SPACE, &space)],
            &format!("'{prefix}'"),
            &format!("{written} covers {range} ({why})"),
            "use a unique local prefix such as fd00:1::/48",
        );
    }
    let twice = "addressPrefixes: [10.0.0.0/16, 'fd00:1::/48', 'fd00:1:0:8000::/49']";
    refused(&[(SPACE, twice)], "'fd00:1:0:8000::/49'", "overlap in one address space", "make them apart");
}

#[test]
fn ipv6_subnets_have_a_sensible_size_and_usable_gateways() {
    let web = |prefix: &str| format!("addressPrefixes: [10.0.1.0/24, '{prefix}']");
    let third = "addressPrefixes: [10.0.1.0/24, 'fd00:1:0:1::/64', 'fd00:1:0:2::4/127']";
    refused(&[(WEB, third)], "'fd00:1:0:2::4/127'", "no room for a gateway and a guest", "is a /126");
    refused(
        &[(WEB, &web("fd00:1:0:1::/63"))],
        "'fd00:1:0:1::/63'",
        "fd00:1:0:1::/63 has bits set behind the /63",
        "the network is fd00:1::/63",
    );
    refused(
        &[
            (SPACE, "addressPrefixes: [10.0.0.0/16, 'fd00::/24']"),
            (WEB, &web("fd00::/32")),
            (WEB6, "privateIPAddress: 'fd00::4'"),
        ],
        "'fd00::/32'",
        "fd00::/32 is too large for a subnet",
        "the largest IPv6 subnet is a /48",
    );
    warned(
        &[(WEB, &web("fd00:1:0:1::/80"))],
        "'fd00:1:0:1::/80'",
        "the IPv6 subnet fd00:1:0:1::/80 is not a /64",
        "Azure allows only /64",
    );
    refused(
        &[(WEB, &web("fd00:2::/64")), (WEB6, "privateIPAddress: 'fd00:2::4'")],
        "'fd00:2::/64'",
        "subnet `web` (fd00:2::/64) is outside the address space of `hub`",
        "add one to `addressPrefixes` there",
    );
    refused(
        &[(WEB, &format!("{WEB}\n        gateway: 'fd00:1:0:1::'"))],
        "'fd00:1:0:1::'",
        "gateway fd00:1:0:1:: is the subnet-router anycast address of fd00:1:0:1::/64",
        "choose another address",
    );
    refused(
        &[(WEB, &format!("{WEB}\n        gateway: 'fd00:9::1'"))],
        "'fd00:9::1'",
        "gateway fd00:9::1 is not in subnet `web`",
        "leave `gateway` out",
    );
}

#[test]
fn ipv6_addresses_of_guests_are_usable_and_their_own() {
    let address = |text: &str| format!("privateIPAddress: '{text}'");
    for (wrong, message) in [
        ("fd00:1:0:1::", "is the subnet-router anycast address of subnet `web`"),
        ("fd00:1:0:1::1", "is the gateway of subnet `web`"),
        ("fd00:1:0:2::4", "is not in subnet `web`"),
    ] {
        refused(&[(WEB6, &address(wrong))], &format!("'{wrong}'"), message, "choose a");
    }
    // The last address is an address like others: IPv6 has no broadcast.
    accepted(&[(WEB6, &address("fd00:1:0:1:ffff:ffff:ffff:ffff"))]);
    let logic =
        "{ name: v4, subnet: logic, privateIPAddress: 10.0.2.4, applicationSecurityGroups: [AsgLogic] }";
    let second = format!("{logic}\n      - {{ name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1:0::4' }}");
    refused(
        &[(logic, &second)],
        "'fd00:1:0:1:0::4'",
        "`vm-web` and `vm-logic` have the same address fd00:1:0:1::4",
        "give one of them another address",
    );
    let other = format!("{logic}\n      - {{ name: v6, subnet: logic, privateIPAddress: 'fd00:1:0:1::5' }}");
    refused(&[(logic, &other)], "'fd00:1:0:1::5'", "is not in subnet `logic`", "it is in subnet `web`");
    let elsewhere =
        format!("{logic}\n      - {{ name: v6, subnet: logic, privateIPAddress: 'fd00:1:0:9::5' }}");
    refused(&[(logic, &elsewhere)], "'fd00:1:0:9::5'", "is not in subnet `logic`", "a prefix of this family");
}

#[test]
fn a_guest_of_both_families_is_one_member_by_its_bare_name_and_the_other_in_full() {
    let world = "\nuplinks: [{ device: pc-up }]\npublicIPAddresses:\n  - { name: pip, ipAddress: 203.0.113.5, announce: proxy }\n";
    let public =
        ("privateIPAddress: 'fd00:1:0:1::4',", "privateIPAddress: 'fd00:1:0:1::4', publicIPAddress: pip,");
    refused_text(
        &(changed(&[public]) + world),
        "pip",
        "`vm-web/v6` is IPv6 (fd00:1:0:1::4), public IP address `pip` is IPv4",
        "give it to an IPv4 ip configuration",
    );
    let text = |members: &str| {
        changed(&[])
            + world
            + &format!(
                "loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: f, publicIPAddress: pip }}]\n    \
                 backendAddressPools: [{{ name: p, backendIPConfigurations: [{members}] }}]\n    \
                 outboundRules: [{{ name: o, frontendIPConfigurations: [f], backendAddressPool: p, protocol: All }}]\n"
            )
    };
    let loaded = portcullis::policy::parse("policy.yaml", &text("vm-web, vm-web/v6"))
        .unwrap_or_else(|findings| panic!("{findings}"));
    assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
    assert_eq!(loaded.network.load_balancers[0].pools[0].members, [(0, 0), (0, 1)]);
}
