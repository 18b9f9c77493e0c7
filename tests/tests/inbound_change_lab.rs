//! Connections from outside and between guests while the policy moves what they came by, under XDP and under TC.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};

use portcullis_tests::edge::{Edge, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{Namespace, TcpEcho, TcpHold, tcp_connect, tcp_exchange};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, echoes, private};

const OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 21);

/// vm1 serves a frontend; vm2 calls it.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip1, ipAddress: 203.0.113.21, announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 16 }]
";
const RULE: &str = "    inboundNatRules: [{ name: web, frontendIPConfiguration: fe, protocol: Tcp, frontendPort: 80, backendPort: 8080, backendIPConfiguration: vm1 }]\n";

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

#[test]
fn connections_from_outside_and_by_hairpin_outlive_the_rule_and_the_address_they_came_by() {
    under_both(|hook| {
        let lab = Frontends::new(hook, &[1, 1]);
        let own = {
            let mut own = lab.clone();
            own.configuration.insert(1, "publicIPAddress: pip1".into());
            own
        };
        let with_rule = format!("{REST}{RULE}");
        let edge = lab.start(&with_rule);
        let world = edge.topology.internet().clone();
        let server = TcpEcho::start(vm(&edge, 1), at(private(1, 1), 8080)).unwrap();
        let mut live: Vec<(&str, TcpStream)> = Vec::new();
        let open = |from: &Namespace, to: SocketAddr| {
            let mut stream = tcp_connect(from, None, to, LIMIT).unwrap();
            // The server has seen who it is.
            assert!(echoes(&mut stream, LIMIT), "{hook:?}: to {to}");
            stream
        };
        let all_live = |live: &mut Vec<(&str, TcpStream)>, when: &str| {
            for (what, stream) in live {
                assert!(echoes(stream, LIMIT), "{hook:?}, {when}: {what}: {:?}", edge.reasons());
            }
        };
        let refused = |from: &Namespace, to: SocketAddr, what: &str| {
            let error = tcp_exchange(from, None, to, b"?", SOON).expect_err(what);
            assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{hook:?}: {what}");
        };
        live.push(("from the world, by the rule", open(&world, at(FRONTEND, 80))));
        live.push(("from a neighbour, by the rule", open(vm(&edge, 2), at(FRONTEND, 80))));
        live.push(("from itself, by the rule", open(vm(&edge, 1), at(FRONTEND, 80))));

        apply(&edge, &own.yaml(&with_rule));
        all_live(&mut live, "it got an address of its own");
        live.push(("from the world, by its address", open(&world, at(OWN, 8080))));
        live.push(("from a neighbour, by its address", open(vm(&edge, 2), at(OWN, 8080))));
        live.push(("from the world, by the rule, later", open(&world, at(FRONTEND, 80))));
        let peers = server.peers();
        let from: Vec<IpAddr> = peers.iter().map(SocketAddr::ip).collect();
        let (client, guest) = (IpAddr::from(SERVER), IpAddr::from(FRONTEND));
        assert_eq!(from, [client, guest, guest, client, guest, client], "{hook:?}");
        let itself = open(vm(&edge, 1), at(FRONTEND, 80));
        live.push(("from itself, under its address", itself));
        assert_eq!(server.peers()[6].ip(), IpAddr::from(OWN), "{hook:?}: new ones leave under its own");

        apply(&edge, &own.yaml(REST));
        all_live(&mut live, "the rule is gone");
        refused(&world, at(FRONTEND, 80), "the rule is gone");
        refused(vm(&edge, 2), at(FRONTEND, 80), "for guests too");

        apply(&edge, &lab.yaml(REST));
        all_live(&mut live, "its address is gone");
        refused(&world, at(OWN, 8080), "the address is nobody's");
        all_live(&mut live, "and refusals change nothing");
        assert_eq!(server.peers().len(), 7, "{hook:?}: nobody connected anew");
    });
}

#[test]
fn a_hairpin_uses_the_callers_ports_and_is_refused_like_any_flow_when_there_are_none() {
    under_both(|hook| {
        let lab = Frontends::new(hook, &[1, 1]);
        let rest = format!("{REST}{RULE}snat: {{ onExhaustion: reset }}\n");
        let edge = lab.start(&rest);
        let server = TcpEcho::start(vm(&edge, 1), at(private(1, 1), 8080)).unwrap();
        let mut hold = TcpHold::open(vm(&edge, 2), at(FRONTEND, 80), 16, LIMIT).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (16, 16), "{hook:?}: {:?}", hold.failures());
        for peer in server.peers() {
            assert!(edge.owns("vm2", peer.port()).unwrap(), "{hook:?}: {peer} is vm2's");
        }
        let error = tcp_exchange(vm(&edge, 2), None, at(FRONTEND, 80), b"?", LIMIT).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{hook:?}");
        assert!(edge.reason("snat_exhausted").unwrap() >= 1, "{hook:?}: {:?}", edge.reasons());
        assert_eq!(hold.alive(LIMIT), 16, "{hook:?}");
        tcp_exchange(vm(&edge, 1), None, at(FRONTEND, 80), b"its neighbour", LIMIT).unwrap();

        // Who has no way out has none to this gateway's addresses either.
        apply(
            &edge,
            &lab.yaml(&rest.replace("backendIPConfigurations: [vm1, vm2]", "backendIPConfigurations: [vm1]")),
        );
        assert_eq!(hold.alive(LIMIT), 16, "{hook:?}: live ones go on");
        // What was refused is remembered for a quarter of a second.
        std::thread::sleep(SOON / 2);
        let before = edge.reason("no_outbound_method").unwrap();
        let error = tcp_exchange(vm(&edge, 2), None, at(FRONTEND, 80), b"?", SOON).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{hook:?}");
        assert_eq!(edge.reason("no_outbound_method").unwrap(), before + 1, "{hook:?}");
    });
}
