//! IPv6 frames, as [`super::Craft`] makes IPv4 ones; neighbour discovery among them.

use std::net::Ipv6Addr;

use etherparse::{IpHeaders, Ipv6Extensions, Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader, ip_number};

use super::craft::{Mac, TcpFlags};

/// Who sends to whom. Fields may be changed before a frame is made; a made frame has complete checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Craft6 {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: Ipv6Addr,
    pub destination: Ipv6Addr,
    /// 64 unless changed; 255 in neighbour discovery.
    pub hop_limit: u8,
    /// Extension headers between the IPv6 header and the transport: (own protocol number, bytes with the "next header"
    /// field to be filled in). Empty unless changed.
    pub extensions: Vec<(u8, Vec<u8>)>,
}

/// The all-nodes group.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

impl Craft6 {
    /// Frames from one address to another, over the link between two hardware addresses.
    pub fn new(source_mac: Mac, source: Ipv6Addr, destination_mac: Mac, destination: Ipv6Addr) -> Self {
        Craft6 { source_mac, destination_mac, source, destination, hop_limit: 64, extensions: Vec::new() }
    }

    /// A UDP datagram.
    ///
    /// # Panics
    /// All of these do if the payload does not fit an IPv6 packet.
    pub fn udp(&self, source_port: u16, destination_port: u16, payload: &[u8]) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(self.hop_limit))
            .udp(source_port, destination_port);
        self.extend(write(|frame| step.write(frame, payload)))
    }

    /// A TCP segment with a window of 64,240 bytes and no options.
    pub fn tcp(&self, source_port: u16, destination_port: u16, flags: TcpFlags, sequence: u32) -> Vec<u8> {
        self.segment(source_port, destination_port, flags, sequence, 0, b"")
    }

    /// The same with an acknowledgement and data.
    pub fn segment(
        &self,
        source_port: u16,
        destination_port: u16,
        flags: TcpFlags,
        sequence: u32,
        acknowledgment: u32,
        payload: &[u8],
    ) -> Vec<u8> {
        let mut header = TcpHeader::new(source_port, destination_port, sequence, 64_240);
        (header.syn, header.ack, header.fin) = (flags.syn, flags.ack, flags.fin);
        (header.rst, header.psh, header.urg) = (flags.rst, flags.psh, flags.urg);
        header.acknowledgment_number = acknowledgment;
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(self.hop_limit))
            .tcp_header(header);
        self.extend(write(|frame| step.write(frame, payload)))
    }

    /// An ICMPv6 echo request.
    pub fn echo_request(&self, id: u16, sequence: u16) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(self.hop_limit))
            .icmpv6_echo_request(id, sequence);
        self.extend(write(|frame| step.write(frame, b"echo")))
    }

    /// An ICMPv6 echo reply.
    pub fn echo_reply(&self, id: u16, sequence: u16) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(self.hop_limit))
            .icmpv6_echo_reply(id, sequence);
        self.extend(write(|frame| step.write(frame, b"echo")))
    }

    /// An ICMPv6 message of any kind; `rest` is the second word of its header.
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let hop_limit = if (133..=137).contains(&kind) { 255 } else { self.hop_limit };
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(hop_limit))
            .icmpv6_raw(kind, code, rest);
        self.extend(write(|frame| step.write(frame, payload)))
    }

    /// A packet of any protocol.
    pub fn protocol(&self, number: u8, payload: &[u8]) -> Vec<u8> {
        let step = PacketBuilder::ethernet2(self.source_mac, self.destination_mac)
            .ip(self.ip_headers(self.hop_limit));
        self.extend(write(|frame| step.write(frame, number.into(), payload)))
    }

    /// A neighbour solicitation for `target`, with the sender's hardware address as option if given.
    pub fn solicitation(&self, target: Ipv6Addr, mac: Option<Mac>) -> Vec<u8> {
        self.icmp(135, 0, [0; 4], &neighbour(target, 1, mac))
    }

    /// A neighbour advertisement about `target`.
    pub fn advertisement(&self, target: Ipv6Addr, mac: Option<Mac>) -> Vec<u8> {
        self.icmp(136, 0, [0x60, 0, 0, 0], &neighbour(target, 2, mac))
    }

    fn ip_headers(&self, hop_limit: u8) -> IpHeaders {
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            // Length and next header are the builder's.
            payload_length: 0,
            next_header: ip_number::UDP,
            hop_limit,
            source: self.source.octets(),
            destination: self.destination.octets(),
        };
        IpHeaders::Ipv6(header, Ipv6Extensions::default())
    }

    /// Puts the extension headers in.
    fn extend(&self, mut frame: Vec<u8>) -> Vec<u8> {
        let mut protocol = frame[20];
        let mut chain = Vec::new();
        for (own, bytes) in self.extensions.iter().rev() {
            let mut header = bytes.clone();
            header[0] = protocol;
            header.append(&mut chain);
            chain = header;
            protocol = *own;
        }
        frame[20] = protocol;
        let length = u16::from_be_bytes([frame[18], frame[19]]) + chain.len() as u16;
        frame[18..20].copy_from_slice(&length.to_be_bytes());
        frame.splice(54..54, chain);
        frame
    }
}

fn neighbour(target: Ipv6Addr, option: u8, mac: Option<Mac>) -> Vec<u8> {
    let mut payload = target.octets().to_vec();
    if let Some(mac) = mac {
        payload.extend([option, 1]);
        payload.extend(mac);
    }
    payload
}

fn write<E: std::fmt::Debug>(put: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut frame = Vec::new();
    put(&mut frame).expect("the payload fits");
    frame
}

/// The group an address listens to for solicitations (RFC 4291 §2.7.1), and its hardware address.
pub fn solicited_node(address: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = address.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    (group, [0x33, 0x33, 0xff, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Checksum, Frame};
    use super::*;

    #[test]
    fn crafted_frames_have_good_checksums_behind_extension_headers_too() {
        let (a, b) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        let mut craft = Craft6::new([2; 6], a, [4; 6], b);
        for extensions in
            [vec![], vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 0, 1, 4, 0, 0, 0, 0])]]
        {
            craft.extensions = extensions;
            for bytes in [
                craft.udp(1, 2, b"odd"),
                craft.tcp(1, 2, TcpFlags::SYN, 3),
                craft.echo_request(1, 1),
                craft.solicitation(b, Some([2; 6])),
            ] {
                let frame = Frame::parse(bytes);
                assert_eq!(frame.checksums().transport, Checksum::Good, "{frame:?}");
            }
        }
    }
}
