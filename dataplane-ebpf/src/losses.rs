//! What the kernel loses after our verdict, from its tracepoints (design §1, promise 6).
//!
//! Both fire for the whole machine; only what happens on devices of our own network namespace is counted. `LOST`
//! element 0 counts redirects refused at once (`xdp_redirect_err`), 1 frames the target device did not take
//! (`xdp_devmap_xmit`, its `drops` argument).

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::LOST;

/// Inode number of our network namespace; 0 counts for all of them. The three are set at load.
#[unsafe(no_mangle)]
static NETNS_INODE: Global<u32> = Global::new(0);
/// Where a `struct net_device` points to its `struct net`, and where that has its inode number: aya relocates no Rust
/// program to the running kernel's types, so the loader reads both from the kernel's BTF.
#[unsafe(no_mangle)]
static DEVICE_NET_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NET_INODE_OFFSET: Global<u32> = Global::new(0);

#[inline(always)]
fn ours(device: u64) -> bool {
    let wanted = NETNS_INODE.load();
    if wanted == 0 {
        return true;
    }
    let net = (device + u64::from(DEVICE_NET_OFFSET.load())) as *const u64;
    // SAFETY: the helper fails on what cannot be read.
    let Ok(net) = (unsafe { bpf_probe_read_kernel(net) }) else { return false };
    let inode = (net + u64::from(NET_INODE_OFFSET.load())) as *const u32;
    // SAFETY: as above.
    unsafe { bpf_probe_read_kernel(inode) }.is_ok_and(|inode| inode == wanted)
}

#[inline(always)]
fn lose(index: u32, frames: u64) {
    if let Some(count) = LOST.get_ptr_mut(index) {
        // SAFETY: this CPU's own element.
        unsafe { *count += frames };
    }
}

/// TP_PROTO(dev, xdp, tgt, err, map_type, map_id, index)
#[raw_tracepoint(tracepoint = "xdp_redirect_err")]
pub fn pc_redirect_err(ctx: RawTracePointContext) -> i32 {
    if ours(ctx.arg(0)) {
        lose(0, 1);
    }
    0
}

/// TP_PROTO(from_dev, to_dev, sent, drops, err)
#[raw_tracepoint(tracepoint = "xdp_devmap_xmit")]
pub fn pc_devmap_xmit(ctx: RawTracePointContext) -> i32 {
    let drops: i32 = ctx.arg(3);
    if drops > 0 && ours(ctx.arg(1)) {
        lose(1, drops as u64);
    }
    0
}
