//! Who owns which SNAT ports: preallocation in units of 8 (`reference/azure.md` §2.2, §2.3, §2.6; design §5; ADR 0008).
//!
//! Ownership is state, not a function of the policy: a member keeps its units when others join or leave, for TCP and UDP
//! apart. When the pool's tier gets smaller each member gives up those with the fewest live flows; when it gets larger
//! units are only added. A unit given up is free at once if nothing lives on it, else it drains. Free units go first to
//! where nobody had them: late answers to an old owner's flows should not meet a new owner's.

mod entitlement;
mod moves;
mod ownership;
mod runs;
mod share;
mod units;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

pub use entitlement::{EXCEEDS_AVAILABLE, NOT_A_MULTIPLE, entitlement, tier};
pub use moves::{Move, MoveKind, moves};
pub(super) use ownership::merge;
pub use ownership::{AddressUnits, LiveUnits, Owner, Ownership, TCP, UDP};
pub use units::UnitSet;

use super::error::CompileError;
use crate::policy::network::{Allocation, TransportProtocol};
use portcullis_common::policy::UNIT_PORTS;
use share::Share;

/// Members that get ports in the same way, and what they may have. A member belongs to one pool for each protocol.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// Path of the rule, for errors, and the key of [`Ownership::chosen`].
    pub place: String,
    /// All: as much of either.
    pub protocol: TransportProtocol,
    /// Public addresses without repetition, in the order they are filled.
    pub frontends: Vec<IpAddr>,
    /// Names, in the order of the policy.
    pub members: Vec<String>,
    /// `allocatedOutboundPorts`: ports per member over all frontends; 0 asks for the tier of the pool's size.
    pub allocated_outbound_ports: u32,
    pub allocation: Allocation,
}

impl Pool {
    fn has(&self, protocol: u8) -> bool {
        match self.protocol {
            TransportProtocol::Tcp => protocol == TCP,
            TransportProtocol::Udp => protocol == UDP,
            TransportProtocol::All => true,
        }
    }
}

/// What the allocator must know beside the pools.
#[derive(Debug, Clone)]
pub struct Ground<'a> {
    /// Every frontend address of the policy, and which of its units SNAT may use for TCP and for UDP.
    pub addresses: BTreeMap<IpAddr, [UnitSet; 2]>,
    /// Every member there is. Of others nothing drains.
    pub exists: HashSet<&'a str>,
    pub live: &'a LiveUnits,
    /// Unix seconds.
    pub now: u64,
    /// How long flows on units given up may go on.
    pub drain_seconds: u32,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocated {
    pub ownership: Ownership,
    /// Of each pool: the frontends it draws on, and the ports each member is entitled to for each protocol. It has fewer as
    /// long as units drain that it will get.
    pub pools: Vec<(Vec<IpAddr>, u32)>,
}

/// Hands out the units of all pools, moving as few as can be. NAT ports are not looked at.
///
/// Fails if a pool cannot have what it is entitled to even when nothing drains any more.
pub fn allocate(
    previous: Ownership,
    pools: &[Pool],
    ground: &Ground<'_>,
) -> Result<Allocated, Vec<CompileError>> {
    let mut ownership = previous;
    let mut errors = Vec::new();
    let mut of_pools = Vec::new();
    let before = std::mem::take(&mut ownership.chosen);
    for pool in pools {
        let mut frontends = pool.frontends.clone();
        if pool.allocation == Allocation::Basic && pool.allocated_outbound_ports == 0 {
            let known = before.get(&pool.place).copied().filter(|address| frontends.contains(address));
            if let Some(chosen) = known.or_else(|| choose(pool, ground.now)) {
                ownership.chosen.insert(pool.place.clone(), chosen);
                frontends = vec![chosen];
            }
        }
        match entitlement(pool) {
            Ok(ports) => of_pools.push((frontends, ports)),
            Err(error) => errors.push(error),
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    ownership.frontends.retain(|address, _| ground.addresses.contains_key(address));
    for protocol in [TCP, UDP] {
        let mut shares = Vec::new();
        for (pool, (frontends, ports)) in pools.iter().zip(&of_pools).filter(|(pool, _)| pool.has(protocol)) {
            let manual = pool.allocated_outbound_ports != 0;
            let units = (*ports / UNIT_PORTS) as usize;
            let share = |addresses: &[IpAddr], target| Share {
                place: &pool.place,
                addresses: addresses.to_vec(),
                members: &pool.members,
                target,
                manual,
            };
            if pool.allocation == Allocation::Multiply && !manual {
                // The tier on each frontend, not as much over all of them.
                let each = units / frontends.len().max(1);
                shares.extend(frontends.iter().map(|&address| share(&[address], each)));
            } else {
                shares.push(share(frontends, units));
            }
        }
        // What does not fit for TCP mostly does not for UDP: said once.
        for error in share::settle(&mut ownership, protocol, &shares, ground).err().unwrap_or_default() {
            if !errors.contains(&error) {
                errors.push(error);
            }
        }
    }
    ownership.frontends.retain(|_, units| !units.tcp.is_empty() || !units.udp.is_empty());
    if errors.is_empty() { Ok(Allocated { ownership, pools: of_pools }) } else { Err(errors) }
}

/// One of the pool's frontends: "consider the algorithm random" (Azure). It is drawn once and kept.
fn choose(pool: &Pool, now: u64) -> Option<IpAddr> {
    let seed = pool.place.bytes().fold(now ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let at = (seed >> 32).checked_rem(pool.frontends.len() as u64)?;
    pool.frontends.get(at as usize).copied()
}
