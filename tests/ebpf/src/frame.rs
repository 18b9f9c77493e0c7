//! Ethernet, IPv4 without options and UDP, as one struct at the beginning of the frame.

use aya_ebpf::programs::XdpContext;

/// Fields of 16 bits, because from a frame's first byte on everything but the addresses is aligned to two, and wider
/// ones would be taken apart into bytes.
#[repr(C)]
pub struct Headers {
    pub destination: [u16; 3],
    pub source: [u16; 3],
    pub ethertype: u16,
    /// Version to header checksum.
    pub ip: [u16; 6],
    pub source_address: [u16; 2],
    pub destination_address: [u16; 2],
    pub source_port: u16,
    pub destination_port: u16,
    pub udp_length: u16,
    pub udp_checksum: u16,
}

const _: () = assert!(size_of::<Headers>() == 42);

/// Index in [`Headers::ip`].
pub const IP_CHECKSUM: usize = 5;

/// The headers, if the frame is as long.
#[inline(always)]
pub fn headers(ctx: &XdpContext) -> Option<*mut Headers> {
    let start = ctx.data();
    if start + size_of::<Headers>() > ctx.data_end() {
        return None;
    }
    Some(start as *mut Headers)
}

/// One's complement sum of 16-bit words, folded to 16 bits.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The words of an IPv4 address in network order.
#[inline(always)]
pub fn words(address: u32) -> [u16; 2] {
    [address as u16, (address >> 16) as u16]
}
