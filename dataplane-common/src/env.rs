//! What the engine needs besides the packet: tables, counters, time. Implemented over BPF maps in `dataplane-ebpf`
//! and over plain Rust in [`crate::engine::host`].

use crate::engine::Context;
use crate::flow::{Ctl, Taken};
use crate::layout::{Bucket, Bucket6, Control, Cursors, Device, FlowKey, GuestFlows, NextHop, WORLD};
use crate::policy::Page;
use crate::reason::Reason;
use crate::reassembly::DatagramSet;

/// One attempt of a bounded search that may be too long to inline; see [`Env::search`].
pub trait Step<E: Env> {
    /// Goes one step; `true` ends the search.
    fn attempt(env: &E, ctx: &mut Context) -> bool;
}

/// What is limited per CPU and tick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Budget {
    /// Flows judged again.
    Reevaluate = 0,
    /// Packets of our own: refusals.
    Answer = 1,
    /// Looks for dead flows of a guest that has as many as it may.
    Relieve = 2,
}

/// What is remembered of a claim that failed: for how long, and how far the search got, 0 if to the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    pub until: u32,
    pub resume: u32,
}

/// Identifies a fragmented datagram (RFC 791 §3.2, RFC 8200 §4.5). Of IPv4 the first word of each address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    pub source: [u32; 4],
    pub destination: [u32; 4],
    /// Network order.
    pub id: u32,
    pub network: u16,
    pub protocol: u8,
    /// 4 or 6.
    pub version: u8,
}

/// Tables, counters and time. Pointers returned stay valid for the rest of the packet; the records behind them are
/// shared with other CPUs and only changed the way [`crate::flow`] says.
pub trait Env: Sized {
    /// Ticks of [`crate::clock`].
    fn now(&self) -> u32;
    fn control(&self) -> Option<*const Control>;
    /// The device's pair for both generation parities.
    fn device(&self, ifindex: u32) -> Option<*const [Device; 2]>;
    fn next_hop(&self, index: u32) -> Option<*mut NextHop>;
    fn bucket(&self, index: u32) -> Option<*mut Bucket>;
    fn bucket6(&self, index: u32) -> Option<*mut Bucket6>;
    /// What the guest with this next hop has of the flow tables.
    fn guest_flows(&self, hop: u32) -> Option<*mut GuestFlows>;
    fn cursors(&self) -> Option<*mut Cursors>;
    /// A place in the ring of half-open flows of IPv4 or IPv6, see [`crate::quota`].
    fn half_open(&self, v6: bool, place: u32) -> Option<*mut u64>;
    fn page(&self, generation: u32, index: u32) -> Option<*const Page>;
    /// Global class of an address (network order); 0 when no prefix of the policy covers it.
    fn address_class(&self, generation: u32, address: u32) -> u32;
    fn address_class6(&self, generation: u32, address: &[u32; 4]) -> u32;
    /// Where an address is, seen from a routing id: [`crate::policy::space_value`], 0 for outside. From `WORLD` it says
    /// whether any virtual network has it.
    fn space(&self, generation: u32, routing: u16, address: u32) -> u32;
    fn space6(&self, generation: u32, routing: u16, address: &[u32; 4]) -> u32;
    /// Is the address in no virtual network of this generation? What [`Env::space`] says, which an implementation may remember.
    fn outside(&self, generation: u32, address: u32) -> bool {
        self.space(generation, WORLD, address) == 0
    }
    /// [`crate::policy::endpoint_value`] of the address, 0 for none.
    fn endpoint(&self, generation: u32, network: u16, address: u32) -> u32;
    fn endpoint6(&self, generation: u32, network: u16, address: &[u32; 4]) -> u32;
    /// [`crate::policy::AT_LISTENER`] of a frontend's port (network order), 0 for none.
    fn listener(&self, generation: u32, address: u32, port: u16, protocol: u8) -> u32;
    fn listener6(&self, generation: u32, address: &[u32; 4], port: u16, protocol: u8) -> u32;
    /// Next hop towards an address of the world, 0 for none.
    fn route(&self, address: u32) -> u32;
    fn route6(&self, address: &[u32; 4]) -> u32;
    fn count(&self, reason: Reason, bytes: u32);
    fn count_rule(&self, rule: u32, bytes: u32);
    /// Samples a drop or exhaustion event.
    fn event(&self, ctx: &Context, reason: Reason);
    /// What is remembered of claims that failed for this key.
    fn refused(&self, key: &FlowKey) -> Option<Refusal>;
    fn refuse(&self, key: &FlowKey, refusal: Refusal);
    /// Counts a claim that succeeded at its `n`-th candidate.
    fn tried(&self, n: u32);
    /// A set of [`crate::reassembly`].
    fn datagrams(&self, set: u32) -> Option<*mut DatagramSet>;
    /// [`crate::reassembly::recall`] and [`crate::reassembly::remember`]; here for the reason that [`Env::insert`] is.
    fn recall(&self, ctx: &mut Context);
    fn remember(&self, ctx: &mut Context);
    /// An IPv4 identification for a datagram that is fragmented here: none of the last 65,535 (RFC 6864 §4.3).
    fn identification(&self) -> u16;
    /// [`crate::flow::insert`] of `ctx.claim`. Here and not called directly, because in the kernel it is a function that the
    /// verifier checks once instead of at each of its calls.
    fn insert(&self, ctx: &mut Context) -> Taken;
    /// The same of `ctx.claim6` into the table for IPv6.
    fn insert6(&self, ctx: &mut Context) -> Taken;
    /// [`crate::engine::tcp::turn`] of the flow with this slot, whose control word was `before`; a function of its own for the
    /// same reason, and because hardly a packet needs it.
    fn tcp_turn(&self, ctx: &mut Context, index: u32, before: Ctl);
    /// The same of the table for IPv6.
    fn tcp_turn6(&self, ctx: &mut Context, index: u32, before: Ctl);
    /// Takes one from a budget of this CPU and tick; `false` if there is none left.
    fn spend(&self, which: Budget, now: u32, budget: u32) -> bool;
    /// Look-ups only: nothing is claimed, learned or prolonged. Constant for a program.
    fn dry_run(&self) -> bool;
    /// Runs `S::attempt` until one says it is done, at most `n` times. The context passed on is the packet's own.
    fn search<S: Step<Self>>(&self, ctx: &mut Context, n: u32);
}
