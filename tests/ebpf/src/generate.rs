//! The generator: every frame it is run with becomes the next packet of some flow and goes out of the client's device.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;

use crate::frame::{self, Headers, fold, words};
use crate::layout::{
    FIRST_DESTINATION_PORT, FIRST_GUEST, FIRST_SOURCE_PORT, FRAME_BYTES, GUEST_MAC, GUESTS, Generator,
    PATIENCE_NS, PICK_RANDOM, Picked, SENT_TTL, SOCKETS, TCP, UDP, WINDOW,
};
use crate::sink::ARRIVED;

#[btf_map]
pub static GENERATOR: Array<Generator, 1> = Array::new();

#[btf_map]
pub static PICKED: PerCpuArray<Picked, 1> = PerCpuArray::new();

const IP_LENGTH: u16 = (FRAME_BYTES - 14) as u16;
const UDP_LENGTH: u16 = IP_LENGTH - 20;
/// Header of TCP without options; nothing is in it.
const TCP_LENGTH: u16 = 20;
const SYN: u16 = 0x5002;
const DONT_FRAGMENT: u16 = 0x4000;

/// Frames come back with what the last program wrote into them, so every field is written anew. What follows the headers
/// is never touched by anyone and stays zero: a datagram's payload, or padding.
#[xdp]
pub fn pcb_generate(ctx: XdpContext) -> u32 {
    match generate(&ctx) {
        // SAFETY: a helper with plain arguments.
        Some(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        // Dropped here is only "not now": the frame comes again.
        None => XDP_DROP,
    }
}

#[inline(always)]
fn generate(ctx: &XdpContext) -> Option<u32> {
    let told = GENERATOR.get(0)?;
    let picked = PICKED.get_ptr_mut(0)?;
    let headers = frame::headers(ctx)?;
    // SAFETY: this CPU's own element.
    let flow = unsafe { pick(&mut *picked, told)? } & told.flow_mask;
    // SAFETY: `headers` checked the bounds.
    write(unsafe { &mut *headers }, told, flow);
    if told.protocol == TCP {
        make_syn(ctx)?;
    }
    Some(told.ifindex)
}

#[inline(always)]
fn pick(picked: &mut Picked, told: &Generator) -> Option<u32> {
    let mut s = picked.state;
    if told.pick != PICK_RANDOM {
        return next(picked, told);
    }
    // xorshift64*; its upper half is the good one.
    s ^= s >> 12;
    s ^= s << 25;
    s ^= s >> 27;
    picked.state = s;
    Some((s.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32)
}

/// The next flow in order, if there is one left and the window is open.
#[inline(always)]
fn next(picked: &mut Picked, told: &Generator) -> Option<u32> {
    let sent = picked.state;
    if sent > told.flow_mask as u64 {
        return None;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: one aligned word, written by the sink on another processor.
    let arrived = unsafe { core::ptr::read_volatile(ARRIVED.get_ptr(0)?) };
    let arrived = arrived.wrapping_sub(picked.arrived_before);
    // Below zero when what was given up arrives after all.
    let under_way = sent.wrapping_sub(picked.lost).wrapping_sub(arrived) as i64;
    if under_way >= WINDOW {
        if now.wrapping_sub(picked.last_ns) < PATIENCE_NS {
            return None;
        }
        picked.lost = picked.lost.wrapping_add(under_way as u64);
    }
    if sent == 0 {
        picked.first_ns = now;
    }
    picked.last_ns = now;
    picked.state = sent + 1;
    Some(sent as u32)
}

/// Writes Ethernet, IP and UDP of a flow's packet; of a connection's only what it shares with those.
#[inline(always)]
pub fn write(headers: &mut Headers, told: &Generator, flow: u32) {
    let guest = flow & (GUESTS - 1);
    let mac = |bytes: &[u8; 6]| {
        [
            u16::from_ne_bytes([bytes[0], bytes[1]]),
            u16::from_ne_bytes([bytes[2], bytes[3]]),
            u16::from_ne_bytes([bytes[4], bytes[5]]),
        ]
    };
    headers.destination = mac(&told.gateway_mac);
    let [a, b, _] = mac(&GUEST_MAC);
    headers.source = [a, b, u16::from_ne_bytes([GUEST_MAC[4], GUEST_MAC[5] | guest as u8])];
    headers.ethertype = 0x0800u16.to_be();

    let source = words((FIRST_GUEST | guest).to_be());
    let destination = words(told.destination);
    let addresses = source[0] as u32 + source[1] as u32 + destination[0] as u32 + destination[1] as u32;
    let length = if told.protocol == TCP { 20 + TCP_LENGTH } else { IP_LENGTH };
    let ip = [
        0x4500u16.to_be(),
        length.to_be(),
        0,
        DONT_FRAGMENT.to_be(),
        u16::from_ne_bytes([SENT_TTL, told.protocol]),
    ];
    let sum = ip[0] as u32 + ip[1] as u32 + ip[3] as u32 + ip[4] as u32 + addresses;
    headers.ip = [ip[0], ip[1], ip[2], ip[3], ip[4], !fold(sum)];
    headers.source_address = source;
    headers.destination_address = destination;

    let source_port = ((FIRST_SOURCE_PORT + (flow & (SOCKETS - 1))) as u16).to_be();
    let destination_port = ((FIRST_DESTINATION_PORT + flow / SOCKETS) as u16).to_be();
    let length = UDP_LENGTH.to_be();
    let sum = addresses
        + (UDP as u16).to_be() as u32
        + 2 * length as u32
        + source_port as u32
        + destination_port as u32;
    let checksum = !fold(sum);
    headers.source_port = source_port;
    headers.destination_port = destination_port;
    headers.udp_length = length;
    headers.udp_checksum = if checksum == 0 { 0xffff } else { checksum };
}

/// Turns the datagram into the first segment of a connection: the rest of TCP's header, beginning with the sequence
/// number where UDP's length is.
#[inline(always)]
pub fn make_syn(ctx: &XdpContext) -> Option<()> {
    let start = ctx.data();
    if start + TCP_END > ctx.data_end() {
        return None;
    }
    let word = |at: usize| (start + at) as *mut u16;
    let mut sum = (TCP as u16).to_be() as u32 + TCP_LENGTH.to_be() as u32;
    // SAFETY: all between the IP addresses and the end of TCP's header, whose bounds were checked.
    unsafe {
        for at in [38, 40, 42, 44, 50, 52] {
            *word(at) = 0;
        }
        *word(46) = SYN.to_be();
        *word(48) = u16::MAX;
        let mut at = ADDRESSES;
        while at < TCP_END {
            sum += *word(at) as u32;
            at += 2;
        }
        *word(50) = !fold(sum);
    }
    Some(())
}

/// Where the IP addresses begin.
const ADDRESSES: usize = 26;
/// Where TCP's header ends.
pub const TCP_END: usize = 34 + TCP_LENGTH as usize;
