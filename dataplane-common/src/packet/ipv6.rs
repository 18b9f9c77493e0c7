//! IPv6 (RFC 8200): the header, the chain of extension headers, ports or echo identifier.

use super::headers::*;
use super::parse::{
    SHAPE_FRAGMENT, SHAPE_ICMP_ERROR, SHAPE_ICMP_LINK, SHAPE_ND, SHAPE_OPENS, l3_offset, reaches, transport,
};
use super::{Packet, at};
use crate::engine::Context;
use crate::layout::{FlowKey, KIND_FLOW, KIND_PORTLESS};
use crate::reason::Reason;

/// The fixed header.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    /// Version, traffic class and flow label.
    pub first: u32,
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Extension headers one packet may have. RFC 8200 §4.1 has six kinds, one of which (AH) counts as a protocol here.
const CHAIN: u32 = 5;
/// The transport header begins at most this far into the frame: the longest run of headers that is read directly.
const REACH: usize = 0xff - 20;

/// Reads the headers into `ctx.key6` and, for what both families share, `ctx.key`; without a network.
///
/// AH (51) and ESP end the chain: they are protocols of their own to a security rule. A packet whose transport header
/// is further away than [`REACH`] or behind a routing header of type 0 (RFC 5095) is refused.
#[inline(always)]
pub fn ipv6(packet: &impl Packet, ctx: &mut Context) -> Result<(), Reason> {
    let l3 = l3_offset(ctx);
    let header = at::<Ipv6>(packet, l3).ok_or(Reason::Malformed)?;
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    let total = u16::from_be(header.payload_length) as u32 + size_of::<Ipv6>() as u32;
    if header.first & 0xf000_0000_u32.to_be() != 0x6000_0000_u32.to_be()
        || !reaches(packet, ctx, l3 as u32 + total)
    {
        return Err(Reason::Malformed);
    }
    ctx.ttl = header.hop_limit;
    ctx.tcp_flags = 0;
    ctx.tcp_ack = 0;
    let (source, destination) = (header.source, header.destination);
    ctx.key6.source = source;
    ctx.key6.destination = destination;
    let (protocol, l4) = chain(packet, ctx, header.next_header, l3 + size_of::<Ipv6>())?;
    let headers = (l4 - l3) as u32;
    if headers > total {
        return Err(Reason::Malformed);
    }
    ctx.l4 = l4 as u16;
    ctx.key = FlowKey {
        source: source[3],
        destination: destination[3],
        source_port: 0,
        destination_port: 0,
        network: 0,
        protocol,
        kind: KIND_FLOW,
    };
    if ctx.shape & SHAPE_FRAGMENT == 0 {
        if protocol == ICMPV6 {
            icmpv6(packet, ctx, l4 & 0xff, total - headers)?;
        } else {
            transport(packet, ctx, l4 & 0xff, total - headers)?;
        }
    } else {
        ctx.fragment_length = (total - headers) as u16;
    }
    ctx.key6.key = ctx.key;
    Ok(())
}

/// Follows a chain of extension headers that begins with `protocol` at `l4`, to the transport's protocol and place. A
/// fragment header is noted in the context.
#[inline(always)]
pub(super) fn chain(
    packet: &impl Packet,
    ctx: &mut Context,
    mut protocol: u8,
    mut l4: usize,
) -> Result<(u8, usize), Reason> {
    for i in 0..=CHAIN {
        if protocol != HOP_BY_HOP
            && protocol != ROUTING
            && protocol != DESTINATION_OPTIONS
            && protocol != FRAGMENT
        {
            break;
        }
        // Hop-by-hop options stand first or not at all.
        if i == CHAIN || l4 > REACH || (protocol == HOP_BY_HOP && i != 0) {
            return Err(Reason::ExtensionHeaders);
        }
        let extension = at::<[u8; 8]>(packet, l4 & 0xff).ok_or(Reason::Malformed)?;
        // SAFETY: `at` checked the bounds.
        let extension = unsafe { *extension };
        if protocol == FRAGMENT {
            // RFC 8200 §4.5: what stands behind it belongs to the fragmented part.
            ctx.shape |= SHAPE_FRAGMENT;
            let field = u16::from_be_bytes([extension[2], extension[3]]);
            ctx.fragment = field >> 3 | (field & 1) << 15;
            ctx.fragment_id = u32::from_ne_bytes([extension[4], extension[5], extension[6], extension[7]]);
            protocol = extension[0];
            l4 += 8;
            // A header of a chain that goes on there hides the transport from whoever judges fragments (RFC 7112 §5).
            if protocol == HOP_BY_HOP
                || protocol == ROUTING
                || protocol == DESTINATION_OPTIONS
                || protocol == FRAGMENT
            {
                return Err(Reason::ExtensionHeaders);
            }
            break;
        }
        if protocol == ROUTING && extension[2] == 0 {
            return Err(Reason::ExtensionHeaders);
        }
        protocol = extension[0];
        l4 += (extension[1] as usize + 1) << 3;
    }
    if l4 > REACH { Err(Reason::ExtensionHeaders) } else { Ok((protocol, l4)) }
}

/// RFC 4443 and, for neighbour discovery, RFC 4861.
#[inline(always)]
pub(crate) fn icmpv6(packet: &impl Packet, ctx: &mut Context, l4: usize, payload: u32) -> Result<(), Reason> {
    let icmp = at::<Icmp>(packet, l4).ok_or(Reason::Malformed)?;
    if payload < size_of::<Icmp>() as u32 {
        return Err(Reason::Malformed);
    }
    // SAFETY: `at` checked the bounds.
    let icmp = unsafe { &*icmp };
    ctx.shape |= icmpv6_message(icmp, &mut ctx.key);
    Ok(())
}

/// [`super::parse::icmp_message`] of IPv6.
#[inline(always)]
pub(crate) fn icmpv6_message(icmp: &Icmp, key: &mut FlowKey) -> u16 {
    match icmp.kind {
        ECHO_REQUEST6 => {
            key.source_port = icmp.id;
            SHAPE_OPENS
        }
        ECHO_REPLY6 => {
            key.destination_port = icmp.id;
            0
        }
        // The highest bit tells errors from the rest (RFC 4443 §2.1).
        0..=127 => SHAPE_ICMP_ERROR,
        130..=137 | 143 => SHAPE_ND,
        // Inverse discovery, certification paths, multicast routers (RFC 4890 §4.3.3).
        141 | 142 | 148 | 149 | 151..=153 => SHAPE_ICMP_LINK,
        _ => {
            key.kind = KIND_PORTLESS;
            SHAPE_OPENS
        }
    }
}

impl Context {
    /// Puts the packet into a virtual network, or the world.
    #[inline(always)]
    pub fn set_network(&mut self, network: u16) {
        self.key.network = network;
        self.key6.key.network = network;
    }
}
