//! What a guest is told that finds no port (`snat.onExhaustion`), as its own kernel tells its sockets: nothing, a reset, or an
//! error by ICMP. From guests that complete their checksums and from guests that leave that to the device.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};

use portcullis_tests::edge::{Edge, HookCheck, WithHook, under_both};
use portcullis_tests::frontends::{Frontends, SERVER6};
use portcullis_tests::lab::{
    Links, Namespace, Sniffer, TcpEcho, TcpFlags, TcpHold, Transport, UdpEcho, tcp_connect, tcp_exchange,
    udp_exchange, udp_socket,
};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at};

/// vm1 and vm2 have eight ports each, of either protocol and family.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm1/v6, vm2/v4, vm2/v6] }]
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }
";

fn told(word: &str) -> String {
    format!("{REST}snat: {{ onExhaustion: {word} }}\n")
}

/// How a refusal looks to whoever is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Silence,
    Reset,
    /// Type 3 code 13: Linux says EHOSTUNREACH; ICMPv6 type 1 code 1: EACCES.
    Prohibited,
    /// The same, heard only when the SYN is sent again: over a veth the first error arrives while connect(2) has the socket, and
    /// Linux's TCP of IPv6 then lets it go (`LockDroppedIcmps`).
    ProhibitedTwice,
}

/// Asserts that a refused flow ends this way, after so many packets of the guest's: with the first, if it is told anything.
fn assert_refused(what: &str, how: Refusal, to: SocketAddr, packets: usize, error: &io::Error) {
    let prohibited = if to.is_ipv4() { libc::EHOSTUNREACH } else { libc::EACCES };
    let is = match how {
        Refusal::Silence => error.kind() == ErrorKind::TimedOut && packets == 1,
        Refusal::Reset => error.raw_os_error() == Some(libc::ECONNREFUSED) && packets == 1,
        Refusal::Prohibited => error.raw_os_error() == Some(prohibited) && packets == 1,
        Refusal::ProhibitedTwice => error.raw_os_error() == Some(prohibited) && packets == 2,
    };
    assert!(is, "{what}: {how:?} is not {error} after {packets} packets");
}

/// ICMP errors that a guest's kernel did not look at because the socket was in the middle of a system call.
fn unheard(guest: &Namespace) -> usize {
    let text = guest.enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "LockDroppedIcmps").unwrap().1.parse().unwrap()
}

/// SYNs that a guest has sent to a server.
fn syns(eyes: &Sniffer, server: SocketAddr) -> usize {
    let frames = eyes.frames();
    let sent = frames.iter().filter(|frame| frame.outgoing && frame.is_tcp_with(TcpFlags::SYN));
    sent.filter(|frame| frame.destination() == Some(server)).count()
}

/// Uses up vm1's ports towards both servers, sees how one flow more is refused as the policy changes.
fn exhaust_and_ask(edge: &Edge, lab: &Frontends, who: &str) {
    let (guest, world) = (edge.topology.guest("vm1"), edge.topology.internet());
    let eyes = edge.topology.sniff_guest("vm1").unwrap();
    let servers: [SocketAddr; 2] = [at(SERVER, 80), at(SERVER6, 80)];
    let _tcp = servers.map(|address| TcpEcho::start(world, address).unwrap());
    let _udp = servers.map(|address| UdpEcho::start(world, address).unwrap());
    let mut live: Vec<TcpHold> =
        servers.iter().map(|server| TcpHold::open(guest, *server, 8, LIMIT).unwrap()).collect();
    let sockets: Vec<UdpSocket> = servers
        .iter()
        .flat_map(|server| [server; 8])
        .map(|server| {
            let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = udp_socket(guest, any.parse().expect("a literal")).unwrap();
            socket.connect(*server).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket
        })
        .collect();
    let talk = |what: &str| {
        for socket in &sockets {
            socket.send(b"live").unwrap_or_else(|error| panic!("{what}: {error}"));
            socket.recv(&mut [0; 8]).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    };
    talk(who);
    for (word, of_tcp, of_udp) in [
        ("silent", Refusal::Silence, Refusal::Silence),
        ("reset", Refusal::Reset, Refusal::Prohibited),
        ("icmp", Refusal::Prohibited, Refusal::Prohibited),
    ] {
        apply(edge, &lab.yaml(&told(word)));
        for server in servers {
            let what = format!("{who}, {word}, {server}");
            let of_tcp = match of_tcp {
                Refusal::Prohibited if server.is_ipv6() => Refusal::ProhibitedTwice,
                other => other,
            };
            let limit = if of_tcp == Refusal::Silence { SOON } else { LIMIT };
            for _ in 0..2 {
                eyes.clear();
                let error = tcp_connect(guest, None, server, limit).unwrap_err();
                assert_refused(&format!("{what}: TCP"), of_tcp, server, syns(&eyes, server), &error);
            }
            let limit = if of_udp == Refusal::Silence { SOON } else { LIMIT };
            // Odd lengths, because checksums are of pairs.
            for length in [1, 2, 33, 400] {
                let error = udp_exchange(guest, None, server, &vec![0xa5; length], limit).unwrap_err();
                assert_refused(&format!("{what}: UDP, {length} bytes"), of_udp, server, 1, &error);
            }
            // Longer than an error may quote.
            let error = udp_exchange(guest, None, server, &[0xa5; 1000], SOON).unwrap_err();
            assert_refused(&format!("{what}: a long datagram"), Refusal::Silence, server, 1, &error);
            // It is one guest's problem.
            tcp_exchange(edge.topology.guest("vm2"), None, server, b"neighbour", LIMIT).unwrap();
        }
        for hold in &mut live {
            assert_eq!(hold.alive(LIMIT), 8, "{who}, {word}: live flows go on");
        }
        talk(&format!("{who}, {word}"));
    }
}

/// The ICMP errors that a guest got so far, and how many of them have a checksum that holds as it is.
fn errors(eyes: &Sniffer) -> (usize, usize) {
    let mut frames = eyes.frames();
    frames.retain(|frame| {
        !frame.outgoing
            && frame.ip.as_ref().is_some_and(|ip| {
                matches!(
                    (ip.protocol, ip.transport),
                    (1, Transport::Icmp { kind: 3, code: 13, .. })
                        | (58, Transport::Icmp { kind: 1, code: 1, .. })
                )
            })
    });
    (frames.len(), frames.iter().filter(|frame| frame.checksums_ok()).count())
}

/// Asserts that vm1 was told by ICMP as often as it was refused, with checksums that hold.
fn assert_told(who: &str, edge: &Edge, eyes: &Sniffer) {
    let (told, good) = errors(eyes);
    let unheard = unheard(edge.topology.guest("vm1"));
    println!("{who}: {told} errors by ICMP; {unheard} came while the socket was in a system call");
    // Four datagrams twice and two connects once, of two families; and what had to be said again.
    assert!((20..=20 + unheard).contains(&told), "{who}: {told}, {unheard}");
    assert_eq!(good, told, "{who}: checksums hold");
}

fn lab(hook: WithHook) -> Frontends {
    Frontends::new(hook, &[1, 1]).with_ipv6()
}

#[test]
fn a_refused_guest_hears_nothing_a_reset_or_an_icmp_error_at_once_as_the_policy_says() {
    under_both(|hook| {
        let lab = lab(hook);
        let edge = lab.start(&told("silent"));
        let eyes = edge.topology.sniff_guest("vm1").unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        exhaust_and_ask(&edge, &lab, &format!("{hook:?}"));
        check.end(&edge).unwrap();
        assert_told(&format!("{hook:?}"), &edge, &eyes);
        assert!(eyes.bad_checksums().is_empty(), "{hook:?}: {:?}", eyes.bad_checksums());
    });
}

#[test]
fn a_container_whose_checksums_are_left_to_the_device_is_told_the_same_in_errors_its_kernel_accepts() {
    let mut lab = lab(WithHook::Auto);
    lab.links = Links::ContainerVeth;
    let edge = lab.start(&told("silent"));
    let check = HookCheck::begin(&edge, WithHook::Auto).unwrap();
    exhaust_and_ask(&edge, &lab, "container");
    check.end(&edge).unwrap();
}

#[test]
fn an_icmp_error_about_a_packet_with_a_partial_checksum_has_a_right_one_once_the_device_has_completed_it() {
    let mut lab = lab(WithHook::Tc);
    lab.links = Links::ContainerVeth;
    let edge = lab.start(&told("silent"));
    // The guest leaves checksums to its device; the gateway's end completes them before it sends, as a NIC does, and
    // the guest's kernel has to check what comes.
    edge.topology.gateway().run(&["ethtool", "-K", "pc-vm1", "tx", "off"]).unwrap();
    let eyes = edge.topology.sniff_guest("vm1").unwrap();
    exhaust_and_ask(&edge, &lab, "completed");
    assert_told("completed", &edge, &eyes);
    let mut partial = eyes.frames();
    partial.retain(|frame| frame.outgoing && frame.partial);
    assert!(partial.len() >= 20, "the guest's checksums were partial: {}", partial.len());
}
