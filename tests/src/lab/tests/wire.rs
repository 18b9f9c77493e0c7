//! The wire: sniffers, raw frames and taps.

use std::net::SocketAddrV4;

use super::super::{
    Checksum, Craft, Frame, Ip, RawSender, Sniffer, TcpEcho, TcpFlags, Topology, TopologySpec, Transport,
    UdpEcho, tcp_exchange,
};
use super::{NEVER, Pair, SOON, needs_root, routed};

#[test]
fn a_sniffer_sees_the_frames_of_an_exchange() {
    needs_root!();
    let topology = routed(&TopologySpec::clean_veth(1));
    let sniffer = topology.sniff_internet().expect("a sniffer");
    let server = TcpEcho::start(topology.internet(), topology.internet_socket(80)).expect("a server");
    let outcome =
        tcp_exchange(topology.guest("vm1"), None, server.address(), b"seen", SOON).expect("an echo");

    let syn = sniffer.wait_for(SOON, |frame| frame.is_tcp_with(TcpFlags::SYN)).expect("the SYN");
    assert_eq!((syn.source(), syn.destination()), (Some(outcome.local), Some(server.address())));
    assert!(!syn.outgoing);
    let data = sniffer.wait_for(SOON, |frame| frame.payload() == b"seen").expect("the data");
    assert_eq!(data.destination(), Some(server.address()));
    let back =
        sniffer.wait_for(SOON, |frame| frame.payload() == b"seen" && frame.outgoing).expect("the echo");
    assert_eq!(back.destination(), Some(outcome.local));

    // Untranslated, as the kernel forwards it: this is what a leak looks like.
    let private = ["10.0.0.0/8".parse().expect("a net")];
    assert!(!sniffer.private_sources(&private).is_empty());
    assert!(sniffer.private_sources(&["172.16.0.0/12".parse().expect("a net")]).is_empty());
    // What the internet itself sends leaves its TCP with a partial checksum that the device then completes.
    assert_eq!(sniffer.bad_checksums().len(), 0, "{:?}", sniffer.bad_checksums());
    assert!(syn.checksums().transport == Checksum::Good, "{syn:?}");
    assert_eq!(sniffer.lost(), 0);
    sniffer.clear();
    assert!(!sniffer.frames().iter().any(|frame| frame.is_tcp_with(TcpFlags::SYN)));
}

#[test]
fn on_a_container_veth_checksums_arrive_partial_and_right() {
    needs_root!();
    let topology = routed(&TopologySpec::container_veth(1));
    let sniffer = topology.sniff_internet().expect("a sniffer");
    let server = TcpEcho::start(topology.internet(), topology.internet_socket(80)).expect("a server");
    tcp_exchange(topology.guest("vm1"), None, server.address(), &[1; 100_000], SOON).expect("an echo");
    let syn = sniffer.wait_for(SOON, |frame| frame.is_tcp_with(TcpFlags::SYN)).expect("the SYN");
    assert_eq!(syn.checksums().transport, Checksum::PartialGood, "{syn:?}");
    assert_eq!(sniffer.bad_checksums().len(), 0, "{:?}", sniffer.bad_checksums());
    assert!(sniffer.frames().iter().any(|frame| frame.bytes.len() > 2000), "segments arrive unsegmented");
}

#[test]
fn a_raw_frame_arrives_as_it_was_made_and_a_wrong_checksum_is_noticed() {
    needs_root!();
    let pair = Pair::create();
    let sniffer = Sniffer::start(&pair.far, "link0").expect("a sniffer");
    let sender = RawSender::open(&pair.near, "link0").expect("a sender");
    let mut craft = Craft::new([2; 6], [10, 9, 8, 7].into(), [6; 6], [192, 0, 2, 2].into());
    craft.identification = 4242;
    let mut bytes = craft.udp(1000, 2000, b"as it is");
    sender.send(&bytes).expect("it is sent");
    let is_ours = |frame: &Frame| matches!(&frame.ip, Some(Ip { identification: 4242, .. }));
    let seen = sniffer.wait_for(SOON, is_ours).expect("it arrives");
    assert_eq!(seen.bytes, bytes);
    assert!(seen.checksums_ok());
    assert_eq!(sniffer.private_sources(&["10.9.0.0/16".parse().expect("a net")]).len(), 1);

    sniffer.clear();
    *bytes.last_mut().expect("a payload") ^= 1;
    sender.send(&bytes).expect("it is sent");
    sniffer.wait_for(SOON, is_ours).expect("it arrives");
    assert_eq!(sniffer.bad_checksums().len(), 1);
    assert_eq!(sniffer.bad_checksums()[0].checksums().header, Checksum::Good);
}

#[test]
fn a_filtered_sniffer_keeps_what_it_was_asked_for() {
    needs_root!();
    let pair = Pair::create();
    let only_syn = |frame: &Frame| frame.is_tcp_with(TcpFlags::SYN);
    let sniffer = Sniffer::start_filtered(&pair.far, "link0", only_syn).expect("a sniffer");
    let server = TcpEcho::start(&pair.far, Pair::far_socket(80)).expect("a server");
    tcp_exchange(&pair.near, None, server.address(), b"x", SOON).expect("an echo");
    assert_eq!(sniffer.frames().len(), 1);
}

#[test]
fn a_partial_checksum_written_to_a_tap_arrives_on_the_bridge() {
    needs_root!();
    let topology = routed(&TopologySpec::bridged_taps(2));
    let guest = topology.tap("vm1");
    let on_bridge = Sniffer::start(topology.gateway(), "pc-br0").expect("a sniffer");
    let server =
        UdpEcho::start(topology.gateway(), "10.0.0.1:53".parse().expect("an address")).expect("a server");

    let gateway = guest.resolve([10, 0, 0, 1].into(), SOON).expect("the bridge answers ARP");
    assert_eq!(gateway, topology.gateway().mac("pc-br0").expect("an address"));
    guest
        .send_udp(gateway, 1234, SocketAddrV4::new([10, 0, 0, 1].into(), 53), b"question")
        .expect("it is sent");

    let seen = on_bridge.wait_for(SOON, |frame| frame.payload() == b"question").expect("it arrives");
    assert!(seen.partial);
    assert_eq!(seen.checksums().transport, Checksum::PartialGood);
    // The kernel takes it for good and answers; asking for us by ARP first, which the guest answers by
    // itself.
    let echo = guest.wait_for(SOON, |received| received.frame.payload() == b"question").expect("the echo");
    assert_eq!(server.peers(), ["10.0.0.4:1234".parse().expect("an address")]);
    assert_eq!(echo.frame.destination_mac, guest.mac());
    assert!(echo.frame.checksums_ok(), "{echo:?}");
}

#[test]
fn a_partial_checksum_from_a_tap_is_complete_on_a_link_without_offloads() {
    needs_root!();
    let topology = routed(&TopologySpec::bridged_taps(1));
    // The uplink is then as a NIC would be: what leaves it has its checksum.
    let off = ["ethtool", "-K", "pc-up", "tx", "off", "tso", "off", "gso", "off"];
    topology.gateway().run(&off).expect("ethtool runs");
    let sniffer = topology.sniff_internet().expect("a sniffer");
    let guest = topology.tap("vm1");
    let gateway = guest.resolve([10, 0, 0, 1].into(), SOON).expect("the bridge answers ARP");
    let server = SocketAddrV4::new(topology.spec().internet_address.addr(), 9);

    guest.send_syn(gateway, 1234, server, 99).expect("it is sent");
    let syn = sniffer.wait_for(SOON, |frame| frame.is_tcp_with(TcpFlags::SYN)).expect("it arrives");
    assert_eq!(syn.checksums().transport, Checksum::Good, "{syn:?}");
    // Nobody listens there.
    let is_reset = |frame: &Frame| {
        frame.ip.as_ref().is_some_and(|ip| match ip.transport {
            Transport::Tcp { flags, acknowledgment, .. } => flags.rst && acknowledgment == 100,
            _ => false,
        })
    };
    let reset = guest.wait_for(SOON, |received| is_reset(&received.frame)).expect("the RST");
    assert!(reset.frame.checksums_ok(), "{reset:?}");

    guest.send_echo_request(gateway, *server.ip(), 7, 1).expect("it is sent");
    let is_reply = |frame: &Frame| {
        matches!(&frame.ip, Some(Ip { transport: Transport::Icmp { kind: 0, id: 7, sequence: 1, .. }, .. }))
    };
    guest.wait_for(SOON, |received| is_reply(&received.frame)).expect("the echo reply");
}

#[test]
fn tap_guests_find_each_other_unless_told_not_to_answer() {
    needs_root!();
    let topology = Topology::build(&TopologySpec::bridged_taps(2)).expect("the topology");
    let (first, second) = (topology.tap("vm1"), topology.tap("vm2"));
    assert_eq!(first.resolve(second.address(), SOON), Some(second.mac()));
    second.answer_arp(false);
    assert_eq!(first.resolve(second.address(), NEVER), None);
    // A frame between two taps keeps its partial checksum, as QEMU guests on one bridge see it.
    let to = SocketAddrV4::new(second.address(), 9);
    first.send_udp(second.mac(), 1, to, b"neighbour").expect("it is sent");
    let got = second.wait_for(SOON, |received| received.frame.payload() == b"neighbour").expect("it arrives");
    assert_eq!(got.frame.checksums().transport, Checksum::PartialGood);
}
