//! The limit everything is measured against: hardware addresses and a redirect, and not a look at anything else.

use aya_ebpf::bindings::xdp_action::XDP_ABORTED;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;

use crate::frame;
use crate::layout::Bare;

#[btf_map]
pub static BARE: Array<Bare, 1> = Array::new();

#[xdp]
pub fn pcb_bare(ctx: XdpContext) -> u32 {
    match forward(&ctx) {
        // SAFETY: a helper with plain arguments.
        Some(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        None => XDP_ABORTED,
    }
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    let told = BARE.get(0)?;
    let headers = frame::headers(ctx)?;
    let [d, s] = [&told.destination_mac, &told.source_mac];
    let words = |m: &[u8; 6]| {
        [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])]
    };
    // SAFETY: `headers` checked the bounds.
    unsafe {
        (*headers).destination = words(d);
        (*headers).source = words(s);
    }
    Some(told.ifindex)
}
