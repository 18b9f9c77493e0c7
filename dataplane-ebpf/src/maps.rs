//! The maps. Shapes are `portcullis_common`'s; sizes that depend on the policy are overridden at load.

use aya_ebpf::bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{
    Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
};
use aya_ebpf::macros::btf_map;
use portcullis_common::engine::Context;
use portcullis_common::env::Refusal;
use portcullis_common::packet::cut::{Cut, LONGEST, ROOM};
use portcullis_common::policy::{EndpointKey, EndpointKey6};
use portcullis_common::reason::REASON_SLOTS;
use portcullis_common::reassembly::{DATAGRAM_SETS, DatagramSet};
use portcullis_common::snat::TRIED_BUCKETS;
use portcullis_common::{
    Bucket, Bucket6, Control, Count, Cursors, DEVICE_SLOTS, Device, Event, FlowKey, GuestFlows,
    NEXT_HOP_SLOTS, NextHop, RuleCount,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const INNER: usize = BPF_F_INNER_MAP as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();

#[btf_map]
pub static DEVICES: Array<[Device; 2], { DEVICE_SLOTS as usize }> = Array::new();

#[btf_map]
pub static NEXT_HOPS: Array<NextHop, { NEXT_HOP_SLOTS as usize }> = Array::new();

/// Overridden at load to what `flowTable.maxFlows` asks for.
#[btf_map]
pub static FLOWS: Array<Bucket, 4096, MMAPABLE> = Array::new();

/// Overridden at load to what `flowTable.maxFlowsIPv6` asks for.
#[btf_map]
pub static FLOWS6: Array<Bucket6, 1024, MMAPABLE> = Array::new();

/// By next hop: what each guest has of the flow tables.
#[btf_map]
pub static GUEST_FLOWS: Array<GuestFlows, { NEXT_HOP_SLOTS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub static CURSORS: Array<Cursors, 1> = Array::new();

/// The ring of half-open flows; overridden at load to an eighth of `flowTable.maxFlows`, as is the other one.
#[btf_map]
pub static HALF_OPEN: Array<u64, 1024> = Array::new();

#[btf_map]
pub static HALF_OPEN6: Array<u64, 256> = Array::new();

/// Indexed by the generation's parity, as are the six below.
///
/// The words of a [`portcullis_common::policy::Page`], not the struct: Linux before 6.2 remembers of a table whose BTF says "struct"
/// that it looked for a timer in it, and takes no other table in its slot that has no BTF, as the controller's have none
/// (`bpf_map_meta_equal` compared `timer_off`, -ENOENT with -EINVAL).
#[btf_map]
pub static PAGES: ArrayOfMaps<Array<[u64; 64], 1, INNER>, 2> = ArrayOfMaps::new();

#[btf_map]
pub static PREFIXES: ArrayOfMaps<LpmTrie<[u8; 4], u32, 1>, 2> = ArrayOfMaps::new();

/// Key: routing id (big endian), address, two zero bytes (the value must be aligned).
#[btf_map]
pub static SPACES: ArrayOfMaps<LpmTrie<[u8; 8], u32, 1>, 2> = ArrayOfMaps::new();

#[btf_map]
pub static PREFIXES6: ArrayOfMaps<LpmTrie<[u8; 16], u32, 1>, 2> = ArrayOfMaps::new();

/// Key: routing id (big endian), address, two zero bytes.
#[btf_map]
pub static SPACES6: ArrayOfMaps<LpmTrie<[u8; 20], u32, 1>, 2> = ArrayOfMaps::new();

#[btf_map]
pub static ENDPOINTS6: ArrayOfMaps<HashMap<EndpointKey6, u32, 1, NO_PREALLOC>, 2> = ArrayOfMaps::new();

#[btf_map]
pub static ENDPOINTS: ArrayOfMaps<HashMap<EndpointKey, u32, 1, NO_PREALLOC>, 2> = ArrayOfMaps::new();

/// Routes of the host that leave by an uplink: next hop index by longest prefix.
#[btf_map]
pub static ROUTES: LpmTrie<[u8; 4], u32, 65536> = LpmTrie::new();

#[btf_map]
pub static REASONS: PerCpuArray<Count, REASON_SLOTS> = PerCpuArray::new();

/// An element is made at a rule's first hit and taken away by the controller after the rule.
#[btf_map]
pub static RULE_COUNTS: PerCpuHashMap<u32, RuleCount, 1048576, NO_PREALLOC> = PerCpuHashMap::new();

#[btf_map]
pub static EVENTS: RingBuf<Event, 262144> = RingBuf::new();

/// Routes of IPv6 in the same way.
#[btf_map]
pub static ROUTES6: LpmTrie<[u8; 16], u32, 65536> = LpmTrie::new();

/// Claims that failed lately; an LRU because forgetting one costs only a search.
#[btf_map]
pub static REFUSALS: LruHashMap<FlowKey, Refusal, 16384> = LruHashMap::new();

/// Fragmented datagrams under way.
#[btf_map]
pub static DATAGRAMS: Array<DatagramSet, { DATAGRAM_SETS as usize }> = Array::new();

/// The last identification given to a datagram that was fragmented here; 0: none yet.
#[btf_map]
pub static IDENTIFICATION: Array<u64, 1> = Array::new();

/// The payload of a packet that is being fragmented: the longest one, and room for a piece behind its end.
#[repr(C)]
pub struct Aside {
    pub cut: Cut,
    pub payload: [u8; (LONGEST + ROOM) as usize],
}

#[btf_map]
pub static ASIDE: PerCpuArray<Aside, 1> = PerCpuArray::new();

/// Successful claims by the number of candidates tried, see [`portcullis_common::snat::tried_bucket`].
#[btf_map]
pub static TRIED: PerCpuArray<u64, { TRIED_BUCKETS as usize }> = PerCpuArray::new();

/// Redirects the kernel failed after our verdict, by tracepoint: see `losses`.
#[btf_map]
pub static LOST: PerCpuArray<u64, 8> = PerCpuArray::new();

/// Sampling budget: tick << 32 | events in it.
#[btf_map]
pub static SAMPLED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Sources that the guard has let out, with the generation it asked: [generation, address].
#[btf_map]
pub static OUTSIDE: PerCpuArray<[u32; 2], { OUTSIDE_SLOTS as usize }> = PerCpuArray::new();

/// A power of two: what leaves an uplink has few sources.
pub const OUTSIDE_SLOTS: u32 = 64;

/// By [`portcullis_common::env::Budget`]: tick << 32 | used in it.
#[btf_map]
pub static BUDGETS: PerCpuArray<u64, 3> = PerCpuArray::new();

/// Context between stages: 0 XDP, 1 TC. One packet a CPU and hook is on its way at any time (both run in softirq, and
/// a TC program interrupts no XDP program).
#[btf_map]
pub static SCRATCH: PerCpuArray<Context, 2> = PerCpuArray::new();

#[btf_map]
pub static STAGES_XDP: ProgramArray<32> = ProgramArray::new();

#[btf_map]
pub static STAGES_TC: ProgramArray<32> = ProgramArray::new();
