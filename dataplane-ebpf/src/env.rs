//! `Env` over the maps.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_loop};
use portcullis_common::atomic;
use portcullis_common::clock::TICK_SHIFT;
use portcullis_common::engine::{self, Context};
use portcullis_common::env::{Budget, Env, Refusal, Step};
use portcullis_common::family::{V4, V6};
use portcullis_common::flow::{self, Ctl, Taken};
use portcullis_common::policy::{EndpointKey, EndpointKey6, Page};
use portcullis_common::reassembly::{self, DatagramSet};
use portcullis_common::{
    Bucket, Bucket6, Control, Cursors, Device, FlowKey, GuestFlows, NextHop, Reason, RuleCount,
};

use crate::maps::*;

/// Set at load in the instance that only answers questions (`explain --live`): nothing is claimed, learned or
/// prolonged. Constant to the verifier, which leaves the dead branch out.
#[unsafe(no_mangle)]
static DRY_RUN: Global<u32> = Global::new(0);

/// The tables as one hook sees them; `SLOT` is its scratch (0 XDP, 1 TC).
pub struct Maps<const SLOT: u32>;

/// The context of the packet under way on this CPU.
#[inline(always)]
pub fn scratch<const SLOT: u32>() -> Option<&'static mut Context> {
    // SAFETY: one packet a CPU and hook; the callback of `search` takes it again while its caller does not use it.
    SCRATCH.get_ptr_mut(SLOT).map(|p| unsafe { &mut *p })
}

/// A global function: verified once for any argument, not at each call. Inserts `claim` of the context in `slot`.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_insert(slot: u32) -> u64 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return Taken::FULL.0 };
    // SAFETY: see `scratch`; the caller waits.
    unsafe { flow::insert::<V4, _>(&Maps::<0>, &(*ctx).claim, (*ctx).now, &raw mut (*ctx).notes).0 }
}

/// The same for IPv6.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_insert6(slot: u32) -> u64 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return Taken::FULL.0 };
    // SAFETY: see `scratch`; the caller waits.
    unsafe { flow::insert::<V6, _>(&Maps::<0>, &(*ctx).claim6, (*ctx).now, &raw mut (*ctx).notes).0 }
}

/// [`reassembly::recall`], verified once.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_recall(slot: u32) -> u32 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return 0 };
    // SAFETY: see `scratch`; the caller waits.
    reassembly::recall(&Maps::<0>, unsafe { &mut *ctx });
    1
}

/// [`reassembly::remember`], verified once.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_remember(slot: u32) -> u32 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return 0 };
    // SAFETY: see `scratch`; the caller waits.
    reassembly::remember(&Maps::<0>, unsafe { &mut *ctx });
    1
}

/// What a TCP segment does to the flow in slot `index`, whose control word was `before`. A global function for the same reason.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_tcp_turn(slot: u32, index: u32, before: u64) -> u32 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return 0 };
    // SAFETY: see `scratch`; the caller waits.
    engine::tcp::turn::<V4, _>(&Maps::<0>, unsafe { &*ctx }, index, Ctl(before));
    1
}

/// The same for IPv6.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_tcp_turn6(slot: u32, index: u32, before: u64) -> u32 {
    let Some(ctx) = SCRATCH.get_ptr_mut(slot & 1) else { return 0 };
    // SAFETY: see `scratch`; the caller waits.
    engine::tcp::turn::<V6, _>(&Maps::<0>, unsafe { &*ctx }, index, Ctl(before));
    1
}

/// Counts a hit, and makes the element at the first one. A global function for the same reason.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn pc_count_rule(rule: u32, bytes: u32) -> u32 {
    let count = match RULE_COUNTS.get_ptr_mut(rule) {
        Some(count) => count,
        None => {
            // Another processor may be doing the same: then there is an element already.
            let _ = RULE_COUNTS.insert(rule, RuleCount::default(), BPF_NOEXIST as u64);
            let Some(count) = RULE_COUNTS.get_ptr_mut(rule) else { return 0 };
            count
        }
    };
    // SAFETY: this CPU's own element; it is only deleted a generation after its rule.
    unsafe {
        (*count).hits += 1;
        (*count).bytes += bytes as u64;
        (*count).last = Maps::<0>.now() as u64;
    }
    1
}

/// An IPv6 address in the order of its bytes.
#[inline(always)]
fn bytes(address: &[u32; 4]) -> [u8; 16] {
    // SAFETY: sixteen bytes either way.
    unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(*address) }
}

unsafe extern "C" fn step<const SLOT: u32, S: Step<Maps<SLOT>>>(_: u32, _: *mut core::ffi::c_void) -> i64 {
    let Some(ctx) = scratch::<SLOT>() else { return 1 };
    S::attempt(&Maps::<SLOT>, ctx) as i64
}

impl<const SLOT: u32> Env for Maps<SLOT> {
    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: a helper without arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as u32
    }
    #[inline(always)]
    fn control(&self) -> Option<*const Control> {
        CONTROL.get_ptr(0)
    }
    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<*const [Device; 2]> {
        DEVICES.get_ptr(ifindex & (portcullis_common::DEVICE_SLOTS - 1))
    }
    #[inline(always)]
    fn next_hop(&self, index: u32) -> Option<*mut NextHop> {
        NEXT_HOPS.get_ptr_mut(index)
    }
    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<*mut Bucket> {
        FLOWS.get_ptr_mut(index)
    }
    #[inline(always)]
    fn bucket6(&self, index: u32) -> Option<*mut Bucket6> {
        FLOWS6.get_ptr_mut(index)
    }
    #[inline(always)]
    fn guest_flows(&self, hop: u32) -> Option<*mut GuestFlows> {
        GUEST_FLOWS.get_ptr_mut(hop)
    }
    #[inline(always)]
    fn cursors(&self) -> Option<*mut Cursors> {
        CURSORS.get_ptr_mut(0)
    }
    #[inline(always)]
    fn half_open(&self, v6: bool, place: u32) -> Option<*mut u64> {
        if v6 { HALF_OPEN6.get_ptr_mut(place) } else { HALF_OPEN.get_ptr_mut(place) }
    }
    #[inline(always)]
    fn page(&self, generation: u32, index: u32) -> Option<*const Page> {
        PAGES.get_value_ptr_mut(generation & 1, &index).map(|p| p.cast_const().cast())
    }
    #[inline(always)]
    fn address_class(&self, generation: u32, address: u32) -> u32 {
        let Some(trie) = PREFIXES.get(generation & 1) else { return 0 };
        trie.get(&Key::new(32, address.to_ne_bytes())).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn address_class6(&self, generation: u32, address: &[u32; 4]) -> u32 {
        let Some(trie) = PREFIXES6.get(generation & 1) else { return 0 };
        trie.get(&Key::new(128, bytes(address))).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn space(&self, generation: u32, routing: u16, address: u32) -> u32 {
        let Some(trie) = SPACES.get(generation & 1) else { return 0 };
        let n = routing.to_be_bytes();
        let a = address.to_ne_bytes();
        trie.get(&Key::new(48, [n[0], n[1], a[0], a[1], a[2], a[3], 0, 0])).copied().unwrap_or(0)
    }
    /// The trie is asked once for a source and generation, as long as no other takes its place: half of the guard's time.
    #[inline(always)]
    fn outside(&self, generation: u32, address: u32) -> bool {
        let place = address ^ address >> 16;
        let Some(seen) = OUTSIDE.get_ptr_mut((place ^ place >> 8) & (OUTSIDE_SLOTS - 1)) else {
            return false;
        };
        // SAFETY: this CPU's own element.
        let seen = unsafe { &mut *seen };
        if *seen == [generation, address] {
            return true;
        }
        let outside = self.space(generation, portcullis_common::layout::WORLD, address) == 0;
        if outside {
            *seen = [generation, address];
        }
        outside
    }
    #[inline(always)]
    fn space6(&self, generation: u32, routing: u16, address: &[u32; 4]) -> u32 {
        let Some(trie) = SPACES6.get(generation & 1) else { return 0 };
        let n = routing.to_be_bytes();
        let a = bytes(address);
        let key = [
            n[0], n[1], a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
            a[13], a[14], a[15], 0, 0,
        ];
        trie.get(&Key::new(144, key)).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn endpoint6(&self, generation: u32, network: u16, address: &[u32; 4]) -> u32 {
        let Some(map) = ENDPOINTS6.get(generation & 1) else { return 0 };
        // SAFETY: as for `endpoint`.
        unsafe { map.get(EndpointKey6 { address: *address, network, port: 0, protocol: 0, pad: [0; 3] }) }
            .copied()
            .unwrap_or(0)
    }
    #[inline(always)]
    fn listener(&self, generation: u32, address: u32, port: u16, protocol: u8) -> u32 {
        let Some(map) = ENDPOINTS.get(generation & 1) else { return 0 };
        // SAFETY: as for `endpoint`.
        unsafe { map.get(EndpointKey { address, network: 0, port, protocol, pad: [0; 3] }) }
            .copied()
            .unwrap_or(0)
    }
    #[inline(always)]
    fn listener6(&self, generation: u32, address: &[u32; 4], port: u16, protocol: u8) -> u32 {
        let Some(map) = ENDPOINTS6.get(generation & 1) else { return 0 };
        // SAFETY: as for `endpoint`.
        unsafe { map.get(EndpointKey6 { address: *address, network: 0, port, protocol, pad: [0; 3] }) }
            .copied()
            .unwrap_or(0)
    }
    #[inline(always)]
    fn endpoint(&self, generation: u32, network: u16, address: u32) -> u32 {
        let Some(map) = ENDPOINTS.get(generation & 1) else { return 0 };
        // SAFETY: the value is one aligned word, written before the map is put in its slot and never changed.
        unsafe { map.get(EndpointKey { address, network, port: 0, protocol: 0, pad: [0; 3] }) }
            .copied()
            .unwrap_or(0)
    }
    #[inline(always)]
    fn route(&self, address: u32) -> u32 {
        ROUTES.get(&Key::new(32, address.to_ne_bytes())).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn route6(&self, address: &[u32; 4]) -> u32 {
        ROUTES6.get(&Key::new(128, bytes(address))).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn count(&self, reason: Reason, bytes: u32) {
        if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own element.
            unsafe {
                (*count).packets += 1;
                (*count).bytes += bytes as u64;
            }
        }
    }
    #[inline(always)]
    fn count_rule(&self, rule: u32, bytes: u32) {
        pc_count_rule(rule, bytes);
    }
    #[inline(always)]
    fn event(&self, ctx: &Context, reason: Reason) {
        let Some(budget) = SAMPLED.get_ptr_mut(0) else { return };
        let Some(control) = CONTROL.get_ptr(0) else { return };
        // SAFETY: this CPU's own element; the control element lives as long as the map.
        let rate = unsafe { engine::forward::settings(&*control, ctx.generation) }.event_rate as u64;
        // SAFETY: as above.
        let before = unsafe { *budget };
        let used = if (before >> 32) as u32 == ctx.now { before & 0xffff_ffff } else { 0 };
        if used >= rate {
            return;
        }
        // SAFETY: as above.
        unsafe { *budget = (ctx.now as u64) << 32 | (used + 1) };
        if let Some(mut slot) = EVENTS.reserve(0) {
            // SAFETY: the reserved record is ours until it is submitted.
            unsafe { engine::write_event(slot.as_mut_ptr(), ctx, reason) };
            slot.submit(0);
        }
    }
    #[inline(always)]
    fn refused(&self, key: &FlowKey) -> Option<Refusal> {
        // SAFETY: two aligned words; a stale or torn one only refuses or searches once more.
        unsafe { REFUSALS.get(key) }.copied()
    }
    #[inline(always)]
    fn refuse(&self, key: &FlowKey, refusal: Refusal) {
        let _ = REFUSALS.insert(key, refusal, 0);
    }
    #[inline(always)]
    fn tried(&self, n: u32) {
        let bucket = portcullis_common::snat::tried_bucket(n);
        if let Some(count) = TRIED.get_ptr_mut(bucket) {
            // SAFETY: this CPU's own element.
            unsafe { *count += 1 };
        }
    }
    #[inline(always)]
    fn datagrams(&self, set: u32) -> Option<*mut DatagramSet> {
        DATAGRAMS.get_ptr_mut(set)
    }
    #[inline(always)]
    fn recall(&self, _ctx: &mut Context) {
        pc_recall(SLOT);
    }
    #[inline(always)]
    fn remember(&self, _ctx: &mut Context) {
        pc_remember(SLOT);
    }
    #[inline(always)]
    fn identification(&self) -> u16 {
        let Some(last) = IDENTIFICATION.get_ptr_mut(0) else { return 0 };
        let mut tries = 0;
        // SAFETY: the element is only ever written here. Where a restart begins nobody can guess.
        unsafe {
            while tries < 4 {
                let before = atomic::load(last);
                let next = if before == 0 { bpf_get_prandom_u32() as u64 | 1 } else { before + 1 };
                if atomic::compare_exchange(last, before, next) == before {
                    return next as u16;
                }
                tries += 1;
            }
            bpf_get_prandom_u32() as u16
        }
    }
    #[inline(always)]
    fn insert(&self, _ctx: &mut Context) -> Taken {
        Taken(pc_insert(SLOT))
    }
    #[inline(always)]
    fn insert6(&self, _ctx: &mut Context) -> Taken {
        Taken(pc_insert6(SLOT))
    }
    #[inline(always)]
    fn tcp_turn(&self, _ctx: &mut Context, index: u32, before: Ctl) {
        pc_tcp_turn(SLOT, index, before.0);
    }
    #[inline(always)]
    fn tcp_turn6(&self, _ctx: &mut Context, index: u32, before: Ctl) {
        pc_tcp_turn6(SLOT, index, before.0);
    }
    #[inline(always)]
    fn spend(&self, which: Budget, now: u32, budget: u32) -> bool {
        let Some(used) = BUDGETS.get_ptr_mut(which as u32) else { return false };
        // SAFETY: this CPU's own element.
        let before = unsafe { *used };
        let in_tick = if (before >> 32) as u32 == now { before as u32 } else { 0 };
        if in_tick >= budget {
            return false;
        }
        // SAFETY: as above.
        unsafe { *used = (now as u64) << 32 | (in_tick + 1) as u64 };
        true
    }
    #[inline(always)]
    fn dry_run(&self) -> bool {
        DRY_RUN.load() != 0
    }
    #[inline(always)]
    fn search<S: Step<Self>>(&self, _ctx: &mut Context, n: u32) {
        // SAFETY: the callback has the signature bpf_loop asks for (its index is 32 bits wide in a 64-bit register) and
        // takes no context of ours.
        unsafe { bpf_loop(n, step::<SLOT, S> as *mut core::ffi::c_void, core::ptr::null_mut(), 0) };
    }
}
