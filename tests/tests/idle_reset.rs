//! `enableTcpReset`: both ends of an established connection that idles out are told, with real sockets and the daemon,
//! under XDP and under TC; without it, or without the daemon, the flow ends silently.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{
    Craft, Namespace, RawSender, Sniffer, TcpFlags, TopologySpec, eventually, ping, tcp_connect,
};
use portcullis_tests::site::{LIMIT, SERVER, SOON, at};

const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
/// Of established connections, in seconds.
const IDLE: u64 = 6;

/// The policy; `ports` of the guest's own, 0 by tier.
fn policy(hook: WithHook, spec: &TopologySpec, reset: bool, ports: u32) -> String {
    let mut policy = LabPolicy { ports, ..LabPolicy::new(hook) };
    policy.extra = format!(
        "timeouts: {{ tcpEstablishedSeconds: {IDLE} }}\n\
         networkSecurityGroups: [{{ name: open, securityRules: [{{ name: In, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: 8080 }}] }}]\n"
    );
    policy.subnet_group = Some("open");
    let rule = format!(
        "    loadBalancingRules: [{{ name: http, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true, enableTcpReset: {reset} }}]\nuplinks:"
    );
    policy
        .yaml(spec)
        .replace("protocol: All,", &format!("protocol: All, enableTcpReset: {reset},"))
        .replace("uplinks:", &rule)
}

fn start(hook: WithHook, reset: bool, ports: u32) -> Edge {
    let spec = TopologySpec::clean_veth(1);
    let edge = Edge::start(&spec, &policy(hook, &spec, reset, ports)).unwrap();
    // The world's client is behind the router: who is on the uplink's own link has no hardware address that the daemon knows
    // (ADR 0003).
    edge.topology.internet().ip(&format!("route add {FRONTEND}/32 dev eth0 src {SERVER}")).unwrap();
    ping(edge.topology.guest("vm1"), IpAddr::V4(SERVER), 1, SOON).unwrap();
    edge
}

/// Both ends of a connection that has carried data both ways.
fn connection(from: &Namespace, to: &Namespace, listen: SocketAddr, seen_at: SocketAddr) -> [TcpStream; 2] {
    let listener = to.enter(|| TcpListener::bind(listen)).unwrap();
    let mut client = tcp_connect(from, None, seen_at, LIMIT).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
    }
    client.write_all(b"ask").unwrap();
    server.read_exact(&mut [0; 3]).unwrap();
    server.write_all(b"answer").unwrap();
    client.read_exact(&mut [0; 6]).unwrap();
    [client, server]
}

#[test]
fn both_ends_of_an_idle_connection_see_a_reset_if_the_rule_says_so_and_silence_if_not() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        for reset in [true, false] {
            let what = format!("{hook:?}, enableTcpReset: {reset}");
            let edge = start(hook, reset, 0);
            let (vm, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
            let check = HookCheck::begin(&edge, hook).unwrap();
            let mut ends = Vec::from(connection(vm, internet, at(SERVER, 443), at(SERVER, 443)));
            ends.extend(connection(internet, vm, at(GUEST, 8080), at(FRONTEND, 80)));
            check.end(&edge).unwrap();
            let names = ["guest, outbound", "server", "client", "guest, inbound"];
            // The reaper looks every second.
            let patience = Duration::from_secs(if reset { IDLE + 6 } else { IDLE + 3 });
            ends[0].set_read_timeout(Some(patience)).unwrap();
            // The others have waited all the while.
            let patience = if reset { LIMIT } else { SOON };
            ends[1..].iter().for_each(|end| end.set_read_timeout(Some(patience)).unwrap());
            for (end, name) in ends.iter_mut().zip(names) {
                let outcome = end.read(&mut [0; 1]);
                let expected = if reset { ErrorKind::ConnectionReset } else { ErrorKind::WouldBlock };
                assert_eq!(outcome.unwrap_err().kind(), expected, "{what}: {name}");
            }
            let status = edge.ask(&["status"]).unwrap();
            let sent = status["reaper"]["resetsSent"].as_u64();
            assert_eq!(sent, Some(if reset { 4 } else { 0 }), "{what}");
            // The ping's flow lives for a minute.
            assert!(status["flows"]["live"].as_u64().unwrap() <= 1, "{what}: they have ended either way");
        }
    }
}

#[test]
fn with_the_daemon_killed_an_idle_connection_ends_without_a_reset_and_its_port_can_be_claimed_again() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let mut edge = start(hook, true, 8);
        let (vm, internet) = (edge.topology.guest("vm1").clone(), edge.topology.internet().clone());
        let check = HookCheck::begin(&edge, hook).unwrap();
        // Every port the guest has, and one connection from the world.
        let mut ends: Vec<TcpStream> =
            (0..8).flat_map(|_| connection(&vm, &internet, at(SERVER, 443), at(SERVER, 443))).collect();
        ends.extend(connection(&internet, &vm, at(GUEST, 8080), at(FRONTEND, 80)));
        let ports: BTreeSet<u16> =
            ends[..16].iter().skip(1).step_by(2).map(|server| server.peer_addr().unwrap().port()).collect();
        assert_eq!(ports.len(), 8, "{hook:?}");
        check.end(&edge).unwrap();
        let eyes = [Sniffer::start(&vm, "eth0").unwrap(), Sniffer::start(&internet, "eth0").unwrap()];
        edge.daemon.kill();

        let ninth = tcp_connect(&vm, None, at(SERVER, 443), SOON).unwrap_err();
        assert_eq!(ninth.kind(), ErrorKind::TimedOut, "{hook:?}: all eight are taken");
        // Past the idle time, and the second within which the reaper of a living daemon would have told both ends.
        std::thread::sleep(Duration::from_secs(IDLE + 3));
        for end in &ends {
            end.set_nonblocking(true).unwrap();
            assert_eq!(
                (&*end).read(&mut [0; 1]).unwrap_err().kind(),
                ErrorKind::WouldBlock,
                "{hook:?}: silence"
            );
        }
        for (eye, name) in eyes.iter().zip(["the guest", "the world"]) {
            let resets = eye.frames().into_iter().filter(|frame| frame.is_tcp_with(TcpFlags::RST)).count();
            assert_eq!((resets, eye.lost()), (0, 0), "{hook:?}: no reset at {name}");
        }
        // By hand: a client of the kernel's would reset what the server still knows under the port.
        eyes[1].clear();
        let craft = Craft::new(
            edge.topology.guest_spec("vm1").mac,
            GUEST,
            edge.topology.guest_spec("vm1").gateway_mac,
            SERVER,
        );
        let sender = RawSender::open(&vm, "eth0").unwrap();
        for source in 2000..2008 {
            sender.send(&craft.tcp(source, 443, TcpFlags::SYN, 1, 0, b"")).unwrap();
        }
        let mut again = BTreeSet::new();
        let claimed = eventually(LIMIT, || {
            let frames = eyes[1].frames();
            let syns = frames.iter().filter(|frame| frame.is_tcp_with(TcpFlags::SYN) && !frame.outgoing);
            again = syns
                .filter(|syn| syn.destination() == Some(at(SERVER, 443)))
                .map(|syn| syn.source().unwrap().port())
                .collect();
            again.len() == 8
        });
        assert!(claimed, "{hook:?}: {again:?}");
        assert_eq!(again, ports, "{hook:?}: every port is claimed anew, by the datapath alone");
    }
}
