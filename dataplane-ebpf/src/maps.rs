//! The maps. Shapes are `portcullis_common`'s; sizes that depend on the policy are overridden at load.

use aya_ebpf::bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{
    Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
};
use aya_ebpf::macros::btf_map;
use portcullis_common::engine::Context;
use portcullis_common::env::{FragmentKey, FragmentPorts, Refusal};
use portcullis_common::policy::{EndpointKey, EndpointKey6, Page};
use portcullis_common::reason::REASON_SLOTS;
use portcullis_common::snat::TRIED_BUCKETS;
use portcullis_common::{
    Bucket, Bucket6, Control, Count, DEVICE_SLOTS, Device, Event, FlowKey, NEXT_HOP_SLOTS, NextHop, RuleCount,
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

/// Indexed by the generation's parity, as are the six below.
#[btf_map]
pub static PAGES: ArrayOfMaps<Array<Page, 1, INNER>, 2> = ArrayOfMaps::new();

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

/// Ports of fragmented datagrams; an LRU because forgetting one costs its later fragments.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 8192> = LruHashMap::new();

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
pub static BUDGETS: PerCpuArray<u64, 2> = PerCpuArray::new();

/// Context between stages: 0 XDP, 1 TC. One packet a CPU and hook is on its way at any time (both run in softirq, and
/// a TC program interrupts no XDP program).
#[btf_map]
pub static SCRATCH: PerCpuArray<Context, 2> = PerCpuArray::new();

#[btf_map]
pub static STAGES_XDP: ProgramArray<32> = ProgramArray::new();

#[btf_map]
pub static STAGES_TC: ProgramArray<32> = ProgramArray::new();
