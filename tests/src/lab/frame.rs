//! A frame seen on a device: what it says, and whether its checksums hold.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use etherparse::{LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};

use super::craft::{Mac, TcpFlags};

/// One recorded frame, lightly parsed. `Debug` prints it in a line.
#[derive(Clone)]
pub struct Frame {
    /// When the harness read it (not when it passed).
    pub at: Instant,
    /// Seen while leaving through the device rather than arriving on it. On one end of a veth, what leaves is
    /// what the namespace of this end sent.
    pub outgoing: bool,
    /// The transport checksum is not filled in yet (`TP_STATUS_CSUMNOTREADY`, `VIRTIO_NET_HDR_F_NEEDS_CSUM`):
    /// its field holds the sum of the pseudo header.
    pub partial: bool,
    /// Source hardware address.
    pub source_mac: Mac,
    /// Destination hardware address.
    pub destination_mac: Mac,
    /// VLAN id, if tagged, in the frame or beside it.
    pub vlan: Option<u16>,
    /// Set for ARP of IPv4 over Ethernet.
    pub arp: Option<Arp>,
    /// Set for IPv4 and IPv6.
    pub ip: Option<Ip>,
    /// All of it, from the Ethernet header on. Larger than the MTU where GRO or GSO merged segments.
    pub bytes: Vec<u8>,
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 request, 2 reply.
    pub operation: u16,
    pub sender_mac: Mac,
    pub sender: Ipv4Addr,
    pub target_mac: Mac,
    pub target: Ipv4Addr,
}

/// An IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// The protocol above, behind extension headers.
    pub protocol: u8,
    /// IPv4 identification; 0 for IPv6.
    pub identification: u16,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// A fragment, the first included.
    pub fragment: bool,
    /// What it carries.
    pub transport: Transport,
}

/// What an IP packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment.
    Tcp { source_port: u16, destination_port: u16, flags: TcpFlags, sequence: u32, acknowledgment: u32 },
    /// A UDP datagram.
    Udp { source_port: u16, destination_port: u16 },
    /// An ICMP or ICMPv6 message; `id` and `sequence` are the second word's halves, meaningful for echo.
    Icmp { kind: u8, code: u8, id: u16, sequence: u16 },
    /// A fragment (not looked into), another protocol, or one cut short.
    Other,
}

/// Whether a checksum holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It holds.
    Good,
    /// It does not: the receiver throws the packet away.
    Bad,
    /// Not filled in yet, and the sum of the pseudo header in its place is right.
    PartialGood,
    /// Not filled in yet, and the sum in its place is wrong: a local receiver would not notice, a NIC would
    /// send it broken.
    PartialBad,
    /// There is none: UDP over IPv4 without, IPv6 headers, fragments, other protocols.
    Absent,
}

impl Checksum {
    /// Neither bad nor partially bad.
    pub fn is_ok(self) -> bool {
        !matches!(self, Checksum::Bad | Checksum::PartialBad)
    }
}

/// The checksums of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksums {
    /// Of the IPv4 header.
    pub header: Checksum,
    /// Of TCP, UDP, ICMP or ICMPv6.
    pub transport: Checksum,
}

impl Frame {
    /// Reads a frame; what cannot be read is left `None` or `Other`.
    pub fn parse(bytes: Vec<u8>) -> Self {
        let mut frame = Frame {
            at: Instant::now(),
            outgoing: false,
            partial: false,
            source_mac: [0; 6],
            destination_mac: [0; 6],
            vlan: None,
            arp: None,
            ip: None,
            bytes: Vec::new(),
        };
        if let Ok(sliced) = LaxSlicedPacket::from_ethernet(&bytes) {
            if let Some(LinkSlice::Ethernet2(ethernet)) = &sliced.link {
                frame.source_mac = ethernet.source();
                frame.destination_mac = ethernet.destination();
            }
            frame.vlan = sliced.vlan_ids().first().map(|id| id.value());
            match &sliced.net {
                Some(LaxNetSlice::Arp(arp)) => frame.arp = read_arp(arp),
                Some(LaxNetSlice::Ipv4(ipv4)) => {
                    let header = ipv4.header();
                    frame.ip = Some(Ip {
                        source: header.source_addr().into(),
                        destination: header.destination_addr().into(),
                        protocol: ipv4.payload().ip_number.0,
                        identification: header.identification(),
                        ttl: header.ttl(),
                        fragment: ipv4.is_payload_fragmented(),
                        transport: read_transport(sliced.transport.as_ref()),
                    });
                }
                Some(LaxNetSlice::Ipv6(ipv6)) => {
                    let header = ipv6.header();
                    frame.ip = Some(Ip {
                        source: header.source_addr().into(),
                        destination: header.destination_addr().into(),
                        protocol: ipv6.payload().ip_number.0,
                        identification: 0,
                        ttl: header.hop_limit(),
                        fragment: ipv6.is_payload_fragmented(),
                        transport: read_transport(sliced.transport.as_ref()),
                    });
                }
                None => {}
            }
        }
        frame.bytes = bytes;
        frame
    }

    /// Source address and port of TCP and UDP.
    pub fn source(&self) -> Option<SocketAddr> {
        let ip = self.ip.as_ref()?;
        match ip.transport {
            Transport::Tcp { source_port, .. } | Transport::Udp { source_port, .. } => {
                Some(SocketAddr::new(ip.source, source_port))
            }
            _ => None,
        }
    }

    /// Destination address and port of TCP and UDP.
    pub fn destination(&self) -> Option<SocketAddr> {
        let ip = self.ip.as_ref()?;
        match ip.transport {
            Transport::Tcp { destination_port, .. } | Transport::Udp { destination_port, .. } => {
                Some(SocketAddr::new(ip.destination, destination_port))
            }
            _ => None,
        }
    }

    /// Whether it is TCP with these flags and no other of the five.
    pub fn is_tcp_with(&self, wanted: TcpFlags) -> bool {
        matches!(&self.ip, Some(Ip { transport: Transport::Tcp { flags, .. }, .. }) if *flags == wanted)
    }

    /// What TCP, UDP or ICMP carry; empty for everything else.
    pub fn payload(&self) -> &[u8] {
        match LaxSlicedPacket::from_ethernet(&self.bytes).ok().and_then(|sliced| sliced.transport) {
            Some(TransportSlice::Tcp(tcp)) => self.subslice(tcp.payload()),
            Some(TransportSlice::Udp(udp)) => self.subslice(udp.payload()),
            Some(TransportSlice::Icmpv4(icmp)) => self.subslice(icmp.payload()),
            Some(TransportSlice::Icmpv6(icmp)) => self.subslice(icmp.payload()),
            _ => &[],
        }
    }

    /// Verifies the IPv4 header's checksum and the transport's, the latter as partial if the frame is.
    pub fn checksums(&self) -> Checksums {
        let header = match LaxSlicedPacket::from_ethernet(&self.bytes).ok().and_then(|sliced| sliced.net) {
            Some(LaxNetSlice::Ipv4(ipv4)) if fold(sum(ipv4.header().slice())) == 0xffff => Checksum::Good,
            Some(LaxNetSlice::Ipv4(_)) => Checksum::Bad,
            _ => Checksum::Absent,
        };
        Checksums { header, transport: self.transport_checksum() }
    }

    /// Whether no checksum is wrong, complete or partial.
    pub fn checksums_ok(&self) -> bool {
        let Checksums { header, transport } = self.checksums();
        header.is_ok() && transport.is_ok()
    }

    fn transport_checksum(&self) -> Checksum {
        let Some(place) = locate_l4(&self.bytes) else { return Checksum::Absent };
        let segment = &self.bytes[place.start..place.start + place.length];
        let at = place.checksum_offset;
        let stored = u16::from_be_bytes([segment[at], segment[at + 1]]);
        // ICMP is always complete, whatever the frame's flag says about another header.
        if self.partial && place.can_be_partial {
            return if stored == place.pseudo_header { Checksum::PartialGood } else { Checksum::PartialBad };
        }
        if place.zero_is_none && stored == 0 {
            return Checksum::Absent;
        }
        let total = fold(sum(segment) + u64::from(place.pseudo_header));
        if total == 0xffff { Checksum::Good } else { Checksum::Bad }
    }

    /// The same bytes, borrowed from `self` rather than from the parse.
    fn subslice(&self, part: &[u8]) -> &[u8] {
        let start = part.as_ptr() as usize - self.bytes.as_ptr() as usize;
        &self.bytes[start..start + part.len()]
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} bytes", if self.outgoing { "out " } else { "in " }, self.bytes.len())?;
        if let Some(vlan) = self.vlan {
            write!(f, " vlan {vlan}")?;
        }
        if let Some(arp) = &self.arp {
            return write!(f, " {arp:?}");
        }
        let Some(ip) = &self.ip else {
            return write!(f, " {:02x?}", self.bytes.get(..32).unwrap_or(&self.bytes));
        };
        match (self.source(), self.destination()) {
            (Some(source), Some(destination)) => write!(f, " {source} > {destination}")?,
            _ => write!(f, " {} > {}", ip.source, ip.destination)?,
        }
        let fragment = if ip.fragment { " fragment" } else { "" };
        write!(f, " protocol {} id {}{fragment} {:?}", ip.protocol, ip.identification, ip.transport)?;
        let Checksums { header, transport } = self.checksums();
        write!(f, " checksums {header:?}/{transport:?}")
    }
}

fn read_arp(arp: &etherparse::ArpPacketSlice<'_>) -> Option<Arp> {
    Some(Arp {
        operation: arp.operation().0,
        sender_mac: arp.sender_hw_addr().try_into().ok()?,
        sender: <[u8; 4]>::try_from(arp.sender_protocol_addr()).ok()?.into(),
        target_mac: arp.target_hw_addr().try_into().ok()?,
        target: <[u8; 4]>::try_from(arp.target_protocol_addr()).ok()?.into(),
    })
}

fn read_transport(transport: Option<&TransportSlice<'_>>) -> Transport {
    let echo =
        |bytes: [u8; 4]| (u16::from_be_bytes([bytes[0], bytes[1]]), u16::from_be_bytes([bytes[2], bytes[3]]));
    match transport {
        Some(TransportSlice::Tcp(tcp)) => Transport::Tcp {
            source_port: tcp.source_port(),
            destination_port: tcp.destination_port(),
            flags: TcpFlags {
                syn: tcp.syn(),
                ack: tcp.ack(),
                fin: tcp.fin(),
                rst: tcp.rst(),
                psh: tcp.psh(),
                urg: tcp.urg(),
            },
            sequence: tcp.sequence_number(),
            acknowledgment: tcp.acknowledgment_number(),
        },
        Some(TransportSlice::Udp(udp)) => {
            Transport::Udp { source_port: udp.source_port(), destination_port: udp.destination_port() }
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            let (id, sequence) = echo(icmp.bytes5to8());
            Transport::Icmp { kind: icmp.type_u8(), code: icmp.code_u8(), id, sequence }
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let (id, sequence) = echo(icmp.bytes5to8());
            Transport::Icmp { kind: icmp.type_u8(), code: icmp.code_u8(), id, sequence }
        }
        _ => Transport::Other,
    }
}

/// Where the transport header of a frame is, and what its checksum covers.
pub(super) struct L4Place {
    /// From the beginning of the frame.
    pub start: usize,
    /// Header and payload, in bytes.
    pub length: usize,
    /// From `start`.
    pub checksum_offset: usize,
    /// Folded sum of the pseudo header, not complemented; 0 for ICMP, which has none.
    pub pseudo_header: u16,
    zero_is_none: bool,
    can_be_partial: bool,
}

/// Finds the transport checksum of a frame; `None` for fragments, other protocols and frames cut short.
pub(super) fn locate_l4(frame: &[u8]) -> Option<L4Place> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let (segment, protocol, checksum_offset) = match sliced.transport.as_ref()? {
        TransportSlice::Tcp(tcp) => (tcp.slice(), 6u8, 16),
        TransportSlice::Udp(udp) => (udp.slice(), 17, 6),
        TransportSlice::Icmpv4(icmp) => (icmp.slice(), 1, 2),
        TransportSlice::Icmpv6(icmp) => (icmp.slice(), 58, 2),
        _ => return None,
    };
    let (addresses, payload) = match sliced.net.as_ref()? {
        LaxNetSlice::Ipv4(ipv4) => {
            let header = ipv4.header();
            (sum(&header.source()) + sum(&header.destination()), ipv4.payload())
        }
        LaxNetSlice::Ipv6(ipv6) => {
            let header = ipv6.header();
            (sum(&header.source()) + sum(&header.destination()), ipv6.payload())
        }
        LaxNetSlice::Arp(_) => return None,
    };
    if payload.fragmented || payload.incomplete {
        return None;
    }
    let covered = segment.len() as u64;
    let pseudo_header = if protocol == 1 { 0 } else { fold(addresses + u64::from(protocol) + covered) };
    Some(L4Place {
        start: segment.as_ptr() as usize - frame.as_ptr() as usize,
        length: segment.len(),
        checksum_offset,
        pseudo_header,
        zero_is_none: protocol == 17,
        can_be_partial: matches!(protocol, 6 | 17),
    })
}

/// Sum of big-endian 16-bit words, an odd last byte padded with zero (RFC 1071).
fn sum(bytes: &[u8]) -> u64 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let words: u64 = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum();
    words + rest.first().map_or(0, |last| u64::from(*last) << 8)
}

/// Folds the carries of a sum back in until 16 bits remain.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
