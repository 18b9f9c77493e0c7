//! Fragments on the host engine, under XDP and under TC: whose are noted, which of two wins, what is dropped by which name, and
//! what is fragmented here. Every counter is asserted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_common::Reason::*;
use portcullis_common::packet::checksum;
use portcullis_tests::backend::{Action, At, Backend as _, HostBackend};
use portcullis_tests::icmp_error::{Family, POLICY, Side, Table, WORLD, everywhere, fix_header, guest};
use portcullis_tests::lab::{Craft, Craft6, Frame, TcpFlags};

const DENY: &str = "own/Inbound/defaultSecurityRules/DenyAllInBound";
const OUT: &str = "own/Outbound/defaultSecurityRules/AllowInternetOutBound";
const DNS: &str = "own/Inbound/securityRules/AllowDns";

/// A datagram of UDP with an identification, in fragments of `size` bytes each.
fn fragments(side: Side, from: (IpAddr, u16), to: (IpAddr, u16), id: u16, size: usize) -> Vec<Vec<u8>> {
    let payload: Vec<u8> = (0..232u8).collect();
    match (from.0, to.0) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let craft = Craft::new(side.mac, a, side.gateway, b);
            let craft = Craft { dont_fragment: false, identification: id, ..craft };
            Craft::fragments(&craft.udp(from.1, to.1, &payload), size)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            fragments6(&Craft6::new(side.mac, a, side.gateway, b).udp(from.1, to.1, &payload), id, size)
        }
        _ => panic!("two families"),
    }
}

/// The same of an IPv6 frame without extension headers.
fn fragments6(frame: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let (headers, payload) = frame.split_at(54);
    let parts: Vec<&[u8]> = payload.chunks(size).collect();
    let make = |(number, part): (usize, &&[u8])| {
        let more = u16::from(number + 1 < parts.len());
        piece6(headers, 17, id, (number * size) as u16 | more, part)
    };
    parts.iter().enumerate().map(make).collect()
}

/// One fragment of IPv6: offset in bytes, and whether more follow in its lowest bit.
fn piece6(headers: &[u8], protocol: u8, id: u16, field: u16, part: &[u8]) -> Vec<u8> {
    let mut bytes = headers.to_vec();
    bytes[18..20].copy_from_slice(&((8 + part.len()) as u16).to_be_bytes());
    bytes[20] = 44;
    bytes.extend([protocol, 0]);
    bytes.extend(field.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(id.to_be_bytes());
    bytes.extend(part);
    bytes
}

/// Where a fragment of either family says it begins, in units of 8 bytes.
fn with_offset(frame: &[u8], offset: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[14] >> 4 == 6 {
        let more = frame[57] & 1;
        frame[56..58].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
    } else {
        let more = u16::from(frame[20] & 0x20) << 8;
        frame[20..22].copy_from_slice(&(offset | more).to_be_bytes());
        fix_header(&mut frame, 14);
    }
    frame
}

#[test]
fn a_fragment_is_noted_only_of_its_own_sender_in_a_flow_that_is_allowed() {
    everywhere(|t| {
        for f in Family::both() {
            let (inside, server) = ((f.vm1, 5000), (f.server, 53));
            let own = fragments(guest(1), inside, server, 7, 80);
            // A neighbour in vm1's name, with other ports: before, between, and of a flow that lives.
            let forged = fragments(guest(2), (f.vm1, 6000), server, 7, 80);
            let living = fragments(guest(2), inside, server, 7, 80);
            t.drops("forged, before", guest(2), &forged[0], Spoofed);
            t.drops("its rest finds nothing", guest(2), &forged[1], FragmentOutOfOrder);
            t.drops("nor would the victim's", guest(1), &own[1], FragmentOutOfOrder);
            t.out("the victim's own", guest(1), &own[0], (NewFlow, &[]));
            t.drops("forged, between", guest(2), &forged[0], Spoofed);
            t.drops("forged, of the flow itself", guest(2), &living[0], Spoofed);
            t.drops("a later one from elsewhere", guest(2), &living[1], FragmentOutOfOrder);
            t.out("the victim's second", guest(1), &own[1], (Forwarded, &[]));
            t.out("the victim's third", guest(1), &own[2], (Forwarded, &[]));

            // What a rule denies leaves nothing behind, nor takes it the place of what is allowed.
            let denied = fragments(WORLD, (f.server, 4000), (f.own, 54), 9, 80);
            let outcome = t.0.run("denied", At::Ingress("up"), &denied[0], DeniedByRule, &[DENY]);
            assert_eq!(outcome.action, Action::Drop);
            t.drops("its rest", WORLD, &denied[1], FragmentOutOfOrder);
            let allowed = fragments(WORLD, (f.server, 4000), (f.own, 53), 9, 80);
            t.out("allowed, under the same number", WORLD, &allowed[0], (NewFlow, &[DNS]));
            let outcome = t.0.run("denied, between", At::Ingress("up"), &denied[0], FragmentOverlap, &[]);
            assert_eq!(outcome.action, Action::Drop);
            if !f.v6() {
                t.out("the allowed one's rest", WORLD, &allowed[1], (Forwarded, &[]));
            }
        }
    });
}

#[test]
fn the_first_of_two_first_fragments_wins_and_the_same_again_is_a_duplicate() {
    everywhere(|t| {
        for f in Family::both() {
            let server = (f.server, 53);
            let one = fragments(guest(1), (f.vm1, 5000), server, 7, 80);
            let other = fragments(guest(1), (f.vm1, 5001), server, 7, 80);
            let shorter = fragments(guest(1), (f.vm1, 5000), server, 7, 40);
            t.out("the first", guest(1), &one[0], (NewFlow, &[]));
            t.out("once more", guest(1), &one[0], (Forwarded, &[]));
            t.out("its second", guest(1), &one[1], (Forwarded, &[]));
            t.out("the first, late", guest(1), &one[0], (Forwarded, &[]));
            t.drops("with other ports", guest(1), &other[0], FragmentOverlap);
            t.drops("of another length", guest(1), &shorter[0], FragmentOverlap);
            if f.v6() {
                // RFC 5722: all of it is discarded.
                t.drops("nothing more of it is sent", guest(1), &one[2], FragmentOverlap);
            } else {
                t.out("its third", guest(1), &one[2], (Forwarded, &[]));
            }
        }
    });
}

#[test]
fn fragments_out_of_order_overlapping_or_too_long_are_dropped_each_by_its_name() {
    everywhere(|t| {
        for f in Family::both() {
            let parts = fragments(guest(1), (f.vm1, 5000), (f.server, 53), 7, 80);
            t.drops("before the first", guest(1), &parts[1], FragmentOutOfOrder);
            t.out("the first", guest(1), &parts[0], (NewFlow, &[]));
            t.drops("the third before the second", guest(1), &parts[2], FragmentOutOfOrder);
            t.out("the second", guest(1), &parts[1], (Forwarded, &[]));
            t.drops("the second once more", guest(1), &parts[1], FragmentOverlap);
            t.out("the third and last", guest(1), &parts[2], (Forwarded, &[]));
            t.drops("the third once more", guest(1), &parts[2], FragmentOutOfOrder);

            let parts = fragments(guest(1), (f.vm1, 5000), (f.server, 53), 8, 80);
            t.out("another first", guest(1), &parts[0], (Forwarded, &[]));
            t.drops("eight bytes into it", guest(1), &with_offset(&parts[1], 9), FragmentOverlap);
            if f.v6() {
                t.drops("its second, too late", guest(1), &parts[1], FragmentOverlap);
            } else {
                t.out("its second", guest(1), &parts[1], (Forwarded, &[]));
            }
            t.drops("beyond the longest datagram", guest(1), &with_offset(&parts[2], 8190), Malformed);
            let odd = fragments(guest(1), (f.vm1, 5000), (f.server, 53), 9, 80);
            let at = if f.v6() { 18 } else { 16 };
            let mut odd = odd[0][..odd[0].len() - 1].to_vec();
            odd[at + 1] -= 1;
            if !f.v6() {
                fix_header(&mut odd, 14);
            }
            t.drops("no multiple of eight, and more follow", guest(1), &odd, Malformed);
            for (bytes, name) in [(0, "none"), (4, "the ports only")] {
                let headers = if f.v6() { 62 } else { 34 };
                let mut tiny = parts[0][..headers + bytes].to_vec();
                let length = (bytes + if f.v6() { 8 } else { 20 }) as u16;
                tiny[at..at + 2].copy_from_slice(&length.to_be_bytes());
                if !f.v6() {
                    fix_header(&mut tiny, 14);
                }
                t.drops(
                    &format!("a first one with so much of its header: {name}"),
                    guest(1),
                    &tiny,
                    Malformed,
                );
            }
        }
    });
}

#[test]
fn a_header_behind_the_fragments_header_of_ipv6_hides_nothing_and_a_single_fragment_is_a_packet() {
    everywhere(|t| {
        let [_, f] = Family::both();
        let (IpAddr::V6(inside), IpAddr::V6(server)) = (f.vm1, f.server) else { panic!("IPv6") };
        let craft = |from: Ipv6Addr| Craft6::new(guest(1).mac, from, guest(1).gateway, server);
        let frame = craft(inside).udp(5000, 53, b"question");
        for hidden in [0, 43, 44, 60] {
            let mut part = vec![17, 0, 1, 4, 0, 0, 0, 0];
            part.extend(&frame[54..]);
            let piece = piece6(&frame[..54], hidden, 1, 0, &part);
            t.drops("an extension header behind", guest(1), &piece, ExtensionHeaders);
        }
        let single = piece6(&frame[..54], 17, 1, 0, &frame[54..]);
        t.out("all there is (RFC 6946)", guest(1), &single, (NewFlow, &[]));
        t.out("and again", guest(1), &single, (Forwarded, &[]));
        let segment = craft(inside).tcp(5000, 80, TcpFlags::SYN, 1);
        let tiny = piece6(&segment[..54], 6, 2, 1, &segment[54..70]);
        t.drops("a TCP header in two", guest(1), &tiny, Malformed);
        let second = piece6(&segment[..54], 6, 2, 8, &segment[62..74]);
        t.drops("one that would overwrite the flags", guest(1), &second, Fragment);
    });
}

#[test]
fn a_flood_of_first_fragments_costs_nobody_else_a_datagram() {
    everywhere(|t| {
        for f in Family::both() {
            let (inside, server) = ((f.vm1, 5000), (f.server, 53));
            let own = fragments(guest(1), inside, server, 7, 80);
            let left = Frame::parse(t.out("the victim's first", guest(1), &own[0], (NewFlow, &[])));
            for id in 0..40 {
                let many = fragments(guest(3), (f.vm3, 5000), server, id, 80);
                let opens: (_, &[&str]) = if id == 0 { (NewFlow, &[OUT]) } else { (Forwarded, &[]) };
                t.out("a neighbour's", guest(3), &many[0], opens);
            }
            t.out("the victim's second", guest(1), &own[1], (Forwarded, &[]));
            // From outside, at another public address. The victim's port is in no fragment's header here, so it is asked of a whole one.
            t.out("the victim's third", guest(1), &own[2], (Forwarded, &[]));
            let public = (left.ip.as_ref().unwrap().source, port(&left));
            let answer = fragments(WORLD, server, public, 7, 80);
            t.out("its answer", WORLD, &answer[0], (Forwarded, &[]));
            for id in 0..40 {
                let many = fragments(WORLD, (f.router, 1000 + id), (f.own, 53), id, 80);
                t.out("a stranger's", WORLD, &many[0], (NewFlow, &[DNS]));
            }
            t.out("the rest of the answer", WORLD, &answer[1], (Forwarded, &[]));
        }
    });
}

/// Source port of a first fragment.
fn port(frame: &Frame) -> u16 {
    let at = if frame.bytes[14] >> 4 == 6 { 62 } else { 34 };
    u16::from_be_bytes([frame.bytes[at], frame.bytes[at + 1]])
}

/// A datagram of vm1's that may be fragmented.
fn long(payload: usize) -> Vec<u8> {
    let (IpAddr::V4(inside), IpAddr::V4(server)) = (Family::both()[0].vm1, Family::both()[0].server) else {
        panic!("IPv4")
    };
    let craft = Craft::new(guest(1).mac, inside, guest(1).gateway, server);
    let payload: Vec<u8> = (0..payload).map(|i| (i % 251) as u8).collect();
    Craft { dont_fragment: false, identification: 77, ..craft }.udp(5000, 53, &payload)
}

/// Runs the packet and what is made of it, and returns what leaves.
fn leaves(backend: &mut HostBackend, frame: &[u8]) -> Vec<Vec<u8>> {
    let outcome = backend.run(At::Ingress("vm1"), frame).unwrap();
    assert_eq!(outcome.action, Action::Drop, "its fragments go on instead of it");
    let pieces = std::mem::take(&mut *backend.env.pieces.lock().unwrap());
    assert!(!pieces.is_empty());
    let mut sent = Vec::new();
    for (_, piece) in pieces {
        let outcome = backend.run(At::Ingress("vm1"), &piece).unwrap();
        assert_eq!(outcome.action, Action::Send);
        sent.push(outcome.frame);
    }
    sent
}

#[test]
fn what_is_too_long_and_may_be_fragmented_leaves_in_fragments_that_make_it_whole() {
    let mut backend = HostBackend::new(POLICY).unwrap();
    let mut numbers = Vec::new();
    for (payload, pieces) in [(1473, 2), (3000, 3), (9000, 7)] {
        let frame = long(payload);
        let sent = leaves(&mut backend, &frame);
        assert_eq!(sent.len(), pieces, "{payload}");
        let mut whole = sent[0][..34].to_vec();
        for (number, fragment) in sent.iter().enumerate() {
            assert!(fragment.len() <= 1514);
            let header = &fragment[14..34];
            assert_eq!(checksum::of(header), 0, "the header's checksum");
            let field = u16::from_be_bytes([header[6], header[7]]);
            assert_eq!(usize::from(field & 0x1fff) * 8, whole.len() - 34, "in order, without a gap");
            assert_eq!(field & 0xe000, if number + 1 < pieces { 0x2000 } else { 0 });
            assert_eq!(header[4..6], sent[0][18..20], "one identification");
            whole.extend(&fragment[34..]);
        }
        numbers.push([sent[0][18], sent[0][19]]);
        let length = (whole.len() - 14) as u16;
        whole[16..18].copy_from_slice(&length.to_be_bytes());
        whole[20..22].fill(0);
        fix_header(&mut whole, 14);
        let whole = Frame::parse(whole);
        assert!(whole.checksums_ok(), "{whole:?}");
        assert_eq!(whole.payload(), &frame[42..]);
        let public: IpAddr = Ipv4Addr::new(203, 0, 113, 10).into();
        assert_eq!(whole.ip.as_ref().unwrap().source, public);
    }
    numbers.dedup();
    assert_eq!(numbers.len(), 3, "each datagram has a number of its own");
    let counted = backend.counters().unwrap();
    assert_eq!((counted[&Fragmented], counted[&Forwarded]), (3, 12), "{counted:?}");

    // What is a fragment already keeps the number that the others have.
    let mut parts = Craft::fragments(&long(4000), 2000);
    let first = leaves(&mut backend, &parts.remove(0));
    let second = leaves(&mut backend, &parts.remove(0));
    let fields: Vec<(u16, u16)> = [first, second]
        .concat()
        .iter()
        .map(|f| (u16::from_be_bytes([f[18], f[19]]), u16::from_be_bytes([f[20], f[21]])))
        .collect();
    let wanted = [(77, 0x2000), (77, 0x2000 | 185), (77, 0x2000 | 250), (77, 0x2000 | 435)];
    assert_eq!(fields, wanted);
}

#[test]
fn who_must_not_or_cannot_be_fragmented_here_is_told() {
    everywhere(|t| {
        t.out("opens", guest(1), &long(100), (NewFlow, &[]));
        let cut = |t: &mut Table<'_>, name: &str, frame: &[u8]| {
            let action = if t.xdp() { Action::Pass } else { Action::Drop };
            t.ends(name, guest(1), frame, action, Fragmented);
        };
        cut(t, "one byte too long", &long(1473));
        let host = t.0.backend.name() == "host engine";
        if host {
            cut(t, "the longest", &long(16_000));
        }
        let mut marked = long(3000);
        marked[20] = 0x40;
        fix_header(&mut marked, 14);
        t.out("not to be fragmented", guest(1), &marked, (TooBig, &[]));
        if !t.xdp() {
            // Options belong into some fragments only; nobody can be told about such a packet either.
            let mut options = long(3000);
            options.splice(34..34, [1; 4]);
            options[14] = 0x46;
            let length = u16::from_be_bytes([options[16], options[17]]) + 4;
            options[16..18].copy_from_slice(&length.to_be_bytes());
            fix_header(&mut options, 14);
            t.drops("with options", guest(1), &options, TooBig);
        }
        if host {
            t.out("longer than what is cut", guest(1), &long(20_000), (TooBig, &[]));
        }
    });
}
