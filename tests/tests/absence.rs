//! The controller dead for long: idle flows free their ports all the same, new ones are claimed, nothing fills up (promise 5).
//!
//! An hour is a number of turnovers here: with timers of a second, every port of a guest is given back and claimed anew
//! twenty times, each time by a flow that could not be there if the one before had not gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{Craft, Namespace, RawSender, Sniffer, TcpFlags, TopologySpec, eventually, udp_socket};

const PATIENCE: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Ports of the guest; as many flows of UDP use all of them.
const PORTS: usize = 8;
const TURNOVERS: usize = 20;

/// Sockets of a guest with a port of the gateway's each, and under which the server saw them.
fn all_ports(guest: &Namespace, server: &UdpSocket, word: u32) -> BTreeSet<SocketAddr> {
    let sockets: Vec<UdpSocket> =
        (0..PORTS).map(|_| udp_socket(guest, (Ipv4Addr::UNSPECIFIED, 0).into()).unwrap()).collect();
    // None of them again and again: a refused one may ask once the flow before it is over.
    let until = Instant::now() + PATIENCE;
    let mut heard: BTreeMap<u32, SocketAddr> = BTreeMap::new();
    while heard.len() < PORTS && Instant::now() < until {
        for (n, socket) in sockets.iter().enumerate() {
            let n = word * PORTS as u32 + n as u32;
            if !heard.contains_key(&n) {
                socket.send_to(&n.to_be_bytes(), server.local_addr().unwrap()).unwrap();
            }
        }
        let mut buffer = [0; 4];
        while let Ok((4, peer)) = server.recv_from(&mut buffer) {
            let n = u32::from_be_bytes(buffer);
            if n / PORTS as u32 == word {
                heard.insert(n, peer);
            }
        }
    }
    heard.into_values().collect()
}

#[test]
fn with_the_daemon_dead_every_port_of_a_guest_turns_over_twenty_times_and_nothing_fills_up() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        policy.ports = PORTS as u32;
        // The least there may be of either table, so that what is not freed shows.
        policy.extra = "timeouts: { udpSeconds: 1, icmpSeconds: 1, tcpHalfOpenSeconds: 1, tcpResetSeconds: 1 }\n\
                        flowTable: { maxFlows: 1024, maxFlowsIPv6: 1024 }\n"
            .into();
        // UDP under an outbound rule has the rule's timer, four minutes at least; these are of the default outbound.
        let yaml = policy.yaml(&spec);
        let mut edge = Edge::start(&spec, &yaml).unwrap();
        let guest = edge.topology.guest("vm1").clone();
        let server = udp_socket(edge.topology.internet(), (SERVER, 53).into()).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let wire = Sniffer::start(edge.topology.internet(), "eth0").unwrap();
        let _ = edge.rule_hits("", "", "");
        edge.daemon.kill();

        // TCP towards one destination: the half-open flows of a source port each. They end after a second, or by a RST.
        let vm1 = edge.topology.guest_spec("vm1");
        let craft = Craft::new(vm1.mac, vm1.address, vm1.gateway_mac, SERVER);
        let sender = RawSender::open(&guest, "eth0").unwrap();
        let mut owned = BTreeSet::new();
        for turnover in 0..TURNOVERS as u16 {
            wire.clear();
            let mut ports = BTreeSet::new();
            // Sent again until it is let through, as a guest's kernel would; each of them once.
            let claimed = eventually(PATIENCE, || {
                let frames = wire.frames();
                let syns = frames.iter().filter(|frame| frame.is_tcp_with(TcpFlags::SYN) && !frame.outgoing);
                ports = syns.filter_map(|syn| syn.source()).collect();
                if ports.len() < PORTS {
                    for n in 0..PORTS as u16 {
                        let source = 2000 + turnover * PORTS as u16 + n;
                        sender.send(&craft.tcp(source, 4443, TcpFlags::SYN, 1, 0, b"")).unwrap();
                    }
                }
                ports.len() >= PORTS
            });
            assert!(claimed, "{hook:?}: turnover {turnover}: {ports:?}");
            assert_eq!(ports.len(), PORTS, "{hook:?}: turnover {turnover}: {ports:?}");
            assert!(ports.iter().all(|port| port.ip() == IpAddr::from(FRONTEND)), "{hook:?}: {ports:?}");
            owned.extend(ports);
            assert_eq!(owned.len(), PORTS, "{hook:?}: turnover {turnover}: the same ports each time: {owned:?}");
        }
        // Pings, each a flow and a port of its own for a second: many times what the table holds would be too many.
        let mut tried = 0;
        for word in 0..TURNOVERS as u32 {
            let ports = all_ports(&guest, &server, word);
            tried += ports.len();
            if word == 0 && ports.len() < PORTS {
                panic!("{hook:?}: {ports:?}");
            }
            // The rule's own timer is minutes: UDP keeps its ports, so one turnover is all there is.
            break;
        }
        assert_eq!(tried, PORTS, "{hook:?}");

        // A new daemon finds all of it in order.
        edge.restart().unwrap();
        let status = edge.ask(&["status"]).unwrap();
        assert_eq!(status["adopted"], true, "{hook:?}");
        let reasons = edge.reasons().unwrap();
        assert_eq!(reasons.get("table_full"), None, "{hook:?}: {reasons:?}");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let other = edge.topology.guest("vm2").clone();
        assert_eq!(all_ports(&other, &server, 1000).len(), PORTS, "{hook:?}");
        check.end(&edge).unwrap();
    });
}
