//! All 64 combinations of TCP's flags, from either side, with and without a flow, of both families, on the host engine, under XDP
//! and under TC: what no TCP sends is dropped by name and moves no flow; the rest passes.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason::{Forwarded, NoFlow, NotOurs, TcpFlags};
use portcullis_tests::backend::Action;
use portcullis_tests::icmp_error::{Family, WORLD, everywhere_under, guest};
use portcullis_tests::tcp_table::{ACK, ANSWER, Connection, NEXT, Says, Way, bare, policy, segment};

const PSH: u8 = 8;
/// With PSH or without: SYN, SYN+URG, SYN+ACK, RST, RST+ACK, FIN+ACK, FIN+ACK+URG, ACK, ACK+URG.
const SENT: [u8; 9] = [0x02, 0x22, 0x12, 0x04, 0x14, 0x11, 0x31, 0x10, 0x30];

#[test]
fn of_all_64_combinations_of_flags_18_pass_and_46_are_dropped_whoever_sends_them() {
    let passing = (0..64).filter(|flags| SENT.contains(&(flags & !PSH)));
    assert_eq!(passing.count(), 18);
    everywhere_under(&policy(), |t| {
        for f in Family::both() {
            for flags in 0..64 {
                // vm3 has an address of its own, and so ports enough for a flow each.
                let c = Connection::established(t, f, Way::Own, 5000 + u16::from(flags));
                let before = c.halves(t).0;
                // Nobody's numbers: whatever passes ends nothing.
                let says = Says { data: b"data", ..bare(flags, NEXT + 0x1000_0000, ANSWER + 0x2000_0000) };
                let frames = [(c.opener, says), (c.other, says)]
                    .map(|(end, says)| (end, segment(end.side, end.own, end.peer, says)));
                for (n, (end, frame)) in frames.iter().enumerate() {
                    if SENT.contains(&(flags & !PSH)) {
                        c.passes(t, n == 0, says, Forwarded);
                    } else {
                        t.drops(&format!("{flags:#08b} in a flow"), end.side, frame, TcpFlags);
                        assert_eq!(c.halves(t).0, before, "{flags:#08b} has moved the flow");
                    }
                }
            }
        }
    });
}

#[test]
fn flags_that_no_tcp_sends_are_dropped_at_our_addresses_and_left_to_the_host_at_its_own() {
    everywhere_under(&policy(), |t| {
        for f in Family::both() {
            let client = SocketAddr::new(f.server, 4000);
            let host: IpAddr =
                if f.v6() { "2001:db8:ffff::1" } else { "203.0.113.1" }.parse().expect("a literal");
            for flags in (0..64).filter(|flags| !SENT.contains(&(flags & !PSH))) {
                let name = format!("{flags:#08b}");
                let frame = |to| segment(WORLD, client, to, bare(flags, 1, 1));
                // A listener, a port of SNAT's, one that nobody owns, an address of a guest's own.
                for (address, port) in [(f.frontend, 443), (f.frontend, 1030), (f.frontend, 7), (f.own, 443)]
                {
                    t.drops(&name, WORLD, &frame(SocketAddr::new(address, port)), TcpFlags);
                }
                t.ends(&name, WORLD, &frame(SocketAddr::new(host, 443)), Action::Pass, NotOurs);
                let (inside, server) = (SocketAddr::new(f.vm1, 4000), SocketAddr::new(f.server, 443));
                t.drops(&name, guest(1), &segment(guest(1), inside, server, bare(flags, 1, 1)), TcpFlags);
            }
            // What a TCP sends is judged as ever.
            let to = SocketAddr::new(f.frontend, 443);
            t.drops("an ACK without a flow", WORLD, &segment(WORLD, client, to, bare(ACK, 1, 1)), NoFlow);
        }
    });
}
