//! Every transition of a TCP connection, through every translation and of both families, on the host engine, under XDP and under
//! TC: each segment arrives as it should byte by byte, every counter is asserted, and the flow's state and timer after it
//! (RFC 7857 §2, RFC 5382 REQ-2 and REQ-5, RFC 5961 §3.2).

use portcullis_common::tcp_state::State::*;
use portcullis_tests::icmp_error::{Family, Table, everywhere_under};
use portcullis_tests::tcp_table::{
    ACK, ANSWER, Connection, ESTABLISHED, FIN, FIN_TIME, HALF_OPEN, NEXT, RESET_TIME, RST, SYN, Says,
    TRANSITORY, WAYS, Way, bare, policy,
};

/// Runs a scenario for every family and way, each on ports of its own.
fn each(scenario: impl Fn(&mut Table<'_>, Family, Way, &mut dyn FnMut() -> u16) + Sync) {
    everywhere_under(&policy(), |t| {
        let mut port = 5000;
        for f in Family::both() {
            for way in WAYS {
                scenario(t, f, way, &mut || {
                    port += 1;
                    port
                });
            }
        }
    });
}

/// The opener's segments are `true`.
fn from(connection: &Connection, t: &mut Table<'_>, forward: bool, says: Says<'_>) {
    if forward {
        connection.opener(t, says)
    } else {
        connection.other(t, says)
    };
}

/// What each side sends next, and what the other one does.
fn at(forward: bool) -> (u32, u32) {
    if forward { (NEXT, ANSWER) } else { (ANSWER, NEXT) }
}

#[test]
fn a_connection_is_established_by_three_segments_half_closed_by_one_fin_and_closed_when_both_are_acknowledged()
 {
    each(|t, f, way, port| {
        for first in [true, false] {
            let c = Connection::established(t, f, way, port());
            let data = Says { data: b"request", ..bare(ACK, NEXT, ANSWER) };
            c.opener(t, data).other(t, bare(ACK, ANSWER, NEXT + 7)).is(t, "data", Established, ESTABLISHED);
            let (mine, theirs) = if first { (NEXT + 7, ANSWER) } else { (ANSWER, NEXT + 7) };
            from(&c, t, first, bare(FIN | ACK, mine, theirs));
            c.is(t, "one FIN", Established, ESTABLISHED);
            // Half-closed, it carries data as long as it likes.
            from(&c, t, !first, Says { data: b"much", ..bare(ACK, theirs, mine + 1) });
            from(&c, t, first, bare(ACK, mine + 1, theirs + 4));
            c.is(t, "half-closed", Established, ESTABLISHED);
            from(&c, t, !first, bare(FIN | ACK, theirs + 4, mine + 1));
            c.is(t, "both FINs", Closing, FIN_TIME);
            from(&c, t, first, bare(ACK, mine + 1, theirs + 4));
            c.is(t, "not acknowledged", Closing, FIN_TIME);
            from(&c, t, first, bare(ACK, mine + 1, theirs + 5));
            c.is(t, "both acknowledged", Closed, FIN_TIME);
            // It passes what is late, and nothing of it is a new state.
            from(&c, t, !first, bare(FIN | ACK, theirs + 4, mine + 1));
            from(&c, t, first, bare(RST, mine + 1, 0));
            from(&c, t, !first, bare(RST | ACK, theirs + 5, mine + 1));
            c.is(t, "after the end", Closed, FIN_TIME);
        }
    });
}

#[test]
fn a_reset_ends_a_connection_only_where_the_other_side_is_and_any_other_until_somebody_speaks() {
    each(|t, f, way, port| {
        for forward in [true, false] {
            let (exact, _) = at(forward);
            for flags in [RST, RST | ACK] {
                let c = Connection::established(t, f, way, port());
                for wrong in [exact + 1, exact - 1, 0, !exact] {
                    from(&c, t, forward, bare(flags, wrong, 0));
                    c.is(t, "a RST from nobody", Transitory, TRANSITORY);
                    let before = c.halves(t).0.map(|half| half.ack);
                    from(&c, t, forward, bare(flags, wrong, 0));
                    c.is(t, "again", Transitory, TRANSITORY);
                    assert_eq!(c.halves(t).0.map(|half| half.ack), before, "its numbers are not believed");
                    let speaker = wrong & 1 == 0;
                    let (sequence, acknowledgement) = at(speaker);
                    from(&c, t, speaker, bare(ACK, sequence, acknowledgement));
                    c.is(t, "somebody speaks", Established, ESTABLISHED);
                }
                from(&c, t, forward, bare(flags, exact, 0));
                c.is(t, "a RST of the end's own", Reset, RESET_TIME);
                let (sequence, acknowledgement) = at(!forward);
                from(&c, t, !forward, bare(ACK, sequence, acknowledgement));
                c.is(t, "nobody speaks any more", Reset, RESET_TIME);
            }
            // Half-closed, and after a wrong one.
            let c = Connection::established(t, f, way, port());
            from(&c, t, !forward, bare(FIN | ACK, at(!forward).0, exact));
            from(&c, t, forward, bare(ACK, exact, at(!forward).0 + 1));
            from(&c, t, forward, bare(RST, exact + 9, 0));
            c.is(t, "half-closed", Transitory, TRANSITORY);
            from(&c, t, forward, bare(RST, exact, 0));
            c.is(t, "half-closed", Reset, RESET_TIME);
        }
    });
}

#[test]
fn a_syn_is_refused_by_a_reset_that_acknowledges_it_and_its_port_opens_again() {
    each(|t, f, way, port| {
        let c = Connection::open(t, f, way, port());
        for (flags, sequence, number) in [
            (RST, 0, NEXT),
            (RST | ACK, 0, NEXT + 1),
            (RST | ACK, 0, 0),
            (RST, NEXT, 0),
            (RST | ACK, NEXT, !NEXT),
        ] {
            c.other(t, bare(flags, sequence, number)).is(t, "no refusal", HalfOpen, HALF_OPEN);
        }
        c.other(t, bare(RST | ACK, 0, NEXT)).is(t, "refused", Reset, RESET_TIME);
        c.other(t, bare(SYN, 7, 0)).is(t, "who was refused waits for nobody", Reset, RESET_TIME);
        c.opener(t, bare(SYN, 70_000, 0)).is(t, "asked again", HalfOpen, HALF_OPEN);
        c.other(t, bare(SYN | ACK, 80_000, 70_001)).opener(t, bare(ACK, 70_001, 80_001));
        c.is(t, "and answered", Established, ESTABLISHED);
        // A scan: asked, answered, and let go.
        let c = Connection::open(t, f, way, port());
        c.other(t, bare(SYN | ACK, ANSWER - 1, NEXT)).opener(t, bare(RST, NEXT, 0));
        c.is(t, "let go", Reset, RESET_TIME);
    });
}

#[test]
fn nothing_forged_answers_a_half_open_connection_or_ends_it() {
    each(|t, f, way, port| {
        if way == Way::Between {
            // Neither can be anybody else.
            return;
        }
        // Who is outside.
        let stranger = way == Way::In;
        let c = Connection::open(t, f, way, port());
        if stranger {
            c.other(t, bare(SYN | ACK, ANSWER - 1, NEXT)).is(t, "the guest answers", HalfOpen, HALF_OPEN);
        }
        let expected = if stranger { ANSWER } else { NEXT };
        for number in [expected + 1, expected - 1461, !expected, 0, 1] {
            for flags in [ACK, SYN | ACK, FIN | ACK, RST | ACK, SYN] {
                from(&c, t, stranger, bare(flags, 4710, number));
                c.is(t, "forged", HalfOpen, HALF_OPEN);
            }
            // The guest, told of a connection it does not know, sends a RST with the number it was told.
            from(&c, t, !stranger, bare(RST, number, 0));
            c.is(t, "the guest's answer to it", HalfOpen, HALF_OPEN);
            from(&c, t, stranger, bare(RST, 4711, 0));
            c.is(t, "where the forged one ended", HalfOpen, HALF_OPEN);
        }
        if !stranger {
            c.other(t, bare(SYN | ACK, ANSWER - 1, NEXT)).is(t, "the real answer", HalfOpen, HALF_OPEN);
        }
        c.opener(t, bare(ACK, NEXT, ANSWER)).is(t, "the real ones", Established, ESTABLISHED);
        c.opener(t, bare(ACK, NEXT, ANSWER)).other(t, bare(RST, ANSWER, 0)).is(
            t,
            "and its end",
            Reset,
            RESET_TIME,
        );
    });
}

#[test]
fn a_forged_fin_closes_nothing() {
    each(|t, f, way, port| {
        if way == Way::Between {
            return;
        }
        let stranger = way == Way::In;
        let (mine, theirs) = at(!stranger);
        let c = Connection::established(t, f, way, port());
        from(&c, t, stranger, bare(FIN | ACK, 4710, mine));
        from(&c, t, stranger, bare(RST, 4711, 0));
        c.is(t, "a RST behind a forged FIN", Transitory, TRANSITORY);
        from(&c, t, !stranger, bare(FIN | ACK, mine, theirs));
        c.is(t, "the guest's FIN", Closing, FIN_TIME);
        for n in 0..3 {
            from(&c, t, stranger, Says { data: b"x", ..bare(ACK, theirs + n, mine + 1) });
            from(&c, t, !stranger, bare(ACK, mine + 1, theirs + n + 1));
            c.is(t, "the other side goes on", Closing, FIN_TIME);
        }
        from(&c, t, stranger, bare(FIN | ACK, theirs + 3, mine + 1));
        from(&c, t, !stranger, bare(ACK, mine + 1, theirs + 4));
        c.is(t, "until its own", Closed, FIN_TIME);
    });
}

#[test]
fn a_simultaneous_open_is_established_when_each_has_acknowledged_the_others_syn() {
    each(|t, f, way, port| {
        for last in [SYN | ACK, ACK] {
            let c = Connection::open(t, f, way, port());
            c.other(t, bare(SYN, ANSWER - 1, 0)).is(t, "both SYNs", HalfOpen, HALF_OPEN);
            c.opener(t, bare(SYN | ACK, NEXT - 1, ANSWER)).is(t, "one acknowledged", HalfOpen, HALF_OPEN);
            let sequence = if last & SYN != 0 { ANSWER - 1 } else { ANSWER };
            c.other(t, bare(last, sequence, NEXT)).is(t, "both", Established, ESTABLISHED);
        }
        let c = Connection::open(t, f, way, port());
        c.other(t, bare(SYN, ANSWER - 1, 0)).other(t, bare(SYN | ACK, ANSWER - 1, NEXT));
        c.is(t, "the other's first", HalfOpen, HALF_OPEN);
        c.opener(t, bare(SYN | ACK, NEXT - 1, ANSWER)).is(t, "both", Established, ESTABLISHED);
    });
}

#[test]
fn a_closed_connection_opens_again_from_either_side_and_a_live_one_does_not() {
    each(|t, f, way, port| {
        for again in [true, false] {
            let c = Connection::established(t, f, way, port());
            for forward in [true, false] {
                from(&c, t, forward, bare(SYN, 9, 0));
                c.is(t, "a SYN into what lives", Established, ESTABLISHED);
            }
            c.opener(t, bare(FIN | ACK, NEXT, ANSWER)).other(t, bare(FIN | ACK, ANSWER, NEXT + 1));
            from(&c, t, again, bare(SYN, 9, 0));
            c.is(t, "a SYN into what closes", Closing, FIN_TIME);
            c.opener(t, bare(ACK, NEXT + 1, ANSWER + 1)).is(t, "closed", Closed, FIN_TIME);
            from(&c, t, again, bare(SYN, 70_000, 0));
            c.is(t, "opened again", HalfOpen, HALF_OPEN);
            from(&c, t, !again, bare(SYN | ACK, 80_000, 70_001));
            c.is(t, "answered again", HalfOpen, HALF_OPEN);
            from(&c, t, again, bare(ACK, 70_001, 80_001));
            c.is(t, "established again", Established, ESTABLISHED);
        }
    });
}

#[test]
fn a_syn_with_data_is_answered_with_or_without_it() {
    each(|t, f, way, port| {
        for taken in [0, 4] {
            let c = Connection::open(t, f, way, port());
            // Fast open: the same SYN with data (RFC 7413).
            c.opener(t, Says { data: b"data", ..bare(SYN, NEXT - 1, 0) });
            c.other(t, bare(SYN | ACK, ANSWER - 1, NEXT + taken)).opener(t, bare(ACK, NEXT + 4, ANSWER));
            c.is(t, "answered", Established, ESTABLISHED);
        }
    });
}

#[test]
fn ten_thousand_forged_resets_change_nothing_for_who_speaks() {
    everywhere_under(&policy(), flood);
}

/// Sequence numbers near and far, from both sides, and the connection goes on.
fn flood(t: &mut Table<'_>) {
    for (f, way, outside) in
        Family::both().into_iter().flat_map(|f| [(f, Way::Out, false), (f, Way::In, true)])
    {
        let c = Connection::established(t, f, way, 5000);
        let (exact, guest) = at(outside);
        for n in 1..=2500u32 {
            let wrong = match n % 4 {
                0 => exact.wrapping_add(n),
                1 => exact.wrapping_sub(n),
                2 => n.wrapping_mul(0x9e37_79b9),
                _ => 0u32.wrapping_sub(n),
            };
            assert_ne!(wrong, exact);
            from(&c, t, outside, bare(if n & 8 == 0 { RST } else { RST | ACK }, wrong, guest));
            if n % 500 == 0 {
                c.is(t, "under the flood", Transitory, TRANSITORY);
                let speaker = n % 1000 == 0;
                let (sequence, acknowledgement) = at(speaker);
                from(&c, t, speaker, bare(ACK, sequence, acknowledgement));
                c.is(t, "it goes on", Established, ESTABLISHED);
            }
        }
        from(&c, t, outside, bare(RST, exact, 0));
        c.is(t, "the one right of 2^32", Reset, RESET_TIME);
    }
}
