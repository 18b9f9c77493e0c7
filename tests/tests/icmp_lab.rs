//! What hosts do with ICMP errors, through the gateway, of both families, under XDP and under TC: path MTU discovery of a real
//! TCP behind a link of 1,400 bytes, `ping` that is told of it, and traceroute.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use portcullis_tests::edge::{Edge, HookCheck, under_both};
use portcullis_tests::frontends::Frontends;
use portcullis_tests::lab::{Frame, Namespace, TcpEcho, Transport, ping, tcp_exchange, udp_socket};
use portcullis_tests::site::{LIMIT, at, private, private6};

/// Behind the world's router and the narrow link.
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 0x77);

/// vm1 is in a pool, vm2 has addresses of its own, vm3 uses the shared ones.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip2, ipAddress: 203.0.113.22, announce: proxy }
  - { name: pip26, ipAddress: '2001:db8:ffff::22', announce: proxy }
  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }
  - { name: pip-default6, ipAddress: '2001:db8:ffff::30', announce: proxy }
defaultOutbound: { publicIPAddress: pip-default, publicIPAddressIPv6: pip-default6 }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm1/v6] }]
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: pool, protocol: All }
";

/// A network behind the world's own host, which becomes a router, over a link of 1,400 bytes.
fn far_network(edge: &Edge) -> Namespace {
    let (world, far) = (edge.topology.internet(), Namespace::create("far").unwrap());
    for namespace in [world, &far] {
        for (key, value) in [
            ("net.ipv6.conf.all.disable_ipv6", "0"),
            ("net.ipv6.conf.default.disable_ipv6", "0"),
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.icmp_ratelimit", "0"),
            ("net.ipv6.icmp.ratelimit", "0"),
        ] {
            namespace.set_sysctl(key, value).unwrap();
        }
    }
    world.ip(&format!("link add far0 mtu 1400 type veth peer name eth0 netns {}", far.name())).unwrap();
    for (namespace, lines) in [
        (
            world,
            [
                "address add 192.0.2.1/24 dev far0",
                "address add 2001:db8:99::1/64 dev far0 nodad",
                "link set far0 up",
            ],
        ),
        (
            &far,
            [
                "address add 192.0.2.77/24 dev eth0",
                "address add 2001:db8:99::77/64 dev eth0 nodad",
                "link set eth0 up",
            ],
        ),
    ] {
        for line in lines {
            namespace.ip(line).unwrap();
        }
    }
    far.ip("link set lo up").unwrap();
    // As a server that does not know of the narrow link: its own packets fit, the segments it offers to take do not.
    far.ip("route add default via 192.0.2.1 mtu 1400 advmss 1460").unwrap();
    far.ip("-6 route add default via 2001:db8:99::1 mtu 1400 advmss 1440").unwrap();
    far
}

/// The lab with the far network; the way to it is known.
fn lab(hook: portcullis_tests::edge::WithHook) -> (Edge, Namespace) {
    let mut lab = Frontends::new(hook, &[1, 1, 1]).with_ipv6();
    lab.configuration.insert(2, "publicIPAddress: pip2".into());
    lab.configuration6.insert(2, "publicIPAddress: pip26".into());
    lab.subnet.insert(1, "defaultOutboundAccess: true".into());
    let edge = lab.start(REST);
    let far = far_network(&edge);
    for number in 1..=3 {
        for to in [IpAddr::from(FAR), FAR6.into()] {
            let outcome = ping(vm(&edge, number), to, 3, LIMIT).unwrap();
            assert!(outcome.received > 0, "{hook:?}: vm{number} to {to}: {outcome:?}; {:?}", edge.reasons());
        }
    }
    (edge, far)
}

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

/// An ICMP error about a packet of `guest`'s, with its own address in the quote, and checksums that hold.
fn about(frame: &Frame, guest: IpAddr, kinds: [u8; 2]) -> bool {
    let Some(ip) = &frame.ip else { return false };
    let Transport::Icmp { kind, .. } = ip.transport else { return false };
    let quote = frame.payload();
    let source = match guest {
        IpAddr::V4(a) => quote.get(12..16) == Some(&a.octets()[..]),
        IpAddr::V6(a) => quote.get(8..24) == Some(&a.octets()[..]),
    };
    let wanted = if guest.is_ipv4() { kinds[0] } else { kinds[1] };
    !frame.outgoing && kind == wanted && ip.destination == guest && source && frame.checksums_ok()
}

/// The addresses of guest `number` and those of the far host.
fn families(number: u8) -> [(IpAddr, IpAddr); 2] {
    [(private(1, number).into(), FAR.into()), (private6(1, number).into(), FAR6.into())]
}

#[test]
fn tcp_finds_the_mtu_of_a_narrow_link_behind_every_translation() {
    under_both(|hook| {
        let (edge, far) = lab(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let echo = TcpEcho::start(&far, at(FAR, 7000)).unwrap();
        let echo6 = TcpEcho::start(&far, at(FAR6, 7000)).unwrap();
        let payload: Vec<u8> = (0..200_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        for number in 1..=3 {
            let eyes = edge.topology.sniff_guest(&format!("vm{number}")).unwrap();
            for ((guest, _), server) in families(number).into_iter().zip([echo.address(), echo6.address()]) {
                let what = format!("{hook:?}: vm{number} to {server}");
                let outcome = tcp_exchange(vm(&edge, number), None, server, &payload, 4 * LIMIT);
                outcome.unwrap_or_else(|e| panic!("{what}: {e}; {:?}", edge.reasons()));
                let told = eyes.frames().into_iter().filter(|frame| about(frame, guest, [3, 2])).count();
                assert!(told > 0, "{what}: nobody was told of the narrow link");
            }
            assert!(eyes.bad_checksums().is_empty(), "{hook:?}: {:?}", eyes.bad_checksums());
        }
        assert_eq!(edge.reason("icmp_error").unwrap(), 0, "{hook:?}: {:?}", edge.reasons());
        check.end(&edge).unwrap();
    });
}

#[test]
fn ping_and_traceroute_hear_of_routers_on_the_way() {
    under_both(|hook| {
        let (edge, _far) = lab(hook);
        for number in 1..=3 {
            for (guest, to) in families(number) {
                let what = format!("{hook:?}: vm{number} to {to}");
                let from = vm(&edge, number);
                // ping counts an error as its own only if the quote has its identifier.
                let target = to.to_string();
                for (case, arguments) in [
                    ("a router on the way", ["-t", "2", "-s", "56"]),
                    ("too big", ["-M", "do", "-s", "1440"]),
                ] {
                    let command = ["ping", "-n", "-c", "1", "-W", "5"];
                    let line = [&command[..], &arguments, &[&target]].concat();
                    let finished = String::from_utf8(from.command(&line).output().unwrap().stdout).unwrap();
                    assert!(finished.contains("+1 errors"), "{what}, {case}: {finished}");
                }
                // As traceroute does: a closed port, one hop more each time.
                let eyes = edge.topology.sniff_guest(&format!("vm{number}")).unwrap();
                let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
                for (ttl, kinds) in [(1, [11, 3]), (2, [11, 3]), (3, [3, 1])] {
                    let socket = udp_socket(from, any).unwrap();
                    if to.is_ipv4() {
                        socket.set_ttl(ttl).unwrap();
                    } else {
                        hop_limit(&socket, ttl);
                    }
                    eyes.clear();
                    socket.send_to(b"probe", at(to, 33434 + ttl as u16)).unwrap();
                    let heard = eyes.wait_for(LIMIT, |frame| about(frame, guest, kinds));
                    let heard = heard.unwrap_or_else(|| panic!("{what}, hop {ttl}: {:?}", edge.reasons()));
                    let hop = heard.ip.as_ref().map(|ip| ip.source);
                    assert_eq!(hop == Some(to), ttl == 3, "{what}, hop {ttl}: {heard:?}");
                    let gateway: IpAddr =
                        if to.is_ipv4() { "10.0.1.1" } else { "fd00:1:0:1::1" }.parse().unwrap();
                    assert_eq!(hop == Some(gateway), ttl == 1, "{what}, hop {ttl}: {heard:?}");
                }
            }
        }
        assert_eq!(edge.reason("icmp_error").unwrap(), 0, "{hook:?}: {:?}", edge.reasons());
    });
}

fn hop_limit(socket: &std::net::UdpSocket, limit: u32) {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Ipv6Ttl, &(limit as i32)).unwrap();
}
