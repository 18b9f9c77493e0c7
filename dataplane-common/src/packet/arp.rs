//! ARP for IPv4 over Ethernet (RFC 826).

use super::headers::{Arp, Ethernet};
use super::parse::l3_offset;
use super::{Packet, at};
use crate::engine::Context;

pub const REQUEST: u16 = 1;
pub const REPLY: u16 = 2;

/// A checked ARP message; addresses in network order.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    pub operation: u16,
    pub sender: u32,
    pub sender_mac: [u8; 6],
    pub target: u32,
}

/// Reads the message; `None` when it is not IPv4 over Ethernet.
#[inline(always)]
pub fn read(packet: &impl Packet, ctx: &Context) -> Option<Message> {
    let arp = at::<Arp>(packet, l3_offset(ctx))?;
    // SAFETY: `at` checked the bounds.
    let arp = unsafe { &*arp };
    if arp.hardware != u16::to_be(1) || arp.protocol != u16::to_be(0x0800) || arp.sizes != u16::to_be(0x0604)
    {
        return None;
    }
    Some(Message {
        operation: u16::from_be(arp.operation),
        sender: arp.sender,
        sender_mac: arp.sender_mac,
        target: arp.target,
    })
}

/// Turns the request in the packet into its answer: `mac` has the address that was asked for.
#[inline(always)]
pub fn answer(packet: &impl Packet, ctx: &Context, mac: &[u8; 6]) -> bool {
    let Some(arp) = at::<Arp>(packet, l3_offset(ctx)) else { return false };
    let Some(ethernet) = at::<Ethernet>(packet, 0) else { return false };
    // SAFETY: `at` checked the bounds of both.
    let (arp, ethernet) = unsafe { (&mut *arp, &mut *ethernet) };
    let (asked, asker, asker_mac) = (arp.target, arp.sender, arp.sender_mac);
    arp.operation = u16::to_be(REPLY);
    arp.sender = asked;
    arp.sender_mac = *mac;
    arp.target = asker;
    arp.target_mac = asker_mac;
    ethernet.destination = asker_mac;
    ethernet.source = *mac;
    true
}
