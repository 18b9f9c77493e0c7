//! TC: everywhere, and the only hook for guests on veth and tap (their checksums are partial, their GSO is worth keeping).

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{
    bpf_clone_redirect, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use portcullis_common::engine::{self, Context, Hook, Side, Stage, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::opaque::opaque;
use portcullis_common::packet::cut::{self, Cut};
use portcullis_common::packet::headers::{Ethernet, Ipv4};
use portcullis_common::packet::{Packet, at};
use portcullis_common::{MARK, Reason};

use crate::env::{Maps, scratch};
use crate::maps::{ASIDE, STAGES_TC};

/// "Not decided here": the next program of the chain, then the kernel. TC_ACT_OK would end the chain.
const NEXT: i32 = TC_ACT_UNSPEC;
const SHOT: i32 = TC_ACT_SHOT as i32;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

struct Tc<'a>(&'a TcContext);

impl Packet for Tc<'_> {
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
        self.0.len()
    }
    #[inline(always)]
    fn pull(&self, n: u32) -> bool {
        let n = n & 0xff;
        if self.start() + n as usize <= self.end() {
            return true;
        }
        n <= self.length() && self.0.pull_data(n).is_ok()
    }
    #[inline(always)]
    fn grow(&self, n: u32) -> bool {
        // SAFETY: the context is the program's own. The room is made between the Ethernet and the IP header.
        unsafe { bpf_skb_adjust_room(self.0.skb.skb, n as i32, BPF_ADJ_ROOM_MAC, 0) == 0 }
    }
    #[inline(always)]
    fn trim(&self, length: u32) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_skb_change_tail(self.0.skb.skb, length, 0) == 0 }
    }
    #[inline(always)]
    fn cut(&self, cut: &Cut) -> bool {
        fragment(self, cut)
    }
    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).gso_size }
    }
    #[inline(always)]
    fn vlan_offloaded(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }
    /// The helpers know whether the checksum is whole or partial (guest offloads), which the packet does not say.
    #[inline(always)]
    fn update_l4_checksum(&self, offset: usize, addresses: u32, ports: u32, udp: bool) {
        let mut flags = 0;
        if udp {
            flags = BPF_F_MARK_MANGLED_0 as u64;
            if let Some(field) = at::<[u8; 2]>(self, offset) {
                // SAFETY: `at` checked the bounds.
                if unsafe { *field } == [0, 0] {
                    return;
                }
            }
        }
        if addresses != 0 {
            let _ = self.0.skb.l4_csum_replace(offset, 0, addresses as u64, flags | BPF_F_PSEUDO_HDR as u64);
        }
        if ports != 0 {
            let _ = self.0.skb.l4_csum_replace(offset, 0, ports as u64, flags);
        }
    }
}

/// Has the sender left the transport's checksum to the device? Nothing says so, but the helper that changes a checksum does not
/// touch one that is still to be made. It is tried on that of the IP header, which is put back.
#[inline(always)]
fn partial(packet: &Tc<'_>) -> bool {
    const FIELD: usize = size_of::<Ethernet>() + core::mem::offset_of!(Ipv4, checksum);
    let Some(field) = at::<[u8; 2]>(packet, FIELD) else { return true };
    // SAFETY: `at` checked the bounds.
    let before = unsafe { *field };
    let _ = packet.0.skb.l4_csum_replace(FIELD, 0, 1, 0);
    let Some(field) = at::<[u8; 2]>(packet, FIELD) else { return true };
    // SAFETY: as above.
    unsafe {
        let untouched = *field == before;
        *field = before;
        untouched
    }
}

/// [`Packet::cut`]: the payload is put aside, and the packet made into each fragment in turn, of which a clone is sent. A
/// checksum that is not made yet would be made of the first fragment alone: then the sender has to fragment by itself.
#[inline(always)]
fn fragment(packet: &Tc<'_>, cut: &Cut) -> bool {
    if partial(packet) {
        return false;
    }
    let Some(aside) = ASIDE.get_ptr_mut(0) else { return false };
    let skb = packet.0.skb.skb;
    let length = cut.payload & cut::LONGEST;
    if length == 0 {
        return false;
    }
    // SAFETY: the context is the program's own; this CPU's own element, longer than the mask lets the length be.
    let bytes = unsafe {
        (&raw mut (*aside).cut).write_volatile(*cut);
        (&raw mut (*aside).payload).cast::<u8>()
    };
    // SAFETY: as above.
    if unsafe { bpf_skb_load_bytes(skb.cast(), cut::PAYLOAD, bytes.cast(), length) } != 0 {
        return false;
    }
    let mut number = 0;
    while number < cut::PIECES {
        // Read anew for each piece: from memory, so that the verifier does not follow what was compared with what before.
        // SAFETY: as above.
        let cut = unsafe { (&raw const (*aside).cut).read_volatile() };
        let from = number * cut.piece;
        if from >= cut.payload {
            break;
        }
        let left = cut.payload - from;
        let piece = opaque(if left > cut.piece { cut.piece } else { left } as usize) as u32 & 0x7ff;
        let at = opaque(from as usize) & cut::LONGEST as usize;
        // SAFETY: as above; the element has room for a piece behind the last byte that the mask lets it begin at.
        let made = piece != 0
            && unsafe { bpf_skb_change_tail(skb, cut::PAYLOAD + piece, 0) == 0 }
            && unsafe { bpf_skb_store_bytes(skb, cut::PAYLOAD, bytes.add(at).cast(), piece, 0) == 0 }
            && packet.pull(cut::PAYLOAD)
            && cut.write_header(packet, from, piece);
        if !made {
            return number != 0;
        }
        // SAFETY: as above. What is lost there the kernel's backlog has dropped, like any packet.
        unsafe { bpf_clone_redirect(skb, cut.ifindex, BPF_F_INGRESS as u64) };
        number += 1;
    }
    true
}

#[inline(always)]
fn act(ctx: &TcContext, state: &Context, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => NEXT,
        Verdict::Drop => SHOT,
        Verdict::Redirect(ifindex) => {
            ctx.set_mark(MARK);
            // SAFETY: a helper with plain arguments.
            unsafe { bpf_redirect(ifindex, 0) as i32 }
        }
        Verdict::Neighbour(ifindex, 0) => {
            ctx.set_mark(MARK);
            // SAFETY: without parameters the helper asks the routing table.
            unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
        }
        Verdict::Neighbour(ifindex, address) => {
            ctx.set_mark(MARK);
            // SAFETY: all-zero is a valid value of this plain struct.
            let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
            neighbour.nh_family = AF_INET;
            neighbour.__bindgen_anon_1.ipv4_nh = address;
            // SAFETY: the struct lives for the call and its size is passed.
            unsafe {
                bpf_redirect_neigh(ifindex, &raw mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0) as i32
            }
        }
        Verdict::Neighbour6(ifindex) => {
            ctx.set_mark(MARK);
            let Some(hop) = Maps::<1>.next_hop(state.egress as u32) else { return SHOT };
            // SAFETY: all-zero is a valid value of this plain struct; the element lives as long as the map.
            let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
            neighbour.nh_family = AF_INET6;
            neighbour.__bindgen_anon_1.ipv6_nh = unsafe { (*hop).address6 };
            // SAFETY: the struct lives for the call and its size is passed.
            unsafe {
                bpf_redirect_neigh(ifindex, &raw mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0) as i32
            }
        }
        Verdict::Next(next) => {
            // SAFETY: nothing with a destructor is alive.
            unsafe { STAGES_TC.tail_call(ctx, next as u32) };
            Maps::<1>.count(Reason::Internal, state.length);
            SHOT
        }
    }
}

#[inline(always)]
fn begin(ctx: &TcContext, side: u8) -> Option<&'static mut Context> {
    let state = scratch::<1>()?;
    // SAFETY: the context is the program's own. On both paths `ifindex` is the device the program sits on.
    state.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    state.hook = Hook::Tc as u8;
    state.side = side;
    state.looped = 0;
    Some(state)
}

#[inline(always)]
fn stage(ctx: &TcContext, stage: Stage) -> i32 {
    let Some(state) = scratch::<1>() else { return SHOT };
    let verdict = engine::run(stage, &Tc(ctx), &Maps::<1>, state);
    act(ctx, state, verdict)
}

/// Ingress of guests' devices and uplinks.
#[classifier]
#[inline(always)]
pub fn pc_tc(ctx: TcContext) -> i32 {
    if begin(&ctx, 0).is_none() {
        return SHOT;
    }
    stage(&ctx, Stage::Entry)
}

/// Egress of guests' devices: what the host itself sends them. What we redirected carries the mark.
#[classifier]
#[inline(always)]
pub fn pc_host(ctx: TcContext) -> i32 {
    // SAFETY: the context is the program's own.
    if unsafe { (*ctx.skb.skb).mark } == MARK {
        ctx.set_mark(0);
        return NEXT;
    }
    if begin(&ctx, Side::Host as u8).is_none() {
        return SHOT;
    }
    stage(&ctx, Stage::Entry)
}

/// Egress of uplinks: no private source leaves.
#[classifier]
#[inline(always)]
pub fn pc_guard(ctx: TcContext) -> i32 {
    // SAFETY: the context is the program's own.
    if unsafe { (*ctx.skb.skb).mark } == MARK {
        ctx.set_mark(0);
    }
    let Some(state) = begin(&ctx, 0) else { return SHOT };
    let verdict = engine::guard::run(&Tc(&ctx), &Maps::<1>, state);
    if verdict == Verdict::Drop { SHOT } else { NEXT }
}

#[classifier]
#[inline(always)]
pub fn pc_tc_classify(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Classify)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_claim(ctx: TcContext) -> i32 {
    let action = stage(&ctx, Stage::Claim);
    if let Some(s) = scratch::<1>() {
        debug!(
            &ctx,
            "tc: new flow of {:i} from rule {}: action {}",
            u32::from_be(s.key.source),
            s.rule,
            action
        );
    }
    action
}

#[classifier]
#[inline(always)]
pub fn pc_tc_icmp(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Icmp)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_icmp6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Icmp6)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_fragment(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Fragment)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_entry6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Entry6)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_classify6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Classify6)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_claim6(ctx: TcContext) -> i32 {
    let action = stage(&ctx, Stage::Claim6);
    if let Some(s) = scratch::<1>() {
        debug!(&ctx, "tc: new IPv6 flow from rule {}: action {}", s.rule, action);
    }
    action
}

#[classifier]
#[inline(always)]
pub fn pc_tc_nd(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Nd)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_fragment6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Fragment6)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_refuse(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Refuse)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_refuse6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Refuse6)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_relieve(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Relieve)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_loop(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Loop)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_adopt(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Adopt)
}

#[classifier]
#[inline(always)]
pub fn pc_tc_adopt6(ctx: TcContext) -> i32 {
    stage(&ctx, Stage::Adopt6)
}
