//! TCP connections for the packet tables: segments of both ends through every translation, with what must come out on the other
//! side, and the state and timer that the flow has afterwards.

use std::net::SocketAddr;

use portcullis_common::Reason::{self, Forwarded, NewFlow};
use portcullis_common::clock::ticks;
use portcullis_common::flow::{Ctl, FLAG_FORWARD};
use portcullis_common::layout::HalfRecord;
use portcullis_common::tcp_state::{self, State};

use crate::icmp_error::{Family, POLICY, Side, Table, WORLD, guest};
use crate::lab::{Craft, Craft6, Frame, TcpFlags};

/// Far enough from each other that what is left of one on the slowest machine is none of the others.
pub const HALF_OPEN: u32 = 2_000;
pub const TRANSITORY: u32 = 4_000;
pub const FIN_TIME: u32 = 6_000;
pub const RESET_TIME: u32 = 8_000;
pub const ESTABLISHED: u32 = 10_000;
const TIMERS: [u32; 5] = [HALF_OPEN, TRANSITORY, FIN_TIME, RESET_TIME, ESTABLISHED];

/// What lets vm3 out.
const ALLOWED: [&str; 1] = ["own/Outbound/defaultSecurityRules/AllowInternetOutBound"];

/// That of the ICMP tables, with a rule of the load balancer's for TCP, from port 443 to vm1's 8443.
pub fn policy() -> String {
    let mut rules = String::new();
    for (name, frontend) in [("https", "fe"), ("https6", "fe6")] {
        rules += &format!(
            "      - {{ name: {name}, frontendIPConfiguration: {frontend}, backendAddressPool: pool, protocol: Tcp, frontendPort: 443, backendPort: 8443, disableOutboundSnat: true }}\n"
        );
    }
    let timeouts = format!(
        "timeouts: {{ tcpHalfOpenSeconds: {HALF_OPEN}, tcpTransitorySeconds: {TRANSITORY}, tcpFinSeconds: {FIN_TIME}, tcpResetSeconds: {RESET_TIME}, tcpEstablishedSeconds: {ESTABLISHED} }}\n"
    );
    POLICY.replace("    outboundRules:\n", &format!("{rules}    outboundRules:\n")) + &timeouts
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// What a segment says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Says<'a> {
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub data: &'a [u8],
}

/// A segment without data.
pub fn bare(flags: u8, sequence: u32, acknowledgement: u32) -> Says<'static> {
    Says { flags, sequence, acknowledgement, data: b"" }
}

/// A segment to the gateway on one side; 64 is its TTL.
pub fn segment(side: Side, from: SocketAddr, to: SocketAddr, says: Says<'_>) -> Vec<u8> {
    made([side.mac, side.gateway], 64, from, to, says)
}

/// The same as the gateway sends it.
pub fn segment_sent(side: Side, from: SocketAddr, to: SocketAddr, says: Says<'_>) -> Vec<u8> {
    made([side.gateway, side.mac], 63, from, to, says)
}

fn made(
    [source, destination]: [[u8; 6]; 2],
    ttl: u8,
    from: SocketAddr,
    to: SocketAddr,
    says: Says<'_>,
) -> Vec<u8> {
    let (flags, sequence, acknowledgement) = (TcpFlags::of(says.flags), says.sequence, says.acknowledgement);
    match (from, to) {
        (SocketAddr::V4(a), SocketAddr::V4(b)) => {
            Craft { ttl, ..Craft::new(source, *a.ip(), destination, *b.ip()) }.tcp(
                a.port(),
                b.port(),
                flags,
                sequence,
                acknowledgement,
                says.data,
            )
        }
        (SocketAddr::V6(a), SocketAddr::V6(b)) => {
            Craft6 { hop_limit: ttl, ..Craft6::new(source, *a.ip(), destination, *b.ip()) }.segment(
                a.port(),
                b.port(),
                flags,
                sequence,
                acknowledgement,
                says.data,
            )
        }
        _ => panic!("two families"),
    }
}

/// The way a connection takes through the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// vm1 to a server, under a port of the load balancer's address.
    Out,
    /// vm3 to a server, under its own public address.
    Own,
    /// A client of the world's to the load balancer, and on to vm1.
    In,
    /// vm1 to vm2.
    Between,
}

pub const WAYS: [Way; 4] = [Way::Out, Way::Own, Way::In, Way::Between];

/// One end of a connection: where it is, who it is to itself, and whom it talks to.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub side: Side,
    pub own: SocketAddr,
    pub peer: SocketAddr,
}

/// A connection whose opener has sent a SYN.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    pub opener: End,
    pub other: End,
}

/// Number with which the opener's SYN ends, and the other's.
pub const NEXT: u32 = 0x1234_5679;
pub const ANSWER: u32 = 0xabcd_ef02;

impl Connection {
    /// Sends the SYN. `port` is the opener's own.
    ///
    /// # Panics
    /// If it does not arrive as a new flow's, unprolonged.
    pub fn open(t: &mut Table<'_>, f: Family, way: Way, port: u16) -> Self {
        let at = SocketAddr::new;
        let (opener, mut other, rules): (_, _, &[&str]) = match way {
            Way::Out | Way::Own => {
                let (number, own) = if way == Way::Out { (1, f.vm1) } else { (3, f.vm3) };
                let public = if way == Way::Out { f.frontend } else { f.own };
                let server = at(f.server, 443);
                (
                    End { side: guest(number), own: at(own, port), peer: server },
                    End { side: WORLD, own: server, peer: at(public, port) },
                    if way == Way::Out { &[] } else { &ALLOWED },
                )
            }
            Way::In => {
                let client = at(f.server, port);
                (
                    End { side: WORLD, own: client, peer: at(f.frontend, 443) },
                    End { side: guest(1), own: at(f.vm1, 8443), peer: client },
                    &[],
                )
            }
            Way::Between => {
                let one = at(f.vm1, port);
                (
                    End { side: guest(1), own: one, peer: at(f.vm2, 443) },
                    End { side: guest(2), own: at(f.vm2, 443), peer: one },
                    &[],
                )
            }
        };
        let says = bare(SYN, NEXT - 1, 0);
        let frame = segment(opener.side, opener.own, opener.peer, says);
        let left = t.out(&format!("the SYN, {way:?}"), opener.side, &frame, (NewFlow, rules));
        if way == Way::Out {
            other.peer = Frame::parse(left.clone()).source().expect("it has a port");
        }
        assert!(left == segment_sent(other.side, other.peer, other.own, says), "the SYN, {way:?}");
        let connection = Connection { opener, other };
        connection.is(t, "opened", State::HalfOpen, HALF_OPEN);
        connection
    }

    /// With the three segments of the handshake.
    ///
    /// # Panics
    /// If they do not establish it.
    pub fn established(t: &mut Table<'_>, f: Family, way: Way, port: u16) -> Self {
        let connection = Connection::open(t, f, way, port);
        connection.other(t, bare(SYN | ACK, ANSWER - 1, NEXT)).is(t, "answered", State::HalfOpen, HALF_OPEN);
        connection.opener(t, bare(ACK, NEXT, ANSWER)).is(t, "confirmed", State::Established, ESTABLISHED);
        connection
    }

    /// A segment of the opener's, which arrives.
    ///
    /// # Panics
    /// If not, translated as the connection is, byte by byte, and counted once as forwarded.
    pub fn opener(&self, t: &mut Table<'_>, says: Says<'_>) -> &Self {
        self.passes(t, true, says, Forwarded)
    }

    /// A segment of the other side's.
    ///
    /// # Panics
    /// As [`Connection::opener`].
    pub fn other(&self, t: &mut Table<'_>, says: Says<'_>) -> &Self {
        self.passes(t, false, says, Forwarded)
    }

    /// A segment of one of them, counted as `reason`.
    ///
    /// # Panics
    /// As [`Connection::opener`].
    pub fn passes(&self, t: &mut Table<'_>, forward: bool, says: Says<'_>, reason: Reason) -> &Self {
        let [from, to] = if forward { [self.opener, self.other] } else { [self.other, self.opener] };
        let frame = segment(from.side, from.own, from.peer, says);
        let expected = segment_sent(to.side, to.peer, to.own, says);
        t.sends(
            &format!("{says:?}, forward: {forward}, of {self:?}"),
            from.side,
            &frame,
            &expected,
            (reason, &[]),
        );
        self
    }

    /// Both half-records, the opener's first, and the tick it is now.
    ///
    /// # Panics
    /// If there is no live flow.
    pub fn halves(&self, t: &Table<'_>) -> ([HalfRecord; 2], u32) {
        let (halves, now) = t.0.backend.half_records().expect("the tables can be read");
        let find = |end: End, forward: bool| {
            let mut found = halves.iter().filter(|half| {
                let key = &half.key;
                key.protocol == 6
                    && (Ctl(half.ctl).flags() & FLAG_FORWARD != 0) == forward
                    && key.source_port == end.own.port().to_be()
                    && key.destination_port == end.peer.port().to_be()
                    && key.source == last_word(end.own)
            });
            *found.next().unwrap_or_else(|| panic!("no half-record of {end:?}"))
        };
        ([find(self.opener, true), find(self.other, false)], now)
    }

    /// Asserts state and timer of the flow.
    ///
    /// # Panics
    /// If they are others, or both halves do not agree.
    pub fn is(&self, t: &Table<'_>, name: &str, state: State, timer: u32) -> &Self {
        let who = format!("{name} on {}, {self:?}", t.0.backend.name());
        let ([one, two], now) = self.halves(t);
        assert_eq!(Ctl(one.ctl).tcp(), Ctl(two.ctl).tcp(), "{who}: both halves");
        assert_eq!(tcp_state::state(Ctl(one.ctl).tcp()), state, "{who}");
        let left =
            [one, two].map(|half| half.deadline.wrapping_sub(now) as i32).into_iter().max().unwrap_or(0);
        let is = TIMERS.into_iter().find(|timer| left <= ticks(*timer) as i32);
        assert_eq!(is, Some(timer), "{who}: {left} ticks are left");
        self
    }
}

/// An address as the half of a record has it that both families have.
fn last_word(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(a) => u32::from_ne_bytes(a.ip().octets()),
        SocketAddr::V6(a) => portcullis_common::layout::words6(a.ip().octets())[3],
    }
}
