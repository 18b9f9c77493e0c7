//! Ethernet frames built from what a test wants to say, with full or partial checksums.

use std::net::Ipv4Addr;

use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, IpFragOffset, IpHeaders, Ipv4Header, PacketBuilder,
    TcpHeader, ip_number,
};
use portcullis_common::packet::checksum;

use super::frame::{L4Place, locate_l4};

/// A hardware address, in wire order.
pub type Mac = [u8; 6];

/// The flags of a crafted TCP segment; `TcpFlags::SYN` and its like are the usual ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags {
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub psh: bool,
    pub urg: bool,
}

impl TcpFlags {
    const NONE: TcpFlags =
        TcpFlags { syn: false, ack: false, fin: false, rst: false, psh: false, urg: false };
    /// Opens a connection.
    pub const SYN: TcpFlags = TcpFlags { syn: true, ..Self::NONE };
    /// Accepts one.
    pub const SYN_ACK: TcpFlags = TcpFlags { syn: true, ack: true, ..Self::NONE };
    /// Carries data or nothing.
    pub const ACK: TcpFlags = TcpFlags { ack: true, ..Self::NONE };
    /// Ends one side.
    pub const FIN_ACK: TcpFlags = TcpFlags { fin: true, ack: true, ..Self::NONE };
    /// Aborts.
    pub const RST: TcpFlags = TcpFlags { rst: true, ..Self::NONE };

    /// The flags of the lower six bits of a header's byte (RFC 9293 §3.1).
    pub const fn of(byte: u8) -> TcpFlags {
        TcpFlags {
            fin: byte & 1 != 0,
            syn: byte & 2 != 0,
            rst: byte & 4 != 0,
            psh: byte & 8 != 0,
            ack: byte & 16 != 0,
            urg: byte & 32 != 0,
        }
    }
}

/// Who sends to whom: everything about a frame below its payload protocol. Fields may be changed before a
/// frame is made; a made frame has complete checksums until [`Craft::make_partial`] says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Craft {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// 64 unless changed.
    pub ttl: u8,
    /// IPv4 identification; 0 unless changed.
    pub identification: u16,
    /// Don't Fragment; set unless changed.
    pub dont_fragment: bool,
}

impl Craft {
    /// Frames from one address to another, over the link between two hardware addresses.
    pub fn new(source_mac: Mac, source: Ipv4Addr, destination_mac: Mac, destination: Ipv4Addr) -> Self {
        Craft {
            source_mac,
            destination_mac,
            source,
            destination,
            ttl: 64,
            identification: 0,
            dont_fragment: true,
        }
    }

    /// A UDP datagram.
    ///
    /// # Panics
    /// All of these do if `payload` does not fit an IPv4 packet.
    pub fn udp(&self, source_port: u16, destination_port: u16, payload: &[u8]) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers())
            .udp(source_port, destination_port);
        let mut frame = Vec::with_capacity(step.size(payload.len()));
        step.write(&mut frame, payload).expect("the payload fits");
        frame
    }

    /// A TCP segment with a window of 64,240 bytes and no options.
    pub fn tcp(
        &self,
        source_port: u16,
        destination_port: u16,
        flags: TcpFlags,
        sequence: u32,
        acknowledgment: u32,
        payload: &[u8],
    ) -> Vec<u8> {
        let mut header = TcpHeader::new(source_port, destination_port, sequence, 64_240);
        header.acknowledgment_number = acknowledgment;
        (header.syn, header.ack, header.fin) = (flags.syn, flags.ack, flags.fin);
        (header.rst, header.psh, header.urg) = (flags.rst, flags.psh, flags.urg);
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers())
            .tcp_header(header);
        let mut frame = Vec::with_capacity(step.size(payload.len()));
        step.write(&mut frame, payload).expect("the payload fits");
        frame
    }

    /// An ICMP echo request.
    pub fn echo_request(&self, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers())
            .icmpv4_echo_request(id, sequence);
        let mut frame = Vec::with_capacity(step.size(payload.len()));
        step.write(&mut frame, payload).expect("the payload fits");
        frame
    }

    /// An ICMP message of any type and code; `rest` is the second word of the header and `payload` what
    /// follows, for an error the quoted packet.
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers())
            .icmpv4_raw(kind, code, rest);
        let mut frame = Vec::with_capacity(step.size(payload.len()));
        step.write(&mut frame, payload).expect("the payload fits");
        frame
    }

    /// A broadcast that asks who has `target`.
    pub fn arp_request(source_mac: Mac, source: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
        arp([0xff; 6], ArpOperation::REQUEST, (source_mac, source), ([0; 6], target))
    }

    /// The answer to one: `source` is at `source_mac`.
    pub fn arp_reply(source_mac: Mac, source: Ipv4Addr, target_mac: Mac, target: Ipv4Addr) -> Vec<u8> {
        arp(target_mac, ArpOperation::REPLY, (source_mac, source), (target_mac, target))
    }

    /// An IPv4 frame without options as fragments that carry `size` bytes each (a multiple of 8), the last one less.
    ///
    /// # Panics
    /// If it is none.
    pub fn fragments(frame: &[u8], size: usize) -> Vec<Vec<u8>> {
        assert!(
            frame[14] == 0x45 && size.is_multiple_of(8),
            "an IPv4 frame without options, in units of 8 bytes"
        );
        let (headers, payload) = frame.split_at(34);
        let parts: Vec<&[u8]> = payload.chunks(size).collect();
        let last = parts.len() - 1;
        let make = |(number, part): (usize, &&[u8])| {
            let mut bytes = headers.to_vec();
            bytes[16..18].copy_from_slice(&((20 + part.len()) as u16).to_be_bytes());
            let field = (number * size / 8) as u16 | if number < last { 0x2000 } else { 0 };
            bytes[20..22].copy_from_slice(&field.to_be_bytes());
            bytes[24..26].fill(0);
            let sum = checksum::of(&bytes[14..34]).to_ne_bytes();
            bytes[24..26].copy_from_slice(&sum);
            bytes.extend_from_slice(part);
            bytes
        };
        parts.iter().enumerate().map(make).collect()
    }

    /// Turns the TCP or UDP checksum of a frame into a partial one, as a sender with checksum offload leaves
    /// it: the field holds the sum of the pseudo header only, and whoever puts the packet on a wire adds the
    /// rest.
    ///
    /// Returns where the sum begins in the frame and where, from there, it is stored (`csum_start` and
    /// `csum_offset` of a virtio-net header); `None` for frames that have no such checksum.
    pub fn make_partial(frame: &mut [u8]) -> Option<(u16, u16)> {
        let L4Place { start, checksum_offset, pseudo_header, .. } = locate_l4(frame)?;
        let field = frame.get_mut(start + checksum_offset..start + checksum_offset + 2)?;
        field.copy_from_slice(&pseudo_header.to_be_bytes());
        Some((u16::try_from(start).ok()?, u16::try_from(checksum_offset).ok()?))
    }

    fn ip_headers(&self) -> IpHeaders {
        let header = Ipv4Header {
            identification: self.identification,
            dont_fragment: self.dont_fragment,
            more_fragments: false,
            fragment_offset: IpFragOffset::ZERO,
            time_to_live: self.ttl,
            // Protocol, length and checksum are the builder's.
            protocol: ip_number::UDP,
            source: self.source.octets(),
            destination: self.destination.octets(),
            ..Default::default()
        };
        IpHeaders::Ipv4(header, Default::default())
    }
}

fn arp(
    destination_mac: Mac,
    operation: ArpOperation,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
) -> Vec<u8> {
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        operation,
        &sender.0,
        &sender.1.octets(),
        &target.0,
        &target.1.octets(),
    )
    .expect("the lengths are those of Ethernet and IPv4");
    let step = PacketBuilder::ethernet2(sender.0, destination_mac).arp(packet);
    let mut frame = Vec::with_capacity(step.size());
    step.write(&mut frame).expect("a vector takes it");
    frame
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Checksum, Frame, Transport};
    use super::*;

    fn craft() -> Craft {
        Craft::new([2, 0, 0, 0, 0, 1], [10, 0, 0, 4].into(), [2, 0, 0, 0, 0, 2], [192, 0, 2, 9].into())
    }

    #[test]
    fn crafted_frames_have_good_checksums() {
        let frames = [
            craft().udp(1000, 53, b"question"),
            craft().tcp(1001, 443, TcpFlags::SYN, 7, 0, b""),
            craft().tcp(1001, 443, TcpFlags::ACK, 8, 9, b"odd"),
            craft().echo_request(5, 1, b"echo"),
        ];
        for bytes in frames {
            let frame = Frame::parse(bytes);
            assert_eq!(frame.checksums().header, Checksum::Good, "{frame:?}");
            assert_eq!(frame.checksums().transport, Checksum::Good, "{frame:?}");
        }
    }

    #[test]
    fn a_partial_checksum_is_good_as_partial_and_bad_as_complete() {
        for mut bytes in [craft().udp(1000, 53, b"question"), craft().tcp(1, 2, TcpFlags::SYN, 7, 0, b"")] {
            let (start, offset) = Craft::make_partial(&mut bytes).expect("has a checksum");
            assert_eq!(start, 34);
            assert!(offset == 6 || offset == 16);
            let mut frame = Frame::parse(bytes);
            assert_eq!(frame.checksums().transport, Checksum::Bad);
            frame.partial = true;
            assert_eq!(frame.checksums().transport, Checksum::PartialGood);
        }
    }

    #[test]
    fn an_arp_request_is_read_back() {
        let frame = Frame::parse(Craft::arp_request([2; 6], [10, 0, 0, 4].into(), [10, 0, 0, 1].into()));
        let arp = frame.arp.expect("is ARP");
        assert_eq!((arp.operation, arp.sender, arp.target), (1, [10, 0, 0, 4].into(), [10, 0, 0, 1].into()));
        assert_eq!(frame.destination_mac, [0xff; 6]);
    }

    #[test]
    fn fields_of_a_crafted_segment_are_read_back() {
        let mut craft = craft();
        craft.identification = 77;
        let frame = Frame::parse(craft.tcp(1001, 443, TcpFlags::SYN_ACK, 7, 6, b"xyz"));
        let ip = frame.ip.as_ref().expect("is IP");
        assert_eq!((ip.identification, ip.ttl, ip.protocol), (77, 64, 6));
        let expected = Transport::Tcp {
            source_port: 1001,
            destination_port: 443,
            flags: TcpFlags::SYN_ACK,
            sequence: 7,
            acknowledgment: 6,
        };
        assert_eq!(ip.transport, expected);
        assert_eq!(frame.payload(), b"xyz");
    }
}
