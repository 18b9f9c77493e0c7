//! ICMP errors: the packet one quotes, and the translation of both (RFC 5508 §4, RFC 7915 has no say here: the family stays).
//!
//! A quote may end eight bytes behind its IP header (RFC 792), so nothing is asked of what stands further: a TCP checksum is
//! changed where there is one. Nothing in a quote is validated (RFC 5508 REQ-3): what was wrong stays as wrong as it was.

use super::headers::*;
use super::ipv6::{self, Ipv6};
use super::parse::{SHAPE_FRAGMENT, SHAPE_OPENS, icmp_message, l3_offset, l4_offset};
use super::rewrite::{Tuple, write_ip, write_macs};
use super::{Packet, at, checksum};
use crate::engine::Context;
use crate::family::Family;
use crate::layout::{FlowKey, KIND_FLOW, NextHop};
use crate::opaque::opaque;
use crate::policy::alloc_of;
use crate::reason::Reason;

/// Where the quoted packet stands in the frame.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Its transport header; its IP header stands behind eight bytes of ICMP.
    pub l4: u16,
    /// The end of the error, and so of the quote.
    pub end: u16,
    /// At least eight bytes of the transport header are there.
    pub ports: bool,
}

impl Quote {
    #[inline(always)]
    fn new(l4: usize, end: usize, ports: bool) -> Self {
        Self { l4: l4 as u16, end: if end > 0xffff { 0xffff } else { end as u16 }, ports }
    }

    /// Kept in memory between, where the verifier forgets a range: see [`l3_offset`].
    #[inline(always)]
    fn l4(&self) -> usize {
        opaque(self.l4 as usize) & 0x1ff
    }
}

/// The place of the quoted header, and the end of the quote: that of the error by its own account, which the parser has compared
/// with the frame, or where extensions begin (RFC 4884 §3: the length of what is quoted, in words of four bytes or of eight).
#[inline(always)]
fn place<F: Family>(packet: &impl Packet, ctx: &Context) -> Result<(usize, usize), Reason> {
    let l3 = l3_offset(ctx);
    let length = if F::V6 {
        let ip = at::<Ipv6>(packet, l3).ok_or(Reason::Malformed)?;
        // SAFETY: `at` checked the bounds.
        u16::from_be(unsafe { (*ip).payload_length }) as usize + size_of::<Ipv6>()
    } else {
        let ip = at::<Ipv4>(packet, l3).ok_or(Reason::Malformed)?;
        // SAFETY: as above.
        u16::from_be(unsafe { (*ip).total_length }) as usize
    };
    let quoted = l4_offset(ctx) + size_of::<Icmp>();
    let end = l3 + length;
    let icmp = at::<[u8; 8]>(packet, l4_offset(ctx)).ok_or(Reason::Malformed)?;
    // SAFETY: as above.
    let words = unsafe {
        match (*icmp)[0] {
            1 | 3 if F::V6 => (*icmp)[4] as usize * 8,
            3 | 11 | 12 if !F::V6 => (*icmp)[5] as usize * 4,
            _ => 0,
        }
    };
    Ok((quoted, if words != 0 && quoted + words < end { quoted + words } else { end }))
}

/// Is it an error that is forwarded? Not a redirect, which is a word of a router to its own link (RFC 1812 §5.2.7.2), no source
/// quench (RFC 6633 §5), and none that nobody knows.
#[inline(always)]
fn known<F: Family>(packet: &impl Packet, ctx: &Context) -> bool {
    let Some(icmp) = at::<Icmp>(packet, l4_offset(ctx)) else { return false };
    // SAFETY: `at` checked the bounds.
    let kind = unsafe { (*icmp).kind };
    if F::V6 { matches!(kind, 1..=4) } else { matches!(kind, 3 | 11 | 12) }
}

/// Reads ports or identifier of the quoted packet into its key. `false`: a protocol that has none.
#[inline(always)]
fn ports<F: Family>(
    packet: &impl Packet,
    l4: usize,
    end: usize,
    later: bool,
    key: &mut FlowKey,
) -> Result<bool, Reason> {
    if alloc_of(key.protocol).is_none() {
        return Ok(false);
    }
    if later {
        return Err(Reason::Fragment);
    }
    if l4 + 8 > end {
        return Err(Reason::IcmpError);
    }
    let header = at::<Icmp>(packet, l4).ok_or(Reason::IcmpError)?;
    // SAFETY: `at` checked the bounds; the first words of TCP and UDP headers are read as what they are below.
    let header = unsafe { &*header };
    if key.protocol == TCP || key.protocol == UDP {
        let ports = (&raw const *header).cast::<u16>();
        // SAFETY: two half-words of the eight bytes.
        unsafe {
            key.source_port = ports.read_unaligned();
            key.destination_port = ports.add(1).read_unaligned();
        }
        return Ok(true);
    }
    let shape = if F::V6 { ipv6::icmpv6_message(header, key) } else { icmp_message(header, key) };
    // No error is about an error (RFC 1122 §3.2.2), nor about what never left its link.
    if shape & !SHAPE_OPENS != 0 { Err(Reason::IcmpError) } else { Ok(true) }
}

/// Puts the key of the quoted packet's answers into `ctx.claim`.
#[inline(always)]
fn turn(ctx: &mut Context, key: &FlowKey) {
    ctx.claim = FlowKey {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        ..*key
    };
}

/// Reads the IPv4 packet that the error quotes, and puts the key of its answers into `ctx.claim`.
#[inline(always)]
pub fn quote4(packet: &impl Packet, ctx: &mut Context) -> Result<Quote, Reason> {
    use crate::family::V4;
    let (l3, end) = place::<V4>(packet, ctx)?;
    let ip = at::<Ipv4>(packet, l3).ok_or(Reason::IcmpError)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    let l4 = l3 + (((ip.version_ihl & 0x0f) as usize) << 2);
    if !known::<V4>(packet, ctx) || ip.version_ihl >> 4 != 4 || l4 < l3 + size_of::<Ipv4>() || l4 > end {
        return Err(Reason::IcmpError);
    }
    let mut key = FlowKey {
        source: ip.source,
        destination: ip.destination,
        source_port: 0,
        destination_port: 0,
        network: ctx.key.network,
        protocol: ip.protocol,
        kind: KIND_FLOW,
    };
    let later = ip.fragment & u16::to_be(0x1fff) != 0;
    let ports = ports::<V4>(packet, l4, end, later, &mut key)?;
    turn(ctx, &key);
    Ok(Quote::new(l4, end, ports))
}

/// The same of an IPv6 packet; `ctx.claim6` has the key.
#[inline(always)]
pub fn quote6(packet: &impl Packet, ctx: &mut Context) -> Result<Quote, Reason> {
    use crate::family::V6;
    let (l3, end) = place::<V6>(packet, ctx)?;
    let ip = at::<Ipv6>(packet, l3).ok_or(Reason::IcmpError)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    if !known::<V6>(packet, ctx) || ip.first & 0xf000_0000_u32.to_be() != 0x6000_0000_u32.to_be() {
        return Err(Reason::IcmpError);
    }
    let (source, destination) = (ip.source, ip.destination);
    let chain = ipv6::chain(packet, ctx, ip.next_header, l3 + size_of::<Ipv6>());
    // The error itself is no fragment: what the context says of one is the quote's.
    let later = ctx.shape & SHAPE_FRAGMENT != 0 && ctx.fragment & 0x1fff != 0;
    ctx.shape &= !SHAPE_FRAGMENT;
    let Ok((protocol, l4)) = chain else { return Err(Reason::IcmpError) };
    if l4 > end {
        return Err(Reason::IcmpError);
    }
    let mut key = FlowKey {
        source: source[3],
        destination: destination[3],
        source_port: 0,
        destination_port: 0,
        network: ctx.key.network,
        protocol,
        kind: KIND_FLOW,
    };
    let ports = ports::<V6>(packet, l4, end, later, &mut key)?;
    turn(ctx, &key);
    ctx.claim6.key = ctx.claim;
    ctx.claim6.source = destination;
    ctx.claim6.destination = source;
    Ok(Quote::new(l4, end, ports))
}

/// Translates error and quote. `ctx.claim` is the key of the quoted packet's answers and `ctx.new` what they are translated
/// to; the quote is the other way round. The error's new addresses are `source` and the destination of `ctx.new`. `false`:
/// the headers are not where they were, and nothing is written.
#[inline(always)]
pub fn translate<F: Family>(
    packet: &impl Packet,
    ctx: &Context,
    quote: &Quote,
    source: F::Address,
    hop: Option<&NextHop>,
) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let quoted = l4 + size_of::<Icmp>();
    let (old, new) = (&ctx.claim, &ctx.new);
    let addresses = if F::V6 {
        change6(&ctx.claim6.source, &ctx.new6.source, &ctx.claim6.destination, &ctx.new6.destination)
    } else {
        change4(old.source, new.source, old.destination, new.destination)
    };
    let outer = if F::V6 {
        change6(&ctx.key6.source, &F::wide(source), &ctx.key6.destination, &ctx.new6.destination)
    } else {
        change4(ctx.key.source, F::short(source), ctx.key.destination, new.destination)
    };
    // What becomes of the ICMP message, and so of its checksum.
    let mut change = addresses;
    if quote.ports {
        let Some(added) = write_transport(packet, ctx, quote, addresses) else { return false };
        change = checksum::add(change, added);
    }
    if F::V6 {
        let (Some(ip), Some(inner)) = (at::<Ipv6>(packet, l3), at::<Ipv6>(packet, quoted)) else {
            return false;
        };
        // SAFETY: `at` checked the bounds of both; packed structs.
        unsafe {
            (*inner).source = ctx.new6.destination;
            (*inner).destination = ctx.new6.source;
            (*ip).source = F::wide(source);
            (*ip).destination = ctx.new6.destination;
            if hop.is_some() {
                (*ip).hop_limit = (*ip).hop_limit.wrapping_sub(1);
            }
        }
    } else {
        let (Some(ip), Some(inner)) = (at::<Ipv4>(packet, l3), at::<Ipv4>(packet, quoted)) else {
            return false;
        };
        // SAFETY: as above.
        unsafe {
            let before = (*inner).checksum;
            let after = checksum::apply(before, addresses);
            change = checksum::add(change, checksum::difference16(before, after));
            (*inner).source = new.destination;
            (*inner).destination = new.source;
            (*inner).checksum = after;
            let ends = Tuple { source: F::short(source), destination: new.destination, ..Tuple::default() };
            write_ip(ip, outer, &ends, hop.is_some());
        }
    }
    write_macs(packet, hop);
    packet.update_l4_checksum(l4 + ICMP_CHECKSUM, if F::V6 { outer } else { 0 }, change, false);
    true
}

/// Writes ports or identifier of the quote, and its transport checksum if the quote reaches so far. Returns the difference all
/// of that makes in a sum.
#[inline(always)]
fn write_transport(packet: &impl Packet, ctx: &Context, quote: &Quote, addresses: u32) -> Option<u32> {
    let (old, new) = (&ctx.claim, &ctx.new);
    let header = at::<[u16; 4]>(packet, quote.l4())?;
    let numbers = checksum::difference16(old.source_port, new.source_port)
        + checksum::difference16(old.destination_port, new.destination_port);
    let (offset, covered) = match old.protocol {
        TCP => (TCP_CHECKSUM, checksum::add(addresses, numbers)),
        UDP => (UDP_CHECKSUM, checksum::add(addresses, numbers)),
        ICMPV6 => (ICMP_CHECKSUM, checksum::add(addresses, numbers)),
        // ICMP has no pseudo-header.
        _ => (ICMP_CHECKSUM, numbers),
    };
    let mut change = numbers;
    if quote.l4() + offset + 2 <= quote.end as usize
        && let Some(field) = at::<[u8; 2]>(packet, quote.l4() + offset)
    {
        // SAFETY: `at` checked the bounds.
        let before = u16::from_ne_bytes(unsafe { *field });
        if old.protocol != UDP || before != 0 {
            let mut after = checksum::apply(before, covered);
            if old.protocol == UDP && after == 0 {
                after = 0xffff;
            }
            // SAFETY: as above.
            unsafe { *field = after.to_ne_bytes() };
            change = checksum::add(change, checksum::difference16(before, after));
        }
    }
    // SAFETY: `at` checked the bounds; unaligned writes.
    unsafe {
        let half = header.cast::<u16>();
        if old.protocol == TCP || old.protocol == UDP {
            half.write_unaligned(new.destination_port);
            half.add(1).write_unaligned(new.source_port);
        } else if old.source_port | old.destination_port != new.source_port | new.destination_port {
            half.add(2).write_unaligned(new.source_port | new.destination_port);
        }
    }
    Some(change)
}

/// What changes in a sum when two addresses become others.
#[inline(always)]
fn change4(a: u32, to_a: u32, b: u32, to_b: u32) -> u32 {
    checksum::add(checksum::difference(a, to_a), checksum::difference(b, to_b))
}

#[inline(always)]
fn change6(a: &[u32; 4], to_a: &[u32; 4], b: &[u32; 4], to_b: &[u32; 4]) -> u32 {
    let mut change = 0;
    let mut i = 0;
    while i < 4 {
        // SAFETY: the index is below the four words of each.
        unsafe {
            let (x, y) = (*a.as_ptr().add(i), *to_a.as_ptr().add(i));
            change = checksum::add(change, checksum::difference(x, y));
            let (x, y) = (*b.as_ptr().add(i), *to_b.as_ptr().add(i));
            change = checksum::add(change, checksum::difference(x, y));
        }
        i += 1;
    }
    change
}
