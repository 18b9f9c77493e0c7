//! What the kernel loses after our verdict, from its tracepoints (design §1, promise 6).
//!
//! Both fire for the whole machine. `LOST` element 0 counts redirects refused at once (`xdp_redirect_err`), 1 frames the
//! target device did not take (`xdp_devmap_xmit`, its `drops` argument).

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::LOST;

#[inline(always)]
fn lose(index: u32, frames: u64) {
    if let Some(count) = LOST.get_ptr_mut(index) {
        // SAFETY: this CPU's own element.
        unsafe { *count += frames };
    }
}

/// TP_PROTO(dev, xdp, tgt, err, map_type, map_id, index)
#[raw_tracepoint(tracepoint = "xdp_redirect_err")]
pub fn pc_redirect_err(_ctx: RawTracePointContext) -> i32 {
    lose(0, 1);
    0
}

/// TP_PROTO(from_dev, to_dev, sent, drops, err)
#[raw_tracepoint(tracepoint = "xdp_devmap_xmit")]
pub fn pc_devmap_xmit(ctx: RawTracePointContext) -> i32 {
    let drops: i32 = ctx.arg(3);
    if drops > 0 {
        lose(1, drops as u64);
    }
    0
}
