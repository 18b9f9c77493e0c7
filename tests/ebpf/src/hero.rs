//! The hero run's generator: keeps flows alive by touching them in turns, and opens connections beside it, each at a rate
//! of its own by the clock. What is late is made up for as soon as there is room under way.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;

use crate::frame;
use crate::generate::{TCP_END, make_syn, write};
use crate::layout::{Generator, HERO_PATIENCE_NS, Hero, HeroSent, SECOND_NS, TCP, UDP, WINDOW};
use crate::sink::ARRIVED;

#[btf_map]
pub static HERO: Array<Hero, 1> = Array::new();

#[btf_map]
pub static HERO_SENT: PerCpuArray<HeroSent, 1> = PerCpuArray::new();

/// Where UDP's header ends.
const UDP_END: usize = 42;

#[xdp]
pub fn pcb_hero(ctx: XdpContext) -> u32 {
    match generate(&ctx) {
        // SAFETY: a helper with plain arguments.
        Some(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        // Dropped here is only "not now": the frame comes again.
        None => XDP_DROP,
    }
}

#[inline(always)]
fn generate(ctx: &XdpContext) -> Option<u32> {
    let told = HERO.get(0)?;
    let sent = HERO_SENT.get_ptr_mut(0)?;
    let headers = frame::headers(ctx)?;
    let start = ctx.data();
    if start + TCP_END > ctx.data_end() {
        return None;
    }
    // SAFETY: this CPU's own element.
    let (flow, protocol) = next(unsafe { &mut *sent }, told)?;
    let told = Generator {
        ifindex: told.ifindex,
        destination: told.destination,
        gateway_mac: told.gateway_mac,
        protocol,
        ..Generator::default()
    };
    // SAFETY: `headers` checked the bounds.
    write(unsafe { &mut *headers }, &told, flow);
    if protocol == TCP {
        make_syn(ctx)?;
    } else {
        let mut at = UDP_END;
        while at < TCP_END {
            // The rest of TCP's header, of which the checksum of a datagram knows nothing.
            // SAFETY: bounds checked above.
            unsafe { *((start + at) as *mut u16) = 0 };
            at += 2;
        }
    }
    Some(told.ifindex)
}

/// Number and protocol of the packet that is due, if there is one and the window is open.
#[inline(always)]
fn next(sent: &mut HeroSent, told: &Hero) -> Option<(u32, u8)> {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut elapsed = now.wrapping_sub(told.begin_ns);
    if elapsed as i64 <= 0 || told.live == 0 {
        return None;
    }
    if elapsed > told.length_ns {
        elapsed = told.length_ns;
    }
    let touch = sent.touched < elapsed * told.touches / SECOND_NS;
    let open = sent.opened < elapsed * told.opens / SECOND_NS;
    if !touch && !open {
        return None;
    }
    // SAFETY: one aligned word, written by the sink on another processor.
    let arrived = unsafe { core::ptr::read_volatile(ARRIVED.get_ptr(0)?) };
    let arrived = arrived.wrapping_sub(sent.arrived_before);
    let total = sent.touched + sent.opened;
    let under_way = total.wrapping_sub(sent.lost).wrapping_sub(arrived) as i64;
    if under_way >= WINDOW {
        if now.wrapping_sub(sent.last_ns) < HERO_PATIENCE_NS {
            return None;
        }
        sent.lost = sent.lost.wrapping_add(under_way as u64);
    }
    sent.last_ns = now;
    // A flow that is not touched in time is lost; a connection can wait a moment.
    if touch {
        let flow = (sent.touched + told.first_touch as u64) % told.live as u64;
        sent.touched += 1;
        return Some((flow as u32, UDP));
    }
    let flow = told.first_open.wrapping_add(sent.opened as u32);
    sent.opened += 1;
    Some((flow & told.open_mask, TCP))
}
