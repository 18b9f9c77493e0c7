//! The units of one protocol: who keeps, who gives up, who gets.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::IpAddr;

use portcullis_common::policy::UNIT_PORTS;

use super::entitlement::EXCEEDS_AVAILABLE;
use super::{Ground, Owner, Ownership, UDP, UnitSet};
use crate::compile::error::CompileError;

/// A pool's right to units of some addresses for one protocol.
pub(super) struct Share<'a> {
    pub place: &'a str,
    /// In the order they are filled.
    pub addresses: Vec<IpAddr>,
    pub members: &'a [String],
    /// Units of each member.
    pub target: usize,
    /// Asked for by `allocatedOutboundPorts`.
    pub manual: bool,
}

/// A unit: index of its address, and number.
type Unit = (usize, u16);

/// What one member has of one share.
#[derive(Default)]
struct Seat {
    held: Vec<Unit>,
    /// Those that drain and it might have back.
    draining: Vec<Unit>,
}

/// One protocol under way.
struct Settling<'a> {
    protocol: u8,
    ground: &'a Ground<'a>,
    addresses: Vec<IpAddr>,
    /// By address: units SNAT may use.
    eligible: Vec<&'a UnitSet>,
    /// Of each share: its addresses as indices, in the order they are filled.
    order: Vec<Vec<usize>>,
    /// Of each share: its members'.
    seats: Vec<Vec<Seat>>,
    /// By address: units that somebody has, draining or not.
    taken: Vec<UnitSet>,
    /// By address: units that drain.
    draining: Vec<UnitSet>,
    /// By address: units that somebody had before.
    warm: Vec<UnitSet>,
    changes: Vec<(Unit, Change)>,
}

enum Change {
    Free,
    Drain,
    /// To this share's member.
    Give(usize, usize),
}

/// Brings the units of one protocol to what the shares say.
pub(super) fn settle(
    ownership: &mut Ownership,
    protocol: u8,
    shares: &[Share<'_>],
    ground: &Ground<'_>,
) -> Result<(), Vec<CompileError>> {
    let addresses: Vec<IpAddr> = ground.addresses.keys().copied().collect();
    let index: BTreeMap<IpAddr, usize> = addresses.iter().enumerate().map(|(i, a)| (*a, i)).collect();
    let empty = vec![UnitSet::default(); addresses.len()];
    let mut settling = Settling {
        protocol,
        ground,
        eligible: ground.addresses.values().map(|of| &of[usize::from(protocol == UDP)]).collect(),
        order: shares
            .iter()
            .map(|share| share.addresses.iter().filter_map(|a| index.get(a)).copied().collect())
            .collect(),
        seats: shares.iter().map(|s| s.members.iter().map(|_| Seat::default()).collect()).collect(),
        taken: empty.clone(),
        draining: empty.clone(),
        warm: empty,
        changes: Vec::new(),
        addresses,
    };
    settling.keep(ownership, shares);
    for (i, share) in shares.iter().enumerate() {
        settling.give_up(i, share);
        settling.take_back(i, share);
    }
    // Who has the fewest addresses to choose from is served first: the others can go elsewhere.
    let mut turns: Vec<usize> = (0..shares.len()).collect();
    turns.sort_by_key(|&i| shares[i].addresses.len());
    settling.check(shares, &turns)?;
    for &i in &turns {
        settling.fill(i, &shares[i]);
    }
    settling.write(ownership, shares);
    Ok(())
}

impl Settling<'_> {
    fn live(&self, (address, unit): Unit) -> u32 {
        self.ground.live.get(&(self.addresses[address], self.protocol, unit)).copied().unwrap_or(0)
    }

    /// What everybody has, and may still have. Whatever else is owned drains or is free.
    fn keep(&mut self, ownership: &Ownership, shares: &[Share<'_>]) {
        let mut seats: HashMap<&str, Vec<(usize, usize)>> = HashMap::new();
        for (i, share) in shares.iter().enumerate() {
            for (m, member) in share.members.iter().enumerate() {
                seats.entry(member).or_default().push((i, m));
            }
        }
        for address in 0..self.addresses.len() {
            let Some(units) = ownership.frontends.get(&self.addresses[address]) else { continue };
            // A member's units lie side by side: it is looked up once for all of them.
            let (mut last, mut places) = ("", &[][..]);
            for (&number, owner) in units.of(self.protocol) {
                let unit = (address, number);
                self.warm[address].insert(number);
                if owner.member != last {
                    last = &owner.member;
                    places = seats.get(last).map_or(&[], Vec::as_slice);
                }
                let seat = places
                    .iter()
                    .find(|(share, _)| self.order[*share].contains(&address))
                    .filter(|_| self.eligible[address].contains(number));
                match (owner.draining_until, seat) {
                    (None, Some(&(share, member))) => {
                        self.seats[share][member].held.push(unit);
                        self.taken[address].insert(number);
                    }
                    (None, None) if self.ground.exists.contains(owner.member.as_str()) => self.release(unit),
                    (Some(_), _) if self.still_drains(unit, owner) => {
                        self.taken[address].insert(number);
                        self.draining[address].insert(number);
                        if let Some(&(share, member)) = seat {
                            self.seats[share][member].draining.push(unit);
                        }
                    }
                    _ => self.changes.push((unit, Change::Free)),
                }
            }
        }
    }

    /// As long as something lives there, and be the grace over: who ends flows then ends them before this is asked.
    fn still_drains(&self, unit: Unit, owner: &Owner) -> bool {
        self.live(unit) != 0 && self.ground.exists.contains(owner.member.as_str())
    }

    /// A unit its member has no right to any more: free at once if nothing lives on it.
    fn release(&mut self, unit: Unit) {
        let (address, number) = unit;
        if self.live(unit) == 0 {
            self.taken[address].remove(number);
            self.changes.push((unit, Change::Free));
        } else {
            self.taken[address].insert(number);
            self.draining[address].insert(number);
            self.changes.push((unit, Change::Drain));
        }
    }

    /// Who has more than the share says gives up those with the fewest live flows, of these the last.
    fn give_up(&mut self, share: usize, Share { target, .. }: &Share<'_>) {
        for member in 0..self.seats[share].len() {
            let mut held = std::mem::take(&mut self.seats[share][member].held);
            if held.len() > *target {
                let rank = |address| self.order[share].iter().position(|a| *a == address);
                held.sort_by_cached_key(|&unit| (Reverse(self.live(unit)), rank(unit.0), unit.1));
                for unit in held.split_off(*target) {
                    self.release(unit);
                }
            }
            self.seats[share][member].held = held;
        }
    }

    /// Who is entitled to more than it has takes what it was about to lose first.
    fn take_back(&mut self, share: usize, Share { target, .. }: &Share<'_>) {
        for member in 0..self.seats[share].len() {
            let seat = &mut self.seats[share][member];
            let missing = target.saturating_sub(seat.held.len()).min(seat.draining.len());
            let back: Vec<Unit> = seat.draining.drain(..missing).collect();
            for unit in back {
                self.draining[unit.0].remove(unit.1);
                self.give(unit, share, member);
            }
        }
    }

    fn give(&mut self, unit: Unit, share: usize, member: usize) {
        self.taken[unit.0].insert(unit.1);
        self.seats[share][member].held.push(unit);
        self.changes.push((unit, Change::Give(share, member)));
    }

    fn missing(&self, share: usize, target: usize) -> usize {
        self.seats[share].iter().map(|seat| target - seat.held.len()).sum()
    }

    /// Would everybody get all of it if nothing drained?
    fn check(&self, shares: &[Share<'_>], turns: &[usize]) -> Result<(), Vec<CompileError>> {
        let pairs = self.taken.iter().zip(&self.draining);
        let mut taken: Vec<UnitSet> = pairs.map(|(taken, draining)| taken.without(draining)).collect();
        let mut errors = Vec::new();
        for &i in turns {
            let missing = self.missing(i, shares[i].target);
            if missing == 0 {
                continue;
            }
            let free = self.free(i, &taken);
            if missing > free.len() {
                errors.push(too_few(&shares[i], missing, free.len()));
            }
            for (address, unit) in free.into_iter().take(missing) {
                taken[address].insert(unit);
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// The units a share may hand out, in that order: address after address, on each first those that nobody had before.
    fn free(&self, share: usize, taken: &[UnitSet]) -> Vec<Unit> {
        let mut units = Vec::new();
        for &address in &self.order[share] {
            let free = self.eligible[address].without(&taken[address]);
            let (cold, warm) = (free.without(&self.warm[address]), free.and(&self.warm[address]));
            units.extend(cold.iter().chain(warm.iter()).map(|unit| (address, unit)));
        }
        units
    }

    /// Hands out what is free. If that is too little for now, those who have least come first.
    fn fill(&mut self, share: usize, Share { target, .. }: &Share<'_>) {
        let missing = self.missing(share, *target);
        if missing == 0 {
            return;
        }
        let free = self.free(share, &self.taken);
        let mut gets: Vec<usize> = self.seats[share].iter().map(|seat| target - seat.held.len()).collect();
        if missing > free.len() {
            gets = level(self.seats[share].iter().map(|seat| seat.held.len()), *target, free.len());
        }
        let mut free = free.into_iter();
        for (member, gets) in gets.into_iter().enumerate() {
            for unit in free.by_ref().take(gets) {
                self.give(unit, share, member);
            }
        }
    }

    fn write(self, ownership: &mut Ownership, shares: &[Share<'_>]) {
        let until = self.ground.now + u64::from(self.ground.drain_seconds);
        for ((address, unit), change) in self.changes {
            let units = ownership.frontends.entry(self.addresses[address]).or_default();
            let units = units.of_mut(self.protocol);
            match change {
                Change::Free => _ = units.remove(&unit),
                Change::Drain => {
                    if let Some(owner) = units.get_mut(&unit) {
                        owner.draining_until = Some(until);
                    }
                }
                Change::Give(share, member) => {
                    let member = shares[share].members[member].clone();
                    units.insert(unit, Owner { member, draining_until: None });
                }
            }
        }
    }
}

/// Hands `free` units out one by one, each to who has least; how many each gets.
fn level(held: impl Iterator<Item = usize>, target: usize, free: usize) -> Vec<usize> {
    let mut queue: BinaryHeap<Reverse<(usize, usize)>> =
        held.enumerate().map(|(member, has)| Reverse((has, member))).collect();
    let mut gets = vec![0; queue.len()];
    for _ in 0..free {
        let Some(Reverse((has, member))) = queue.pop().filter(|Reverse((has, _))| *has < target) else {
            break;
        };
        gets[member] += 1;
        queue.push(Reverse((has + 1, member)));
    }
    gets
}

fn too_few(share: &Share<'_>, missing: usize, left: usize) -> CompileError {
    let ports = |units: usize| units * UNIT_PORTS as usize;
    let message = format!(
        "{} members with {} ports each need {} more ports, but only {} are left on {}",
        share.members.len(),
        ports(share.target),
        ports(missing),
        ports(left),
        share.addresses.iter().map(|address| address.to_string()).collect::<Vec<_>>().join(", "),
    );
    if share.manual {
        CompileError::coded(EXCEEDS_AVAILABLE, share.place, message)
    } else {
        CompileError::new(share.place, message + "; add a frontend, or set allocatedOutboundPorts")
    }
}
