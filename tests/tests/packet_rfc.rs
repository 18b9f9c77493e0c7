//! The profile `rfc` packet by packet, of both families, on the host engine, under XDP and under TC: one port for a socket whatever
//! its destination, who may send to it, and what a refused guest is told. Every counter and every rule hit is asserted.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{self, *};
use portcullis_tests::backend::{Action, At};
use portcullis_tests::icmp_error::{
    Family, POLICY, Side, Table, WORLD, What, everywhere, guest, packet, sent,
};
use portcullis_tests::lab::{Frame, Transport};

const NEW: (Reason, &[&str]) = (NewFlow, &[]);
const DENY_IN: &str = "closed/Inbound/defaultSecurityRules/DenyAllInBound";
const TURN: &str = "closed/Inbound/securityRules/AllowTurn";
const SMTP: &str = "closed/Outbound/securityRules/DenySmtp";
const OUT: &str = "closed/Outbound/defaultSecurityRules/AllowInternetOutBound";

/// vm1 and vm2 leave by 64 ports each; vm1 has no group, vm2 one that lets strangers from one port of theirs in.
fn policy(snat: &str) -> String {
    let yaml = POLICY
        .replace("[vm1/v4, vm1/v6]", "[vm1/v4, vm1/v6, vm2/v4, vm2/v6]")
        .replace("{ name: vm2, device: vm2,", "{ name: vm2, device: vm2, networkSecurityGroup: closed,")
        .replace(
            "networkSecurityGroups:\n",
            "networkSecurityGroups:
  - name: closed
    securityRules:
      - { name: AllowTurn, priority: 100, direction: Inbound, access: Allow, protocol: '*', sourceAddressPrefix: '*', sourcePortRange: 3479, destinationAddressPrefix: '*', destinationPortRange: '*' }
      - { name: DenySmtp, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: 25 }
",
        );
    assert_eq!(yaml.matches("closed").count(), 2, "the policy of the errors has changed");
    format!("{yaml}snat: {{ {snat} }}\n")
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// Where the packet goes, of an echo with its identifier as the port.
fn port_of(frame: Vec<u8>) -> u16 {
    let frame = Frame::parse(frame);
    match frame.ip.as_ref().unwrap().transport {
        Transport::Icmp { id, .. } => id,
        _ => frame.source().unwrap().port(),
    }
}

/// Opens a flow and says under which port it left.
fn opens(t: &mut Table<'_>, side: Side, what: What, from: SocketAddr, to: SocketAddr, rules: &[&str]) -> u16 {
    port_of(t.out(&format!("{what:?} {from} to {to}"), side, &packet(side, what, from, to), (NewFlow, rules)))
}

/// The guest is told that its packet is prohibited.
fn told(t: &mut Table<'_>, f: Family, side: Side, frame: &[u8], (reason, rules): (Reason, &[&str])) {
    let name = format!("{reason:?}");
    let out = Frame::parse(t.out(&name, side, frame, (reason, rules)));
    let ip = out.ip.as_ref().unwrap();
    let prohibited = if f.v6() { (1, 1) } else { (3, 13) };
    let Transport::Icmp { kind, code, .. } = ip.transport else { panic!("{name}: {out:?}") };
    assert_eq!((kind, code), prohibited, "{name}");
    assert_eq!((out.destination_mac, out.checksums_ok()), (side.mac, true), "{name}");
    assert_eq!(Some(ip.destination), Frame::parse(frame.to_vec()).ip.map(|ip| ip.source), "{name}");
}

#[test]
fn in_rfc_a_tcp_socket_has_one_port_towards_everybody_and_no_other_socket_has_it() {
    everywhere(|t| {
        t.0.change(&policy("profile: rfc"));
        for f in Family::both() {
            let (vm1, vm2) = (guest(1), guest(2));
            let servers = [at(f.server, 80), at(f.server, 443), at(f.router, 80)];
            let ports = servers.map(|to| opens(t, vm1, What::Tcp, at(f.vm1, 5000), to, &[]));
            assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
            let mut taken = vec![ports[0]];
            for socket in 5001..5064 {
                // Each towards a destination of its own: nothing but the port tells them apart.
                let to = at(f.server, socket);
                taken.push(opens(t, vm1, What::Tcp, at(f.vm1, socket), to, &[]));
            }
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len(), 64, "no port is two sockets'");
            let late = packet(vm1, What::Tcp, at(f.vm1, 6000), at(f.server, 6000));
            told(t, f, vm1, &late, (SnatExhausted, &[]));
            told(t, f, vm1, &late, (SnatRefused, &[]));
            // Who has a port goes on with it, although there is none for anybody else.
            let again = opens(t, vm1, What::Tcp, at(f.vm1, 5000), at(f.router, 8080), &[]);
            assert_eq!(again, ports[0]);
            // Ports of UDP and TCP are two mappings, and a neighbour has its own.
            opens(t, vm1, What::Udp, at(f.vm1, 6000), servers[0], &[]);
            opens(t, vm2, What::Tcp, at(f.vm2, 5000), servers[0], &[OUT]);
        }
    });
}

#[test]
fn in_azure_a_tcp_port_serves_another_socket_towards_another_destination() {
    everywhere(|t| {
        t.0.change(&policy("profile: azure"));
        for f in Family::both() {
            let mut taken: Vec<u16> = (5000..5065)
                .map(|socket| opens(t, guest(1), What::Tcp, at(f.vm1, socket), at(f.server, socket), &[]))
                .collect();
            taken.sort_unstable();
            taken.dedup();
            assert!(taken.len() < 65, "65 sockets on 64 ports");
            let frame = packet(WORLD, What::Tcp, at(f.router, 3479), at(f.frontend, taken[0]));
            t.drops("a stranger", WORLD, &frame, NoFlow);
        }
    });
}

#[test]
fn in_rfc_a_stranger_reaches_a_mapped_port_if_the_groups_allow_it_and_is_answered_from_there() {
    everywhere(|t| {
        t.0.change(&policy("profile: rfc"));
        for f in Family::both() {
            for what in [What::Udp, What::Tcp] {
                let (vm1, vm2) = (guest(1), guest(2));
                let inside = at(f.vm1, 5000);
                let port = opens(t, vm1, what, inside, at(f.server, 80), &[]);
                // The server's other port, and another host: both are strangers to this mapping.
                for stranger in [at(f.server, 81), at(f.router, 3478)] {
                    let outside = at(f.frontend, port);
                    let frame = packet(WORLD, what, stranger, outside);
                    t.sends("a stranger", WORLD, &frame, &sent(vm1, what, stranger, inside), NEW);
                    if what == What::Udp {
                        let answer = packet(vm1, what, inside, stranger);
                        let expected = sent(WORLD, what, outside, stranger);
                        t.sends("the answer", vm1, &answer, &expected, (Forwarded, &[]));
                        t.sends("more", WORLD, &frame, &sent(vm1, what, stranger, inside), (Forwarded, &[]));
                    }
                }
                let closed = opens(t, vm2, what, at(f.vm2, 5000), at(f.server, 80), &[OUT]);
                let outside = at(f.frontend, closed);
                let frame = packet(WORLD, what, at(f.router, 3478), outside);
                let name = "a stranger whom the group keeps out";
                let outcome = t.0.run(name, At::Ingress("up"), &frame, DeniedByRule, &[DENY_IN]);
                assert_eq!(outcome.action, Action::Drop);
                let stranger = at(f.router, 3479);
                let expected = sent(vm2, what, stranger, at(f.vm2, 5000));
                let frame = packet(WORLD, what, stranger, outside);
                t.sends("one whom it lets in", WORLD, &frame, &expected, (NewFlow, &[TURN]));
                let nobodys = packet(WORLD, what, stranger, at(f.frontend, port ^ 1));
                t.drops("a port that is nobody's", WORLD, &nobodys, NoFlow);
                if what == What::Udp {
                    let other = packet(WORLD, What::Tcp, stranger, at(f.frontend, port));
                    t.drops("a port that only UDP has", WORLD, &other, NoFlow);
                }
            }
        }
        t.0.change(&policy("profile: rfc, filtering: addressAndPort"));
        for f in Family::both() {
            let port = opens(t, guest(1), What::Udp, at(f.vm1, 5000), at(f.server, 8000), &[]);
            let frame = packet(WORLD, What::Udp, at(f.server, 8001), at(f.frontend, port));
            t.drops("strict filtering", WORLD, &frame, NoFlow);
        }
    });
}

#[test]
fn in_rfc_a_query_from_outside_is_for_whom_its_identifier_is_mapped_to() {
    everywhere(|t| {
        t.0.change(&policy("profile: rfc"));
        for f in Family::both() {
            let vm1 = guest(1);
            let identifier = opens(t, vm1, What::Echo, at(f.vm1, 77), at(f.server, 0), &[]);
            let same = opens(t, vm1, What::Echo, at(f.vm1, 77), at(f.router, 0), &[]);
            assert_eq!(identifier, same, "one identifier whatever the destination");
            let query = packet(WORLD, What::Echo, at(f.router, identifier), at(f.frontend, 0));
            let expected = sent(vm1, What::Echo, at(f.router, 77), at(f.vm1, 0));
            t.sends("a query", WORLD, &query, &expected, NEW);
            let reply = |id: u16| {
                let [high, low] = id.to_be_bytes();
                What::Icmp(if f.v6() { 129 } else { 0 }, [high, low, 0, 1])
            };
            let frame = packet(vm1, reply(77), at(f.vm1, 0), at(f.router, 0));
            let expected = sent(WORLD, reply(identifier), at(f.frontend, 0), at(f.router, 0));
            t.sends("its reply", vm1, &frame, &expected, (Forwarded, &[]));
            let other = packet(WORLD, What::Echo, at(f.router, identifier ^ 1), at(f.frontend, 0));
            t.drops("an identifier that is nobody's", WORLD, &other, NoListener);
        }
    });
}

#[test]
fn in_rfc_a_guest_is_told_of_every_refusal_and_in_azure_of_none() {
    let without_pool = |snat: &str| policy(snat).replace(", vm2/v4, vm2/v6]", "]");
    everywhere(|t| {
        for f in Family::both() {
            let vm2 = guest(2);
            let smtp = packet(vm2, What::Tcp, at(f.vm2, 5000), at(f.server, 25));
            let spoofed = packet(vm2, What::Udp, at(f.vm1, 5000), at(f.server, 53));
            t.0.change(&policy("profile: rfc"));
            told(t, f, vm2, &smtp, (DeniedByRule, &[SMTP]));
            t.drops("who lies about its address", vm2, &spoofed, Spoofed);
            for silent in [policy("profile: azure"), policy("profile: rfc, onExhaustion: silent")] {
                t.0.change(&silent);
                let outcome = t.0.run("silence", At::Ingress("vm2"), &smtp, DeniedByRule, &[SMTP]);
                assert_eq!(outcome.action, Action::Drop);
            }
            let no_way_out = packet(vm2, What::Udp, at(f.vm2, 5000), at(f.server, 53));
            t.0.change(&without_pool("profile: rfc"));
            told(t, f, vm2, &no_way_out, (NoOutboundMethod, &[OUT]));
            t.0.change(&without_pool("profile: azure"));
            let outcome = t.0.run("silence", At::Ingress("vm2"), &no_way_out, NoOutboundMethod, &[OUT]);
            assert_eq!(outcome.action, Action::Drop);
        }
    });
}
