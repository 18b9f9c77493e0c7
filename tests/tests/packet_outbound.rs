//! What leaves by the scenarios of outbound connections, on the host engine, under XDP and under TC: fragments, refusals, a
//! guest's way to its own gateway's addresses. Every counter and every rule hit is asserted.

use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Frame, TcpFlags, Transport};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = r#"
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets:
      - { name: web, addressPrefix: 10.0.1.0/24 }
      - { name: db, addressPrefix: 10.0.2.0/24, networkSecurityGroup: db }
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.5 }] }
  - { name: vm3, device: vm3, macAddress: '02:00:00:00:00:03', ipConfigurations: [{ subnet: db, privateIPAddress: 10.0.2.4, publicIPAddress: pip3 }] }
networkSecurityGroups:
  - name: db
    securityRules:
      - { name: AllowHttps, priority: 110, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: 10.0.2.4, destinationPortRange: 443 }
      - { name: AllowUdp, priority: 120, direction: Inbound, access: Allow, protocol: Udp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 53 }
      - { name: AllowEsp, priority: 130, direction: Inbound, access: Allow, protocol: Esp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.20, announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }]
uplinks: [{ device: up }]
"#;

const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0xaa, 0];
const VM1: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VM3: [u8; 6] = [2, 0, 0, 0, 0, 3];
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const LB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const PIP3: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
const V1: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
const V3: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 4);

const HTTPS: &str = "db/Inbound/securityRules/AllowHttps";
const UDP: &str = "db/Inbound/securityRules/AllowUdp";
const ESP: &str = "db/Inbound/securityRules/AllowEsp";
const DB_OUT: &str = "db/Outbound/defaultSecurityRules/AllowInternetOutBound";

fn from(mac: [u8; 6], source: Ipv4Addr, destination: Ipv4Addr) -> Craft {
    Craft { dont_fragment: false, identification: 77, ..Craft::new(mac, source, GATEWAY_MAC, destination) }
}

fn world(destination: Ipv4Addr) -> Craft {
    let craft = Craft::new(ROUTER_MAC, SERVER, [2, 0, 0, 0, 0xaa, 3], destination);
    Craft { dont_fragment: false, identification: 77, ..craft }
}

fn everywhere(test: impl Fn(&mut dyn Backend) + Sync) {
    test(&mut HostBackend::new(POLICY).unwrap());
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(POLICY, &DEVICES, hook, |backend| {
            test(backend);
            Ok(())
        })
        .unwrap();
    }
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    fn xdp(&self) -> bool {
        self.0.backend.hook() == Hook::Xdp
    }

    fn drops(&mut self, name: &str, at: At, frame: &[u8], reason: Reason) {
        assert_eq!(self.0.run(name, at, frame, reason, &[]).action, Action::Drop, "{name}");
    }

    /// Sent from here to there; all checksums hold and the payload is as it came.
    fn sends(
        &mut self,
        name: &str,
        at: At,
        frame: &[u8],
        [source, destination]: [Ipv4Addr; 2],
        (reason, rules): (Reason, &[&str]),
    ) -> Frame {
        let outcome = self.0.run(name, at, frame, reason, rules);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Send, "{who}");
        assert_eq!(outcome.frame.len(), frame.len(), "{who}");
        let out = Frame::parse(outcome.frame);
        let ip = out.ip.as_ref().unwrap();
        let ends: [IpAddr; 2] = [source.into(), destination.into()];
        assert_eq!([ip.source, ip.destination], ends, "{who}");
        assert!(out.checksums_ok(), "{who}: {out:?}");
        out
    }
}

/// The datagram that fragments make, as a frame.
fn whole(fragments: &[Frame]) -> Frame {
    let mut bytes = fragments[0].bytes[..34].to_vec();
    for fragment in fragments {
        bytes.extend_from_slice(&fragment.bytes[34..]);
    }
    let length = (bytes.len() - 14) as u16;
    bytes[16..18].copy_from_slice(&length.to_be_bytes());
    bytes[20..22].fill(0);
    bytes[24..26].fill(0);
    let sum = portcullis_common::packet::checksum::of(&bytes[14..34]).to_ne_bytes();
    bytes[24..26].copy_from_slice(&sum);
    Frame::parse(bytes)
}

#[test]
fn fragments_in_order_are_translated_like_their_datagram_and_others_are_not_read() {
    everywhere(|backend| {
        let mut t = Table(Ledger::new(backend));
        let payload: Vec<u8> = (0..200u8).collect();
        use At::Ingress;

        // By the guest's own address, out and in.
        let datagram = from(VM3, V3, SERVER).udp(5000, 53, &payload);
        let parts = Craft::fragments(&datagram, 80);
        assert_eq!(parts.len(), 3);
        t.drops("a later fragment before the first", Ingress("vm3"), &parts[1], FragmentOutOfOrder);
        let mut out =
            vec![t.sends("the first", Ingress("vm3"), &parts[0], [PIP3, SERVER], (NewFlow, &[DB_OUT]))];
        for part in &parts[1..] {
            out.push(t.sends("a later one", Ingress("vm3"), part, [PIP3, SERVER], (Forwarded, &[])));
        }
        let sent = whole(&out);
        assert_eq!(sent.source().unwrap(), (PIP3, 5000).into());
        assert_eq!((sent.payload(), sent.checksums_ok()), (&payload[..], true));

        let datagram = world(PIP3).udp(4000, 53, &payload);
        let parts = Craft::fragments(&datagram, 104);
        let first =
            t.sends("the first from outside", Ingress("up"), &parts[0], [SERVER, V3], (NewFlow, &[UDP]));
        let second = t.sends("the second", Ingress("up"), &parts[1], [SERVER, V3], (Forwarded, &[]));
        let arrived = whole(&[first, second]);
        assert_eq!((arrived.payload(), arrived.checksums_ok()), (&payload[..], true));

        // By port.
        let datagram = from(VM1, V1, SERVER).udp(6000, 53, &payload);
        let parts = Craft::fragments(&datagram, 104);
        let first = t.sends("SNAT, the first", Ingress("vm1"), &parts[0], [LB, SERVER], (NewFlow, &[]));
        let second = t.sends("SNAT, the second", Ingress("vm1"), &parts[1], [LB, SERVER], (Forwarded, &[]));
        let sent = whole(&[first, second]);
        assert_eq!((sent.payload(), sent.checksums_ok()), (&payload[..], true));
        let port = sent.source().unwrap().port();
        let answer = world(LB).udp(53, port, &payload);
        let parts = Craft::fragments(&answer, 104);
        let first = t.sends("its answer", Ingress("up"), &parts[0], [SERVER, V1], (Forwarded, &[]));
        let second = t.sends("the rest of it", Ingress("up"), &parts[1], [SERVER, V1], (Forwarded, &[]));
        assert_eq!(whole(&[first, second]).destination().unwrap(), (V1, 6000).into());

        let ping = from(VM1, V1, SERVER).echo_request(7, 1, &payload);
        let parts = Craft::fragments(&ping, 104);
        let first = t.sends("a long ping", Ingress("vm1"), &parts[0], [LB, SERVER], (NewFlow, &[]));
        let second =
            t.sends("the rest of the ping", Ingress("vm1"), &parts[1], [LB, SERVER], (Forwarded, &[]));
        assert!(whole(&[first, second]).checksums_ok());

        // No ports, so order does not matter.
        let mut esp = world(PIP3).udp(1, 1, &payload);
        esp[23] = 50;
        let parts = Craft::fragments(&esp, 104);
        t.sends("the end of an ESP packet", Ingress("up"), &parts[1], [SERVER, V3], (NewFlow, &[ESP]));
        t.sends("its beginning", Ingress("up"), &parts[0], [SERVER, V3], (Forwarded, &[]));

        // Nothing is read as ports that is not a whole header.
        let segment = from(VM3, V3, SERVER).tcp(1000, 80, TcpFlags::SYN, 1, 0, &payload);
        let tiny = Craft::fragments(&segment, 8);
        t.drops("a first fragment with half a TCP header", Ingress("vm3"), &tiny[0], Malformed);
        t.drops("a second one that would overwrite the flags", Ingress("vm3"), &tiny[1], Fragment);
    });
}

/// Eight flows of vm1 to one destination; its ports are gone then.
fn exhaust(t: &mut Table<'_>, udp: bool) {
    for port in 0..8 {
        let craft = from(VM1, V1, SERVER);
        let frame = if udp {
            craft.udp(2000 + port, 80, b"hello")
        } else {
            craft.tcp(2000 + port, 80, TcpFlags::SYN, 1, 0, b"")
        };
        t.sends("one of eight", At::Ingress("vm1"), &frame, [LB, SERVER], (NewFlow, &[]));
    }
}

/// Changes the policy's `snat.onExhaustion`.
fn refusing(word: &str) -> String {
    format!("{POLICY}snat: {{ onExhaustion: {word} }}\n")
}

#[test]
fn a_refused_flow_is_dropped_reset_or_told_by_icmp_as_the_policy_says() {
    everywhere(|backend| {
        let mut t = Table(Ledger::new(backend));
        let (syn, datagram) = {
            let craft = from(VM1, V1, SERVER);
            (craft.tcp(3000, 80, TcpFlags::SYN, 0xffff_fff0, 0, b""), craft.udp(3000, 80, b"hello"))
        };
        exhaust(&mut t, false);
        t.drops("the ninth", At::Ingress("vm1"), &syn, SnatExhausted);
        t.drops("the ninth again", At::Ingress("vm1"), &syn, SnatRefused);
        let other = from([2, 0, 0, 0, 0, 2], Ipv4Addr::new(10, 0, 1, 5), SERVER);
        let frame = other.tcp(3000, 80, TcpFlags::SYN, 1, 0, b"");
        t.sends("its neighbour is not concerned", At::Ingress("vm2"), &frame, [LB, SERVER], (NewFlow, &[]));
        let elsewhere = from(VM1, V1, Ipv4Addr::new(198, 51, 100, 8)).tcp(3000, 80, TcpFlags::SYN, 1, 0, b"");
        let to = Ipv4Addr::new(198, 51, 100, 8);
        t.sends("nor is another destination", At::Ingress("vm1"), &elsewhere, [LB, to], (NewFlow, &[]));

        t.0.change(&refusing("reset"));
        let out = t.sends("a SYN", At::Ingress("vm1"), &syn, [SERVER, V1], (SnatRefused, &[]));
        let Transport::Tcp { flags, sequence, acknowledgment, .. } = out.ip.as_ref().unwrap().transport
        else {
            panic!("{out:?}")
        };
        assert_eq!(
            (flags, sequence, acknowledgment),
            (TcpFlags { ack: true, ..TcpFlags::RST }, 0, 0xffff_fff1)
        );
        assert_eq!(out.source().unwrap(), (SERVER, 80).into());
        assert_eq!(out.destination().unwrap(), (V1, 3000).into());
        assert_eq!((out.destination_mac, out.source_mac), (VM1, GATEWAY_MAC));

        exhaust(&mut t, true);
        prohibited(&mut t, "UDP where TCP is reset", &datagram, SnatExhausted);
        prohibited(&mut t, "the same again", &datagram, SnatRefused);
        let elsewhere = from(VM1, V1, to).udp(2000, 80, b"hello");
        t.sends(
            "a socket that has its port, elsewhere",
            At::Ingress("vm1"),
            &elsewhere,
            [LB, to],
            (NewFlow, &[]),
        );
        t.0.change(&refusing("icmp"));
        prohibited(&mut t, "TCP", &syn, SnatRefused);
        prohibited(&mut t, "UDP", &datagram, SnatRefused);
        let ping = from(VM1, V1, SERVER);
        for id in 0..8 {
            let frame = ping.echo_request(id + 1, 1, b"ping");
            t.sends("a ping", At::Ingress("vm1"), &frame, [LB, SERVER], (NewFlow, &[]));
        }
        prohibited(&mut t, "a ping", &ping.echo_request(9, 1, b"ping"), SnatExhausted);
    });
}

/// Answered by ICMP type 3 code 13 from the gateway, which quotes the packet.
fn prohibited(t: &mut Table<'_>, name: &str, frame: &[u8], reason: Reason) {
    let outcome = t.0.run(name, At::Ingress("vm1"), frame, reason, &[]);
    let who = format!("{name} on {}", t.0.backend.name());
    assert_eq!(outcome.action, Action::Send, "{who}");
    let out = Frame::parse(outcome.frame);
    let ip = out.ip.as_ref().unwrap();
    assert_eq!([ip.source, ip.destination], [Ipv4Addr::new(10, 0, 1, 1), V1].map(IpAddr::V4), "{who}");
    assert!(matches!(ip.transport, Transport::Icmp { kind: 3, code: 13, .. }), "{who}: {out:?}");
    assert_eq!(out.payload(), &frame[14..], "{who}: the packet is quoted");
    assert_eq!((out.destination_mac, out.source_mac), (VM1, GATEWAY_MAC), "{who}");
    assert!(out.checksums_ok(), "{who}: {out:?}");
}

#[test]
fn a_guest_reaches_our_own_public_addresses_out_and_in_again_under_its_public_source() {
    everywhere(|backend| {
        let mut t = Table(Ledger::new(backend));
        use At::Ingress;
        let syn = from(VM1, V1, PIP3).tcp(4000, 443, TcpFlags::SYN, 1, 0, b"");
        if t.xdp() {
            // Two translations of one packet: XDP leaves it to TC untouched.
            let outcome = t.0.run("XDP", Ingress("vm1"), &syn, NewFlow, &[]);
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, syn));
            return;
        }
        let out =
            t.sends("a SYN to a guest's own address", Ingress("vm1"), &syn, [LB, V3], (NewFlow, &[HTTPS]));
        let port = out.source().unwrap().port();
        assert!(t.0.backend.gateway().owns("vm1/ipconfig1", LB, port));
        assert_eq!((out.destination_mac, out.ip.as_ref().unwrap().ttl), (VM3, 63));
        let answer = from(VM3, V3, LB).tcp(443, port, TcpFlags::SYN_ACK, 9, 2, b"");
        let back = t.sends("the answer", Ingress("vm3"), &answer, [PIP3, V1], (Forwarded, &[]));
        assert_eq!(back.destination().unwrap(), (V1, 4000).into());
        let data = from(VM1, V1, PIP3).tcp(4000, 443, TcpFlags::ACK, 2, 10, b"GET /");
        let again = t.sends("data", Ingress("vm1"), &data, [LB, V3], (Forwarded, &[]));
        assert_eq!((again.source().unwrap().port(), again.payload()), (port, &b"GET /"[..]));

        // It is judged as what it is, a stranger from the Internet.
        let refused = from(VM1, V1, PIP3).tcp(4001, 22, TcpFlags::SYN, 1, 0, b"");
        let outcome = t.0.run(
            "ssh",
            Ingress("vm1"),
            &refused,
            DeniedByRule,
            &["db/Inbound/defaultSecurityRules/DenyAllInBound"],
        );
        assert_eq!(outcome.action, Action::Drop);

        // To itself.
        let own = from(VM3, V3, PIP3).tcp(4002, 443, TcpFlags::SYN, 1, 0, b"");
        let out = t.sends("to itself", Ingress("vm3"), &own, [PIP3, V3], (NewFlow, &[DB_OUT, HTTPS]));
        assert_eq!((out.source().unwrap().port(), out.destination_mac), (4002, VM3));
        let answer = from(VM3, V3, PIP3).tcp(443, 4002, TcpFlags::SYN_ACK, 9, 2, b"");
        t.sends("its own answer", Ingress("vm3"), &answer, [PIP3, V3], (Forwarded, &[]));

        // A frontend where nothing listens; an address outside that says it is one of ours; and a packet from outside in a
        // flow that never was there.
        let closed = from(VM1, V1, LB).tcp(4003, 80, TcpFlags::SYN, 1, 0, b"");
        t.drops("nothing listens", Ingress("vm1"), &closed, NoListener);
        let ours = |destination, port| {
            let craft = Craft::new(ROUTER_MAC, LB, [2, 0, 0, 0, 0xaa, 3], destination);
            craft.tcp(port, 443, TcpFlags::SYN, 1, 0, b"")
        };
        t.drops("one of our own addresses from outside", Ingress("up"), &ours(PIP3, 9), Martian);
        t.drops("in a flow of two guests", Ingress("up"), &ours(PIP3, port), Spoofed);
    });
}
