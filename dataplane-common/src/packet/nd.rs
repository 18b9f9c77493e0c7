//! Neighbour discovery messages (RFC 4861 §4), as far as a gateway has to read and answer them.

use super::headers::{Ethernet, copy_mac};
use super::ipv6::Ipv6;
use super::parse::{l3_offset, l4_offset};
use super::{Packet, at, checksum};
use crate::engine::Context;
use crate::family::{Family as _, V6};

pub const ROUTER_SOLICITATION: u8 = 133;
pub const ROUTER_ADVERTISEMENT: u8 = 134;
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
pub const REDIRECT: u8 = 137;

const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// A neighbour solicitation or advertisement with one link-layer option, which may be missing.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Neighbour {
    pub kind: u8,
    pub code: u8,
    pub checksum: u16,
    pub flags: u32,
    pub target: [u32; 4],
}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct LinkLayer {
    kind: u8,
    /// In units of eight bytes.
    length: u8,
    mac: [u8; 6],
}

/// What a message says.
#[derive(Clone, Copy)]
pub struct Message {
    pub target: [u32; 4],
    /// The link-layer option of the right kind, if there is one.
    pub mac: Option<[u8; 6]>,
}

/// Length of an IPv6 packet's payload as its header says.
#[inline(always)]
fn payload(packet: &impl Packet, ctx: &Context) -> Option<u32> {
    let ip = at::<Ipv6>(packet, l3_offset(ctx))?;
    // SAFETY: `at` checked the bounds.
    Some(u16::from_be(unsafe { (*ip).payload_length }) as u32)
}

/// Reads a solicitation or advertisement; `None` unless it is valid (RFC 4861 §7.1): hop limit 255 (it has crossed no
/// router), code 0, nothing between the IPv6 header and the message, 24 bytes or with one link-layer option 32.
///
/// The message stands right behind the IPv6 header, so its fields lie at even addresses.
#[inline(always)]
pub fn read(packet: &impl Packet, ctx: &Context) -> Option<Message> {
    let l4 = l4_offset(ctx);
    if ctx.ttl != 255 || l4 != l3_offset(ctx) + size_of::<Ipv6>() {
        return None;
    }
    let length = payload(packet, ctx)?;
    let message = at::<Neighbour>(packet, l4)?;
    // SAFETY: `at` checked the bounds.
    let message = unsafe { &*message };
    let kind = message.kind;
    if (kind != NEIGHBOUR_SOLICITATION && kind != NEIGHBOUR_ADVERTISEMENT)
        || message.code != 0
        || length < size_of::<Neighbour>() as u32
    {
        return None;
    }
    let target = message.target;
    if length == size_of::<Neighbour>() as u32 {
        return Some(Message { target, mac: None });
    }
    let wanted = if kind == NEIGHBOUR_SOLICITATION { SOURCE_LINK_LAYER } else { TARGET_LINK_LAYER };
    let option = at::<LinkLayer>(packet, l4 + size_of::<Neighbour>())?;
    // SAFETY: as above; the address stands at an even place.
    unsafe {
        if (*option).length == 0 {
            return None;
        }
        if (*option).kind != wanted || (*option).length != 1 {
            return Some(Message { target, mac: None });
        }
        let mut mac = [0; 6];
        copy_mac(&raw mut mac, &raw const (*option).mac);
        Some(Message { target, mac: Some(mac) })
    }
}

/// Makes the solicitation its own answer: whoever asks for the target is told `mac`. `false` if it is of a shape that
/// cannot be answered in place, with nothing written.
///
/// The answer has a link-layer option where the question had one; it may be left out where the question came to one
/// address only (RFC 4861 §4.4).
#[inline(always)]
pub fn answer(packet: &impl Packet, ctx: &Context, mac: &[u8; 6]) -> bool {
    let (l3, l4) = (l3_offset(ctx), l4_offset(ctx));
    let Some(length) = payload(packet, ctx) else { return false };
    let Some(ethernet) = at::<Ethernet>(packet, 0) else { return false };
    let Some(ip) = at::<Ipv6>(packet, l3) else { return false };
    let Some(message) = at::<Neighbour>(packet, l4) else { return false };
    // SAFETY: `at` checked the bounds of all; hardware addresses stand at even places.
    unsafe {
        let mut option_sum = 0;
        if length == (size_of::<Neighbour>() + size_of::<LinkLayer>()) as u32 {
            let Some(option) = at::<LinkLayer>(packet, l4 + size_of::<Neighbour>()) else { return false };
            if (*option).kind != SOURCE_LINK_LAYER || (*option).length != 1 {
                return false;
            }
            (*option).kind = TARGET_LINK_LAYER;
            copy_mac(&raw mut (*option).mac, mac);
            option_sum = sum::<4>(option.cast());
        } else if length != size_of::<Neighbour>() as u32 || V6::to_many(ctx.key6.destination) {
            return false;
        }
        turn_round(ethernet, ip, message, ctx, mac);
        (*message).checksum = !checksum::fold(pseudo(ip, length) + sum::<12>(message.cast()) + option_sum);
    }
    true
}

/// # Safety
/// The pointers are of one packet and whole.
#[inline(always)]
unsafe fn turn_round(
    ethernet: *mut Ethernet,
    ip: *mut Ipv6,
    message: *mut Neighbour,
    ctx: &Context,
    mac: &[u8; 6],
) {
    /// Router, solicited, override.
    const FLAGS: u32 = 0xe000_0000_u32.to_be();
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        copy_mac(&raw mut (*ethernet).destination, &raw const ctx.source_mac);
        copy_mac(&raw mut (*ethernet).source, mac);
        (*ip).destination = ctx.key6.source;
        (*ip).source = (*message).target;
        (*message).kind = NEIGHBOUR_ADVERTISEMENT;
        (*message).flags = FLAGS;
        (*message).checksum = 0;
    }
}

/// The sum of the pseudo-header (RFC 8200 §8.1).
///
/// # Safety
/// `ip` points to a whole header.
#[inline(always)]
unsafe fn pseudo(ip: *const Ipv6, length: u32) -> u32 {
    // SAFETY: the caller vouches for `ip`; source and destination lie together, 32 bytes at an even place.
    unsafe {
        sum::<16>((&raw const (*ip).source).cast()) + (length as u16).to_be() as u32 + 58u16.to_be() as u32
    }
}

/// The sum of `N` half-words.
///
/// # Safety
/// `from` points to as many.
#[inline(always)]
unsafe fn sum<const N: usize>(from: *const u16) -> u32 {
    let mut sum = 0;
    for i in 0..N {
        // SAFETY: the caller vouches for `from`.
        sum += unsafe { from.add(i).read_unaligned() } as u32;
    }
    sum
}

// `copy_mac` copies half-words: an option's address stands behind two bytes.
const _: () = assert!(core::mem::offset_of!(LinkLayer, mac) == 2);
