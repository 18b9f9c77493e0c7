//! The tables of one policy generation, as one image of 512-byte pages.
//!
//! A policy is in force whole or not at all (design §1), so everything that belongs together lies in one array map
//! whose pages the compiler lays out: page 0 is the [`Header`], which says at which page each table begins. Address
//! look-ups that need a longest prefix or a hash stand beside it, one map each, swapped with it:
//!
//! | map | key | value |
//! | --- | --- | --- |
//! | pages | page number | [`Page`] |
//! | prefixes | IPv4 address, longest prefix | global address class (index into `locals`) |
//! | spaces | routing id (big endian), IPv4 address, longest prefix | [`space_value`]: where that address is, seen from there |
//! | endpoints | [`EndpointKey`] | [`endpoint_value`] |
//! | prefixes6, spaces6, endpoints6 | the same for IPv6 | the same; classes and endpoints share one numbering with IPv4 |

/// One element of the pages map.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Page {
    pub words: [u64; 64],
}

impl Default for Page {
    fn default() -> Self {
        Self { words: [0; 64] }
    }
}

pub const PAGE_BYTES: usize = 512;

/// Page 0: the first page of every table.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Header {
    pub generation: u32,
    /// Pages in the image.
    pub pages: u32,
    /// [`Endpoint`] records.
    pub endpoints: u32,
    /// [`Ruleset`] records; number 0 is "no group" and never asked.
    pub rulesets: u32,
    /// `u16` class numbers, see [`Ruleset`].
    pub locals: u32,
    /// 65,536 `u16`: native port -> global port class.
    pub ports: u32,
    /// `u64` summaries, one for each row.
    pub summaries: u32,
    /// Rows: one page (4,096 bits) each.
    pub rows: u32,
    /// `u32`: [`RULE_ALLOW`] and the rule's id.
    pub rules: u32,
    /// `u32` units of the endpoints' allocations: frontend << 16 | unit; a unit is 8 ports (design §5).
    pub units: u32,
    /// [`Segment`] records.
    pub segments: u32,
    /// [`Frontend`] records.
    pub frontends: u32,
    /// For each frontend 2 times 8,192 `u16`, of TCP and of UDP ([`owner_entry`]): the endpoint + 1 that owns the unit,
    /// 0 nobody. Units that drain have their owner still.
    pub owners: u32,
    /// [`Listener`] records.
    pub listeners: u32,
    /// `u16` slots of the listeners: endpoint + 1 of a backend that takes new flows, 0 none.
    pub slots: u32,
    pub endpoints_used: u32,
    pub frontends_used: u32,
    pub listeners_used: u32,
    /// Flows that one guest may hold of IPv4 and of IPv6; 0 for as many as there is room for.
    pub flow_quota: [u32; 2],
}

/// One address of one guest: an IP configuration with its groups, next hop and way out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Endpoint {
    /// Network order.
    pub address: u32,
    pub network: u16,
    pub next_hop: u16,
    /// Rulesets, 0 for "no group here": in the order they are asked.
    pub nic_outbound: u32,
    pub subnet_outbound: u32,
    pub subnet_inbound: u32,
    pub nic_inbound: u32,
    /// Ruleset asked before the groups, outbound; 0 for none. See [`rule_action`].
    pub platform_outbound: u32,
    /// Where its destinations are looked up in `spaces`: its virtual network's id, or that of a route table in it.
    pub routing: u16,
    /// 1: an IPv6 configuration; `address` is then 0.
    pub v6: u8,
    /// 1: it has an instance-level public IP.
    pub instance: u8,
    /// The address of an IPv6 configuration as it stands in the packet.
    pub address6: [u32; 4],
    /// Instance-level public IP as it stands in the packet; of IPv4 the first word.
    pub instance_address: [u32; 4],
    /// Its gateway's address, from which errors come; of IPv4 the first word.
    pub gateway: [u32; 4],
    /// Its SNAT ports for TCP, UDP and echo, by [`alloc_of`].
    pub alloc: [Alloc; 3],
}

/// The ports one endpoint may claim for one protocol.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Alloc {
    /// First of its [`Segment`]s; they are used up one after the other.
    pub first_segment: u32,
    /// 0: no outbound method for this protocol.
    pub segments: u16,
    /// Idle class of its flows: `IDLE_RULES..`, or 0 for the global timers.
    pub idle_class: u8,
    /// `ALLOC_*`.
    pub flags: u8,
    /// Ports in all its segments.
    pub ports: u32,
    pub pad: u32,
}

/// Established TCP flows that idle out end with a RST to both sides.
pub const ALLOC_RESET: u8 = 1;

pub const ALLOC_TCP: usize = 0;
pub const ALLOC_UDP: usize = 1;
pub const ALLOC_ECHO: usize = 2;

/// Which of an endpoint's allocations a protocol draws on; `None`: it has no ports.
#[inline(always)]
pub const fn alloc_of(protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(ALLOC_TCP),
        17 => Some(ALLOC_UDP),
        1 | 58 => Some(ALLOC_ECHO),
        _ => None,
    }
}

/// Units that are tried together, in one permutation.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Segment {
    /// First in `units`.
    pub first_unit: u32,
    pub units: u32,
}

/// What listens at a port of a frontend: a load balancing rule or an inbound NAT rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Listener {
    /// First of its `slots`, and their number less one (a power of two less one). A NAT rule has one slot.
    pub first_slot: u32,
    pub mask: u32,
    /// Network order.
    pub backend_port: u16,
    /// `DISTRIBUTE_*`.
    pub distribution: u8,
    /// `LISTENER_*`.
    pub flags: u8,
    /// Idle class of its flows: `IDLE_RULES..`, or 0 for the global timers.
    pub idle_class: u8,
    pub pad: [u8; 3],
}

/// The destination address stays the frontend's.
pub const LISTENER_FLOATING: u8 = 1;
/// Established TCP flows that idle out end with a RST to both sides.
pub const LISTENER_RESET: u8 = 2;

/// By all five fields.
pub const DISTRIBUTE_FLOW: u8 = 0;
/// By source and destination address.
pub const DISTRIBUTE_SOURCE: u8 = 1;
/// By both addresses and the protocol.
pub const DISTRIBUTE_SOURCE_PROTOCOL: u8 = 2;

/// One group in one direction, seen from one virtual network (what `VirtualNetwork` means depends on it).
///
/// For each field: global class -> local class -> row of bits, one bit a rule in priority order.
/// `local = locals[local_base[f] + global]` for the address and port fields, `row = row_base[f] + local`;
/// for the protocol the class is [`protocol_class`] and `row = row_base[PROTOCOL] + class`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Ruleset {
    pub local_base: [u32; 4],
    pub row_base: [u32; 5],
    /// First of its entries in `rules`.
    pub rule_base: u32,
    /// Rules, default rules included; at most 4,000.
    pub rules: u32,
    /// The same group and direction, but only the rules that name the platform tag [`EXEMPT_DNS`], [`EXEMPT_IMDS`],
    /// [`EXEMPT_LKM`] (minus 1) as destination: rulesets of their own, 0 where no rule does. They need not match.
    pub platform: [u32; 3],
    pub pad: [u32; 2],
}

/// Fields of a ruleset, as indices of `local_base` and `row_base`.
pub const SOURCE: usize = 0;
pub const DESTINATION: usize = 1;
pub const SOURCE_PORT: usize = 2;
pub const DESTINATION_PORT: usize = 3;
pub const PROTOCOL: usize = 4;

/// What a platform rule does besides [`RULE_ALLOW`]: the packet skips the groups but for what their `platform`
/// rulesets of this number say. 0 in the rules of groups.
#[inline(always)]
pub const fn rule_action(rule: u32) -> u32 {
    rule >> 24 & 0xf
}
/// `AzurePlatformDNS`.
pub const EXEMPT_DNS: u32 = 1;
/// `AzurePlatformIMDS`.
pub const EXEMPT_IMDS: u32 = 2;
/// `AzurePlatformLKM`.
pub const EXEMPT_LKM: u32 = 3;
/// A platform service no tag stands for.
pub const EXEMPT_OTHER: u32 = 4;
/// The rule's id in a word of the `rules` table.
pub const RULE_ID: u32 = 0x00ff_ffff;

/// Classes of the protocol field.
pub const PROTOCOL_CLASSES: u32 = 6;

/// The protocol's class: TCP, UDP, ICMP of either family, ESP, AH and all others.
#[inline(always)]
pub const fn protocol_class(protocol: u8) -> u32 {
    match protocol {
        6 => 0,
        17 => 1,
        1 | 58 => 2,
        50 => 3,
        51 => 4,
        _ => 5,
    }
}

/// In `rules`: the rule's access is Allow. The others are [`rule_action`] and [`RULE_ID`].
pub const RULE_ALLOW: u32 = 1 << 31;
/// No rule: no group was asked.
pub const RULE_NONE: u32 = 0;

/// A public address that SNAT translates to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Frontend {
    /// Network order; 0 for an IPv6 one.
    pub address: u32,
    /// `FRONTEND_*`.
    pub flags: u32,
    pub pad: [u32; 2],
    /// As it stands in the packet.
    pub address6: [u32; 4],
}

/// The host has this address too: what SNAT does not own there is the host's.
pub const FRONTEND_HOST: u32 = 1;

/// Ports of a unit.
pub const UNIT_PORTS: u32 = 8;
/// Units of an address: 65,536 / 8.
pub const ADDRESS_UNITS: u32 = 8192;

/// Index in `owners`.
#[inline(always)]
pub const fn owner_entry(frontend: u32, udp: bool, unit: u32) -> u32 {
    (frontend * 2 + udp as u32) * ADDRESS_UNITS + unit
}

/// Key of the endpoints map. Port and protocol are 0 but for listeners.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct EndpointKey {
    /// Network order.
    pub address: u32,
    pub network: u16,
    /// Network order.
    pub port: u16,
    pub protocol: u8,
    pub pad: [u8; 3],
}

/// Key of the endpoints6 map.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct EndpointKey6 {
    /// As it stands in the packet.
    pub address: [u32; 4],
    pub network: u16,
    /// Network order.
    pub port: u16,
    pub protocol: u8,
    pub pad: [u8; 3],
}

/// What the spaces map says of an address: `kind << 24 | argument`; 0 is "outside".
#[inline(always)]
pub const fn space_value(kind: u32, argument: u32) -> u32 {
    kind << 24 | (argument & 0xff_ffff)
}

/// Inside the virtual network whose id is the argument: the own one, or a peer's. Under routing id 0 (the world's) it
/// says that some virtual network has the address.
pub const IN_NETWORK: u32 = 1;
/// Outside, whatever a shorter prefix says (a route to the Internet).
pub const IN_WORLD: u32 = 2;
/// A route that leads nowhere.
pub const IN_NOWHERE: u32 = 3;
/// A route through a virtual network gateway, which this host is not.
pub const IN_GATEWAY: u32 = 4;
/// A route through the guest whose endpoint is the argument.
pub const IN_APPLIANCE: u32 = 5;
/// A service of this host under a platform address.
pub const IN_PLATFORM: u32 = 6;

/// What the endpoints map says of an address: `kind << 24 | index`; 0 is "nothing known".
#[inline(always)]
pub const fn endpoint_value(kind: u32, index: u32) -> u32 {
    kind << 24 | (index & 0xff_ffff)
}

/// In a virtual network: a guest; the index is its endpoint.
pub const AT_GUEST: u32 = 1;
/// In the world: an instance-level public IP; the index is its endpoint.
pub const AT_INSTANCE: u32 = 2;
/// In the world: a frontend; the index is its frontend.
pub const AT_FRONTEND: u32 = 3;
/// In a virtual network or the world: an address of this host.
pub const AT_HOST: u32 = 4;
/// In a virtual network: a gateway address that no device of the host carries; answers echo through the host only.
/// In the world: a public address of the policy in no use.
pub const AT_UNUSED: u32 = 5;
/// In the world, with port and protocol: the index is its listener.
pub const AT_LISTENER: u32 = 6;
/// Or'ed into the kind: the datapath answers ARP for it on the uplinks (`announce: proxy`).
pub const AT_PROXY: u32 = 0x80;

const _: () = {
    assert!(size_of::<Page>() == PAGE_BYTES);
    assert!(size_of::<Header>() <= PAGE_BYTES);
    assert!(size_of::<Endpoint>() == 128);
    assert!(size_of::<Alloc>() == 16);
    assert!(size_of::<Segment>() == 8);
    assert!(size_of::<Listener>() == 16);
    assert!(size_of::<Ruleset>() == 64);
    assert!(size_of::<Frontend>() == 32);
    assert!(size_of::<EndpointKey>() == 12);
    assert!(size_of::<EndpointKey6>() == 24);
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
        super::Page,
        super::Header,
        super::Endpoint,
        super::Segment,
        super::Listener,
        super::Ruleset,
        super::Frontend,
        super::EndpointKey,
        super::EndpointKey6
    );
}
