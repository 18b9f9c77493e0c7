//! What a change of rules does to flows that live: `onRuleChange`, with real sockets, under XDP and under TC.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use portcullis_tests::edge::{HookCheck, WithHook};
use portcullis_tests::lab::{Namespace, TcpEcho, tcp_connect, udp_socket};
use portcullis_tests::site::{LIMIT, SERVER, SOON, Site, apply, at, echoes, private, public};

const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

/// A UDP socket at each end of a flow that has been used both ways.
fn datagram_flow(
    from: &Namespace,
    to: &Namespace,
    server: SocketAddr,
    seen_at: SocketAddr,
) -> (UdpSocket, UdpSocket) {
    let listener = udp_socket(to, server).unwrap();
    let client = udp_socket(from, at(Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    client.connect(seen_at).unwrap();
    for socket in [&listener, &client] {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
    }
    client.send(b"first").unwrap();
    let (_, peer) = listener.recv_from(&mut [0; 16]).unwrap();
    listener.connect(peer).unwrap();
    assert!(crosses(&listener, &client, LIMIT));
    (client, listener)
}

fn crosses(from: &UdpSocket, to: &UdpSocket, within: Duration) -> bool {
    to.set_read_timeout(Some(within)).unwrap();
    // A socket that was told of an unreachable port says so first.
    from.send(b"more").is_ok() && matches!(to.recv(&mut [0; 16]), Ok(4))
}

fn deny(direction: &str, port: u16) -> String {
    format!(
        "{{ name: Deny{direction}{port}, priority: {port}, direction: {direction}, access: Deny, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: {port} }}"
    )
}

#[test]
fn a_change_of_rules_cuts_the_flows_it_denies_with_reevaluate_and_none_with_keep() {
    for hook in BOTH {
        for (word, cuts) in [("reevaluate", true), ("keep", false)] {
            let what = format!("{hook:?}, {word}");
            let mut site = Site::new(hook, &[1, 2]);
            site.nic.insert(1, "networkSecurityGroup: nsg".into());
            let open = "{ name: Open, priority: 4000, direction: Inbound, access: Allow, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: 2000-2001 }";
            let policy = |rules: &str| {
                format!(
                    "onRuleChange: {word}\nnetworkSecurityGroups: [{{ name: nsg, securityRules: [{open}{rules}] }}]\n"
                )
            };
            let edge = site.start(&policy(""));
            let (internet, vm1, vm2) =
                (edge.topology.internet(), edge.topology.guest("vm1"), edge.topology.guest("vm2"));
            let [inside, other] = [private(1, 1), private(2, 2)];
            let _servers = [
                TcpEcho::start(internet, at(SERVER, 1000)).unwrap(),
                TcpEcho::start(internet, at(SERVER, 1001)).unwrap(),
                TcpEcho::start(vm1, at(inside, 2000)).unwrap(),
                TcpEcho::start(vm1, at(inside, 2001)).unwrap(),
                TcpEcho::start(vm2, at(other, 1000)).unwrap(),
            ];
            let check = HookCheck::begin(&edge, hook).unwrap();
            // Port 1000 outbound and port 2000 inbound will be denied, their neighbours not.
            let mut condemned = [
                ("to the world", tcp_connect(vm1, None, at(SERVER, 1000), LIMIT).unwrap()),
                ("from the world", tcp_connect(internet, None, at(public(1), 2000), LIMIT).unwrap()),
                ("to a guest", tcp_connect(vm1, None, at(other, 1000), LIMIT).unwrap()),
                ("from a guest", tcp_connect(vm2, None, at(inside, 2000), LIMIT).unwrap()),
            ];
            let mut spared = [
                ("to the world", tcp_connect(vm1, None, at(SERVER, 1001), LIMIT).unwrap()),
                ("from the world", tcp_connect(internet, None, at(public(1), 2001), LIMIT).unwrap()),
            ];
            for (way, stream) in condemned.iter_mut().chain(&mut spared) {
                assert!(echoes(stream, LIMIT), "{what}: {way}, before");
            }
            // With datagrams nobody answers unasked, so the two sides can be told apart.
            let (client, server) = datagram_flow(vm1, internet, at(SERVER, 1000), at(SERVER, 1000));
            let (visitor, local) = datagram_flow(internet, vm1, at(inside, 2000), at(public(1), 2000));

            apply(
                &edge,
                &site.yaml(&policy(&format!(", {}, {}", deny("Outbound", 1000), deny("Inbound", 2000)))),
            );
            let denied = |direction: &str, port: u16| {
                edge.rule_hits("nsg", direction, &format!("Deny{direction}{port}")).unwrap()
            };
            for (way, answering, initiator) in [("outbound", &server, &client), ("inbound", &local, &visitor)]
            {
                for _ in 0..3 {
                    assert!(
                        crosses(answering, initiator, LIMIT),
                        "{what}: answers of an {way} flow are not judged"
                    );
                }
            }
            assert_eq!(
                (denied("Outbound", 1000), denied("Inbound", 2000)),
                (0, 0),
                "{what}: nor do they trigger it"
            );
            if cuts {
                let drops = edge.reason("denied_by_rule").unwrap();
                assert!(!crosses(&client, &server, SOON), "{what}: the initiator's next datagram");
                assert_eq!(
                    (denied("Outbound", 1000), denied("Inbound", 2000)),
                    (1, 0),
                    "{what}: under the rule's name"
                );
                assert!(!crosses(&visitor, &local, SOON), "{what}: from the world too");
                assert_eq!((denied("Outbound", 1000), denied("Inbound", 2000)), (1, 1), "{what}");
                assert_eq!(
                    edge.reason("denied_by_rule").unwrap(),
                    drops + 2,
                    "{what}: and counted as denied"
                );
                assert!(!crosses(&server, &client, SOON), "{what}: the flow is gone, for its answers too");
            } else {
                assert!(
                    crosses(&client, &server, LIMIT) && crosses(&visitor, &local, LIMIT),
                    "{what}: they live on"
                );
            }
            for (way, stream) in &mut condemned {
                let (direction, port) =
                    if way.starts_with("to") { ("Outbound", 1000) } else { ("Inbound", 2000) };
                let before = denied(direction, port);
                assert_eq!(echoes(stream, if cuts { SOON } else { LIMIT }), !cuts, "{what}: TCP {way}");
                assert_eq!(denied(direction, port) > before, cuts, "{what}: TCP {way}, the rule's counter");
            }
            for (way, stream) in &mut spared {
                assert!(echoes(stream, LIMIT), "{what}: unaffected, {way}");
            }
            // Whatever lives, new ones are denied.
            let new = tcp_connect(vm1, None, at(SERVER, 1000), SOON);
            assert!(new.is_err(), "{what}: a new connection");
            check.end(&edge).unwrap();
        }
    }
}
