//! A packet as people speak of it.

use std::net::IpAddr;

/// Where a packet arrives or leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    Vm1,
    Vm2,
    Vm3,
    World,
}

/// TCP flags, as on the wire.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
    pub const URG: u8 = 32;
}

/// What a packet carries. Payloads are a pattern of this many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Without its checksum if `bare` (IPv4 only).
    Udp {
        from: u16,
        to: u16,
        length: usize,
        bare: bool,
    },
    Tcp {
        from: u16,
        to: u16,
        flags: u8,
        sequence: u32,
        acknowledgment: u32,
        length: usize,
    },
    /// Echo request, or reply.
    Echo {
        reply: bool,
        id: u16,
        length: usize,
    },
    /// An ICMP error about a packet, of which it quotes so many bytes behind the IP header (all with `None`).
    Error {
        message: Message,
        quote: Box<Packet>,
        behind: Option<usize>,
    },
}

/// What an ICMP error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    PortUnreachable,
    TooBig,
    TimeExceeded,
    ParameterProblem,
}

/// A part of a datagram: bytes `start..end` behind the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub id: u16,
    pub start: usize,
    /// The last part has none: it reaches to the end.
    pub end: Option<usize>,
}

/// An IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    pub body: Body,
    /// A fragment of the whole that the rest says.
    pub piece: Option<Piece>,
}

impl Packet {
    pub fn new(source: IpAddr, destination: IpAddr, body: Body) -> Self {
        Packet { source, destination, ttl: 64, body, piece: None }
    }

    pub fn v6(&self) -> bool {
        self.source.is_ipv6()
    }

    /// IANA number of what it carries.
    pub fn protocol(&self) -> u8 {
        match self.body {
            Body::Udp { .. } => 17,
            Body::Tcp { .. } => 6,
            Body::Echo { .. } | Body::Error { .. } => {
                if self.v6() {
                    58
                } else {
                    1
                }
            }
        }
    }

    /// Ports, or the identifier on both sides.
    pub fn ports(&self) -> (u16, u16) {
        match self.body {
            Body::Udp { from, to, .. } | Body::Tcp { from, to, .. } => (from, to),
            Body::Echo { id, .. } => (id, id),
            Body::Error { .. } => (0, 0),
        }
    }

    /// The same between other ends; of an echo the identifier is that of the guest, which both have.
    pub fn readdressed(&self, source: (IpAddr, u16), destination: (IpAddr, u16), id: u16) -> Packet {
        let mut packet = self.clone();
        (packet.source, packet.destination) = (source.0, destination.0);
        match &mut packet.body {
            Body::Udp { from, to, .. } | Body::Tcp { from, to, .. } => {
                (*from, *to) = (source.1, destination.1)
            }
            Body::Echo { id: own, .. } => *own = id,
            Body::Error { .. } => {}
        }
        packet
    }
}
