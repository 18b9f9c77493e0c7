//! When a port comes back: held towards the destination it was used for, free at once towards any other
//! (azure.md §2.4). One guest, eight ports, real sockets.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{
    Namespace, Sniffer, TcpEcho, TcpFlags, TopologySpec, UdpEcho, eventually, ping, tcp_connect, udp_exchange,
};

const LIMIT: Duration = Duration::from_secs(5);
/// One SYN or datagram, and no second: TCP sends it again after a second.
const ONE_TRY: Duration = Duration::from_millis(120);
/// The same where it may be answered.
const ANSWERED: Duration = Duration::from_millis(900);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Reached by the wire, and answers nothing.
const SILENT: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];

/// Of `TIMEOUTS`.
const FIN: Duration = Duration::from_secs(3);
const RESET: Duration = Duration::from_secs(2);
const HALF_OPEN: Duration = Duration::from_secs(4);
const UDP: Duration = Duration::from_secs(3);
const TIMEOUTS: &str =
    "timeouts: { tcpFinSeconds: 3, tcpResetSeconds: 2, tcpHalfOpenSeconds: 4, udpSeconds: 3 }\n";
/// Deadlines are in ticks of 67 ms, rounded down.
const EARLY: Duration = Duration::from_millis(150);

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn start(hook: WithHook) -> Edge {
    let spec = TopologySpec::clean_veth(1);
    let mut policy = LabPolicy::new(hook);
    policy.ports = 8;
    policy.extra = TIMEOUTS.to_owned();
    let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
    edge.topology.internet().ip("route add blackhole 192.0.2.0/24").unwrap();
    let reached = ping(edge.topology.guest("vm1"), SERVER.into(), 2, LIMIT).unwrap();
    assert!(reached.received > 0, "{reached:?}");
    edge
}

/// Tries until it succeeds; the success, and when after `since` the successful attempt began.
fn first<T>(since: Instant, mut attempt: impl FnMut() -> Option<T>) -> (T, Duration) {
    let mut success = None;
    eventually(Duration::from_secs(20), || {
        let began = since.elapsed();
        success = attempt().map(|success| (success, began));
        success.is_some()
    });
    success.unwrap_or_else(|| panic!("no success within {:?}", since.elapsed()))
}

/// Not before its time. How long after it depends on the machine: [`first`] waits for it.
fn assert_held(what: &str, hold: Duration, took: Duration) {
    println!("{what}: free again after {took:?} of {hold:?}");
    assert!(took + EARLY >= hold, "{what}: after {took:?} already, not {hold:?}");
}

/// Eight connections to an echo server, all ports of the guest.
fn eight(guest: &Namespace, destination: SocketAddr) -> Vec<TcpStream> {
    (0..8).map(|_| tcp_connect(guest, None, destination, LIMIT).unwrap()).collect()
}

/// The peers of a server that has taken so many connections.
fn peers(server: &TcpEcho, count: usize) -> BTreeSet<SocketAddr> {
    assert!(eventually(LIMIT, || server.peers().len() >= count), "{:?}", server.peers());
    BTreeSet::from_iter(server.peers())
}

#[test]
fn a_closed_or_reset_connections_port_is_held_towards_its_destination_and_free_at_once_towards_others() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let (guest, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
        let eyes = edge.topology.sniff_guest("vm1").unwrap();
        for (what, reset, hold, port) in [("FIN", false, FIN, 80), ("RST", true, RESET, 82)] {
            let what = format!("{hook:?} {what}");
            let servers = [port, port + 1].map(|port| TcpEcho::start(internet, at(SERVER, port)).unwrap());
            let mut held = eight(guest, at(SERVER, port));
            let all = peers(&servers[0], 8);
            assert_eq!(all.len(), 8, "{what}");
            let ended = held.swap_remove(3);
            if reset {
                setsockopt(&ended, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
            }
            let since = Instant::now();
            drop(ended);
            let again = tcp_connect(guest, None, at(SERVER, port), ONE_TRY).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::TimedOut, "{what}: held");
            eyes.clear();
            let elsewhere = eight(guest, at(SERVER, port + 1));
            assert_eq!(peers(&servers[1], 8), all, "{what}: all eight are free towards another destination");
            assert_eq!(asked(&eyes, at(SERVER, port + 1)), 8, "{what}: at once, with the first SYN of each");
            let (_ninth, took) = first(since, || tcp_connect(guest, None, at(SERVER, port), ANSWERED).ok());
            assert_held(&what, hold, took);
            assert_eq!(peers(&servers[0], 9), all, "{what}: the same port again");
            drop((held, elsewhere));
        }
        check.end(&edge).unwrap();
    });
}

/// How many SYNs the guest has sent to a destination.
fn asked(eyes: &Sniffer, destination: SocketAddr) -> usize {
    let frames = eyes.frames();
    let sent = frames.iter().filter(|frame| frame.outgoing && frame.is_tcp_with(TcpFlags::SYN));
    sent.filter(|frame| frame.destination() == Some(destination)).count()
}

/// The public ports of the SYNs that went to a destination so far, in order.
fn syns(wire: &Sniffer, destination: SocketAddr) -> Vec<u16> {
    let frames = wire.frames();
    let to = frames.iter().filter(|f| f.is_tcp_with(TcpFlags::SYN) && f.destination() == Some(destination));
    to.map(|frame| frame.source().unwrap().port()).collect()
}

#[test]
fn a_half_open_connections_port_is_held_for_its_timer_which_retransmissions_do_not_prolong() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let guest = edge.topology.guest("vm1");
        let wire = edge.topology.sniff_internet().unwrap();
        let [silent, other] = SILENT.map(|address| at(address, 80));
        let try_once = |to| tcp_connect(guest, None, to, ONE_TRY).unwrap_err();
        let since = Instant::now();
        // Long enough for its SYN to be sent again.
        tcp_connect(guest, None, silent, Duration::from_millis(1300)).unwrap_err();
        assert_eq!(syns(&wire, silent).len(), 2, "{hook:?}: sent, and sent again");
        for _ in 0..7 {
            try_once(silent);
        }
        let sent = syns(&wire, silent);
        let all = BTreeSet::from_iter(sent.iter().copied());
        assert_eq!((sent.len(), all.len()), (9, 8), "{hook:?}: eight ports");
        try_once(silent);
        assert_eq!(syns(&wire, silent).len(), 9, "{hook:?}: held");
        for _ in 0..8 {
            try_once(other);
        }
        assert_eq!(BTreeSet::from_iter(syns(&wire, other)), all, "{hook:?}: all are free towards another");
        let (port, took) = first(since, || {
            try_once(silent);
            syns(&wire, silent).get(9).copied()
        });
        assert_held(&format!("{hook:?} half-open"), HALF_OPEN, took);
        assert_eq!(port, sent[0], "{hook:?}: the first that expired");
        assert_eq!(wire.lost(), 0);
        check.end(&edge).unwrap();
    });
}

#[test]
fn an_idle_udp_sockets_port_is_held_for_the_idle_time_and_until_then_serves_that_socket_towards_everyone() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let (guest, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
        let servers = [53, 54].map(|port| UdpEcho::start(internet, at(SERVER, port)).unwrap());
        let sockets: Vec<UdpSocket> =
            guest.enter(|| (0..8).map(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).collect());
        // One socket has one port, whatever it talks to: UDP ports are not shared between destinations.
        for server in [at(SERVER, 53), at(SERVER, 54)] {
            for socket in &sockets {
                socket.set_read_timeout(Some(LIMIT)).unwrap();
                socket.send_to(b"?", server).unwrap();
                socket.recv_from(&mut [0; 8]).unwrap();
            }
        }
        let [first_peers, second_peers] = servers.each_ref().map(UdpEcho::peers);
        assert_eq!(first_peers, second_peers, "{hook:?}: the same sockets, the same ports");
        assert_eq!(BTreeSet::from_iter(&first_peers).len(), 8, "{hook:?}: {first_peers:?}");
        assert!(first_peers.iter().all(|peer| peer.ip() == IpAddr::from([203, 0, 113, 10])), "{hook:?}");
        let quiet = Instant::now();
        for port in [53, 54, 55] {
            let ninth = udp_exchange(guest, None, at(SERVER, port), b"?", ONE_TRY).unwrap_err();
            assert_eq!(ninth.kind(), ErrorKind::TimedOut, "{hook:?}: no port for a ninth socket, to {port}");
        }
        let (_, took) = first(quiet, || udp_exchange(guest, None, at(SERVER, 53), b"?", ANSWERED).ok());
        // A mapping outlives its flows by up to an eighth, so that not every packet need touch it.
        println!("{hook:?} UDP: free again after {took:?} of {UDP:?}");
        assert!(took + EARLY >= UDP, "{hook:?}: {took:?}");
        check.end(&edge).unwrap();
    });
}
