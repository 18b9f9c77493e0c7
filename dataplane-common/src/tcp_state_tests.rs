use super::*;

/// A flow whose opener has sent a SYN that ends with [`NEXT`]. The other side's will end with [`ANSWER`].
struct Flow {
    bits: u8,
    /// Of the opener's direction, of the other.
    acks: [u32; 2],
    /// Is the opener a guest, or else the other side?
    outbound: bool,
}

const OPENER: bool = true;
const OTHER: bool = false;
const NEXT: u32 = 100_001;
const ANSWER: u32 = 500_001;

impl Flow {
    fn opened(outbound: bool) -> Self {
        Flow { bits: OPENED, acks: [0, NEXT], outbound }
    }

    fn established(outbound: bool) -> Self {
        let mut flow = Flow::opened(outbound);
        assert_eq!(flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT), (State::HalfOpen, Timer::Keep));
        assert_eq!(flow.says(OPENER, ACK, NEXT, 0, ANSWER), (State::Established, Timer::Set));
        assert_eq!((flow.bits, flow.acks), (OPENED | ANSWERED, [ANSWER, NEXT]));
        flow
    }

    /// A segment with so many bytes of data.
    fn says(
        &mut self,
        forward: bool,
        flags: u8,
        sequence: u32,
        data: u32,
        acknowledgement: u32,
    ) -> (State, Timer) {
        let counted = u32::from(flags & (SYN | FIN) != 0);
        let segment = Segment {
            flags,
            forward,
            guest: forward == self.outbound,
            sequence,
            end: sequence.wrapping_add(data).wrapping_add(counted),
            acknowledgement,
        };
        let [own, other] = if forward { [0, 1] } else { [1, 0] };
        let known = Tracked { bits: self.bits, own: self.acks[own], other: self.acks[other] };
        let (after, timer) = super::after(known, &segment);
        if plain(self.bits, flags) {
            let expected = Tracked { own: acknowledgement, ..known };
            assert_eq!(
                (after, timer),
                (expected, Timer::Prolong),
                "what is plain needs no look at its state"
            );
        }
        self.bits = after.bits;
        self.acks[own] = after.own;
        self.acks[other] = after.other;
        (state(self.bits), timer)
    }
}

#[test]
fn a_connection_opens_is_answered_and_ends_after_both_fins() {
    for outbound in [true, false] {
        for first in [OPENER, OTHER] {
            let mut flow = Flow::established(outbound);
            flow.says(OPENER, ACK, NEXT, 1000, ANSWER);
            flow.says(OTHER, ACK, ANSWER, 500, NEXT + 1000);
            flow.says(OPENER, ACK, NEXT + 1000, 0, ANSWER + 500);
            // What each side sends next.
            let at = |side| if side == OPENER { NEXT + 1000 } else { ANSWER + 500 };
            let last = !first;
            assert_eq!(
                flow.says(first, FIN | ACK, at(first), 0, at(last)),
                (State::Established, Timer::Prolong)
            );
            // Closed on one side only, it carries data for as long as it likes.
            assert_eq!(
                flow.says(last, ACK, at(last), 100, at(first) + 1),
                (State::Established, Timer::Prolong)
            );
            assert_eq!(flow.says(first, ACK, at(first) + 1, 0, at(last) + 100).1, Timer::Prolong);
            assert_eq!(
                flow.says(last, FIN | ACK, at(last) + 100, 0, at(first) + 1),
                (State::Closing, Timer::Set),
                "until the last FIN is acknowledged"
            );
            assert_eq!(flow.says(first, ACK, at(first) + 1, 0, at(last) + 101), (State::Closed, Timer::Set));
            assert_eq!(
                flow.says(last, FIN | ACK, at(last) + 100, 0, at(first) + 1),
                (State::Closed, Timer::Keep)
            );
            assert_eq!(flow.says(first, RST, at(first) + 1, 0, 0), (State::Closed, Timer::Keep));
            for side in [OPENER, OTHER] {
                let mut again = Flow { ..flow };
                assert_eq!(
                    again.says(side, SYN, 9000, 0, 0),
                    (State::HalfOpen, Timer::Set),
                    "a fresh SYN reopens"
                );
                assert_eq!(again.says(!side, SYN | ACK, 700, 0, 9001), (State::HalfOpen, Timer::Keep));
                assert_eq!(again.says(side, ACK, 9001, 0, 701), (State::Established, Timer::Set));
            }
        }
    }
}

#[test]
fn both_sides_may_close_at_once_and_the_answer_may_close_already() {
    let mut flow = Flow::established(true);
    flow.says(OPENER, FIN | ACK, NEXT, 0, ANSWER);
    assert_eq!(flow.says(OTHER, FIN | ACK, ANSWER, 0, NEXT), (State::Closing, Timer::Set));
    assert_eq!(flow.says(OPENER, ACK, NEXT + 1, 0, ANSWER + 1), (State::Closing, Timer::Prolong));
    assert_eq!(flow.says(OTHER, ACK, ANSWER + 1, 0, NEXT + 1), (State::Closed, Timer::Set));
    // The third segment is lost; what comes next acknowledges and closes.
    let mut flow = Flow::opened(true);
    flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT);
    assert_eq!(flow.says(OPENER, FIN | ACK, NEXT, 10, ANSWER), (State::Established, Timer::Set));
    assert_eq!(flow.says(OTHER, FIN | ACK, ANSWER, 0, NEXT + 11), (State::Closing, Timer::Set));
    assert_eq!(flow.says(OPENER, ACK, NEXT + 11, 0, ANSWER + 1), (State::Closed, Timer::Set));
}

#[test]
fn an_ack_without_syn_does_not_answer_a_half_open_flow() {
    let mut flow = Flow::opened(true);
    let before = (flow.bits, flow.acks);
    for number in [0, 1, NEXT - 1 - SYN_DATA, NEXT + 1, u32::MAX] {
        for flags in [ACK, SYN | ACK, FIN | ACK, ACK | URG_OF_NOBODY] {
            assert_eq!(flow.says(OTHER, flags, 4711, 0, number), (State::HalfOpen, Timer::Keep), "{number}");
        }
        assert_eq!((flow.bits, flow.acks), before, "{number}");
    }
    // What acknowledges the SYN is an answer, but of whom? The opener has to acknowledge that one's SYN.
    assert_eq!(flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT), (State::HalfOpen, Timer::Keep));
    assert_eq!(flow.says(OPENER, ACK, NEXT, 0, ANSWER).0, State::Established);
}

/// A flag that says nothing of a state.
const URG_OF_NOBODY: u8 = crate::packet::headers::URG;

#[test]
fn a_strangers_syn_to_a_guest_is_established_when_he_has_shown_that_he_hears_the_answer() {
    let mut flow = Flow::opened(false);
    assert_eq!(flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT), (State::HalfOpen, Timer::Keep));
    for number in [0, ANSWER - 1 - SYN_DATA, ANSWER + 1, NEXT] {
        assert_eq!(flow.says(OPENER, ACK, NEXT, 1, number), (State::HalfOpen, Timer::Keep), "{number}");
    }
    assert_eq!(flow.says(OPENER, ACK, NEXT, 0, ANSWER), (State::Established, Timer::Set));
}

#[test]
fn a_syn_may_carry_data_which_the_answer_acknowledges_or_not() {
    for acknowledged in [NEXT, NEXT + 1400] {
        let mut flow = Flow { acks: [0, NEXT + 1400], ..Flow::opened(true) };
        flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, acknowledged);
        assert_eq!(flow.says(OPENER, ACK, NEXT + 1400, 0, ANSWER).0, State::Established);
    }
}

#[test]
fn a_syn_sent_again_prolongs_nothing_and_one_with_another_number_is_what_has_to_be_answered() {
    let mut flow = Flow::opened(true);
    assert_eq!(flow.says(OPENER, SYN, NEXT - 1, 0, 0), (State::HalfOpen, Timer::Keep));
    assert_eq!(flow.says(OPENER, SYN, 70_000, 0, 0), (State::HalfOpen, Timer::Keep));
    flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT);
    assert_eq!(flow.says(OPENER, ACK, NEXT, 0, ANSWER).0, State::HalfOpen, "not the SYN that was answered");
    flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, 70_001);
    assert_eq!(state(flow.bits), State::Established);
}

#[test]
fn simultaneous_open_is_established_when_both_syns_are_acknowledged() {
    for outbound in [true, false] {
        let mut flow = Flow::opened(outbound);
        assert_eq!(
            flow.says(OTHER, SYN, ANSWER - 1, 0, 0),
            (State::HalfOpen, Timer::Keep),
            "a SYN is no answer"
        );
        assert_eq!(flow.says(OPENER, SYN | ACK, NEXT - 1, 0, ANSWER), (State::HalfOpen, Timer::Keep));
        assert_eq!(flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT), (State::Established, Timer::Set));
        assert_eq!(flow.acks, [ANSWER, NEXT]);
        // The other's first.
        let mut flow = Flow::opened(outbound);
        flow.says(OTHER, SYN, ANSWER - 1, 0, 0);
        flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT);
        assert_eq!(flow.says(OPENER, SYN | ACK, NEXT - 1, 0, ANSWER), (State::Established, Timer::Set));
    }
}

#[test]
fn a_stranger_cannot_choose_a_number_and_then_use_it() {
    // A SYN of his, and a RST that stands where it ends.
    let mut flow = Flow::opened(true);
    flow.says(OTHER, SYN, 4710, 0, 0);
    assert_eq!(flow.says(OTHER, RST, 4711, 0, 0), (State::HalfOpen, Timer::Keep));
    // An answer to no SYN, about which the guest sends a RST with his number (RFC 9293 §3.10.7.3).
    flow.says(OTHER, SYN | ACK, 4710, 0, 4711);
    assert_eq!(flow.says(OPENER, RST, 4711, 0, 0), (State::HalfOpen, Timer::Keep));
    // A FIN of his.
    let mut flow = Flow::established(true);
    flow.says(OTHER, FIN | ACK, 4710, 0, NEXT);
    assert_eq!(flow.says(OTHER, RST, 4711, 0, 0).0, State::Transitory);
    flow.says(OPENER, ACK, NEXT, 10, ANSWER);
    // And the guest's own: neither ends the connection while the server goes on.
    assert_eq!(flow.says(OPENER, FIN | ACK, NEXT + 10, 0, ANSWER), (State::Closing, Timer::Set));
    for n in 0..10 {
        assert_eq!(flow.says(OTHER, ACK, ANSWER + n, 1, NEXT + 11), (State::Closing, Timer::Prolong));
        assert_eq!(flow.says(OPENER, ACK, NEXT + 11, 0, ANSWER + n + 1), (State::Closing, Timer::Prolong));
    }
    // The server's real one.
    flow.says(OTHER, FIN | ACK, ANSWER + 10, 0, NEXT + 11);
    assert_eq!(flow.says(OPENER, ACK, NEXT + 11, 0, ANSWER + 11), (State::Closed, Timer::Set));
}

#[test]
fn a_reset_ends_the_flow_if_it_stands_where_the_other_side_is_and_else_nobody_may_speak_any_more() {
    for outbound in [true, false] {
        for side in [OPENER, OTHER] {
            let exact = if side == OPENER { NEXT } else { ANSWER };
            let established = Flow::established(outbound);
            for flags in [RST, RST | ACK] {
                let mut flow = Flow { ..established };
                assert_eq!(flow.says(side, flags, exact, 0, 0), (State::Reset, Timer::Set));
                assert_eq!(flow.says(side, ACK, exact, 0, 0), (State::Reset, Timer::Keep));
                for wrong in [0, exact - 1, exact + 1, !exact, exact ^ 1 << 31] {
                    let mut flow = Flow { ..established };
                    assert_eq!(flow.says(side, flags, wrong, 0, 0), (State::Transitory, Timer::Shorten));
                    assert_eq!(flow.acks, established.acks);
                    assert_eq!(flow.says(side, flags, wrong, 0, 0), (State::Transitory, Timer::Keep));
                    for speaks in [OPENER, OTHER] {
                        for says in [ACK, SYN, SYN | ACK, 0] {
                            let mut flow = Flow { ..flow };
                            assert_eq!(flow.says(speaks, says, 1, 0, 2).1, Timer::Prolong, "{says}");
                            let is = state(flow.bits);
                            assert_eq!(is, if says == 0 { State::Transitory } else { State::Established });
                        }
                    }
                    assert_eq!(
                        flow.says(side, flags, exact, 0, 0),
                        (State::Reset, Timer::Set),
                        "the real one"
                    );
                }
            }
        }
    }
}

#[test]
fn a_syn_is_refused_by_a_reset_that_acknowledges_it_and_by_no_other() {
    for outbound in [true, false] {
        for wrong in [0, NEXT - 1 - SYN_DATA, NEXT + 1] {
            let mut flow = Flow::opened(outbound);
            assert_eq!(flow.says(OTHER, RST | ACK, 0, 0, wrong), (State::HalfOpen, Timer::Keep));
            assert_eq!(
                flow.says(OTHER, RST, 0, 0, NEXT),
                (State::HalfOpen, Timer::Keep),
                "it acknowledges nothing"
            );
            assert_eq!(flow.says(OTHER, RST | ACK, 0, 0, NEXT), (State::Reset, Timer::Set));
            assert_eq!(
                flow.says(OTHER, SYN, 9, 0, 0),
                (State::Reset, Timer::Keep),
                "who was refused waits for nobody"
            );
            assert_eq!(flow.says(OPENER, SYN, 9, 0, 0), (State::HalfOpen, Timer::Set));
        }
        // Who has asked and changes his mind.
        let mut flow = Flow::opened(outbound);
        flow.says(OTHER, SYN | ACK, ANSWER - 1, 0, NEXT);
        assert_eq!(flow.says(OPENER, RST, NEXT + 1, 0, 0), (State::HalfOpen, Timer::Keep));
        assert_eq!(flow.says(OPENER, RST, NEXT, 0, 0), (State::Reset, Timer::Set));
    }
}

#[test]
fn numbers_wrap() {
    let mut flow = Flow { acks: [0, named(0)], ..Flow::opened(true) };
    flow.says(OTHER, SYN | ACK, u32::MAX, 0, 0);
    assert_eq!(flow.says(OPENER, ACK, 0, 0, 0).0, State::Established);
    flow.says(OPENER, ACK, 0, 100, 0);
    flow.says(OTHER, ACK, 0, 0, 100);
    assert_eq!(flow.says(OPENER, RST, 100, 0, 0).0, State::Reset);
}

/// Every state that bits can be in and every segment: nothing panics, a flow that is over stays over but for a SYN, and only
/// what is acknowledged or exact ends one.
#[test]
fn no_bits_and_no_segment_lead_astray() {
    for bits in 0..=255 {
        for flags in 0..64 {
            for (forward, guest) in [(true, true), (true, false), (false, true), (false, false)] {
                for sequence in [0, 7, 8] {
                    for acknowledgement in [0, 8, 9] {
                        for own in [0, 8] {
                            let segment = Segment {
                                flags,
                                forward,
                                guest,
                                sequence,
                                end: sequence + 1,
                                acknowledgement,
                            };
                            let known = Tracked { bits, own, other: 8 };
                            let (after, _) = super::after(known, &segment);
                            let (was, is) = (state(bits), state(after.bits));
                            if matches!(was, State::Closed | State::Reset) && flags & (SYN | ACK | RST) != SYN
                            {
                                assert_eq!(after, known);
                            }
                            if is == State::Reset && was != is {
                                let refuses = own != 0 && flags & ACK != 0 && acknowledgement <= 8;
                                assert!(
                                    flags & RST != 0 && (sequence == 8 || refuses),
                                    "{bits:x} {segment:?}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
