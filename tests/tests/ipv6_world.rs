//! IPv6 to and from the world with the daemon: the kernel's route by a link-local router is mirrored, and proxied public
//! addresses are found by neighbour discovery, under XDP and under TC.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::Ipv6Net;
use portcullis_tests::edge::{Edge, HookCheck, WithHook};
use portcullis_tests::lab::{
    GuestSpec, Namespace, TcpEcho, Topology, TopologySpec, eventually, ping, tcp_exchange,
};
use portcullis_tests::site::{LIMIT, SOON, at};

const SERVER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x53, 0, 0, 0, 0, 1);
const INSTANCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x21);
const FRONTEND: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x10);

fn private(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 1, 0, 0, 0, 3 + number)
}

/// vm1 has an address of its own, vm2 leaves by a frontend's ports.
fn policy(hook: WithHook) -> String {
    let hook = hook.word();
    format!(
        "virtualNetworks:\n  - name: v\n    addressSpace: {{ addressPrefixes: [10.0.0.0/16, 'fd00:1::/48'] }}\n    \
         subnets: [{{ name: s, addressPrefixes: [10.0.0.0/24, 'fd00:1:0:1::/64'] }}]\n\
         networkInterfaces:\n  - name: vm1\n    device: pc-vm1\n    hook: {hook}\n    ipConfigurations:\n      - {{ name: v4, subnet: s, privateIPAddress: 10.0.0.4 }}\n      - {{ name: v6, subnet: s, privateIPAddress: 'fd00:1:0:1::4', publicIPAddress: pip-vm1 }}\n  \
         - name: vm2\n    device: pc-vm2\n    hook: {hook}\n    ipConfigurations:\n      - {{ name: v4, subnet: s, privateIPAddress: 10.0.0.5 }}\n      - {{ name: v6, subnet: s, privateIPAddress: 'fd00:1:0:1::5' }}\n\
         publicIPAddresses:\n  - {{ name: pip-vm1, ipAddress: '{INSTANCE}', announce: proxy }}\n  - {{ name: pip-lb, ipAddress: '{FRONTEND}', announce: proxy }}\n\
         loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip-lb }}]\n    backendAddressPools: [{{ name: pool, backendIPConfigurations: [vm2/v6] }}]\n    outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }}]\n\
         uplinks: [{{ device: pc-up, hook: {hook} }}]\n"
    )
}

/// The lab with both families; the router is known by its link-local address only.
fn topology() -> Topology {
    let mut spec = TopologySpec::clean_veth(0);
    let gateway = Ipv6Addr::new(0xfd00, 1, 0, 1, 0, 0, 0, 1);
    spec.guests = [1u8, 2]
        .map(|number| GuestSpec {
            ipv6: Some((Ipv6Net::new_assert(private(number.into()), 64), gateway)),
            ..GuestSpec::numbered(number, "pc-vm")
        })
        .to_vec();
    let topology = Topology::build(&spec).unwrap();
    let internet = topology.internet();
    for scope in ["all", "default"] {
        internet.set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0").unwrap();
    }
    for line in [
        "address add fe80::1/64 dev eth0 nodad",
        &format!("address add {SERVER}/128 dev lo nodad"),
        &format!("-6 route add 2001:db8:ffff::/64 dev eth0 src {SERVER}"),
    ] {
        internet.ip(line).unwrap();
    }
    topology.gateway().ip("-6 route add default via fe80::1 dev pc-up").unwrap();
    topology
}

fn exchange(from: &Namespace, to: &TcpEcho, seen_at: Ipv6Addr) -> IpAddr {
    let big = vec![7; 50_000];
    let outcome = tcp_exchange(from, None, at(seen_at, to.address().port()), &big, LIMIT).unwrap();
    assert_eq!(outcome.echoed, big);
    to.peers().last().unwrap().ip()
}

#[test]
fn guests_reach_the_world_by_a_link_local_router_and_the_world_finds_their_proxied_addresses() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let mut edge = Edge::start_in(topology(), &policy(hook)).unwrap();
        let (vm1, vm2) = (edge.topology.guest("vm1").clone(), edge.topology.guest("vm2").clone());
        let internet = edge.topology.internet().clone();
        let router = |edge: &Edge| {
            let status = edge.ask(&["status"]).unwrap();
            let hops = status["nextHops"].as_array().unwrap().clone();
            let hop = hops.into_iter().find(|hop| hop["name"] == "world:pc-up/fe80::1");
            hop.is_some_and(|hop| hop["resolved"] == true && hop["address"] == "fe80::1")
        };
        assert!(eventually(LIMIT, || router(&edge)), "{hook:?}: the router is known");
        // The daemon joins the groups of what it proxies.
        let groups = edge.topology.gateway().ip("-6 maddr show dev pc-up").unwrap();
        assert!(
            groups.contains("ff02::1:ff00:21") && groups.contains("ff02::1:ff00:10"),
            "{hook:?}: {groups}"
        );
        for guest in [&vm1, &vm2] {
            assert!(
                eventually(LIMIT, || ping(guest, SERVER.into(), 1, SOON).unwrap().received == 1),
                "{hook:?}"
            );
        }
        ping(&internet, INSTANCE.into(), 1, SOON).unwrap();

        let server = TcpEcho::start(&internet, at(SERVER, 443)).unwrap();
        let guest = TcpEcho::start(&vm1, at(private(1), 8080)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        assert_eq!(exchange(&vm1, &server, SERVER), IpAddr::V6(INSTANCE), "{hook:?}: under its own address");
        assert_eq!(exchange(&vm2, &server, SERVER), IpAddr::V6(FRONTEND), "{hook:?}: under the frontend's");
        assert_eq!(exchange(&internet, &guest, INSTANCE), IpAddr::V6(SERVER), "{hook:?}: from the world");
        check.end(&edge).unwrap();

        // With a dead daemon a veth, which filters nothing, still hands up who asks for a proxied address.
        edge.daemon.terminate().unwrap();
        let groups = edge.topology.gateway().ip("-6 maddr show dev pc-up").unwrap();
        assert!(!groups.contains("ff02::1:ff00:21"), "{hook:?}: left with the daemon");
        internet.ip("-6 neigh flush dev eth0").unwrap();
        assert_eq!(exchange(&internet, &guest, INSTANCE), IpAddr::V6(SERVER), "{hook:?}");
        assert_eq!(exchange(&vm2, &server, SERVER), IpAddr::V6(FRONTEND), "{hook:?}");
    }
}
