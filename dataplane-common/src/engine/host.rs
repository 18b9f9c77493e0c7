//! The engine on the host: tables in plain memory, packets in a byte buffer. For `explain`, tests and fuzzing.

use core::cell::{RefCell, UnsafeCell};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::boxed::Box;
use std::collections::HashMap;
use std::sync::Mutex;
use std::vec::Vec;

use super::{Context, Hook, Side, Stage, Verdict};
use crate::env::{Budget, Env, Refusal, Step};
use crate::family::{V4, V6};
use crate::flow;
use crate::layout::{
    Bucket, Bucket6, Control, Count, Cursors, DEVICE_SLOTS, Device, Event, FlowKey, GuestFlows,
    NEXT_HOP_SLOTS, NextHop, half_open_mask,
};
use crate::packet::cut::{self, Cut};
use crate::packet::{Packet, checksum};
use crate::policy::{EndpointKey, EndpointKey6, Page};
use crate::reason::{REASON_SLOTS, Reason};
use crate::reassembly::{self, DatagramSet};

/// A packet in a buffer, seen as by XDP: all of it readable, checksums complete.
pub struct HostPacket {
    bytes: UnsafeCell<Box<[u8]>>,
    pieces: RefCell<Vec<Vec<u8>>>,
}

impl HostPacket {
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: UnsafeCell::new(bytes.into()), pieces: RefCell::default() }
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_inner().into_vec()
    }

    /// Fragments of the packet that arrive anew at the ingress of its device, see [`Packet::cut`].
    pub fn pieces(&self) -> Vec<Vec<u8>> {
        self.pieces.borrow().clone()
    }

    fn range(&self) -> (usize, usize) {
        // SAFETY: nobody holds a reference into the buffer across calls; the engine works with pointers.
        let bytes = unsafe { &mut *self.bytes.get() };
        let start = bytes.as_mut_ptr() as usize;
        (start, start + bytes.len())
    }
}

impl Packet for HostPacket {
    fn start(&self) -> usize {
        self.range().0
    }
    fn end(&self) -> usize {
        self.range().1
    }
    fn length(&self) -> u32 {
        let (start, end) = self.range();
        (end - start) as u32
    }
    fn pull(&self, n: u32) -> bool {
        n <= self.length()
    }
    fn vlan_offloaded(&self) -> bool {
        false
    }
    fn grow(&self, n: u32) -> bool {
        // SAFETY: as for `range`.
        let bytes = unsafe { &mut *self.bytes.get() };
        let mut longer = bytes[..14].to_vec();
        longer.resize(14 + n as usize, 0);
        longer.extend_from_slice(&bytes[14..]);
        *bytes = longer.into();
        true
    }
    fn trim(&self, length: u32) -> bool {
        // SAFETY: as for `range`.
        let bytes = unsafe { &mut *self.bytes.get() };
        *bytes = bytes[..(length as usize).min(bytes.len())].into();
        true
    }
    fn cut(&self, cut: &Cut) -> bool {
        let (start, end) = (cut::PAYLOAD as usize, (cut::PAYLOAD + cut.payload) as usize);
        // SAFETY: as for `range`.
        let Some(payload) = (unsafe { &*self.bytes.get() }).get(start..end).map(<[u8]>::to_vec) else {
            return false;
        };
        for (number, piece) in payload.chunks(cut.piece as usize).enumerate() {
            // SAFETY: as for `range`.
            let bytes = unsafe { &mut *self.bytes.get() };
            *bytes = [&bytes[..start], piece].concat().into();
            if !cut.write_header(self, number as u32 * cut.piece, piece.len() as u32) {
                return false;
            }
            // SAFETY: as for `range`.
            self.pieces.borrow_mut().push(unsafe { &*self.bytes.get() }.to_vec());
        }
        true
    }
    fn segment(&self) -> u32 {
        0
    }
    fn update_l4_checksum(&self, offset: usize, addresses: u32, ports: u32, udp: bool) {
        checksum::in_place(self, offset, addresses, ports, udp);
    }
}

/// A longest-prefix table: one hash map for each length. Addresses are 128 bits in host order; an IPv4 address is
/// the upper 32 of them.
#[derive(Default)]
pub struct Prefixes<V> {
    lengths: Vec<(u8, HashMap<u128, V>)>,
}

impl<V: Copy> Prefixes<V> {
    pub fn insert(&mut self, length: u8, address: u128, value: V) {
        let position = self.lengths.iter().position(|(l, _)| *l == length).unwrap_or_else(|| {
            self.lengths.push((length, HashMap::new()));
            self.lengths.sort_by_key(|(length, _)| core::cmp::Reverse(*length));
            self.lengths.iter().position(|(l, _)| *l == length).unwrap_or(0)
        });
        self.lengths[position].1.insert(mask(address, length), value);
    }

    /// `address` in packet order.
    pub fn insert4(&mut self, length: u8, address: [u8; 4], value: V) {
        self.insert(length, wide(u32::from_ne_bytes(address)), value);
    }

    /// `address` in packet order.
    pub fn insert6(&mut self, length: u8, address: [u8; 16], value: V) {
        self.insert(length, u128::from_be_bytes(address), value);
    }

    pub fn get(&self, address: u128) -> Option<V> {
        self.lengths.iter().find_map(|(l, m)| m.get(&mask(address, *l)).copied())
    }
}

fn mask(address: u128, length: u8) -> u128 {
    if length == 0 { 0 } else { address & (u128::MAX << (128 - length as u32)) }
}

/// An IPv4 address (network order) as [`Prefixes`] has it.
fn wide(address: u32) -> u128 {
    (u32::from_be(address) as u128) << 96
}

/// An IPv6 address as [`Prefixes`] has it.
fn wide6(a: &[u32; 4]) -> u128 {
    a.iter().fold(0, |sum, word| sum << 32 | u32::from_be(*word) as u128)
}

/// One policy generation on the host.
#[derive(Default)]
pub struct HostPolicy {
    pub pages: Vec<Page>,
    pub prefixes: Prefixes<u32>,
    pub prefixes6: Prefixes<u32>,
    pub spaces: HashMap<u16, Prefixes<u32>>,
    pub spaces6: HashMap<u16, Prefixes<u32>>,
    pub endpoints: HashMap<EndpointKey, u32>,
    pub endpoints6: HashMap<EndpointKey6, u32>,
}

/// The tables. Shared between threads like the kernel's between CPUs.
pub struct HostEnv {
    pub control: Control,
    pub policy: [HostPolicy; 2],
    pub routes: Prefixes<u32>,
    pub routes6: Prefixes<u32>,
    devices: Box<[[Device; 2]]>,
    next_hops: UnsafeCell<Box<[NextHop]>>,
    buckets: UnsafeCell<Box<[Bucket]>>,
    buckets6: UnsafeCell<Box<[Bucket6]>>,
    guests: UnsafeCell<Box<[GuestFlows]>>,
    cursors: UnsafeCell<Cursors>,
    half_open: [UnsafeCell<Box<[u64]>>; 2],
    now: AtomicU32,
    counts: Box<[[AtomicU64; 2]]>,
    pub rule_hits: Mutex<HashMap<u32, Count>>,
    pub events: Mutex<Vec<Event>>,
    refusals: Mutex<HashMap<FlowKey, Refusal>>,
    /// Made when they are asked for; a set stays where it is.
    datagrams: Mutex<HashMap<u32, Box<UnsafeCell<DatagramSet>>>>,
    identification: AtomicU16,
    /// Fragments made of packets that were too long, with the device at whose ingress they arrive, in order.
    pub pieces: Mutex<Vec<(u32, Vec<u8>)>>,
    /// Candidates that each successful claim took.
    pub tried: Mutex<Vec<u32>>,
}

// SAFETY: buckets and next hops are shared the way the kernel shares map values between CPUs: by the protocol of
// `crate::flow`, which is what the concurrent tests are there to show.
unsafe impl Sync for HostEnv {}

impl HostEnv {
    /// `buckets`, a power of two, is the size of the flow table of either family.
    pub fn new(buckets: u32, seed: [u64; 2]) -> Self {
        assert!(buckets.is_power_of_two());
        Self {
            control: Control {
                bucket_mask: buckets - 1,
                bucket_mask6: buckets - 1,
                seed,
                ..Control::default()
            },
            policy: Default::default(),
            routes: Prefixes::default(),
            routes6: Prefixes::default(),
            devices: std::vec![[Device::default(); 2]; DEVICE_SLOTS as usize].into(),
            next_hops: UnsafeCell::new(std::vec![NextHop::default(); NEXT_HOP_SLOTS as usize].into()),
            buckets: UnsafeCell::new(std::vec![Bucket::default(); buckets as usize].into()),
            buckets6: UnsafeCell::new(std::vec![Bucket6::default(); buckets as usize].into()),
            guests: UnsafeCell::new(std::vec![GuestFlows::default(); NEXT_HOP_SLOTS as usize].into()),
            cursors: UnsafeCell::default(),
            half_open: [(); 2]
                .map(|()| UnsafeCell::new(std::vec![0; half_open_mask(buckets - 1) as usize + 1].into())),
            now: AtomicU32::new(1000),
            counts: (0..REASON_SLOTS).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect(),
            rule_hits: Mutex::default(),
            events: Mutex::default(),
            refusals: Mutex::default(),
            datagrams: Mutex::default(),
            identification: AtomicU16::new(1),
            pieces: Mutex::default(),
            tried: Mutex::default(),
        }
    }

    pub fn set_now(&self, tick: u32) {
        self.now.store(tick, Relaxed);
    }

    pub fn set_device(&mut self, parity: u32, device: Device) {
        self.devices[(device.ifindex % DEVICE_SLOTS) as usize][parity as usize & 1] = device;
    }

    pub fn set_next_hop(&mut self, index: u16, hop: NextHop) {
        self.next_hops.get_mut()[index as usize] = hop;
    }

    pub fn counted(&self, reason: Reason) -> Count {
        let c = &self.counts[reason as usize];
        Count { packets: c[0].load(Relaxed), bytes: c[1].load(Relaxed) }
    }

    /// Every counter that is not zero, in the order of the reasons.
    pub fn counters(&self) -> Vec<(Reason, u64)> {
        Reason::ALL.iter().map(|r| (*r, self.counted(*r).packets)).filter(|(_, n)| *n != 0).collect()
    }

    /// Runs one packet through all its stages and returns the verdict, the packet as it left and the context.
    pub fn packet(
        &self,
        bytes: &[u8],
        ifindex: u32,
        hook: Hook,
        from_host: bool,
    ) -> (Verdict, Vec<u8>, Context) {
        let packet = HostPacket::new(bytes);
        let mut ctx = Context {
            ifindex,
            hook: hook as u8,
            side: if from_host { Side::Host as u8 } else { 0 },
            ..Context::default()
        };
        let mut stage = Stage::Entry;
        loop {
            match super::run(stage, &packet, self, &mut ctx) {
                Verdict::Next(next) => stage = next,
                verdict => {
                    if let Ok(mut pieces) = self.pieces.lock() {
                        pieces.extend(packet.pieces().into_iter().map(|piece| (ifindex, piece)));
                    }
                    return (verdict, packet.into_bytes(), ctx);
                }
            }
        }
    }

    /// What the egress guard of an uplink says.
    pub fn guard(&self, bytes: &[u8]) -> Verdict {
        super::guard::run(
            &HostPacket::new(bytes),
            self,
            &mut Context { hook: Hook::Tc as u8, ..Context::default() },
        )
    }
}

impl Env for HostEnv {
    fn now(&self) -> u32 {
        self.now.load(Relaxed)
    }
    fn control(&self) -> Option<*const Control> {
        Some(&raw const self.control)
    }
    fn device(&self, ifindex: u32) -> Option<*const [Device; 2]> {
        self.devices.get((ifindex % DEVICE_SLOTS) as usize).map(|d| d as *const _)
    }
    fn next_hop(&self, index: u32) -> Option<*mut NextHop> {
        // SAFETY: only element pointers leave; see `Sync`.
        unsafe { (&mut *self.next_hops.get()).get_mut(index as usize).map(|h| h as *mut _) }
    }
    fn bucket(&self, index: u32) -> Option<*mut Bucket> {
        let buckets = self.buckets.get();
        // SAFETY: the box itself is never changed; only element pointers leave; see `Sync`.
        unsafe {
            let (first, n) = ((*buckets).as_mut_ptr(), (&(*buckets)).len());
            ((index as usize) < n).then(|| first.add(index as usize))
        }
    }
    fn bucket6(&self, index: u32) -> Option<*mut Bucket6> {
        let buckets = self.buckets6.get();
        // SAFETY: as for `bucket`.
        unsafe {
            let (first, n) = ((*buckets).as_mut_ptr(), (&(*buckets)).len());
            ((index as usize) < n).then(|| first.add(index as usize))
        }
    }
    fn guest_flows(&self, hop: u32) -> Option<*mut GuestFlows> {
        // SAFETY: as for `next_hop`.
        unsafe { (&mut *self.guests.get()).get_mut(hop as usize).map(|g| g as *mut _) }
    }
    fn cursors(&self) -> Option<*mut Cursors> {
        Some(self.cursors.get())
    }
    fn half_open(&self, v6: bool, place: u32) -> Option<*mut u64> {
        let ring = self.half_open[usize::from(v6)].get();
        // SAFETY: as for `bucket`.
        unsafe {
            let (first, n) = ((*ring).as_mut_ptr(), (&(*ring)).len());
            ((place as usize) < n).then(|| first.add(place as usize))
        }
    }
    fn page(&self, generation: u32, index: u32) -> Option<*const Page> {
        self.policy[generation as usize & 1].pages.get(index as usize).map(|p| p as *const _)
    }
    fn address_class(&self, generation: u32, address: u32) -> u32 {
        self.policy[generation as usize & 1].prefixes.get(wide(address)).unwrap_or(0)
    }
    fn address_class6(&self, generation: u32, address: &[u32; 4]) -> u32 {
        self.policy[generation as usize & 1].prefixes6.get(wide6(address)).unwrap_or(0)
    }
    fn space(&self, generation: u32, routing: u16, address: u32) -> u32 {
        let policy = &self.policy[generation as usize & 1];
        policy.spaces.get(&routing).and_then(|s| s.get(wide(address))).unwrap_or(0)
    }
    fn space6(&self, generation: u32, routing: u16, address: &[u32; 4]) -> u32 {
        let policy = &self.policy[generation as usize & 1];
        policy.spaces6.get(&routing).and_then(|s| s.get(wide6(address))).unwrap_or(0)
    }
    fn endpoint6(&self, generation: u32, network: u16, address: &[u32; 4]) -> u32 {
        let key = EndpointKey6 { address: *address, network, ..EndpointKey6::default() };
        self.policy[generation as usize & 1].endpoints6.get(&key).copied().unwrap_or(0)
    }
    fn endpoint(&self, generation: u32, network: u16, address: u32) -> u32 {
        let key = EndpointKey { address, network, ..EndpointKey::default() };
        self.policy[generation as usize & 1].endpoints.get(&key).copied().unwrap_or(0)
    }
    fn listener(&self, generation: u32, address: u32, port: u16, protocol: u8) -> u32 {
        let key = EndpointKey { address, port, protocol, ..EndpointKey::default() };
        self.policy[generation as usize & 1].endpoints.get(&key).copied().unwrap_or(0)
    }
    fn listener6(&self, generation: u32, address: &[u32; 4], port: u16, protocol: u8) -> u32 {
        let key = EndpointKey6 { address: *address, port, protocol, ..EndpointKey6::default() };
        self.policy[generation as usize & 1].endpoints6.get(&key).copied().unwrap_or(0)
    }
    fn route(&self, address: u32) -> u32 {
        self.routes.get(wide(address)).unwrap_or(0)
    }
    fn route6(&self, address: &[u32; 4]) -> u32 {
        self.routes6.get(wide6(address)).unwrap_or(0)
    }
    fn count(&self, reason: Reason, bytes: u32) {
        self.counts[reason as usize][0].fetch_add(1, Relaxed);
        self.counts[reason as usize][1].fetch_add(bytes as u64, Relaxed);
    }
    fn count_rule(&self, rule: u32, bytes: u32) {
        if let Ok(mut hits) = self.rule_hits.lock() {
            let c = hits.entry(rule).or_default();
            c.packets += 1;
            c.bytes += bytes as u64;
        }
    }
    fn event(&self, ctx: &Context, reason: Reason) {
        if let Ok(mut events) = self.events.lock()
            && events.len() < 1024
        {
            let mut event = Event::default();
            // SAFETY: our own.
            unsafe { super::write_event(&raw mut event, ctx, reason) };
            events.push(event);
        }
    }
    fn refused(&self, key: &FlowKey) -> Option<Refusal> {
        self.refusals.lock().ok()?.get(key).copied()
    }
    fn refuse(&self, key: &FlowKey, refusal: Refusal) {
        if let Ok(mut refusals) = self.refusals.lock() {
            refusals.insert(*key, refusal);
        }
    }
    fn tried(&self, n: u32) {
        if let Ok(mut tried) = self.tried.lock() {
            tried.push(n);
        }
    }
    fn datagrams(&self, set: u32) -> Option<*mut DatagramSet> {
        Some(self.datagrams.lock().ok()?.entry(set).or_default().get())
    }
    fn recall(&self, ctx: &mut Context) {
        reassembly::recall(self, ctx);
    }
    fn remember(&self, ctx: &mut Context) {
        reassembly::remember(self, ctx);
    }
    fn identification(&self) -> u16 {
        self.identification.fetch_add(1, Relaxed)
    }
    fn insert(&self, ctx: &mut Context) -> flow::Taken {
        let notes = &raw mut ctx.notes;
        // SAFETY: the context is this packet's own.
        unsafe { flow::insert::<V4, Self>(self, &ctx.claim, ctx.now, notes) }
    }
    fn insert6(&self, ctx: &mut Context) -> flow::Taken {
        let notes = &raw mut ctx.notes;
        // SAFETY: the context is this packet's own.
        unsafe { flow::insert::<V6, Self>(self, &ctx.claim6, ctx.now, notes) }
    }
    fn tcp_turn(&self, ctx: &mut Context, index: u32, before: flow::Ctl) {
        super::tcp::turn::<V4, Self>(self, ctx, index, before);
    }
    fn tcp_turn6(&self, ctx: &mut Context, index: u32, before: flow::Ctl) {
        super::tcp::turn::<V6, Self>(self, ctx, index, before);
    }
    fn spend(&self, _which: Budget, _now: u32, budget: u32) -> bool {
        budget != 0
    }
    fn dry_run(&self) -> bool {
        false
    }
    fn search<S: Step<Self>>(&self, ctx: &mut Context, n: u32) {
        for _ in 0..n {
            if S::attempt(self, ctx) {
                return;
            }
        }
    }
}
