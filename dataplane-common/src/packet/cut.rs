//! Fragments of a packet that is longer than the next link takes (RFC 791 §2.3, RFC 1812 §4.2.2.7).

use core::mem::offset_of;

use super::headers::{Ethernet, Ipv4};
use super::parse::l3_offset;
use super::wire::{load16, store16};
use super::{Packet, at, checksum};
use crate::engine::Context;

/// The longest payload that is cut: jumbo frames with room to spare. Who sends longer ones is told.
pub const LONGEST: u32 = 0x3fff;
/// The longest piece.
pub const PIECE: u32 = 0x7f8;
/// Room behind the longest payload for whatever a mask lets a piece be.
pub const ROOM: u32 = 0x800;
/// The most pieces.
pub const PIECES: u32 = 32;
/// Where the payload begins: there are neither tags nor options.
pub const PAYLOAD: u32 = (size_of::<Ethernet>() + size_of::<Ipv4>()) as u32;

/// How a packet is cut, and where its fragments go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// The device at whose ingress the fragments arrive anew, like any others.
    pub ifindex: u32,
    /// Bytes behind the IP header.
    pub payload: u32,
    /// Bytes of each fragment but the last, a multiple of 8.
    pub piece: u32,
    /// Offset of the packet in its datagram, in units of 8 bytes: it may be a fragment already.
    offset: u16,
    more: bool,
    /// Of the datagram; network order.
    id: u16,
}

impl Cut {
    /// How to cut the packet for a link that takes `mtu` bytes of it. A packet that is no fragment gets the identification `fresh`.
    /// `None`: it has options, of which not all belong into every fragment, is too long, or must not be fragmented.
    #[inline(always)]
    pub fn plan(packet: &impl Packet, ctx: &Context, mtu: u32, fresh: u16) -> Option<Self> {
        if l3_offset(ctx) != size_of::<Ethernet>() || mtu < 28 || packet.segment() != 0 {
            return None;
        }
        let ip = at::<Ipv4>(packet, size_of::<Ethernet>())?;
        // SAFETY: `at` checked the bounds.
        let (options, total, field, id) = unsafe {
            (
                (*ip).version_ihl != 0x45,
                u16::from_be(load16::<{ offset_of!(Ipv4, total_length) }, _>(ip)) as u32,
                u16::from_be(load16::<{ offset_of!(Ipv4, fragment) }, _>(ip)),
                load16::<{ offset_of!(Ipv4, id) }, _>(ip),
            )
        };
        let payload = total.wrapping_sub(20);
        let piece = (mtu - 20) & !7;
        let piece = if piece > PIECE { PIECE } else { piece };
        if options || field & 0x4000 != 0 || payload > LONGEST || payload > piece * PIECES || payload <= piece
        {
            return None;
        }
        let fragment = field & 0x3fff != 0;
        Some(Self {
            ifindex: ctx.ifindex,
            payload,
            piece,
            offset: field & 0x1fff,
            more: field & 0x2000 != 0,
            id: if fragment { id } else { fresh },
        })
    }

    /// Writes the IP header of the fragment that has `length` bytes from `from` on, in place of the packet's. `false`: there is none.
    #[inline(always)]
    pub fn write_header(&self, packet: &impl Packet, from: u32, length: u32) -> bool {
        let Some(ip) = at::<Ipv4>(packet, size_of::<Ethernet>()) else { return false };
        let more = self.more || from + length < self.payload;
        let field = (self.offset + (from >> 3) as u16) & 0x1fff | if more { 0x2000 } else { 0 };
        let (total, field) = (((length + 20) as u16).to_be(), field.to_be());
        // SAFETY: `at` checked the bounds.
        unsafe {
            let mut change =
                checksum::difference16(load16::<{ offset_of!(Ipv4, total_length) }, _>(ip), total);
            change += checksum::difference16(load16::<{ offset_of!(Ipv4, fragment) }, _>(ip), field);
            change += checksum::difference16(load16::<{ offset_of!(Ipv4, id) }, _>(ip), self.id);
            store16::<{ offset_of!(Ipv4, total_length) }, _>(ip, total);
            store16::<{ offset_of!(Ipv4, fragment) }, _>(ip, field);
            store16::<{ offset_of!(Ipv4, id) }, _>(ip, self.id);
            let sum = load16::<{ offset_of!(Ipv4, checksum) }, _>(ip);
            store16::<{ offset_of!(Ipv4, checksum) }, _>(ip, checksum::apply(sum, change));
        }
        true
    }
}
