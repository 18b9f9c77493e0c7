//! IPv6 on its way to the world with real sockets, under XDP and under TC: by an address of the guest's own, by port, by default
//! outbound, and otherwise not at all: no private address is ever on the uplink.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use portcullis_tests::edge::{Edge, HookCheck, under_both};
use portcullis_tests::frontends::{FRONTEND6, Frontends, SERVER6};
use portcullis_tests::lab::{
    Frame, Namespace, TcpEcho, TcpHold, UdpEcho, ping, ping_sized, raw_socket, tcp_exchange, udp_exchange,
};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, private6};

const OWN: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x21);
const DEFAULT: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x30);

/// vm1 has an address of its own, vm2 a pool with ports of both families, vm3 one with ports of IPv4 alone.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip1, ipAddress: '2001:db8:ffff::21', announce: proxy }
  - { name: pip-default, ipAddress: '2001:db8:ffff::30', announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools:
      - { name: both, backendIPConfigurations: [vm2/v4, vm2/v6] }
      - { name: four, backendIPConfigurations: [vm3/v4] }
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: both, protocol: All, allocatedOutboundPorts: 64 }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: both, protocol: All, allocatedOutboundPorts: 64 }
      - { name: four, frontendIPConfigurations: [fe], backendAddressPool: four, protocol: All, allocatedOutboundPorts: 64 }
";

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

#[test]
fn ipv6_leaves_one_to_one_by_port_or_by_default_outbound_and_otherwise_not_at_all() {
    under_both(|hook| {
        let mut lab = Frontends::new(hook, &[1, 1, 2]).with_ipv6();
        lab.configuration6.insert(1, "publicIPAddress: pip1".into());
        let edge = lab.start(REST);
        let world = edge.topology.internet();
        let wire = edge.topology.sniff_internet().unwrap();
        let tcp = TcpEcho::start(world, at(SERVER6, 80)).unwrap();
        let tcp4 = TcpEcho::start(world, at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(world, at(SERVER6, 53)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let big = vec![7; 100_000];

        // All protocols of a guest that has ports.
        for (number, address) in [(1, OWN), (2, FRONTEND6)] {
            let what = format!("{hook:?}: vm{number}");
            tcp_exchange(vm(&edge, number), Some(45678), tcp.address(), &big, LIMIT).unwrap();
            udp_exchange(vm(&edge, number), Some(45679), udp.address(), b"query", LIMIT).unwrap();
            udp_exchange(vm(&edge, number), Some(45679), udp.address(), &big[..3000], LIMIT).unwrap();
            for size in [56, 3000] {
                let pinged = ping_sized(vm(&edge, number), SERVER6.into(), 3, size, LIMIT).unwrap();
                assert_eq!((pinged.received, pinged.duplicates, pinged.errors), (3, 0, 0), "{what}: {size}");
            }
            let last = |peers: Vec<SocketAddr>| *peers.last().unwrap();
            let (by_tcp, by_udp) = (last(tcp.peers()), last(udp.peers()));
            assert_eq!((by_tcp.ip(), by_udp.ip()), (address.into(), address.into()), "{what}");
            if number == 1 {
                assert_eq!((by_tcp.port(), by_udp.port()), (45678, 45679), "{what}: one to one");
            } else {
                assert_eq!((by_tcp.port() >> 10 != 0, by_tcp.port() != 45678), (true, true), "{what}");
            }
        }
        // Its own address carries what has no ports, and from outside too.
        let inside = raw_socket(vm(&edge, 1), private6(1, 1).into(), 50).unwrap();
        let outside = raw_socket(world, SERVER6.into(), 50).unwrap();
        for (from, to, destination, met) in
            [(&inside, &outside, SERVER6, OWN), (&outside, &inside, OWN, SERVER6)]
        {
            to.set_read_timeout(Some(LIMIT)).unwrap();
            from.send_to(b"payload!", at(destination, 0)).unwrap();
            let mut buffer = [0; 64];
            let (length, source) = to.recv_from(&mut buffer).unwrap();
            assert_eq!((length, source.ip()), (8, IpAddr::from(met)), "{hook:?}: ESP");
        }
        let server = TcpEcho::start(vm(&edge, 1), at(private6(1, 1), 8080)).unwrap();
        tcp_exchange(world, Some(45678), at(OWN, 8080), &big, LIMIT).unwrap();
        assert_eq!(server.peers(), [at(SERVER6, 45678)], "{hook:?}");
        for size in [56, 3000] {
            let pinged = ping_sized(world, OWN.into(), 3, size, LIMIT).unwrap();
            assert_eq!((pinged.received, pinged.duplicates, pinged.errors), (3, 0, 0), "{hook:?}: {size}");
        }

        // By port means so many and no more, and another destination has its own.
        let mut hold = TcpHold::open(vm(&edge, 2), at(SERVER6, 80), 63, LIMIT).unwrap();
        // The one that was closed above is held down.
        hold.open_more(vm(&edge, 2), at(SERVER6, 80), 2, SOON).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (63, 63), "{hook:?}: {:?}", hold.failures());

        // A pool with IPv4 alone gives IPv6 nothing.
        tcp_exchange(vm(&edge, 3), None, tcp4.address(), b"by IPv4", LIMIT).unwrap();
        let before = edge.reason("no_outbound_method").unwrap();
        let refused = tcp_exchange(vm(&edge, 3), None, tcp.address(), b"?", SOON).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut, "{hook:?}");
        udp_exchange(vm(&edge, 3), None, udp.address(), b"?", SOON).expect_err("no way out");
        assert_eq!(ping(vm(&edge, 3), SERVER6.into(), 1, SOON).unwrap().received, 0, "{hook:?}");
        assert_eq!(edge.reason("no_outbound_method").unwrap(), before + 3, "{hook:?}");

        // Unless its subnet may use a shared one, from the next packet on.
        lab.subnet.insert(2, "defaultOutboundAccess: true".into());
        let rest = format!("{REST}defaultOutbound: {{ publicIPAddressIPv6: pip-default }}\n");
        apply(&edge, &lab.yaml(&rest));
        tcp_exchange(vm(&edge, 3), None, tcp.address(), &big, LIMIT).unwrap();
        assert_eq!(tcp.peers().last().unwrap().ip(), IpAddr::from(DEFAULT), "{hook:?}");
        assert_eq!(hold.alive(LIMIT), 63, "{hook:?}");
        check.end(&edge).unwrap();

        let private: [IpNet; 3] =
            ["fd00::/8", "10.0.0.0/8", "fc00::/8"].map(|net| net.parse().expect("a literal"));
        let leaked: Vec<Frame> = wire.private_sources(&private);
        assert!(leaked.is_empty() && wire.lost() == 0, "{hook:?}: {leaked:?}");
        assert!(wire.bad_checksums().is_empty(), "{hook:?}: {:?}", wire.bad_checksums());
    });
}
