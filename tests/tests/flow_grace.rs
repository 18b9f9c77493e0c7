//! The moment between a flow's end and the reuse of its slots, tick by tick on the host engine, where time is ours: whose the
//! flow was goes on at once, and his port is nobody else's until the moment is over.

use std::net::Ipv4Addr;

use portcullis_common::Reason::{self, Forwarded, NewFlow};
use portcullis_common::clock::{GRACE, ticks};
use portcullis_common::quota::held;
use portcullis_tests::backend::{Action, At, Backend as _, HostBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Frame};

const POLICY: &str = r#"
virtualNetworks: [{ name: lab, addressSpace: { addressPrefixes: [10.0.0.0/16] }, subnets: [{ name: web, addressPrefix: 10.0.1.0/24 }] }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{ subnet: web, privateIPAddress: 10.0.1.5, publicIPAddress: own }] }
networkSecurityGroups: []
publicIPAddresses: [{ name: pip, ipAddress: 203.0.113.10, announce: proxy }, { name: own, ipAddress: 203.0.113.20, announce: proxy }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }]
timeouts: { udpSeconds: 5, icmpSeconds: 5, otherSeconds: 5 }
uplinks: [{ device: up }]
"#;

const VM1: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
const VM2: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const START: u32 = 1_000_000;

fn from(guest: u8, address: Ipv4Addr, destination: Ipv4Addr) -> Craft {
    Craft::new([2, 0, 0, 0, 0, guest], address, [2, 0, 0, 0, 0xaa, guest - 1], destination)
}

/// What a flow sends, and where; each lives for five seconds.
fn flows() -> [(&'static str, &'static str, Vec<u8>); 4] {
    [
        ("by port", "vm1", from(1, VM1, SERVER).udp(5000, 53, b"?")),
        ("a ping by port", "vm1", from(1, VM1, SERVER).echo_request(77, 1, b"ping")),
        ("under an address of its own", "vm2", from(2, VM2, SERVER).udp(5000, 53, b"?")),
        ("to a neighbour", "vm1", from(1, VM1, VM2).udp(5000, 53, b"?")),
    ]
}

fn counted(backend: &HostBackend, reason: Reason) -> u64 {
    backend.counters().unwrap().get(&reason).copied().unwrap_or(0)
}

#[test]
fn whoever_had_a_flow_opens_it_anew_at_every_tick_after_its_end() {
    for (what, device, frame) in flows() {
        let mut lived = 0;
        for late in 0..3 * GRACE + 40 {
            let mut backend = HostBackend::new(POLICY).unwrap();
            let mut send = |at: u32| {
                backend.env.set_now(at);
                let outcome = backend.run(At::Ingress(device), &frame).unwrap();
                assert_eq!(
                    outcome.action,
                    Action::Send,
                    "{what}, {late} ticks late: {:?}",
                    backend.counters()
                );
            };
            send(START);
            let span = ticks(5);
            send(START + span + late);
            // The flow lived still, or is a new one; nothing else is counted.
            let (new, old) = (counted(&backend, NewFlow), counted(&backend, Forwarded));
            assert_eq!((new + old, backend.counters().unwrap().values().sum::<u64>()), (2, 2), "{what}");
            lived += old;
        }
        assert!(lived >= 1, "{what}: at its last tick it lives");
        assert!(lived < u64::from(3 * GRACE + 40), "{what}: and ends");
    }
}

#[test]
fn a_flow_opened_anew_is_whole_and_counts_once() {
    let mut backend = HostBackend::new(POLICY).unwrap();
    let frame = from(1, VM1, SERVER).udp(5000, 53, b"?");
    let mut ports = Vec::new();
    let mut at = START;
    for round in 0..20 {
        backend.env.set_now(at);
        let outcome = backend.run(At::Ingress("vm1"), &frame).unwrap();
        assert_eq!(outcome.action, Action::Send, "round {round}: {:?}", backend.counters());
        let port = Frame::parse(outcome.frame).source().unwrap().port();
        let gateway = [2, 0, 0, 0, 0xaa, 2];
        let answer =
            Craft::new(ROUTER_MAC, SERVER, gateway, Ipv4Addr::new(203, 0, 113, 10)).udp(53, port, b"!");
        let back = backend.run(At::Ingress("up"), &answer).unwrap();
        assert_eq!(back.action, Action::Send, "round {round}: its answer; {:?}", backend.counters());
        assert_eq!(Frame::parse(back.frame).destination().unwrap(), (VM1, 5000).into());
        assert_eq!(held(backend.guest_flows("vm1/ipconfig1").unwrap().held), 1, "round {round}");
        ports.push(port);
        at += ticks(5) + 1 + round % (GRACE + 2);
    }
    assert!(counted(&backend, NewFlow) >= 15, "{:?}", backend.counters());
}
