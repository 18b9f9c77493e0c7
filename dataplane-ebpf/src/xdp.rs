//! XDP: NICs, and veths whose both ends are known good.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::generated::{
    bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use aya_log_ebpf::debug;
use portcullis_common::Reason;
use portcullis_common::engine::{self, Hook, Stage, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::opaque::between;
use portcullis_common::packet::cut::Cut;
use portcullis_common::packet::{Packet, at, checksum};

use crate::env::{Maps, scratch};
use crate::maps::STAGES_XDP;

struct Xdp<'a>(&'a XdpContext);

impl Packet for Xdp<'_> {
    #[inline(always)]
    fn start(&self) -> usize {
        self.0.data()
    }
    #[inline(always)]
    fn end(&self) -> usize {
        self.0.data_end()
    }
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is the program's own. Counts fragments of a multi-buffer frame too.
        unsafe { bpf_xdp_get_buff_len(self.0.as_ptr().cast()) as u32 }
    }
    #[inline(always)]
    fn length_at_least(&self) -> u32 {
        between(self.start(), self.end())
    }
    /// Headers are always in the first buffer.
    #[inline(always)]
    fn pull(&self, _: u32) -> bool {
        true
    }
    #[inline(always)]
    fn grow(&self, n: u32) -> bool {
        // SAFETY: the context is the program's own.
        if unsafe { bpf_xdp_adjust_head(self.0.ctx, -(n as i32)) } != 0 {
            return false;
        }
        let (Some(from), Some(to)) = (at::<[u16; 7]>(self, n as usize), at::<[u16; 7]>(self, 0)) else {
            return false;
        };
        let mut i = 0;
        while i < 7 {
            // SAFETY: `at` checked the bounds; both stand at even addresses.
            unsafe { *to.cast::<u16>().add(i) = *from.cast::<u16>().add(i) };
            i += 1;
        }
        true
    }
    #[inline(always)]
    fn trim(&self, length: u32) -> bool {
        let by = length as i32 - self.length() as i32;
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_adjust_tail(self.0.ctx, by) == 0 }
    }
    /// TC does (`engine::forward`).
    #[inline(always)]
    fn cut(&self, _: &Cut) -> bool {
        false
    }
    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }
    #[inline(always)]
    fn vlan_offloaded(&self) -> bool {
        false
    }
    #[inline(always)]
    fn update_l4_checksum(&self, offset: usize, addresses: u32, ports: u32, udp: bool) {
        checksum::in_place(self, offset, addresses, ports, udp);
    }
}

#[inline(always)]
fn stage(ctx: &XdpContext, stage: Stage) -> u32 {
    let env = Maps::<0>;
    let Some(state) = scratch::<0>() else { return XDP_DROP };
    if stage == Stage::Entry {
        state.looped = 0;
        // SAFETY: the context is the program's own.
        state.ifindex = unsafe { (*ctx.ctx).ingress_ifindex };
        state.hook = Hook::Xdp as u8;
        state.side = 0;
    }
    match engine::run(stage, &Xdp(ctx), &env, state) {
        Verdict::Pass => XDP_PASS,
        // XDP never chooses Neighbour (`engine::forward`).
        Verdict::Drop | Verdict::Neighbour(..) | Verdict::Neighbour6(_) => XDP_DROP,
        // SAFETY: a helper with plain arguments; it returns XDP_REDIRECT or XDP_ABORTED.
        Verdict::Redirect(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        Verdict::Next(next) => {
            // SAFETY: nothing with a destructor is alive.
            unsafe { STAGES_XDP.tail_call(ctx, next as u32) };
            env.count(Reason::Internal, state.length);
            XDP_DROP
        }
    }
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Entry)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_classify(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Classify)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_claim(ctx: XdpContext) -> u32 {
    let action = stage(&ctx, Stage::Claim);
    if let Some(s) = scratch::<0>() {
        debug!(
            &ctx,
            "xdp: new flow of {:i} from rule {}: action {}",
            u32::from_be(s.key.source),
            s.rule,
            action
        );
    }
    action
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_icmp(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Icmp)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_icmp6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Icmp6)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_fragment(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Fragment)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_entry6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Entry6)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_classify6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Classify6)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_claim6(ctx: XdpContext) -> u32 {
    let action = stage(&ctx, Stage::Claim6);
    if let Some(s) = scratch::<0>() {
        debug!(&ctx, "xdp: new IPv6 flow from rule {}: action {}", s.rule, action);
    }
    action
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_nd(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Nd)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_fragment6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Fragment6)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_refuse(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Refuse)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_refuse6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Refuse6)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_relieve(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Relieve)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_adopt(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Adopt)
}

#[xdp(frags)]
#[inline(always)]
pub fn pc_xdp_adopt6(ctx: XdpContext) -> u32 {
    stage(&ctx, Stage::Adopt6)
}
