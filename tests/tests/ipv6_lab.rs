//! Guests with both families and real sockets, under XDP and under TC: IPv6 within a subnet and between two, neighbour
//! discovery that no rule can break, and guests that are no routers.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, WithHook};
use portcullis_tests::lab::{
    ALL_NODES, Craft6, Frame, Namespace, RawSender, TcpEcho, Transport, UdpEcho, eventually, ping,
    raw_socket, tcp_exchange, udp_exchange,
};
use portcullis_tests::site::{LIMIT, SOON, Site, at, connects, private, private6, rules_met};

const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];
/// Guests and where they are: two in one subnet, one in another.
const PLACES: [(u8, u8); 3] = [(1, 1), (2, 1), (3, 2)];

fn site(hook: WithHook) -> Site {
    Site::new(hook, &PLACES.map(|(_, subnet)| subnet)).with_ipv6()
}

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

/// One ping answered: now both guests are known to the gateway.
fn warm_up(edge: &Edge, from: u8, to: IpAddr) {
    let answered = || ping(vm(edge, from), to, 1, SOON).unwrap().received == 1;
    assert!(eventually(LIMIT, answered), "vm{from} reaches {to}");
}

fn is_from_inside(frame: &Frame) -> bool {
    let Some(IpAddr::V6(source)) = frame.ip.as_ref().map(|ip| ip.source) else { return false };
    source.segments()[..2] == [0xfd00, 1]
}

#[test]
fn guests_with_both_families_reach_each_other_within_a_subnet_and_between_two() {
    for hook in BOTH {
        let edge = site(hook).start("");
        let wire = edge.topology.sniff_internet().unwrap();
        let pairs = [(1, 2), (2, 1), (1, 3), (3, 2)];
        let of = |number: u8| -> (IpAddr, IpAddr) {
            let subnet = PLACES[usize::from(number) - 1].1;
            (private6(subnet, number).into(), private(subnet, number).into())
        };
        for (from, to) in pairs {
            warm_up(&edge, from, of(to).0);
            warm_up(&edge, from, of(to).1);
        }
        let eyes = edge.topology.sniff_guest("vm3").unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        for (from, to) in pairs {
            let what = format!("{hook:?}: vm{from} to vm{to}");
            let [here, there] = [vm(&edge, from), vm(&edge, to)];
            for (source, destination) in [(of(from).0, of(to).0), (of(from).1, of(to).1)] {
                let pinged = ping(here, destination, 3, LIMIT).unwrap();
                assert_eq!(
                    (pinged.received, pinged.duplicates, pinged.errors),
                    (3, 0, 0),
                    "{what}: {destination}"
                );
                let tcp = TcpEcho::start(there, at(destination, 8000)).unwrap();
                let big = vec![7; 100_000];
                assert_eq!(
                    tcp_exchange(here, None, tcp.address(), &big, LIMIT).unwrap().echoed,
                    big,
                    "{what}"
                );
                assert_eq!(tcp.peers()[0].ip(), source, "{what}: the private address");
                let udp = UdpEcho::start(there, at(destination, 8001)).unwrap();
                udp_exchange(here, None, udp.address(), b"datagram", LIMIT).unwrap();
                assert_eq!(udp.peers()[0].ip(), source, "{what}");
            }
            // A protocol without ports: over IPv6 a raw socket gets what follows the header.
            let esp = [(here, of(from).0), (there, of(to).0)]
                .map(|(guest, address)| raw_socket(guest, address, 50).unwrap());
            for (from, to, destination) in [(&esp[0], &esp[1], of(to).0), (&esp[1], &esp[0], of(from).0)] {
                to.set_read_timeout(Some(LIMIT)).unwrap();
                from.send_to(b"payload!", at(destination, 0)).unwrap();
                let mut buffer = [0; 64];
                assert_eq!(to.recv(&mut buffer).unwrap(), 8, "{what}: ESP");
            }
        }
        check.end(&edge).unwrap();
        assert!(eyes.frames().iter().any(is_from_inside) && eyes.bad_checksums().is_empty(), "{hook:?}");

        // Towards the world there is no translation of IPv6: a name for the drop, and nothing on the wire.
        let outside: IpAddr = "2001:db8::1".parse().unwrap();
        assert!(udp_exchange(vm(&edge, 1), None, at(outside, 53), b"?", SOON).is_err());
        assert_eq!(edge.reason("no_outbound_method").unwrap(), 1, "{hook:?}");
        let leaked: Vec<Frame> = wire.frames().into_iter().filter(is_from_inside).collect();
        assert!(leaked.is_empty() && wire.lost() == 0, "{hook:?}: {leaked:?}");
    }
}

#[test]
fn groups_judge_ipv6_by_its_prefixes_at_both_ends() {
    const GROUPS: &str = "
networkSecurityGroups:
  - name: first
    securityRules:
      - { name: NoOut81, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: 'fd00:1:0:1::4', destinationAddressPrefix: 'fd00:1:0:2::/64', destinationPortRange: 81 }
  - name: second
    securityRules:
      - { name: FromVm1, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: 'fd00:1:0:1::4', destinationAddressPrefix: '*', destinationPortRange: 80-82 }
      - { name: NoSix, priority: 200, direction: Inbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '::/0', destinationAddressPrefix: '*', destinationPortRange: '*' }
";
    for hook in BOTH {
        let mut site = site(hook);
        site.subnet.insert(1, "networkSecurityGroup: first".into());
        site.nic.insert(3, "networkSecurityGroup: second".into());
        let edge = site.start(GROUPS);
        let (six, four) = (private6(2, 3), private(2, 3));
        for from in [1, 2] {
            warm_up(&edge, from, six.into());
            warm_up(&edge, from, four.into());
        }
        let _servers: Vec<TcpEcho> = [at(six, 80), at(six, 81), at(four, 80)]
            .into_iter()
            .map(|address| TcpEcho::start(vm(&edge, 3), address).unwrap())
            .collect();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let out = "first Outbound AllowVnetOutBound";
        let who = |text: &str| format!("{hook:?}: {text}");
        connects(&edge, &who("vm1"), vm(&edge, 1), at(six, 80), true, &[out, "second Inbound FromVm1"]);
        connects(&edge, &who("vm1 to 81"), vm(&edge, 1), at(six, 81), false, &["first Outbound NoOut81"]);
        connects(&edge, &who("vm2"), vm(&edge, 2), at(six, 80), false, &[out, "second Inbound NoSix"]);
        connects(
            &edge,
            &who("vm2 by IPv4"),
            vm(&edge, 2),
            at(four, 80),
            true,
            &[out, "second Inbound AllowVnetInBound"],
        );
        check.end(&edge).unwrap();
    }
}

#[test]
fn neighbour_discovery_works_where_groups_deny_all_icmp() {
    const GROUPS: &str = "
networkSecurityGroups:
  - name: silent
    securityRules:
      - { name: NoIcmpIn, priority: 100, direction: Inbound, access: Deny, protocol: Icmp, sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
      - { name: NoIcmpOut, priority: 100, direction: Outbound, access: Deny, protocol: Icmp, sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
";
    for hook in BOTH {
        let mut site = site(hook);
        for subnet in [1, 2] {
            site.subnet.insert(subnet, "networkSecurityGroup: silent".into());
        }
        let edge = site.start(GROUPS);
        let (near, far) = (private6(1, 2), private6(2, 3));
        let _servers = [(2, near), (3, far)]
            .map(|(number, address)| TcpEcho::start(vm(&edge, number), at(address, 80)).unwrap());
        let check = HookCheck::begin(&edge, hook).unwrap();
        let answered = edge.reason("nd_answered").unwrap();
        for round in 0..2 {
            for to in [near, far] {
                let reached = tcp_exchange(vm(&edge, 1), None, at(to, 80), b"word", LIMIT);
                assert!(reached.is_ok(), "{hook:?}: {to}, round {round}: {reached:?}");
            }
            let known = vm(&edge, 1).ip("-6 neighbour show dev eth0").unwrap();
            for next in [near, Ipv6Addr::new(0xfd00, 1, 0, 1, 0, 0, 0, 1)] {
                let gateway = known.lines().any(|line| {
                    line.starts_with(&format!("{next} ")) && line.contains("lladdr 02:50:43:01:00:01")
                });
                assert!(gateway, "{hook:?}: {next} is at the gateway's hardware address: {known}");
            }
            for number in [1, 2, 3] {
                vm(&edge, number).ip("-6 neighbour flush dev eth0").unwrap();
            }
        }
        // Two questions in each round: for the neighbour and for the gateway.
        assert!(edge.reason("nd_answered").unwrap() >= answered + 4, "{hook:?}");
        rules_met(&edge, &format!("{hook:?}: a ping"), &["silent Outbound NoIcmpOut"], || {
            assert_eq!(ping(vm(&edge, 1), near.into(), 1, SOON).unwrap().received, 0);
        });
        check.end(&edge).unwrap();
    }
}

#[test]
fn a_guest_that_says_it_is_a_router_is_heard_by_nobody() {
    for hook in BOTH {
        let edge = site(hook).start("");
        warm_up(&edge, 1, private6(1, 2).into());
        warm_up(&edge, 1, private6(2, 3).into());
        let eyes = [2, 3].map(|number| edge.topology.sniff_guest(&format!("vm{number}")).unwrap());
        let check = HookCheck::begin(&edge, hook).unwrap();
        let advertisement = |craft: &Craft6| craft.icmp(134, 0, [64, 0, 7, 8], &[0; 8]);
        let is_advertisement = |frame: &Frame| {
            frame.ip.as_ref().is_some_and(
                |ip| matches!(ip.transport, Transport::Icmp { kind: 134 | 137, .. } if ip.source.is_ipv6()),
            )
        };
        let routers = |number: u8| vm(&edge, number).ip("-6 route show proto ra").unwrap();
        let [me, victim] = [1, 2].map(|number| edge.topology.guest_spec(&format!("vm{number}")).clone());
        let link_local: Ipv6Addr = "fe80::1234".parse().unwrap();
        let raw = RawSender::open(vm(&edge, 1), "eth0").unwrap();
        let everybody = Craft6::new(me.mac, link_local, [0x33, 0x33, 0, 0, 0, 1], ALL_NODES);
        let one =
            Craft6 { destination_mac: me.gateway_mac, destination: private6(1, 2), ..everybody.clone() };
        raw.send(&advertisement(&everybody)).unwrap();
        raw.send(&advertisement(&one)).unwrap();
        raw.send(&everybody.icmp(137, 0, [0; 4], &[0; 32])).unwrap();
        assert!(eventually(LIMIT, || edge.reason("router_advertisement").unwrap() == 3), "{hook:?}");
        // What was sent later has arrived, so that would have too.
        assert_eq!(ping(vm(&edge, 1), private6(1, 2).into(), 1, LIMIT).unwrap().received, 1);
        assert_eq!(ping(vm(&edge, 1), private6(2, 3).into(), 1, LIMIT).unwrap().received, 1);
        for eyes in &eyes {
            assert!(!eyes.frames().iter().any(is_advertisement) && eyes.lost() == 0, "{hook:?}");
        }
        assert_eq!((routers(2).as_str(), routers(3).as_str()), ("", ""), "{hook:?}");
        check.end(&edge).unwrap();

        // The host itself may be a router, and a guest listens: silence above was the gateway's doing.
        let host = RawSender::open(edge.topology.gateway(), &victim.device).unwrap();
        let router = Craft6::new(victim.gateway_mac, link_local, [0x33, 0x33, 0, 0, 0, 1], ALL_NODES);
        host.send(&advertisement(&router)).unwrap();
        assert!(eyes[0].wait_for(Duration::from_secs(5), is_advertisement).is_some(), "{hook:?}");
        assert!(eventually(LIMIT, || routers(2).contains("fe80::1234")), "{hook:?}: {}", routers(2));
    }
}

#[test]
fn the_host_and_its_guests_reach_each_other_by_ipv6_as_groups_and_host_access_allow() {
    const GROUPS: &str = "
networkSecurityGroups:
  - name: first
    securityRules:
      - { name: NoIn81, priority: 100, direction: Inbound, access: Deny, protocol: Tcp, sourceAddressPrefix: 'fd00:1:0:1::1', destinationAddressPrefix: '*', destinationPortRange: 81 }
";
    for hook in BOTH {
        let mut site = site(hook);
        site.subnet.insert(1, "networkSecurityGroup: first".into());
        let edge = site.start(GROUPS);
        warm_up(&edge, 1, private6(1, 2).into());
        let check = HookCheck::begin(&edge, hook).unwrap();
        assert_eq!(ping(vm(&edge, 1), private6(1, 2).into(), 1, LIMIT).unwrap().received, 1);
        // What follows is the kernel's own traffic, which TC decides under either hook (ADR 0002).
        check.end(&edge).unwrap();
        let (host, gateway) = (edge.topology.gateway(), Ipv6Addr::new(0xfd00, 1, 0, 1, 0, 0, 0, 1));
        warm_up(&edge, 1, gateway.into());
        let dns = UdpEcho::start(host, at(gateway, 53)).unwrap();
        let ssh = TcpEcho::start(host, at(gateway, 22)).unwrap();
        assert!(
            udp_exchange(vm(&edge, 1), None, dns.address(), b"?", LIMIT).is_ok(),
            "{hook:?}: the host's DNS"
        );
        assert!(
            tcp_exchange(vm(&edge, 1), None, ssh.address(), b"?", SOON).is_err(),
            "{hook:?}: nothing else"
        );
        assert_eq!(edge.reason("host_access").unwrap(), 1, "{hook:?}");
        let guest = private6(1, 1);
        let servers = [80, 81].map(|port| TcpEcho::start(vm(&edge, 1), at(guest, port)).unwrap());
        let who = |text: &str| format!("{hook:?}: {text}");
        connects(
            &edge,
            &who("the host to a guest"),
            host,
            at(guest, 80),
            true,
            &["first Inbound AllowVnetInBound"],
        );
        connects(&edge, &who("the host, denied"), host, at(guest, 81), false, &["first Inbound NoIn81"]);
        assert_eq!(
            servers[0].peers()[0].ip(),
            IpAddr::from(gateway),
            "{hook:?}: the host speaks as the gateway"
        );
        connects(
            &edge,
            &who("a guest of the subnet"),
            vm(&edge, 2),
            at(guest, 81),
            true,
            &["first Outbound AllowVnetOutBound", "first Inbound AllowVnetInBound"],
        );
    }
}
