//! Segments from the middle of connections that are older than the tables, of both families, on the host engine, under XDP and
//! under TC: what the grace of a first start lets go on, what it does not, and the RST that says so.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{self, *};
use portcullis_common::quota::held;
use portcullis_tests::backend::{Action, At};
use portcullis_tests::icmp_error::{Family, POLICY, Side, Table, WORLD, everywhere, guest};
use portcullis_tests::lab::{Craft, Craft6, TcpFlags};

const OUT: &str = "own/Outbound/defaultSecurityRules/AllowInternetOutBound";
const DENY_IN: &str = "own/Inbound/defaultSecurityRules/DenyAllInBound";
const DENY_OUT: &str = "own/Outbound/securityRules/DenyOut";
const SEQUENCE: u32 = 0x0102_0304;
const ACKNOWLEDGED: u32 = 0xf00d_beef;

/// A segment; of IPv6 it acknowledges 0 and carries nothing.
fn segment(side: (Side, bool), flags: TcpFlags, from: SocketAddr, to: SocketAddr, ttl: u8) -> Vec<u8> {
    numbered(side, flags, from, to, ttl, SEQUENCE, ACKNOWLEDGED)
}

fn numbered(
    (side, arrives): (Side, bool),
    flags: TcpFlags,
    from: SocketAddr,
    to: SocketAddr,
    ttl: u8,
    sequence: u32,
    acknowledged: u32,
) -> Vec<u8> {
    let (a, b) = if arrives { (side.mac, side.gateway) } else { (side.gateway, side.mac) };
    match (from.ip(), to.ip()) {
        (IpAddr::V4(x), IpAddr::V4(y)) => Craft { ttl, ..Craft::new(a, x, b, y) }.tcp(
            from.port(),
            to.port(),
            flags,
            sequence,
            acknowledged,
            b"in the middle",
        ),
        (IpAddr::V6(x), IpAddr::V6(y)) => {
            Craft6 { hop_limit: ttl, ..Craft6::new(a, x, b, y) }.tcp(from.port(), to.port(), flags, sequence)
        }
        _ => panic!("two families"),
    }
}

/// The RST that answers [`segment`].
fn reset(side: Side, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let sequence = if from.is_ipv4() { ACKNOWLEDGED } else { 0 };
    numbered((side, false), TcpFlags::RST, to, from, 64, sequence, 0)
}

fn goes(
    t: &mut Table<'_>,
    name: &str,
    (side, from, to): (Side, SocketAddr, SocketAddr),
    (out, new_from, new_to): (Side, SocketAddr, SocketAddr),
    counted: (Reason, &[&str]),
) {
    let frame = segment((side, true), TcpFlags::ACK, from, to, 64);
    t.sends(name, side, &frame, &segment((out, false), TcpFlags::ACK, new_from, new_to, 63), counted);
}

fn is_reset(
    t: &mut Table<'_>,
    name: &str,
    side: Side,
    from: SocketAddr,
    to: SocketAddr,
    counted: (Reason, &[&str]),
) {
    let frame = segment((side, true), TcpFlags::ACK, from, to, 64);
    t.sends(name, side, &frame, &reset(side, from, to), counted);
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

#[test]
fn within_the_grace_what_needs_no_port_goes_on_in_both_directions_and_anything_else_is_reset() {
    everywhere(|t| {
        t.0.backend.adopt_for(300);
        for f in Family::both() {
            let (one, two) = (at(f.vm1, 4000), at(f.vm2, 22));
            goes(t, "guest to guest", (guest(1), one, two), (guest(2), one, two), (Adopted, &[]));
            goes(t, "and back", (guest(2), two, one), (guest(1), two, one), (Forwarded, &[]));
            goes(t, "and again", (guest(1), one, two), (guest(2), one, two), (Forwarded, &[]));

            let (inside, own, server) = (at(f.vm3, 4000), at(f.own, 4000), at(f.server, 443));
            goes(
                t,
                "out under an own address",
                (guest(3), inside, server),
                (WORLD, own, server),
                (Adopted, &[OUT]),
            );
            goes(t, "and back", (WORLD, server, own), (guest(3), server, inside), (Forwarded, &[]));

            // The world may not open this one, but the guest may have.
            let (inside, own) = (at(f.vm3, 4001), at(f.own, 4001));
            goes(
                t,
                "an answer comes first",
                (WORLD, server, own),
                (guest(3), server, inside),
                (Adopted, &[DENY_IN, OUT]),
            );
            goes(
                t,
                "and the next packet out",
                (guest(3), inside, server),
                (WORLD, own, server),
                (Forwarded, &[]),
            );

            let by_port = at(f.vm1, 5000);
            is_reset(t, "by a port", guest(1), by_port, server, (NoFlow, &[]));
            let to_port = segment((WORLD, true), TcpFlags::ACK, server, at(f.frontend, 1024), 64);
            t.drops("towards a port", WORLD, &to_port, NoFlow);
            for flags in [TcpFlags::SYN_ACK, TcpFlags::RST] {
                let frame = segment((guest(1), true), flags, at(f.vm1, 6000), at(f.vm2, 22), 64);
                t.drops("does not belong in the middle", guest(1), &frame, NoFlow);
            }
        }
    });
}

#[test]
fn a_connection_of_the_hosts_to_its_guest_goes_on_whoever_speaks_first_and_one_it_does_not_serve_does_not() {
    everywhere(|t| {
        t.0.backend.adopt_for(300);
        for (f, host) in Family::both().into_iter().zip(["10.0.1.1", "fd00:1:0:1::1"]) {
            let host: IpAddr = host.parse().unwrap();
            let passes = |t: &mut Table<'_>, name: &str, at: At, frame: &[u8], reason| {
                assert_eq!(t.0.run(name, at, frame, reason, &[]).action, Action::Pass, "{name}");
            };
            for (port, host_first) in [(40_000, true), (40_001, false)] {
                let (own, served) = (at(host, port), at(f.vm1, 22));
                let there = segment((guest(1), false), TcpFlags::ACK, own, served, 64);
                let back = segment((guest(1), true), TcpFlags::ACK, served, own, 64);
                let (out, into) = (At::HostEgress("vm1"), At::Ingress("vm1"));
                if host_first {
                    passes(t, "the host", out, &there, Adopted);
                    passes(t, "its guest", into, &back, ToHost);
                } else {
                    passes(t, "the guest, which may not open it", into, &back, Adopted);
                    passes(t, "the host", out, &there, FromHost);
                }
            }
            // What the host forwards for a stranger is none of its own.
            let frame = segment((guest(1), false), TcpFlags::ACK, at(f.server, 443), at(f.vm1, 4000), 64);
            let outcome = t.0.run("a stranger's", At::HostEgress("vm1"), &frame, NoFlow, &[]);
            assert_eq!(outcome.action, Action::Drop);
        }
    });
}

#[test]
fn without_a_grace_or_after_it_a_segment_without_a_flow_is_dropped_in_silence() {
    everywhere(|t| {
        for over in [false, true] {
            if over {
                t.0.backend.adopt_for(300);
                t.0.backend.adopt_for(0);
            }
            for f in Family::both() {
                for (side, from, to) in [
                    (guest(1), at(f.vm1, 4000), at(f.vm2, 22)),
                    (guest(1), at(f.vm1, 4000), at(f.server, 443)),
                    (guest(3), at(f.vm3, 4000), at(f.server, 443)),
                    (WORLD, at(f.server, 443), at(f.own, 4000)),
                ] {
                    t.drops(
                        "in the middle",
                        side,
                        &segment((side, true), TcpFlags::ACK, from, to, 64),
                        NoFlow,
                    );
                }
            }
        }
    });
}

#[test]
fn what_the_rules_let_neither_side_open_is_not_adopted_and_its_guest_is_told() {
    let open = "securityRules:\n      - { name: AllowDns";
    assert!(POLICY.contains(open));
    let shut = POLICY.replace(
        open,
        "securityRules:\n      - { name: DenyOut, priority: 100, direction: Outbound, access: Deny, protocol: '*', \
         sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }\n      - { name: AllowDns",
    );
    everywhere(|t| {
        t.0.change(&shut);
        t.0.backend.adopt_for(300);
        for f in Family::both() {
            let (inside, own, server) = (at(f.vm3, 4000), at(f.own, 4000), at(f.server, 443));
            is_reset(t, "the guest's", guest(3), inside, server, (DeniedByRule, &[DENY_OUT, DENY_IN]));
            let frame = segment((WORLD, true), TcpFlags::ACK, server, own, 64);
            let outcome =
                t.0.run("the world's", At::Ingress("up"), &frame, DeniedByRule, &[DENY_IN, DENY_OUT]);
            assert_eq!(outcome.action, Action::Drop, "nothing is sent to the world");
        }
    });
}

#[test]
fn an_adopted_connection_counts_for_the_guest_that_is_taken_to_have_opened_it_whoever_spoke_first() {
    const QUOTA: u16 = 16;
    let deny = "own/Outbound/securityRules/DenyLan";
    let allow = "own/Inbound/defaultSecurityRules/AllowVnetInBound";
    let open = "securityRules:\n      - { name: AllowDns";
    assert!(POLICY.contains(open));
    let one_way = POLICY.replace(
        open,
        "securityRules:\n      - { name: DenyLan, priority: 100, direction: Outbound, access: Deny, protocol: '*', \
         sourceAddressPrefix: '*', destinationAddressPrefix: VirtualNetwork, destinationPortRange: '*' }\n      - { name: AllowDns",
    );
    let policy =
        format!("{one_way}flowTable: {{ maxFlowsPerGuest: {QUOTA}, maxFlowsPerGuestIPv6: {QUOTA} }}\n");
    everywhere(|t| {
        t.0.change(&policy);
        t.0.backend.adopt_for(300);
        for (f, family) in Family::both().into_iter().zip(["v4", "v6"]) {
            let has = |t: &Table<'_>, guest: &str| {
                held(t.0.backend.guest_flows(&format!("{guest}/{family}")).expect("the guest is there").held)
            };
            let from = at(f.vm3, 22);
            for n in 0..QUOTA {
                let to = at(f.vm1, 4000 + n);
                goes(
                    t,
                    "only the receiver may open it",
                    (guest(3), from, to),
                    (guest(1), from, to),
                    (Adopted, &[deny, allow]),
                );
            }
            assert_eq!((has(t, "vm1"), has(t, "vm3")), (QUOTA.into(), 0), "{family}");
            let one_more = segment((guest(3), true), TcpFlags::ACK, from, at(f.vm1, 5000), 64);
            let outcome =
                t.0.run("beyond its quota", At::Ingress("vm3"), &one_more, GuestFlowQuota, &[deny, allow]);
            assert_eq!(outcome.action, Action::Drop);
            let syn = segment((guest(1), true), TcpFlags::SYN, at(f.vm1, 5000), at(f.vm2, 22), 64);
            t.drops("nor does it open another", guest(1), &syn, GuestFlowQuota);
            // The other end has paid for nothing.
            let (inside, own, server) = (at(f.vm3, 4000), at(f.own, 4000), at(f.server, 443));
            goes(t, "its neighbour's", (guest(3), inside, server), (WORLD, own, server), (Adopted, &[OUT]));
            assert_eq!((has(t, "vm1"), has(t, "vm3")), (QUOTA.into(), 1), "{family}");
        }
    });
}
