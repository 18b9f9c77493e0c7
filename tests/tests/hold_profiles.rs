//! When a port may be used again towards the same destination, by the two profiles of hold-down (azure.md §2.4), on the host
//! engine, where time is ours: FIN, RST, half-open, UDP. Towards another destination a TCP port is free at once.

use std::net::Ipv4Addr;

use portcullis_common::Reason;
use portcullis_common::clock::{GRACE, ticks};
use portcullis_tests::backend::{Action, At, Backend, HostBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Frame, TcpFlags};

const POLICY: &str = r#"
virtualNetworks: [{ name: lab, addressSpace: { addressPrefixes: [10.0.0.0/16] }, subnets: [{ name: web, addressPrefix: 10.0.1.0/24 }] }]
networkInterfaces: [{ name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.4 }] }]
publicIPAddresses: [{ name: pip, ipAddress: 203.0.113.10, announce: proxy }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }]
uplinks: [{ device: up }]
"#;

const VM1: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0xaa, 0];
const LB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const V1: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);
const START: u32 = 1_000_000;

/// An engine on which all eight ports are in use towards one destination.
struct Full {
    backend: HostBackend,
    /// Public ports of the eight flows.
    ports: Vec<u16>,
}

impl Full {
    fn new(profile: &str, udp: bool) -> Self {
        let backend = HostBackend::new(&format!("{POLICY}snat: {{ profile: {profile} }}\n")).unwrap();
        let mut full = Self { backend, ports: Vec::new() };
        full.at(START);
        for port in 0..8 {
            let frame = if udp { from(SERVER).udp(2000 + port, 80, b"x") } else { syn(SERVER, 2000 + port) };
            let sent = full.send("vm1", &frame).expect("there are eight ports");
            full.ports.push(sent.source().unwrap().port());
        }
        full
    }

    fn at(&mut self, tick: u32) {
        self.backend.env.set_now(tick);
    }

    /// The frame as it leaves, if it does.
    fn send(&mut self, device: &'static str, frame: &[u8]) -> Option<Frame> {
        let outcome = self.backend.run(At::Ingress(device), frame).unwrap();
        (outcome.action == Action::Send).then(|| Frame::parse(outcome.frame))
    }

    /// An answer of the server to flow `n`: SYN or FIN, which acknowledges what ends with `number`.
    fn answer(&mut self, n: u16, flags: TcpFlags, number: u32) {
        let port = self.ports[usize::from(n)];
        let frame = Craft::new(ROUTER_MAC, SERVER, GATEWAY, LB).tcp(80, port, flags, number - 1, number, b"");
        self.send("up", &frame).expect("the flow lives");
    }

    /// A further packet of flow `n`, with both sides at `number`.
    fn says(&mut self, n: u16, flags: TcpFlags, number: u32) {
        let frame = from(SERVER).tcp(2000 + n, 80, flags, number, number, b"");
        self.send("vm1", &frame).expect("the flow lives");
    }

    /// `None` until `after` ticks from the start, and the ports of these flows afterwards, as many as there are.
    fn comes_back(&mut self, what: &str, frames: &[Vec<u8>], after: u32, slack: u32, expected: &[u16]) {
        // Long enough after the look before it that its refusal is forgotten, and before the hold ends.
        self.at(START + after - 1);
        assert!(self.send("vm1", &frames[0]).is_none(), "{what}: too early");
        self.at(START + after + 1 + GRACE + slack + 8);
        let mut got: Vec<u16> = frames[1..]
            .iter()
            .map_while(|frame| self.send("vm1", frame))
            .map(|sent| sent.source().unwrap().port())
            .collect();
        got.sort_unstable();
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(got, expected, "{what}");
    }
}

fn from(destination: Ipv4Addr) -> Craft {
    Craft::new(VM1, V1, GATEWAY, destination)
}

fn syn(destination: Ipv4Addr, port: u16) -> Vec<u8> {
    from(destination).tcp(port, 80, TcpFlags::SYN, 1, 0, b"")
}

/// SYNs of ten further sockets.
fn others() -> Vec<Vec<u8>> {
    (0..10).map(|n| syn(SERVER, 3000 + n)).collect()
}

#[test]
fn ports_of_tcp_are_held_towards_their_destination_as_long_as_each_profile_says() {
    for (profile, fin, rst, half_open) in [("azure", 240, 15, 30), ("natgateway", 65, 16, 30)] {
        // Four hours without a word would be idle: 4 minutes are, so what must live is kept alive below.
        let mut t = Full::new(profile, false);
        for n in 0..8 {
            t.answer(n, TcpFlags::SYN_ACK, 2);
            t.says(n, TcpFlags::ACK, 2);
        }
        assert!(t.send("vm1", &syn(SERVER, 4000)).is_none(), "no port is left");
        assert!(t.send("vm1", &syn(ELSEWHERE, 4000)).is_some(), "towards others all are");

        t.says(0, TcpFlags { ack: true, ..TcpFlags::RST }, 2);
        let port = t.ports[0];
        t.comes_back(&format!("{profile}: RST"), &others()[..4], ticks(rst), 0, &[port]);

        let mut t = Full::new(profile, false);
        for n in 0..8 {
            t.answer(n, TcpFlags::SYN_ACK, 2);
            t.says(n, TcpFlags::ACK, 2);
        }
        t.says(1, TcpFlags::FIN_ACK, 2);
        t.answer(1, TcpFlags::FIN_ACK, 3);
        t.says(1, TcpFlags::ACK, 3);
        // The others go on.
        t.at(START + ticks(fin) / 2);
        for n in (0..8).filter(|&n| n != 1) {
            t.says(n, TcpFlags::ACK, 2);
        }
        let port = t.ports[1];
        t.comes_back(&format!("{profile}: FIN"), &others()[..4], ticks(fin), 0, &[port]);

        let mut t = Full::new(profile, false);
        for n in 0..6 {
            t.answer(n, TcpFlags::SYN_ACK, 2);
            t.says(n, TcpFlags::ACK, 2);
        }
        let ports = [t.ports[6], t.ports[7]];
        t.comes_back(&format!("{profile}: half open"), &others()[..5], ticks(half_open), 0, &ports);
    }
}

#[test]
fn a_udp_port_stays_with_its_socket_while_idle_and_by_natgateway_65_seconds_longer() {
    for (profile, hold) in [("azure", 0), ("natgateway", 65)] {
        let mut t = Full::new(profile, true);
        let sockets: Vec<Vec<u8>> = (0..10).map(|n| from(SERVER).udp(3000 + n, 80, b"x")).collect();
        let hold = if hold == 0 { 0 } else { ticks(hold) };
        let ports = t.ports.clone();
        // The mapping is moved ahead of its flows by an eighth of the idle time, so that not every packet has to touch it.
        let eighth = (ticks(240) >> 3) | 1;
        t.comes_back(profile, &sockets, ticks(240) + hold, eighth, &ports);
        let count = t.backend.env.counted(Reason::SnatExhausted).packets;
        assert_eq!(count, 2, "{profile}: the one too early and the ninth");
    }
}
