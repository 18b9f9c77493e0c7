//! Errors of the gateway's own, on the host engine, under XDP and under TC: what has no time left, and what the next link does not
//! take. From whom, to whom, with which checksums; and what nobody is told of.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{self, *};
use portcullis_common::packet::checksum;
use portcullis_tests::backend::Action;
use portcullis_tests::icmp_error::{
    Error, Family, Side, Table, WORLD, What, error, everywhere, guest, packet, sent,
};
use portcullis_tests::lab::{Craft, Craft6, Frame, Transport};

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// The frame with another TTL.
fn with_ttl(frame: &[u8], ttl: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[14] >> 4 == 6 {
        frame[21] = ttl;
    } else {
        frame[22] = ttl;
        portcullis_tests::icmp_error::fix_header(&mut frame, 14);
    }
    frame
}

/// The gateway answers the frame with this error, from `own`, quoting its headers; returns the MTU it names.
fn told(
    t: &mut Table<'_>,
    name: &str,
    side: Side,
    frame: &[u8],
    own: IpAddr,
    kind: (u8, u8),
    reason: Reason,
) -> u16 {
    let out = Frame::parse(t.out(name, side, frame, (reason, &[])));
    let who = format!("{name} on {}", t.0.backend.name());
    let ip = out.ip.as_ref().unwrap();
    let asked = Frame::parse(frame.to_vec());
    assert_eq!((ip.source, ip.destination), (own, asked.ip.as_ref().unwrap().source), "{who}");
    assert_eq!((out.source_mac, out.destination_mac), (side.gateway, side.mac), "{who}");
    let Transport::Icmp { kind: k, code, id, sequence } = ip.transport else { panic!("{who}: {out:?}") };
    assert_eq!(((k, code), id), (kind, 0), "{who}");
    assert!(out.checksums_ok(), "{who}: {out:?}");
    // Precedence of network control, in the type of service or the traffic class (RFC 1812 §4.3.2.5).
    let class = if own.is_ipv6() { &[0x6c, 0][..] } else { &[0x45, 0xc0] };
    assert_eq!(&out.bytes[14..16], class, "{who}");
    let quote = out.payload();
    let header = if own.is_ipv6() { 40 } else { 20 };
    // All but the checksum, which nobody could check.
    let ports = header + if frame[23] == 6 && header == 20 { 16 } else { 6 };
    assert_eq!(&quote[..ports], &frame[14..14 + ports], "{who}: the packet is quoted");
    sequence
}

fn gateway(f: Family, subnet: u8) -> IpAddr {
    if f.v6() { format!("fd00:1:0:{subnet}::1") } else { format!("10.0.{subnet}.1") }.parse().unwrap()
}

#[test]
fn who_sent_what_has_no_time_left_is_told_by_the_address_it_knows() {
    everywhere(|t| {
        for f in Family::both() {
            let kind = if f.v6() { (3, 0) } else { (11, 0) };
            let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
            for (what, opens) in [(What::Udp, NewFlow), (What::Tcp, NewFlow), (What::Echo, NewFlow)] {
                let frame = packet(guest(1), what, inside, server);
                let left = t.out("opens", guest(1), &frame, (opens, &[]));
                let name = format!("{what:?} with a TTL of one");
                told(t, &name, guest(1), &with_ttl(&frame, 1), gateway(f, 1), kind, TtlExpired);
                for group in [[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
                    let mut dying = with_ttl(&frame, 1);
                    dying[..6].copy_from_slice(&group);
                    t.drops("nobody is told of a frame for a group", guest(1), &dying, TtlExpired);
                }
                if what == What::Udp {
                    let outside = Frame::parse(left).source().unwrap();
                    let answer = with_ttl(&packet(WORLD, what, server, outside), 1);
                    told(t, "an answer", WORLD, &answer, outside.ip(), kind, TtlExpired);
                    let public = sent(WORLD, what, outside, server);
                    let message = f.kind(Error::PortUnreachable);
                    let dying = with_ttl(&error(WORLD, f.router, outside.ip(), message, &public[14..]), 1);
                    t.drops("an error is not answered", WORLD, &dying, TtlExpired);
                }
            }
        }
    });
}

#[test]
fn what_has_no_time_left_opens_no_flow_and_takes_no_port() {
    everywhere(|t| {
        for f in Family::both() {
            let kind = if f.v6() { (3, 0) } else { (11, 0) };
            for what in [What::Udp, What::Tcp, What::Echo] {
                let frame = packet(guest(1), what, at(f.vm1, 5100), at(f.server, 53));
                let known =
                    |t: &Table<'_>| t.0.backend.half_records().expect("the tables can be read").0.len();
                let before = known(t);
                let name = format!("{what:?}, the first of its flow");
                told(t, &name, guest(1), &with_ttl(&frame, 1), gateway(f, 1), kind, TtlExpired);
                assert_eq!(known(t), before, "{name} on {}", t.0.backend.name());
                t.out("with time left", guest(1), &frame, (NewFlow, &[]));
                assert!(known(t) > before, "{name} on {}", t.0.backend.name());
            }
        }
    });
}

#[test]
fn who_sent_what_the_next_link_does_not_take_is_told_its_mtu() {
    everywhere(|t| {
        for f in Family::both() {
            let kind = if f.v6() { (2, 0) } else { (3, 4) };
            let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
            t.out("opens", guest(1), &packet(guest(1), What::Udp, inside, server), (NewFlow, &[]));
            let big = |size: usize, fragment: bool| match (f.vm1, f.server) {
                (IpAddr::V4(a), IpAddr::V4(b)) => {
                    let craft = Craft::new(guest(1).mac, a, guest(1).gateway, b);
                    Craft { dont_fragment: !fragment, ..craft }.udp(5000, 53, &vec![7; size - 28])
                }
                (IpAddr::V6(a), IpAddr::V6(b)) => {
                    Craft6::new(guest(1).mac, a, guest(1).gateway, b).udp(5000, 53, &vec![7; size - 48])
                }
                _ => panic!("two families"),
            };
            t.out("as long as the link takes", guest(1), &big(1500, false), (Forwarded, &[]));
            let mtu = told(t, "one byte more", guest(1), &big(1501, false), gateway(f, 1), kind, TooBig);
            assert_eq!(mtu, 1500);
            if !f.v6() {
                // `packet_fragments` says what becomes of it. XDP leaves it to TC.
                let action = if t.xdp() { Action::Pass } else { Action::Drop };
                t.ends("it may be fragmented", guest(1), &big(1501, true), action, Fragmented);
            }
            // A partial checksum that is completed afterwards changes nothing: the field already has that value.
            let mut partial = big(1501, false);
            Craft::make_partial(&mut partial).unwrap();
            let out = t.out("a partial checksum", guest(1), &partial, (TooBig, &[]));
            let transport = out.len() - 8;
            let mut completed = out.clone();
            let sum = checksum::of(&out[transport..]);
            completed[transport + 6..].copy_from_slice(&sum.to_ne_bytes());
            assert!(Frame::parse(completed).checksums_ok(), "{}", t.0.backend.name());
        }
    });
}
