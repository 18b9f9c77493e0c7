//! The life of a packet in stages (design §4, ADR 0002), generic over the packet and the tables.
//!
//! A stage is a function `(packet, env, context) -> Verdict`; [`Verdict::Next`] names the stage that goes on. In the
//! kernel that is a tail call, on the host a loop ([`host`]).

pub mod arp;
pub mod claim;
pub mod entry;
pub mod forward;
pub mod guard;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod judge;
pub mod later;

use crate::classify::Classes;
use crate::env::Env;
use crate::layout::{Event, FlowKey};
use crate::packet::Packet;
use crate::packet::rewrite::Tuple;
use crate::reason::Reason;
use crate::snat::Search;

/// The programs of one hook; the numbers are indices of the program arrays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Stage {
    Entry = 0,
    Classify = 1,
    Claim = 2,
    Icmp = 3,
    Fragment = 4,
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
    Next(Stage),
}

/// What is known of a packet, kept in per-CPU scratch from one stage to the next.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Context {
    pub key: FlowKey,
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
    pub shape: u8,
    pub tcp_flags: u8,
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
    pub way_pad: [u8; 3],
    /// The tuple after translation.
    pub new: Tuple,
    pub classes: Classes,
    pub search: Search,
    pub claim: FlowKey,
}

// `packet::headers::copy_mac` copies half-words.
const _: () = assert!(core::mem::offset_of!(Context, source_mac).is_multiple_of(2));

pub const NOBODY: u32 = u32::MAX;

/// Between two guests, or host and guest: no translation.
pub const WAY_DIRECT: u8 = 1;
/// Out under an instance-level public IP.
pub const WAY_INSTANCE_OUT: u8 = 2;
/// In to an instance-level public IP.
pub const WAY_INSTANCE_IN: u8 = 3;
/// Out through SNAT.
pub const WAY_SNAT: u8 = 4;

impl Context {
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

/// The event that tells of this packet.
#[inline(always)]
pub fn event(ctx: &Context, reason: Reason) -> Event {
    Event {
        tick: ctx.now,
        ifindex: ctx.ifindex,
        source: ctx.key.source,
        destination: ctx.key.destination,
        source_port: ctx.key.source_port,
        destination_port: ctx.key.destination_port,
        network: ctx.key.network,
        protocol: ctx.key.protocol,
        reason: reason as u8,
        rule: ctx.rule,
        length: ctx.length,
        side: ctx.side,
        hook: ctx.hook,
        v6: 0,
        pad: 0,
        pad1: 0,
        source6: [0; 4],
        destination6: [0; 4],
    }
}

/// Runs one stage.
#[inline(always)]
pub fn run<P: Packet, E: Env>(stage: Stage, packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    match stage {
        Stage::Entry => entry::run(packet, env, ctx),
        Stage::Classify => judge::run(packet, env, ctx),
        Stage::Claim => claim::run(packet, env, ctx),
        Stage::Icmp => later::icmp(packet, env, ctx),
        Stage::Fragment => later::fragment(packet, env, ctx),
    }
}
