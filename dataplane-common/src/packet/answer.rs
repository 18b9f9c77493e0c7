//! Packets of our own, made of the one they answer, in place: a RST, an ICMP error.

use super::headers::*;
use super::ipv6::Ipv6;
use super::parse::{l3_offset, l4_offset};
use super::{Packet, at, checksum};
use crate::engine::Context;
use crate::family::Family;

/// Precedence of what networks say to each other, internetwork control (RFC 1812 §4.3.2.5, RFC 5508 REQ-10d).
const CONTROL: u8 = 0xc0;

/// The longest packet that is quoted: an error of 576 bytes (RFC 1812 §4.3.2.3). Longer ones are not answered.
const QUOTED: u32 = 548;

/// Makes a RST of a SYN (RFC 9293 §3.5.2). Addresses and ports are exchanged, which no checksum notices.
#[inline(always)]
pub fn reset<F: Family>(packet: &impl Packet, ctx: &Context) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let Some(tcp) = at::<Tcp>(packet, l4) else { return false };
    let Some(end) = end_of_packet::<F>(packet, l3) else { return false };
    // SAFETY: `at` checked the bounds; packed structs have no alignment.
    let tcp = unsafe { &mut *tcp };
    let header = (tcp.offset >> 4) as u32 * 4;
    // What a Fast Open SYN carries is acknowledged with it.
    let data = end.saturating_sub((l4 - l3) as u32 + header);
    let acknowledged = u32::from_be(tcp.sequence).wrapping_add(1).wrapping_add(data).to_be();
    let (sequence, acknowledgement) = (tcp.sequence, tcp.acknowledgement);
    let before = u16::from_ne_bytes([tcp.offset, tcp.flags]);
    let after = u16::from_ne_bytes([tcp.offset, RST | ACK]);
    let mut change = checksum::difference(sequence, 0);
    change = checksum::add(change, checksum::difference(acknowledgement, acknowledged));
    change = checksum::add(change, checksum::difference16(before, after));
    let (source, destination) = (tcp.source, tcp.destination);
    tcp.source = destination;
    tcp.destination = source;
    tcp.sequence = 0;
    tcp.acknowledgement = acknowledged;
    tcp.flags = RST | ACK;
    if !exchange_addresses::<F>(packet, l3) || !turn_round(packet, ctx) {
        return false;
    }
    packet.update_l4_checksum(l4 + TCP_CHECKSUM, 0, change, false);
    true
}

/// Makes a RST of a segment in the middle of a connection, with the sequence number its sender acknowledges: the one that is
/// believed (RFC 9293 §3.10.7.1, RFC 5961 §3.2). What it carries goes back with it, and means nothing in a RST.
#[inline(always)]
pub fn reset_established<F: Family>(packet: &impl Packet, ctx: &Context) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let Some(tcp) = at::<Tcp>(packet, l4) else { return false };
    // SAFETY: `at` checked the bounds; packed structs have no alignment.
    let tcp = unsafe { &mut *tcp };
    let (sequence, acknowledgement) = (tcp.sequence, tcp.acknowledgement);
    let before = u16::from_ne_bytes([tcp.offset, tcp.flags]);
    let after = u16::from_ne_bytes([tcp.offset, RST]);
    let mut change = checksum::difference(sequence, acknowledgement);
    change = checksum::add(change, checksum::difference(acknowledgement, 0));
    change = checksum::add(change, checksum::difference16(before, after));
    (tcp.source, tcp.destination) = (tcp.destination, tcp.source);
    tcp.sequence = acknowledgement;
    tcp.acknowledgement = 0;
    tcp.flags = RST;
    if !exchange_addresses::<F>(packet, l3) || !turn_round(packet, ctx) {
        return false;
    }
    packet.update_l4_checksum(l4 + TCP_CHECKSUM, 0, change, false);
    true
}

/// The packet goes from its receiver to its sender, which no checksum notices.
#[inline(always)]
fn exchange_addresses<F: Family>(packet: &impl Packet, l3: usize) -> bool {
    if F::V6 {
        let Some(ip) = at::<Ipv6>(packet, l3) else { return false };
        // SAFETY: `at` checked the bounds; packed structs have no alignment.
        let ip = unsafe { &mut *ip };
        (ip.source, ip.destination) = (ip.destination, ip.source);
    } else {
        let Some(ip) = at::<Ipv4>(packet, l3) else { return false };
        // SAFETY: as above.
        let ip = unsafe { &mut *ip };
        (ip.source, ip.destination) = (ip.destination, ip.source);
    }
    true
}

/// Length of the IP packet from its header on, as it says itself.
#[inline(always)]
fn end_of_packet<F: Family>(packet: &impl Packet, l3: usize) -> Option<u32> {
    if F::V6 {
        let ip = at::<Ipv6>(packet, l3)?;
        // SAFETY: `at` checked the bounds.
        Some(u16::from_be(unsafe { (*ip).payload_length }) as u32 + size_of::<Ipv6>() as u32)
    } else {
        let ip = at::<Ipv4>(packet, l3)?;
        // SAFETY: as above.
        Some(u16::from_be(unsafe { (*ip).total_length }) as u32)
    }
}

/// The frame goes back to where it came from.
#[inline(always)]
fn turn_round(packet: &impl Packet, ctx: &Context) -> bool {
    let Some(ethernet) = at::<Ethernet>(packet, 0) else { return false };
    // SAFETY: `at` checked the bounds; a frame begins at an even address, and so does the context's.
    unsafe {
        copy_mac(&raw mut (*ethernet).source, &raw const (*ethernet).destination);
        copy_mac(&raw mut (*ethernet).destination, &raw const ctx.source_mac);
    }
    true
}

/// Puts "communication administratively prohibited" (ICMP type 3 code 13, ICMPv6 type 1 code 1) in front of the packet,
/// from `gateway`. `false`: not possible, the packet is to be dropped.
///
/// The checksum is made without a look at the payload: a TCP or UDP segment whose checksum is right, or will be once
/// the kernel has completed it (guests' offloads), adds up to the complement of its pseudo-header. So the quote has to
/// be whole.
#[inline(always)]
pub fn prohibited<F: Family>(packet: &impl Packet, ctx: &Context, gateway: F::Address) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let Some(end) = end_of_packet::<F>(packet, l3) else { return false };
    let headers = (l4 - l3) as u32;
    if l3 != size_of::<Ethernet>() || end > QUOTED || end < headers {
        return false;
    }
    // Extension headers and options would have to be summed up.
    if headers != if F::V6 { 40 } else { 20 } {
        return false;
    }
    let protocol = ctx.key.protocol;
    // The sum of what is quoted is known where the packet has a checksum over it.
    if !matches!(protocol, TCP | UDP | ICMP | ICMPV6) {
        return false;
    }
    if protocol == UDP {
        let Some(udp) = at::<Udp>(packet, l4) else { return false };
        // SAFETY: `at` checked the bounds.
        if unsafe { (*udp).checksum } == 0 {
            return false;
        }
    }
    let pseudo = pseudo::<F>(ctx, (end - headers) as u16);
    // ICMP has no pseudo-header; of an echo request the segment itself adds up to nothing.
    let segment = if protocol == ICMP { 0xffff } else { !checksum::fold(pseudo) as u32 };
    let kind = if F::V6 { [1, 1] } else { [3, 13] };
    quoting::<F>(packet, ctx, gateway, end, segment, Message { kind, mtu: 0 })
}

/// What an error says: type and code, and the MTU of the next link where that is what it is about.
#[derive(Clone, Copy)]
struct Message {
    kind: [u8; 2],
    mtu: u32,
}

/// Puts "fragmentation needed" or "packet too big" with the context's MTU, or "time exceeded", in front of the packet's headers,
/// from `own`. What follows eight bytes of transport, of TCP its twenty, is cut off. `false`: not possible.
///
/// The kernel may still have to complete the quoted checksum (guests' offloads), and nobody says whether it will. So the field
/// gets the one value that completing does not change: with it the rest and twice itself add up to nothing. Nobody checks it, a
/// quote that is cut off has none that could be right.
#[inline(always)]
pub fn unsent<F: Family>(packet: &impl Packet, ctx: &Context, own: F::Address, too_big: bool) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let headers = (l4 - l3) as u32;
    if l3 != size_of::<Ethernet>() || headers != if F::V6 { 40 } else { 20 } {
        return false;
    }
    let quoted: u32 = if ctx.key.protocol == TCP { 20 } else { 8 };
    if !packet.trim(l4 as u32 + quoted) || !packet.pull(l4 as u32 + quoted) {
        return false;
    }
    let Some(transport) = at::<[u16; 4]>(packet, l4) else { return false };
    // SAFETY: `at` checked the bounds.
    let segment = match ctx.key.protocol {
        TCP => {
            let Some(tcp) = at::<[u16; 10]>(packet, l4) else { return false };
            // SAFETY: as above.
            unsafe { settled::<10, 8>(tcp.cast()) }
        }
        // SAFETY: as above.
        UDP => unsafe { settled::<4, 3>(transport.cast()) },
        // SAFETY: as above.
        _ => unsafe { sum::<4>(transport.cast()) },
    };
    let message = match (F::V6, too_big) {
        (false, true) => Message { kind: [3, 4], mtu: ctx.mtu },
        (false, false) => Message { kind: [11, 0], mtu: 0 },
        (true, true) => Message { kind: [2, 0], mtu: ctx.mtu },
        (true, false) => Message { kind: [3, 0], mtu: 0 },
    };
    quoting::<F>(packet, ctx, own, headers + quoted, segment, message)
}

/// Gives half-word `FIELD`, a checksum, the value that completing it does not change, and returns the sum of all `N`.
///
/// # Safety
/// `from` points to `N` half-words.
#[inline(always)]
unsafe fn settled<const N: usize, const FIELD: usize>(from: *mut u16) -> u32 {
    // SAFETY: the caller vouches for `from`.
    unsafe {
        let all = sum::<N>(from);
        let field = from.add(FIELD);
        let rest = checksum::fold(checksum::add(all, !field.read_unaligned() as u32));
        // Half of it, modulo 65,535.
        let half = (!rest).rotate_right(1);
        field.write_unaligned(half);
        rest as u32 + half as u32
    }
}

/// Sum of the pseudo-header of the packet's transport, `length` bytes long.
#[inline(always)]
fn pseudo<F: Family>(ctx: &Context, length: u16) -> u32 {
    // SAFETY: the addresses' own bytes.
    let addresses = unsafe {
        if F::V6 {
            sum::<8>((&raw const ctx.key6.source).cast()) + sum::<8>((&raw const ctx.key6.destination).cast())
        } else {
            sum::<2>((&raw const ctx.key.source).cast()) + sum::<2>((&raw const ctx.key.destination).cast())
        }
    };
    addresses + length.to_be() as u32 + u16::from_ne_bytes([0, ctx.key.protocol]) as u32
}

/// Puts an error in front of the packet, which is `end` bytes long and whose transport adds up to `segment`.
#[inline(always)]
fn quoting<F: Family>(
    packet: &impl Packet,
    ctx: &Context,
    own: F::Address,
    end: u32,
    segment: u32,
    message: Message,
) -> bool {
    if F::V6 {
        quoting6::<F>(packet, ctx, own, end, segment, message)
    } else {
        quoting4::<F>(packet, ctx, own, end, segment, message)
    }
}

/// The sum of `N` half-words.
///
/// # Safety
/// `from` points to `N` half-words.
#[inline(always)]
unsafe fn sum<const N: usize>(from: *const u16) -> u32 {
    let mut total = 0;
    let mut i = 0;
    while i < N {
        // SAFETY: the caller vouches for `from`; frames are read as bytes anyway.
        total += unsafe { from.add(i).read_unaligned() } as u32;
        i += 1;
    }
    total
}

#[inline(always)]
fn quoting4<F: Family>(
    packet: &impl Packet,
    ctx: &Context,
    own: F::Address,
    end: u32,
    segment: u32,
    message: Message,
) -> bool {
    const ROOM: u32 = 28;
    if !packet.grow(ROOM) || !packet.pull(14 + ROOM + 20) {
        return false;
    }
    let (Some(ip), Some(icmp), Some(inner)) =
        (at::<Ipv4>(packet, 14), at::<Icmp>(packet, 34), at::<Ipv4>(packet, 14 + ROOM as usize))
    else {
        return false;
    };
    // SAFETY: `at` checked the bounds of all three; packed structs have no alignment.
    unsafe {
        let quoted = sum::<10>(inner.cast()) + segment;
        *icmp = message.header(quoted);
        *ip = Ipv4 {
            version_ihl: 0x45,
            tos: CONTROL,
            total_length: ((end + ROOM) as u16).to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: 64,
            protocol: ICMP,
            checksum: 0,
            source: F::short(own),
            destination: ctx.key.source,
        };
        (*ip).checksum = !checksum::fold(sum::<10>(ip.cast()));
    }
    turn_round(packet, ctx)
}

#[inline(always)]
fn quoting6<F: Family>(
    packet: &impl Packet,
    ctx: &Context,
    own: F::Address,
    end: u32,
    segment: u32,
    message: Message,
) -> bool {
    const ROOM: u32 = 48;
    if !packet.grow(ROOM) || !packet.pull(14 + ROOM + 40) {
        return false;
    }
    let (Some(ip), Some(icmp), Some(inner)) =
        (at::<Ipv6>(packet, 14), at::<Icmp>(packet, 54), at::<Ipv6>(packet, 14 + ROOM as usize))
    else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        let quoted = sum::<20>(inner.cast()) + segment;
        *ip = Ipv6 {
            first: (0x6000_0000_u32 | (CONTROL as u32) << 20).to_be(),
            payload_length: ((end + 8) as u16).to_be(),
            next_header: ICMPV6,
            hop_limit: 64,
            source: F::wide(own),
            destination: ctx.key6.source,
        };
        let pseudo = sum::<16>((&raw const (*ip).source).cast())
            + ((end + 8) as u16).to_be() as u32
            + u16::from_ne_bytes([0, ICMPV6]) as u32;
        *icmp = message.header(quoted + pseudo);
    }
    turn_round(packet, ctx)
}

impl Message {
    /// The ICMP header before what adds up to `rest`. The MTU fills the second word (RFC 4443 §3.2), of which an IPv4 error only
    /// has the second half (RFC 1191 §4).
    #[inline(always)]
    fn header(self, rest: u32) -> Icmp {
        let [kind, code] = self.kind;
        let mtu = (self.mtu as u16).to_be();
        let all = u16::from_ne_bytes(self.kind) as u32 + mtu as u32 + rest;
        Icmp { kind, code, checksum: !checksum::fold(all), id: 0, sequence: mtu }
    }
}
