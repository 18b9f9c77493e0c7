//! Packets as the engine sees them: parse, rewrite, checksums.

pub mod answer;
pub mod arp;
pub mod checksum;
pub mod cut;
pub mod headers;
pub mod icmp;
pub mod ipv6;
pub mod nd;
pub mod parse;
pub mod rewrite;
pub mod wire;

use crate::opaque::opaque;

/// Access to one packet. The kernel's contexts and a byte buffer on the host implement it.
pub trait Packet {
    /// Address of the first byte (the Ethernet header).
    fn start(&self) -> usize;
    /// Address behind the last byte that can be read directly.
    fn end(&self) -> usize;
    /// Length of the whole packet, beyond what can be read directly.
    fn length(&self) -> u32;
    /// The length as far as it is known for nothing: all of it unless the packet is in several buffers.
    fn length_at_least(&self) -> u32 {
        self.length()
    }
    /// Makes the first `n` bytes directly readable and writable if they are not; pointers taken before are stale.
    fn pull(&self, n: u32) -> bool;
    /// Makes room for `n` bytes behind the Ethernet header, which stays the frame's first bytes; pointers are stale.
    /// `false`: not possible, the packet is to be dropped.
    fn grow(&self, n: u32) -> bool;
    /// Cuts the frame off behind `length` bytes; pointers are stale. `false`: not possible.
    fn trim(&self, length: u32) -> bool;
    /// Lets the packet's fragments arrive anew, in order; the packet itself is to be dropped afterwards. `false`: not possible, and
    /// nothing has been sent.
    fn cut(&self, cut: &cut::Cut) -> bool;
    /// Payload of each segment that the kernel or the device will cut this packet into; 0 if it is none such (GSO).
    fn segment(&self) -> u32;
    /// Was a VLAN tag taken out of the bytes by the driver?
    fn vlan_offloaded(&self) -> bool;
    /// Adds differences to the TCP, UDP or ICMP checksum at `offset`: `addresses` is the part that the
    /// pseudo-header covers, `ports` the part in the payload; both as made by [`checksum::difference`].
    /// A UDP checksum of zero stays zero, a computed zero becomes 0xffff (RFC 768). Pointers are stale afterwards.
    fn update_l4_checksum(&self, offset: usize, addresses: u32, ports: u32, udp: bool);
}

/// A pointer to a `T` at `offset`, if the packet has one there.
///
/// Two pointers are compared, never lengths: that is the form the verifier learns from (aya.md A2b #3).
#[inline(always)]
pub fn at<T>(packet: &impl Packet, offset: usize) -> Option<*mut T> {
    // Two checks that begin at the same address: the optimiser would drop the one that the other implies.
    let start = opaque(packet.start());
    if start + offset + size_of::<T>() > packet.end() {
        return None;
    }
    Some((start + offset) as *mut T)
}
