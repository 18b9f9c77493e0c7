//! Packets in one direction only, either one, hold a flow and its port for as long as they come; silence does not.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{Craft, Frame, RawSender, Sniffer, TcpFlags, TopologySpec, ping, udp_socket};

const LIMIT: Duration = Duration::from_secs(5);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const TIMEOUTS: &str = "timeouts: { tcpEstablishedSeconds: 2, udpSeconds: 2 }\n";
/// More than three times the idle time, and than the eighth more that a mapping has.
const PERIOD: Duration = Duration::from_millis(6500);
const PAUSE: Duration = Duration::from_millis(400);

fn start(hook: WithHook) -> Edge {
    let spec = TopologySpec::clean_veth(2);
    let mut policy = LabPolicy::new(hook);
    policy.ports = 8;
    policy.extra = TIMEOUTS.to_owned();
    let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
    edge.topology.internet().ip("route add blackhole 192.0.2.0/24").unwrap();
    for guest in ["vm1", "vm2"] {
        let reached = ping(edge.topology.guest(guest), SERVER.into(), 2, LIMIT).unwrap();
        assert!(reached.received > 0, "{guest}: {reached:?}");
    }
    edge
}

/// Calls `keep` every 400 ms for more than three idle times; how often.
fn for_a_while(mut keep: impl FnMut(u32)) -> u32 {
    let (began, mut times) = (Instant::now(), 0);
    while began.elapsed() < PERIOD {
        keep(times);
        times += 1;
        std::thread::sleep(PAUSE);
    }
    times
}

#[test]
fn udp_datagrams_of_one_direction_hold_the_port_and_a_silent_socket_loses_it() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let (guest, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
        let inside = || {
            let socket = udp_socket(guest, (Ipv4Addr::UNSPECIFIED, 0).into()).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket
        };
        // A server that says only what it is told to.
        let server = udp_socket(internet, (SERVER, 53).into()).unwrap();
        server.set_read_timeout(Some(LIMIT)).unwrap();
        let mut buffer = [0; 64];
        let [outbound, inbound, silent] = [inside(), inside(), inside()];
        let [out_at, in_at, silent_at] = [&outbound, &inbound, &silent].map(|socket| {
            socket.send_to(b"hello", (SERVER, 53)).unwrap();
            server.recv_from(&mut [0; 64]).unwrap().1
        });
        let times = for_a_while(|number| {
            outbound.send_to(&number.to_be_bytes(), (SERVER, 53)).unwrap();
            assert_eq!(server.recv_from(&mut buffer).unwrap(), (4, out_at), "{hook:?}: still under its port");
            server.send_to(&number.to_be_bytes(), in_at).unwrap();
            let got = inbound.recv_from(&mut buffer).map(|(length, _)| buffer[..length].to_vec());
            assert_eq!(got.ok(), Some(number.to_be_bytes().into()), "{hook:?}: still reached");
        });
        println!("{hook:?}: {times} datagrams each way");
        // And the other direction still works.
        server.send_to(b"answer", out_at).unwrap();
        assert_eq!(outbound.recv_from(&mut buffer).unwrap().0, 6, "{hook:?}");
        inbound.send_to(b"answer", (SERVER, 53)).unwrap();
        assert_eq!(server.recv_from(&mut buffer).unwrap(), (6, in_at), "{hook:?}: under the same port");
        let before = edge.reason("no_flow").unwrap();
        server.send_to(b"too late", silent_at).unwrap();
        silent.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        assert!(silent.recv_from(&mut buffer).is_err(), "{hook:?}: silence holds nothing");
        assert_eq!(edge.reason("no_flow").unwrap(), before + 1, "{hook:?}");
        check.end(&edge).unwrap();
    });
}

/// Both ends of connections made of frames alone: a kernel that has a socket acknowledges whatever comes, so no real
/// one is ever silent in one direction.
struct Ends<'a> {
    guest: RawSender,
    world: RawSender,
    from_guest: Craft,
    from_world: Craft,
    /// What arrives at the world, and at the guest.
    at_world: &'a Sniffer,
    at_guest: &'a Sniffer,
}

const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

impl Ends<'_> {
    /// A segment of the guest's; the public address and port it arrived from.
    fn out(&self, source: u16, flags: TcpFlags, word: &[u8]) -> Option<SocketAddr> {
        self.at_world.clear();
        self.guest.send(&self.from_guest.tcp(source, 80, flags, 1, 1, word)).unwrap();
        let to_peer = |f: &Frame| f.destination() == Some((PEER, 80).into()) && f.payload() == word;
        self.at_world.wait_for(LIMIT, to_peer)?.source()
    }

    /// A segment of the world's to a public port; did it arrive at the guest's own?
    fn back(&self, public: u16, flags: TcpFlags, word: &[u8], source: u16, within: Duration) -> bool {
        self.at_guest.clear();
        self.world.send(&self.from_world.tcp(80, public, flags, 1, 2, word)).unwrap();
        let own = SocketAddr::from((self.from_guest.source, source));
        let to_guest = |f: &Frame| f.destination() == Some(own) && f.payload() == word;
        self.at_guest.wait_for(within, to_guest).is_some()
    }

    /// Opens a connection; its public port.
    fn open(&self, source: u16) -> u16 {
        let public = self.out(source, TcpFlags::SYN, b"").expect("the SYN arrives");
        assert_eq!(public.ip(), FRONTEND);
        assert!(self.back(public.port(), TcpFlags::SYN_ACK, b"", source, LIMIT), "the answer arrives");
        assert_eq!(self.out(source, TcpFlags::ACK, b""), Some(public));
        public.port()
    }
}

#[test]
fn tcp_segments_of_one_direction_hold_the_connection_and_a_silent_one_is_lost() {
    under_both(|hook| {
        let edge = start(hook);
        let (guest, internet) = (edge.topology.guest("vm2"), edge.topology.internet());
        let spec = edge.topology.guest_spec("vm2").clone();
        // The guest's kernel must not answer for it.
        guest.ip(&format!("address del {}/24 dev eth0", spec.address)).unwrap();
        let (at_world, at_guest) =
            (edge.topology.sniff_internet().unwrap(), edge.topology.sniff_guest("vm2").unwrap());
        let ends = Ends {
            guest: RawSender::open(guest, "eth0").unwrap(),
            world: RawSender::open(internet, "eth0").unwrap(),
            from_guest: Craft::new(spec.mac, spec.address, spec.gateway_mac, PEER),
            from_world: Craft::new(TopologySpec::INTERNET_MAC, PEER, TopologySpec::UPLINK_MAC, FRONTEND),
            at_world: &at_world,
            at_guest: &at_guest,
        };
        let check = HookCheck::begin(&edge, hook).unwrap();
        let [outbound, inbound, silent] = [5001, 5002, 5003].map(|source| ends.open(source));
        let times = for_a_while(|_| {
            let from = ends.out(5001, TcpFlags::ACK, b"keep");
            assert_eq!(from, Some((FRONTEND, outbound).into()), "{hook:?}: still under its port");
            assert!(ends.back(inbound, TcpFlags::ACK, b"keep", 5002, LIMIT), "{hook:?}: still reached");
        });
        println!("{hook:?}: {times} segments each way");
        assert!(ends.back(outbound, TcpFlags::ACK, b"answer", 5001, LIMIT), "{hook:?}");
        assert_eq!(ends.out(5002, TcpFlags::ACK, b"answer"), Some((FRONTEND, inbound).into()), "{hook:?}");
        let before = edge.reason("no_flow").unwrap();
        let late = ends.back(silent, TcpFlags::ACK, b"too late", 5003, Duration::from_millis(500));
        assert!(!late, "{hook:?}: silence holds nothing");
        assert_eq!(edge.reason("no_flow").unwrap(), before + 1, "{hook:?}");
        check.end(&edge).unwrap();
    });
}
