//! Who gets which public port: many guests with the same source port, the same port towards several destinations, and
//! a guest that has none left.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{
    Craft, Crowd, CrowdEcho, RawSender, TcpEcho, TcpFlags, TcpHold, TopologySpec, UdpEcho, eventually, ping,
    tcp_connect, tcp_exchange,
};
use portcullis_tests::lan::{FRONTEND, Lan, SERVER};

const LIMIT: Duration = Duration::from_secs(5);
/// Less than the second after which a SYN is sent again.
const SOON: Duration = Duration::from_millis(600);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

fn at(port: u16) -> SocketAddr {
    (SERVER, port).into()
}

/// Guests on links of their own with so many ports each, known to the gateway.
fn start(hook: WithHook, guests: u8, ports: u32, extra: &str) -> Edge {
    let spec = TopologySpec::clean_veth(guests);
    let mut policy = LabPolicy::new(hook);
    policy.ports = ports;
    policy.extra = extra.to_owned();
    let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
    for guest in 1..=guests {
        let reached = ping(edge.topology.guest(&format!("vm{guest}")), SERVER.into(), 2, LIMIT).unwrap();
        assert!(reached.received > 0, "vm{guest} reaches the internet: {reached:?}");
    }
    edge
}

/// A neighbour of this test floods both processors.
const PATIENCE: Duration = Duration::from_secs(30);

/// Writes a word and hears the same.
fn says(stream: &mut TcpStream, word: &str) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(word.as_bytes()).unwrap();
    let mut heard = vec![0; word.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), word);
}

#[test]
fn a_hundred_guests_with_the_same_source_port_all_reach_one_server_at_once_and_each_hears_its_own_echo() {
    const GUESTS: u16 = 100;
    const SOURCE: u16 = 40000;
    for hook in BOTH {
        let edge = Lan::new(hook, GUESTS).start();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let internet = edge.topology.internet();
        let server = CrowdEcho::start(internet, at(80)).unwrap();
        let crowd = Crowd::new(Lan::inside(&edge)).unwrap();
        let all = usize::from(GUESTS);
        let sources: Vec<(u32, SocketAddr)> =
            (0..GUESTS).map(|guest| (guest.into(), (Lan::address(guest), SOURCE).into())).collect();
        crowd.connect(&sources, at(80)).unwrap();
        assert_eq!(crowd.settle(PATIENCE, all).unwrap(), all, "{hook:?}: TCP");
        assert_eq!(
            crowd.echo(PATIENCE).unwrap().len(),
            all,
            "{hook:?}: everyone hears its own word over TCP"
        );
        let heard = server.heard();
        assert!(heard.mixed.is_empty(), "{hook:?}: {heard:?}");
        assert_eq!(heard.open.len(), all, "{hook:?}: each has a public port of its own");
        let owners = Lan::tcp_ports(&edge);
        for (peer, word) in &heard.open {
            let owner = owners.iter().find(|own| own.guest == Crowd::who(*word) as u16).unwrap();
            assert!(
                peer.ip() == IpAddr::from(FRONTEND) && owner.owns(peer.port()),
                "{hook:?}: {peer}, {owner:?}"
            );
        }

        let udp = UdpEcho::start(internet, at(53)).unwrap();
        let sockets: Vec<UdpSocket> = Lan::inside(&edge).enter(|| {
            (0..GUESTS).map(|guest| UdpSocket::bind((Lan::address(guest), SOURCE)).unwrap()).collect()
        });
        for (guest, socket) in sockets.iter().enumerate() {
            socket.connect(at(53)).unwrap();
            socket.send(format!("guest {guest}").as_bytes()).unwrap();
        }
        for (guest, socket) in sockets.iter().enumerate() {
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], *format!("guest {guest}").as_bytes(), "{hook:?}: over UDP");
            socket.set_nonblocking(true).unwrap();
            assert_eq!(
                socket.recv(&mut buffer).unwrap_err().kind(),
                ErrorKind::WouldBlock,
                "{hook:?}: and no other"
            );
        }
        assert_eq!(udp.peers().len(), all, "{hook:?}: {:?}", udp.peers());
        check.end(&edge).unwrap();
    }
}

/// The case of dpservice #208 (azure.md §8): the key of a port's reuse is the destination's address *and* port.
#[test]
fn flows_to_one_destination_differ_in_port_a_flow_elsewhere_shares_one_and_no_live_flow_is_disturbed() {
    for hook in BOTH {
        let edge = start(hook, 1, 64, "");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let guest = edge.topology.guest("vm1");
        let servers = [35000, 35001].map(|port| TcpEcho::start(edge.topology.internet(), at(port)).unwrap());
        // flow1 3001 -> 35000, flow2 3002 -> 35001, flow3 3001 -> 35001: the third differs from the second whatever
        // the first and the second have.
        let mut flows: Vec<TcpStream> = [(3001, 35000), (3002, 35001), (3001, 35001)]
            .map(|(source, to)| tcp_connect(guest, Some(source), at(to), LIMIT).unwrap())
            .into();
        for round in 0..3 {
            for (number, flow) in flows.iter_mut().enumerate() {
                says(flow, &format!("flow {number} round {round}"));
            }
        }
        let [first, second] = servers.each_ref().map(TcpEcho::peers);
        assert_eq!((first.len(), second.len()), (1, 2), "{hook:?}");
        assert_ne!(second[0], second[1], "{hook:?}: two flows to one destination on one port");
        check.end(&edge).unwrap();
    }
}

/// The same without luck: eight ports, eight flows to each of two destinations, so every port is shared.
#[test]
fn with_all_ports_shared_by_two_destinations_a_ninth_waits_for_one_and_gets_exactly_that() {
    for hook in BOTH {
        let edge = start(hook, 1, 8, "timeouts: { tcpFinSeconds: 2, tcpResetSeconds: 1 }\n");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let guest = edge.topology.guest("vm1");
        let servers = [35000, 35001].map(|port| TcpEcho::start(edge.topology.internet(), at(port)).unwrap());
        let mut flows = BTreeMap::new();
        // The source ports of those to the second begin at 3002, so that 3001 is left for the ninth.
        for (to, source) in (3001..3009).map(|p| (35000, p)).chain((3002..3010).map(|p| (35001, p))) {
            let flow = tcp_connect(guest, Some(source), at(to), LIMIT).unwrap();
            flows.insert((to, source), flow);
        }
        let all_live = |flows: &mut BTreeMap<(u16, u16), TcpStream>, when: &str| {
            for ((to, source), flow) in flows {
                says(flow, &format!("{source} to {to} {when}"));
            }
        };
        all_live(&mut flows, "full");
        let [first, second] = servers.each_ref().map(|server| BTreeSet::from_iter(server.peers()));
        assert_eq!(first.len(), 8, "{hook:?}");
        assert_eq!(first, second, "{hook:?}: the second destination has the same eight ports again");
        let refused = tcp_connect(guest, Some(3001), at(35001), SOON).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut, "{hook:?}: all eight are taken towards 35001");
        all_live(&mut flows, "after a refusal");

        let taken = flow_port(&edge, 35001, 3005);
        drop(flows.remove(&(35001, 3005)));
        let mut ninth = None;
        eventually(LIMIT * 2, || {
            ninth = tcp_connect(guest, Some(3001), at(35001), LIMIT).ok();
            ninth.is_some()
        });
        flows.insert((35001, 3001), ninth.expect("the port of the flow that ended is free after its hold"));
        assert_eq!(flow_port(&edge, 35001, 3001), taken, "{hook:?}: the only one that was free");
        assert_eq!(servers[1].peers().last().unwrap().port(), taken, "{hook:?}: as the server sees it");
        for _ in 0..3 {
            all_live(&mut flows, "with the port reclaimed");
        }
        check.end(&edge).unwrap();
    }
}

/// The public port of a live flow, as `flows` tells.
fn flow_port(edge: &Edge, destination: u16, source: u16) -> u16 {
    let answer = edge.ask(&["flows", "--guest", "vm1"]).unwrap();
    let flows = answer["flows"].as_array().unwrap();
    let flow = flows.iter().find(|f| f["sourcePort"] == source && f["destinationPort"] == destination);
    flow.unwrap_or_else(|| panic!("no {source} -> {destination} in {answer}"))["translatedSourcePort"]
        .as_u64()
        .unwrap() as u16
}

#[test]
fn a_guest_without_ports_that_retries_as_fast_as_it_can_hurts_neither_its_own_live_flows_nor_its_neighbour() {
    const PORTS: usize = 64;
    for hook in BOTH {
        let edge = start(hook, 2, PORTS as u32, "");
        let (loud, quiet) = (edge.topology.guest("vm1"), edge.topology.guest("vm2"));
        let _server = TcpEcho::start(edge.topology.internet(), at(80)).unwrap();
        let mut live = TcpHold::open(loud, at(80), PORTS, LIMIT).unwrap();
        live.open_more(loud, at(80), 1, SOON).unwrap();
        assert_eq!(live.established(), PORTS, "{hook:?}");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let spec = edge.topology.guest_spec("vm1").clone();
        let craft = Craft::new(spec.mac, spec.address, spec.gateway_mac, SERVER);
        let sender = RawSender::open(loud, "eth0").unwrap();
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let slowest = std::thread::scope(|scope| {
            let begun = Instant::now();
            scope.spawn(|| {
                let syns: Vec<_> =
                    (1024..32768).map(|port| craft.tcp(port, 80, TcpFlags::SYN, 1, 0, b"")).collect();
                for syn in syns.iter().cycle() {
                    if stop.load(Relaxed) {
                        break;
                    }
                    match sender.send(syn) {
                        Ok(()) => _ = sent.fetch_add(1, Relaxed),
                        // Faster than the gateway takes them: its own ring is full.
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS)),
                    }
                }
            });
            let mut slowest = Duration::ZERO;
            // Half of what the neighbour owns, one after the other, while the flood goes on.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for number in 0..PORTS / 2 {
                    let one = Instant::now();
                    let word = format!("neighbour {number}");
                    let reached = tcp_exchange(quiet, None, at(80), word.as_bytes(), LIMIT);
                    assert_eq!(reached.unwrap().echoed, word.as_bytes(), "{hook:?}");
                    slowest = slowest.max(one.elapsed());
                    if number % 8 == 7 {
                        assert_eq!(live.alive(LIMIT), PORTS, "{hook:?}: live flows go on");
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }));
            stop.store(true, Relaxed);
            println!(
                "{hook:?}: {} SYNs refused a second; the neighbour's slowest connection took {slowest:?}",
                (sent.load(Relaxed) as f64 / begun.elapsed().as_secs_f64()).round()
            );
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            slowest
        });
        assert!(
            slowest < Duration::from_secs(1),
            "{hook:?}: no SYN of the neighbour's was lost: {slowest:?}"
        );
        check.end(&edge).unwrap();
        assert_eq!(live.alive(LIMIT), PORTS, "{hook:?}: and after it");
        let sent = sent.load(Relaxed);
        let refused = edge.reason("snat_exhausted").unwrap() + edge.reason("snat_refused_again").unwrap();
        assert!(
            refused >= sent && refused <= sent + 8,
            "{hook:?}: {sent} sent, {refused} refused; {:?}",
            edge.reasons()
        );

        let answer = edge.ask(&["snat"]).unwrap();
        let sampled = |guest: &str| {
            let mut rows = answer["guests"].as_array().unwrap().iter();
            let row = rows.find(|row| row["guest"].as_str().unwrap().starts_with(guest)).unwrap();
            let ports = row["ports"].as_array().unwrap().iter();
            let free =
                ports.filter(|ports| ports["protocol"] == "tcp").map(|ports| ports["free"].as_u64().unwrap());
            (free.sum::<u64>(), row["exhaustedSampled"].as_u64().unwrap())
        };
        let (free, refusals) = sampled("vm1");
        assert!(free == 0 && refusals > 0, "{hook:?}: `snat` names vm1: {answer}");
        assert_eq!(sampled("vm2").1, 0, "{hook:?}: and not vm2");
        let drops = edge.ask(&["drops"]).unwrap();
        let recent = drops["recent"].as_array().unwrap();
        let of_ports = recent.iter().filter(|drop| drop["reason"].as_str().unwrap().starts_with("snat_"));
        let named: BTreeSet<&str> = of_ports.map(|drop| drop["guest"].as_str().unwrap()).collect();
        assert_eq!(named, BTreeSet::from(["vm1/ipconfig1"]), "{hook:?}: `drops` names vm1 alone: {drops}");
    }
}
