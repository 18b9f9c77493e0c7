//! Azure's documented examples of network security groups with real sockets, under XDP and under TC: who reaches whom,
//! and by which rule.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use portcullis_tests::edge::{HookCheck, WithHook};
use portcullis_tests::lab::{Namespace, TcpEcho, UdpEcho, raw_socket, tcp_connect, udp_exchange};
use portcullis_tests::site::{
    LIMIT, SERVER, SOON, Site, apply, at, connects, echoes, private, public, rules_met,
};

const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

const ALLOW_80: &str = "{ name: Allow80In, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 80 }";
const DENY_80: &str = "{ name: Deny80Out, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', destinationAddressPrefix: Internet, destinationPortRange: 80 }";

/// The rules that a packet meets, and whether all of them allow it. `levels` are the groups it is asked about, in order,
/// and whether they have the rules above: `with` is the rule it meets then and whether that one allows, `without` the
/// default rule it meets otherwise. The first that denies is the last.
fn walk(
    levels: &[(&str, bool)],
    direction: &str,
    with: (&str, bool),
    without: (&str, bool),
) -> (bool, Vec<String>) {
    let mut met = Vec::new();
    for (group, has_rule) in levels {
        let (name, allows) = if *has_rule { with } else { without };
        met.push(format!("{group} {direction} {name}"));
        if !allows {
            return (false, met);
        }
    }
    (true, met)
}

#[test]
fn the_four_vms_of_azures_page_are_reached_and_reach_out_as_it_says() {
    for hook in BOTH {
        let mut site = Site::new(hook, &[1, 1, 2, 3]);
        site.subnet.insert(1, "networkSecurityGroup: NSG1".into());
        for vm in [1, 3] {
            site.nic.insert(vm, "networkSecurityGroup: NSG2".into());
        }
        let policy = |nsg1: &[&str], nsg2: &[&str]| {
            let group = |name: &str, rules: &[&str]| {
                format!("  - name: {name}\n    securityRules: [{}]\n", rules.join(", "))
            };
            site.yaml(&format!("networkSecurityGroups:\n{}{}", group("NSG1", nsg1), group("NSG2", nsg2)))
        };
        let start = "networkSecurityGroups: [{ name: NSG1 }, { name: NSG2 }]\n";
        let edge = site.start(start);
        let vms: Vec<(u8, Ipv4Addr)> =
            site.guests().map(|(number, subnet)| (number, private(subnet, number))).collect();
        let _inside: Vec<TcpEcho> = vms
            .iter()
            .map(|(number, address)| {
                TcpEcho::start(edge.topology.guest(&format!("vm{number}")), at(*address, 80)).unwrap()
            })
            .collect();
        let _outside = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        for (first, second) in [(false, false), (true, false), (false, true), (true, true)] {
            let rules = |has: bool| if has { vec![ALLOW_80, DENY_80] } else { vec![] };
            apply(&edge, &policy(&rules(first), &rules(second)));
            for (number, _) in &vms {
                let vm = format!("vm{number}");
                // Which group stands where, in the order of inbound traffic.
                let levels: Vec<(&str, bool)> = match number {
                    1 => vec![("NSG1", first), ("NSG2", second)],
                    2 => vec![("NSG1", first)],
                    3 => vec![("NSG2", second)],
                    _ => vec![],
                };
                let what = format!("{hook:?}, rules in NSG1 {first}, in NSG2 {second}, {vm}");
                let (opens, met) = walk(&levels, "Inbound", ("Allow80In", true), ("DenyAllInBound", false));
                let met: Vec<&str> = met.iter().map(String::as_str).collect();
                connects(
                    &edge,
                    &format!("{what} inbound"),
                    edge.topology.internet(),
                    at(public(*number), 80),
                    opens,
                    &met,
                );
                let outward: Vec<_> = levels.into_iter().rev().collect();
                let (opens, met) =
                    walk(&outward, "Outbound", ("Deny80Out", false), ("AllowInternetOutBound", true));
                let met: Vec<&str> = met.iter().map(String::as_str).collect();
                connects(
                    &edge,
                    &format!("{what} outbound"),
                    edge.topology.guest(&vm),
                    at(SERVER, 80),
                    opens,
                    &met,
                );
            }
            // Inside Subnet1 the rules for the Internet have no say: both of the sender's levels, then the receiver's.
            let what = format!("{hook:?}, {first}, {second}: inside Subnet1");
            let [one, two] = [vms[0].1, vms[1].1];
            connects(
                &edge,
                &what,
                edge.topology.guest("vm1"),
                at(two, 80),
                true,
                &[
                    "NSG2 Outbound AllowVnetOutBound",
                    "NSG1 Outbound AllowVnetOutBound",
                    "NSG1 Inbound AllowVnetInBound",
                ],
            );
            connects(
                &edge,
                &what,
                edge.topology.guest("vm2"),
                at(one, 80),
                true,
                &[
                    "NSG1 Outbound AllowVnetOutBound",
                    "NSG1 Inbound AllowVnetInBound",
                    "NSG2 Inbound AllowVnetInBound",
                ],
            );
        }
        // "A rule that denies everything in the subnet's group cuts its VMs off from each other."
        let all = "{ name: DenyAll, priority: 4096, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }";
        apply(&edge, &policy(&[all], &[]));
        let [one, two, three, four] = [vms[0].1, vms[1].1, vms[2].1, vms[3].1];
        let what = format!("{hook:?}: a subnet that denies all");
        connects(
            &edge,
            &what,
            edge.topology.guest("vm1"),
            at(two, 80),
            false,
            &["NSG2 Outbound AllowVnetOutBound", "NSG1 Outbound AllowVnetOutBound", "NSG1 Inbound DenyAll"],
        );
        connects(
            &edge,
            &what,
            edge.topology.guest("vm2"),
            at(one, 80),
            false,
            &["NSG1 Outbound AllowVnetOutBound", "NSG1 Inbound DenyAll"],
        );
        connects(
            &edge,
            &what,
            edge.topology.guest("vm4"),
            at(three, 80),
            true,
            &["NSG2 Inbound AllowVnetInBound"],
        );
        connects(
            &edge,
            &what,
            edge.topology.guest("vm2"),
            at(four, 80),
            true,
            &["NSG1 Outbound AllowVnetOutBound"],
        );
        check.end(&edge).unwrap();
    }
}

/// The rules of Azure's page on application security groups.
const APPLICATION: &str = "
applicationSecurityGroups: [{ name: AsgWeb }, { name: AsgLogic }, { name: AsgDb }]
networkSecurityGroups:
  - name: NSG1
    securityRules:
      - { name: Allow-HTTP-Inbound-Internet, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationApplicationSecurityGroups: [AsgWeb], destinationPortRange: 80 }
      - { name: Allow-Database-BusinessLogic, priority: 110, direction: Inbound, access: Allow, protocol: Tcp, sourceApplicationSecurityGroups: [AsgLogic], destinationApplicationSecurityGroups: [AsgDb], destinationPortRange: 1433 }
      - { name: Deny-Database-All, priority: 120, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', destinationApplicationSecurityGroups: [AsgDb], destinationPortRange: 1433 }
";

#[test]
fn application_groups_decide_as_on_azures_page_and_a_new_member_counts_at_once() {
    const OUT: &str = "NSG1 Outbound AllowVnetOutBound";
    const HTTP: &str = "NSG1 Inbound Allow-HTTP-Inbound-Internet";
    const LOGIC: &str = "NSG1 Inbound Allow-Database-BusinessLogic";
    const DENY: &str = "NSG1 Inbound Deny-Database-All";
    for hook in BOTH {
        let mut site = Site::new(hook, &[1, 1, 1]);
        site.subnet.insert(1, "networkSecurityGroup: NSG1".into());
        let member = |site: &mut Site, vm: u8, groups: &str| {
            site.configuration.insert(vm, format!("applicationSecurityGroups: [{groups}]"));
        };
        for (vm, group) in [(1, "AsgWeb"), (2, "AsgLogic"), (3, "AsgDb")] {
            member(&mut site, vm, group);
        }
        let edge = site.start(APPLICATION);
        let (internet, web, logic) =
            (edge.topology.internet(), edge.topology.guest("vm1"), edge.topology.guest("vm2"));
        let db = private(1, 3);
        let _servers: Vec<TcpEcho> = [(1, 80), (2, 80), (3, 80), (1, 1433), (3, 1433)]
            .into_iter()
            .map(|(vm, port)| {
                TcpEcho::start(edge.topology.guest(&format!("vm{vm}")), at(private(1, vm), port)).unwrap()
            })
            .collect();
        let datagrams = UdpEcho::start(edge.topology.guest("vm3"), at(db, 1433)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let who = |text: &str| format!("{hook:?}: {text}");
        connects(&edge, &who("the world to the web"), internet, at(public(1), 80), true, &[HTTP]);
        connects(
            &edge,
            &who("another port of the web"),
            internet,
            at(public(1), 1433),
            false,
            &["NSG1 Inbound DenyAllInBound"],
        );
        connects(
            &edge,
            &who("the world to the logic"),
            internet,
            at(public(2), 80),
            false,
            &["NSG1 Inbound DenyAllInBound"],
        );
        connects(&edge, &who("the world to the database"), internet, at(public(3), 1433), false, &[DENY]);
        connects(&edge, &who("the logic to the database"), logic, at(db, 1433), true, &[OUT, LOGIC]);
        connects(&edge, &who("the web to the database"), web, at(db, 1433), false, &[OUT, DENY]);
        connects(
            &edge,
            &who("another port of the database"),
            web,
            at(db, 80),
            true,
            &[OUT, "NSG1 Inbound AllowVnetInBound"],
        );
        let lost = rules_met(&edge, "the logic by UDP", &[OUT, DENY], || {
            udp_exchange(logic, None, at(db, 1433), b"?", SOON)
        });
        assert!(lost.is_err() && datagrams.datagrams() == 0, "{hook:?}: 120 denies any protocol");

        // The logic's machine leaves its group, the web's joins it; nothing else changes.
        let mut live = tcp_connect(logic, None, at(db, 1433), LIMIT).unwrap();
        assert!(echoes(&mut live, LIMIT), "{hook:?}");
        member(&mut site, 1, "AsgWeb, AsgLogic");
        member(&mut site, 2, "");
        apply(&edge, &site.yaml(APPLICATION));
        connects(&edge, &who("the web, a member now"), web, at(db, 1433), true, &[OUT, LOGIC]);
        connects(&edge, &who("the world to the web as before"), internet, at(public(1), 80), true, &[HTTP]);
        connects(&edge, &who("the logic, no member any more"), logic, at(db, 1433), false, &[OUT, DENY]);
        rules_met(&edge, &who("its live connection"), &[], || {
            assert!(echoes(&mut live, LIMIT), "{hook:?}: the live connection stays");
        });
        check.end(&edge).unwrap();
    }
}

#[test]
fn protocols_without_ports_have_flows_so_their_answers_return_and_strangers_do_not() {
    const ESP: u8 = 50;
    const SCTP: u8 = 132;
    for hook in BOTH {
        let mut site = Site::new(hook, &[1, 1]);
        // Each guest may only begin, or only be begun with.
        site.nic.insert(1, "networkSecurityGroup: caller".into());
        site.nic.insert(2, "networkSecurityGroup: called".into());
        let rule = |name: &str, priority: u16, direction: &str, access: &str, protocol: &str| {
            let ports = if protocol == "Esp" { "" } else { ", destinationPortRange: '*'" };
            format!(
                "{{ name: {name}, priority: {priority}, direction: {direction}, access: {access}, protocol: '{protocol}', sourceAddressPrefix: '*', destinationAddressPrefix: '*'{ports} }}"
            )
        };
        let policy = |sctp: &str| {
            let caller = rule("NoneIn", 4096, "Inbound", "Deny", "*");
            let called = [
                rule("EspIn", 100, "Inbound", "Allow", "Esp"),
                rule("Sctp", 200, "Inbound", sctp, "*"),
                rule("NoneOut", 4096, "Outbound", "Deny", "*"),
            ];
            format!(
                "networkSecurityGroups: [{{ name: caller, securityRules: [{caller}] }}, {{ name: called, securityRules: [{}] }}]\n",
                called.join(", ")
            )
        };
        let edge = site.start(&policy("Deny"));
        let (vm1, vm2, internet) =
            (edge.topology.guest("vm1"), edge.topology.guest("vm2"), edge.topology.internet());
        let [one, two] = [private(1, 1), private(1, 2)];
        let check = HookCheck::begin(&edge, hook).unwrap();
        let open = |namespace: &Namespace, address: Ipv4Addr, protocol: u8| {
            raw_socket(namespace, at(address, 0).ip(), protocol).unwrap()
        };
        // What a raw socket of IPv4 gets begins with the IP header.
        let arrives =
            |from: &UdpSocket, to: &UdpSocket, at_address: Ipv4Addr, seen_as: Ipv4Addr, within: Duration| {
                from.send_to(b"payload!", at(at_address, 0)).unwrap();
                to.set_read_timeout(Some(within)).unwrap();
                let mut buffer = [0; 64];
                match to.recv_from(&mut buffer) {
                    Ok((length, peer)) => {
                        assert_eq!(
                            (&buffer[20..length], peer.ip()),
                            (&b"payload!"[..], IpAddr::from(seen_as)),
                            "{hook:?}"
                        );
                        true
                    }
                    Err(_) => false,
                }
            };
        let out = "caller Outbound AllowVnetOutBound";
        let [esp1, esp2, esp_world] = [open(vm1, one, ESP), open(vm2, two, ESP), open(internet, SERVER, ESP)];
        let what = |text: &str| format!("{hook:?}: {text}");
        rules_met(&edge, &what("an answer nobody asked for"), &["called Outbound NoneOut"], || {
            assert!(!arrives(&esp2, &esp1, one, two, SOON));
        });
        rules_met(&edge, &what("ESP by its rule"), &[out, "called Inbound EspIn"], || {
            assert!(arrives(&esp1, &esp2, two, one, LIMIT));
        });
        rules_met(&edge, &what("both ways of a live flow"), &[], || {
            assert!(arrives(&esp2, &esp1, one, two, LIMIT), "{hook:?}: the answer needs no rule");
            assert!(arrives(&esp1, &esp2, two, one, LIMIT), "{hook:?}: and on it goes");
        });
        // To and from the world, under the instance-level address.
        rules_met(&edge, &what("ESP from the world to the caller"), &["caller Inbound NoneIn"], || {
            assert!(!arrives(&esp_world, &esp1, public(1), SERVER, SOON));
        });
        rules_met(&edge, &what("ESP to the world"), &["caller Outbound AllowInternetOutBound"], || {
            assert!(arrives(&esp1, &esp_world, SERVER, public(1), LIMIT));
        });
        rules_met(&edge, &what("the world's answer"), &[], || {
            assert!(arrives(&esp_world, &esp1, public(1), SERVER, LIMIT));
        });
        rules_met(&edge, &what("ESP from the world to the called"), &["called Inbound EspIn"], || {
            assert!(arrives(&esp_world, &esp2, public(2), SERVER, LIMIT));
        });
        rules_met(&edge, &what("its answer"), &[], || {
            assert!(arrives(&esp2, &esp_world, SERVER, public(2), LIMIT));
        });

        // SCTP has no name in a rule: only `*` means it.
        let [sctp1, sctp2] = [open(vm1, one, SCTP), open(vm2, two, SCTP)];
        rules_met(&edge, &what("SCTP denied"), &[out, "called Inbound Sctp"], || {
            assert!(!arrives(&sctp1, &sctp2, two, one, SOON));
        });
        apply(&edge, &site.yaml(&policy("Allow")));
        rules_met(&edge, &what("SCTP allowed"), &[out, "called Inbound Sctp"], || {
            assert!(arrives(&sctp1, &sctp2, two, one, LIMIT));
        });
        rules_met(&edge, &what("its answer"), &[], || {
            assert!(arrives(&sctp2, &sctp1, one, two, LIMIT));
        });
        let told = edge.ask(&["flows"]).unwrap();
        let flows = told["flows"].as_array().unwrap();
        let mut kinds: Vec<&str> = flows.iter().filter_map(|flow| flow["protocol"].as_str()).collect();
        kinds.retain(|kind| *kind != "icmp");
        kinds.sort_unstable();
        assert_eq!(kinds, ["132", "esp", "esp", "esp"], "{hook:?}: listed by name or number");
        assert_eq!(edge.reason("spoofed_source").unwrap(), 0, "{hook:?}");
        check.end(&edge).unwrap();
    }
}
