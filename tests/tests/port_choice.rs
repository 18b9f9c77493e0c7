//! Which public ports a guest's flows leave under, on the host engine: never a system port, spread and unforeseeable (RFC 6056), of
//! TCP and UDP apart (RFC 7857 §5), under one address (RFC 4787 REQ-2); and who knocks at one unasked (RFC 5382 REQ-4).

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use portcullis_common::Reason;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Frame, TcpFlags, Transport};

const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0xaa, 0];
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const SYSTEM_PORTS: u16 = 1024;

/// vm1 and vm2, and the load balancer that `outbound` describes.
fn gateway(balancer: &str, snat: &str) -> HostBackend {
    let yaml = format!(
        "
virtualNetworks: [{{ name: lab, addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}, subnets: [{{ name: web, addressPrefix: 10.0.1.0/24, networkSecurityGroup: closed }}] }}]
networkSecurityGroups: [{{ name: closed, securityRules: [] }}]
networkInterfaces:
  - {{ name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{{ subnet: web, privateIPAddress: 10.0.1.11 }}] }}
  - {{ name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{{ subnet: web, privateIPAddress: 10.0.1.12 }}] }}
publicIPAddresses:
  - {{ name: one, ipAddress: 203.0.113.10, announce: proxy }}
  - {{ name: two, ipAddress: 203.0.113.11, announce: proxy }}
loadBalancers:
  - {{ name: lb, {balancer} }}
uplinks: [{{ device: up }}]
snat: {{ {snat} }}
"
    );
    HostBackend::new(&yaml).unwrap()
}

const ONE: &str = "frontendIPConfigurations: [{ name: one, publicIPAddress: one }], backendAddressPools: [{ name: a, backendIPConfigurations: [vm1] }]";

fn craft(guest: u8, to: Ipv4Addr) -> Craft {
    Craft::new([2, 0, 0, 0, 0, guest], Ipv4Addr::new(10, 0, 1, 10 + guest), GATEWAY, to)
}

/// Under which address and port this packet of a guest's leaves, of a ping with its identifier as the port.
fn leaves(t: &mut HostBackend, guest: u8, frame: &[u8]) -> SocketAddr {
    let outcome = t.run(At::Ingress(if guest == 1 { "vm1" } else { "vm2" }), frame).unwrap();
    assert_eq!(outcome.action, Action::Send);
    let out = Frame::parse(outcome.frame);
    let ip = out.ip.as_ref().unwrap();
    match ip.transport {
        Transport::Icmp { id, .. } => SocketAddr::new(ip.source, id),
        _ => out.source().unwrap(),
    }
}

fn connects(t: &mut HostBackend, guest: u8, from: u16, to: (Ipv4Addr, u16)) -> SocketAddr {
    leaves(t, guest, &craft(guest, to.0).tcp(from, to.1, TcpFlags::SYN, 1, 0, b""))
}

fn sends(t: &mut HostBackend, guest: u8, from: u16, to: (Ipv4Addr, u16)) -> SocketAddr {
    leaves(t, guest, &craft(guest, to.0).udp(from, to.1, b"?"))
}

#[test]
fn a_source_port_below_1024_leaves_above_and_even_ones_and_odd_ones_under_either() {
    for snat in ["profile: azure", "profile: rfc"] {
        let out = "outboundRules: [{ name: out, frontendIPConfigurations: [one], backendAddressPool: a, protocol: All, allocatedOutboundPorts: 1024 }]";
        let mut t = gateway(&format!("{ONE}, {out}"), snat);
        let mut kept = 0;
        for port in [1, 53, 123, 500, 1023].into_iter().chain(5000..5200) {
            let outside = [connects(&mut t, 1, port, (SERVER, 80)), sends(&mut t, 1, port, (SERVER, 53))];
            for outside in outside {
                assert!(outside.port() >= SYSTEM_PORTS, "{snat}: {port} left as {outside}");
                kept += usize::from(outside.port() % 2 == port % 2);
            }
        }
        assert!((100..310).contains(&kept), "{snat}: parity is chance, {kept} of 410");
    }
}

#[test]
fn datagrams_connections_and_pings_of_a_guest_leave_under_one_address_as_long_as_its_ports_last() {
    let two = "frontendIPConfigurations: [{ name: one, publicIPAddress: one }, { name: two, publicIPAddress: two }], backendAddressPools: [{ name: a, backendIPConfigurations: [vm1] }]";
    let out = "outboundRules: [{ name: out, frontendIPConfigurations: [one, two], backendAddressPool: a, protocol: All, allocatedOutboundPorts: 128 }]";
    for snat in ["profile: azure", "profile: rfc"] {
        let mut t = gateway(&format!("{two}, {out}"), snat);
        let mut addresses = BTreeMap::new();
        for socket in 5000..5030 {
            let ping = craft(1, SERVER).echo_request(socket, 1, b"?");
            for outside in [
                connects(&mut t, 1, socket, (SERVER, 80)),
                sends(&mut t, 1, socket, (SERVER, 53)),
                leaves(&mut t, 1, &ping),
            ] {
                *addresses.entry(outside.ip()).or_insert(0) += 1;
            }
        }
        assert_eq!(addresses.len(), 1, "{snat}: {addresses:?}");
    }
}

#[test]
fn one_port_of_tcp_and_of_udp_are_two_guests_at_once() {
    let balancer = "frontendIPConfigurations: [{ name: one, publicIPAddress: one }], backendAddressPools: [{ name: a, backendIPConfigurations: [vm1] }, { name: b, backendIPConfigurations: [vm2] }], \
                    outboundRules: [{ name: tcp, frontendIPConfigurations: [one], backendAddressPool: a, protocol: Tcp, allocatedOutboundPorts: 8 }, { name: udp, frontendIPConfigurations: [one], backendAddressPool: b, protocol: Udp, allocatedOutboundPorts: 8 }]";
    let mut t = gateway(balancer, "profile: rfc");
    let mut sorted = |of: &mut dyn FnMut(&mut HostBackend, u16) -> SocketAddr| {
        let mut all: Vec<SocketAddr> = (5000..5008).map(|socket| of(&mut t, socket)).collect();
        all.sort_unstable();
        all
    };
    let tcp = sorted(&mut |t, socket| connects(t, 1, socket, (SERVER, 80)));
    let udp = sorted(&mut |t, socket| sends(t, 2, socket, (SERVER, 53)));
    assert_eq!(tcp, udp, "all eight, of each protocol");
}

#[test]
fn the_ports_of_many_flows_are_spread_evenly_and_with_other_keys_they_are_others() {
    let out = "outboundRules: [{ name: out, frontendIPConfigurations: [one], backendAddressPool: a, protocol: All, allocatedOutboundPorts: 64 }]";
    let chosen = |seed: Option<[u64; 2]>| -> Vec<u16> {
        let mut t = gateway(&format!("{ONE}, {out}"), "profile: azure");
        if let Some(seed) = seed {
            t.env.control.seed = seed;
        }
        // A destination of its own for each: every flow has its first choice.
        (0..3200).map(|n| connects(&mut t, 1, 5000, (Ipv4Addr::new(198, 51, 100, 7), 1 + n)).port()).collect()
    };
    let ports = chosen(None);
    let mut times = BTreeMap::new();
    for port in &ports {
        *times.entry(port).or_insert(0_u32) += 1;
    }
    assert_eq!(times.len(), 64);
    // 50 each; 7 is the standard deviation.
    assert!(times.values().all(|times| (15..85).contains(times)), "{times:?}");
    let steps = ports.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 1).count();
    assert!(steps < 300, "one in 21 is next to the one before, here {steps} of 3,200");
    let others = chosen(Some([7, 8]));
    let same = ports.iter().zip(&others).filter(|(a, b)| a == b).count();
    assert!(same < 150, "one in 64 is the same by chance, here {same} of 3,200");
    assert_eq!(chosen(None), ports, "nothing but the keys and the flow decide");
}

#[test]
fn who_knocks_unasked_hears_nothing_and_hinders_no_connection_to_it() {
    let out = "outboundRules: [{ name: out, frontendIPConfigurations: [one], backendAddressPool: a, protocol: All, allocatedOutboundPorts: 64 }]";
    let peer = Ipv4Addr::new(198, 51, 100, 8);
    for (snat, reason) in [("profile: azure", Reason::NoFlow), ("profile: rfc", Reason::DeniedByRule)] {
        let mut t = gateway(&format!("{ONE}, {out}"), snat);
        let outside = connects(&mut t, 1, 5000, (SERVER, 80));
        let SocketAddr::V4(public) = outside else { panic!("{outside}") };
        let knock = Craft::new(ROUTER_MAC, peer, GATEWAY, *public.ip()).tcp(
            80,
            public.port(),
            TcpFlags::SYN,
            9,
            0,
            b"",
        );
        for n in 1..=3 {
            let outcome = t.run(At::Ingress("up"), &knock).unwrap();
            assert_eq!(outcome.action, Action::Drop, "{snat}");
            assert_eq!(t.env.counted(reason).packets, n, "{snat}");
        }
        let called = connects(&mut t, 1, 5000, (peer, 80));
        if snat.contains("rfc") {
            assert_eq!(called, outside);
        }
        let answer = Craft::new(ROUTER_MAC, peer, GATEWAY, *public.ip()).tcp(
            80,
            called.port(),
            TcpFlags::SYN_ACK,
            9,
            2,
            b"",
        );
        assert_eq!(t.run(At::Ingress("up"), &answer).unwrap().action, Action::Send, "{snat}");
    }
}
