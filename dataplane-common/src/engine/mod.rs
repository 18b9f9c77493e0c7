//! The life of a packet in stages (design §4, ADR 0002), generic over the packet and the tables.
//!
//! A stage is a function `(packet, env, context) -> Verdict`; [`Verdict::Next`] names the stage that goes on. In the
//! kernel that is a tail call, on the host a loop ([`host`]).

pub mod adopt;
pub mod arp;
pub mod balance;
pub mod claim;
pub mod entry;
pub mod entry6;
pub mod forward;
pub mod fragments;
#[cfg(test)]
mod frame_tests;
pub mod groups;
pub mod guard;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod icmp;
pub mod judge;
pub mod mapping;
pub mod nd;
pub mod owner;
pub mod refuse;
pub mod tcp;

use crate::classify::Classes;
use crate::env::{Env, FragmentKey};
use crate::family::{V4, V6};
use crate::flow::Grace;
use crate::layout::{Event, FlowKey, FlowKey6};
use crate::packet::Packet;
use crate::packet::rewrite::{Addresses6, Tuple};
use crate::quota::{self, Relief};
use crate::reason::Reason;
use crate::reassembly::{Known, Recalled};
use crate::snat::Search;

/// The programs of one hook; the numbers are indices of the program arrays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Stage {
    Entry = 0,
    Classify = 1,
    Claim = 2,
    /// ICMP errors, and what never leaves its link.
    Icmp = 3,
    Fragment = 4,
    Entry6 = 5,
    Classify6 = 6,
    Claim6 = 7,
    /// ICMPv6 of the link: neighbour discovery, multicast listeners.
    Nd = 8,
    Fragment6 = 9,
    /// A flow refused for want of a port, and what its guest is told.
    Refuse = 10,
    Refuse6 = 11,
    /// [`Stage::Entry`] once more, of a packet that comes back in. Only TC has it.
    Loop = 12,
    Icmp6 = 13,
    /// Room for a guest whose quota is used up: [`crate::quota::relieve`].
    Relieve = 14,
    /// A segment in the middle of a connection that policy does not let its sender open: perhaps its receiver did.
    Adopt = 20,
    Adopt6 = 21,
}

/// Where the packet was met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Side {
    /// Arriving on a guest's device.
    Guest = 1,
    /// Arriving on an uplink.
    Uplink = 2,
    /// Sent by this host, leaving on a guest's device.
    Host = 3,
}

/// Which hook runs the engine. XDP never decides what it passes up (ADR 0002).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Hook {
    Xdp = 1,
    Tc = 2,
}

/// What is to be done with the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To the next program or the kernel's stack.
    Pass,
    Drop,
    /// Out of this device; hardware addresses are written.
    Redirect(u32),
    /// Out of this device, the kernel resolves the neighbour: this address, or by its routes if 0. TC only.
    Neighbour(u32, u32),
    /// The same towards the IPv6 guest whose next hop is `egress` of the context. TC only.
    Neighbour6(u32),
    Next(Stage),
}

/// What is known of a packet, kept in per-CPU scratch from one stage to the next.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Context {
    /// Of an IPv6 packet this has the last 32 bits of each address; `key6` has all.
    pub key: FlowKey,
    pub key6: FlowKey6,
    pub now: u32,
    /// The policy read at entry; every stage uses this one.
    pub generation: u32,
    pub ifindex: u32,
    pub length: u32,
    pub l3: u16,
    pub l4: u16,
    /// [`Side`] as a number.
    pub side: u8,
    /// [`Hook`] as a number.
    pub hook: u8,
    /// `SHAPE_*` of [`crate::packet::parse`].
    pub shape: u16,
    pub tcp_flags: u8,
    /// Network order; meaningful with ACK.
    pub tcp_ack: u32,
    /// Host order, and the sequence number after the segment; meaningful with SYN, FIN or RST.
    pub tcp_sequence: u32,
    pub tcp_end: u32,
    /// A fragment's identification, network order, and its offset and flags in host order (of IPv4 and IPv6 alike: offset in
    /// units of 8 bytes, bit 15: more follow).
    pub fragment_id: u32,
    pub fragment: u16,
    /// Bytes behind a fragment's headers.
    pub fragment_length: u16,
    /// 1: a guest's packet on its way back in, see [`crate::layout::NEXT_HOP_LOOP`].
    pub looped: u8,
    /// Flags of the flow to be made besides what its way says: `FLAG_RESET`.
    pub flow_flags: u8,
    /// Why the packet is refused, for [`Stage::Refuse`].
    pub refused: u8,
    /// 1: the claim may take over a dead record of its key, see [`crate::flow::Grace`].
    pub grace_waived: u8,
    /// 1: the flow's public port is its inside socket's alone, a [`crate::layout::KIND_MAPPING`] pair stands behind it.
    pub mapped: u8,
    /// The flow to be made is older than the tables: 0 no, or who is taken to have opened it, `adopt::SENDER` or
    /// `adopt::RECEIVER`.
    pub adopt: u8,
    pub ttl: u8,
    /// Idle class of the flow to be made.
    pub idle_class: u8,
    pub source_mac: [u8; 6],
    /// Hardware address of the device the packet came in on.
    pub device_mac: [u8; 6],
    pub device_pad: u16,
    /// Endpoint that sends, or `NOBODY`.
    pub from: u32,
    /// Endpoint that receives, or `NOBODY`.
    pub to: u32,
    /// Rule that decided; id without the access bit.
    pub rule: u32,
    pub ingress: u16,
    pub egress: u16,
    /// The way the flow goes: `WAY_*`.
    pub way: u8,
    /// 1: an IPv6 packet.
    pub v6: u8,
    /// Virtual network of the receiver; that of the packet unless the receiver is a peer's guest.
    pub to_network: u16,
    /// Slot of the flow that is judged again, or [`NO_SLOT`], and the generation of that slot.
    pub again: u32,
    pub again_generation: u32,
    /// The tuple after translation; of IPv6 the last 32 bits of each address, `new6` has all.
    pub new: Tuple,
    pub new6: Addresses6,
    pub classes: Classes,
    pub search: Search,
    pub claim: FlowKey,
    pub claim6: FlowKey6,
    /// Scratch of an insertion, see [`crate::flow::insert`].
    pub notes: u32,
    /// Of a packet that is too big: what the next link takes.
    pub mtu: u32,
    pub relief: Relief,
    /// Of a fragment: its datagram, where that is looked for, what is known of it, and what this first fragment says.
    pub datagram: FragmentKey,
    pub datagram_set: u32,
    pub recalled: Recalled,
    pub first_fragment: Known,
}

// `packet::headers::copy_mac` copies half-words.
const _: () = assert!(core::mem::offset_of!(Context, source_mac).is_multiple_of(2));

// SAFETY: `repr(C)`, integers and arrays of them; any bits are a valid value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Context {}

pub const NOBODY: u32 = u32::MAX;
pub const NO_SLOT: u32 = u32::MAX;
/// No slot of a set of [`crate::reassembly`].
pub const NO_SET: u32 = u32::MAX;

/// Between two guests, or host and guest: no translation.
pub const WAY_DIRECT: u8 = 1;
/// Out under an instance-level public IP.
pub const WAY_INSTANCE_OUT: u8 = 2;
/// In, to an instance-level public IP or by a load balancer: the destination is translated.
pub const WAY_IN: u8 = 3;
/// Out through SNAT.
pub const WAY_SNAT: u8 = 4;
/// To a service of this host under a platform address; becomes `WAY_DIRECT` when the platform's rules allow it.
pub const WAY_PLATFORM: u8 = 5;

impl Context {
    #[inline(always)]
    pub fn grace(&self) -> Grace {
        if self.grace_waived != 0 { Grace::Waived } else { Grace::Kept }
    }

    #[inline(always)]
    pub fn side(&self) -> Side {
        match self.side {
            1 => Side::Guest,
            2 => Side::Uplink,
            _ => Side::Host,
        }
    }

    #[inline(always)]
    pub fn xdp(&self) -> bool {
        self.hook == Hook::Xdp as u8
    }
}

/// Ends the packet with a drop.
#[inline(always)]
pub fn drop<E: Env>(env: &E, ctx: &Context, reason: Reason) -> Verdict {
    env.count(reason, ctx.length);
    env.event(ctx, reason);
    Verdict::Drop
}

/// Gives the packet up to the kernel. Under XDP nothing is counted: TC on the same device decides again and counts.
#[inline(always)]
pub fn pass<E: Env>(env: &E, ctx: &Context, reason: Reason) -> Verdict {
    if !ctx.xdp() {
        env.count(reason, ctx.length);
    }
    Verdict::Pass
}

/// Writes the event that tells of this packet, field by field: in the kernel it is built where it is sent from, a BPF
/// stack has no room for it at every drop.
///
/// # Safety
/// `event` can be written.
#[inline(always)]
pub unsafe fn write_event(event: *mut Event, ctx: &Context, reason: Reason) {
    // SAFETY: the caller vouches for `event`; no reference to what is not written yet is made.
    unsafe {
        (&raw mut (*event).tick).write(ctx.now);
        (&raw mut (*event).ifindex).write(ctx.ifindex);
        (&raw mut (*event).source).write(ctx.key.source);
        (&raw mut (*event).destination).write(ctx.key.destination);
        (&raw mut (*event).source_port).write(ctx.key.source_port);
        (&raw mut (*event).destination_port).write(ctx.key.destination_port);
        (&raw mut (*event).network).write(ctx.key.network);
        (&raw mut (*event).protocol).write(ctx.key.protocol);
        (&raw mut (*event).reason).write(reason as u8);
        (&raw mut (*event).rule).write(ctx.rule);
        (&raw mut (*event).length).write(ctx.length);
        (&raw mut (*event).side).write(ctx.side);
        (&raw mut (*event).hook).write(ctx.hook);
        (&raw mut (*event).v6).write(ctx.v6);
        (&raw mut (*event).pad).write(0);
        (&raw mut (*event).pad1).write(0);
        for i in 0..4 {
            let (source, destination) = if ctx.v6 != 0 {
                (*ctx.key6.source.as_ptr().add(i), *ctx.key6.destination.as_ptr().add(i))
            } else {
                (0, 0)
            };
            (&raw mut (*event).source6).cast::<u32>().add(i).write(source);
            (&raw mut (*event).destination6).cast::<u32>().add(i).write(destination);
        }
    }
}

/// How deciding about a packet ended, for functions with many ends: counting and telling is then done in one place.
pub enum Ended {
    Verdict(Verdict),
    Drop(Reason),
    Pass(Reason),
}

impl From<Reason> for Ended {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Ended::Drop(reason)
    }
}

/// Counts and tells.
#[inline(always)]
pub fn end<E: Env>(env: &E, ctx: &Context, ended: Ended) -> Verdict {
    match ended {
        Ended::Verdict(verdict) => verdict,
        Ended::Drop(reason) => drop(env, ctx, reason),
        Ended::Pass(reason) => pass(env, ctx, reason),
    }
}

/// Runs one stage.
#[inline(always)]
pub fn run<P: Packet, E: Env>(stage: Stage, packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    match stage {
        Stage::Entry | Stage::Loop => entry::run(packet, env, ctx),
        Stage::Classify => judge::run::<V4, E>(env, ctx),
        Stage::Claim => claim::run::<V4, P, E>(packet, env, ctx),
        Stage::Icmp => icmp::run::<V4, P, E>(packet, env, ctx),
        Stage::Icmp6 => icmp::run::<V6, P, E>(packet, env, ctx),
        Stage::Fragment => fragments::run::<V4, P, E>(packet, env, ctx),
        Stage::Fragment6 => fragments::run::<V6, P, E>(packet, env, ctx),
        Stage::Refuse => refuse::run::<V4, P, E>(packet, env, ctx),
        Stage::Refuse6 => refuse::run::<V6, P, E>(packet, env, ctx),
        Stage::Entry6 => entry6::run(packet, env, ctx),
        Stage::Classify6 => judge::run::<V6, E>(env, ctx),
        Stage::Nd => nd::run(packet, env, ctx),
        Stage::Relieve => quota::relieve(env, ctx),
        Stage::Claim6 => claim::run::<V6, P, E>(packet, env, ctx),
        Stage::Adopt => adopt::run::<V4, P, E>(packet, env, ctx),
        Stage::Adopt6 => adopt::run::<V6, P, E>(packet, env, ctx),
    }
}
