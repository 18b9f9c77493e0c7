//! Incremental Internet checksums (RFC 1624). Sums are one's complement over 16-bit words in the order they stand in
//! memory, which is the same on either byte order.

use super::wire::{load16, store16};
use crate::opaque::opaque;

/// Folds a sum of 16-bit words to 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// One's complement addition of 32 bits.
///
/// The sum is opaque, or LLVM makes a comparison and a branch of the carry, and the verifier of Linux 6.1 follows both
/// sides of each: a sum of twenty words was a program "too large" (a million instructions).
#[inline(always)]
pub fn add(a: u32, b: u32) -> u32 {
    let sum = opaque(a as usize + b as usize) as u64;
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

/// What changes in a checksum when `old` becomes `new`.
#[inline(always)]
pub fn difference(old: u32, new: u32) -> u32 {
    add(!old, new)
}

/// The same for a 16-bit word. The complement is taken of 16 bits: the upper half must not count.
#[inline(always)]
pub const fn difference16(old: u16, new: u16) -> u32 {
    (!old) as u32 + new as u32
}

/// RFC 1624 equation 3: the checksum after a change.
#[inline(always)]
pub fn apply(checksum: u16, difference: u32) -> u16 {
    !fold(add((!checksum) as u32, difference))
}

/// Updates a transport checksum that is complete in the packet (XDP, host): see [`super::Packet::update_l4_checksum`].
#[inline(always)]
pub fn in_place(packet: &impl super::Packet, offset: usize, addresses: u32, ports: u32, udp: bool) {
    let Some(field) = super::at::<[u8; 2]>(packet, offset) else { return };
    // SAFETY: `at` checked the bounds.
    let old = unsafe { load16::<0, _>(field) };
    if udp && old == 0 {
        return;
    }
    let mut new = apply(old, add(addresses, ports));
    if udp && new == 0 {
        new = 0xffff;
    }
    // SAFETY: as above.
    unsafe { store16::<0, _>(field, new) };
}

/// The whole checksum of `bytes`; for tests and packets we build ourselves.
pub fn of(bytes: &[u8]) -> u16 {
    let mut sum = 0;
    for pair in bytes.chunks(2) {
        sum = add(sum, u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]) as u32);
    }
    !fold(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incremental_change_equals_the_sum_made_anew() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..100_000 {
            let mut bytes = [0u8; 20];
            for b in bytes.iter_mut() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *b = if state & 0x300 == 0 { 0xff } else { state as u8 };
            }
            let before = of(&bytes);
            let old = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
            let port = u16::from_ne_bytes(bytes[8..10].try_into().unwrap());
            let (new, new_port) = ((state >> 20) as u32, (state >> 3) as u16);
            bytes[4..8].copy_from_slice(&new.to_ne_bytes());
            bytes[8..10].copy_from_slice(&new_port.to_ne_bytes());
            let after = apply(before, add(difference(old, new), difference16(port, new_port)));
            let whole = of(&bytes);
            // 0 and 0xffff are the same number in one's complement.
            assert!(after == whole || (after ^ whole == 0xffff && (after == 0 || whole == 0)), "{bytes:?}");
        }
    }
}
