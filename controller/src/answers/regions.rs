//! Sets of packets, and whether some of them together cover another: exact, for whole groups.
//!
//! A rule is a *region*: the packets whose protocol, source, source port, destination and destination port are each in a
//! set. Points of a field that no region of a [`Space`] tells apart are one *class*, so a field of a region is a bitmap
//! of classes and a region a box of five bitmaps. Packets fall into four worlds that have no packet in common and are
//! judged apart: IPv4 and IPv6, with ports (TCP, UDP) and without; those without ports count as having port 0 on both
//! sides, as in the classifier.
//!
//! Whether boxes cover a box is found by taking one of them away, which leaves at most five boxes, and asking again for
//! each of those. Most questions end early: boxes that have all but one field leave a single piece, and a class that no box
//! has leaves a packet over.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;

use super::addresses::{AddressSet, Family, Range};
use super::expand::Terms;
use super::trace::Packet;
use crate::policy::network::{RuleProtocol, SecurityRule};

/// Steps of one question and of all questions to one space, a step being a look at one box. All questions about a
/// ClassBench set of 4,000 rules together need some tens of millions; rules made to defeat the search end here, undecided.
const STEPS: u64 = 20_000_000;
const ALL_STEPS: u64 = 1_000_000_000;
/// Questions to find out which of the covering regions can be left out.
const QUESTIONS: usize = 200;

/// Protocols that have ports, and one number for each kind of those that have none; 0 stands for all others.
const WITH_PORTS: [u8; 2] = [6, 17];
const WITHOUT_PORTS: [u8; 4] = [1, 50, 51, 0];

/// Which protocols: a bit for each of TCP, UDP, ICMP (both families'), ESP, AH and the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocols(u8);

impl Protocols {
    pub const ALL: Self = Self(0x3f);
    pub const TCP: Self = Self(1);
    pub const UDP: Self = Self(2);

    /// Those of a rule.
    pub fn of_rule(protocol: RuleProtocol) -> Self {
        match protocol {
            RuleProtocol::Any => Self::ALL,
            RuleProtocol::Tcp => Self::TCP,
            RuleProtocol::Udp => Self::UDP,
            RuleProtocol::Icmp => Self(4),
            RuleProtocol::Esp => Self(8),
            RuleProtocol::Ah => Self(16),
        }
    }

    /// The one with this IANA number.
    pub fn of_number(number: u8) -> Self {
        match number {
            6 => Self::TCP,
            17 => Self::UDP,
            1 | 58 => Self(4),
            50 => Self(8),
            51 => Self(16),
            _ => Self(32),
        }
    }

    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// As a bitmap of a world's protocols.
    fn in_world(self, ports: bool) -> u64 {
        u64::from(if ports { self.0 & 3 } else { self.0 >> 2 })
    }
}

/// A set of packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    pub protocols: Protocols,
    pub source: AddressSet,
    /// Inclusive, sorted, not touching.
    pub source_ports: Vec<(u16, u16)>,
    pub destination: AddressSet,
    pub destination_ports: Vec<(u16, u16)>,
}

/// Every port.
pub const ANY_PORT: (u16, u16) = (0, u16::MAX);

/// Does the first list of ports have all of the second?
pub fn ports_cover(ports: &[(u16, u16)], others: &[(u16, u16)]) -> bool {
    others.iter().all(|&(low, high)| ports.iter().any(|&(first, last)| first <= low && high <= last))
}

impl Region {
    /// The packets that a rule matches in one subnet.
    pub fn of_rule(rule: &SecurityRule, terms: &mut Terms<'_>) -> Self {
        Self {
            protocols: Protocols::of_rule(rule.protocol),
            source: terms.side(&rule.source),
            source_ports: rule.source_ports.clone(),
            destination: terms.side(&rule.destination),
            destination_ports: rule.destination_ports.clone(),
        }
    }

    /// Is every packet of `other` in here, field by field?
    pub fn covers(&self, other: &Self) -> bool {
        self.protocols.covers(other.protocols)
            && self.source.covers(&other.source)
            && ports_cover(&self.source_ports, &other.source_ports)
            && self.destination.covers(&other.destination)
            && ports_cover(&self.destination_ports, &other.destination_ports)
    }
}

/// What [`Space::covered`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cover {
    /// They cover it, and these (indices of regions, ascending) are enough.
    Covered(Vec<usize>),
    /// A packet is left over; an example.
    Left(Packet),
    /// Not found out within the steps there are.
    Undecided,
}

impl Cover {
    /// Is a packet left over?
    pub fn is_left(&self) -> bool {
        matches!(self, Cover::Left(_))
    }
}

type Bits = Box<[u64]>;
/// Five bitmaps, in the order of the constants below.
type Cuboid = [Bits; 5];

const PROTOCOL: usize = 0;
const SOURCE: usize = 1;
const SOURCE_PORT: usize = 2;
const DESTINATION: usize = 3;
const DESTINATION_PORT: usize = 4;

/// One family, with or without ports.
struct World {
    family: Family,
    ports: bool,
    /// Each region's box; `None` where it has no packet here.
    cells: Vec<Option<Cuboid>>,
    /// A point of each class of each field.
    samples: [Vec<u128>; 5],
}

/// Regions made comparable.
pub struct Space {
    worlds: Vec<World>,
    /// Of `ALL_STEPS`, those that are left.
    steps: Cell<u64>,
}

impl Space {
    /// Builds the classes of these regions; questions then name regions by their place in the list.
    pub fn new(regions: &[Region]) -> Self {
        let port_sets = |pick: fn(&Region) -> &Vec<(u16, u16)>| -> Vec<Vec<Range>> {
            let wide = |&(low, high): &(u16, u16)| (u128::from(low), u128::from(high));
            regions.iter().map(|region| pick(region).iter().map(wide).collect()).collect()
        };
        let source_ports = classes(port_sets(|region| &region.source_ports));
        let destination_ports = classes(port_sets(|region| &region.destination_ports));
        // Every packet of this world has port 0: one class, and a region is in it or is not here at all.
        let portless = |set: fn(&Region) -> &Vec<(u16, u16)>| {
            classes(
                regions
                    .iter()
                    .map(|r| if set(r).first().is_some_and(|p| p.0 == 0) { vec![(0, 0)] } else { vec![] }),
            )
        };
        let no_source_port = portless(|region| &region.source_ports);
        let no_destination_port = portless(|region| &region.destination_ports);
        let mut worlds = Vec::with_capacity(4);
        for family in Family::BOTH {
            let source = classes(regions.iter().map(|region| region.source.ranges(family).to_vec()));
            let destination =
                classes(regions.iter().map(|region| region.destination.ranges(family).to_vec()));
            for ports in [true, false] {
                let (source_port, destination_port) = match ports {
                    true => (&source_ports, &destination_ports),
                    false => (&no_source_port, &no_destination_port),
                };
                let cell = |i: usize| {
                    let cell = [
                        vec![regions[i].protocols.in_world(ports)].into(),
                        source.0[i].clone(),
                        source_port.0[i].clone(),
                        destination.0[i].clone(),
                        destination_port.0[i].clone(),
                    ];
                    cell.iter().all(|bits| !is_empty(bits)).then_some(cell)
                };
                let protocols = if ports { &WITH_PORTS[..] } else { &WITHOUT_PORTS[..] };
                worlds.push(World {
                    family,
                    ports,
                    cells: (0..regions.len()).map(cell).collect(),
                    samples: [
                        protocols.iter().map(|&p| u128::from(p)).collect(),
                        source.1.clone(),
                        source_port.1.clone(),
                        destination.1.clone(),
                        destination_port.1.clone(),
                    ],
                });
            }
        }
        Self { worlds, steps: Cell::new(ALL_STEPS) }
    }

    /// Has a region any packet? An application group without members has not.
    pub fn is_empty(&self, region: usize) -> bool {
        self.worlds.iter().all(|world| world.cells[region].is_none())
    }

    /// Have all of these regions a packet in common?
    pub fn meet(&self, regions: &[usize]) -> bool {
        self.worlds.iter().any(|world| world.common(regions).is_some())
    }

    /// Do the regions `by` cover what all regions of `target` have in common?
    pub fn covered(&self, target: &[usize], by: &[usize]) -> Cover {
        let start = self.steps.get().min(STEPS);
        let mut search = Search { used: Vec::new(), steps: start };
        let mut found = Found::Covered;
        for world in &self.worlds {
            let Some(piece) = world.common(target) else { continue };
            found = search.covered(world, piece, by);
            match found {
                Found::Covered => {}
                Found::Left(at) => return self.ended(start, search, Cover::Left(world.packet(at))),
                Found::Undecided => break,
            }
        }
        let mut used = std::mem::take(&mut search.used);
        used.sort_unstable();
        used.dedup();
        let undecided = matches!(found, Found::Undecided);
        self.ended(start, search, if undecided { Cover::Undecided } else { Cover::Covered(used) })
    }

    /// Takes the steps of a question off those that are left.
    fn ended(&self, start: u64, search: Search, cover: Cover) -> Cover {
        self.steps.set(self.steps.get() - (start - search.steps));
        cover
    }

    /// The same, and of the covering regions as few as can be: none of those returned can be left out, unless there are
    /// hundreds.
    pub fn covered_by_fewest(&self, target: &[usize], by: &[usize]) -> Cover {
        let mut used = match self.covered(target, by) {
            Cover::Covered(used) => used,
            other => return other,
        };
        let mut questions = QUESTIONS;
        let mut chunk = used.len().div_ceil(2);
        while chunk > 0 && questions > 0 {
            // From the end: those that are named are the ones that a reader meets first.
            let mut end = used.len();
            while end > 0 && questions > 0 {
                let start = end.saturating_sub(chunk);
                let rest = [&used[..start], &used[end..]].concat();
                questions -= 1;
                if let Cover::Covered(fewer) = self.covered(target, &rest) {
                    used = fewer;
                }
                end = start.min(used.len());
            }
            chunk /= 2;
        }
        Cover::Covered(used)
    }
}

impl World {
    fn common(&self, regions: &[usize]) -> Option<Cuboid> {
        let (first, rest) = regions.split_first()?;
        let mut piece = self.cells[*first].clone()?;
        for &other in rest {
            let other = self.cells[other].as_ref()?;
            for (field, with) in piece.iter_mut().zip(other) {
                for (word, with) in field.iter_mut().zip(with) {
                    *word &= with;
                }
                if is_empty(field) {
                    return None;
                }
            }
        }
        Some(piece)
    }

    /// The packet at one class of each field.
    fn packet(&self, at: [usize; 5]) -> Packet {
        let sample = |field: usize| self.samples[field][at[field]];
        let protocol = match (sample(PROTOCOL) as u8, self.family) {
            (1, Family::V6) => 58,
            // GRE stands for the protocols that no rule can name.
            (0, _) => 47,
            (protocol, _) => protocol,
        };
        let port = |field: usize| if self.ports { sample(field) as u16 } else { 0 };
        Packet {
            source: self.family.address(sample(SOURCE)),
            destination: self.family.address(sample(DESTINATION)),
            source_port: port(SOURCE_PORT),
            destination_port: port(DESTINATION_PORT),
            protocol,
        }
    }
}

enum Found {
    Covered,
    /// A class of each field.
    Left([usize; 5]),
    Undecided,
}

struct Search {
    used: Vec<usize>,
    steps: u64,
}

impl Search {
    /// Pieces that are left are put on a list, not on the stack: a group may have thousands of rules.
    fn covered(&mut self, world: &World, piece: Cuboid, by: &[usize]) -> Found {
        let mut pieces: Vec<(Cuboid, Rc<[usize]>)> = vec![(piece, by.into())];
        while let Some((piece, by)) = pieces.pop() {
            let Some((piece, near)) = self.cut(world, piece, &by) else { continue };
            if self.steps == 0 {
                return Found::Undecided;
            }
            if let Some(at) = beyond(world, &piece, &near) {
                return Found::Left(at);
            }
            if let Err(found) = self.divide(world, piece, near, &mut pieces) {
                return found;
            }
        }
        Found::Covered
    }

    /// Takes away every box that has all of the piece but for one field: what is left is one piece still. `None` if
    /// nothing is; else that, and the boxes that meet it.
    fn cut(&mut self, world: &World, mut piece: Cuboid, by: &[usize]) -> Option<(Cuboid, Vec<usize>)> {
        let mut near = by.to_vec();
        loop {
            self.steps = self.steps.saturating_sub(near.len() as u64 + 1);
            let before = near.len();
            let mut cut = false;
            let mut covered = false;
            near.retain(|&region| {
                let Some(other) = world.cells[region].as_ref().filter(|_| !covered) else { return false };
                if !piece.iter().zip(other).all(|(a, b)| meets(a, b)) {
                    return false;
                }
                let mut open = (0..5).filter(|&field| !inside(&piece[field], &other[field]));
                match (open.next(), open.next()) {
                    (None, _) => covered = true,
                    (Some(field), None) => {
                        for (word, with) in piece[field].iter_mut().zip(&other[field]) {
                            *word &= !with;
                        }
                        cut = true;
                    }
                    (Some(_), Some(_)) => return true,
                }
                self.used.push(region);
                false
            });
            if covered {
                return None;
            }
            // Another may now have all but one field, or meet it no more.
            if !cut || near.is_empty() || near.len() == before {
                return Some((piece, near));
            }
        }
    }

    /// Takes away one box and lists the pieces that it leaves.
    fn divide(
        &mut self,
        world: &World,
        mut piece: Cuboid,
        mut near: Vec<usize>,
        pieces: &mut Vec<(Cuboid, Rc<[usize]>)>,
    ) -> Result<(), Found> {
        // The one that leaves the fewest pieces, and of those the one that takes the most away.
        let cost = |region: &usize| {
            let (mut open, mut kept) = (0u32, 0.0f64);
            for (mine, other) in piece.iter().zip(world.cells[*region].iter().flatten()) {
                if !inside(mine, other) {
                    open += 1;
                    let total: u32 = mine.iter().map(|word| word.count_ones()).sum();
                    let both: u32 = mine.iter().zip(other).map(|(a, b)| (a & b).count_ones()).sum();
                    kept += (f64::from(total) / f64::from(both.max(1))).ln();
                }
            }
            (open, (kept * 1e6) as u64)
        };
        let take = near.iter().copied().min_by_key(cost);
        // `beyond` finds something where there is none, and none without packets is near.
        let (Some(take), Some(other)) = (take, take.and_then(|take| world.cells[take].as_ref())) else {
            return Err(Found::Undecided);
        };
        near.retain(|&region| region != take);
        let near: Rc<[usize]> = near.into();
        self.used.push(take);
        for field in 0..5 {
            let outside: Bits = piece[field].iter().zip(&other[field]).map(|(a, b)| a & !b).collect();
            if !is_empty(&outside) {
                let mut part = piece.clone();
                part[field] = outside;
                pieces.push((part, Rc::clone(&near)));
            }
            for (word, with) in piece[field].iter_mut().zip(&other[field]) {
                *word &= with;
            }
        }
        Ok(())
    }
}

/// A class of the piece that none of these boxes has: whatever the other fields are, that packet is left over.
fn beyond(world: &World, piece: &Cuboid, near: &[usize]) -> Option<[usize; 5]> {
    for field in 0..5 {
        let mut left = piece[field].clone();
        for other in near.iter().filter_map(|&region| world.cells[region].as_ref()) {
            for (word, with) in left.iter_mut().zip(&other[field]) {
                *word &= !with;
            }
            if is_empty(&left) {
                break;
            }
        }
        if let Some(class) = first(&left) {
            // A piece is never empty.
            let mut at = [0, 1, 2, 3, 4].map(|field| first(&piece[field]).unwrap_or(0));
            at[field] = class;
            return Some(at);
        }
    }
    None
}

fn is_empty(bits: &[u64]) -> bool {
    bits.iter().all(|word| *word == 0)
}

fn meets(a: &[u64], b: &[u64]) -> bool {
    a.iter().zip(b).any(|(a, b)| a & b != 0)
}

fn inside(a: &[u64], b: &[u64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a & !b == 0)
}

fn first(bits: &[u64]) -> Option<usize> {
    let word = bits.iter().position(|word| *word != 0)?;
    Some(word * 64 + bits[word].trailing_zeros() as usize)
}

/// The classes of a field: each set as a bitmap of them, and a point of each. Points in no set have no class.
///
/// Exact, not by hashes of sets: the key of a class is which of the distinct sets have it.
fn classes(sets: impl IntoIterator<Item = Vec<Range>>) -> (Vec<Bits>, Vec<u128>) {
    let mut distinct: Vec<Vec<Range>> = Vec::new();
    let which = numbered(sets, &mut distinct);
    // Where a set begins, and behind where it ends; the end of the last address has no number behind it and needs none.
    let mut events: Vec<(u128, usize)> = Vec::new();
    for (set, ranges) in distinct.iter().enumerate() {
        for &(first, last) in ranges {
            events.push((first, set));
            events.extend(last.checked_add(1).map(|behind| (behind, set)));
        }
    }
    events.sort_unstable();
    let mut now: Bits = vec![0; distinct.len().div_ceil(64)].into();
    let mut by_sets: HashMap<Bits, usize> = HashMap::new();
    let mut samples = Vec::new();
    for at in events.chunk_by(|a, b| a.0 == b.0) {
        for &(_, set) in at {
            now[set / 64] ^= 1 << (set % 64);
        }
        if !is_empty(&now) && !by_sets.contains_key(&now) {
            by_sets.insert(now.clone(), samples.len());
            samples.push(at[0].0);
        }
    }
    let empty: Bits = vec![0; samples.len().div_ceil(64)].into();
    let mut bitmaps = vec![empty; distinct.len()];
    for (sets, class) in by_sets {
        for (set, bitmap) in bitmaps.iter_mut().enumerate() {
            bitmap[class / 64] |= (sets[set / 64] >> (set % 64) & 1) << (class % 64);
        }
    }
    (which.into_iter().map(|set| bitmaps[set].clone()).collect(), samples)
}

/// The number of each value among the distinct ones.
fn numbered<T: Hash + Eq + Clone>(values: impl IntoIterator<Item = T>, distinct: &mut Vec<T>) -> Vec<usize> {
    let mut numbers: HashMap<T, usize> = HashMap::new();
    let number = |value: T| {
        let next = numbers.len();
        *numbers.entry(value).or_insert_with_key(|value| {
            distinct.push(value.clone());
            next
        })
    };
    values.into_iter().map(number).collect()
}

impl From<&Packet> for Region {
    /// The region of one packet.
    fn from(packet: &Packet) -> Self {
        Self {
            protocols: Protocols::of_number(packet.protocol),
            source: AddressSet::single(packet.source),
            source_ports: vec![(packet.source_port, packet.source_port)],
            destination: AddressSet::single(packet.destination),
            destination_ports: vec![(packet.destination_port, packet.destination_port)],
        }
    }
}
