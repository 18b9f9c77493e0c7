//! Load balancing and inbound NAT of both families, and IPv6 on its way out, on the host engine, under XDP and under TC. Every
//! counter and every rule hit is asserted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Action, At, HostBackend, KernelBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Craft6, Frame, Mac, TcpFlags, Transport, solicited_node};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = r#"
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16, 'fd00:1::/48'] }
    subnets:
      - { name: web, addressPrefixes: [10.0.1.0/24, 'fd00:1:0:1::/64'], networkSecurityGroup: web }
      - { name: own, addressPrefixes: [10.0.2.0/24, 'fd00:1:0:2::/64'] }
      - { name: shared, addressPrefixes: [10.0.3.0/24], defaultOutboundAccess: true }
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ name: v4, subnet: web, privateIPAddress: 10.0.1.4 }, { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::4' }] }
  - { name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{ name: v4, subnet: web, privateIPAddress: 10.0.1.5 }, { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::5' }] }
  - { name: vm3, device: vm3, macAddress: '02:00:00:00:00:03', ipConfigurations: [{ name: v4, subnet: own, privateIPAddress: 10.0.2.4, publicIPAddress: pip3 }, { name: v6, subnet: own, privateIPAddress: 'fd00:1:0:2::4', publicIPAddress: pip36 }] }
  - { name: vm4, device: vm4, macAddress: '02:00:00:00:00:04', ipConfigurations: [{ name: v4, subnet: shared, privateIPAddress: 10.0.3.4 }] }
  - { name: vm5, device: vm5, macAddress: '02:00:00:00:00:05', ipConfigurations: [{ name: v4, subnet: own, privateIPAddress: 10.0.2.5 }, { name: v6, subnet: own, privateIPAddress: 'fd00:1:0:2::5' }] }
networkSecurityGroups:
  - name: web
    securityRules:
      - { name: AllowHttp, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationAddressPrefix: VirtualNetwork, destinationPortRange: 8080 }
      - { name: AllowDns, priority: 110, direction: Inbound, access: Allow, protocol: Udp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 53 }
      - { name: AllowSsh, priority: 120, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 22 }
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.20, announce: proxy }
  - { name: pip36, ipAddress: '2001:db8:ffff::20', announce: proxy }
  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }
defaultOutbound: { publicIPAddress: pip-default }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm2/v4, vm1/v6, vm2/v6] }]
    probes: [{ name: alive, protocol: Tcp, port: 8080 }]
    loadBalancingRules:
      - { name: http, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, probe: alive }
      - { name: sticky, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 81, backendPort: 8080, loadDistribution: SourceIP }
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 53, loadDistribution: SourceIPProtocol }
      - { name: floating, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 8080, enableFloatingIP: true }
      - { name: http6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080 }
    inboundNatRules:
      - { name: ssh, frontendIPConfiguration: fe, protocol: Tcp, frontendPortRangeStart: 2200, frontendPortRangeEnd: 2203, backendPort: 22, backendAddressPool: pool }
      - { name: ssh6, frontendIPConfiguration: fe6, protocol: Tcp, frontendPort: 2201, backendPort: 22, backendIPConfiguration: vm1/v6 }
uplinks: [{ device: up }]
"#;

const DEVICES: [&str; 6] = ["vm1", "vm2", "vm3", "vm4", "vm5", "up"];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
const HTTP: &str = "web/Inbound/securityRules/AllowHttp";
const DNS: &str = "web/Inbound/securityRules/AllowDns";
const SSH: &str = "web/Inbound/securityRules/AllowSsh";
const OUT: &str = "web/Outbound/defaultSecurityRules/AllowInternetOutBound";

fn guest(number: u8) -> Mac {
    [2, 0, 0, 0, 0, number]
}

fn end(text: &str) -> SocketAddr {
    text.parse().expect("a literal")
}

/// A TCP segment or UDP datagram of either family.
fn packet(mac: Mac, from: &str, to: &str, flags: Option<TcpFlags>, payload: &[u8]) -> Vec<u8> {
    let (from, to) = (end(from), end(to));
    match (from.ip(), to.ip(), flags) {
        (IpAddr::V4(a), IpAddr::V4(b), Some(flags)) => {
            Craft::new(mac, a, GATEWAY, b).tcp(from.port(), to.port(), flags, 1, 1, payload)
        }
        (IpAddr::V4(a), IpAddr::V4(b), None) => {
            Craft::new(mac, a, GATEWAY, b).udp(from.port(), to.port(), payload)
        }
        (IpAddr::V6(a), IpAddr::V6(b), Some(flags)) => {
            Craft6::new(mac, a, GATEWAY, b).tcp(from.port(), to.port(), flags, 1)
        }
        (IpAddr::V6(a), IpAddr::V6(b), None) => {
            Craft6::new(mac, a, GATEWAY, b).udp(from.port(), to.port(), payload)
        }
        _ => panic!("two families"),
    }
}

fn syn(mac: Mac, from: &str, to: &str) -> Vec<u8> {
    packet(mac, from, to, Some(TcpFlags::SYN), b"")
}

fn syn_ack(mac: Mac, from: &str, to: &str) -> Vec<u8> {
    packet(mac, from, to, Some(TcpFlags::SYN_ACK), b"")
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    /// Sent on, with checksums that hold and the payload as it came: from where to where, and to whom.
    fn sends(
        &mut self,
        name: &str,
        device: &'static str,
        frame: &[u8],
        reason: Reason,
        rules: &[&str],
    ) -> (SocketAddr, SocketAddr, Mac) {
        let outcome = self.0.run(name, At::Ingress(device), frame, reason, rules);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Send, "{who}");
        let (before, after) = (Frame::parse(frame.to_vec()), Frame::parse(outcome.frame));
        assert!(after.checksums_ok(), "{who}: {after:?}");
        assert_eq!(after.payload(), before.payload(), "{who}");
        assert_eq!(after.ip.as_ref().unwrap().ttl, before.ip.as_ref().unwrap().ttl - 1, "{who}");
        (after.source().unwrap(), after.destination().unwrap(), after.destination_mac)
    }

    fn drops(&mut self, name: &str, device: &'static str, frame: &[u8], reason: Reason) {
        let outcome = self.0.run(name, At::Ingress(device), frame, reason, &[]);
        assert_eq!(outcome.action, Action::Drop, "{name} on {}", self.0.backend.name());
    }
}

fn everywhere(test: impl Fn(&mut Table<'_>) + Sync) {
    test(&mut Table(Ledger::new(&mut HostBackend::new(POLICY).unwrap())));
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(POLICY, &DEVICES, hook, |backend| {
            test(&mut Table(Ledger::new(backend)));
            Ok(())
        })
        .unwrap();
    }
}

/// The guest behind a hardware address.
fn device(mac: Mac) -> &'static str {
    DEVICES[usize::from(mac[5]) - 1]
}

#[test]
fn a_load_balancing_rule_sends_each_flow_to_one_member_which_sees_the_client() {
    everywhere(|t| {
        for (frontend, client, members) in [
            ("203.0.113.10:80", "198.51.100.7", ["10.0.1.4:8080", "10.0.1.5:8080"]),
            ("[2001:db8:ffff::10]:80", "[2001:db8::7]", ["[fd00:1:0:1::4]:8080", "[fd00:1:0:1::5]:8080"]),
        ] {
            let mut met = BTreeMap::new();
            for port in 1000..1040 {
                let from = format!("{client}:{port}");
                let frame = syn(ROUTER_MAC, &from, frontend);
                let (source, destination, mac) = t.sends("a client", "up", &frame, NewFlow, &[HTTP]);
                assert_eq!(source, end(&from), "the guest sees the client's address");
                assert!(members.map(end).contains(&destination), "{destination}");
                *met.entry(destination).or_insert(0) += 1;
                let again = t.sends("the same SYN", "up", &frame, Forwarded, &[]);
                assert_eq!(again, (source, destination, mac), "one flow, one member");
                let answer = syn_ack(mac, &destination.to_string(), &from);
                let back = t.sends("the answer", device(mac), &answer, Forwarded, &[]);
                assert_eq!(back, (end(frontend), end(&from), ROUTER_MAC), "the client sees the frontend");
            }
            assert_eq!(met.len(), 2, "both members get flows");
            assert!(met.values().all(|&flows| flows >= 8), "{met:?}");
        }
        t.drops(
            "a port where nothing listens",
            "up",
            &syn(ROUTER_MAC, "198.51.100.7:1", "203.0.113.10:82"),
            NoListener,
        );
        let stray = packet(ROUTER_MAC, "198.51.100.7:9", "203.0.113.10:80", Some(TcpFlags::ACK), b"x");
        t.drops("mid-stream", "up", &stray, NoFlow);
        let own = syn(guest(1), "10.0.1.4:8080", "198.51.100.99:5");
        t.sends("a member's own connection", "vm1", &own, NewFlow, &[OUT]);
        t.drops(
            "a guest in the frontend's name",
            "vm1",
            &syn(guest(1), "203.0.113.10:80", "198.51.100.7:5"),
            Spoofed,
        );
    });
}

#[test]
fn affinity_by_source_address_or_by_source_and_protocol_keeps_a_client_with_its_member() {
    everywhere(|t| {
        let mut members = BTreeSet::new();
        for client in 1..20 {
            let mut met = BTreeSet::new();
            for port in 2000..2005 {
                let from = format!("198.51.100.{client}:{port}");
                let frame = syn(ROUTER_MAC, &from, "203.0.113.10:81");
                let (_, destination, _) = t.sends("TCP", "up", &frame, NewFlow, &[HTTP]);
                met.insert(destination.ip());
            }
            assert_eq!(met.len(), 1, "client {client} stays with one member");
            members.append(&mut met);
            let mut met = BTreeSet::new();
            for port in 2000..2005 {
                let from = format!("198.51.100.{client}:{port}");
                let frame = packet(ROUTER_MAC, &from, "203.0.113.10:53", None, b"query");
                let (_, destination, _) = t.sends("UDP", "up", &frame, NewFlow, &[DNS]);
                assert_eq!(destination.port(), 53, "the frontend's port, none other given");
                met.insert(destination.ip());
            }
            assert_eq!(met.len(), 1);
        }
        assert_eq!(members.len(), 2, "clients spread over the members");
    });
}

#[test]
fn a_nat_rule_leads_to_one_member_and_a_range_to_each_by_a_port_of_its_own() {
    everywhere(|t| {
        let mut met = BTreeSet::new();
        for port in [2200, 2201] {
            let frame = syn(ROUTER_MAC, "198.51.100.7:1000", &format!("203.0.113.10:{port}"));
            let (_, destination, mac) = t.sends("ssh", "up", &frame, NewFlow, &[SSH]);
            assert_eq!(destination.port(), 22);
            met.insert((destination.ip(), mac));
        }
        assert_eq!(met.len(), 2, "{met:?}");
        t.drops(
            "a port of the range without a member",
            "up",
            &syn(ROUTER_MAC, "198.51.100.7:1", "203.0.113.10:2202"),
            NoListener,
        );
        let frame = syn(ROUTER_MAC, "[2001:db8::7]:1000", "[2001:db8:ffff::10]:2201");
        let (_, destination, mac) = t.sends("ssh by IPv6", "up", &frame, NewFlow, &[SSH]);
        assert_eq!((destination, mac), (end("[fd00:1:0:1::4]:22"), guest(1)));
    });
}

#[test]
fn with_floating_ip_the_packet_keeps_the_frontends_address_and_the_member_answers_under_it() {
    everywhere(|t| {
        let frame = syn(ROUTER_MAC, "198.51.100.7:1000", "203.0.113.10:8080");
        // Rules see the packet as it is delivered, and the frontend's address is not in the virtual network.
        let outcome = t.0.run(
            "a destination outside",
            At::Ingress("up"),
            &frame,
            DeniedByRule,
            &["web/Inbound/defaultSecurityRules/DenyAllInBound"],
        );
        assert_eq!(outcome.action, Action::Drop);
        t.0.change(
            &POLICY.replace("destinationAddressPrefix: VirtualNetwork, ", "destinationAddressPrefix: '*', "),
        );
        let (source, destination, mac) = t.sends("a client", "up", &frame, NewFlow, &[HTTP]);
        assert_eq!((source, destination), (end("198.51.100.7:1000"), end("203.0.113.10:8080")));
        let answer = syn_ack(mac, "203.0.113.10:8080", "198.51.100.7:1000");
        let back = t.sends("the answer", device(mac), &answer, Forwarded, &[]);
        assert_eq!(back, (end("203.0.113.10:8080"), end("198.51.100.7:1000"), ROUTER_MAC));
        let other = if mac == guest(1) { guest(2) } else { guest(1) };
        t.drops(
            "the other member in that flow",
            device(other),
            &syn_ack(other, "203.0.113.10:8080", "198.51.100.7:1000"),
            Spoofed,
        );
    });
}

#[test]
fn outbound_of_ipv6_is_by_its_own_address_or_by_port_and_never_by_accident() {
    everywhere(|t| {
        // 1:1, both ways.
        let frame = syn(guest(3), "[fd00:1:0:2::4]:4000", "[2001:db8::7]:443");
        let met = t.sends("by its own address", "vm3", &frame, NewFlow, &[]);
        assert_eq!(met, (end("[2001:db8:ffff::20]:4000"), end("[2001:db8::7]:443"), ROUTER_MAC));
        let answer = syn_ack(ROUTER_MAC, "[2001:db8::7]:443", "[2001:db8:ffff::20]:4000");
        let met = t.sends("the answer", "up", &answer, Forwarded, &[]);
        assert_eq!(met, (end("[2001:db8::7]:443"), end("[fd00:1:0:2::4]:4000"), guest(3)));
        let frame = packet(ROUTER_MAC, "[2001:db8::7]:5", "[2001:db8:ffff::20]:53", None, b"query");
        let (_, destination, _) = t.sends("from outside", "up", &frame, NewFlow, &[]);
        assert_eq!(destination, end("[fd00:1:0:2::4]:53"));

        // By port: TCP, for which a rule of the pool has an IPv6 frontend.
        let frame = syn(guest(1), "[fd00:1:0:1::4]:4000", "[2001:db8::7]:443");
        let (source, _, mac) = t.sends("by port", "vm1", &frame, NewFlow, &[OUT]);
        assert_eq!((source.ip(), mac), (end("[2001:db8:ffff::10]:1").ip(), ROUTER_MAC));
        let answer = syn_ack(ROUTER_MAC, "[2001:db8::7]:443", &source.to_string());
        let met = t.sends("the answer to the port", "up", &answer, Forwarded, &[]);
        assert_eq!(met, (end("[2001:db8::7]:443"), end("[fd00:1:0:1::4]:4000"), guest(1)));
        let other = syn(guest(2), "[fd00:1:0:1::5]:4000", "[2001:db8::7]:443");
        let (others, _, _) = t.sends("another member", "vm2", &other, NewFlow, &[OUT]);
        assert_ne!(others.port(), source.port());

        let udp = packet(guest(1), "[fd00:1:0:1::4]:4000", "[2001:db8::7]:53", None, b"query");
        let outcome =
            t.0.run("UDP, for which it has no ports", At::Ingress("vm1"), &udp, NoOutboundMethod, &[OUT]);
        assert_eq!(outcome.action, Action::Drop);
        let none = syn(guest(5), "[fd00:1:0:2::5]:4000", "[2001:db8::7]:443");
        t.drops("a guest without a public address", "vm5", &none, NoOutboundMethod);
        t.drops("one of IPv4", "vm5", &syn(guest(5), "10.0.2.5:4000", "198.51.100.7:443"), NoOutboundMethod);
        let shared = syn(guest(4), "10.0.3.4:4000", "198.51.100.7:443");
        let (source, _, _) = t.sends("by the shared address", "vm4", &shared, NewFlow, &[]);
        assert_eq!(source.ip(), end("203.0.113.30:1").ip());

        // The world asks where our addresses are.
        let target = "2001:db8:ffff::10".parse().unwrap();
        let (group, mac) = solicited_node(target);
        let question = Craft6::new(ROUTER_MAC, "2001:db8::1".parse().unwrap(), mac, group);
        let question = question.solicitation(target, Some(ROUTER_MAC));
        let outcome = t.0.run("a question for a frontend", At::Ingress("up"), &question, NdAnswered, &[]);
        let answer = Frame::parse(outcome.frame);
        assert_eq!((outcome.action, answer.ip.as_ref().unwrap().source), (Action::Send, target.into()));
        assert!(matches!(answer.ip.unwrap().transport, Transport::Icmp { kind: 136, .. }));
    });
}

#[test]
fn a_guest_reaches_its_own_frontend_and_may_be_the_one_that_serves_it() {
    everywhere(|t| {
        if t.0.backend.hook() == Hook::Xdp {
            return;
        }
        let mut served = BTreeSet::new();
        for port in 3000..3020 {
            let from = format!("10.0.1.4:{port}");
            let frame = syn(guest(1), &from, "203.0.113.10:80");
            let (source, destination, mac) = t.sends("a member", "vm1", &frame, NewFlow, &[OUT, HTTP]);
            assert_eq!(source.ip(), end("203.0.113.10:1").ip(), "under its public address");
            assert_ne!(source.port(), 80);
            served.insert(destination);
            let answer = syn_ack(mac, &destination.to_string(), &source.to_string());
            let back = t.sends("the answer", device(mac), &answer, Forwarded, &[]);
            assert_eq!(back, (end("203.0.113.10:80"), end(&from), guest(1)));
        }
        assert_eq!(served.len(), 2, "itself too: {served:?}");
        let frame = syn(guest(1), "[fd00:1:0:1::4]:3000", "[2001:db8:ffff::10]:80");
        let (source, destination, mac) = t.sends("by IPv6", "vm1", &frame, NewFlow, &[OUT, HTTP]);
        let answer = syn_ack(mac, &destination.to_string(), &source.to_string());
        let back = t.sends("the answer by IPv6", device(mac), &answer, Forwarded, &[]);
        assert_eq!(back, (end("[2001:db8:ffff::10]:80"), end("[fd00:1:0:1::4]:3000"), guest(1)));
    });
}
