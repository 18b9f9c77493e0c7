//! A packet as bytes, with every length and checksum made anew (RFC 791, 768, 9293, 792, 8200, 4443).

use std::net::IpAddr;

use super::packet::{Body, Device, Message, Packet, flag};
use crate::icmp_error::{Side, WORLD, guest};

/// The frame that arrives on a device.
pub fn received(device: Device, packet: &Packet) -> Vec<u8> {
    let side = side(device);
    frame(side.mac, side.gateway, packet)
}

/// The frame that the gateway sends out of a device.
pub fn sent(device: Device, packet: &Packet) -> Vec<u8> {
    let side = side(device);
    frame(side.gateway, side.mac, packet)
}

fn side(device: Device) -> Side {
    match device {
        Device::Vm1 => guest(1),
        Device::Vm2 => guest(2),
        Device::Vm3 => guest(3),
        Device::World => WORLD,
    }
}

fn frame(from: [u8; 6], to: [u8; 6], packet: &Packet) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(if packet.v6() { [0x86, 0xdd] } else { [8, 0] });
    frame.extend(ip(packet));
    frame
}

/// The IP packet.
fn ip(packet: &Packet) -> Vec<u8> {
    let whole = transport(packet);
    match packet.piece {
        None => header(packet, &whole, None),
        Some(piece) => {
            let end = piece.end.unwrap_or(whole.len());
            header(packet, &whole[piece.start..end], Some((piece.id, piece.start, piece.end.is_some())))
        }
    }
}

fn header(packet: &Packet, payload: &[u8], fragment: Option<(u16, usize, bool)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (id, field) = match fragment {
                Some((id, start, more)) => (id, (start / 8) as u16 | u16::from(more) << 13),
                None => (0x4242, 1 << 14),
            };
            bytes.extend([0x45, 0]);
            bytes.extend((20 + payload.len() as u16).to_be_bytes());
            bytes.extend(id.to_be_bytes());
            bytes.extend(field.to_be_bytes());
            bytes.extend([packet.ttl, packet.protocol(), 0, 0]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
            let sum = !folded(sum(&bytes));
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let extension = if fragment.is_some() { 8 } else { 0 };
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((extension + payload.len() as u16).to_be_bytes());
            bytes.extend([if fragment.is_some() { 44 } else { packet.protocol() }, packet.ttl]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
            if let Some((id, start, more)) = fragment {
                bytes.extend([packet.protocol(), 0]);
                bytes.extend((start as u16 | u16::from(more)).to_be_bytes());
                bytes.extend(u32::from(id).to_be_bytes());
            }
        }
        _ => panic!("two families in one packet"),
    }
    bytes.extend(payload);
    bytes
}

/// What is behind the IP header of the whole packet.
fn transport(packet: &Packet) -> Vec<u8> {
    let mut bytes = Vec::new();
    let pattern = |length: usize| (0..length).map(|at| at as u8);
    let at = match &packet.body {
        Body::Udp { from, to, length, bare } => {
            bytes.extend(from.to_be_bytes());
            bytes.extend(to.to_be_bytes());
            bytes.extend((8 + *length as u16).to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend(pattern(*length));
            if *bare {
                return bytes;
            }
            6
        }
        Body::Tcp { from, to, flags, sequence, acknowledgment, length } => {
            bytes.extend(from.to_be_bytes());
            bytes.extend(to.to_be_bytes());
            bytes.extend(sequence.to_be_bytes());
            bytes.extend(acknowledgment.to_be_bytes());
            bytes.extend([0x50, *flags, 0xfa, 0xf0, 0, 0, 0, u8::from(flags & flag::URG != 0)]);
            bytes.extend(pattern(*length));
            16
        }
        Body::Echo { reply, id, length } => {
            bytes.push(match (packet.v6(), reply) {
                (false, false) => 8,
                (false, true) => 0,
                (true, false) => 128,
                (true, true) => 129,
            });
            bytes.extend([0, 0, 0]);
            bytes.extend(id.to_be_bytes());
            bytes.extend([0, 1]);
            bytes.extend(pattern(*length));
            2
        }
        Body::Error { message, quote, behind } => {
            let (kind, code, rest): (u8, u8, [u8; 4]) = match (message, packet.v6()) {
                (Message::PortUnreachable, false) => (3, 3, [0; 4]),
                (Message::PortUnreachable, true) => (1, 4, [0; 4]),
                (Message::TooBig, false) => (3, 4, [0, 0, 5, 120]),
                (Message::TooBig, true) => (2, 0, [0, 0, 5, 120]),
                (Message::TimeExceeded, false) => (11, 0, [0; 4]),
                (Message::TimeExceeded, true) => (3, 0, [0; 4]),
                (Message::ParameterProblem, false) => (12, 0, [1, 0, 0, 0]),
                (Message::ParameterProblem, true) => (4, 1, [0, 0, 0, 6]),
            };
            bytes.extend([kind, code, 0, 0]);
            bytes.extend(rest);
            let quoted = ip(quote);
            let header = if quote.v6() { 40 } else { 20 };
            let end = behind.map_or(quoted.len(), |behind| quoted.len().min(header + behind));
            bytes.extend(&quoted[..end]);
            2
        }
    };
    let pseudo = if packet.protocol() == 1 { 0 } else { pseudo_header(packet, bytes.len()) };
    let mut checksum = !folded(sum(&bytes) + pseudo);
    if checksum == 0 && packet.protocol() == 17 {
        // A sum of zero is sent as all ones: zero says that there is none.
        checksum = 0xffff;
    }
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn pseudo_header(packet: &Packet, length: usize) -> u64 {
    let of = |address: IpAddr| match address {
        IpAddr::V4(address) => sum(&address.octets()),
        IpAddr::V6(address) => sum(&address.octets()),
    };
    of(packet.source) + of(packet.destination) + u64::from(packet.protocol()) + length as u64
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
