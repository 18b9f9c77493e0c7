//! The packet that is sent through the engine: the first of its flow.

use std::net::Ipv4Addr;

use crate::api::Protocol;

/// What is in it.
#[derive(Debug, Clone, Copy)]
pub struct Contents {
    pub source_mac: [u8; 6],
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub destination: Ipv4Addr,
    pub destination_port: u16,
    pub protocol: Protocol,
}

/// A TCP SYN, a UDP datagram without data, or an echo request (whose identifier is the source port).
///
/// Transport checksums are left zero: the engine updates them and never checks them.
pub fn build(contents: &Contents) -> Vec<u8> {
    let transport: Vec<u8> = match contents.protocol {
        Protocol::Tcp => {
            let mut tcp = vec![0; 20];
            tcp[..2].copy_from_slice(&contents.source_port.to_be_bytes());
            tcp[2..4].copy_from_slice(&contents.destination_port.to_be_bytes());
            // Five words of header; SYN.
            tcp[12] = 5 << 4;
            tcp[13] = 0x02;
            tcp
        }
        Protocol::Udp => {
            let mut udp = vec![0; 8];
            udp[..2].copy_from_slice(&contents.source_port.to_be_bytes());
            udp[2..4].copy_from_slice(&contents.destination_port.to_be_bytes());
            udp[4..6].copy_from_slice(&8u16.to_be_bytes());
            udp
        }
        Protocol::Icmp => {
            let mut icmp = vec![0; 8];
            icmp[0] = 8;
            icmp[4..6].copy_from_slice(&contents.source_port.to_be_bytes());
            icmp
        }
    };
    let mut frame = Vec::with_capacity(14 + 20 + transport.len());
    frame.extend([0x02, 0, 0, 0, 0, 0xfe]);
    frame.extend(contents.source_mac);
    frame.extend(0x0800u16.to_be_bytes());
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&(20 + transport.len() as u16).to_be_bytes());
    ip[8] = 64;
    ip[9] = contents.protocol.number();
    ip[12..16].copy_from_slice(&contents.source.octets());
    ip[16..20].copy_from_slice(&contents.destination.octets());
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(ip);
    frame.extend(transport);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packet_has_a_valid_ip_header_and_the_lengths_fit() {
        for (protocol, length) in [(Protocol::Tcp, 54), (Protocol::Udp, 42), (Protocol::Icmp, 42)] {
            let frame = build(&Contents {
                source_mac: [2, 0, 0, 0, 0, 1],
                source: [10, 0, 1, 4].into(),
                source_port: 40000,
                destination: [203, 0, 113, 100].into(),
                destination_port: 443,
                protocol,
            });
            assert_eq!(frame.len(), length);
            let sum: u32 =
                frame[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
            assert_eq!(frame[23], protocol.number());
        }
    }
}
