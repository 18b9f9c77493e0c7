//! The same table of packets on the host engine, under XDP and under TC: verdict, packet out, every counter that moved,
//! every rule that was hit.

use std::net::Ipv4Addr;

use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_common::packet::checksum;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, TcpFlags};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = r#"
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets:
      - { name: web, addressPrefix: 10.0.1.0/24, networkSecurityGroup: web }
      - { name: db, addressPrefix: 10.0.2.0/24, networkSecurityGroup: db }
      - { name: bare, addressPrefix: 10.0.3.0/24 }
networkInterfaces:
  - name: vm1
    device: vm1
    macAddress: 02:00:00:00:00:01
    ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.4 }]
  - name: vm2
    device: vm2
    networkSecurityGroup: vm2-nic
    ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.5 }]
  - name: vm3
    device: vm3
    macAddress: 02:00:00:00:00:03
    ipConfigurations: [{ subnet: db, privateIPAddress: 10.0.2.4, publicIPAddress: pip3 }]
  - name: vm4
    device: vm4
    macAddress: 02:00:00:00:00:04
    ipConfigurations: [{ subnet: bare, privateIPAddress: 10.0.3.4 }]
networkSecurityGroups:
  - name: web
    securityRules:
      - { name: DenySmtp, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: Internet, destinationPortRange: 25 }
  - name: vm2-nic
    securityRules:
      - { name: DenyMdns, priority: 200, direction: Outbound, access: Deny, protocol: Udp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 5353 }
      - { name: DenyFromVm1, priority: 300, direction: Inbound, access: Deny, protocol: Tcp, sourceAddressPrefix: 10.0.1.4, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 8080 }
  - name: db
    securityRules:
      - { name: AllowPostgres, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: 10.0.1.0/24, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 5432 }
      - { name: AllowHttps, priority: 110, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: 10.0.2.4, destinationPortRange: 443 }
      - { name: DenyVnet, priority: 120, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: VirtualNetwork, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.20, announce: proxy }
  - { name: spare, ipAddress: 203.0.113.30, announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]
uplinks:
  - { device: up }
hostAccess: { dhcp: true, dns: true, echo: true }
"#;

const DEVICES: [&str; 5] = ["vm1", "vm2", "vm3", "vm4", "up"];
const VM1: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VM2: [u8; 6] = [2, 0, 0, 0, 0, 2];
const VM3: [u8; 6] = [2, 0, 0, 0, 0, 3];
const VM4: [u8; 6] = [2, 0, 0, 0, 0, 4];
const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0xaa, 0];

const LB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const PIP3: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("a literal")
}

fn from(mac: [u8; 6], source: &str, destination: &str) -> Craft {
    Craft::new(mac, ip(source), GATEWAY_MAC, ip(destination))
}

fn world(destination: Ipv4Addr) -> Craft {
    Craft::new(ROUTER_MAC, SERVER, [2, 0, 0, 0, 0xaa, 4], destination)
}

/// What is expected to come out.
enum Out {
    Pass,
    Drop,
    /// Sent with this source and destination; `None` for a source port means one that SNAT chose.
    Sent {
        source: (Ipv4Addr, Option<u16>),
        destination: (Ipv4Addr, u16),
        mac: [u8; 6],
    },
    /// An ARP reply saying that `.0` is at our address, for `.1`.
    ArpReply(Ipv4Addr, [u8; 6]),
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    /// Runs one case and checks verdict, packet, *all* counters and *all* rule hits. Returns the source port it left with.
    fn case(&mut self, name: &str, at: At, frame: &[u8], out: Out, reason: Reason, rules: &[&str]) -> u16 {
        let outcome = self.0.run(name, at, frame, reason, rules);
        let who = format!("{} on {}", name, self.0.backend.name());
        let mut port = 0;
        match out {
            Out::Pass => {
                assert_eq!(outcome.action, Action::Pass, "{who}");
                assert_eq!(outcome.frame, frame, "{who}: a passed packet is untouched");
            }
            Out::Drop => assert_eq!(outcome.action, Action::Drop, "{who}"),
            Out::Sent { source, destination, mac } => {
                assert_eq!(outcome.action, Action::Send, "{who}");
                port = check_sent(&who, frame, &outcome.frame, source, destination, mac);
            }
            Out::ArpReply(asked, asker) => {
                assert_eq!(outcome.action, Action::Send, "{who}");
                let f = &outcome.frame;
                assert_eq!(
                    (&f[0..6], &f[20..22]),
                    (&asker[..], &[0u8, 2][..]),
                    "{who}: a reply to the asker"
                );
                assert_eq!(&f[28..32], &asked.octets(), "{who}: about the address asked for");
                assert_eq!(f[22..28], f[6..12], "{who}: our address in both headers");
            }
        }
        port
    }
}

/// Everything but addresses, ports, TTL and checksums is as it came; checksums are right.
fn check_sent(
    who: &str,
    before: &[u8],
    after: &[u8],
    source: (Ipv4Addr, Option<u16>),
    destination: (Ipv4Addr, u16),
    mac: [u8; 6],
) -> u16 {
    assert_eq!(before.len(), after.len(), "{who}");
    assert_eq!(&after[0..6], &mac, "{who}: hardware address");
    let ihl = (after[14] & 15) as usize * 4;
    assert_eq!(&after[26..30], &source.0.octets(), "{who}: source");
    assert_eq!(&after[30..34], &destination.0.octets(), "{who}: destination");
    assert_eq!(after[22], before[22] - 1, "{who}: TTL");
    assert_eq!(checksum::of(&after[14..14 + ihl]), 0, "{who}: header checksum");
    let (l4, protocol) = (14 + ihl, after[23]);
    let word = |at: usize| u16::from_be_bytes([after[at], after[at + 1]]);
    let (left_from, goes_to) = match protocol {
        1 if after[l4] == 8 => (word(l4 + 4), 0),
        1 => (0, word(l4 + 4)),
        6 | 17 => (word(l4), word(l4 + 2)),
        _ => (0, 0),
    };
    if let Some(port) = source.1 {
        assert_eq!(left_from, port, "{who}: source port");
    }
    assert_eq!(goes_to, destination.1, "{who}: destination port");
    let mut pseudo = Vec::new();
    if protocol != 1 {
        pseudo.extend_from_slice(&after[26..34]);
        pseudo.extend_from_slice(&[0, protocol]);
        pseudo.extend_from_slice(&((after.len() - l4) as u16).to_be_bytes());
    }
    pseudo.extend_from_slice(&after[l4..]);
    let unchecked = protocol == 17 && word(l4 + 6) == 0;
    if matches!(protocol, 1 | 6 | 17) && !unchecked {
        assert_eq!(checksum::of(&pseudo), 0, "{who}: transport checksum");
    }
    let payload = l4 + if protocol == 6 { 20 } else { 8 };
    assert_eq!(before[payload..], after[payload..], "{who}: payload");
    left_from
}

const WEB_OUT: &str = "web/Outbound/defaultSecurityRules/AllowInternetOutBound";
const WEB_VNET_OUT: &str = "web/Outbound/defaultSecurityRules/AllowVnetOutBound";
const WEB_VNET_IN: &str = "web/Inbound/defaultSecurityRules/AllowVnetInBound";
const DB_OUT: &str = "db/Outbound/defaultSecurityRules/AllowInternetOutBound";

fn table(backend: &mut dyn Backend) {
    let owns = |b: &dyn Backend, member: &str, port: u16| b.gateway().owns(member, LB, port);
    let mut t = Table(Ledger::new(backend));
    let sent = |source: Ipv4Addr, port: Option<u16>, to: Ipv4Addr, to_port: u16, mac| Out::Sent {
        source: (source, port),
        destination: (to, to_port),
        mac,
    };
    let vm1 = from(VM1, "10.0.1.4", "198.51.100.7");
    let v1 = ip("10.0.1.4");
    use At::*;

    // TCP out and back.
    let syn = vm1.tcp(40000, 80, TcpFlags::SYN, 1, 0, b"");
    let port = t.case(
        "a SYN leaves under the frontend",
        Ingress("vm1"),
        &syn,
        sent(LB, None, SERVER, 80, ROUTER_MAC),
        NewFlow,
        &[WEB_OUT],
    );
    assert!(owns(t.0.backend, "vm1/ipconfig1", port), "{port} belongs to vm1");
    t.case(
        "a SYN again has the same port",
        Ingress("vm1"),
        &syn,
        sent(LB, Some(port), SERVER, 80, ROUTER_MAC),
        Forwarded,
        &[],
    );
    let answer = world(LB).tcp(80, port, TcpFlags::SYN_ACK, 9, 2, b"");
    t.case(
        "the answer reaches the guest",
        Ingress("up"),
        &answer,
        sent(SERVER, Some(80), v1, 40000, VM1),
        Forwarded,
        &[],
    );
    let data = vm1.tcp(40000, 80, TcpFlags::ACK, 2, 10, b"GET /");
    t.case(
        "data follows",
        Ingress("vm1"),
        &data,
        sent(LB, Some(port), SERVER, 80, ROUTER_MAC),
        Forwarded,
        &[],
    );
    let stray = world(LB).tcp(81, port, TcpFlags::ACK, 9, 2, b"");
    t.case("another server on the same port is no flow", Ingress("up"), &stray, Out::Drop, NoFlow, &[]);

    // UDP: one port for one socket, whatever the destination; zero checksums stay zero.
    let udp = vm1.udp(5000, 53, b"query");
    let udp_port = t.case(
        "a datagram leaves",
        Ingress("vm1"),
        &udp,
        sent(LB, None, SERVER, 53, ROUTER_MAC),
        NewFlow,
        &[WEB_OUT],
    );
    assert!(owns(t.0.backend, "vm1/ipconfig1", udp_port));
    let other = from(VM1, "10.0.1.4", "198.51.100.8").udp(5000, 54, b"query");
    t.case(
        "the same socket keeps its port",
        Ingress("vm1"),
        &other,
        sent(LB, Some(udp_port), ip("198.51.100.8"), 54, ROUTER_MAC),
        NewFlow,
        &[WEB_OUT],
    );
    let mut unchecked = vm1.udp(5000, 53, b"query");
    unchecked[40..42].fill(0);
    let outcome_port = t.case(
        "a datagram without checksum",
        Ingress("vm1"),
        &unchecked,
        sent(LB, Some(udp_port), SERVER, 53, ROUTER_MAC),
        Forwarded,
        &[],
    );
    assert_eq!(outcome_port, udp_port);
    let reply = world(LB).udp(53, udp_port, b"answer");
    t.case(
        "its reply comes back",
        Ingress("up"),
        &reply,
        sent(SERVER, Some(53), v1, 5000, VM1),
        Forwarded,
        &[],
    );

    // Echo.
    let ping = vm1.echo_request(77, 1, b"abcdefgh");
    let id = t.case(
        "a ping leaves with an identifier of the guest's ports",
        Ingress("vm1"),
        &ping,
        sent(LB, None, SERVER, 0, ROUTER_MAC),
        NewFlow,
        &[WEB_OUT],
    );
    assert!(owns(t.0.backend, "vm1/ipconfig1", id));
    let pong = echo_reply(world(LB), id, b"abcdefgh");
    t.case(
        "the pong comes back with the guest's own",
        Ingress("up"),
        &pong,
        sent(SERVER, None, v1, 77, VM1),
        Forwarded,
        &[],
    );

    // IPv4 options stay, the header checksum is right with them.
    let optioned = with_options(&vm1.udp(5001, 53, b"options"));
    t.case(
        "IPv4 options are carried",
        Ingress("vm1"),
        &optioned,
        sent(LB, None, SERVER, 53, ROUTER_MAC),
        NewFlow,
        &[WEB_OUT],
    );

    // Rules.
    t.case(
        "a rule denies",
        Ingress("vm1"),
        &vm1.tcp(40001, 25, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        DeniedByRule,
        &["web/Outbound/securityRules/DenySmtp"],
    );
    let vm2 = from(VM2, "10.0.1.5", "198.51.100.7");
    t.case(
        "the NIC's group is asked first",
        Ingress("vm2"),
        &vm2.udp(1, 5353, b""),
        Out::Drop,
        DeniedByRule,
        &["vm2-nic/Outbound/securityRules/DenyMdns"],
    );
    let p2 = t.case(
        "a learned MAC is good enough",
        Ingress("vm2"),
        &vm2.tcp(40000, 80, TcpFlags::SYN, 1, 0, b""),
        sent(LB, None, SERVER, 80, ROUTER_MAC),
        NewFlow,
        &["vm2-nic/Outbound/defaultSecurityRules/AllowInternetOutBound", WEB_OUT],
    );
    assert!(owns(t.0.backend, "vm2/ipconfig1", p2) && p2 != port, "two guests, one source port, two ports");
    let to_vm2 = |port| from(VM1, "10.0.1.4", "10.0.1.5").tcp(41000, port, TcpFlags::SYN, 1, 0, b"");
    t.case(
        "guest to guest passes both guests' groups",
        Ingress("vm1"),
        &to_vm2(80),
        sent(v1, Some(41000), ip("10.0.1.5"), 80, VM2),
        NewFlow,
        &[WEB_VNET_OUT, WEB_VNET_IN, "vm2-nic/Inbound/defaultSecurityRules/AllowVnetInBound"],
    );
    t.case(
        "the receiver's NIC denies",
        Ingress("vm1"),
        &to_vm2(8080),
        Out::Drop,
        DeniedByRule,
        &[WEB_VNET_OUT, WEB_VNET_IN, "vm2-nic/Inbound/securityRules/DenyFromVm1"],
    );
    let to_vm3 = |port| from(VM1, "10.0.1.4", "10.0.2.4").tcp(42000, port, TcpFlags::SYN, 1, 0, b"");
    t.case(
        "the receiver's subnet allows",
        Ingress("vm1"),
        &to_vm3(5432),
        sent(v1, Some(42000), ip("10.0.2.4"), 5432, VM3),
        NewFlow,
        &[WEB_VNET_OUT, "db/Inbound/securityRules/AllowPostgres"],
    );
    t.case(
        "the receiver's subnet denies",
        Ingress("vm1"),
        &to_vm3(22),
        Out::Drop,
        DeniedByRule,
        &[WEB_VNET_OUT, "db/Inbound/securityRules/DenyVnet"],
    );
    let vm4_to = from(VM4, "10.0.3.4", "10.0.1.4").tcp(1, 80, TcpFlags::SYN, 1, 0, b"");
    t.case(
        "no group at the sender allows there",
        Ingress("vm4"),
        &vm4_to,
        sent(ip("10.0.3.4"), Some(1), v1, 80, VM1),
        NewFlow,
        &[WEB_VNET_IN],
    );

    // Instance-level public IP.
    let vm3 = from(VM3, "10.0.2.4", "198.51.100.7");
    t.case(
        "an instance-level IP keeps the port",
        Ingress("vm3"),
        &vm3.tcp(4444, 80, TcpFlags::SYN, 1, 0, b""),
        sent(PIP3, Some(4444), SERVER, 80, ROUTER_MAC),
        NewFlow,
        &[DB_OUT],
    );
    t.case(
        "and works inbound",
        Ingress("up"),
        &world(PIP3).tcp(5555, 443, TcpFlags::SYN, 1, 0, b""),
        sent(SERVER, Some(5555), ip("10.0.2.4"), 443, VM3),
        NewFlow,
        &["db/Inbound/securityRules/AllowHttps"],
    );
    let back = vm3.tcp(443, 5555, TcpFlags::SYN_ACK, 1, 2, b"");
    t.case(
        "its answer leaves under the public address",
        Ingress("vm3"),
        &back,
        sent(PIP3, Some(443), SERVER, 5555, ROUTER_MAC),
        Forwarded,
        &[],
    );
    t.case(
        "inbound is judged by the groups",
        Ingress("up"),
        &world(PIP3).tcp(5555, 22, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        DeniedByRule,
        &["db/Inbound/defaultSecurityRules/DenyAllInBound"],
    );
    t.case(
        "a protocol without ports passes 1:1",
        Ingress("vm3"),
        &vm3_esp(),
        sent(PIP3, None, SERVER, 0, ROUTER_MAC),
        NewFlow,
        &[DB_OUT],
    );
    t.case(
        "without an instance-level IP it cannot",
        Ingress("vm1"),
        &protocol(vm1.udp(0, 0, b"12345678"), 50),
        Out::Drop,
        NoPorts,
        &[WEB_OUT],
    );
    t.case(
        "no way out without a pool",
        Ingress("vm4"),
        &from(VM4, "10.0.3.4", "198.51.100.7").udp(1, 1, b""),
        Out::Drop,
        NoOutboundMethod,
        &[],
    );

    // Spoofing.
    t.case(
        "another guest's address",
        Ingress("vm1"),
        &from(VM1, "10.0.1.5", "198.51.100.7").udp(9, 9, b""),
        Out::Drop,
        Spoofed,
        &[],
    );
    t.case(
        "another MAC",
        Ingress("vm1"),
        &from(STRANGER, "10.0.1.4", "198.51.100.7").udp(9, 9, b""),
        Out::Drop,
        Spoofed,
        &[],
    );
    t.case("another guest's live flow", Ingress("vm2"), &data, Out::Drop, Spoofed, &[]);
    t.case(
        "a private source from the world",
        Ingress("up"),
        &Craft::new(ROUTER_MAC, v1, GATEWAY_MAC, PIP3).tcp(1, 443, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        Martian,
        &[],
    );
    t.case(
        "a guest as DHCP server",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "255.255.255.255").udp(67, 68, b""),
        Out::Drop,
        DhcpServer,
        &[],
    );
    t.case(
        "a guest asking for an address",
        Ingress("vm1"),
        &from(VM1, "0.0.0.0", "255.255.255.255").udp(68, 67, b""),
        Out::Pass,
        ToHost,
        &[],
    );

    // ARP.
    let arp = Craft::arp_request(VM1, v1, ip("10.0.1.1"));
    t.case(
        "ARP for the gateway is answered",
        Ingress("vm1"),
        &arp,
        Out::ArpReply(ip("10.0.1.1"), VM1),
        ArpAnswered,
        &[],
    );
    t.case(
        "ARP for another guest is answered by us",
        Ingress("vm1"),
        &Craft::arp_request(VM1, v1, ip("10.0.1.5")),
        Out::ArpReply(ip("10.0.1.5"), VM1),
        ArpAnswered,
        &[],
    );
    t.case(
        "ARP with another's address",
        Ingress("vm1"),
        &Craft::arp_request(VM1, ip("10.0.1.5"), ip("10.0.1.1")),
        Out::Drop,
        SpoofedArp,
        &[],
    );
    t.case(
        "ARP with another's MAC",
        Ingress("vm1"),
        &Craft::arp_request(STRANGER, v1, ip("10.0.1.1")),
        Out::Drop,
        SpoofedArp,
        &[],
    );
    t.case(
        "ARP for a proxied address is answered on the uplink",
        Ingress("up"),
        &Craft::arp_request(ROUTER_MAC, ip("203.0.113.254"), LB),
        Out::ArpReply(LB, ROUTER_MAC),
        ArpAnswered,
        &[],
    );
    t.case(
        "other ARP on the uplink is the kernel's",
        Ingress("up"),
        &Craft::arp_request(ROUTER_MAC, ip("203.0.113.254"), ip("203.0.113.1")),
        Out::Pass,
        NotOurs,
        &[],
    );

    // The world.
    t.case(
        "what is not ours is untouched",
        Ingress("up"),
        &world(ip("203.0.113.1")).tcp(1, 22, TcpFlags::SYN, 1, 0, b""),
        Out::Pass,
        NotOurs,
        &[],
    );
    t.case(
        "a port nobody owns",
        Ingress("up"),
        &world(LB).tcp(1, 65100, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        NoListener,
        &[],
    );
    t.case(
        "a public address in no use",
        Ingress("up"),
        &world(ip("203.0.113.30")).tcp(1, 80, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        NoListener,
        &[],
    );
    t.case(
        "mid-stream without a flow",
        Ingress("vm1"),
        &vm1.tcp(40009, 80, TcpFlags::ACK, 1, 1, b"x"),
        Out::Drop,
        NoFlow,
        &[],
    );

    // The host.
    t.case(
        "DNS of the host",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "10.0.1.1").udp(1234, 53, b"q"),
        Out::Pass,
        NewFlow,
        &[],
    );
    t.case(
        "its answer",
        HostEgress("vm1"),
        &Craft::new(GATEWAY_MAC, ip("10.0.1.1"), VM1, v1).udp(53, 1234, b"a"),
        Out::Pass,
        FromHost,
        &[],
    );
    t.case(
        "SSH of the host",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "10.0.1.1").tcp(1234, 22, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        HostAccess,
        &[],
    );
    t.case(
        "the host to a guest passes its groups",
        HostEgress("vm1"),
        &Craft::new(GATEWAY_MAC, ip("10.0.1.1"), VM1, v1).tcp(9, 80, TcpFlags::SYN, 1, 0, b""),
        Out::Pass,
        NewFlow,
        &[WEB_VNET_IN],
    );
    t.case(
        "and is denied by them",
        HostEgress("vm3"),
        &Craft::new(GATEWAY_MAC, ip("10.0.2.1"), VM3, ip("10.0.2.4")).tcp(9, 80, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        DeniedByRule,
        &["db/Inbound/securityRules/DenyVnet"],
    );

    // Refused by name.
    t.case(
        "metadata of the cloud",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "169.254.169.254").tcp(1, 80, TcpFlags::SYN, 1, 0, b""),
        Out::Drop,
        PlatformAddress,
        &[],
    );
    t.case(
        "multicast",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "224.0.0.251").udp(5353, 5353, b""),
        Out::Drop,
        Broadcast,
        &[],
    );
    t.case(
        "an address without a guest",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "10.0.1.99").udp(1, 1, b""),
        Out::Drop,
        NoGuest,
        &[],
    );
    let mut fragment = vm1.udp(5000, 53, b"fragment");
    fragment[21] = 5;
    t.case("a fragment of nothing", Ingress("vm1"), &fragment, Out::Drop, FragmentOutOfOrder, &[]);
    t.case("an ICMP error", Ingress("vm1"), &vm1.icmp(3, 3, [0; 4], &[0; 28]), Out::Drop, IcmpError, &[]);
    t.case("IPv6 that is none", Ingress("vm1"), &ethertype(&syn, 0x86dd), Out::Drop, Malformed, &[]);
    t.case("anything else than IP", Ingress("vm1"), &ethertype(&syn, 0x88cc), Out::Drop, EtherType, &[]);
    t.case("a VLAN tag from a guest", Ingress("vm1"), &tagged(&syn), Out::Drop, Vlan, &[]);
    t.case("a VLAN tag on the uplink", Ingress("up"), &tagged(&answer), Out::Pass, NotOurs, &[]);
    let null = TcpFlags::default();
    t.case("TCP without flags", Ingress("vm1"), &vm1.tcp(1, 1, null, 0, 0, b""), Out::Drop, TcpFlags_, &[]);
    t.case("a truncated header", Ingress("vm1"), &syn[..40], Out::Drop, Malformed, &[]);

    // The guard.
    t.case("a private source at the guard", Guard, &syn, Out::Drop, Untranslated, &[]);
    let clean = t.0.backend.run(Guard, &world(LB).udp(1, 1, b"")).unwrap();
    assert_eq!(clean.action, Action::Pass, "a public source passes the guard");
    let arp = t.0.backend.run(Guard, &Craft::arp_request(VM1, v1, ip("203.0.113.254"))).unwrap();
    assert_eq!(arp.action, Action::Drop, "a private sender in ARP does not pass the guard");
}

use Reason::TcpFlags as TcpFlags_;

fn echo_reply(craft: Craft, id: u16, payload: &[u8]) -> Vec<u8> {
    let id = id.to_be_bytes();
    craft.icmp(0, 0, [id[0], id[1], 0, 1], payload)
}

fn ethertype(frame: &[u8], value: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[12..14].copy_from_slice(&value.to_be_bytes());
    frame
}

fn tagged(frame: &[u8]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    out.extend_from_slice(&[0x81, 0x00, 0x00, 0x05]);
    out.extend_from_slice(&frame[12..]);
    out
}

fn header_checksum(frame: &mut [u8]) {
    let ihl = (frame[14] & 15) as usize * 4;
    frame[24..26].fill(0);
    let sum = checksum::of(&frame[14..14 + ihl]);
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
}

/// The frame with this protocol number, its payload being whatever it is.
fn protocol(mut frame: Vec<u8>, number: u8) -> Vec<u8> {
    frame[23] = number;
    header_checksum(&mut frame);
    frame
}

fn vm3_esp() -> Vec<u8> {
    protocol(from(VM3, "10.0.2.4", "198.51.100.7").udp(0, 0, b"12345678"), 50)
}

/// The same packet with four bytes of options (router alert).
fn with_options(frame: &[u8]) -> Vec<u8> {
    let mut out = frame[..34].to_vec();
    out.extend_from_slice(&[0x94, 4, 0, 0]);
    out.extend_from_slice(&frame[34..]);
    out[14] = 0x46;
    let total = (out.len() - 14) as u16;
    out[16..18].copy_from_slice(&total.to_be_bytes());
    header_checksum(&mut out);
    out
}

#[test]
fn the_packet_table_holds_on_the_host_engine() {
    table(&mut HostBackend::new(POLICY).unwrap());
}

#[test]
fn the_packet_table_holds_under_xdp() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Xdp, |backend| {
        table(backend);
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_packet_table_holds_under_tc() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Tc, |backend| {
        table(backend);
        Ok(())
    })
    .unwrap();
}
