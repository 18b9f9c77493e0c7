//! ICMP through every translation, of both families, on the host engine, under XDP and under TC: queries, messages without an
//! identifier, and errors with what they quote. Packets are compared byte by byte with ones made anew, and every counter and
//! every rule hit is asserted.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{self, *};
use portcullis_tests::backend::{Action, At};
use portcullis_tests::icmp_error::{
    Error, Family, Side, Table, WORLD, What, error, error_sent, everywhere, guest, packet, sent,
};
use portcullis_tests::lab::Frame;

const DNS: &str = "own/Inbound/securityRules/AllowDns";
const ICMP: &str = "own/Inbound/securityRules/AllowIcmp";
const ICMP6: &str = "own/Inbound/securityRules/AllowIcmp6";
const OUT: &str = "own/Outbound/defaultSecurityRules/AllowInternetOutBound";
const DENY: &str = "own/Inbound/defaultSecurityRules/DenyAllInBound";
const ERRORS: [Error; 4] =
    [Error::PortUnreachable, Error::TooBig, Error::TimeExceeded, Error::ParameterProblem];
const PASSES: (Reason, &[&str]) = (Forwarded, &[]);

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// A flow with the world: how its packets look on the guest's side and outside.
struct Flow {
    what: What,
    guest: Side,
    inside: SocketAddr,
    outside: SocketAddr,
    server: SocketAddr,
}

impl Flow {
    /// Errors of a router on the way and of the server itself about what the guest has sent: all of it quoted, and as little
    /// as there may be.
    fn errors_from_outside(&self, t: &mut Table<'_>, f: Family) {
        let (public, private) = (
            sent(WORLD, self.what, self.outside, self.server),
            sent(WORLD, self.what, self.inside, self.server),
        );
        for kind in ERRORS {
            for from in [f.router, self.server.ip()] {
                for end in [public.len(), 14 + f.header() + 8] {
                    let name = format!("{kind:?} about {:?} from {from}, {end} bytes", self.what);
                    let message = f.kind(kind);
                    let frame = error(WORLD, from, self.outside.ip(), message, &public[14..end]);
                    let quote = &private[14..end];
                    let expected = error_sent(self.guest, from, self.inside.ip(), message, quote);
                    t.sends(&name, WORLD, &frame, &expected, PASSES);
                }
            }
        }
    }

    /// Errors of the guest about what it has been sent.
    fn errors_from_inside(&self, t: &mut Table<'_>, f: Family) {
        let (public, private) = (
            sent(self.guest, self.what, self.server, self.outside),
            sent(self.guest, self.what, self.server, self.inside),
        );
        for kind in ERRORS {
            for end in [public.len(), 14 + f.header() + 8] {
                let name = format!("the guest's {kind:?} about {:?}, {end} bytes", self.what);
                let message = f.kind(kind);
                let frame = error(self.guest, self.inside.ip(), self.server.ip(), message, &private[14..end]);
                let expected =
                    error_sent(WORLD, self.outside.ip(), self.server.ip(), message, &public[14..end]);
                t.sends(&name, self.guest, &frame, &expected, PASSES);
            }
        }
    }
}

/// Port or identifier under which a frame of the gateway's left.
fn number(frame: Vec<u8>, what: What) -> u16 {
    let at = frame.len();
    let frame = Frame::parse(frame);
    match (what, frame.source()) {
        (_, Some(source)) => source.port(),
        (_, None) => {
            let header = if frame.ip.as_ref().unwrap().source.is_ipv4() { 34 } else { 54 };
            assert!(at >= header + 8);
            u16::from_be_bytes([frame.bytes[header + 4], frame.bytes[header + 5]])
        }
    }
}

#[test]
fn errors_pass_both_ways_through_an_address_of_ones_own_with_every_byte_right() {
    everywhere(|t| {
        for f in Family::both() {
            for what in [What::Udp, What::Tcp, What::Echo] {
                let port = if what == What::Echo { 0 } else { 53 };
                let flow = Flow {
                    what,
                    guest: guest(3),
                    inside: at(f.vm3, 5000),
                    outside: at(f.own, 5000),
                    server: at(f.server, port),
                };
                let opens = packet(flow.guest, what, flow.inside, flow.server);
                let leaves = sent(WORLD, what, flow.outside, flow.server);
                t.sends("the guest's packet", flow.guest, &opens, &leaves, (NewFlow, &[OUT]));
                flow.errors_from_outside(t, f);
                if what != What::Echo {
                    flow.errors_from_inside(t, f);
                }
            }
            // From the world, to it.
            let flow = Flow {
                what: What::Udp,
                guest: guest(3),
                inside: at(f.vm3, 53),
                outside: at(f.own, 53),
                server: at(f.server, 4000),
            };
            let opens = packet(WORLD, What::Udp, flow.server, flow.outside);
            let arrives = sent(flow.guest, What::Udp, flow.server, flow.inside);
            t.sends("the world's packet", WORLD, &opens, &arrives, (NewFlow, &[DNS]));
            flow.errors_from_inside(t, f);
            flow.errors_from_outside(t, f);
        }
    });
}

#[test]
fn errors_pass_both_ways_through_a_claimed_port_and_a_load_balancer() {
    everywhere(|t| {
        for f in Family::both() {
            for what in [What::Udp, What::Tcp, What::Echo] {
                let port = if what == What::Echo { 0 } else { 53 };
                let (inside, server) = (at(f.vm1, 5000), at(f.server, port));
                let opens = packet(guest(1), what, inside, server);
                let left = t.out("the guest's packet", guest(1), &opens, (NewFlow, &[]));
                let outside = at(f.frontend, number(left.clone(), what));
                assert!(left == sent(WORLD, what, outside, server));
                let flow = Flow { what, guest: guest(1), inside, outside, server };
                flow.errors_from_outside(t, f);
                if what != What::Echo {
                    flow.errors_from_inside(t, f);
                }
            }
            let flow = Flow {
                what: What::Udp,
                guest: guest(1),
                inside: at(f.vm1, 8080),
                outside: at(f.frontend, 80),
                server: at(f.server, 4000),
            };
            let opens = packet(WORLD, What::Udp, flow.server, flow.outside);
            let arrives = sent(flow.guest, What::Udp, flow.server, flow.inside);
            t.sends("a client's packet", WORLD, &opens, &arrives, (NewFlow, &[]));
            flow.errors_from_inside(t, f);
            flow.errors_from_outside(t, f);
        }
    });
}

#[test]
fn errors_pass_between_guests_untranslated() {
    everywhere(|t| {
        for f in Family::both() {
            let (one, two) = (at(f.vm1, 5000), at(f.vm2, 53));
            let opens = packet(guest(1), What::Udp, one, two);
            let arrives = sent(guest(2), What::Udp, one, two);
            t.sends("guest to guest", guest(1), &opens, &arrives, (NewFlow, &[]));
            for kind in ERRORS {
                let message = f.kind(kind);
                let frame = error(guest(2), f.vm2, f.vm1, message, &arrives[14..]);
                let expected = error_sent(guest(1), f.vm2, f.vm1, message, &arrives[14..]);
                t.sends("the receiver's error", guest(2), &frame, &expected, PASSES);
            }
        }
    });
}

#[test]
fn an_error_of_the_host_about_a_flow_with_it_passes_to_the_guest_and_any_other_of_its_does_not() {
    everywhere(|t| {
        for f in Family::both() {
            let gateway: IpAddr = if f.v6() { "fd00:1:0:1::1" } else { "10.0.1.1" }.parse().unwrap();
            let from_host = sent(guest(1), What::Udp, at(gateway, 4000), at(f.vm1, 9));
            let outcome = t.0.run("the host's packet", At::HostEgress("vm1"), &from_host, NewFlow, &[]);
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, from_host.clone()));
            let message = f.kind(Error::PortUnreachable);
            let answer = error(guest(1), f.vm1, gateway, message, &from_host[14..]);
            t.ends("the guest's error to the host", guest(1), &answer, Action::Pass, ToHost);
            // What the host would say of a datagram of the guest's in that flow.
            let back = packet(guest(1), What::Udp, at(f.vm1, 9), at(gateway, 4000));
            let error_of_host = error_sent(guest(1), gateway, f.vm1, message, &back[14..]);
            let outcome = t.0.run("the host's error", At::HostEgress("vm1"), &error_of_host, FromHost, &[]);
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, error_of_host));
            // A host that forwards is nobody in a flow of two guests.
            let opens = packet(guest(2), What::Udp, at(f.vm2, 1), at(f.vm1, 2));
            let arrives = sent(guest(1), What::Udp, at(f.vm2, 1), at(f.vm1, 2));
            t.sends("guest to guest", guest(2), &opens, &arrives, (NewFlow, &[]));
            let forged = error_sent(guest(2), f.vm1, f.vm2, message, &arrives[14..]);
            let outcome = t.0.run("in a strange flow", At::HostEgress("vm2"), &forged, Spoofed, &[]);
            assert_eq!(outcome.action, Action::Drop);
        }
    });
}

#[test]
fn an_error_goes_out_and_in_again_where_its_flow_did() {
    everywhere(|t| {
        for f in Family::both() {
            let (one, own) = (at(f.vm1, 5000), at(f.own, 53));
            let opens = packet(guest(1), What::Udp, one, own);
            if t.xdp() {
                // Two translations of one packet are TC's.
                t.ends("XDP", guest(1), &opens, Action::Pass, NewFlow);
                continue;
            }
            let arrived = t.out("to a guest's own address", guest(1), &opens, (NewFlow, &[DNS]));
            let public = at(f.frontend, number(arrived.clone(), What::Udp));
            assert!(arrived == sent(guest(3), What::Udp, public, at(f.vm3, 53)));
            // As the sender's own packet would have been quoted: with the TTL that arrived.
            let quote = sent(guest(1), What::Udp, one, own);
            for kind in ERRORS {
                let message = f.kind(kind);
                let frame = error(guest(3), f.vm3, f.frontend, message, &arrived[14..]);
                let expected = error_sent(guest(1), f.own, f.vm1, message, &quote[14..]);
                t.sends("its error", guest(3), &frame, &expected, PASSES);
            }
            // From outside nobody speaks in such a flow, whatever is quoted.
            let message = f.kind(Error::PortUnreachable);
            let between = sent(WORLD, What::Udp, public, own);
            let forged = error(WORLD, f.router, f.frontend, message, &between[14..]);
            t.drops("an error from outside", WORLD, &forged, Spoofed);
        }
    });
}

#[test]
fn icmp_queries_have_an_identifier_and_other_messages_only_addresses() {
    everywhere(|t| {
        let [f, six] = Family::both();
        // Timestamps are translated like echo (RFC 5508 REQ-1).
        let query = What::Icmp(13, [0x12, 0x34, 0, 1]);
        let (inside, server) = (at(f.vm1, 0), at(f.server, 0));
        let left = t.out("a timestamp", guest(1), &packet(guest(1), query, inside, server), (NewFlow, &[]));
        let id = number(left.clone(), query).to_be_bytes();
        assert_ne!(id, [0x12, 0x34]);
        let as_sent = |kind, id: [u8; 2]| What::Icmp(kind, [id[0], id[1], 0, 1]);
        assert!(left == sent(WORLD, as_sent(13, id), at(f.frontend, 0), server));
        t.sends(
            "its reply",
            WORLD,
            &packet(WORLD, as_sent(14, id), server, at(f.frontend, 0)),
            &sent(guest(1), as_sent(14, [0x12, 0x34]), server, inside),
            PASSES,
        );
        for (f, plain, again) in [(f, 40, false), (f, 253, true), (six, 200, false), (six, 139, true)] {
            let message = What::Icmp(plain, [1, 2, 3, 4]);
            let (own, inside, server) = (at(f.own, 0), at(f.vm3, 0), at(f.server, 0));
            let name = format!("type {plain}");
            // One flow for all messages between two addresses.
            let of = |rules| if again { PASSES } else { (NewFlow, rules) };
            // One to one, in and out, and judged as Icmp.
            t.sends(
                &name,
                WORLD,
                &packet(WORLD, message, server, own),
                &sent(guest(3), message, server, inside),
                of(if f.v6() { &[ICMP6] } else { &[ICMP] }),
            );
            t.sends(
                &name,
                guest(3),
                &packet(guest(3), message, inside, server),
                &sent(WORLD, message, own, server),
                PASSES,
            );
            let denied = packet(WORLD, message, at(f.router, 0), own);
            let outcome = t.0.run(&name, At::Ingress("up"), &denied, DeniedByRule, &[DENY]);
            assert_eq!(outcome.action, Action::Drop);
            let direct = packet(guest(1), message, at(f.vm1, 0), at(f.vm2, 0));
            let arrives = sent(guest(2), message, at(f.vm1, 0), at(f.vm2, 0));
            t.sends(&name, guest(1), &direct, &arrives, of(&[]));
            // An echo with identifier 0 is something else.
            let ping = packet(guest(1), What::Echo, at(f.vm1, 0), server);
            t.out("echo 0", guest(1), &ping, of(&[]));
            t.drops(&name, guest(1), &packet(guest(1), message, at(f.vm1, 0), server), IcmpType);
            let host: IpAddr = if f.v6() { "fd00:1:0:1::1" } else { "10.0.1.1" }.parse().unwrap();
            t.drops(&name, guest(1), &packet(guest(1), message, at(f.vm1, 0), at(host, 0)), HostAccess);
        }
        for (f, link) in [(f, 9), (f, 10), (six, 141), (six, 151)] {
            let message = What::Icmp(link, [0; 4]);
            for to in [f.vm2, f.server] {
                let frame = packet(guest(1), message, at(f.vm1, 0), at(to, 0));
                t.drops("what stays on its link", guest(1), &frame, IcmpType);
            }
            let frame = packet(WORLD, message, at(f.server, 0), at(f.own, 0));
            t.drops("what stays on its link", WORLD, &frame, IcmpType);
            let host: IpAddr = if f.v6() { "2001:db8:ffff::1" } else { "203.0.113.1" }.parse().unwrap();
            let frame = packet(WORLD, message, at(f.server, 0), at(host, 0));
            t.ends("the host's own", WORLD, &frame, Action::Pass, NotOurs);
        }
    });
}
