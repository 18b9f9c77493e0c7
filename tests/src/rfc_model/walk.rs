//! Random sequences of packets that make sense often enough: flows begin, are answered, go on, end and are disturbed.

use std::net::IpAddr;

use super::gateway::{Flow, Gateway, address, frontend, own_address};
use super::packet::flag::{ACK, FIN, PSH, RST, SYN, URG};
use super::packet::{Body, Device, Message, Packet, Piece};
use crate::random::Random;

/// One step of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Packet(Device, Packet),
    /// The clock moves on by so many ticks.
    Clock(u32),
}

/// A source of steps.
pub struct Walk {
    random: Random,
    /// May the clock be moved?
    clock: bool,
    /// Fragments of a datagram that has been begun, the next one last.
    rest: Vec<(Device, Packet)>,
    sent: u16,
}

const GUESTS: [Device; 3] = [Device::Vm1, Device::Vm2, Device::Vm3];

impl Walk {
    pub fn new(seed: u64, clock: bool) -> Self {
        Walk { random: Random(seed.wrapping_mul(2) + 1), clock, rest: Vec::new(), sent: 0 }
    }

    /// The next step, in view of what lives.
    pub fn next(&mut self, gateway: &Gateway) -> Step {
        if let Some((device, packet)) = self.rest.pop() {
            return Step::Packet(device, packet);
        }
        let (device, packet) = match self.random.below(100) {
            0..4 if self.clock => return self.clock(gateway),
            0..16 => self.guests_packet(),
            16..24 => self.worlds_packet(),
            24..30 => self.between_guests(),
            30..40 => match self.flow(gateway) {
                Some(flow) => self.error(flow),
                None => self.guests_packet(),
            },
            40..44 => self.nonsense(),
            _ => match self.flow(gateway) {
                Some(flow) => self.goes_on(flow),
                None => self.guests_packet(),
            },
        };
        self.perhaps_in_pieces(device, packet)
    }

    /// To a moment at which there is no doubt about any flow, if one is found.
    fn clock(&mut self, gateway: &Gateway) -> Step {
        for _ in 0..40 {
            let by = match self.random.below(4) {
                0 => self.random.below(40) as u32,
                1 => self.random.below(900) as u32,
                _ => match self.flow(gateway) {
                    Some(flow) => flow.latest.saturating_sub(gateway.now) + 21 + self.random.below(60) as u32,
                    None => 1,
                },
            };
            if gateway.settled_at(gateway.now + by) {
                return Step::Clock(by);
            }
        }
        Step::Clock(0)
    }

    /// One of the last flows, which need not live.
    fn flow<'a>(&mut self, gateway: &'a Gateway) -> Option<&'a Flow> {
        let all = gateway.flows.len();
        let back = all.min(24);
        (all > 0).then(|| &gateway.flows[all - 1 - self.random.below(back)])
    }

    fn server(&mut self, v6: bool) -> IpAddr {
        match (self.random.chance(70), v6) {
            (true, _) => address(Device::World, v6),
            (false, false) => "198.51.100.8".parse().expect("a literal"),
            (false, true) => "2001:db8:7::8".parse().expect("a literal"),
        }
    }

    fn guests_packet(&mut self) -> (Device, Packet) {
        let v6 = self.random.chance(40);
        let guest = match self.random.below(10) {
            0 => Device::Vm2,
            1..7 => Device::Vm1,
            _ => Device::Vm3,
        };
        let from = 5000 + self.random.below(6) as u16;
        let to = [53, 80, 443][self.random.below(3)];
        let body = self.first(from, to, 100);
        (guest, Packet::new(address(guest, v6), self.server(v6), body))
    }

    fn worlds_packet(&mut self) -> (Device, Packet) {
        let v6 = self.random.chance(40);
        let from = [53, 443, 4000, 4001][self.random.below(4)];
        let to = [53, 80, 80, 5000, 5001, 1030][self.random.below(6)];
        let body = self.first(from, to, 200);
        let own = self.random.chance(50) || matches!(body, Body::Echo { .. });
        let destination = if own { own_address(v6) } else { frontend(v6) };
        (Device::World, Packet::new(self.server(v6), destination, body))
    }

    fn between_guests(&mut self) -> (Device, Packet) {
        let v6 = self.random.chance(40);
        let one = self.random.below(3);
        let other = (one + 1 + self.random.below(2)) % 3;
        let from = 5000 + self.random.below(3) as u16;
        let to = [53, 5000, 5001][self.random.below(3)];
        let body = self.first(from, to, 300 + 10 * one as u16);
        (GUESTS[one], Packet::new(address(GUESTS[one], v6), address(GUESTS[other], v6), body))
    }

    /// What opens a flow, most of the time.
    fn first(&mut self, from: u16, to: u16, id: u16) -> Body {
        match self.random.below(10) {
            0..4 => self.udp(from, to),
            4..8 => {
                let flags = match self.random.below(12) {
                    0 => SYN | ACK,
                    1 => ACK,
                    2 => RST,
                    _ => SYN,
                };
                Body::Tcp { from, to, flags, sequence: 1000, acknowledgment: 0, length: 0 }
            }
            _ => Body::Echo { reply: false, id: id + self.random.below(4) as u16, length: self.length() },
        }
    }

    fn udp(&mut self, from: u16, to: u16) -> Body {
        Body::Udp { from, to, length: self.length(), bare: false }
    }

    fn length(&mut self) -> usize {
        [0, 1, 8, 33, 120][self.random.below(5)]
    }

    /// The next packet of a flow.
    fn goes_on(&mut self, flow: &Flow) -> (Device, Packet) {
        let end = self.random.below(2);
        let (sender, receiver) = (flow.ends[end], flow.ends[1 - end]);
        let body = match flow.protocol {
            17 => self.udp(sender.own.1, receiver.shown.1),
            6 => self.segment(flow, end),
            _ => {
                let id = if end == 0 { sender.own.1 } else { receiver.shown.1 };
                Body::Echo { reply: end == 1, id, length: self.length() }
            }
        };
        (sender.device, Packet::new(sender.own.0, receiver.shown.0, body))
    }

    fn segment(&mut self, flow: &Flow, end: usize) -> Body {
        let (from, to) = (flow.ends[end].own.1, flow.ends[1 - end].shown.1);
        let tcp = flow.tcp.as_ref().expect("a connection");
        let other = 50_000u32;
        let (own, others) = if end == tcp.opener { (tcp.initial, other) } else { (other, tcp.initial) };
        let (mut sequence, mut acknowledgment, mut length) = (own + 1, others + 1, 0);
        let flags = match self.random.below(100) {
            0..30 => {
                length = self.length();
                ACK | if length > 0 { PSH } else { 0 }
            }
            30..50 => {
                sequence = own;
                if end == tcp.opener { SYN } else { SYN | ACK }
            }
            50..54 => {
                sequence = own;
                SYN | ACK
            }
            54..57 => {
                sequence = own + 900_000;
                acknowledgment = 0;
                SYN
            }
            57..72 => FIN | ACK,
            72..80 => RST | [0, ACK][self.random.below(2)],
            80..84 => ACK | URG,
            84..90 => SYN | FIN,
            90..92 => 0,
            _ => ACK,
        };
        match self.random.below(8) {
            0 => acknowledgment = 7,
            1 if flags & RST != 0 => sequence = 123_456,
            _ => {}
        }
        if flags & ACK == 0 {
            acknowledgment = 0;
        }
        Body::Tcp { from, to, flags, sequence, acknowledgment, length }
    }

    /// An error about what an end of a flow was sent.
    fn error(&mut self, flow: &Flow) -> (Device, Packet) {
        let echo = matches!(flow.protocol, 1 | 58);
        let end = if echo { 0 } else { self.random.below(2) };
        let (sender, receiver) = (flow.ends[end], flow.ends[1 - end]);
        let (from, to) = (sender.shown, receiver.own);
        let body = match flow.protocol {
            17 => self.udp(from.1, to.1),
            6 => Body::Tcp {
                from: from.1,
                to: to.1,
                flags: ACK,
                sequence: 1001,
                acknowledgment: 50_001,
                length: self.length(),
            },
            _ => Body::Echo { reply: false, id: from.1, length: self.length() },
        };
        let mut quote = Packet::new(from.0, to.0, body);
        quote.ttl = 1;
        let all =
            [Message::PortUnreachable, Message::TooBig, Message::TimeExceeded, Message::ParameterProblem];
        let message = all[self.random.below(4)];
        let behind = [None, None, Some(8), Some(12), Some(4)][self.random.below(5)];
        let router = if to.0.is_ipv6() { "2001:db8:1::1" } else { "192.0.2.1" };
        let by_router = receiver.device == Device::World && self.random.chance(40);
        let source = if by_router { router.parse().expect("a literal") } else { to.0 };
        let body = Body::Error { message, quote: Box::new(quote), behind };
        (receiver.device, Packet::new(source, from.0, body))
    }

    /// What is to be dropped: another's source, nobody's destination, no time left.
    fn nonsense(&mut self) -> (Device, Packet) {
        let (device, mut packet) =
            if self.random.chance(50) { self.guests_packet() } else { self.worlds_packet() };
        let v6 = packet.v6();
        match self.random.below(4) {
            0 if device == Device::World => packet.source = address(Device::Vm2, v6),
            0 => packet.source = address(if device == Device::Vm2 { Device::Vm1 } else { Device::Vm2 }, v6),
            1 if device == Device::World => packet.source = own_address(v6),
            1 => {
                packet.destination =
                    if v6 { "fd00:1:0:1::99" } else { "10.0.1.99" }.parse().expect("a literal")
            }
            // Of a guest that has no way out: whether what ends here may open a flow is another question.
            _ => {
                packet.source = address(Device::Vm2, v6);
                if !matches!(device, Device::World) {
                    packet.ttl = self.random.below(2) as u8;
                }
                return (if device == Device::World { device } else { Device::Vm2 }, packet);
            }
        }
        (device, packet)
    }

    /// As it is, or cut: in order, with the first part missing, or with a part twice.
    fn perhaps_in_pieces(&mut self, device: Device, packet: Packet) -> Step {
        let length = match packet.body {
            Body::Udp { length, .. } | Body::Echo { length, .. } => 8 + length,
            _ => 0,
        };
        if length < 100 || packet.ttl < 2 || !self.random.chance(60) {
            return Step::Packet(device, packet);
        }
        self.sent = self.sent.wrapping_add(1);
        let id = self.sent;
        let piece = |start, end| (device, Packet { piece: Some(Piece { id, start, end }), ..packet.clone() });
        let mut pieces = vec![piece(0, Some(48)), piece(48, Some(96)), piece(96, None)];
        if self.random.chance(20) {
            pieces.remove(0);
        }
        pieces.reverse();
        self.rest = pieces;
        let (device, packet) = self.rest.pop().expect("more than one");
        Step::Packet(device, packet)
    }
}
