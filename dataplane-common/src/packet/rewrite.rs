//! Writing a translation into the packet: addresses, ports, TTL, hardware addresses, every checksum.

use core::mem::offset_of;

use super::headers::*;
use super::ipv6::Ipv6;
use super::wire::{load16, store16, store32};
use super::{Packet, at, checksum};
use crate::layout::{FlowKey, FlowKey6, NextHop};

/// The tuple a packet leaves with, network order.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Tuple {
    pub source: u32,
    pub destination: u32,
    pub source_port: u16,
    pub destination_port: u16,
}

/// The addresses an IPv6 packet leaves with, as they stand in it.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Addresses6 {
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// Rewrites the packet from `old` to `new`, takes one from the TTL if `hop` is given, and puts its hardware
/// addresses on. `ports` says that the packet has its transport header: it is not a later fragment. Returns `false` if the
/// headers are not where they were parsed, with nothing written.
///
/// Everything is written before the transport checksum: that call makes packet pointers stale under TC.
#[inline(always)]
pub fn translate(
    packet: &impl Packet,
    l3: usize,
    l4: usize,
    old: &FlowKey,
    new: &Tuple,
    hop: Option<&NextHop>,
    ports: bool,
) -> bool {
    let Some(ip) = at::<Ipv4>(packet, l3) else { return false };
    let header = if ports { at::<[u16; 4]>(packet, l4) } else { None };
    let Some(ports) = header else {
        // Protocols without ports may be shorter; only the addresses change then.
        return addresses_only(packet, l3, old, new, hop);
    };
    let addresses = checksum::add(
        checksum::difference(old.source, new.source),
        checksum::difference(old.destination, new.destination),
    );
    let port_change = checksum::difference16(old.source_port, new.source_port)
        + checksum::difference16(old.destination_port, new.destination_port);
    // SAFETY: `at` checked the bounds of both.
    unsafe {
        write_ip(ip, addresses, new, hop.is_some());
        match old.protocol {
            TCP | UDP => {
                if old.source_port != new.source_port {
                    store16::<0, _>(ports, new.source_port);
                }
                if old.destination_port != new.destination_port {
                    store16::<2, _>(ports, new.destination_port);
                }
            }
            ICMP => {
                // The identifier stands in whichever of the two is in use (see `FlowKey`); of some messages in neither.
                let change =
                    (new.source_port | new.destination_port) ^ (old.source_port | old.destination_port);
                store16::<4, _>(ports, load16::<4, _>(ports) ^ change);
            }
            _ => {}
        }
    }
    write_macs(packet, hop);
    let changed = old.source != new.source
        || old.destination != new.destination
        || old.source_port != new.source_port
        || old.destination_port != new.destination_port;
    if changed {
        match old.protocol {
            TCP => packet.update_l4_checksum(l4 + TCP_CHECKSUM, addresses, port_change, false),
            UDP => packet.update_l4_checksum(l4 + UDP_CHECKSUM, addresses, port_change, true),
            ICMP => packet.update_l4_checksum(l4 + ICMP_CHECKSUM, 0, port_change, false),
            _ => {}
        }
    }
    true
}

#[inline(always)]
fn addresses_only(
    packet: &impl Packet,
    l3: usize,
    old: &FlowKey,
    new: &Tuple,
    hop: Option<&NextHop>,
) -> bool {
    let Some(ip) = at::<Ipv4>(packet, l3) else { return false };
    let addresses = checksum::add(
        checksum::difference(old.source, new.source),
        checksum::difference(old.destination, new.destination),
    );
    // SAFETY: `at` checked the bounds.
    unsafe { write_ip(ip, addresses, new, hop.is_some()) };
    write_macs(packet, hop);
    true
}

/// # Safety
/// `ip` points to a whole IPv4 header.
#[inline(always)]
pub(super) unsafe fn write_ip(ip: *mut Ipv4, addresses: u32, new: &Tuple, forwarded: bool) {
    let mut difference = addresses;
    // SAFETY: the caller vouches for `ip`.
    unsafe {
        store32::<{ offset_of!(Ipv4, source) }, _>(ip, new.source);
        store32::<{ offset_of!(Ipv4, destination) }, _>(ip, new.destination);
        if forwarded {
            // TTL and protocol are one word of the sum.
            let old = load16::<{ offset_of!(Ipv4, ttl) }, _>(ip);
            let ttl = (*ip).ttl.wrapping_sub(1);
            (*ip).ttl = ttl;
            let [_, protocol] = old.to_ne_bytes();
            difference =
                checksum::add(difference, checksum::difference16(old, u16::from_ne_bytes([ttl, protocol])));
        }
        let sum = load16::<{ offset_of!(Ipv4, checksum) }, _>(ip);
        store16::<{ offset_of!(Ipv4, checksum) }, _>(ip, checksum::apply(sum, difference));
    }
}

#[inline(always)]
pub(super) fn write_macs(packet: &impl Packet, hop: Option<&NextHop>) {
    let Some(hop) = hop else { return };
    let Some(ethernet) = at::<Ethernet>(packet, 0) else { return };
    // SAFETY: `at` checked the bounds; a frame begins at an even address, and so do the fields of a next hop.
    unsafe {
        copy_mac(&raw mut (*ethernet).destination, &raw const hop.mac);
        copy_mac(&raw mut (*ethernet).source, &raw const hop.source_mac);
    }
}

/// The same for IPv6. `ports` says that the packet has its transport header: it is not a later fragment.
#[inline(always)]
pub fn translate6(
    packet: &impl Packet,
    l3: usize,
    l4: usize,
    old: &FlowKey6,
    new: &Tuple,
    new6: &Addresses6,
    hop: Option<&NextHop>,
    ports: bool,
) -> bool {
    let Some(ip) = at::<Ipv6>(packet, l3) else { return false };
    let mut addresses = 0;
    let mut i = 0;
    while i < 4 {
        // SAFETY: the index is below the four words of each.
        unsafe {
            let (a, b) = (*old.source.as_ptr().add(i), *new6.source.as_ptr().add(i));
            addresses = checksum::add(addresses, checksum::difference(a, b));
            let (a, b) = (*old.destination.as_ptr().add(i), *new6.destination.as_ptr().add(i));
            addresses = checksum::add(addresses, checksum::difference(a, b));
        }
        i += 1;
    }
    let protocol = old.key.protocol;
    let header = if ports { at::<[u16; 4]>(packet, l4) } else { None };
    let port_change = checksum::difference16(old.key.source_port, new.source_port)
        + checksum::difference16(old.key.destination_port, new.destination_port);
    // SAFETY: `at` checked the bounds of both; packed structs and unaligned writes.
    unsafe {
        (*ip).source = new6.source;
        (*ip).destination = new6.destination;
        if hop.is_some() {
            (*ip).hop_limit = (*ip).hop_limit.wrapping_sub(1);
        }
        if let Some(header) = header {
            match protocol {
                TCP | UDP => {
                    store16::<0, _>(header, new.source_port);
                    store16::<2, _>(header, new.destination_port);
                }
                ICMPV6 => {
                    let change = (new.source_port | new.destination_port)
                        ^ (old.key.source_port | old.key.destination_port);
                    store16::<4, _>(header, load16::<4, _>(header) ^ change);
                }
                _ => {}
            }
        }
    }
    write_macs(packet, hop);
    if header.is_some() {
        match protocol {
            TCP => packet.update_l4_checksum(l4 + TCP_CHECKSUM, addresses, port_change, false),
            UDP => packet.update_l4_checksum(l4 + UDP_CHECKSUM, addresses, port_change, true),
            // ICMPv6 has a pseudo-header (RFC 4443 §2.3).
            ICMPV6 => packet.update_l4_checksum(l4 + ICMP_CHECKSUM, addresses, port_change, false),
            _ => {}
        }
    }
    true
}

/// Takes one from the hop limit of an IPv6 packet and puts the hardware addresses on. `false` if the header is not
/// where it was parsed.
#[inline(always)]
pub fn forwarded6(packet: &impl Packet, l3: usize, hop: &NextHop) -> bool {
    let Some(ip) = at::<Ipv6>(packet, l3) else { return false };
    // SAFETY: `at` checked the bounds.
    unsafe { (*ip).hop_limit = (*ip).hop_limit.wrapping_sub(1) };
    write_macs(packet, Some(hop));
    true
}
