//! Hostile ICMP errors on the host engine, under XDP and under TC: forged senders, quotes that are cut off, that lie, that quote
//! what no error is about. None is passed on half translated, and none moves a flow. Every counter is asserted.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::*;
use portcullis_common::engine::host::HostEnv;
use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::{Bucket, Bucket6};
use portcullis_tests::backend::{Action, Backend as _, HostBackend};
use portcullis_tests::icmp_error::{
    Error, Family, POLICY, Side, Table, WORLD, What, error, error_sent, everywhere, fix_header, guest,
    packet, sent,
};
use portcullis_tests::lab::{Craft6, Frame};
use portcullis_tests::ledger::Ledger;

fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// Opens vm1's flow to the server's port 53 and returns its packet as it left and as it would have without a translation.
fn opened(t: &mut Table<'_>, f: Family, what: What) -> (SocketAddr, Vec<u8>, Vec<u8>) {
    let (inside, server) = (at(f.vm1, 5000), at(f.server, 53));
    let left = t.out("opens", guest(1), &packet(guest(1), what, inside, server), (NewFlow, &[]));
    let outside = Frame::parse(left.clone()).source().unwrap();
    (outside, left, sent(WORLD, what, inside, server))
}

/// The quote's first bytes as an error from outside, and what vm1 gets of it.
fn arrives(f: Family, public: &[u8], private: &[u8], end: usize) -> (Vec<u8>, Vec<u8>) {
    let message = f.kind(Error::TooBig);
    let frame = error(WORLD, f.router, f.frontend, message, &public[14..end]);
    (frame, error_sent(guest(1), f.router, f.vm1, message, &private[14..end]))
}

#[test]
fn a_quote_cut_off_anywhere_is_translated_whole_or_dropped() {
    everywhere(|t| {
        for f in Family::both() {
            for what in [What::Udp, What::Tcp] {
                let (_, public, private) = opened(t, f, what);
                for end in 14..=public.len() {
                    // Of half a checksum nothing can be changed.
                    let mut private = private.clone();
                    if what == What::Tcp && end == 14 + f.header() + 17 {
                        private[end - 1] = public[end - 1];
                    }
                    let (frame, expected) = arrives(f, &public, &private, end);
                    let name = format!("{what:?}, {} bytes quoted", end - 14);
                    if end >= 14 + f.header() + 8 {
                        t.sends(&name, WORLD, &frame, &expected, (Forwarded, &[]));
                    } else {
                        t.drops(&name, WORLD, &frame, IcmpError);
                    }
                    // The bytes are there, but the error ends before them: padding is not read.
                    let mut padded = error(WORLD, f.router, f.frontend, f.kind(Error::TooBig), &public[14..]);
                    let length = (end - 14 + 8) as u16;
                    if f.v6() {
                        padded[18..20].copy_from_slice(&length.to_be_bytes());
                    } else {
                        padded[16..18].copy_from_slice(&(length + 20).to_be_bytes());
                        fix_header(&mut padded, 14);
                    }
                    if end < 14 + f.header() + 8 {
                        t.drops(&name, WORLD, &padded, IcmpError);
                    }
                }
            }
        }
    });
}

#[test]
fn a_quote_that_lies_or_is_of_what_no_error_is_about_is_dropped() {
    everywhere(|t| {
        for f in Family::both() {
            let (outside, public, private) = opened(t, f, What::Udp);
            let (whole, _) = arrives(f, &public, &private, public.len());
            let quote = 14 + f.header() + 8;
            let changed = |change: &dyn Fn(&mut Vec<u8>)| {
                let mut frame = whole.clone();
                change(&mut frame);
                frame
            };
            let version = changed(&|frame| frame[quote] ^= 0x20);
            t.drops("another version", WORLD, &version, IcmpError);
            let message = f.kind(Error::TimeExceeded);
            let quotes = |t: &mut Table<'_>, name: &str, bytes: &[u8], reason| {
                t.drops(name, WORLD, &error(WORLD, f.router, f.frontend, message, bytes), reason);
            };
            quotes(t, "an error about an error", &whole[14..], IcmpError);
            quotes(t, "nothing", &[], IcmpError);
            quotes(t, "zeroes", &[0; 64], IcmpError);
            quotes(t, "ones", &[0xff; 64], IcmpError);
            let other = sent(WORLD, What::Udp, outside, at(f.server, 54));
            quotes(t, "a flow there is none of", &other[14..], IcmpError);
            let strange = sent(WORLD, What::Udp, at(f.own, 5000), at(f.server, 53));
            quotes(t, "another's packet", &strange[14..], IcmpError);
            let direction = sent(WORLD, What::Udp, at(f.server, 53), outside);
            quotes(t, "what never left here", &direction[14..], IcmpError);
            if f.v6() {
                let extension = |kinds: &[(u8, usize)], from: u8| {
                    let mut craft = craft6(f, outside.ip());
                    craft.extensions =
                        kinds.iter().map(|(kind, length)| (*kind, header(*length, from))).collect();
                    craft.udp(outside.port(), 53, b"question")[14..].to_vec()
                };
                quotes(t, "a chain too long", &extension(&[(60, 8); 6], 0), IcmpError);
                quotes(t, "a header beyond the frame", &extension(&[(60, 1024)], 0)[..96], IcmpError);
                // RFC 8200 §4.5: reserved, offset and flags, identification.
                quotes(t, "a later fragment", &extension(&[(44, 8)], 8), Fragment);
            } else {
                let changed = |change: &dyn Fn(&mut Vec<u8>)| {
                    let mut frame = public.clone();
                    change(&mut frame);
                    frame[14..].to_vec()
                };
                quotes(t, "a later fragment", &changed(&|frame| frame[21] = 1), Fragment);
                quotes(t, "a header of 16 bytes", &changed(&|frame| frame[14] = 0x44), IcmpError);
                quotes(t, "options beyond the quote", &changed(&|frame| frame[14] = 0x4f), IcmpError);
            }
            // Neither a redirect nor an error that nobody knows.
            for kind in if f.v6() { [0, 5, 100, 127] } else { [5, 5, 5, 5] } {
                let frame = error(WORLD, f.router, f.frontend, (kind, 1, [10, 0, 1, 9]), &public[14..]);
                t.drops("a redirect, an unknown error", WORLD, &frame, IcmpError);
            }
            // Cut off in the frame itself: what the host is to judge of.
            for end in [quote - 1, quote + 3] {
                t.ends("a frame cut off", WORLD, &whole[..end], Action::Pass, NotOurs);
            }
            // About nothing of ours, to the host.
            let host: IpAddr = if f.v6() { "2001:db8:ffff::1" } else { "203.0.113.1" }.parse().unwrap();
            let own = sent(WORLD, What::Udp, at(host, 40000), at(f.server, 53));
            let frame = error(WORLD, f.router, host, message, &own[14..]);
            t.ends("an error about the host's own", WORLD, &frame, Action::Pass, NotOurs);
        }
    });
}

/// An extension header of so many bytes; `fourth` is its fourth byte.
fn header(length: usize, fourth: u8) -> Vec<u8> {
    let mut header = vec![0; length];
    header[1] = (length / 8 - 1) as u8;
    if length == 8 && fourth != 0 {
        header[1] = 0;
        header[3] = fourth;
    } else {
        header[2..4].copy_from_slice(&[1, (length - 4).min(255) as u8]);
    }
    header
}

fn craft6(f: Family, outside: IpAddr) -> Craft6 {
    let (IpAddr::V6(from), IpAddr::V6(to)) = (outside, f.server) else { panic!("IPv6") };
    Craft6 { hop_limit: 63, ..Craft6::new(WORLD.gateway, from, WORLD.mac, to) }
}

#[test]
fn options_extension_headers_and_first_fragments_in_a_quote_are_stepped_over() {
    everywhere(|t| {
        let [f, six] = Family::both();
        let (_, public, private) = opened(t, f, What::Udp);
        let with_options = |frame: &[u8]| {
            let mut longer = frame[..34].to_vec();
            longer.extend([1; 40]);
            longer.extend_from_slice(&frame[34..]);
            longer[14] = 0x4f;
            let length = u16::from_be_bytes([longer[16], longer[17]]) + 40;
            longer[16..18].copy_from_slice(&length.to_be_bytes());
            fix_header(&mut longer, 14);
            longer
        };
        let first = |frame: &[u8]| {
            let mut frame = frame.to_vec();
            frame[20] |= 0x20;
            fix_header(&mut frame, 14);
            frame
        };
        for (name, change) in
            [("60 bytes of header", &with_options as &dyn Fn(&[u8]) -> Vec<u8>), ("a first fragment", &first)]
        {
            let (public, private) = (change(&public), change(&private));
            let (frame, expected) = arrives(f, &public, &private, public.len());
            t.sends(name, WORLD, &frame, &expected, (Forwarded, &[]));
        }
        // No checksum of UDP stays none.
        let without = |frame: &[u8]| {
            let mut frame = frame.to_vec();
            frame[40..42].fill(0);
            frame
        };
        let (frame, expected) = arrives(f, &without(&public), &without(&private), public.len());
        t.sends("no checksum", WORLD, &frame, &expected, (Forwarded, &[]));

        let (outside, ..) = opened(t, six, What::Udp);
        for (name, extensions) in [
            ("options", vec![(0, header(8, 0)), (60, header(24, 0))]),
            // More follow, from offset 0.
            ("a first fragment", vec![(44, header(8, 1))]),
        ] {
            let make = |from: IpAddr, port| {
                let mut craft = craft6(six, from);
                craft.extensions = extensions.clone();
                craft.udp(port, 53, b"question")
            };
            let (public, private) = (make(outside.ip(), outside.port()), make(six.vm1, 5000));
            let (frame, expected) = arrives(six, &public, &private, public.len());
            t.sends(name, WORLD, &frame, &expected, (Forwarded, &[]));
        }
    });
}

#[test]
fn only_who_takes_part_in_a_flow_or_a_router_of_the_worlds_sends_errors_about_it() {
    everywhere(|t| {
        for f in Family::both() {
            let (outside, public, _) = opened(t, f, What::Udp);
            let message = f.kind(Error::PortUnreachable);
            // From outside: with an inside source, with one of ours, with none that is one, to another than is quoted.
            let loopback: IpAddr = if f.v6() { "::1" } else { "127.0.0.1" }.parse().unwrap();
            for source in [f.vm2, f.vm1, f.own, f.frontend, loopback] {
                let frame = error(WORLD, source, f.frontend, message, &public[14..]);
                t.drops("an inside source from outside", WORLD, &frame, Martian);
            }
            let frame = error(WORLD, f.router, f.own, message, &public[14..]);
            t.drops("to another than is quoted", WORLD, &frame, IcmpError);

            // From a guest.
            let (server, inside) = (at(f.server, 53), at(f.vm1, 5000));
            let answer = packet(WORLD, What::Udp, server, outside);
            let got = sent(guest(1), What::Udp, server, inside);
            t.sends("the answer", WORLD, &answer, &got, (Forwarded, &[]));
            let from = |side: Side, source: IpAddr| error(side, source, f.server, message, &got[14..]);
            t.drops("a hop behind the guest", guest(1), &from(guest(1), f.router), Spoofed);
            t.drops("another guest's source", guest(1), &from(guest(1), f.vm2), Spoofed);
            t.drops("on another guest's device", guest(2), &from(guest(2), f.vm1), Spoofed);
            let forged = Side { mac: guest(2).mac, ..guest(1) };
            t.drops("with another hardware address", guest(1), &from(forged, f.vm1), Spoofed);
            let elsewhere = error(guest(1), f.vm1, f.router, message, &got[14..]);
            t.drops("to another than is quoted", guest(1), &elsewhere, IcmpError);
            let unseen = sent(guest(1), What::Udp, at(f.server, 99), inside);
            let frame = error(guest(1), f.vm1, f.server, message, &unseen[14..]);
            t.drops("about what never came", guest(1), &frame, IcmpError);
        }
    });
}

/// All of both flow tables.
fn flows(env: &HostEnv) -> (Vec<Bucket>, Vec<Bucket6>) {
    // SAFETY: one thread, and the elements live as long as the tables.
    let four = (0..1 << 12).map(|i| unsafe { *env.bucket(i).expect("a bucket") }).collect();
    // SAFETY: as above.
    let six = (0..1 << 12).map(|i| unsafe { *env.bucket6(i).expect("a bucket") }).collect();
    (four, six)
}

#[test]
fn an_error_whose_checksum_or_whose_quotes_is_wrong_arrives_no_less_wrong() {
    everywhere(|t| {
        for f in Family::both() {
            let (_, public, private) = opened(t, f, What::Udp);
            let (frame, expected) = arrives(f, &public, &private, public.len());
            let icmp = 14 + f.header();
            let wrong = |mut frame: Vec<u8>, message: usize| {
                // Never the other representation of the same sum.
                frame[message + 2] ^= 0x55;
                frame
            };
            let wrong_sum = wrong(frame.clone(), icmp);
            let arrived = t.out("a wrong sum", WORLD, &wrong_sum, (Forwarded, &[]));
            assert!(!Frame::parse(arrived.clone()).checksums_ok());
            assert_eq!(arrived[..icmp + 2], expected[..icmp + 2]);
            assert_eq!(arrived[icmp + 4..], expected[icmp + 4..]);
            if f.v6() {
                continue; // its header has no sum
            }
            // The quoted header's sum is wrong, that of the error right.
            let mut quote = public[14..].to_vec();
            quote[10] ^= 0x55;
            let message = f.kind(Error::TooBig);
            let lies = error(WORLD, f.router, f.frontend, message, &quote);
            let arrived = t.out("a wrong sum in the quote", WORLD, &lies, (Forwarded, &[]));
            let mut header = arrived[icmp + 8..icmp + 28].to_vec();
            let said = [header[10], header[11]];
            fix_header(&mut header, 0);
            assert_ne!([header[10], header[11]], said, "the quote's sum is still wrong");
            assert_eq!(header, private[14..34], "and nothing else of it");
            assert!(Frame::parse(arrived).checksums_ok(), "the error's is still right");
        }
    });
}

#[test]
fn an_error_about_a_query_refreshes_and_ends_nothing() {
    let mut backend = HostBackend::new(POLICY).unwrap();
    let mut made = Vec::new();
    {
        let mut t = Table(Ledger::new(&mut backend));
        for f in Family::both() {
            let query = packet(guest(1), What::Echo, at(f.vm1, 77), at(f.server, 0));
            let public = t.out("opens", guest(1), &query, (NewFlow, &[]));
            for kind in [Error::PortUnreachable, Error::TooBig, Error::TimeExceeded] {
                made.push(error(WORLD, f.router, f.frontend, f.kind(kind), &public[14..]));
            }
        }
    }
    let before = flows(&backend.env);
    let ifindex = backend.gateway().devices["up"].ifindex;
    for (tick, frame) in (1010..).zip(&made) {
        backend.env.set_now(tick);
        let (verdict, ..) = backend.env.packet(frame, ifindex, Hook::Tc, false);
        assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?} {:?}", Frame::parse(frame.clone()));
    }
    assert!(
        flows(&backend.env) == before,
        "no deadline and no count moved, of the flow and of its identifier"
    );
}

#[test]
fn an_error_refreshes_nothing_and_ends_nothing_whoever_sends_it() {
    let mut backend = HostBackend::new(POLICY).unwrap();
    let mut made = Vec::new();
    {
        let mut t = Table(Ledger::new(&mut backend));
        for f in Family::both() {
            for what in [What::Udp, What::Tcp] {
                let (outside, public, _) = opened(&mut t, f, what);
                let (server, inside) = (at(f.server, 53), at(f.vm1, 5000));
                let got = sent(guest(1), what, server, inside);
                for kind in [Error::PortUnreachable, Error::TooBig, Error::TimeExceeded] {
                    let message = f.kind(kind);
                    made.push((WORLD, error(WORLD, f.server, outside.ip(), message, &public[14..])));
                    made.push((guest(1), error(guest(1), f.vm1, f.server, message, &got[14..])));
                }
            }
        }
    }
    let before = flows(&backend.env);
    let rules = backend.env.rule_hits.lock().unwrap().len();
    for (tick, (side, frame)) in (1010..).zip(&made) {
        backend.env.set_now(tick);
        let ifindex = backend.gateway().devices[side.device].ifindex;
        let (verdict, ..) = backend.env.packet(frame, ifindex, Hook::Tc, false);
        assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?} {:?}", Frame::parse(frame.clone()));
    }
    assert!(flows(&backend.env) == before, "no deadline, no state, no count of any flow moved");
    assert_eq!(backend.env.rule_hits.lock().unwrap().len(), rules);
    // When a flow's time is over, an error does not keep it.
    backend.env.set_now(1_000_000);
    let ifindex = backend.gateway().devices["up"].ifindex;
    let (verdict, ..) = backend.env.packet(&made[0].1, ifindex, Hook::Tc, false);
    assert_eq!(verdict, Verdict::Drop);
    assert_eq!(backend.env.counted(IcmpError).packets, 1);
}
