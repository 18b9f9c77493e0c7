//! TCP as far as a NAT must know it (RFC 7857 §2, which takes the states of RFC 6146 §3.5.2): has a connection been answered,
//! has it ended, and who says so. Both halves of a flow keep the same bits.
//!
//! Whoever knows addresses and ports of a connection can send segments of it from anywhere. What he cannot know are its
//! sequence numbers. So nothing is believed that does not name one: an answer and a FIN must be acknowledged by the other
//! side with exactly the number they end with, and a RST must stand exactly where the other side is (RFC 5961 §3.2). All that
//! takes is one number for each direction, `HalfRecord::ack`: what it acknowledged last, or is to acknowledge next.

use crate::packet::headers::{ACK, FIN, RST, SYN};

pub const OPENED: u8 = 1;
/// Both SYNs are acknowledged.
pub const ANSWERED: u8 = 2;
pub const FIN_FORWARD: u8 = 4;
pub const FIN_REVERSE: u8 = 8;
pub const RESET: u8 = 16;
/// A RST has passed that nothing shows to be the other end's; nobody has spoken since.
pub const TRANSITORY: u8 = 32;
/// The SYN of the side that opened the flow is acknowledged; with [`ANSWERED`] its FIN.
pub const ACKED_FORWARD: u8 = 64;
/// The same of the other side.
pub const ACKED_REVERSE: u8 = 128;

const FINS: u8 = FIN_FORWARD | FIN_REVERSE;
const ACKED: u8 = ACKED_FORWARD | ACKED_REVERSE;

/// How far below the number expected an answer's acknowledgement may be: a SYN may carry data, which its answer acknowledges
/// too, or not (RFC 7413 §4.2.2). A segment has at most that much.
const SYN_DATA: u32 = 1460;

/// What a flow's timers depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// One of the SYNs is not acknowledged: a short timer that nothing prolongs (field.md §7, 10).
    HalfOpen,
    /// Or closed by one side only: that may last.
    Established,
    /// After a RST that is not shown to be the other end's: gone if nobody speaks any more.
    Transitory,
    /// Both sides have sent FIN, and not both are acknowledged.
    Closing,
    /// Both FINs are acknowledged.
    Closed,
    /// Ended by a RST of the end itself.
    Reset,
}

/// The state the bits describe.
#[inline(always)]
pub const fn state(bits: u8) -> State {
    if bits & RESET != 0 {
        State::Reset
    } else if bits & ANSWERED == 0 {
        State::HalfOpen
    } else if bits & (FINS | ACKED) == FINS | ACKED {
        State::Closed
    } else if bits & TRANSITORY != 0 {
        State::Transitory
    } else if bits & FINS == FINS {
        State::Closing
    } else {
        State::Established
    }
}

/// Is this a segment that changes nothing in its flow: no SYN, FIN or RST, in an established connection with no FIN under way?
/// It acknowledges and prolongs. Everything else goes to [`after`].
#[inline(always)]
pub const fn plain(bits: u8, flags: u8) -> bool {
    ((flags & (SYN | FIN | RST | ACK)) ^ ACK) | (bits ^ (OPENED | ANSWERED)) == 0
}

/// A TCP segment. Numbers in host order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment {
    /// 0 in a later fragment.
    pub flags: u8,
    /// From the side that opened the flow.
    pub forward: bool,
    /// From a guest, which cannot be anybody else: sender's address and device are checked.
    pub guest: bool,
    pub sequence: u32,
    /// The sequence number after it: SYN and FIN count as one.
    pub end: u32,
    /// Meaningful with ACK.
    pub acknowledgement: u32,
}

/// What is known of a flow: its bits, and of each direction the number that it acknowledged last, or is to acknowledge if a SYN
/// or FIN of the other side is not acknowledged yet. Host order; 0 is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tracked {
    pub bits: u8,
    /// Of the segment's direction.
    pub own: u32,
    /// Of the opposite direction.
    pub other: u32,
}

/// What becomes of the deadlines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Timer {
    Keep,
    /// The segment's direction lives on for the time of the state after it.
    Prolong,
    /// Both directions have the time of the state after it.
    Set,
    /// Both directions have at most that time: who sends a RST does not prolong what he wants to end.
    Shorten,
}

/// The number by which a SYN that ends with `end` is to be acknowledged, as a half-record has it: never 0, which is "not known".
#[inline(always)]
pub const fn named(end: u32) -> u32 {
    if end == 0 { 1 } else { end }
}

/// Does this acknowledge a SYN of which `expected` is the end?
#[inline(always)]
const fn answers(expected: u32, acknowledgement: u32) -> bool {
    expected != 0 && expected.wrapping_sub(acknowledgement) <= SYN_DATA
}

/// The flow after a segment.
#[inline(always)]
pub const fn after(flow: Tracked, segment: &Segment) -> (Tracked, Timer) {
    // What this side sends, and what the other side has sent, is acknowledged.
    let (mine, theirs, my_fin, their_fin) = if segment.forward {
        (ACKED_FORWARD, ACKED_REVERSE, FIN_FORWARD, FIN_REVERSE)
    } else {
        (ACKED_REVERSE, ACKED_FORWARD, FIN_REVERSE, FIN_FORWARD)
    };
    let before = state(flow.bits);
    let over = matches!(before, State::Closed | State::Reset);
    if segment.flags & RST != 0 {
        return reset(flow, segment, mine, theirs, my_fin);
    }
    if segment.flags & (SYN | ACK) == SYN {
        return syn(flow, segment, mine);
    }
    if over {
        // RFC 6146 §3.5.2.2: everything passes, nothing prolongs.
        return (flow, Timer::Keep);
    }
    let mut flow = flow;
    let mut timer = Timer::Prolong;
    if flow.bits & ANSWERED == 0 {
        flow = handshake(flow, segment, mine, theirs);
        if flow.bits & ACKED != ACKED {
            return (flow, Timer::Keep);
        }
        flow.bits = OPENED | ANSWERED;
        timer = Timer::Set;
    } else if segment.flags & SYN != 0 {
        // An answer sent once more; it acknowledges what was acknowledged long ago.
        let spoke = flow.bits & TRANSITORY != 0;
        flow.bits &= !TRANSITORY;
        return (flow, if spoke { Timer::Prolong } else { Timer::Keep });
    } else if segment.flags & ACK != 0 {
        flow.bits &= !TRANSITORY;
        if flow.bits & their_fin == 0 || flow.bits & theirs != 0 {
            flow.own = segment.acknowledgement;
        } else if flow.own == segment.acknowledgement {
            flow.bits |= theirs;
        }
    }
    if segment.flags & FIN != 0 && flow.bits & mine == 0 {
        flow.bits |= my_fin;
        flow.other = segment.end;
    }
    match state(flow.bits) {
        State::Closed => timer = Timer::Set,
        State::Closing => {
            if !matches!(before, State::Closing) {
                timer = Timer::Set;
            } else if segment.flags & FIN != 0 {
                // Sent again to one who does not acknowledge it.
                timer = Timer::Keep;
            }
        }
        _ => {}
    }
    (flow, timer)
}

/// A RST is believed where the other side is (RFC 5961 §3.2), or if it refuses a SYN by its number (RFC 9293 §3.5.2). Any
/// other may be anybody's. A guest's is no exception: forged segments make it send RSTs with the numbers they chose, about a
/// connection that lives (RFC 9293 §3.10.7.3).
#[inline(always)]
const fn reset(flow: Tracked, segment: &Segment, mine: u8, theirs: u8, my_fin: u8) -> (Tracked, Timer) {
    let mut flow = flow;
    let before = state(flow.bits);
    if matches!(before, State::Closed | State::Reset) {
        return (flow, Timer::Keep);
    }
    let open = flow.bits & ANSWERED == 0;
    // While a FIN is not acknowledged, nothing tells whether whoever sent it knew where the other side is.
    let where_it_is = flow.other != 0
        && flow.other == segment.sequence
        && (open || flow.bits & my_fin == 0 || flow.bits & mine != 0);
    let refuses = open
        && flow.bits & theirs == 0
        && segment.flags & ACK != 0
        && answers(flow.own, segment.acknowledgement);
    if where_it_is || refuses {
        flow.bits |= RESET;
        return (flow, Timer::Set);
    }
    if open || matches!(before, State::Transitory) {
        return (flow, Timer::Keep);
    }
    flow.bits |= TRANSITORY;
    (flow, Timer::Shorten)
}

/// A SYN without ACK: sent again, a simultaneous open, a new connection after the end of one, or forged.
#[inline(always)]
const fn syn(flow: Tracked, segment: &Segment, mine: u8) -> (Tracked, Timer) {
    let mut flow = flow;
    match state(flow.bits) {
        // From either side, which may have swapped roles; but who was refused waits for nobody.
        State::Closed | State::Reset => {
            if !segment.forward && matches!(state(flow.bits), State::Reset) {
                return (flow, Timer::Keep);
            }
            (Tracked { bits: OPENED, own: 0, other: named(segment.end) }, Timer::Set)
        }
        State::HalfOpen => {
            // A guest that tries anew chooses another number. A stranger does not say what the guest has to acknowledge.
            if segment.guest && flow.bits & mine == 0 {
                flow.other = named(segment.end);
            }
            (flow, Timer::Keep)
        }
        State::Transitory => {
            flow.bits &= !TRANSITORY;
            (flow, Timer::Prolong)
        }
        // One end has forgotten the connection: the other tells it so, and it answers with a RST (RFC 9293 §3.5.1).
        State::Established | State::Closing => (flow, Timer::Keep),
    }
}

/// A half-open flow after a segment with ACK: is a SYN acknowledged by it? A guest's word is taken for it.
#[inline(always)]
const fn handshake(flow: Tracked, segment: &Segment, mine: u8, theirs: u8) -> Tracked {
    let mut flow = flow;
    let first = flow.bits & theirs == 0 && answers(flow.own, segment.acknowledgement);
    if segment.flags & ACK == 0 || !(segment.guest || first) {
        return flow;
    }
    flow.bits |= theirs;
    flow.own = segment.acknowledgement;
    if segment.flags & SYN != 0 && flow.bits & mine == 0 {
        flow.other = named(segment.end);
    }
    flow
}

#[cfg(test)]
#[path = "tcp_state_tests.rs"]
mod tests;
