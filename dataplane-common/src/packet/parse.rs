//! From bytes to a [`Context`]: Ethernet with up to two tags, IPv4 with options, ports or echo identifier.

use super::headers::*;
use super::wire::{load16, load32};
use super::{Packet, at};
use core::mem::offset_of;

use crate::engine::Context;
use crate::family::Family;
use crate::layout::{FlowKey, KIND_FLOW, KIND_PORTLESS};
use crate::reason::Reason;

/// What the Ethernet header announced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layer3 {
    Ipv4,
    Arp,
    Ipv6,
    Other,
}

/// `Context::shape` bits.
pub const SHAPE_VLAN: u16 = 1;
pub const SHAPE_FRAGMENT: u16 = 2;
/// An ICMP error: it quotes the packet it is about.
pub const SHAPE_ICMP_ERROR: u16 = 4;
/// ICMP that is meant for its own link and is no neighbour discovery: never forwarded.
pub const SHAPE_ICMP_LINK: u16 = 8;
/// The packet opens a conversation: TCP SYN without ACK, an ICMP query, or a protocol without a handshake.
pub const SHAPE_OPENS: u16 = 16;
/// A fragment without the transport header: there are no ports in it to read or write.
pub const SHAPE_LATER: u16 = 64;
/// Neighbour discovery and multicast listeners: ICMPv6 that never leaves the link.
pub const SHAPE_ND: u16 = 32;
/// The first of several fragments; once it has been sent its datagram is noted.
pub const SHAPE_FIRST: u16 = 128;

/// The six flags of RFC 9293 §3.1; those of explicit congestion notification are not looked at.
const FLAGS: u8 = 0x3f;

/// The combinations of flags that a TCP sends (as netfilter has them); PSH may be on all. No flags, FIN without ACK, SYN with FIN
/// or RST, URG alone and all the rest are probes and evasions, never a connection.
const VALID: u64 = 1 << SYN
    | 1 << (SYN | URG)
    | 1 << (SYN | ACK)
    | 1 << RST
    | 1 << (RST | ACK)
    | 1 << (FIN | ACK)
    | 1 << (FIN | ACK | URG)
    | 1 << ACK
    | 1 << (ACK | URG);

#[inline(always)]
const fn valid(flags: u8) -> bool {
    VALID >> (flags & FLAGS & !PSH) & 1 != 0
}

/// TCP with flags that no TCP sends, from outside: dropped if it is for us.
pub const SHAPE_FLAGS: u16 = 256;

/// Offsets are kept in the scratch context between programs, where the verifier forgets their range: these masks
/// bring it back. 14 + 2·4 is the longest way to the IP header, 60 bytes the longest IP header.
#[inline(always)]
pub fn l3_offset(ctx: &Context) -> usize {
    (ctx.l3 & 0x1f) as usize
}

/// See [`l3_offset`]; behind IPv6 extension headers it is further.
#[inline(always)]
pub fn l4_offset(ctx: &Context) -> usize {
    (ctx.l4 & 0xff) as usize
}

/// Whom a frame is for: a hardware address as the first four of its bytes and the last two, as they stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Station(pub u32, pub u16);

impl Station {
    pub const fn new(mac: [u8; 6]) -> Self {
        Self(u32::from_ne_bytes([mac[0], mac[1], mac[2], mac[3]]), u16::from_ne_bytes([mac[4], mac[5]]))
    }

    /// Is the frame for a group, or for all?
    #[inline(always)]
    pub const fn group(self) -> bool {
        self.0 & Self::new([1, 0, 0, 0, 0, 0]).0 != 0
    }

    /// Is the frame of a protocol between neighbouring bridges or ports (IEEE 802.1D table 7-10, 802.1AB §7.1): spanning tree,
    /// LLDP, LACP, 802.1X?
    #[inline(always)]
    pub const fn link_local(self) -> bool {
        let Self(first, last) = Self::new([0x01, 0x80, 0xc2, 0, 0, 0]);
        self.0 == first && self.1 & u16::from_ne_bytes([0xff, 0xf0]) == last
    }
}

/// Reads the Ethernet header and up to two tags: what the frame carries, and whom it is for. `None`: shorter than an Ethernet
/// header.
#[inline(always)]
pub fn ethernet(packet: &impl Packet, ctx: &mut Context) -> Option<(Layer3, Station)> {
    let header = at::<Ethernet>(packet, 0)?;
    // SAFETY: `at` checked the bounds.
    let (mut ethertype, station) = unsafe {
        copy_mac(&raw mut ctx.source_mac, &raw const (*header).source);
        let station = Station(load32::<0, _>(header), load16::<4, _>(header));
        (u16::from_be(load16::<{ offset_of!(Ethernet, ethertype) }, _>(header)), station)
    };
    let mut offset = size_of::<Ethernet>();
    ctx.shape = if packet.vlan_offloaded() { SHAPE_VLAN } else { 0 };
    for _ in 0..2 {
        if ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ {
            let tag = at::<Vlan>(packet, offset)?;
            // SAFETY: as above.
            ethertype = u16::from_be(unsafe { load16::<{ offset_of!(Vlan, ethertype) }, _>(tag) });
            offset += size_of::<Vlan>();
            ctx.shape |= SHAPE_VLAN;
        }
    }
    ctx.l3 = offset as u16;
    let layer3 = match ethertype {
        ETHERTYPE_IPV4 => Layer3::Ipv4,
        ETHERTYPE_ARP => Layer3::Arp,
        ETHERTYPE_IPV6 => Layer3::Ipv6,
        _ => Layer3::Other,
    };
    Some((layer3, station))
}

/// Reads the IPv4 header and the transport header's first bytes into `ctx.key`, without a network.
///
/// For a fragment only the addresses and the protocol are filled in (its payload is never read as ports), for ICMP
/// without an identifier likewise.
#[inline(always)]
pub fn ipv4(packet: &impl Packet, ctx: &mut Context) -> Result<(), Reason> {
    let l3 = l3_offset(ctx);
    let ip = at::<Ipv4>(packet, l3).ok_or(Reason::Malformed)?;
    // SAFETY: `at` checked the bounds.
    let (header, total, fragment, source, destination) = unsafe {
        (
            &*ip,
            load16::<{ offset_of!(Ipv4, total_length) }, _>(ip),
            load16::<{ offset_of!(Ipv4, fragment) }, _>(ip),
            load32::<{ offset_of!(Ipv4, source) }, _>(ip),
            load32::<{ offset_of!(Ipv4, destination) }, _>(ip),
        )
    };
    let ihl = ((header.version_ihl & 0x0f) as usize) << 2;
    let total = u16::from_be(total) as u32;
    if header.version_ihl >> 4 != 4 || ihl < size_of::<Ipv4>() {
        return Err(Reason::Malformed);
    }
    // A GSO packet's total length may exceed what is announced per segment, never fall short of the header.
    if total < ihl as u32 || !reaches(packet, ctx, l3 as u32 + total) {
        return Err(Reason::Malformed);
    }
    let l4 = l3 + ihl;
    ctx.l4 = l4 as u16;
    ctx.ttl = header.ttl;
    ctx.tcp_flags = 0;
    ctx.tcp_ack = 0;
    let protocol = header.protocol;
    ctx.key = FlowKey {
        source,
        destination,
        source_port: 0,
        destination_port: 0,
        network: 0,
        protocol,
        kind: KIND_FLOW,
    };
    if fragment & u16::to_be(0x3fff) != 0 {
        ctx.shape |= SHAPE_FRAGMENT;
        let field = u16::from_be(fragment);
        ctx.fragment_id = header.id as u32;
        ctx.fragment = (field & 0x1fff) | (field & 0x2000) << 2;
        ctx.fragment_length = (total - ihl as u32) as u16;
        return Ok(());
    }
    let payload = total - ihl as u32;
    if protocol == ICMP { icmp(packet, ctx, l4, payload) } else { transport(packet, ctx, l4, payload) }
}

/// Is the packet as long as its header says? What is in further buffers is only counted when it matters.
#[inline(always)]
pub(crate) fn reaches(packet: &impl Packet, ctx: &mut Context, end: u32) -> bool {
    if end > ctx.length {
        ctx.length = packet.length();
    }
    end <= ctx.length
}

#[inline(always)]
pub(crate) fn icmp(packet: &impl Packet, ctx: &mut Context, l4: usize, payload: u32) -> Result<(), Reason> {
    let icmp = at::<Icmp>(packet, l4).ok_or(Reason::Malformed)?;
    if payload < size_of::<Icmp>() as u32 {
        return Err(Reason::Malformed);
    }
    // SAFETY: `at` checked the bounds.
    let icmp = unsafe { &*icmp };
    ctx.shape |= icmp_message(icmp, &mut ctx.key);
    Ok(())
}

/// What an ICMP message is to a flow: its identifier, put into the key, and its shape. Timestamps and masks have their identifier
/// where echo has it (RFC 792, RFC 950), and share it with echo (RFC 5508 §3: ICMP queries). Information is obsolete, and does not
/// leave its link (RFC 5508 REQ-10c, RFC 6918).
#[inline(always)]
pub(crate) fn icmp_message(icmp: &Icmp, key: &mut FlowKey) -> u16 {
    match icmp.kind {
        ECHO_REQUEST | 13 | 17 => {
            key.source_port = icmp.id;
            SHAPE_OPENS
        }
        ECHO_REPLY | 14 | 18 => {
            key.destination_port = icmp.id;
            0
        }
        3 | 4 | 5 | 11 | 12 => SHAPE_ICMP_ERROR,
        // Router discovery (RFC 1256).
        9 | 10 | 15 | 16 => SHAPE_ICMP_LINK,
        _ => {
            key.kind = KIND_PORTLESS;
            SHAPE_OPENS
        }
    }
}

/// Reads ports and flags of `ctx.key.protocol` at `l4`, with `payload` bytes there; protocols without ports have 0.
#[inline(always)]
pub(crate) fn transport(
    packet: &impl Packet,
    ctx: &mut Context,
    l4: usize,
    payload: u32,
) -> Result<(), Reason> {
    match ctx.key.protocol {
        TCP => {
            let tcp = at::<Tcp>(packet, l4).ok_or(Reason::Malformed)?;
            if payload < size_of::<Tcp>() as u32 {
                return Err(Reason::Malformed);
            }
            // SAFETY: `at` checked the bounds.
            let (flags, header) = unsafe {
                ctx.key.source_port = load16::<{ offset_of!(Tcp, source) }, _>(tcp);
                ctx.key.destination_port = load16::<{ offset_of!(Tcp, destination) }, _>(tcp);
                ctx.tcp_ack = load32::<{ offset_of!(Tcp, acknowledgement) }, _>(tcp);
                ((*tcp).flags & FLAGS, ((*tcp).offset as u32 >> 4) << 2)
            };
            ctx.tcp_flags = flags;
            // What is neither data nor its acknowledgement.
            if flags & !PSH != ACK {
                if !valid(flags) {
                    return Err(Reason::TcpFlags);
                }
                // SAFETY: as above.
                let sequence = u32::from_be(unsafe { load32::<{ offset_of!(Tcp, sequence) }, _>(tcp) });
                let counted = (flags & (SYN | FIN) != 0) as u32;
                ctx.tcp_sequence = sequence;
                ctx.tcp_end = sequence.wrapping_add(payload.saturating_sub(header)).wrapping_add(counted);
                if flags & (SYN | ACK) == SYN {
                    ctx.shape |= SHAPE_OPENS;
                }
            }
        }
        UDP => {
            let udp = at::<Udp>(packet, l4).ok_or(Reason::Malformed)?;
            if payload < size_of::<Udp>() as u32 {
                return Err(Reason::Malformed);
            }
            // SAFETY: `at` checked the bounds.
            unsafe {
                ctx.key.source_port = load16::<{ offset_of!(Udp, source) }, _>(udp);
                ctx.key.destination_port = load16::<{ offset_of!(Udp, destination) }, _>(udp);
            }
            ctx.shape |= SHAPE_OPENS;
        }
        _ => ctx.shape |= SHAPE_OPENS,
    }
    Ok(())
}

/// Why the packet, or each segment it will be cut into, cannot go over a link that takes `mtu` bytes of it: [`Reason::TooBig`], its
/// sender is told; [`Reason::Fragmented`], it may be fragmented, and nobody has to be asked (RFC 791 §3.2). `None`: it fits, or
/// the MTU is not known (0).
#[inline(always)]
pub(crate) fn too_big<F: Family>(packet: &impl Packet, ctx: &Context, mtu: u32) -> Option<Reason> {
    if mtu == 0 {
        return None;
    }
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let segment = packet.segment();
    if segment == 0 {
        if F::V6 {
            return Some(Reason::TooBig);
        }
        let ip = at::<Ipv4>(packet, l3)?;
        // What is longer than the IP packet is padding.
        // SAFETY: `at` checked the bounds.
        let (total, fragment) = unsafe {
            (
                u16::from_be(load16::<{ offset_of!(Ipv4, total_length) }, _>(ip)) as u32,
                load16::<{ offset_of!(Ipv4, fragment) }, _>(ip),
            )
        };
        return match fragment & 0x4000_u16.to_be() {
            _ if total <= mtu => None,
            0 => Some(Reason::Fragmented),
            _ => Some(Reason::TooBig),
        };
    }
    let header = if ctx.shape & SHAPE_LATER != 0 {
        0
    } else if ctx.key.protocol == TCP {
        let tcp = at::<Tcp>(packet, l4)?;
        // SAFETY: as above.
        unsafe { (*tcp).offset as u32 >> 4 << 2 }
    } else {
        size_of::<Udp>() as u32
    };
    // Segments are made behind the last program, so they cannot be fragmented here: their sender makes shorter ones.
    if (l4 - l3) as u32 + header + segment > mtu { Some(Reason::TooBig) } else { None }
}
