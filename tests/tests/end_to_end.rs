//! Real clients and servers through a running gateway on clean veth, under XDP and under TC.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{
    Craft, HttpServer, IperfOptions, RawSender, TcpEcho, TcpHold, TopologySpec, UdpEcho, bits_per_second,
    curl, eventually, eventually_some, iperf3, ping, tcp_exchange, udp_exchange,
};

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn v4(address: SocketAddr) -> (Ipv4Addr, u16) {
    match address.ip() {
        IpAddr::V4(ip) => (ip, address.port()),
        IpAddr::V6(ip) => panic!("{ip} in a lab without IPv6"),
    }
}

fn start(hook: WithHook, guests: u8, change: impl FnOnce(&mut LabPolicy)) -> Edge {
    let spec = TopologySpec::clean_veth(guests);
    let mut policy = LabPolicy::new(hook);
    change(&mut policy);
    Edge::start(&spec, &policy.yaml(&spec)).unwrap()
}

/// One round trip of everything, so that neighbours and guests are known.
fn warm_up(edge: &Edge, guests: &[&str]) {
    for guest in guests {
        let reached = ping(edge.topology.guest(guest), SERVER.into(), 2, LIMIT).unwrap();
        assert!(reached.received > 0, "{guest} reaches the internet: {reached:?}");
    }
}

#[test]
fn tcp_udp_and_ping_arrive_from_the_frontend_with_ports_the_guest_owns_and_replies_return() {
    for hook in BOTH {
        let edge = start(hook, 2, |_| {});
        let guest = edge.topology.guest("vm1");
        let tcp = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 53)).unwrap();
        let wire = edge.topology.sniff_internet().unwrap();
        warm_up(&edge, &["vm1", "vm2"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        {
            let sent = tcp_exchange(guest, None, at(SERVER, 80), b"hello over tcp", LIMIT).unwrap();
            assert_eq!(sent.echoed, b"hello over tcp", "{hook:?}");
            let sent = udp_exchange(guest, Some(5000), at(SERVER, 53), b"hello over udp", LIMIT).unwrap();
            assert_eq!(sent.echoed, b"hello over udp", "{hook:?}");
            let pinged = ping(guest, SERVER.into(), 3, LIMIT).unwrap();
            assert_eq!((pinged.sent, pinged.received), (3, 3), "{hook:?}");
        }
        check.end(&edge).unwrap();
        for peers in [tcp.peers(), udp.peers()] {
            assert_eq!(peers.len(), 1, "{hook:?}: {peers:?}");
            let (address, port) = v4(peers[0]);
            assert_eq!(address, FRONTEND, "{hook:?}");
            assert!(edge.owns("vm1", port).unwrap(), "{hook:?}: {port} is vm1's");
            assert!(!edge.owns("vm2", port).unwrap());
        }
        assert!(
            wire.private_sources(&["10.0.0.0/8".parse().unwrap()]).is_empty(),
            "{hook:?}: private source on the uplink"
        );
        assert!(wire.bad_checksums().is_empty(), "{hook:?}: {:?}", wire.bad_checksums());
    }
}

#[test]
fn real_clients_curl_and_iperf3_work_through_the_gateway() {
    for hook in BOTH {
        let edge = start(hook, 1, |_| {});
        warm_up(&edge, &["vm1"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let http = HttpServer::start(edge.topology.internet(), at(SERVER, 8080), "it works").unwrap();
        let reply =
            curl(edge.topology.guest("vm1"), &format!("http://{}/", http.address()), LIMIT, &[]).unwrap();
        assert_eq!((reply.status, reply.body.as_str()), (200, "it works"), "{hook:?}");
        let options = IperfOptions { seconds: 1, ..IperfOptions::default() };
        let report = iperf3(
            edge.topology.internet(),
            at(SERVER, 5201),
            edge.topology.guest("vm1"),
            at(SERVER, 5201),
            &options,
        )
        .unwrap();
        let rate = bits_per_second(&report).unwrap();
        assert!(rate > 1e6, "{hook:?}: {rate} bit/s");
        check.end(&edge).unwrap();
    }
}

#[test]
fn a_denied_packet_does_not_arrive_and_counts_under_its_rule() {
    for hook in BOTH {
        let edge = start(hook, 1, |policy| {
            policy.subnet_group = Some("web");
            policy.extra = "networkSecurityGroups:\n  - name: web\n    securityRules:\n      - { name: DenySmtp, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: Internet, destinationPortRange: 25 }\n".into();
        });
        warm_up(&edge, &["vm1"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 25)).unwrap();
        let wire = edge.topology.sniff_internet().unwrap();
        let failed = tcp_exchange(edge.topology.guest("vm1"), None, at(SERVER, 25), b"EHLO", SOON);
        assert!(failed.is_err(), "{hook:?}");
        assert!(server.peers().is_empty(), "{hook:?}");
        assert!(
            !wire.frames().iter().any(|f| f.destination().is_some_and(|d| d.port() == 25)),
            "{hook:?}: on the wire"
        );
        assert!(edge.rule_hits("web", "Outbound", "DenySmtp").unwrap() >= 1, "{hook:?}");
        assert!(edge.reasons().unwrap()["denied_by_rule"] >= 1, "{hook:?}");
        check.end(&edge).unwrap();
    }
}

#[test]
fn guest_to_guest_is_filtered_by_both_guests_groups() {
    for hook in BOTH {
        let edge = start(hook, 3, |policy| {
            policy.nic_groups.insert("vm1", "sender");
            policy.nic_groups.insert("vm2", "receiver");
            policy.extra = "networkSecurityGroups:\n  - name: sender\n    securityRules:\n      - { name: NoOut81, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 81 }\n  - name: receiver\n    securityRules:\n      - { name: NoIn82, priority: 100, direction: Inbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 82 }\n".into();
        });
        warm_up(&edge, &["vm1", "vm2", "vm3"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let vm2 = Ipv4Addr::new(10, 0, 0, 5);
        let servers: Vec<TcpEcho> = (80..=82)
            .map(|port| TcpEcho::start(edge.topology.guest("vm2"), at(vm2, port)).unwrap())
            .collect();
        let reached = tcp_exchange(edge.topology.guest("vm1"), None, at(vm2, 80), b"80", LIMIT).unwrap();
        assert_eq!(reached.echoed, b"80", "{hook:?}");
        assert_eq!(v4(servers[0].peers()[0]).0, Ipv4Addr::new(10, 0, 0, 4), "{hook:?}: the private address");
        for port in [81, 82] {
            assert!(
                tcp_exchange(edge.topology.guest("vm1"), None, at(vm2, port), b"no", SOON).is_err(),
                "{hook:?}: {port}"
            );
        }
        assert!(
            tcp_exchange(edge.topology.guest("vm3"), None, at(vm2, 81), b"81", LIMIT).is_ok(),
            "{hook:?}: vm3 has no such rule"
        );
        assert!(edge.rule_hits("sender", "Outbound", "NoOut81").unwrap() >= 1);
        assert!(edge.rule_hits("receiver", "Inbound", "NoIn82").unwrap() >= 1);
        check.end(&edge).unwrap();
    }
}

#[test]
fn an_instance_level_ip_keeps_the_source_port_and_works_inbound() {
    for hook in BOTH {
        let edge = start(hook, 2, |policy| {
            policy.instances.insert("vm1", "203.0.113.20");
            policy.nic_groups.insert("vm1", "open443");
            policy.extra = "networkSecurityGroups:\n  - name: open443\n    securityRules:\n      - { name: AllowHttps, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 443 }\n".into();
        });
        warm_up(&edge, &["vm1"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let instance = Ipv4Addr::new(203, 0, 113, 20);
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        tcp_exchange(edge.topology.guest("vm1"), Some(45678), at(SERVER, 80), b"out", LIMIT).unwrap();
        assert_eq!(v4(server.peers()[0]), (instance, 45678), "{hook:?}");
        // From here on the other side is on the uplink's own link, where XDP leaves resolving to TC (ADR 0003).
        check.end(&edge).unwrap();
        let inside = [443, 22].map(|port| {
            TcpEcho::start(edge.topology.guest("vm1"), at(Ipv4Addr::new(10, 0, 0, 4), port)).unwrap()
        });
        let reached = tcp_exchange(edge.topology.internet(), None, at(instance, 443), b"in", LIMIT).unwrap();
        assert_eq!(reached.echoed, b"in", "{hook:?}");
        assert_eq!(
            v4(inside[0].peers()[0]).0,
            Ipv4Addr::new(203, 0, 113, 100),
            "{hook:?}: the client's own address"
        );
        assert!(
            tcp_exchange(edge.topology.internet(), None, at(instance, 22), b"no", SOON).is_err(),
            "{hook:?}"
        );
        assert!(edge.rule_hits("open443", "Inbound", "DenyAllInBound").unwrap() >= 1);
    }
}

#[test]
fn spoofed_ipv4_and_arp_are_dropped_and_counted() {
    for hook in BOTH {
        let edge = start(hook, 2, |_| {});
        warm_up(&edge, &["vm1", "vm2"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let spec = edge.topology.guest_spec("vm1").clone();
        let wire = edge.topology.sniff_internet().unwrap();
        let raw = RawSender::open(edge.topology.guest("vm1"), "eth0").unwrap();
        let before = edge.reasons().unwrap();
        let stolen = Craft::new(spec.mac, Ipv4Addr::new(10, 0, 0, 5), spec.gateway_mac, SERVER);
        raw.send(&stolen.udp(7, 7, b"not mine")).unwrap();
        let other_mac = Craft::new([2, 9, 9, 9, 9, 9], spec.address, spec.gateway_mac, SERVER);
        raw.send(&other_mac.udp(7, 7, b"not me")).unwrap();
        raw.send(&Craft::arp_request(spec.mac, Ipv4Addr::new(10, 0, 0, 5), spec.gateway)).unwrap();
        raw.send(&Craft::arp_reply(spec.mac, spec.gateway, [0xff; 6], Ipv4Addr::new(10, 0, 0, 5))).unwrap();
        let counted = eventually(LIMIT, || {
            let now = edge.reasons().unwrap();
            let moved = |reason: &str| now.get(reason).unwrap_or(&0) - before.get(reason).unwrap_or(&0);
            moved("spoofed_source") == 2 && moved("spoofed_arp") == 2
        });
        assert!(counted, "{hook:?}: {:?}", edge.reasons());
        assert!(!wire.frames().iter().any(|f| f.destination().is_some_and(|d| d.port() == 7)), "{hook:?}");
        assert!(
            ping(edge.topology.guest("vm2"), SERVER.into(), 1, LIMIT).unwrap().received == 1,
            "{hook:?}: vm2 is as before"
        );
        check.end(&edge).unwrap();
    }
}

#[test]
fn two_guests_with_the_same_source_port_to_the_same_server_get_different_ports() {
    for hook in BOTH {
        let edge = start(hook, 2, |_| {});
        warm_up(&edge, &["vm1", "vm2"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        for guest in ["vm1", "vm2"] {
            tcp_exchange(edge.topology.guest(guest), Some(40000), at(SERVER, 80), guest.as_bytes(), LIMIT)
                .unwrap();
        }
        let seen: BTreeSet<_> = server.peers().into_iter().map(v4).collect();
        assert_eq!(seen.len(), 2, "{hook:?}: {seen:?}");
        assert!(seen.iter().all(|(address, _)| *address == FRONTEND), "{hook:?}");
        for guest in ["vm1", "vm2"] {
            let answer = edge.ask(&["flows", "--guest", guest]).unwrap();
            let told = answer["flows"].as_array().unwrap().iter().any(|flow| {
                flow["sourcePort"] == 40000
                    && flow["translatedSource"] == FRONTEND.to_string()
                    && seen.iter().any(|(_, port)| flow["translatedSourcePort"] == *port)
            });
            assert!(told, "{hook:?}: `flows` shows what the server saw: {answer}");
        }
        let table = edge.daemon.ask_text(&["flows"]).unwrap();
        assert!(table.contains("203.0.113.10"), "{hook:?}: and so does its table: {table}");
        check.end(&edge).unwrap();
    }
}

#[test]
fn of_1025_concurrent_flows_to_one_destination_1024_work_and_another_guest_is_unaffected() {
    for hook in BOTH {
        let edge = start(hook, 2, |_| {});
        warm_up(&edge, &["vm1", "vm2"]);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let mut held =
            TcpHold::open(edge.topology.guest("vm1"), at(SERVER, 80), 1025, Duration::from_secs(4)).unwrap();
        assert_eq!(held.established(), 1024, "{hook:?}");
        assert_eq!(held.alive(LIMIT), 1024, "{hook:?}: every one of them carries data");
        let ports: BTreeSet<_> = server.peers().into_iter().map(v4).collect();
        assert_eq!(ports.len(), 1024, "{hook:?}: each with a port of its own");
        assert!(ports.iter().all(|(address, _)| *address == FRONTEND));
        let reasons = edge.reasons().unwrap();
        assert!(reasons.get("snat_exhausted").is_some_and(|n| *n >= 1), "{hook:?}: {reasons:?}");
        let other = tcp_exchange(edge.topology.guest("vm2"), None, at(SERVER, 80), b"me too", LIMIT).unwrap();
        assert_eq!(other.echoed, b"me too", "{hook:?}");
        let second = TcpEcho::start(edge.topology.internet(), at(SERVER, 81)).unwrap();
        tcp_exchange(edge.topology.guest("vm1"), None, at(SERVER, 81), b"elsewhere", LIMIT).unwrap();
        assert_eq!(second.peers().len(), 1, "{hook:?}: another destination has ports");
        check.end(&edge).unwrap();
    }
}

#[test]
fn ports_come_back_when_flows_close_or_idle_with_the_daemon_alive_or_dead() {
    for hook in BOTH {
        let mut edge = start(hook, 1, |policy| {
            policy.ports = 8;
            policy.extra = "timeouts: { tcpEstablishedSeconds: 3, tcpHalfOpenSeconds: 2, tcpFinSeconds: 1, tcpResetSeconds: 1, udpSeconds: 2, icmpSeconds: 2 }\n".into();
        });
        // The ping's identifier takes nothing from TCP.
        warm_up(&edge, &["vm1"]);
        let mut check = Some(HookCheck::begin(&edge, hook).unwrap());
        let guest = edge.topology.guest("vm1").clone();
        for (port, daemon_dead) in [(80, false), (81, true)] {
            // A server of its own each time: the other still has connections that only the gateway has forgotten.
            let server = TcpEcho::start(edge.topology.internet(), at(SERVER, port)).unwrap();
            if daemon_dead {
                HookCheck::end(check.take().unwrap(), &edge).unwrap();
                edge.daemon.kill();
            }
            let established = |seconds| {
                let hold = TcpHold::open(&guest, at(SERVER, port), 8, Duration::from_secs(seconds)).unwrap();
                (hold.established() == 8).then_some(hold)
            };
            let held = TcpHold::open(&guest, at(SERVER, port), 9, Duration::from_secs(1)).unwrap();
            assert_eq!(held.established(), 8, "{hook:?} {daemon_dead}: a unit has eight ports");
            // Closed: free after the hold.
            drop(held);
            let silent = eventually_some(Duration::from_secs(10), || established(1));
            let silent = silent
                .unwrap_or_else(|| panic!("{hook:?} {daemon_dead}: closed flows give their ports back"));
            // Silent: free after the idle time, though nobody closed them. The server still has the connections: its
            // challenge ACK is answered by a RST, and the SYN's first retransmission goes through (RFC 9293 3.10.7.4).
            let again = eventually_some(Duration::from_secs(20), || established(5));
            assert!(again.is_some(), "{hook:?} {daemon_dead}: idle flows give their ports back");
            drop(silent);
            drop(server);
        }
    }
}

#[test]
fn a_frame_the_kernel_loses_after_our_redirect_is_counted_from_its_tracepoint() {
    let edge = start(WithHook::Xdp, 2, |_| {});
    warm_up(&edge, &["vm1", "vm2"]);
    let lost = |edge: &Edge| -> u64 {
        let status = edge.ask(&["status"]).unwrap();
        status["lost"].as_array().unwrap().iter().filter_map(|l| l["packets"].as_u64()).sum()
    };
    let before = lost(&edge);
    // Without GRO and without a program the far end of a veth has no NAPI, and takes no XDP frame (design §4).
    edge.topology.guest("vm2").run(&["ethtool", "-K", "eth0", "gro", "off"]).unwrap();
    let pinged = ping(edge.topology.guest("vm1"), Ipv4Addr::new(10, 0, 0, 5).into(), 3, LIMIT).unwrap();
    assert_eq!(pinged.received, 0, "nothing can arrive");
    assert!(eventually(LIMIT, || lost(&edge) >= before + 3), "{} lost before, {} now", before, lost(&edge));
}

#[test]
fn the_programs_log_new_flows_only_when_they_are_asked_to() {
    let mut edge = start(WithHook::Tc, 1, |_| {});
    warm_up(&edge, &["vm1"]);
    assert!(!edge.daemon.log().contains("new flow of"), "off by default: {}", edge.daemon.log());
    edge.daemon.terminate().unwrap();
    edge.daemon.spec_mut().arguments.extend(["--log-level".to_owned(), "debug".to_owned()]);
    edge.restart().unwrap();
    let told = eventually(LIMIT, || {
        ping(edge.topology.guest("vm1"), SERVER.into(), 1, LIMIT).unwrap();
        edge.daemon.log().contains("new flow of 10.0.0.4")
    });
    assert!(told, "{}", edge.daemon.log());
}
