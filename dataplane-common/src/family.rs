//! What differs between IPv4 and IPv6: addresses, flow keys, the tables they are looked up in. Everything else in the
//! engine is written once, over [`Family`].

use crate::engine::{Context, Stage};
use crate::env::Env;
use crate::flow::{self, Grace};
use crate::layout::{
    Bucket, Bucket6, Control, FlowKey, FlowKey6, HalfRecord, HalfRecord6, KIND_MAPPING, NextHop, WORLD,
};
use crate::packet::Packet;
use crate::packet::icmp::{self, Quote};
use crate::packet::rewrite::Tuple;
use crate::policy::{Endpoint, Frontend};
use crate::reason::Reason;

/// IPv4 or IPv6, at compile time.
pub trait Family: Copy {
    const V6: bool;
    /// Network order.
    type Address: Copy + PartialEq;
    type Key: Copy;
    type Bucket;
    /// The stages of this family.
    const CLASSIFY: Stage;
    const CLAIM: Stage;
    const REFUSE: Stage;
    const ADOPT: Stage;

    fn source(ctx: &Context) -> Self::Address;
    fn destination(ctx: &Context) -> Self::Address;
    /// The key of the packet under way.
    fn key(ctx: &Context) -> &Self::Key;
    /// The key that [`Env::insert`] inserts; the four below write it.
    fn claimed(ctx: &Context) -> &Self::Key;
    /// That of the packet itself.
    fn claim_own(ctx: &mut Context);
    /// That of its flow's answers, seen in `network`.
    fn claim_answer(ctx: &mut Context, network: u16);
    /// That under which the packet's inside socket has its port, see [`KIND_MAPPING`].
    fn claim_inside(ctx: &mut Context);
    /// That under which a public port has its inside socket.
    fn claim_outside(ctx: &mut Context, address: Self::Address, port: u16);
    /// Source and destination of [`Family::claimed`].
    fn claimed_ends(ctx: &Context) -> (Self::Address, Self::Address);
    /// Reads the packet that an ICMP error quotes, and puts the key of its answers into [`Family::claimed`].
    fn quote<P: Packet>(packet: &P, ctx: &mut Context) -> Result<Quote, Reason>;
    /// Leaves of a key what tells clients apart without their ports.
    fn only_addresses(key: &mut Self::Key, protocol: u8);
    /// What refusals are remembered by: the guest, and the destination where ports are shared between destinations.
    fn refusal(ctx: &Context, seed: &[u64; 2], by_destination: bool) -> FlowKey;

    /// The packet keeps its addresses and ports.
    fn keep(ctx: &mut Context);
    fn new_source(ctx: &Context) -> Self::Address;
    fn new_destination(ctx: &Context) -> Self::Address;
    fn set_new_source(ctx: &mut Context, address: Self::Address);
    fn set_new_destination(ctx: &mut Context, address: Self::Address);
    /// Puts the translation of a record into the context.
    ///
    /// # Safety
    /// `record` is a slot of this family's table.
    unsafe fn load_new(ctx: &mut Context, record: *const HalfRecord);
    /// The addresses of the translation that [`flow::publish`] does not write.
    ///
    /// # Safety
    /// `record` is a slot of this family's table, and the caller owns it.
    unsafe fn set_new(record: *mut HalfRecord, source: Self::Address, destination: Self::Address);
    /// The last 32 bits of an address, for [`FlowKey`] and [`Tuple`].
    fn short(address: Self::Address) -> u32;
    /// An IPv6 address; nothing of IPv4.
    fn wide(address: Self::Address) -> [u32; 4];

    fn of_endpoint(endpoint: &Endpoint) -> Self::Address;
    fn of_instance(endpoint: &Endpoint) -> Self::Address;
    fn of_gateway(endpoint: &Endpoint) -> Self::Address;
    fn of_frontend(frontend: &Frontend) -> Self::Address;
    fn of_next_hop(hop: &NextHop) -> Self::Address;

    /// This host itself, or nothing that a gateway may forward (RFC 6890).
    fn never_forwarded(address: Self::Address) -> bool;
    /// Multicast and the limited broadcast.
    fn to_many(address: Self::Address) -> bool;

    fn mask(control: &Control) -> u32;
    fn hash(key: &Self::Key, seed: &[u64; 2]) -> u64;
    fn bucket<E: Env>(env: &E, index: u32) -> Option<*mut Self::Bucket>;
    /// Slot `i` of a bucket, modulo its size.
    ///
    /// # Safety
    /// `bucket` comes from [`Family::bucket`].
    unsafe fn slot(bucket: *mut Self::Bucket, i: u32) -> *mut HalfRecord;
    /// # Safety
    /// `record` is a slot of this family's table.
    unsafe fn has_key(record: *mut HalfRecord, key: &Self::Key) -> bool;
    /// # Safety
    /// `record` is a slot of this family's table, and the caller owns it.
    unsafe fn write_key(record: *mut HalfRecord, key: &Self::Key);

    fn space<E: Env>(env: &E, generation: u32, routing: u16, address: Self::Address) -> u32;
    fn endpoint<E: Env>(env: &E, generation: u32, network: u16, address: Self::Address) -> u32;
    /// [`crate::policy::AT_LISTENER`] of a frontend's port, 0 for none.
    fn listener<E: Env>(env: &E, generation: u32, address: Self::Address, port: u16, protocol: u8) -> u32;
    /// Next hop towards an address of the world, 0 for none.
    fn route<E: Env>(env: &E, address: Self::Address) -> u32;
    fn address_class<E: Env>(env: &E, generation: u32, address: Self::Address) -> u32;
    /// [`flow::insert`] of the claim.
    fn insert<E: Env>(env: &E, ctx: &mut Context, grace: Grace) -> flow::Taken;
    fn extend_mapping<E: Env>(env: &E, ctx: &mut Context, idle_class: u8);
    fn tcp_turn<E: Env>(env: &E, ctx: &mut Context, index: u32, before: flow::Ctl);
}

#[derive(Clone, Copy)]
pub struct V4;

#[derive(Clone, Copy)]
pub struct V6;

impl Family for V4 {
    const V6: bool = false;
    type Address = u32;
    type Key = FlowKey;
    type Bucket = Bucket;
    const CLASSIFY: Stage = Stage::Classify;
    const CLAIM: Stage = Stage::Claim;
    const REFUSE: Stage = Stage::Refuse;
    const ADOPT: Stage = Stage::Adopt;

    #[inline(always)]
    fn source(ctx: &Context) -> u32 {
        ctx.key.source
    }
    #[inline(always)]
    fn destination(ctx: &Context) -> u32 {
        ctx.key.destination
    }
    #[inline(always)]
    fn key(ctx: &Context) -> &FlowKey {
        &ctx.key
    }
    #[inline(always)]
    fn claimed(ctx: &Context) -> &FlowKey {
        &ctx.claim
    }
    #[inline(always)]
    fn claim_own(ctx: &mut Context) {
        ctx.claim = ctx.key;
    }
    #[inline(always)]
    fn claim_answer(ctx: &mut Context, network: u16) {
        ctx.claim = FlowKey {
            source: ctx.new.destination,
            destination: ctx.new.source,
            source_port: ctx.new.destination_port,
            destination_port: ctx.new.source_port,
            network,
            protocol: ctx.key.protocol,
            kind: ctx.key.kind,
        };
    }
    #[inline(always)]
    fn claim_inside(ctx: &mut Context) {
        ctx.claim = FlowKey { destination: 0, destination_port: 0, kind: KIND_MAPPING, ..ctx.key };
    }
    #[inline(always)]
    fn claim_outside(ctx: &mut Context, address: u32, port: u16) {
        ctx.claim = FlowKey {
            source: 0,
            destination: address,
            source_port: 0,
            destination_port: port,
            network: WORLD,
            protocol: ctx.key.protocol,
            kind: KIND_MAPPING,
        };
    }
    #[inline(always)]
    fn claimed_ends(ctx: &Context) -> (u32, u32) {
        (ctx.claim.source, ctx.claim.destination)
    }
    #[inline(always)]
    fn quote<P: Packet>(packet: &P, ctx: &mut Context) -> Result<Quote, Reason> {
        icmp::quote4(packet, ctx)
    }
    #[inline(always)]
    fn only_addresses(key: &mut FlowKey, protocol: u8) {
        key.source_port = 0;
        key.destination_port = 0;
        key.protocol = protocol;
    }
    #[inline(always)]
    fn refusal(ctx: &Context, _seed: &[u64; 2], by_destination: bool) -> FlowKey {
        let (destination, destination_port) =
            if by_destination { (ctx.key.destination, ctx.key.destination_port) } else { (0, 0) };
        FlowKey { destination, destination_port, source_port: 0, ..ctx.key }
    }
    #[inline(always)]
    fn keep(ctx: &mut Context) {
        ctx.new = Tuple {
            source: ctx.key.source,
            destination: ctx.key.destination,
            source_port: ctx.key.source_port,
            destination_port: ctx.key.destination_port,
        };
    }
    #[inline(always)]
    fn new_source(ctx: &Context) -> u32 {
        ctx.new.source
    }
    #[inline(always)]
    fn new_destination(ctx: &Context) -> u32 {
        ctx.new.destination
    }
    #[inline(always)]
    fn set_new_source(ctx: &mut Context, address: u32) {
        ctx.new.source = address;
    }
    #[inline(always)]
    fn set_new_destination(ctx: &mut Context, address: u32) {
        ctx.new.destination = address;
    }
    #[inline(always)]
    unsafe fn load_new(ctx: &mut Context, record: *const HalfRecord) {
        // SAFETY: the caller vouches for `record`.
        ctx.new = unsafe { tuple(record) };
    }
    #[inline(always)]
    unsafe fn set_new(_record: *mut HalfRecord, _source: u32, _destination: u32) {}
    #[inline(always)]
    fn short(address: u32) -> u32 {
        address
    }
    #[inline(always)]
    fn wide(_address: u32) -> [u32; 4] {
        [0; 4]
    }
    #[inline(always)]
    fn of_endpoint(endpoint: &Endpoint) -> u32 {
        endpoint.address
    }
    #[inline(always)]
    fn of_instance(endpoint: &Endpoint) -> u32 {
        endpoint.instance_address[0]
    }
    #[inline(always)]
    fn of_gateway(endpoint: &Endpoint) -> u32 {
        endpoint.gateway[0]
    }
    #[inline(always)]
    fn of_frontend(frontend: &Frontend) -> u32 {
        frontend.address
    }
    #[inline(always)]
    fn of_next_hop(hop: &NextHop) -> u32 {
        hop.address
    }
    /// 0/8, 127/8 and 169.254/16.
    #[inline(always)]
    fn never_forwarded(address: u32) -> bool {
        let [a, b, _, _] = address.to_ne_bytes();
        a == 0 || a == 127 || (a == 169 && b == 254)
    }
    /// 224/4 and 240/4.
    #[inline(always)]
    fn to_many(address: u32) -> bool {
        address.to_ne_bytes()[0] >= 224
    }
    #[inline(always)]
    fn mask(control: &Control) -> u32 {
        control.bucket_mask
    }
    #[inline(always)]
    fn hash(key: &FlowKey, seed: &[u64; 2]) -> u64 {
        flow::hash(key, seed)
    }
    #[inline(always)]
    fn bucket<E: Env>(env: &E, index: u32) -> Option<*mut Bucket> {
        env.bucket(index)
    }
    #[inline(always)]
    unsafe fn slot(bucket: *mut Bucket, i: u32) -> *mut HalfRecord {
        // SAFETY: `i` is below eight, the bucket holds eight records.
        unsafe { bucket.cast::<HalfRecord>().add(i as usize & 7) }
    }
    #[inline(always)]
    unsafe fn has_key(record: *mut HalfRecord, key: &FlowKey) -> bool {
        // SAFETY: the caller vouches for `record`.
        unsafe { flow::has_words(record, flow::words(key)) }
    }
    #[inline(always)]
    unsafe fn write_key(record: *mut HalfRecord, key: &FlowKey) {
        // SAFETY: the caller vouches for `record`.
        unsafe { flow::write_words(record, flow::words(key)) }
    }
    #[inline(always)]
    fn space<E: Env>(env: &E, generation: u32, routing: u16, address: u32) -> u32 {
        env.space(generation, routing, address)
    }
    #[inline(always)]
    fn endpoint<E: Env>(env: &E, generation: u32, network: u16, address: u32) -> u32 {
        env.endpoint(generation, network, address)
    }
    #[inline(always)]
    fn listener<E: Env>(env: &E, generation: u32, address: u32, port: u16, protocol: u8) -> u32 {
        env.listener(generation, address, port, protocol)
    }
    #[inline(always)]
    fn route<E: Env>(env: &E, address: u32) -> u32 {
        env.route(address)
    }
    #[inline(always)]
    fn address_class<E: Env>(env: &E, generation: u32, address: u32) -> u32 {
        env.address_class(generation, address)
    }
    #[inline(always)]
    fn insert<E: Env>(env: &E, ctx: &mut Context, grace: Grace) -> flow::Taken {
        ctx.grace_waived = (grace == Grace::Waived) as u8;
        env.insert(ctx)
    }
    #[inline(always)]
    fn extend_mapping<E: Env>(env: &E, ctx: &mut Context, idle_class: u8) {
        env.extend_mapping(ctx, idle_class);
    }
    #[inline(always)]
    fn tcp_turn<E: Env>(env: &E, ctx: &mut Context, index: u32, before: flow::Ctl) {
        env.tcp_turn(ctx, index, before);
    }
}

/// The translation that a record of either family begins with.
///
/// # Safety
/// `record` points into a flow table.
#[inline(always)]
unsafe fn tuple(record: *const HalfRecord) -> Tuple {
    // SAFETY: the caller vouches for `record`.
    let r = unsafe { &*record };
    Tuple {
        source: r.new_source,
        destination: r.new_destination,
        source_port: r.new_source_port,
        destination_port: r.new_destination_port,
    }
}

/// An address as two words, for comparing and hashing.
#[inline(always)]
fn pair(a: &[u32; 4]) -> [u64; 2] {
    [a[0] as u64 | (a[1] as u64) << 32, a[2] as u64 | (a[3] as u64) << 32]
}

impl Family for V6 {
    const V6: bool = true;
    type Address = [u32; 4];
    type Key = FlowKey6;
    type Bucket = Bucket6;
    const CLASSIFY: Stage = Stage::Classify6;
    const CLAIM: Stage = Stage::Claim6;
    const REFUSE: Stage = Stage::Refuse6;
    const ADOPT: Stage = Stage::Adopt6;

    #[inline(always)]
    fn source(ctx: &Context) -> [u32; 4] {
        ctx.key6.source
    }
    #[inline(always)]
    fn destination(ctx: &Context) -> [u32; 4] {
        ctx.key6.destination
    }
    #[inline(always)]
    fn key(ctx: &Context) -> &FlowKey6 {
        &ctx.key6
    }
    #[inline(always)]
    fn claimed(ctx: &Context) -> &FlowKey6 {
        &ctx.claim6
    }
    #[inline(always)]
    fn claim_own(ctx: &mut Context) {
        ctx.claim6 = ctx.key6;
    }
    #[inline(always)]
    fn claim_answer(ctx: &mut Context, network: u16) {
        V4::claim_answer(ctx, network);
        ctx.claim6.key = ctx.claim;
        ctx.claim6.source = ctx.new6.destination;
        ctx.claim6.destination = ctx.new6.source;
    }
    #[inline(always)]
    fn claim_inside(ctx: &mut Context) {
        V4::claim_inside(ctx);
        ctx.claim6.key = ctx.claim;
        ctx.claim6.source = ctx.key6.source;
        ctx.claim6.destination = [0; 4];
    }
    #[inline(always)]
    fn claim_outside(ctx: &mut Context, address: [u32; 4], port: u16) {
        V4::claim_outside(ctx, address[3], port);
        ctx.claim6.key = ctx.claim;
        ctx.claim6.source = [0; 4];
        ctx.claim6.destination = address;
    }
    #[inline(always)]
    fn claimed_ends(ctx: &Context) -> ([u32; 4], [u32; 4]) {
        (ctx.claim6.source, ctx.claim6.destination)
    }
    #[inline(always)]
    fn quote<P: Packet>(packet: &P, ctx: &mut Context) -> Result<Quote, Reason> {
        icmp::quote6(packet, ctx)
    }
    #[inline(always)]
    fn only_addresses(key: &mut FlowKey6, protocol: u8) {
        V4::only_addresses(&mut key.key, protocol);
    }
    /// The addresses' hash stands for them: 64 bits that nobody outside can choose.
    #[inline(always)]
    fn refusal(ctx: &Context, seed: &[u64; 2], by_destination: bool) -> FlowKey {
        let mut key = ctx.key6;
        key.key = V4::refusal(ctx, seed, by_destination);
        if !by_destination {
            key.destination = [0; 4];
        }
        let hash = Self::hash(&key, seed);
        FlowKey { source: hash as u32, destination: (hash >> 32) as u32, ..key.key }
    }
    #[inline(always)]
    fn keep(ctx: &mut Context) {
        V4::keep(ctx);
        ctx.new6.source = ctx.key6.source;
        ctx.new6.destination = ctx.key6.destination;
    }
    #[inline(always)]
    fn new_source(ctx: &Context) -> [u32; 4] {
        ctx.new6.source
    }
    #[inline(always)]
    fn new_destination(ctx: &Context) -> [u32; 4] {
        ctx.new6.destination
    }
    #[inline(always)]
    fn set_new_source(ctx: &mut Context, address: [u32; 4]) {
        ctx.new.source = address[3];
        ctx.new6.source = address;
    }
    #[inline(always)]
    fn set_new_destination(ctx: &mut Context, address: [u32; 4]) {
        ctx.new.destination = address[3];
        ctx.new6.destination = address;
    }
    #[inline(always)]
    unsafe fn load_new(ctx: &mut Context, record: *const HalfRecord) {
        // SAFETY: the caller vouches for `record`, which is the first part of the wide one.
        unsafe {
            ctx.new = tuple(record);
            let wide = record.cast::<HalfRecord6>();
            ctx.new6.source = (*wide).new_source;
            ctx.new6.destination = (*wide).new_destination;
        }
    }
    #[inline(always)]
    unsafe fn set_new(record: *mut HalfRecord, source: [u32; 4], destination: [u32; 4]) {
        // SAFETY: as above, and the slot is the caller's.
        unsafe {
            let wide = record.cast::<HalfRecord6>();
            (*wide).new_source = source;
            (*wide).new_destination = destination;
        }
    }
    #[inline(always)]
    fn short(address: [u32; 4]) -> u32 {
        address[3]
    }
    #[inline(always)]
    fn wide(address: [u32; 4]) -> [u32; 4] {
        address
    }
    #[inline(always)]
    fn of_endpoint(endpoint: &Endpoint) -> [u32; 4] {
        endpoint.address6
    }
    #[inline(always)]
    fn of_instance(endpoint: &Endpoint) -> [u32; 4] {
        endpoint.instance_address
    }
    #[inline(always)]
    fn of_gateway(endpoint: &Endpoint) -> [u32; 4] {
        endpoint.gateway
    }
    #[inline(always)]
    fn of_frontend(frontend: &Frontend) -> [u32; 4] {
        frontend.address6
    }
    #[inline(always)]
    fn of_next_hop(hop: &NextHop) -> [u32; 4] {
        hop.address6
    }
    /// ::/96 (unspecified, loopback, IPv4-compatible), ::ffff:0:0/96 (IPv4-mapped) and fe80::/10.
    #[inline(always)]
    fn never_forwarded(a: [u32; 4]) -> bool {
        let low = a[0] == 0 && a[1] == 0 && (a[2] == 0 || a[2] == 0xffff_u32.to_be());
        low || u32::from_be(a[0]) >> 22 == 0xfe80 >> 6
    }
    /// ff00::/8.
    #[inline(always)]
    fn to_many(a: [u32; 4]) -> bool {
        a[0].to_ne_bytes()[0] == 0xff
    }
    #[inline(always)]
    fn mask(control: &Control) -> u32 {
        control.bucket_mask6
    }
    #[inline(always)]
    fn hash(key: &FlowKey6, seed: &[u64; 2]) -> u64 {
        let mut h = seed[0] ^ flow::words(&key.key)[1];
        let [a, b] = pair(&key.source);
        let [c, d] = pair(&key.destination);
        h = mix(h ^ a);
        h = mix(h ^ b ^ seed[1]);
        h = mix(h ^ c);
        mix(h ^ d)
    }
    #[inline(always)]
    fn bucket<E: Env>(env: &E, index: u32) -> Option<*mut Bucket6> {
        env.bucket6(index)
    }
    #[inline(always)]
    unsafe fn slot(bucket: *mut Bucket6, i: u32) -> *mut HalfRecord {
        // SAFETY: `i` is below eight, the bucket holds eight records that begin with a half-record.
        unsafe { bucket.cast::<HalfRecord6>().add(i as usize & 7).cast() }
    }
    #[inline(always)]
    unsafe fn has_key(record: *mut HalfRecord, key: &FlowKey6) -> bool {
        // SAFETY: the caller vouches for `record`, whose key stands in aligned words; each is read once. The first line
        // differs for nearly all other keys, so the second is hardly ever read for nothing.
        unsafe {
            let wide = record.cast::<HalfRecord6>();
            flow::has_words(record, flow::words(&key.key))
                && same6(&raw const (*wide).source, &key.source)
                && same6(&raw const (*wide).destination, &key.destination)
        }
    }
    #[inline(always)]
    unsafe fn write_key(record: *mut HalfRecord, key: &FlowKey6) {
        // SAFETY: the caller vouches for `record`.
        unsafe {
            flow::write_words(record, flow::words(&key.key));
            let wide = record.cast::<HalfRecord6>();
            core::ptr::write_volatile((&raw mut (*wide).source).cast::<[u64; 2]>(), pair(&key.source));
            core::ptr::write_volatile(
                (&raw mut (*wide).destination).cast::<[u64; 2]>(),
                pair(&key.destination),
            );
        }
    }
    #[inline(always)]
    fn space<E: Env>(env: &E, generation: u32, routing: u16, address: [u32; 4]) -> u32 {
        env.space6(generation, routing, &address)
    }
    #[inline(always)]
    fn endpoint<E: Env>(env: &E, generation: u32, network: u16, address: [u32; 4]) -> u32 {
        env.endpoint6(generation, network, &address)
    }
    #[inline(always)]
    fn listener<E: Env>(env: &E, generation: u32, address: [u32; 4], port: u16, protocol: u8) -> u32 {
        env.listener6(generation, &address, port, protocol)
    }
    #[inline(always)]
    fn route<E: Env>(env: &E, address: [u32; 4]) -> u32 {
        env.route6(&address)
    }
    #[inline(always)]
    fn address_class<E: Env>(env: &E, generation: u32, address: [u32; 4]) -> u32 {
        env.address_class6(generation, &address)
    }
    #[inline(always)]
    fn insert<E: Env>(env: &E, ctx: &mut Context, grace: Grace) -> flow::Taken {
        ctx.grace_waived = (grace == Grace::Waived) as u8;
        env.insert6(ctx)
    }
    #[inline(always)]
    fn extend_mapping<E: Env>(env: &E, ctx: &mut Context, idle_class: u8) {
        env.extend_mapping6(ctx, idle_class);
    }
    #[inline(always)]
    fn tcp_turn<E: Env>(env: &E, ctx: &mut Context, index: u32, before: flow::Ctl) {
        env.tcp_turn6(ctx, index, before);
    }
}

/// One round of the hash: every bit of `h` reaches the upper half, and comes down again.
#[inline(always)]
fn mix(h: u64) -> u64 {
    let h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (h ^ h >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// # Safety
/// `a` points to sixteen bytes aligned to eight.
#[inline(always)]
unsafe fn same6(a: *const [u32; 4], b: &[u32; 4]) -> bool {
    let a = a.cast::<u64>();
    let b = pair(b);
    // SAFETY: the caller vouches for `a`.
    unsafe { core::ptr::read_volatile(a) == b[0] && core::ptr::read_volatile(a.add(1)) == b[1] }
}
