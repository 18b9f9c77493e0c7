//! The state of a connection, by RFC 7857 §2 (the machine of RFC 6146 §3.5.2) and issue 6.
//!
//! Where neither says which timer holds, both are possible: a flow has an earliest and a latest end, and nobody asks in between.

use super::packet::flag::{ACK, FIN, RST, SYN};

/// Are the checks of issue 6 in the product, that a RST has to be in sequence and a SYN+ACK has to answer? Without them both are
/// believed as they come.
pub(super) const CHECKED: bool = true;

/// Which timer holds from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// The one that held.
    Keep,
    Established,
    /// The one that held, or established anew.
    Later,
    /// After a RST that is believed.
    Reset,
    /// After one that is not: as it was, or the transitory one.
    Doubted,
    /// Nobody says: anything from what held to a fresh start of the longest.
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    HalfOpen,
    /// The SYN has been answered, and that not yet acknowledged.
    Answered,
    Open,
    /// Both have sent a FIN.
    Closed,
    /// What the gateway takes it for depends on things that no text settles.
    Unsettled,
}

/// A connection; ends are 0, who opened it, and 1.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(super) opener: usize,
    pub(super) initial: u32,
    /// What the other side answered with.
    answer: Option<u32>,
    phase: Phase,
    fin: [bool; 2],
    /// What each end last acknowledged.
    pub(super) acknowledged: [Option<u32>; 2],
}

/// Flags that no connection has: none at all, or two that contradict each other.
pub fn impossible(flags: u8) -> bool {
    let of = flags & (SYN | ACK | FIN | RST);
    of == 0 || of & SYN != 0 && of & (FIN | RST) != 0 || of & (FIN | RST) == FIN | RST
}

/// Does this segment open a connection?
pub fn opens(flags: u8) -> bool {
    flags & (SYN | ACK | FIN | RST) == SYN
}

impl Connection {
    /// Opened by end 0 with this sequence number.
    pub fn new(initial: u32) -> Self {
        Connection {
            opener: 0,
            initial,
            answer: None,
            phase: Phase::HalfOpen,
            fin: [false; 2],
            acknowledged: [None; 2],
        }
    }

    /// A segment of this end, which is not [`impossible`].
    pub fn segment(&mut self, end: usize, flags: u8, sequence: u32, acknowledgment: u32) -> Timer {
        let timer = self.advance(end, flags, sequence, acknowledgment);
        if flags & ACK != 0 && flags & RST == 0 {
            self.acknowledged[end] = Some(acknowledgment);
        }
        timer
    }

    fn advance(&mut self, end: usize, flags: u8, sequence: u32, acknowledgment: u32) -> Timer {
        let kind = flags & (SYN | ACK | FIN | RST);
        match self.phase {
            Phase::HalfOpen if end == self.opener => match kind {
                // A retransmission does not prolong an unanswered flow.
                SYN if sequence == self.initial => Timer::Keep,
                _ => self.unsettle(),
            },
            Phase::HalfOpen => match kind {
                _ if kind == SYN | ACK && acknowledgment == self.initial.wrapping_add(1) => {
                    self.answer = Some(sequence);
                    // From here or from the opener's acknowledgement on: both have been called established.
                    self.phase = Phase::Answered;
                    Timer::Later
                }
                // It answers something else; the opener will say so with a RST (RFC 9293 §3.10.7.3).
                _ if kind == SYN | ACK && CHECKED => Timer::Keep,
                _ => self.unsettle(),
            },
            Phase::Answered if kind == ACK && end == self.opener => {
                self.phase = Phase::Open;
                if self.answer.is_some_and(|answer| acknowledgment == answer.wrapping_add(1)) {
                    Timer::Established
                } else {
                    self.unsettle()
                }
            }
            Phase::Answered if kind == SYN | ACK && end != self.opener && self.answer == Some(sequence) => {
                Timer::Later
            }
            Phase::Answered => self.unsettle(),
            Phase::Open if kind & RST != 0 && !CHECKED => self.unsettle(),
            Phase::Open if kind & RST != 0 => {
                if self.acknowledged[1 - end] == Some(sequence) {
                    self.phase = Phase::Unsettled;
                    Timer::Reset
                } else {
                    // It lives on if either side speaks.
                    Timer::Doubted
                }
            }
            Phase::Open if kind == SYN => self.unsettle(),
            Phase::Open => {
                self.fin[end] |= kind & FIN != 0;
                if self.fin == [true; 2] {
                    // Both FINs, acknowledged or not: the timer of the end, which may begin now or may have begun.
                    self.phase = Phase::Closed;
                    return Timer::Later;
                }
                Timer::Established
            }
            Phase::Closed if kind == SYN => {
                *self = Connection { opener: end, ..Connection::new(sequence) };
                // Anew, with the timer of an unanswered flow or what the last one had left.
                Timer::Any
            }
            Phase::Closed | Phase::Unsettled => self.unsettle(),
        }
    }

    fn unsettle(&mut self) -> Timer {
        self.phase = Phase::Unsettled;
        Timer::Any
    }
}
