//! The first start on a host that has been a router for a while: what the kernel forwarded and translated goes on.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, under_both};
use portcullis_tests::lab::{
    Frame, Sniffer, TcpEcho, TcpFlags, Topology, TopologySpec, UdpEcho, eventually, ping, tcp_connect,
    tcp_exchange, udp_socket,
};
use portcullis_tests::stream::{TcpStreamOfNumbers, UdpStreamOfNumbers};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FRONTEND: &str = "203.0.113.10";
const STRANGER: &str = "203.0.113.77";

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// A router of the kernel's: it answers for the guests' gateway and for the other guests, forwards, and translates what leaves
/// to `public`.
fn router(spec: &TopologySpec, public: &str) -> Topology {
    let topology = Topology::build(spec).unwrap();
    let gateway = topology.gateway();
    gateway.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    for guest in &spec.guests {
        let (device, address) = (&guest.device, guest.address);
        gateway.set_sysctl(&format!("net.ipv4.conf.{device}.forwarding"), "1").unwrap();
        gateway.set_sysctl(&format!("net.ipv4.conf.{device}.proxy_arp"), "1").unwrap();
        gateway.ip(&format!("address add {}/32 dev {device}", guest.gateway)).unwrap();
        gateway.ip(&format!("route add {address}/32 dev {device}")).unwrap();
    }
    let uplink = &spec.uplink_device;
    gateway.set_sysctl(&format!("net.ipv4.conf.{uplink}.forwarding"), "1").unwrap();
    let rules = format!(
        "table ip nat {{ chain post {{ type nat hook postrouting priority 100; oifname \"{uplink}\" ip saddr 10.0.0.0/16 \
         snat to {public}; }}; }}"
    );
    gateway.run(&["nft", &rules]).unwrap();
    // Who answers for that address is not what this is about.
    let mac = gateway.mac(uplink).unwrap().map(|byte| format!("{byte:02x}")).join(":");
    topology.internet().ip(&format!("neigh replace {public} lladdr {mac} dev eth0 nud permanent")).unwrap();
    topology
}

fn older(edge: &Edge) -> Value {
    edge.ask(&["status"]).unwrap()["older"].clone()
}

#[test]
fn connections_through_a_masquerade_go_on_under_the_port_the_world_knows_and_new_ones_get_their_own() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let topology = router(&spec, FRONTEND);
        let tcp = TcpEcho::start(topology.internet(), at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(topology.internet(), at(SERVER, 53)).unwrap();
        let vm1 = topology.guest("vm1").clone();
        let numbers = TcpStreamOfNumbers::start(&vm1, at(SERVER, 80)).unwrap();
        let datagrams = UdpStreamOfNumbers::start(&vm1, at(SERVER, 53)).unwrap();
        assert!(
            eventually(LIMIT, || numbers.echoed() > 100 && datagrams.echoed() > 100),
            "{hook:?}: the kernel's NAT"
        );
        let (tcp_peers, udp_peers) = (tcp.peers(), udp.peers());
        assert_eq!((tcp_peers.len(), udp_peers.len()), (1, 1), "{hook:?}");
        assert_eq!(tcp_peers[0].ip().to_string(), FRONTEND);

        let edge = Edge::start_in(topology, &LabPolicy::new(hook).yaml(&spec)).unwrap();
        let (there, back) = (numbers.echoed(), datagrams.echoed());
        assert!(
            eventually(LIMIT, || numbers.echoed() > there + 200 && datagrams.echoed() > back + 200),
            "{hook:?}: both go on; {:?}, {:?}",
            numbers.failure(),
            datagrams.failure()
        );
        assert_eq!(
            (tcp.peers(), udp.peers()),
            (tcp_peers.clone(), udp_peers.clone()),
            "{hook:?}: under the same tuple"
        );
        let taken = older(&edge)["takenOver"].clone();
        assert_eq!((&taken["tcp"], &taken["udp"]), (&1.into(), &1.into()), "{hook:?}: {taken}");
        assert_eq!(taken["leftOut"], serde_json::json!({}), "{hook:?}: {taken}");
        let flows = edge.ask(&["flows", "--guest", "vm1"]).unwrap();
        let ports: Vec<u64> = flows["flows"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|flow| flow["translatedSourcePort"].as_u64())
            .collect();
        for peer in [tcp_peers[0], udp_peers[0]] {
            assert!(ports.contains(&u64::from(peer.port())), "{hook:?}: {peer} is among {flows}");
        }

        assert_eq!(edge.held("vm1").unwrap(), 2, "{hook:?}: both count for its quota");

        tcp_exchange(&vm1, None, at(SERVER, 80), b"a new connection", LIMIT).unwrap();
        let new = tcp.peers()[1];
        assert!(edge.owns("vm1", new.port()).unwrap(), "{hook:?}: {new}");
        assert_eq!(ping(&vm1, SERVER.into(), 3, LIMIT).unwrap().received, 3, "{hook:?}");
        // No packet of these passed the kernel's NAT any more, or it would have been counted as handed up.
        numbers.stop().unwrap_or_else(|error| panic!("{hook:?}: TCP: {error}"));
        let lost = datagrams.stop().unwrap_or_else(|error| panic!("{hook:?}: UDP: {error}"));
        println!("{hook:?}: {lost} datagrams lost at the start");
    });
}

#[test]
fn guests_that_talked_over_the_kernels_forwarding_talk_on_and_only_within_the_grace() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let topology = router(&spec, FRONTEND);
        let (vm1, vm2) = (topology.guest("vm1").clone(), topology.guest("vm2").clone());
        let vm2_address = spec.guests[1].address;
        let server = TcpEcho::start(&vm2, at(vm2_address, 7000)).unwrap();
        let numbers = TcpStreamOfNumbers::start(&vm1, at(vm2_address, 7000)).unwrap();
        let mut silent = tcp_connect(&vm1, None, at(vm2_address, 7000), LIMIT).unwrap();
        assert!(eventually(LIMIT, || numbers.echoed() > 100), "{hook:?}: the kernel forwards");

        let edge = Edge::start_in(topology, &LabPolicy::new(hook).yaml(&spec)).unwrap();
        let before = numbers.echoed();
        assert!(eventually(LIMIT, || numbers.echoed() > before + 200), "{hook:?}: {:?}", numbers.failure());
        assert_eq!(server.open_connections(), 2, "{hook:?}: no other connection");
        assert!(older(&edge)["adopted"].as_u64().unwrap() >= 1, "{hook:?}: {}", older(&edge));
        assert!(older(&edge)["graceSeconds"].as_f64().unwrap() > 200.0, "{hook:?}: {}", older(&edge));

        // A policy without a grace ends it for those that have not spoken yet; who was adopted stays.
        let over = LabPolicy { extra: "adoption: { graceSeconds: 0 }\n".into(), ..LabPolicy::new(hook) };
        let (done, said) = edge.apply(&over.yaml(&spec)).unwrap();
        assert!(done, "{said}");
        assert!(eventually(LIMIT, || older(&edge)["graceSeconds"] == 0.0), "{hook:?}");
        let drops = edge.reason("no_flow").unwrap();
        silent.write_all(b"anybody there?").unwrap();
        assert!(
            eventually(LIMIT, || edge.reason("no_flow").unwrap() > drops),
            "{hook:?}: mid-stream, and too late"
        );
        let before = numbers.echoed();
        assert!(eventually(LIMIT, || numbers.echoed() > before + 200), "{hook:?}: {:?}", numbers.failure());
        numbers.stop().unwrap_or_else(|error| panic!("{hook:?}: {error}"));
    });
}

/// What happens to a connection that the peer of its end does not know.
fn fate(stream: &mut TcpStream) -> ErrorKind {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    match stream.write_all(b"anybody there?").and_then(|()| stream.read(&mut [0; 64])) {
        Ok(read) => panic!("{read} bytes came back"),
        Err(error) => error.kind(),
    }
}

#[test]
fn a_connection_that_nothing_can_take_over_is_reset_towards_its_guest_and_not_left_in_silence() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let topology = router(&spec, STRANGER);
        let _server = TcpEcho::start(topology.internet(), at(SERVER, 80)).unwrap();
        let vm1 = topology.guest("vm1").clone();
        let mut stream = tcp_connect(&vm1, None, at(SERVER, 80), LIMIT).unwrap();
        stream.write_all(b"over the kernel's NAT").unwrap();
        let mut echo = [0; 21];
        stream.read_exact(&mut echo).unwrap();

        let edge = Edge::start_in(topology, &LabPolicy::new(hook).yaml(&spec)).unwrap();
        let left = older(&edge)["takenOver"]["leftOut"].clone();
        assert_eq!(left, serde_json::json!({ "under an address that is not the policy's": 1 }), "{hook:?}");
        let drops = edge.reason("no_flow").unwrap();
        assert_eq!(fate(&mut stream), ErrorKind::ConnectionReset, "{hook:?}");
        assert_eq!(edge.reason("no_flow").unwrap(), drops + 1, "{hook:?}: told at the first segment");
        tcp_exchange(&vm1, None, at(SERVER, 80), b"and a new one works", LIMIT).unwrap();
    });
}

#[test]
fn without_a_grace_nothing_is_taken_over_and_nobody_is_told() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let topology = router(&spec, FRONTEND);
        let _server = TcpEcho::start(topology.internet(), at(SERVER, 80)).unwrap();
        let vm1 = topology.guest("vm1").clone();
        let mut stream = tcp_connect(&vm1, None, at(SERVER, 80), LIMIT).unwrap();
        let policy = LabPolicy { extra: "adoption: { graceSeconds: 0 }\n".into(), ..LabPolicy::new(hook) };
        let edge = Edge::start_in(topology, &policy.yaml(&spec)).unwrap();
        assert_eq!(older(&edge)["takenOver"], Value::Null, "{hook:?}");
        let is_reset = |frame: &Frame| frame.is_tcp_with(TcpFlags::RST);
        let resets = Sniffer::start_filtered(&vm1, "eth0", is_reset).unwrap();
        let drops = edge.reason("no_flow").unwrap();
        stream.write_all(b"anybody there?").unwrap();
        // The segment and its first retransmissions.
        assert!(eventually(LIMIT, || edge.reason("no_flow").unwrap() > drops + 1), "{hook:?}");
        assert!(resets.frames().is_empty(), "{hook:?}: {:?}", resets.frames());
    });
}

#[test]
fn from_the_first_packet_a_program_meets_nothing_passes_but_what_the_policy_lets_pass() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let topology = router(&spec, FRONTEND);
        let heard = UdpEcho::start(topology.internet(), at(SERVER, 53)).unwrap();
        let vm1 = topology.guest("vm1").clone();
        let socket = udp_socket(&vm1, at(Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.send_to(b"before", at(SERVER, 53)).unwrap();
        assert!(eventually(LIMIT, || heard.datagrams() == 1), "{hook:?}: the kernel forwards");
        // A guest that never stops, each datagram from the same socket: the kernel's NAT knows it.
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = socket.send_to(b"chatter", at(SERVER, 53));
                    std::thread::sleep(Duration::from_micros(500));
                }
            });
            let deny = "networkSecurityGroups:\n  - name: shut\n    securityRules: [{ name: Nothing, priority: 100, direction: Outbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }]\n";
            let policy = LabPolicy { subnet_group: Some("shut"), extra: deny.into(), ..LabPolicy::new(hook) };
            let edge = Edge::start_in(topology, &policy.yaml(&spec)).unwrap();
            let passed = heard.datagrams();
            let denied = edge.reason("denied_by_rule").unwrap();
            assert!(eventually(LIMIT, || edge.reason("denied_by_rule").unwrap() > denied + 200), "{hook:?}");
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(heard.datagrams(), passed, "{hook:?}: nothing once the programs are there");
            let left = older(&edge)["takenOver"]["leftOut"].clone();
            assert_eq!(left["that the policy denies"], 1, "{hook:?}: {left}");
            let reasons = edge.reasons().unwrap();
            assert_eq!(
                (reasons.get("new_flow"), reasons.get("forwarded")),
                (None, None),
                "{hook:?}: {reasons:?}"
            );
        });
    });
}
