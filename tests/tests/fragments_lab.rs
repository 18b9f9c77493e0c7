//! Datagrams that are longer than the next link takes, with real sockets, under XDP and under TC: a guest's link is wider than the
//! uplink, and nobody forbids that they are fragmented (RFC 4787 REQ-13a).

use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

use portcullis_tests::edge::{Edge, WithHook, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{Links, UdpEcho, udp_socket};
use portcullis_tests::site::{LIMIT, SERVER, at, private};

const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]
";

/// The lab with a guest whose link takes 3,400 bytes.
fn wide(hook: WithHook, links: Links) -> Edge {
    let mut lab = Frontends::new(hook, &[1]);
    lab.links = links;
    let edge = lab.start(REST);
    edge.topology.gateway().ip("link set pc-vm1 mtu 3400").unwrap();
    edge.topology.guest("vm1").ip("link set eth0 mtu 3400").unwrap();
    edge
}

/// A socket of the guest's that lets its datagrams be fragmented.
fn socket(edge: &Edge, port: u16) -> UdpSocket {
    let socket = udp_socket(edge.topology.guest("vm1"), at(private(1, 1), port)).unwrap();
    let dont: libc::c_int = libc::IP_PMTUDISC_DONT;
    // SAFETY: a socket that lives, and an integer of the size that is said.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const dont).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

#[test]
fn a_datagram_of_3_000_bytes_arrives_whole_over_a_link_of_1_500() {
    under_both(|hook| {
        let edge = wide(hook, Links::CleanVeth);
        let echo = UdpEcho::start(edge.topology.internet(), at(SERVER, 8001)).unwrap();
        let wire = edge.topology.sniff_internet().unwrap();
        let guest = socket(&edge, 45679);
        for number in 0..5u8 {
            let big: Vec<u8> = (0..3000u16).map(|i| (i % 251) as u8 ^ number).collect();
            let before = edge.reasons().unwrap();
            guest.send_to(&big, echo.address()).unwrap();
            let mut heard = vec![0; 4000];
            let (length, _) = guest
                .recv_from(&mut heard)
                .unwrap_or_else(|error| panic!("{hook:?}, {number}: {error}; {:?}", edge.reasons()));
            assert!(heard[..length] == big, "{hook:?}: it came back whole");
            let now = edge.reasons().unwrap();
            let more = |reason: &str| now.get(reason).unwrap_or(&0) - before.get(reason).unwrap_or(&0);
            // Three fragments out, the first of which opens nothing: the datagram itself did. Three of the echo's back.
            assert_eq!((more("fragmented"), more("forwarded")), (1, 6), "{hook:?}: {before:?} {now:?}");
            for reason in ["fragment", "fragment_out_of_order", "fragment_overlap", "packet_too_big"] {
                assert_eq!(more(reason), 0, "{hook:?}: {now:?}");
            }
        }
        let frames = wire.frames();
        let ours: Vec<u16> = frames
            .iter()
            .filter_map(|frame| frame.ip.as_ref())
            .filter(|ip| ip.fragment && ip.source == std::net::IpAddr::from(FRONTEND))
            .map(|ip| ip.identification)
            .collect();
        assert_eq!(ours.len(), 15, "{hook:?}");
        for datagram in ours.chunks(3) {
            assert!(datagram.iter().all(|id| *id == datagram[0]), "{hook:?}: {ours:?}");
        }
        let distinct: std::collections::BTreeSet<u16> = ours.iter().copied().collect();
        assert_eq!(distinct.len(), 5, "{hook:?}: a number for each: {ours:?}");
        assert!(wire.private_sources(&["10.0.0.0/8".parse().unwrap()]).is_empty(), "{hook:?}");
    });
}

/// A checksum that is left to the device would be made of the first fragment alone.
#[test]
fn a_container_that_leaves_its_checksums_to_the_device_is_told_and_fragments_by_itself() {
    let edge = wide(WithHook::Auto, Links::ContainerVeth);
    let echo = UdpEcho::start(edge.topology.internet(), at(SERVER, 8001)).unwrap();
    let guest = socket(&edge, 45679);
    let big: Vec<u8> = (0..3000u16).map(|i| (i % 251) as u8).collect();
    guest.send_to(&big, echo.address()).unwrap();
    let told = edge.wait(|edge| (edge.reason("packet_too_big").unwrap() == 1).then_some(()));
    assert!(told.is_some(), "{:?}", edge.reasons());
    assert_eq!(edge.reason("fragmented").unwrap(), 0, "{:?}", edge.reasons());
}
