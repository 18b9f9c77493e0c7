//! Who owns which SNAT ports: preallocation in units of 8 (`reference/azure.md` §2.2, §2.3; design §5).
//!
//! Ownership is state, not a function of the policy: a member keeps its units when others join or leave. When the
//! pool's tier gets smaller each member keeps the first units it has, in the order of the rule's frontends; when it
//! gets larger units are only added. Units of members that left are free at once, but handed out after those that
//! nobody had: late answers to the old owner's flows should not meet the new owner's.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::ops::Range;

use portcullis_common::policy::{ADDRESS_UNITS, UNIT_PORTS};
use serde::{Deserialize, Serialize};

use super::error::CompileError;

/// Azure's code for a rule that asks for more ports than its frontends have.
pub const EXCEEDS_AVAILABLE: &str =
    "SpecifiedAllocatedOutboundPortsForOutboundRuleExceedsTotalNumberOfAvailablePorts";
/// Azure's code for a number of ports that is not a multiple of 8.
pub const NOT_A_MULTIPLE: &str = "SpecifiedAllocatedOutboundPortsForOutboundRuleIsNotAMultipleOfEight";

/// Units of a frontend that no host shares: ports 1024..=65023, Azure's 64,000.
const WHOLE: Range<u16> = 128..8128;

/// Who owns which unit, by public address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ownership {
    /// Address -> unit (port / 8) -> member, `vm1/ipconfig1`.
    pub frontends: BTreeMap<Ipv4Addr, BTreeMap<u16, String>>,
}

impl Ownership {
    /// A member's units, by address and number.
    pub fn units_of(&self, member: &str) -> Vec<(Ipv4Addr, u16)> {
        let owned = |(address, units): (&Ipv4Addr, &BTreeMap<u16, String>)| {
            let of_member = units.iter().filter(|(_, owner)| *owner == member);
            of_member.map(|(&unit, _)| (*address, unit)).collect::<Vec<_>>()
        };
        self.frontends.iter().flat_map(owned).collect()
    }

    /// The owner of a port.
    pub fn owner(&self, address: Ipv4Addr, port: u16) -> Option<&str> {
        self.frontends.get(&address)?.get(&(port / UNIT_PORTS as u16)).map(String::as_str)
    }

    /// The owned ports of an address as inclusive ranges, ascending.
    pub fn port_ranges(&self, address: Ipv4Addr) -> Vec<(u16, u16)> {
        let units = self.frontends.get(&address).into_iter().flat_map(|units| units.keys());
        merge(units.map(|&unit| unit_ports(unit)).collect())
    }
}

/// First and last port of a unit.
fn unit_ports(unit: u16) -> (u16, u16) {
    let first = unit * UNIT_PORTS as u16;
    (first, first + (UNIT_PORTS as u16 - 1))
}

/// Sorts inclusive ranges and joins those that touch.
pub(super) fn merge(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                previous.1 = previous.1.max(last)
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The members of one outbound rule and what they may have.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// Path of the outbound rule, for errors.
    pub place: String,
    /// In the order they are filled.
    pub frontends: Vec<PoolFrontend>,
    /// Names, in the order of the policy.
    pub members: Vec<String>,
    /// `allocatedOutboundPorts`: ports per member over all frontends; 0 asks for the tier of the pool's size.
    pub allocated_outbound_ports: u32,
}

/// A public address and which of its units SNAT may use.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolFrontend {
    pub address: Ipv4Addr,
    /// Ranges of units, ascending and disjoint.
    pub eligible: Vec<Range<u16>>,
}

/// Units SNAT may use of an address that the host does not have, or has and reserved its ports of.
pub fn whole_address() -> Vec<Range<u16>> {
    vec![WHOLE]
}

/// Units SNAT may use of an address the host uses too: those wholly outside its ephemeral range, above 1023.
pub fn beside_host(ephemeral: (u16, u16)) -> Vec<Range<u16>> {
    let unit = UNIT_PORTS as u16;
    // The last unit that ends below the range, exclusive; and the first that begins above it.
    let below = WHOLE.start..(ephemeral.0 / unit).max(WHOLE.start);
    let above = (u32::from(ephemeral.1) + 1).div_ceil(UNIT_PORTS) as u16;
    let above = above.max(WHOLE.start)..ADDRESS_UNITS as u16;
    [below, above].into_iter().filter(|r| !r.is_empty()).collect()
}

/// Default ports per member for one frontend: Azure's table. `None` above 1,000 members, where it has no answer.
pub fn tier(members: usize) -> Option<u32> {
    Some(match members {
        0..=50 => 1024,
        51..=100 => 512,
        101..=200 => 256,
        201..=400 => 128,
        401..=800 => 64,
        801..=1000 => 32,
        _ => return None,
    })
}

/// Ports a member of this pool is entitled to.
fn entitlement(pool: &Pool) -> Result<u32, CompileError> {
    let manual = pool.allocated_outbound_ports;
    if !manual.is_multiple_of(UNIT_PORTS) {
        return Err(CompileError::coded(
            NOT_A_MULTIPLE,
            &pool.place,
            format!("allocatedOutboundPorts is {manual}; ports are handed out in units of 8"),
        ));
    }
    if manual != 0 {
        return Ok(manual);
    }
    let tier = tier(pool.members.len()).ok_or_else(|| {
        CompileError::new(
            &pool.place,
            format!(
                "{} members; a pool has at most 1,000 unless allocatedOutboundPorts is set",
                pool.members.len()
            ),
        )
    })?;
    // Azure's newer rule: more frontends give more ports, but never more than 1,024 in all.
    Ok((tier * pool.frontends.len() as u32).min(1024))
}

/// Hands out the units of all pools, moving as few as can be. Every member belongs to at most one pool.
///
/// Fails if a pool cannot have what it is entitled to; then nothing is handed out.
pub fn allocate(previous: &Ownership, pools: &[Pool]) -> Result<Ownership, Vec<CompileError>> {
    let mut errors = Vec::new();
    let mut targets = Vec::new();
    for pool in pools {
        match entitlement(pool) {
            Ok(ports) => targets.push((ports / UNIT_PORTS) as usize),
            Err(error) => errors.push(error),
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }

    let mut held: HashMap<&str, BTreeSet<(Ipv4Addr, u16)>> = HashMap::new();
    for (address, units) in &previous.frontends {
        for (unit, member) in units {
            held.entry(member).or_default().insert((*address, *unit));
        }
    }

    // First everybody keeps what it may: only then is it known what is free.
    let mut next = Ownership::default();
    let mut counts: Vec<Vec<usize>> = Vec::new();
    for (pool, &target) in pools.iter().zip(&targets) {
        let mut kept_counts = Vec::with_capacity(pool.members.len());
        for member in &pool.members {
            let kept = keep(pool, held.get(member.as_str()), target);
            kept_counts.push(kept.len());
            for (address, unit) in kept {
                next.frontends.entry(address).or_default().insert(unit, member.clone());
            }
        }
        counts.push(kept_counts);
    }

    // Who has the fewest addresses to choose from is served first: the others can go elsewhere.
    let mut order: Vec<usize> = (0..pools.len()).collect();
    order.sort_by_key(|&i| pools[i].frontends.len());
    for i in order {
        let (pool, target, counts) = (&pools[i], targets[i], &counts[i]);
        let missing: usize = counts.iter().map(|kept| target - kept).sum();
        let mut free = Free::new(pool, previous, &next);
        if missing > free.left {
            errors.push(too_few(pool, target, missing, free.left));
            continue;
        }
        for (member, kept) in pool.members.iter().zip(counts) {
            for (address, unit) in free.by_ref().take(target - kept) {
                next.frontends.entry(address).or_default().insert(unit, member.clone());
            }
        }
    }
    if errors.is_empty() { Ok(next) } else { Err(errors) }
}

/// The first `target` units that a member holds and may still have, in the order of the pool's frontends.
fn keep(pool: &Pool, held: Option<&BTreeSet<(Ipv4Addr, u16)>>, target: usize) -> Vec<(Ipv4Addr, u16)> {
    let Some(held) = held else { return Vec::new() };
    let mut seen = HashSet::new();
    let frontends = pool.frontends.iter().filter(|f| seen.insert(f.address));
    frontends
        .flat_map(|f| {
            let eligible = |unit: u16| f.eligible.iter().any(|range| range.contains(&unit));
            held.range((f.address, 0)..=(f.address, u16::MAX))
                .copied()
                .filter(move |&(_, unit)| eligible(unit))
        })
        .take(target)
        .collect()
}

fn too_few(pool: &Pool, target: usize, missing: usize, left: usize) -> CompileError {
    let ports = |units: usize| units * UNIT_PORTS as usize;
    let message = format!(
        "{} members with {} ports each need {} more ports, but only {} are left on {}",
        pool.members.len(),
        ports(target),
        ports(missing),
        ports(left),
        pool.frontends.iter().map(|f| f.address.to_string()).collect::<Vec<_>>().join(", "),
    );
    if pool.allocated_outbound_ports == 0 {
        CompileError::new(&pool.place, message + "; add a frontend, or set allocatedOutboundPorts")
    } else {
        CompileError::coded(EXCEEDS_AVAILABLE, &pool.place, message)
    }
}

/// The free units of a pool in the order they are handed out: frontend after frontend, on each first those that
/// nobody had before.
struct Free {
    units: std::vec::IntoIter<(Ipv4Addr, u16)>,
    left: usize,
}

impl Free {
    fn new(pool: &Pool, previous: &Ownership, next: &Ownership) -> Self {
        let mut seen = HashSet::new();
        let mut units = Vec::new();
        for frontend in pool.frontends.iter().filter(|f| seen.insert(f.address)) {
            let taken = next.frontends.get(&frontend.address);
            let before = previous.frontends.get(&frontend.address);
            let has =
                |map: Option<&BTreeMap<u16, String>>, unit| map.is_some_and(|map| map.contains_key(&unit));
            let free = frontend.eligible.iter().cloned().flatten().filter(|&unit| !has(taken, unit));
            let (warm, cold): (Vec<u16>, Vec<u16>) = free.partition(|&unit| has(before, unit));
            units.extend(cold.into_iter().chain(warm).map(|unit| (frontend.address, unit)));
        }
        Self { left: units.len(), units: units.into_iter() }
    }
}

impl Iterator for Free {
    type Item = (Ipv4Addr, u16);

    fn next(&mut self) -> Option<Self::Item> {
        self.units.next()
    }
}
