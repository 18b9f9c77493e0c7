//! Wire formats. All packed: nothing in a packet is aligned. Multi-byte fields are as on the wire.

use super::wire::{load16, load32, store16, store32};

/// Ethernet II.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

/// The four bytes an 802.1Q tag puts before the EtherType.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Vlan {
    pub tci: u16,
    pub ethertype: u16,
}

/// RFC 791, without options.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_length: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// RFC 9293, the fixed part.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Tcp {
    pub source: u16,
    pub destination: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub offset: u8,
    pub flags: u8,
    pub window: u16,
    pub checksum: u16,
    pub urgent: u16,
}

/// RFC 768.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    pub length: u16,
    pub checksum: u16,
}

/// RFC 792; `id` is that of echo messages.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub checksum: u16,
    pub id: u16,
    pub sequence: u16,
}

/// RFC 826 for IPv4 over Ethernet.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Arp {
    pub hardware: u16,
    pub protocol: u16,
    pub sizes: u16,
    pub operation: u16,
    pub sender_mac: [u8; 6],
    pub sender: u32,
    pub target_mac: [u8; 6],
    pub target: u32,
}

/// Copies a hardware address by words: LLVM makes a call to a byte-wise memmove of `*to = *from` (aya.md fact 5),
/// which was a fifth of the program at 1 k flows.
///
/// # Safety
/// Both point to six bytes, neither of them on a BPF stack unless it is aligned to four.
#[inline(always)]
pub unsafe fn copy_mac(to: *mut [u8; 6], from: *const [u8; 6]) {
    // SAFETY: the caller vouches for both.
    unsafe {
        store32::<0, _>(to, load32::<0, _>(from));
        store16::<4, _>(to, load16::<4, _>(from));
    }
}

/// Are these the same hardware address?
///
/// # Safety
/// As for [`copy_mac`].
#[inline(always)]
pub unsafe fn same_mac(a: *const [u8; 6], b: *const [u8; 6]) -> bool {
    // SAFETY: the caller vouches for both.
    unsafe { load32::<0, _>(a) == load32::<0, _>(b) && load16::<4, _>(a) == load16::<4, _>(b) }
}

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_VLAN: u16 = 0x8100;
pub const ETHERTYPE_QINQ: u16 = 0x88a8;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;

pub const ECHO_REPLY: u8 = 0;
pub const ECHO_REQUEST: u8 = 8;
pub const ECHO_REPLY6: u8 = 129;
pub const ECHO_REQUEST6: u8 = 128;

/// Where the checksum stands in the transport header, for the protocols that are translated.
pub const TCP_CHECKSUM: usize = 16;
pub const UDP_CHECKSUM: usize = 6;
pub const ICMP_CHECKSUM: usize = 2;
