//! How long a TCP connection lives, to the tick, on the host engine, where time is ours: what is unanswered, what is silent after
//! a RST, what closes; and that nobody who only guesses makes any of it longer or shorter.

use portcullis_common::Reason;
use portcullis_common::clock::ticks;
use portcullis_common::tcp_state::State;
use portcullis_tests::backend::{At, Backend as _, HostBackend};
use portcullis_tests::icmp_error::{Family, Table};
use portcullis_tests::ledger::Ledger;
use portcullis_tests::tcp_table::{
    ACK, ANSWER, Connection, ESTABLISHED, FIN, FIN_TIME, HALF_OPEN, NEXT, RESET_TIME, RST, SYN, TRANSITORY,
    Way, bare, policy, segment,
};

/// When the host engine's time begins.
const START: u32 = 1_000;

/// One engine, one connection, and a clock.
struct Life {
    backend: HostBackend,
    connection: Connection,
}

impl Life {
    fn new(make: impl Fn(&mut Table<'_>) -> Connection) -> Self {
        let mut backend = HostBackend::new(&policy()).expect("the policy is right");
        backend.env.set_now(START);
        let connection = make(&mut Table(Ledger::new(&mut backend)));
        Life { backend, connection }
    }

    fn established() -> Self {
        Life::new(|t| Connection::established(t, Family::both()[0], Way::Out, 5000))
    }

    /// So long after the start.
    fn at(&self, tick: u32) {
        self.backend.env.set_now(START + tick);
    }

    /// Does a segment of one end find the flow?
    fn says(&mut self, forward: bool, flags: u8, sequence: u32, acknowledgement: u32) -> bool {
        let end = if forward { self.connection.opener } else { self.connection.other };
        let frame = segment(end.side, end.own, end.peer, bare(flags, sequence, acknowledgement));
        let before = self.backend.env.counted(Reason::Forwarded).packets;
        self.backend.run(At::Ingress(end.side.device), &frame).expect("it runs");
        self.backend.env.counted(Reason::Forwarded).packets != before
    }

    /// Is the flow there at `tick` and gone one later? A RST of nobody's is who asks: it prolongs nothing.
    fn ends_after(&mut self, what: &str, tick: u32) {
        self.at(tick);
        assert!(self.says(false, RST, 77, 0), "{what}: alive after {tick}");
        self.at(tick + 1);
        assert!(!self.says(false, RST, 77, 0), "{what}: gone after {tick}");
    }
}

#[test]
fn an_unanswered_syn_is_forgotten_in_its_time_whatever_is_sent_again_or_forged() {
    let mut life = Life::new(|t| Connection::open(t, Family::both()[0], Way::Out, 5000));
    for tick in (0..ticks(HALF_OPEN)).step_by(97) {
        life.at(tick);
        assert!(life.says(true, SYN, NEXT - 1, 0), "sent again");
        assert!(life.says(false, SYN | ACK, tick, NEXT + 1 + tick), "an answer to something else");
        assert!(life.says(false, SYN, tick, 0), "a SYN of a stranger's");
        assert!(life.says(false, ACK, tick, tick));
        assert!(life.says(true, RST, NEXT + 1 + tick, 0), "what the guest says to that");
        assert!(life.says(false, RST | ACK, 0, tick));
    }
    life.ends_after("half-open", ticks(HALF_OPEN));
}

#[test]
fn after_a_reset_of_nobodys_a_silent_connection_ends_and_one_that_speaks_lives_on() {
    let mut life = Life::established();
    life.says(false, RST, 77, 0);
    life.ends_after("silent", ticks(TRANSITORY));
    // A flood does not prolong what it began.
    let mut life = Life::established();
    for tick in (0..ticks(TRANSITORY)).step_by(101) {
        life.at(tick);
        assert!(life.says(false, RST | ACK, tick, tick));
    }
    life.ends_after("under a flood", ticks(TRANSITORY));
    for speaker in [true, false] {
        let mut life = Life::established();
        let (sequence, acknowledgement) = if speaker { (NEXT, ANSWER) } else { (ANSWER, NEXT) };
        let mut last = 0;
        for n in 1..=20 {
            life.at(last + 1);
            assert!(life.says(false, RST, n, 0));
            // Just in time.
            last += ticks(TRANSITORY);
            life.at(last);
            assert!(life.says(speaker, ACK, sequence, acknowledgement), "{n}");
        }
        life.ends_after("it was established all the while", last + ticks(ESTABLISHED));
    }
}

#[test]
fn a_reset_prolongs_nothing() {
    let mut life = Life::established();
    // Less is left than a RST leaves.
    life.at(ticks(ESTABLISHED) - 10);
    assert!(life.says(false, RST, 77, 0));
    life.ends_after("idle", ticks(ESTABLISHED));
}

#[test]
fn what_has_ended_is_held_for_its_time_whatever_is_said() {
    for forward in [true, false] {
        let mut life = Life::established();
        life.at(100);
        assert!(life.says(forward, RST, if forward { NEXT } else { ANSWER }, 0));
        life.at(200);
        assert!(life.says(!forward, ACK, 1, 2), "what is under way passes");
        life.ends_after("reset", 100 + ticks(RESET_TIME));
    }
    let mut life = Life::established();
    life.says(true, FIN | ACK, NEXT, ANSWER);
    life.at(50);
    life.says(false, FIN | ACK, ANSWER, NEXT + 1);
    life.at(100);
    life.says(true, ACK, NEXT + 1, ANSWER + 1);
    life.at(200);
    assert!(life.says(false, FIN | ACK, ANSWER, NEXT + 1), "sent again");
    assert!(life.says(true, RST, NEXT + 1, 0));
    life.ends_after("closed", 100 + ticks(FIN_TIME));
    // The last acknowledgement is lost: who is gone does not hold it, nor who sends his FIN again and again.
    let mut life = Life::established();
    life.says(true, FIN | ACK, NEXT, ANSWER);
    life.says(false, FIN | ACK, ANSWER, NEXT + 1);
    for tick in (0..ticks(FIN_TIME)).step_by(103) {
        life.at(tick);
        assert!(life.says(false, FIN | ACK, ANSWER, NEXT + 1));
    }
    life.ends_after("closing", ticks(FIN_TIME));
}

#[test]
fn a_refused_connection_is_held_for_the_reset_timer() {
    let mut life = Life::new(|t| {
        let c = Connection::open(t, Family::both()[0], Way::Out, 5000);
        c.other(t, bare(RST | ACK, 0, NEXT)).is(t, "refused", State::Reset, RESET_TIME);
        c
    });
    life.ends_after("refused", ticks(RESET_TIME));
}
