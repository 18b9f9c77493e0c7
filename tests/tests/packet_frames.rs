//! Frames that are not quite what they seem, on the host engine, under XDP and under TC: other stations' and groups', tagged twice and
//! three times, cut short, of protocols between bridges; and checksums that are none, or come out as none. Every counter is asserted.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::*;
use portcullis_common::packet::checksum;
use portcullis_tests::backend::{Action, At};
use portcullis_tests::icmp_error::{
    Error, Family, Table, WORLD, What, error, everywhere, fix_header, guest, packet, sent,
};
use portcullis_tests::lab::{Craft, Craft6, Frame};

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// The frame for another station.
fn to(station: [u8; 6], frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&station);
    frame
}

/// The frame behind tags with these EtherTypes.
fn tagged(tags: &[u16], frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    for (number, tag) in tags.iter().enumerate() {
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0, number as u8 + 1]);
    }
    bytes.extend(&frame[12..]);
    bytes
}

#[test]
fn a_frame_for_another_station_on_an_uplink_is_left_alone_whatever_it_would_hit() {
    everywhere(|t| {
        for f in Family::both() {
            let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
            let out = t.out("opens", guest(1), &packet(guest(1), What::Udp, inside, server), (NewFlow, &[]));
            let outside = Frame::parse(out).source().unwrap();
            let answer = packet(WORLD, What::Udp, server, outside);
            for other in [[2, 0, 0, 0, 0xaa, 4], [3 << 1, 0, 0, 0, 0xaa, 3], [2, 0, 0, 1, 0xaa, 3]] {
                let frame = to(other, &answer);
                t.ends("flooded by a switch", WORLD, &frame, Action::Pass, NotOurs);
            }
            if !f.v6() {
                t.ends("sent to all", WORLD, &to([0xff; 6], &answer), Action::Pass, NotOurs);
            }
            t.out("for us", WORLD, &answer, (Forwarded, &[]));
        }
    });
}

#[test]
fn what_bridges_and_ports_say_to_each_other_passes_untouched_and_nothing_else_does() {
    everywhere(|t| {
        let spanning_tree = {
            let mut frame = to([0x01, 0x80, 0xc2, 0, 0, 0], &[0; 60]);
            frame[6..12].copy_from_slice(&guest(1).mac);
            // A length, and LLC 42 42 03.
            frame[12..17].copy_from_slice(&[0, 38, 0x42, 0x42, 0x03]);
            frame
        };
        let of_type = |last: u8, kind: u16| {
            let mut frame = spanning_tree.clone();
            frame[5] = last;
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame
        };
        for (name, frame) in [
            ("spanning tree", spanning_tree.clone()),
            ("LACP", of_type(2, 0x8809)),
            ("802.1X", of_type(3, 0x888e)),
            ("LLDP", of_type(14, 0x88cc)),
        ] {
            t.ends(name, guest(1), &frame, Action::Pass, NotOurs);
            t.ends(name, WORLD, &frame, Action::Pass, NotOurs);
        }
        t.drops("beyond the sixteen addresses", guest(1), &of_type(16, 0x88cc), EtherType);
        t.drops("LLDP to one station", guest(1), &to(guest(1).gateway, &of_type(14, 0x88cc)), EtherType);
        t.drops("LLC to all", guest(1), &to([0xff; 6], &spanning_tree), EtherType);
        // IP is judged whatever it is sent to.
        let f = Family::both()[0];
        let frame = packet(guest(1), What::Udp, at(f.vm2, 1), at(f.vm1, 2));
        t.drops("IP among them", guest(1), &to([0x01, 0x80, 0xc2, 0, 0, 14], &frame), Spoofed);
    });
}

#[test]
fn two_and_three_tags_are_dropped_from_a_guest_and_left_alone_on_an_uplink() {
    everywhere(|t| {
        for f in Family::both() {
            let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
            let frame = packet(guest(1), What::Udp, inside, server);
            let out = t.out("opens", guest(1), &frame, (NewFlow, &[]));
            let answer = packet(WORLD, What::Udp, server, Frame::parse(out).source().unwrap());
            for tags in
                [&[0x8100][..], &[0x88a8, 0x8100], &[0x8100, 0x8100], &[0x88a8, 0x8100, 0x8100], &[0x8100; 4]]
            {
                let name = format!("{} tags", tags.len());
                t.drops(&name, guest(1), &tagged(tags, &frame), Vlan);
                t.ends(&name, WORLD, &tagged(tags, &answer), Action::Pass, NotOurs);
            }
        }
    });
}

#[test]
fn runts_and_lengths_that_lie_are_malformed_from_a_guest_and_the_kernels_from_outside() {
    everywhere(|t| {
        for f in Family::both() {
            let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
            let frame = packet(guest(1), What::Udp, inside, server);
            let arriving = packet(WORLD, What::Udp, server, at(f.own, 53));
            let header = 14 + f.header();
            // The kernel's test of a program takes no frame without the first bytes of an IP header.
            for end in [header, header + 3, header + 7, frame.len() - 1] {
                let name = format!("{end} bytes of {}", frame.len());
                t.drops(&name, guest(1), &frame[..end], Malformed);
                t.ends(&name, WORLD, &arriving[..end], Action::Pass, NotOurs);
            }
            let field = if f.v6() { 18 } else { 16 };
            let says = |frame: &[u8], length: u16| {
                let mut frame = frame.to_vec();
                frame[field..field + 2].copy_from_slice(&length.to_be_bytes());
                if !f.v6() {
                    fix_header(&mut frame, 14);
                }
                frame
            };
            let length = u16::from_be_bytes([frame[field], frame[field + 1]]);
            let none = if f.v6() { 0 } else { 20 };
            for lie in [length + 1, 0xffff, none, none + 7] {
                let name = format!("a length of {lie}");
                t.drops(&name, guest(1), &says(&frame, lie), Malformed);
                t.ends(&name, WORLD, &says(&arriving, lie), Action::Pass, NotOurs);
            }
            // Padding behind the packet, as short frames have it, stays.
            let mut padded = frame.clone();
            padded.extend([0; 20]);
            let out = t.out("padded", guest(1), &padded, (NewFlow, &[]));
            assert_eq!(out.len(), padded.len());
        }
    });
}

/// vm3 leaves under an address of its own: what it sends, and what that becomes.
fn one_to_one(f: Family, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let made = |from_mac, to_mac, ttl, source: IpAddr| match (source, f.server) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            Craft { ttl, ..Craft::new(from_mac, a, to_mac, b) }.udp(5000, 53, payload)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            Craft6 { hop_limit: ttl, ..Craft6::new(from_mac, a, to_mac, b) }.udp(5000, 53, payload)
        }
        _ => panic!("two families"),
    };
    let three = guest(3);
    (made(three.mac, three.gateway, 64, f.vm3), made(WORLD.gateway, WORLD.mac, 63, f.own))
}

#[test]
fn a_udp_checksum_that_is_none_stays_none_and_one_that_comes_out_as_none_is_sent_as_all_ones() {
    everywhere(|t| {
        for f in Family::both() {
            let field = 14 + f.header() + 6;
            // The word of the payload that makes the sum after translation come out as 0.
            let (_, before) = one_to_one(f, &[0, 0, 1, 2, 3, 4]);
            let (frame, expected) = one_to_one(f, &[before[field], before[field + 1], 1, 2, 3, 4]);
            assert_eq!(expected[field..field + 2], [0xff, 0xff], "which 0 is sent as");
            let out = "own/Outbound/defaultSecurityRules/AllowInternetOutBound";
            t.sends("comes out as 0", guest(3), &frame, &expected, (NewFlow, &[out]));
            let without = |frame: &[u8]| {
                let mut frame = frame.to_vec();
                frame[field..field + 2].fill(0);
                frame
            };
            t.sends("none", guest(3), &without(&frame), &without(&expected), (Forwarded, &[]));
        }
    });
}

/// An error whose ICMP header says how long its quote is, with an extension behind it, translated from `public` to `private`.
fn extended(f: Family, t: &mut Table<'_>, quoted: usize, padded: usize) {
    let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
    let frame = packet(guest(1), What::Tcp, inside, server);
    let left = t.out(
        "opens, or opens again",
        guest(1),
        &frame,
        if quoted == 28 { (NewFlow, &[]) } else { (Forwarded, &[]) },
    );
    let outside = Frame::parse(left.clone()).source().unwrap();
    let private = sent(guest(1), What::Tcp, inside, server);
    let make = |packet: &[u8]| {
        let mut quote = packet[14..14 + quoted].to_vec();
        quote.resize(padded, 0xab);
        // Version 2, its checksum, and one object.
        quote.extend([0x20, 0, 0, 0, 0, 8, 1, 1, 0, 1, 2, 3]);
        quote
    };
    let words = (padded / 4) as u8;
    let (kind, code, _) = f.kind(Error::TimeExceeded);
    let message = (kind, code, [0, words, 0, 0]);
    let error = error(WORLD, f.router, outside.ip(), message, &make(&left));
    let out = t.out("an error with extensions", WORLD, &error, (Forwarded, &[]));
    let who = t.0.backend.name();
    let begin = 14 + 20 + 8;
    // All but TTL and the header's checksum, which the packet that left did not have yet.
    assert_eq!(out[begin + 12..begin + 20], private[26..34], "{who}: addresses");
    assert_eq!(out[begin + 20..begin + 24], private[34..38], "{who}: ports");
    assert_eq!(out[begin + padded..], error[begin + padded..], "{who}: the extension");
    assert_eq!(
        out[begin + quoted..begin + padded],
        error[begin + quoted..begin + padded],
        "{who}: the padding"
    );
    assert_eq!(checksum::of(&out[34..]), 0, "{who}: the error's checksum");
    assert_eq!(out[34 + 5], words, "{who}: the length");
}

#[test]
fn the_padding_and_extensions_of_an_error_are_not_taken_for_its_quote() {
    everywhere(|t| {
        let f = Family::both()[0];
        extended(f, t, 28, 28);
        extended(f, t, 40, 128);
    });
}

#[test]
fn source_quench_and_information_are_not_forwarded() {
    everywhere(|t| {
        let f = Family::both()[0];
        let (inside, server) = (at(f.vm3, 5000), at(f.server, 53));
        let rule = "own/Outbound/defaultSecurityRules/AllowInternetOutBound";
        t.out("opens", guest(3), &packet(guest(3), What::Udp, inside, server), (NewFlow, &[rule]));
        let quoted = sent(WORLD, What::Udp, at(f.own, 5000), server);
        let quench = error(WORLD, f.router, f.own, (4, 0, [0; 4]), &quoted[14..]);
        t.drops("source quench", WORLD, &quench, IcmpError);
        for kind in [15, 16] {
            let message = What::Icmp(kind, [1, 2, 3, 4]);
            t.drops(
                "information",
                guest(3),
                &packet(guest(3), message, at(f.vm3, 0), at(f.server, 0)),
                IcmpType,
            );
            let outcome = t.0.run(
                "information from outside",
                At::Ingress("up"),
                &packet(WORLD, message, at(f.server, 0), at(f.own, 0)),
                IcmpType,
                &[],
            );
            assert_eq!(outcome.action, Action::Drop);
        }
    });
}
