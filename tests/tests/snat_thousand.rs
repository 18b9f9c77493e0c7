//! A full pool: 1,000 guests behind one address, each with 32 ports and wanting more, on real sockets.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, WithHook};
use portcullis_tests::lab::{Crowd, CrowdEcho, eventually_some};
use portcullis_tests::lan::{FRONTEND, Lan, PortUse, SERVER};

const GUESTS: u16 = 1000;
/// What the tier of 801 to 1,000 members gives each (azure.md §2.2).
const PORTS: usize = 32;
/// What each opens.
const WANTED: usize = 40;
/// Those that close and open again.
const AGAIN: u32 = 10;
const LIMIT: Duration = Duration::from_secs(30);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

/// `WANTED` connections of each guest, the first of all, the second of all, ...: none is early, none is late.
fn wishes(guests: impl Iterator<Item = u32> + Clone) -> Vec<(u32, SocketAddr)> {
    let round = guests.map(|guest| (guest, (Lan::address(guest as u16), 0).into()));
    (0..WANTED).flat_map(|_| round.clone()).collect()
}

/// Each guest has 32 connections, each of those carries its own word both ways, and each is on a port that is the
/// guest's own.
fn assert_each_has_its_32(edge: &Edge, crowd: &Crowd, server: &CrowdEcho, what: &str) {
    let full = BTreeMap::from_iter((0..u32::from(GUESTS)).map(|guest| (guest, PORTS)));
    let odd = |have: &BTreeMap<u32, usize>| -> Vec<(u32, usize)> {
        let have = |guest| have.get(&guest).copied().unwrap_or(0);
        full.keys().map(|guest| (*guest, have(*guest))).filter(|(_, n)| *n != PORTS).collect()
    };
    let established = crowd.established();
    assert!(established == full, "{what}: not 32 connections: {:?}", odd(&established));
    let heard = crowd.echo(LIMIT).unwrap();
    assert!(heard == full, "{what}: did not hear their words: {:?}", odd(&heard));
    let server = server.heard();
    assert_eq!(server.mixed, [], "{what}: two guests behind one port");
    assert_eq!(server.open.len(), usize::from(GUESTS) * PORTS, "{what}: each on a port of its own");
    let owners: BTreeMap<u16, PortUse> =
        Lan::tcp_ports(edge).into_iter().map(|own| (own.guest, own)).collect();
    for (peer, word) in server.open {
        let guest = Crowd::who(word) as u16;
        assert_eq!(peer.ip(), IpAddr::from(FRONTEND), "{what}");
        assert!(
            owners[&guest].owns(peer.port()),
            "{what}: guest {guest} on {peer}, owns {:?}",
            owners[&guest]
        );
    }
    for own in owners.values() {
        assert_eq!((own.used, own.free), (PORTS as u64, 0), "{what}: `snat` of {}", own.guest);
    }
}

#[test]
fn thousand_guests_who_open_40_flows_to_one_destination_have_exactly_32_each_and_none_takes_anothers() {
    for hook in BOTH {
        let began = Instant::now();
        let mut lan = Lan::new(hook, GUESTS);
        lan.extra = "timeouts: { tcpFinSeconds: 2, tcpResetSeconds: 1, tcpHalfOpenSeconds: 5 }\n".into();
        let edge = lan.start();
        let destination = SocketAddr::from((SERVER, 80));
        let server = CrowdEcho::start(edge.topology.internet(), destination).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let inside = Lan::inside(&edge);
        println!("{hook:?}: ready after {:?}", began.elapsed());

        let crowd = Crowd::new(inside).unwrap();
        let opening = Instant::now();
        crowd.connect(&wishes(0..u32::from(GUESTS)), destination).unwrap();
        let all = usize::from(GUESTS) * PORTS;
        crowd.settle(LIMIT, all).unwrap();
        let took = opening.elapsed();
        // The others' SYNs go on: after one second, after three.
        let there = crowd.settle(Duration::from_secs(4), all + 1).unwrap();
        println!("{hook:?}: {there} connections within {took:?}");
        assert_each_has_its_32(&edge, &crowd, &server, "at first");
        let refused = edge.reason("snat_exhausted").unwrap() + edge.reason("snat_refused_again").unwrap();
        assert!(refused >= u64::from(GUESTS) * (WANTED - PORTS) as u64, "{hook:?}: {refused} refused");

        // Some close: after the hold-down they have as many again, and the others never notice.
        crowd.give_up();
        crowd.close_below(AGAIN);
        let closed = Instant::now();
        let free = eventually_some(LIMIT, || {
            let used = Lan::tcp_ports(&edge).into_iter().filter(|own| u32::from(own.guest) < AGAIN);
            used.clone().all(|own| own.used == 0).then(|| closed.elapsed())
        });
        println!("{hook:?}: ports free after {free:?}");
        let free = free.expect("closed connections give their ports back");
        assert!(free > Duration::from_secs(1), "{hook:?}: held for the two seconds of FIN, not {free:?}");
        crowd.connect(&wishes(0..AGAIN), destination).unwrap();
        crowd.settle(LIMIT, all).unwrap();
        crowd.settle(Duration::from_secs(4), all + 1).unwrap();
        assert_each_has_its_32(&edge, &crowd, &server, "again");

        // All close: nothing is left of 32,000 claims.
        crowd.close_below(u32::MAX);
        let left = || Lan::tcp_ports(&edge).iter().map(|own| own.used).sum::<u64>();
        let none = eventually_some(LIMIT, || (left() == 0).then_some(()));
        assert!(none.is_some(), "{hook:?}: {} ports leaked", left());
        assert_eq!(server.heard().open.len(), 0, "{hook:?}: the server's connections ended");
        check.end(&edge).unwrap();
        println!("{hook:?}: {:?} in all", began.elapsed());
    }
}
