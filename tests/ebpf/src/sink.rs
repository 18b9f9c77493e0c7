//! The server: counts what arrives and drops it.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;

use crate::frame::{self, Headers, IP_CHECKSUM, fold, words};
use crate::layout::{Expected, FRAME_BYTES, SENT_TTL, Seen, TCP, UDP};

#[btf_map]
pub static EXPECTED: Array<Expected, 1> = Array::new();

#[btf_map]
pub static SEEN: PerCpuArray<Seen, 1> = PerCpuArray::new();

/// `Seen::packets` of the processor that counts, for the generator on another one to see.
#[btf_map]
pub static ARRIVED: Array<u64, 1> = Array::new();

#[xdp]
pub fn pcb_sink(ctx: XdpContext) -> u32 {
    let (Some(expected), Some(seen)) = (EXPECTED.get(0), SEEN.get_ptr_mut(0)) else { return XDP_DROP };
    // SAFETY: this CPU's own element.
    let seen = unsafe { &mut *seen };
    let Some(headers) = frame::headers(&ctx) else {
        seen.other += 1;
        return XDP_DROP;
    };
    // SAFETY: `headers` checked the bounds.
    let headers = unsafe { &mut *headers };
    let ttl_and_protocol = headers.ip[4].to_ne_bytes();
    if headers.ethertype != 0x0800u16.to_be()
        || (ttl_and_protocol[1] != UDP && ttl_and_protocol[1] != TCP)
        || headers.destination_address != words(expected.destination)
    {
        seen.other += 1;
        return XDP_DROP;
    }
    seen.packets += 1;
    if ttl_and_protocol[1] == TCP {
        seen.connections += 1;
    }
    if let Some(arrived) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: one aligned word; the gateway's processor is the only one that writes it.
        unsafe { core::ptr::write_volatile(arrived, seen.packets) };
    }
    if headers.source_address == words(expected.public) {
        seen.translated += 1;
    }
    if expected.check != 0 && ttl_and_protocol[0] == SENT_TTL - 1 && checksums_hold(&ctx, headers) {
        seen.sound += 1;
    }
    if expected.answer == 0 {
        return XDP_DROP;
    }
    turn(headers);
    // SAFETY: the context is the kernel's; the helper takes plain arguments. XDP_TX on a veth wants a program at the other
    // end, a redirect into the device it came from only its NAPI.
    unsafe { bpf_redirect((*ctx.ctx).ingress_ifindex, 0) as u32 }
}

/// Back to where it came from; no checksum changes.
#[inline(always)]
fn turn(headers: &mut Headers) {
    core::mem::swap(&mut headers.source, &mut headers.destination);
    core::mem::swap(&mut headers.source_address, &mut headers.destination_address);
    core::mem::swap(&mut headers.source_port, &mut headers.destination_port);
}

/// A sum that includes its own checksum is all ones.
#[inline(always)]
fn checksums_hold(ctx: &XdpContext, headers: &Headers) -> bool {
    let start = ctx.data();
    if start + FRAME_BYTES > ctx.data_end() {
        return false;
    }
    let addresses = headers.source_address[0] as u32
        + headers.source_address[1] as u32
        + headers.destination_address[0] as u32
        + headers.destination_address[1] as u32;
    let mut ip = addresses;
    let mut i = 0;
    while i <= IP_CHECKSUM {
        // SAFETY: the index is below the six words.
        ip += unsafe { *headers.ip.as_ptr().add(i) } as u32;
        i += 1;
    }
    // Padding is zero and adds nothing.
    let length = u16::from_be(headers.ip[1]).wrapping_sub(20);
    let [_, protocol] = headers.ip[4].to_ne_bytes();
    let mut transport = addresses + (protocol as u16).to_be() as u32 + length.to_be() as u32;
    let words = (start + 34) as *const u16;
    let mut i = 0;
    while i < (FRAME_BYTES - 34) / 2 {
        // SAFETY: from byte 34 to the end of the frame, whose bounds were checked.
        transport += unsafe { *words.add(i) } as u32;
        i += 1;
    }
    fold(ip) == 0xffff && fold(transport) == 0xffff
}
