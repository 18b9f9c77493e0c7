//! TCP as far as a NAT must know it: has it been answered, has it ended (RFC 7857 §2, in small).
//!
//! Both halves of a flow keep the same five bits. Only SYN, FIN and RST change them, so only those touch the other half.

use crate::packet::headers::{ACK, FIN, RST, SYN};

pub const OPENED: u8 = 1;
pub const ANSWERED: u8 = 2;
pub const FIN_FORWARD: u8 = 4;
pub const FIN_REVERSE: u8 = 8;
pub const RESET: u8 = 16;

/// What a flow's timers depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// SYN seen, not answered: a short timer that retransmissions do not prolong (field.md §7, 10).
    HalfOpen,
    Established,
    /// Both sides sent FIN.
    Closed,
    Reset,
}

/// The state the bits describe.
#[inline(always)]
pub const fn state(bits: u8) -> State {
    if bits & RESET != 0 {
        State::Reset
    } else if bits & (FIN_FORWARD | FIN_REVERSE) == FIN_FORWARD | FIN_REVERSE {
        State::Closed
    } else if bits & ANSWERED != 0 {
        State::Established
    } else {
        State::HalfOpen
    }
}

/// The bits after a packet with these flags; `forward` says that it comes from the side that opened the flow.
#[inline(always)]
pub const fn after(bits: u8, flags: u8, forward: bool) -> u8 {
    if flags & RST != 0 {
        return bits | RESET;
    }
    if flags & (SYN | ACK) == SYN && forward {
        // A fresh SYN on an ended flow opens it again with the same port; on a live one it is a retransmission.
        return match state(bits) {
            State::Closed | State::Reset => OPENED,
            State::HalfOpen | State::Established => bits,
        };
    }
    let mut bits = bits;
    if flags & SYN != 0 && !forward {
        bits |= ANSWERED;
    }
    if flags & FIN != 0 {
        bits |= if forward { FIN_FORWARD } else { FIN_REVERSE };
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_opens_is_answered_and_ends_after_both_fins() {
        let b = after(OPENED, SYN, true);
        assert_eq!(state(b), State::HalfOpen);
        let b = after(b, SYN | ACK, false);
        assert_eq!(state(b), State::Established);
        let b = after(b, FIN | ACK, true);
        assert_eq!(state(b), State::Established, "half-closed connections carry data");
        let b = after(b, FIN | ACK, false);
        assert_eq!(state(b), State::Closed);
        assert_eq!(state(after(b, SYN, true)), State::HalfOpen, "a fresh SYN reopens");
    }

    #[test]
    fn an_ack_without_syn_does_not_answer_a_half_open_flow() {
        assert_eq!(state(after(OPENED, ACK, false)), State::HalfOpen);
    }

    #[test]
    fn simultaneous_open_is_an_answer() {
        assert_eq!(state(after(OPENED, SYN, false)), State::Established);
    }

    #[test]
    fn a_reset_ends_the_flow_from_either_side() {
        for forward in [true, false] {
            assert_eq!(state(after(OPENED | ANSWERED, RST, forward)), State::Reset);
        }
    }
}
