//! The packet that is sent through the engine: the first of its flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Ethernet's header.
pub const LINK: usize = 14;

/// What is in it. Both addresses are of one family.
#[derive(Debug, Clone, Copy)]
pub struct Contents {
    pub source_mac: [u8; 6],
    /// That of the device the frame arrives on: what is for others there is left alone.
    pub destination_mac: [u8; 6],
    pub source: IpAddr,
    /// Identifier of an echo request; without meaning for protocols that have no ports.
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// IANA protocol number.
    pub protocol: u8,
}

/// Addresses and ports, as in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
}

/// A TCP SYN, a UDP datagram without data, an echo request, or eight bytes of any other protocol.
///
/// Transport checksums are left zero: the engine updates them and never checks them.
pub fn build(contents: &Contents) -> Vec<u8> {
    let transport = transport(contents);
    let mut frame = Vec::with_capacity(LINK + 40 + transport.len());
    frame.extend(contents.destination_mac);
    frame.extend(contents.source_mac);
    match (contents.source, contents.destination) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend(0x86ddu16.to_be_bytes());
            frame.extend(header6(source, destination, contents.protocol, transport.len() as u16));
        }
        (source, destination) => {
            frame.extend(0x0800u16.to_be_bytes());
            let [source, destination] = [source, destination].map(|address| match address {
                IpAddr::V4(address) => address,
                // Questions of two families are refused before a packet is made of them.
                IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
            });
            frame.extend(header4(source, destination, contents.protocol, transport.len() as u16));
        }
    }
    frame.extend(transport);
    frame
}

fn transport(contents: &Contents) -> Vec<u8> {
    let mut bytes = vec![0; if contents.protocol == 6 { 20 } else { 8 }];
    if matches!(contents.protocol, 6 | 17) {
        bytes[..2].copy_from_slice(&contents.source_port.to_be_bytes());
        bytes[2..4].copy_from_slice(&contents.destination_port.to_be_bytes());
    }
    match contents.protocol {
        6 => {
            // Five words of header; SYN.
            bytes[12] = 5 << 4;
            bytes[13] = 0x02;
        }
        17 => bytes[4..6].copy_from_slice(&8u16.to_be_bytes()),
        1 | 58 => {
            bytes[0] = if contents.protocol == 1 { 8 } else { 128 };
            bytes[4..6].copy_from_slice(&contents.source_port.to_be_bytes());
        }
        _ => {}
    }
    bytes
}

fn header4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: u16) -> [u8; 20] {
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&(20 + payload).to_be_bytes());
    ip[8] = 64;
    ip[9] = protocol;
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..20].copy_from_slice(&destination.octets());
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    ip
}

fn header6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: u16) -> [u8; 40] {
    let mut ip = [0u8; 40];
    ip[0] = 0x60;
    ip[4..6].copy_from_slice(&payload.to_be_bytes());
    ip[6] = protocol;
    ip[7] = 64;
    ip[8..24].copy_from_slice(&source.octets());
    ip[24..40].copy_from_slice(&destination.octets());
    ip
}

/// Reads a frame that [`build`] made and a program may have translated; `None` if it is none of those.
pub fn read(frame: &[u8], protocol: u8) -> Option<Tuple> {
    let (source, destination, l4) = if frame.get(12..14)? == [0x86, 0xdd] {
        let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
        (address(LINK + 8)?, address(LINK + 24)?, LINK + 40)
    } else {
        let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
        (address(LINK + 12)?, address(LINK + 16)?, LINK + 20)
    };
    let word = |at: usize| Some(u16::from_be_bytes(<[u8; 2]>::try_from(frame.get(at..at + 2)?).ok()?));
    let (source_port, destination_port) = match protocol {
        6 | 17 => (word(l4)?, word(l4 + 2)?),
        1 | 58 => (word(l4 + 4)?, 0),
        _ => (0, 0),
    };
    Some(Tuple { source, source_port, destination, destination_port })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(v6: bool, protocol: u8) -> Contents {
        let address = |four: &str, six: &str| if v6 { six } else { four }.parse().unwrap();
        Contents {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source: address("10.0.1.4", "fd00::4"),
            source_port: 40000,
            destination: address("203.0.113.100", "fd00::5"),
            destination_port: 443,
            protocol,
        }
    }

    #[test]
    fn the_packet_has_a_valid_ip_header_and_the_lengths_fit() {
        for (protocol, length) in [(6, 54), (17, 42), (1, 42), (50, 42), (132, 42)] {
            let frame = build(&contents(false, protocol));
            assert_eq!(frame.len(), length);
            let sum: u32 =
                frame[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
            assert_eq!(frame[23], protocol);
        }
        for (protocol, length) in [(6, 74), (17, 62), (58, 62), (51, 62), (132, 62)] {
            let frame = build(&contents(true, protocol));
            assert_eq!((frame.len(), &frame[12..15]), (length, &[0x86, 0xdd, 0x60][..]));
            assert_eq!(usize::from(u16::from_be_bytes([frame[18], frame[19]])), length - 54);
            assert_eq!(frame[20], protocol);
        }
    }

    #[test]
    fn a_packet_reads_back_as_what_it_was_made_of() {
        for v6 in [false, true] {
            for protocol in [6, 17, if v6 { 58 } else { 1 }, 50] {
                let contents = contents(v6, protocol);
                let tuple = read(&build(&contents), protocol).unwrap();
                assert_eq!((tuple.source, tuple.destination), (contents.source, contents.destination));
                let ports = match protocol {
                    6 | 17 => (40000, 443),
                    50 => (0, 0),
                    _ => (40000, 0),
                };
                assert_eq!((tuple.source_port, tuple.destination_port), ports, "{protocol}");
            }
        }
        assert_eq!(read(&[0; 20], 6), None);
    }
}
