//! What the programs are told and what they count. Both sides compile this file: the lab includes it by path.
//!
//! Flow `i` has guest `i mod 64`, source port 20000 + `i mod 1024` and destination port 30000 + `i / 1024`. So 1,024
//! sockets on 64 guests open up to a million flows, and no two guests share a source port: a masquerade never has to
//! look for another one.

/// What the generator sends; one element.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Generator {
    /// The client's device: what is redirected into it arrives at the gateway.
    pub ifindex: u32,
    /// Number of flows less one; the number is a power of two.
    pub flow_mask: u32,
    /// `PICK_*`.
    pub pick: u32,
    /// Network order.
    pub destination: u32,
    /// The gateway's hardware address.
    pub gateway_mac: [u8; 6],
    /// 17: datagrams. 6: SYNs.
    pub protocol: u8,
    pub pad: u8,
}

/// Where the generator stands, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Picked {
    /// In order: packets sent so far. Random: the state of the random numbers, never 0.
    pub state: u64,
    /// In order: when the first one was sent.
    pub first_ns: u64,
    /// In order: when the last one was sent.
    pub last_ns: u64,
    /// In order: how many had arrived before the first.
    pub arrived_before: u64,
    /// In order: packets given up for lost.
    pub lost: u64,
}

/// What the hero run's generator sends; one element.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Hero {
    /// As in [`Generator`].
    pub ifindex: u32,
    /// Network order.
    pub destination: u32,
    /// The gateway's hardware address.
    pub gateway_mac: [u8; 6],
    pub pad: [u8; 2],
    /// Flows that are touched in turns: datagrams of flows 0 to this less one.
    pub live: u32,
    /// The first of them that is touched.
    pub first_touch: u32,
    /// Number of the first connection; they count on from there, modulo the mask and one.
    pub first_open: u32,
    pub open_mask: u32,
    /// When both clocks begin, `CLOCK_MONOTONIC`, and for how long they run.
    pub begin_ns: u64,
    pub length_ns: u64,
    /// Packets a second.
    pub touches: u64,
    pub opens: u64,
}

/// What the hero run's generator has sent, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct HeroSent {
    pub touched: u64,
    pub opened: u64,
    /// When the last packet was sent, how many had arrived before the first, and how many were given up for lost.
    pub last_ns: u64,
    pub arrived_before: u64,
    pub lost: u64,
}

pub const SECOND_NS: u64 = 1_000_000_000;

/// In order no more than this many packets are under way: a veth's ring holds 256.
pub const WINDOW: i64 = 128;
/// After so long what has not arrived is lost.
pub const PATIENCE_NS: u64 = 20_000_000;
/// The same in the hero run, which ends with the first loss, and may wait for a gateway that somebody else is in the way of.
pub const HERO_PATIENCE_NS: u64 = 500_000_000;

/// Each flow once, in the order of their numbers.
pub const PICK_IN_ORDER: u32 = 0;
/// Each packet a flow by chance.
pub const PICK_RANDOM: u32 = 1;

/// Where the bare redirect sends everything; one element.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Bare {
    pub ifindex: u32,
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
}

/// What the two flow tables' programs are told; one element.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Table {
    /// Secrets of the hash over records.
    pub seed: [u64; 2],
    /// Number of buckets of records less one; the number is a power of two.
    pub bucket_mask: u32,
    /// Where everything goes.
    pub ifindex: u32,
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    pub pad: [u8; 4],
}

/// What stands beside a key: a `HalfRecord` without it, as the value of a kernel hash or within a record.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Entry {
    pub ctl: u64,
    pub peer: u32,
    pub deadline: u32,
    pub hops: u32,
    pub new_source: u32,
    pub new_destination: u32,
    pub new_source_port: u16,
    pub new_destination_port: u16,
    pub rule: u32,
    pub packets: u32,
    pub bytes_low: u32,
    pub ack: u32,
}

/// The network of the keys.
pub const TABLE_NETWORK: u16 = 1;
/// Ticks that an entry lives after its last packet: a day, longer than any run.
pub const TABLE_IDLE: u32 = ((86_400 * 1_000_000_000u64) >> 26) as u32;

/// What the sink expects; one element.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Expected {
    /// Network order: the address that translated packets come from.
    pub public: u32,
    /// Network order.
    pub destination: u32,
    /// 1: also add up the checksums, which costs time.
    pub check: u32,
    /// 1: send every packet back to where it came from, as an answer, instead of dropping it.
    pub answer: u32,
}

/// What the sink saw, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The generator's packets, translated or not.
    pub packets: u64,
    /// Of them those of TCP.
    pub connections: u64,
    /// Those under the public address.
    pub translated: u64,
    /// Those with right checksums of IP and of UDP or TCP and a TTL less one; only counted when asked to check.
    pub sound: u64,
    /// Frames that are not the generator's.
    pub other: u64,
}

pub const GUESTS: u32 = 64;
/// 10.0.1.64; the guest's number is or'ed in.
pub const FIRST_GUEST: u32 = 0x0a00_0140;
/// Hardware address of a guest; its number is or'ed into the last byte.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x62, 0x65, 0x6e, 0x63, 0x40];
pub const SOCKETS: u32 = 1024;
pub const FIRST_SOURCE_PORT: u32 = 20_000;
pub const FIRST_DESTINATION_PORT: u32 = 30_000;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
/// Without the checksum that an Ethernet card would add: 64 bytes on the wire with it.
pub const FRAME_BYTES: usize = 60;
pub const SENT_TTL: u8 = 64;

const _: () = {
    assert!(size_of::<Generator>() == 24);
    assert!(size_of::<Picked>() == 40);
    assert!(size_of::<Bare>() == 16);
    assert!(size_of::<Table>() == 40);
    assert!(size_of::<Entry>() == 48);
    assert!(size_of::<Expected>() == 16);
    assert!(size_of::<Hero>() == 64);
    assert!(size_of::<HeroSent>() == 40);
    assert!(size_of::<Seen>() == 40);
};
