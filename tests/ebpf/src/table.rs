//! The least NAT there can be, twice: over a kernel hash and over buckets of records. They differ in the look-up alone.

use core::mem::offset_of;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::bindings::xdp_action::XDP_ABORTED;
use aya_ebpf::btf_maps::{Array, HashMap};
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_redirect};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use portcullis_common::clock::{TICK_SHIFT, passed};
use portcullis_common::family::{Family as _, V4};
use portcullis_common::flow::{self, Ctl, LIVE};
use portcullis_common::layout::{BUCKET_SLOTS, Bucket, FlowKey, HalfRecord, KIND_FLOW};
use portcullis_common::packet::checksum::{add, apply, difference, difference16};

use crate::frame::{self, Headers, IP_CHECKSUM, words};
use crate::layout::{Entry, FRAME_BYTES, TABLE_IDLE, TABLE_NETWORK, Table};

#[btf_map]
pub static TABLE: Array<Table, 1> = Array::new();

/// Overridden at load, as the next one.
#[btf_map]
pub static TABLE_HASH: HashMap<FlowKey, Entry, 1> = HashMap::new();

#[btf_map]
pub static TABLE_RECORDS: Array<Bucket, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

const UDP: u8 = 17;

// Either program writes to an `Entry`, wherever it stands.
const _: () = {
    const KEY: usize = size_of::<FlowKey>();
    assert!(size_of::<HalfRecord>() == KEY + size_of::<Entry>());
    assert!(offset_of!(HalfRecord, ctl) == KEY + offset_of!(Entry, ctl));
    assert!(offset_of!(HalfRecord, deadline) == KEY + offset_of!(Entry, deadline));
    assert!(offset_of!(HalfRecord, new_source) == KEY + offset_of!(Entry, new_source));
    assert!(offset_of!(HalfRecord, new_source_port) == KEY + offset_of!(Entry, new_source_port));
    assert!(offset_of!(HalfRecord, packets) == KEY + offset_of!(Entry, packets));
    assert!(offset_of!(HalfRecord, bytes_low) == KEY + offset_of!(Entry, bytes_low));
};

#[xdp]
pub fn pcb_table_hash(ctx: XdpContext) -> u32 {
    forward(&ctx, in_hash).unwrap_or(XDP_ABORTED)
}

#[xdp]
pub fn pcb_table_records(ctx: XdpContext) -> u32 {
    forward(&ctx, in_records).unwrap_or(XDP_ABORTED)
}

#[inline(always)]
fn in_hash(_: &Table, key: &FlowKey, now: u32) -> Option<*mut Entry> {
    let entry = TABLE_HASH.get_ptr_mut(key)?;
    // SAFETY: just looked up; nothing is ever deleted.
    let live = unsafe { Ctl((*entry).ctl).phase() == LIVE && !passed((*entry).deadline, now) };
    live.then_some(entry)
}

/// As `portcullis_common::flow::find`, but that nothing outlives its own deadline: there is no other direction.
#[inline(always)]
fn in_records(told: &Table, key: &FlowKey, now: u32) -> Option<*mut Entry> {
    let at = flow::places(flow::hash(key, &told.seed), told.bucket_mask);
    let key = flow::words(key);
    let mut bucket = at.first;
    for _ in 0..2 {
        let p = TABLE_RECORDS.get_ptr_mut(bucket)?;
        for i in 0..BUCKET_SLOTS as u32 {
            // SAFETY: `p` was just looked up, the slot is below eight; the key is the record's first 16 bytes.
            unsafe {
                let r = V4::slot(p, (at.start + i) & 7);
                let k = r.cast::<u64>();
                if core::ptr::read_volatile(k) == key[0]
                    && core::ptr::read_volatile(k.add(1)) == key[1]
                    && flow::ctl(r).phase() == LIVE
                    && !passed((*r).deadline, now)
                {
                    return Some(k.add(2).cast::<Entry>());
                }
            }
        }
        bucket = at.second;
    }
    None
}

#[inline(always)]
fn forward(ctx: &XdpContext, find: impl Fn(&Table, &FlowKey, u32) -> Option<*mut Entry>) -> Option<u32> {
    let told = TABLE.get(0)?;
    // SAFETY: `headers` checks the bounds.
    let headers = unsafe { &mut *frame::headers(ctx)? };
    let [ttl, protocol] = headers.ip[4].to_ne_bytes();
    let [version, _] = headers.ip[0].to_ne_bytes();
    if headers.ethertype != 0x0800u16.to_be() || version != 0x45 || protocol != UDP || ttl <= 1 {
        return None;
    }
    let address = |w: [u16; 2]| w[0] as u32 | (w[1] as u32) << 16;
    let source = address(headers.source_address);
    let key = FlowKey {
        source,
        destination: address(headers.destination_address),
        source_port: headers.source_port,
        destination_port: headers.destination_port,
        network: TABLE_NETWORK,
        protocol,
        kind: KIND_FLOW,
    };
    // SAFETY: a helper without arguments.
    let now = (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as u32;
    let entry = find(told, &key, now)?;
    // SAFETY: it points into a table's element; the gateway's processor is the only one that writes it.
    let entry = unsafe { &mut *entry };
    translate(headers, told, source, entry);
    entry.deadline = now.wrapping_add(TABLE_IDLE);
    entry.packets = entry.packets.wrapping_add(1);
    entry.bytes_low = entry.bytes_low.wrapping_add(FRAME_BYTES as u32);
    // SAFETY: a helper with plain arguments.
    Some(unsafe { bpf_redirect(told.ifindex, 0) } as u32)
}

#[inline(always)]
fn translate(headers: &mut Headers, told: &Table, source: u32, entry: &Entry) {
    let addresses = difference(source, entry.new_source);
    let ports = difference16(headers.source_port, entry.new_source_port);
    let [ttl, protocol] = headers.ip[4].to_ne_bytes();
    let aged = u16::from_ne_bytes([ttl - 1, protocol]);
    let change = add(addresses, difference16(headers.ip[4], aged));
    headers.ip[IP_CHECKSUM] = apply(headers.ip[IP_CHECKSUM], change);
    headers.ip[4] = aged;
    if headers.udp_checksum != 0 {
        let checksum = apply(headers.udp_checksum, add(addresses, ports));
        headers.udp_checksum = if checksum == 0 { 0xffff } else { checksum };
    }
    headers.source_address = words(entry.new_source);
    headers.source_port = entry.new_source_port;
    let mac = |m: &[u8; 6]| {
        [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])]
    };
    headers.destination = mac(&told.destination_mac);
    headers.source = mac(&told.source_mac);
}
