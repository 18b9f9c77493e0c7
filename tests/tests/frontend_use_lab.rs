//! Several public addresses behind one outbound rule with real connections, under XDP and under TC: used up one after the other,
//! spread, a prefix as frontend, and one of them chosen for good.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use portcullis_tests::edge::{Edge, HookCheck, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{Namespace, TcpEcho, TcpHold, UdpEcho, eventually};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at};

const SECOND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);

/// vm1 has 16 ports of two frontends: vm2 has all of the first but eight.
const TWO: &str = "
publicIPAddresses:
  - { name: pip1, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip2, ipAddress: 203.0.113.11, announce: proxy }
loadBalancers:
  - name: lb
    frontendUse: sequential
    frontendIPConfigurations: [{ name: fe1, publicIPAddress: pip1 }, { name: fe2, publicIPAddress: pip2 }]
    backendAddressPools: [{ name: small, backendIPConfigurations: [vm1] }, { name: large, backendIPConfigurations: [vm2] }]
    outboundRules:
      - { name: small, frontendIPConfigurations: [fe1, fe2], backendAddressPool: small, protocol: All, allocatedOutboundPorts: 16 }
      - { name: large, frontendIPConfigurations: [fe1], backendAddressPool: large, protocol: All, allocatedOutboundPorts: 63992 }
";

/// The addresses of a prefix, 1,024 ports on each.
const PREFIX: &str = "
publicIPPrefixes: [{ name: pp1, ipPrefix: 203.0.113.32/30, announce: proxy }]
loadBalancers:
  - name: lb
    frontendUse: spread
    snatAllocation: multiply
    frontendIPConfigurations: [{ name: fe, publicIPPrefix: pp1 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]
";

fn vm1(edge: &Edge) -> &Namespace {
    edge.topology.guest("vm1")
}

/// The peers of a server that has taken so many connections.
fn peers(server: &TcpEcho, count: usize) -> Vec<SocketAddr> {
    assert!(eventually(LIMIT, || server.peers().len() >= count), "{:?}", server.peers());
    server.peers()
}

fn addresses<'a>(peers: impl IntoIterator<Item = &'a SocketAddr>) -> BTreeSet<IpAddr> {
    peers.into_iter().map(SocketAddr::ip).collect()
}

/// So many UDP sockets of vm1's, each of which was answered.
fn sockets(edge: &Edge, server: SocketAddr, count: usize) -> Vec<UdpSocket> {
    let sockets: Vec<UdpSocket> = vm1(edge)
        .enter(|| (0..count).map(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).collect());
    for socket in &sockets {
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut [0; 8]).unwrap();
    }
    sockets
}

#[test]
fn the_first_frontends_ports_are_used_up_before_the_seconds_or_both_at_once_if_spread_and_all_serve_one_destination()
 {
    under_both(|hook| {
        let lab = Frontends::new(hook, &[1, 1]);
        let edge = lab.start(TWO);
        let world = edge.topology.internet();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let both = BTreeSet::from([IpAddr::from(FRONTEND), IpAddr::from(SECOND)]);
        let mut live = Vec::new();
        for port in [80, 81, 82] {
            let server = TcpEcho::start(world, at(SERVER, port)).unwrap();
            let mut hold = TcpHold::open(vm1(&edge), server.address(), 8, LIMIT).unwrap();
            assert_eq!(hold.established(), 8, "{hook:?}");
            assert_eq!(addresses(&peers(&server, 8)), BTreeSet::from([FRONTEND.into()]), "{hook:?}");
            hold.open_more(vm1(&edge), server.address(), 8, LIMIT).unwrap();
            assert_eq!(hold.established(), 16, "{hook:?}: {:?}", hold.failures());
            assert_eq!(addresses(&peers(&server, 16)[8..]), BTreeSet::from([SECOND.into()]), "{hook:?}");
            hold.open_more(vm1(&edge), server.address(), 1, SOON).unwrap();
            assert_eq!((hold.established(), hold.alive(LIMIT)), (16, 16), "{hook:?}: 16 and no more");
            live.push((server, hold));
        }
        let udp = UdpEcho::start(world, at(SERVER, 53)).unwrap();
        let mut live_udp = sockets(&edge, udp.address(), 8);
        assert_eq!(addresses(&udp.peers()), BTreeSet::from([FRONTEND.into()]), "{hook:?}: UDP");
        live_udp.extend(sockets(&edge, udp.address(), 8));
        assert_eq!(addresses(&udp.peers()[8..]), BTreeSet::from([SECOND.into()]), "{hook:?}");

        apply(&edge, &lab.yaml(&TWO.replace("sequential", "spread")));
        for port in [83, 84, 85] {
            let server = TcpEcho::start(world, at(SERVER, port)).unwrap();
            let mut hold = TcpHold::open(vm1(&edge), server.address(), 8, LIMIT).unwrap();
            let first = peers(&server, 8);
            // Eight of sixteen at random are of one frontend once in 6,435.
            assert_eq!(addresses(&first), both, "{hook:?}: {first:?}");
            hold.open_more(vm1(&edge), server.address(), 8, LIMIT).unwrap();
            hold.open_more(vm1(&edge), server.address(), 1, SOON).unwrap();
            assert_eq!((hold.established(), hold.alive(LIMIT)), (16, 16), "{hook:?}: all sixteen");
            assert_eq!(BTreeSet::from_iter(peers(&server, 16)).len(), 16, "{hook:?}");
            live.push((server, hold));
        }
        for (server, hold) in &mut live {
            assert_eq!(hold.alive(LIMIT), 16, "{hook:?}: to {}", server.address());
        }
        check.end(&edge).unwrap();
    });
}

#[test]
fn flows_leave_under_every_address_of_a_prefix_or_under_one_that_is_kept_for_good() {
    under_both(|hook| {
        let lab = Frontends::new(hook, &[1]);
        let mut edge = lab.start(PREFIX);
        let world = edge.topology.internet().clone();
        let all: BTreeSet<IpAddr> = (32..36).map(|last| IpAddr::from([203, 0, 113, last])).collect();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let server = TcpEcho::start(&world, at(SERVER, 80)).unwrap();
        let mut hold = TcpHold::open(vm1(&edge), server.address(), 64, LIMIT).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (64, 64), "{hook:?}: {:?}", hold.failures());
        // One of the four gets none of 64 once in 25 million.
        assert_eq!(addresses(&peers(&server, 64)), all, "{hook:?}");
        let udp = UdpEcho::start(&world, at(SERVER, 53)).unwrap();
        let _sockets = sockets(&edge, udp.address(), 64);
        assert_eq!(addresses(&udp.peers()), all, "{hook:?}: UDP");

        let basic = PREFIX.replace("multiply", "basic");
        apply(&edge, &lab.yaml(&basic));
        let chosen = |edge: &Edge, port| {
            let server = TcpEcho::start(&world, at(SERVER, port)).unwrap();
            let hold = TcpHold::open(vm1(edge), server.address(), 64, LIMIT).unwrap();
            assert_eq!(hold.established(), 64, "{hook:?}: {:?}", hold.failures());
            addresses(&peers(&server, 64))
        };
        let one = chosen(&edge, 81);
        println!("{hook:?}: {one:?} was chosen");
        assert!(one.len() == 1 && one.is_subset(&all), "{hook:?}: {one:?}");
        assert_eq!(hold.alive(LIMIT), 64, "{hook:?}: live flows under the others go on");
        check.end(&edge).unwrap();
        edge.daemon.terminate().unwrap();
        edge.restart().unwrap();
        assert_eq!(chosen(&edge, 82), one, "{hook:?}: and after a restart");
        assert_eq!(hold.alive(LIMIT), 64, "{hook:?}");
    });
}
