//! The way out, on the host engine, under XDP and under TC: a hole in the routes, a router that is not resolved or is gone, and what
//! extension headers do to a packet that is translated.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::*;
use portcullis_common::{HOP_FLAG_RESOLVED, NextHop};
use portcullis_tests::backend::{Action, At, ROUTER_MAC};
use portcullis_tests::icmp_error::{Family, Table, WORLD, What, everywhere, guest, packet};
use portcullis_tests::lab::{Craft6, Frame};

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

#[test]
fn a_packet_whose_way_out_is_missing_unresolved_or_gone_ends_or_waits_each_by_its_name() {
    everywhere(|t| {
        for f in Family::both() {
            let to = |port| packet(guest(1), What::Udp, at(f.vm1, port), at(f.server, 53));
            let set = |t: &mut Table<'_>, change: &dyn Fn(&mut NextHop)| {
                t.0.backend.set_world(change).unwrap();
            };
            let lives = to(5000);
            t.out("opens", guest(1), &lives, (NewFlow, &[]));

            // XDP resolves nothing: untouched, to TC, which has the kernel do it.
            set(t, &|hop| hop.flags &= !HOP_FLAG_RESOLVED);
            for (name, frame, reason) in [("of a flow", &lives, Forwarded), ("a new one", &to(5001), NewFlow)]
            {
                let who = format!("{name}, unresolved, on {}", t.0.backend.name());
                let outcome = t.0.run(&who, At::Ingress("vm1"), frame, reason, &[]);
                let action = if t.xdp() { Action::Pass } else { Action::Send };
                assert_eq!(outcome.action, action, "{who}");
                assert!(!t.xdp() || outcome.frame == *frame, "{who}: touched");
            }

            set(t, &|hop| *hop = NextHop::default());
            t.drops("of a flow whose router is gone", guest(1), &lives, Unresolved);

            set(t, &|_| {});
            let out = Frame::parse(t.out("it is back", guest(1), &lives, (Forwarded, &[])));
            assert_eq!(out.destination_mac, ROUTER_MAC);

            t.0.backend.cut_off(f.router).unwrap();
            let elsewhere = packet(guest(1), What::Udp, at(f.vm1, 5002), at(f.router, 53));
            t.drops("into a hole", guest(1), &elsewhere, NoRoute);
            t.out("beside it", guest(1), &to(5002), (NewFlow, &[]));
        }
    });
}

#[test]
fn a_packet_behind_extension_headers_is_translated_there_and_keeps_them() {
    everywhere(|t| {
        let [_, f] = Family::both();
        let (IpAddr::V6(inside), IpAddr::V6(server)) = (f.vm1, f.server) else { panic!("IPv6") };
        let option = |bytes: usize| {
            // PadN over all of it.
            let mut header = vec![0; bytes];
            (header[1], header[2], header[3]) = ((bytes / 8 - 1) as u8, 1, (bytes - 4) as u8);
            header
        };
        for (port, chain) in [
            (5001, vec![(0, option(8))]),
            (5002, vec![(60, option(16))]),
            (5003, vec![(0, option(8)), (60, option(24))]),
        ] {
            let mut craft = Craft6::new(guest(1).mac, inside, guest(1).gateway, server);
            craft.extensions.clone_from(&chain);
            let frame = craft.udp(port, 53, b"question");
            let sent = t.out("a chain", guest(1), &frame, (NewFlow, &[]));
            let headers: usize = chain.iter().map(|(_, bytes)| bytes.len()).sum();
            assert_eq!(sent.len(), frame.len());
            assert_eq!(sent[54..54 + headers], frame[54..54 + headers], "the chain is as it was");
            let out = Frame::parse(sent);
            assert_eq!(out.source().unwrap().ip(), f.frontend, "translated");
            assert_ne!(out.source().unwrap().port(), 0);
            assert_eq!(out.destination().unwrap(), at(f.server, 53));
            assert!(out.checksums_ok() && out.payload() == b"question", "{out:?}");
            // And its answer comes back to where it came from, without them.
            let answer = packet(WORLD, What::Udp, at(f.server, 53), out.source().unwrap());
            let back = Frame::parse(t.out("its answer", WORLD, &answer, (Forwarded, &[])));
            assert_eq!(back.destination().unwrap(), at(f.vm1, port));
        }
    });
}
