//! `enableTcpReset`: both ends of an established connection that idles out are told, with real sockets and the daemon,
//! under XDP and under TC; without it the flow ends silently.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{Namespace, TopologySpec, ping, tcp_connect};
use portcullis_tests::site::{LIMIT, SERVER, SOON, at};

const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
/// Of established connections, in seconds.
const IDLE: u64 = 6;

fn policy(hook: WithHook, spec: &TopologySpec, reset: bool) -> String {
    let mut policy = LabPolicy::new(hook);
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
        .replace("allocatedOutboundPorts: 0", &format!("allocatedOutboundPorts: 0, enableTcpReset: {reset}"))
        .replace("uplinks:", &rule)
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
            let spec = TopologySpec::clean_veth(1);
            let edge = Edge::start(&spec, &policy(hook, &spec, reset)).unwrap();
            let (vm, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
            // The world's client is behind the router: who is on the uplink's own link has no hardware address that the
            // daemon knows (ADR 0003).
            internet.ip(&format!("route add {FRONTEND}/32 dev eth0 src {SERVER}")).unwrap();
            ping(vm, IpAddr::V4(SERVER), 1, SOON).unwrap();
            let check = HookCheck::begin(&edge, hook).unwrap();
            let mut ends = Vec::from(connection(vm, internet, at(SERVER, 443), at(SERVER, 443)));
            ends.extend(connection(internet, vm, at(GUEST, 8080), at(FRONTEND, 80)));
            check.end(&edge).unwrap();
            let names = ["guest, outbound", "server", "client", "guest, inbound"];
            // The reaper looks every second.
            let patience = Duration::from_secs(if reset { IDLE + 6 } else { IDLE + 3 });
            ends[0].set_read_timeout(Some(patience)).unwrap();
            // The others have waited all the while.
            ends[1..].iter().for_each(|end| end.set_read_timeout(Some(SOON)).unwrap());
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
