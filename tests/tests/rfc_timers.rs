//! How long the profile `rfc` remembers, on the host engine, where time is ours: connections, sockets and queries (RFC 5382 REQ-5,
//! RFC 4787 REQ-5, RFC 5508 REQ-2), the ports behind them, and the same by `azure`.

use std::net::Ipv4Addr;

use portcullis_common::Reason;
use portcullis_common::clock::{GRACE, ticks};
use portcullis_tests::backend::{Action, At, Backend, HostBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Frame, TcpFlags};

const POLICY: &str = r#"
virtualNetworks: [{ name: lab, addressSpace: { addressPrefixes: [10.0.0.0/16] }, subnets: [{ name: web, addressPrefix: 10.0.1.0/24, networkSecurityGroup: closed }] }]
networkSecurityGroups: [{ name: closed, securityRules: [] }]
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
const OTHER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);
const START: u32 = 1_000_000;
const TICK: u64 = 1 << 26;

struct Gateway(HostBackend);

impl Gateway {
    fn new(profile: &str) -> Self {
        let backend = HostBackend::new(&format!("{POLICY}snat: {{ profile: {profile} }}\n")).unwrap();
        backend.env.set_now(START);
        Self(backend)
    }

    /// So many whole seconds after the start.
    fn at(&self, seconds: u64) {
        self.0.env.set_now(START + (seconds * 1_000_000_000 / TICK) as u32);
    }

    fn send(&mut self, device: &'static str, frame: &[u8]) -> Option<Frame> {
        let outcome = self.0.run(At::Ingress(device), frame).unwrap();
        let sent = (outcome.action == Action::Send).then(|| Frame::parse(outcome.frame));
        // What goes back to the guest says that nothing has been sent on.
        sent.filter(|sent| sent.destination_mac != VM1 || device == "up")
    }

    /// A segment of the guest's, with its sequence number and what it acknowledges; the port under which it leaves.
    fn says(&mut self, socket: u16, to: Ipv4Addr, flags: TcpFlags, [seq, ack]: [u32; 2]) -> Option<u16> {
        let frame = Craft::new(VM1, V1, GATEWAY, to).tcp(socket, 80, flags, seq, ack, b"");
        self.send("vm1", &frame).map(|sent| sent.source().unwrap().port())
    }

    /// The first one of a connection.
    fn calls(&mut self, socket: u16, to: Ipv4Addr) -> Option<u16> {
        self.says(socket, to, TcpFlags::SYN, [1, 0])
    }

    /// A segment of a server's; does it arrive?
    fn hears(&mut self, from: Ipv4Addr, port: u16, flags: TcpFlags, [seq, ack]: [u32; 2]) -> bool {
        let frame = Craft::new(ROUTER_MAC, from, GATEWAY, LB).tcp(80, port, flags, seq, ack, b"");
        self.send("up", &frame).is_some()
    }

    fn connects(&mut self, socket: u16, to: Ipv4Addr) -> u16 {
        let port = self.calls(socket, to).expect("there is a port");
        assert!(self.hears(to, port, TcpFlags::SYN_ACK, [100, 2]));
        assert_eq!(self.says(socket, to, TcpFlags::ACK, [2, 101]), Some(port));
        port
    }

    /// Both sides send a FIN, and acknowledge the other's.
    fn closes(&mut self, socket: u16, to: Ipv4Addr, port: u16) {
        let fin = TcpFlags { fin: true, ..TcpFlags::ACK };
        assert_eq!(self.says(socket, to, fin, [2, 101]), Some(port));
        assert!(self.hears(to, port, fin, [101, 3]));
        assert_eq!(self.says(socket, to, TcpFlags::ACK, [3, 102]), Some(port));
    }

    /// How many ports ten new sockets find; is this one among them?
    fn others(&mut self, first: u16, own: u16) -> (usize, bool) {
        let mut taken: Vec<_> = (first..first + 10).filter_map(|socket| self.calls(socket, SERVER)).collect();
        taken.sort_unstable();
        taken.dedup();
        (taken.len(), taken.contains(&own))
    }

    /// How many of ten new sockets find a port.
    fn free(&mut self, first: u16) -> usize {
        (first..first + 10).filter(|socket| self.calls(*socket, SERVER).is_some()).count()
    }
}

#[test]
fn in_rfc_an_established_connection_is_remembered_for_two_hours_and_four_minutes_and_in_azure_for_four_minutes()
 {
    for (profile, seconds) in [("rfc", 7440), ("azure", 240)] {
        let mut t = Gateway::new(profile);
        let port = t.connects(5000, SERVER);
        t.at(seconds);
        assert!(t.hears(SERVER, port, TcpFlags::ACK, [101, 2]), "{profile}: silent for {seconds} s");
        t.at(2 * seconds + 2);
        assert!(!t.hears(SERVER, port, TcpFlags::ACK, [101, 2]), "{profile}: silent for longer");
    }
}

#[test]
fn in_rfc_a_half_open_connection_and_a_reset_one_are_remembered_for_four_minutes_a_socket_for_five_and_a_query_for_one()
 {
    let mut t = Gateway::new("rfc");
    let port = t.calls(5000, SERVER).unwrap();
    let reset = t.connects(5001, SERVER);
    assert_eq!(t.says(5001, SERVER, TcpFlags { ack: true, ..TcpFlags::RST }, [2, 101]), Some(reset));
    let datagram = Craft::new(VM1, V1, GATEWAY, SERVER).udp(5000, 53, b"?");
    let socket = t.send("vm1", &datagram).unwrap().source().unwrap().port();
    let answer = Craft::new(ROUTER_MAC, SERVER, GATEWAY, LB).udp(53, socket, b"!");
    let query = Craft::new(VM1, V1, GATEWAY, SERVER).echo_request(9, 1, b"?");
    let asked = t.send("vm1", &query).unwrap();
    let portcullis_tests::lab::Transport::Icmp { id, .. } = asked.ip.unwrap().transport else { panic!() };
    let reply = Craft::new(ROUTER_MAC, SERVER, GATEWAY, LB).icmp(
        0,
        0,
        [id.to_be_bytes()[0], id.to_be_bytes()[1], 0, 1],
        b"?",
    );
    t.at(60);
    assert!(t.send("up", &reply).is_some(), "a reply after a minute");
    t.at(240);
    assert!(t.hears(SERVER, reset, TcpFlags::ACK, [101, 2]), "after a RST");
    assert!(t.hears(SERVER, port, TcpFlags::SYN_ACK, [100, 2]), "an answer to a SYN");
    t.at(300);
    assert!(t.send("up", &answer).is_some(), "an answer to a datagram");
}

#[test]
fn in_rfc_a_sockets_port_is_its_own_as_long_as_a_connection_lives_and_free_four_minutes_after_the_last_has_ended()
 {
    let mut t = Gateway::new("rfc");
    let port = t.connects(5000, SERVER);
    assert_eq!(t.connects(5000, OTHER), port);
    t.closes(5000, SERVER, port);
    for socket in 5001..5008 {
        t.calls(socket, SERVER).expect("there are eight ports");
    }
    // One connection is left and silent: nobody else is given its port, and the socket still has it.
    for seconds in [250, 2000, 7000] {
        t.at(seconds);
        assert_eq!(t.others(6000 + seconds as u16, port), (7, false), "{seconds} s");
    }
    assert_eq!(t.calls(5000, Ipv4Addr::new(198, 51, 100, 9)), Some(port));
    t.closes(5000, OTHER, port);
    // Now the last one has ended: four minutes, and the port is anybody's.
    t.at(7000 + 239);
    assert_eq!(t.free(20000), 0, "all eight are held");
    t.at(7000 + 241);
    assert_eq!(t.free(30000), 8);
    assert!(ticks(240) as u64 * TICK + 2 * (GRACE as u64 + 2) * TICK < 241_000_000_000);
}

#[test]
fn in_rfc_what_a_group_refuses_keeps_no_port_alive() {
    let mut t = Gateway::new("rfc");
    let datagram = Craft::new(VM1, V1, GATEWAY, SERVER).udp(5000, 53, b"?");
    let port = t.send("vm1", &datagram).unwrap().source().unwrap().port();
    let stranger = Craft::new(ROUTER_MAC, OTHER, GATEWAY, LB).udp(53, port, b"!");
    for seconds in (10..=340).step_by(10) {
        t.at(seconds);
        assert!(t.send("up", &stranger).is_none());
    }
    let denied = t.0.env.counted(Reason::DeniedByRule).packets;
    let gone = t.0.env.counted(Reason::NoFlow).packets;
    assert_eq!(denied + gone, 34);
    assert!(gone > 0, "the port is nobody's after five minutes and an eighth, whoever knocks");
}

#[test]
fn in_rfc_a_simultaneous_open_is_an_established_connection_and_keeps_its_port() {
    let mut t = Gateway::new("rfc");
    let port = t.calls(5000, SERVER).unwrap();
    assert!(t.hears(SERVER, port, TcpFlags::SYN, [100, 0]));
    assert_eq!(t.says(5000, SERVER, TcpFlags::SYN_ACK, [1, 101]), Some(port));
    assert!(t.hears(SERVER, port, TcpFlags::SYN_ACK, [100, 2]));
    t.at(7000);
    assert_eq!(t.others(6000, port), (7, false), "the eighth port has a connection");
    assert!(t.hears(SERVER, port, TcpFlags::ACK, [101, 2]));
    assert_eq!(t.calls(5000, OTHER), Some(port));
}

#[test]
fn in_rfc_a_socket_keeps_its_port_over_a_connection_that_one_side_has_closed_for_long() {
    let mut t = Gateway::new("rfc");
    let port = t.connects(5000, SERVER);
    assert!(t.hears(SERVER, port, TcpFlags { fin: true, ..TcpFlags::ACK }, [101, 2]));
    assert_eq!(t.says(5000, SERVER, TcpFlags::ACK, [2, 102]), Some(port));
    for seconds in (1000..=30_000).step_by(1000) {
        t.at(seconds);
        assert_eq!(t.says(5000, SERVER, TcpFlags::ACK, [2, 102]), Some(port), "{seconds} s");
        assert!(t.hears(SERVER, port, TcpFlags::ACK, [102, 2]), "{seconds} s");
    }
    assert_eq!(t.others(6000, port), (7, false));
    assert_eq!(t.calls(5000, OTHER), Some(port));
}

#[test]
fn in_rfc_a_socket_keeps_its_port_for_a_connection_that_is_opened_anew_as_long_as_that_opens() {
    let mut t = Gateway::new("rfc");
    let port = t.connects(5000, SERVER);
    t.closes(5000, SERVER, port);
    t.at(230);
    assert_eq!(t.says(5000, SERVER, TcpFlags::SYN, [500, 0]), Some(port));
    t.at(460);
    assert_eq!(t.others(6000, port), (7, false), "the eighth port has a connection that opens");
    assert!(t.hears(SERVER, port, TcpFlags::SYN_ACK, [700, 501]));
    assert_eq!(t.says(5000, SERVER, TcpFlags::ACK, [501, 701]), Some(port));
    t.at(7460);
    assert_eq!(t.others(7000, port), (7, false), "it is established");
    assert!(t.hears(SERVER, port, TcpFlags::ACK, [701, 501]));
}
