//! The shapes of the tables that live outside a policy generation: control word, devices, next hops, flows,
//! counters, events. ADR 0001 says why they look like this. Any change here that is not an addition in padding is a
//! new [`ABI`], and with it a new pin directory.

use crate::packet::parse::Station;
use crate::packet::wire::{load16, load32};

/// Version of everything in this file and in [`crate::policy`].
pub const ABI: u32 = 4;

/// Network id of the world outside; virtual networks have 1..=65535.
pub const WORLD: u16 = 0;

/// What the datapath reads first for every packet; one element.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Control {
    /// The policy in force; its parity picks the element of every pair.
    pub generation: u32,
    /// Number of buckets of the flow table minus one (a power of two).
    pub bucket_mask: u32,
    /// The same of the table for IPv6.
    pub bucket_mask6: u32,
    /// What was before these tables: 0 nothing of interest, [`START_MIGRATING`], or the last tick at which TCP connections
    /// older than the tables are adopted (ADR 0011).
    pub start: u32,
    /// Secrets of the flow hash; drawn once when the tables are made.
    pub seed: [u64; 2],
    pub settings: [Settings; 2],
}

/// [`Control::start`]: flows are being copied from the tables of another layout. Until they are all here what misses is
/// dropped and nothing is claimed: its flow may be among those that are still to come.
pub const START_MIGRATING: u32 = u32::MAX;

/// Timers and switches of one generation.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Settings {
    /// Ticks an established or connectionless flow may idle, by the class kept in the flow (`IDLE_*`).
    pub idle: [u32; 16],
    /// Ticks an unanswered SYN is remembered.
    pub tcp_half_open: u32,
    /// Ticks a flow's port is held after both sides have sent FIN.
    pub tcp_fin: u32,
    /// Ticks after a RST of the end itself.
    pub tcp_reset: u32,
    /// `HOST_*` bits: what guests may ask of the host.
    pub host_access: u32,
    /// Number of entries in `services`.
    pub services_used: u32,
    /// Events per tick and CPU that may be sampled.
    pub event_rate: u32,
    /// What flows judged now are stamped with, below 4,096: the policy's generation as far as it fits.
    pub epoch: u32,
    /// Flows with another stamp that may be judged again, per tick and CPU; 0: flows stay as they were judged.
    pub reevaluate: u32,
    /// `REFUSAL_*`: what a guest is told whose flow is refused for want of a port.
    pub refusal: u32,
    /// Answers of our own (refusals) that may be sent, per tick and CPU.
    pub answers: u32,
    /// Ticks a UDP port stays with its inside socket after its flows have idled out.
    pub udp_hold: u32,
    /// Ticks after a RST that may be anybody's, if nobody speaks any more.
    pub tcp_transitory: u32,
    /// `NAT_*` bits: in what the profile `rfc` differs from `azure`.
    pub nat: u32,
    pub pad: [u32; 3],
    pub services: [Service; 16],
}

/// A TCP port belongs to one inside socket, whatever its destinations (RFC 5382 REQ-1 and REQ-7), as those of UDP and echo
/// always do.
pub const NAT_TCP_BY_SOCKET: u32 = 1;
/// What arrives at a socket's port from anybody is judged by its guest's groups as a new flow (RFC 4787 REQ-8).
pub const NAT_FILTER_BY_GROUPS: u32 = 2;
/// Guests are told of every flow that is refused, not only for want of a port (RFC 5508 REQ-8).
pub const NAT_TELL: u32 = 4;

/// Silence.
pub const REFUSAL_SILENT: u32 = 0;
/// ICMP "communication administratively prohibited".
pub const REFUSAL_ICMP: u32 = 1;
/// RST to TCP, ICMP to the rest.
pub const REFUSAL_RESET: u32 = 2;

pub const HOST_DHCP: u32 = 1;
pub const HOST_DNS: u32 = 2;
pub const HOST_ECHO: u32 = 4;

/// Idle classes below this one belong to the global timers; from here on to outbound rules.
pub const IDLE_TCP: u8 = 0;
pub const IDLE_UDP: u8 = 1;
pub const IDLE_ICMP: u8 = 2;
pub const IDLE_OTHER: u8 = 3;
pub const IDLE_RULES: u8 = 4;

/// A port range of the host that guests may reach; ports in native order, inclusive.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Service {
    /// IANA protocol number.
    pub protocol: u16,
    pub first: u16,
    pub last: u16,
    pub pad: u16,
}

/// Slots of the device table; a device stands at its ifindex modulo this.
pub const DEVICE_SLOTS: u32 = 4096;

/// A device with a program of ours on it. The table holds one for each generation parity, side by side.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Device {
    /// 0: this generation has no device here.
    pub ifindex: u32,
    /// `DEVICE_*`.
    pub kind: u8,
    pub pad0: u8,
    /// The virtual network of its guests; `WORLD` for an uplink.
    pub network: u16,
    /// The hardware address we answer ARP with: the device's own, or its bridge's.
    pub mac: [u8; 6],
    pub pad1: u16,
    /// All ones where frames for other stations may arrive: on uplinks and on devices that several guests share. 0: whatever
    /// arrives comes from the one guest, and is for us.
    pub strict: u32,
    pub pad2: [u32; 3],
}

impl Device {
    /// Is the frame for another hardware address than the device's? Without a branch: every packet is asked.
    #[inline(always)]
    pub fn apart(&self, station: Station) -> bool {
        // SAFETY: the six bytes of `mac`, which stands at an even address.
        let own =
            unsafe { Station(load32::<0, _>(&raw const self.mac), load16::<4, _>(&raw const self.mac)) };
        ((station.0 ^ own.0) | (station.1 ^ own.1) as u32) & self.strict != 0
    }
}

pub const DEVICE_GUEST: u8 = 1;
pub const DEVICE_UPLINK: u8 = 2;

/// Number of next hops; index 0 is none, 1 is this host.
pub const NEXT_HOP_SLOTS: u32 = 4096;
pub const NEXT_HOP_HOST: u16 = 1;
/// Back in: a guest's packet to one of our own public addresses leaves by this hop and arrives from it (ADR 0007). The
/// last slot, so that no index handed out before it existed is taken.
pub const NEXT_HOP_LOOP: u16 = NEXT_HOP_SLOTS as u16 - 1;

/// Where a flow's packets go: device and hardware address. Indices are handed out by the controller and stay with
/// the same guest or gateway across generations and restarts, because live flows refer to them.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NextHop {
    pub ifindex: u32,
    /// `HOP_*`.
    pub kind: u8,
    /// `HOP_FLAG_*`.
    pub flags: u8,
    pub mtu: u16,
    /// Destination hardware address, valid with `HOP_FLAG_RESOLVED`.
    pub mac: [u8; 6],
    /// Source hardware address to send with.
    pub source_mac: [u8; 6],
    /// World only: the tick after which `mac` must not be trusted any more (the controller has not refreshed it);
    /// 0 is for ever.
    pub fresh_until: u32,
    /// Network order: the guest's address, or the router's towards the world; 0 for an IPv6 one.
    pub address: u32,
    pub pad: u32,
    /// The same for IPv6, as in the packet.
    pub address6: [u32; 4],
    pub pad1: [u32; 4],
}

/// An IPv4 address as the tables have it: network order; 0 for an IPv6 one.
#[cfg(not(target_arch = "bpf"))]
pub fn v4(address: core::net::IpAddr) -> u32 {
    match address {
        core::net::IpAddr::V4(a) => u32::from_ne_bytes(a.octets()),
        core::net::IpAddr::V6(_) => 0,
    }
}

/// An IPv6 address as the tables have it: as it stands in the packet; 0 for an IPv4 one.
#[cfg(not(target_arch = "bpf"))]
pub fn v6(address: core::net::IpAddr) -> [u32; 4] {
    match address {
        core::net::IpAddr::V4(_) => [0; 4],
        core::net::IpAddr::V6(a) => words6(a.octets()),
    }
}

/// An IPv6 address in packet order as four words.
pub const fn words6(o: [u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
        u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
        u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
        u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
    ]
}

pub const HOP_NONE: u8 = 0;
pub const HOP_HOST: u8 = 1;
pub const HOP_GUEST: u8 = 2;
pub const HOP_WORLD: u8 = 3;
/// [`NEXT_HOP_LOOP`].
pub const HOP_LOOP: u8 = 4;
pub const HOP_FLAG_RESOLVED: u8 = 1;
/// The policy names the hardware address; never learned from packets.
pub const HOP_FLAG_PINNED: u8 = 2;
/// A frame redirected into this device by XDP arrives (its peer or driver takes XDP frames).
pub const HOP_FLAG_XDP: u8 = 4;

/// What identifies one direction of a flow. Addresses and ports in network order.
///
/// ICMP echo, and of IPv4 timestamps, masks and information: a request has its identifier in `source_port`, a reply in
/// `destination_port`, the other is 0.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    pub source: u32,
    pub destination: u32,
    pub source_port: u16,
    pub destination_port: u16,
    /// Virtual network the packet is seen in, or `WORLD`.
    pub network: u16,
    pub protocol: u8,
    /// `KIND_*`.
    pub kind: u8,
}

pub const KIND_FLOW: u8 = 0;
/// A port that one inside socket has towards everybody (UDP, echo; TCP with [`NAT_TCP_BY_SOCKET`]); both directions of it are
/// records of this kind.
pub const KIND_MAPPING: u8 = 1;
/// A flow of ICMP messages without an identifier: a kind of its own, so that none is taken for an echo with identifier 0.
pub const KIND_PORTLESS: u8 = 2;

/// What one direction of a flow needs: one cache line.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HalfRecord {
    pub key: FlowKey,
    /// Generation, phase, TCP state, idle class, flags; see [`crate::flow::Ctl`]. Only written atomically.
    pub ctl: u64,
    /// Slot index of the other direction.
    pub peer: u32,
    /// The last tick at which this direction alone keeps the flow alive.
    pub deadline: u32,
    /// `bytes_high:8 | ingress:12 | next_hop:12`, see the methods of these names.
    pub hops: u32,
    /// The packet's addresses and ports after translation, network order.
    pub new_source: u32,
    pub new_destination: u32,
    pub new_source_port: u16,
    pub new_destination_port: u16,
    /// Id of the rule that allowed the flow ([`FLOW_RULE`], 0 is none) and the epoch it was judged in.
    pub rule: u32,
    /// Packets of this direction; two CPUs at once may lose a count, never more than the race.
    pub packets: u32,
    /// The lower 32 bits of this direction's bytes.
    pub bytes_low: u32,
    /// TCP: the last acknowledgement number this direction sent, network order; or what it is to acknowledge, if a SYN or FIN of
    /// the other direction is not acknowledged yet. 0 is not known. Who wants to end the flow must know what each side
    /// expects next (RFC 5961 §3.2; [`crate::tcp_state`]).
    pub ack: u32,
}

impl HalfRecord {
    /// Next hop of this direction's packets.
    #[inline(always)]
    pub const fn next_hop(&self) -> u16 {
        (self.hops & 0xfff) as u16
    }

    /// Next hop that stands for where this direction's packets come *from*; for guests checked on every packet.
    #[inline(always)]
    pub const fn ingress(&self) -> u16 {
        (self.hops >> 12 & 0xfff) as u16
    }

    /// Bytes of this direction's packets, modulo 2^40.
    #[inline(always)]
    pub const fn bytes(&self) -> u64 {
        (self.hops as u64 >> 24) << 32 | self.bytes_low as u64
    }
}

/// [`HalfRecord::hops`] of a new flow.
#[inline(always)]
pub const fn hops(next_hop: u16, ingress: u16) -> u32 {
    (next_hop as u32 & 0xfff) | (ingress as u32 & 0xfff) << 12
}

/// In [`HalfRecord::rule`]: the rule's id; the bits above are [`Settings::epoch`] at the time.
pub const FLOW_RULE: u32 = 0x000f_ffff;
pub const EPOCH_SHIFT: u32 = 20;

/// What one direction of an IPv6 flow needs: a half-record whose key has the last 32 bits of each address, and the
/// addresses whole behind it. Two cache lines, of which a miss reads the first only.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HalfRecord6 {
    pub half: HalfRecord,
    pub source: [u32; 4],
    pub destination: [u32; 4],
    /// The packet's addresses after translation, as they stand in it.
    pub new_source: [u32; 4],
    pub new_destination: [u32; 4],
}

/// What identifies one direction of an IPv6 flow.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FlowKey6 {
    /// With the last 32 bits of the addresses.
    pub key: FlowKey,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// Slots that share one element of the flow table's array.
pub const BUCKET_SLOTS: usize = 8;

/// Eight half-records; the unit of probing.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Bucket {
    pub slots: [HalfRecord; BUCKET_SLOTS],
}

/// Eight IPv6 half-records.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Bucket6 {
    pub slots: [HalfRecord6; BUCKET_SLOTS],
}

/// What one guest has of the flow table: one element for each next hop, which is one address of one guest. A cache line of its
/// own, since every new flow of the guest writes it, on whatever processor. See [`crate::quota`].
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GuestFlows {
    /// `reserved:32 | held:32`: how many places have been asked for, ever, and how many flows the guest holds.
    pub held: u64,
    /// Its places in the ring of half-open flows.
    pub waiting: u64,
    /// Where in that ring its oldest place may be; only a hint.
    pub oldest: u64,
    /// Packets that opened no flow because the guest had as many as it may.
    pub refused: u64,
    /// Half-open flows ended to make room for new ones.
    pub replaced: u64,
    pub pad: [u64; 3],
}

/// Where work on the whole table goes on, of IPv4 and IPv6.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cursors {
    /// The next place in the ring of half-open flows, modulo its size.
    pub half_open: [u64; 2],
    /// The next slot to be looked at for a dead flow, modulo the number of slots.
    pub sweep: [u64; 2],
    pub pad: [u64; 4],
}

/// Places in the ring of half-open flows of a table with this many buckets less one: an eighth of the flows it is made
/// for, which are two to a bucket.
#[inline(always)]
pub const fn half_open_mask(bucket_mask: u32) -> u32 {
    bucket_mask >> 2
}

/// Packets and bytes; the element of the per-CPU reason counters.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// Per-CPU hits of one rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RuleCount {
    /// New flows allowed, or packets denied.
    pub hits: u64,
    pub bytes: u64,
    /// Tick of the last hit.
    pub last: u64,
}

/// A sampled drop, or an exhaustion. Addresses and ports in network order.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Event {
    pub tick: u32,
    pub ifindex: u32,
    pub source: u32,
    pub destination: u32,
    pub source_port: u16,
    pub destination_port: u16,
    pub network: u16,
    pub protocol: u8,
    /// [`crate::Reason`] as its index.
    pub reason: u8,
    pub rule: u32,
    pub length: u32,
    /// [`crate::engine::Side`] as its number.
    pub side: u8,
    /// 1 XDP, 2 TC.
    pub hook: u8,
    /// 1: `source6` and `destination6` are the addresses.
    pub v6: u8,
    pub pad: u8,
    pub pad1: u32,
    pub source6: [u32; 4],
    pub destination6: [u32; 4],
}

/// The mark on packets our own TC programs redirect, so that the egress program of the guest's device tells them
/// from the host's. It is cleared there; a veth between namespaces scrubs it before a guest could see or set it.
pub const MARK: u32 = 0x9071_c711;

const _: () = {
    assert!(size_of::<FlowKey>() == 16);
    assert!(size_of::<HalfRecord>() == 64, "a half-record is one cache line");
    assert!(size_of::<HalfRecord6>() == 128, "an IPv6 half-record is two cache lines");
    assert!(size_of::<FlowKey6>() == 48);
    assert!(size_of::<Bucket>() == 512);
    assert!(size_of::<Bucket6>() == 1024);
    assert!(size_of::<Device>() == 32);
    assert!(size_of::<NextHop>() == 64);
    // `packet::headers::copy_mac` copies half-words.
    assert!(
        core::mem::offset_of!(NextHop, mac).is_multiple_of(2)
            && core::mem::offset_of!(NextHop, source_mac).is_multiple_of(2)
    );
    assert!(size_of::<Settings>() == 128 + 128);
    assert!(size_of::<Control>() == 32 + 2 * 256);
    // Next hops fit the twelve bits that a half-record has for each.
    assert!(NEXT_HOP_SLOTS == 1 << 12);
    assert!(size_of::<Event>() == 72);
    assert!(size_of::<GuestFlows>() == 64, "one cache line");
    assert!(size_of::<Cursors>() == 64);
};

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($t:ty),+) => {
            // SAFETY: `repr(C)`, plain integers and arrays of them, padding spelt out, valid for any bit pattern.
            $(unsafe impl aya::Pod for $t {})+
        };
    }
    pod!(
        super::Control,
        super::Device,
        super::NextHop,
        super::FlowKey,
        super::HalfRecord,
        super::Bucket,
        super::HalfRecord6,
        super::FlowKey6,
        super::Bucket6,
        super::Count,
        super::RuleCount,
        super::GuestFlows,
        super::Cursors,
        super::Event
    );
}
