//! One ruleset: for each field the rows of bits and which row each global class has.

use std::collections::HashMap;

use portcullis_common::policy::{DESTINATION, DESTINATION_PORT, PROTOCOL_CLASSES, SOURCE, SOURCE_PORT};

use super::addresses::AddressClasses;
use super::port_classes::{ANY_PORT, PortClasses, PortLists};
use crate::policy::network::RuleProtocol;

/// A rule with its terms replaced by the numbers of lists.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub protocol: RuleProtocol,
    /// [`SOURCE`] and [`DESTINATION`].
    pub addresses: [Side; 2],
    /// [`SOURCE_PORT`] and [`DESTINATION_PORT`], minus 2.
    pub ports: [u32; 2],
}

/// A rule's source or destination.
#[derive(Debug, Clone)]
pub(super) enum Side {
    Any,
    /// Any of these lists; none at all for an application group of another virtual network.
    Lists(Vec<u32>),
}

/// What all rulesets share.
pub(super) struct Classes<'a> {
    pub addresses: &'a AddressClasses,
    pub ports: &'a PortClasses,
    pub port_lists: &'a PortLists,
}

/// One field of a ruleset.
#[derive(Default)]
pub(super) struct Field {
    /// Row of each global class; empty for the protocol.
    pub locals: Vec<u16>,
    /// Rows of [`CompiledRuleset::width`] words, one after the other.
    pub rows: Vec<u64>,
    /// Hashes of the two, to find equal ones in other rulesets.
    pub locals_hash: u64,
    pub rows_hash: u64,
}

/// A compiled ruleset, not yet in the image.
pub(super) struct CompiledRuleset {
    /// Words of a row: one bit a rule.
    pub width: usize,
    pub fields: [Field; 5],
}

/// More different rows in one field than a `u16` can number.
#[derive(Debug)]
pub(super) struct TooManyRows;

/// Memory that a thread uses again for one ruleset after the other.
#[derive(Default)]
pub(super) struct Scratch {
    /// Partition under construction: part of each global class.
    part: Vec<u32>,
    /// The pass that last moved a class.
    moved: Vec<u32>,
    /// For each part the pass in which it was last split, and into what.
    split: Vec<(u32, u32)>,
}

/// Compiles one ruleset.
pub(super) fn compile(
    rules: &[Rule],
    classes: &Classes<'_>,
    scratch: &mut Scratch,
) -> Result<CompiledRuleset, TooManyRows> {
    let width = rules.len().div_ceil(64);
    let mut fields: [Field; 5] = Default::default();
    for field in [SOURCE, DESTINATION] {
        fields[field] = address_field(rules, field, width, classes.addresses, scratch)?;
    }
    for field in [SOURCE_PORT, DESTINATION_PORT] {
        fields[field] = port_field(rules, field - SOURCE_PORT, width, classes)?;
    }
    fields[4].rows = protocol_rows(rules, width);
    for field in &mut fields {
        field.rows_hash = hash(field.rows.iter().copied(), width as u64);
        let words = field.locals.chunks(4).map(|c| c.iter().fold(0, |word, &l| word << 16 | u64::from(l)));
        field.locals_hash = hash(words, field.locals.len() as u64);
    }
    Ok(CompiledRuleset { width, fields })
}

/// Rows of one field, numbered as they come; equal rows have one number.
struct Rows {
    width: usize,
    rows: Vec<u64>,
    by_hash: HashMap<u64, Vec<u16>>,
}

impl Rows {
    fn new(width: usize) -> Self {
        Self { width, rows: Vec::new(), by_hash: HashMap::new() }
    }

    fn intern(&mut self, row: &[u64]) -> Result<u16, TooManyRows> {
        let number = self.rows.len() / self.width;
        let candidates = self.by_hash.entry(hash(row.iter().copied(), 0)).or_default();
        for &known in &*candidates {
            let at = usize::from(known) * self.width;
            if &self.rows[at..at + self.width] == row {
                return Ok(known);
            }
        }
        if number > usize::from(u16::MAX) {
            return Err(TooManyRows);
        }
        candidates.push(number as u16);
        self.rows.extend_from_slice(row);
        Ok(number as u16)
    }
}

/// Splits the global classes by the lists this ruleset names: one pass for each list moves the classes it covers
/// from the part they are in to that part's successor. What is left together no rule tells apart.
fn address_field(
    rules: &[Rule],
    side: usize,
    width: usize,
    classes: &AddressClasses,
    scratch: &mut Scratch,
) -> Result<Field, TooManyRows> {
    let mut any = vec![0u64; width];
    let mut passes: Vec<u32> = Vec::new();
    let mut masks: Vec<u64> = Vec::new();
    let mut pass_of: HashMap<u32, usize> = HashMap::new();
    for (i, rule) in rules.iter().enumerate() {
        let (word, bit) = (i / 64, 1 << (i % 64));
        match &rule.addresses[side] {
            Side::Any => any[word] |= bit,
            Side::Lists(lists) => {
                for &list in lists {
                    let pass = *pass_of.entry(list).or_insert_with(|| {
                        passes.push(list);
                        masks.resize(masks.len() + width, 0);
                        passes.len() - 1
                    });
                    masks[pass * width + word] |= bit;
                }
            }
        }
    }

    let Scratch { part, moved, split } = scratch;
    part.clear();
    part.resize(classes.count, 0);
    moved.clear();
    moved.resize(classes.count, u32::MAX);
    split.clear();
    split.push((u32::MAX, 0));
    // (the part it was split from, by which pass)
    let mut origin: Vec<(u32, u32)> = vec![(0, u32::MAX)];
    for (pass, &list) in passes.iter().enumerate() {
        let pass = pass as u32;
        classes.covered(list, |class| {
            let class = class as usize;
            if moved[class] == pass {
                return;
            }
            moved[class] = pass;
            let from = part[class] as usize;
            if split[from].0 != pass {
                split[from] = (pass, origin.len() as u32);
                origin.push((from as u32, pass));
                split.push((u32::MAX, 0));
            }
            part[class] = split[from].1;
        });
    }

    // Rows only for parts that something is left in, numbered in the order of the classes: then equal partitions
    // give equal tables, which other rulesets can share.
    let mut rows = Rows::new(width);
    let mut number: Vec<Option<u16>> = vec![None; origin.len()];
    let mut row = vec![0u64; width];
    let mut locals = Vec::with_capacity(classes.count);
    for &part in &*part {
        let local = match number[part as usize] {
            Some(local) => local,
            None => {
                row.copy_from_slice(&any);
                let mut at = origin[part as usize];
                while at.1 != u32::MAX {
                    let mask = &masks[at.1 as usize * width..][..width];
                    row.iter_mut().zip(mask).for_each(|(r, m)| *r |= m);
                    at = origin[at.0 as usize];
                }
                *number[part as usize].insert(rows.intern(&row)?)
            }
        };
        locals.push(local);
    }
    Ok(Field { locals, rows: rows.rows, ..Field::default() })
}

/// Sweeps over the ports where a list of this ruleset begins or ends.
fn port_field(
    rules: &[Rule],
    which: usize,
    width: usize,
    classes: &Classes<'_>,
) -> Result<Field, TooManyRows> {
    let mut row = vec![0u64; width];
    let mut masks: Vec<u64> = Vec::new();
    let mut mask_of: HashMap<u32, usize> = HashMap::new();
    // (port, mask that changes there)
    let mut changes: Vec<(u32, usize)> = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let (word, bit) = (i / 64, 1 << (i % 64));
        let list = rule.ports[which];
        if list == ANY_PORT {
            row[word] |= bit;
            continue;
        }
        let mask = *mask_of.entry(list).or_insert_with(|| {
            let mask = masks.len() / width;
            masks.resize(masks.len() + width, 0);
            for &(first, last) in &classes.port_lists.lists[list as usize] {
                changes.push((u32::from(first), mask));
                changes.push((u32::from(last) + 1, mask));
            }
            mask
        });
        masks[mask * width + word] |= bit;
    }
    changes.sort_unstable();

    let mut rows = Rows::new(width);
    let mut locals = Vec::with_capacity(classes.ports.lowest.len());
    let mut changes = changes.into_iter().peekable();
    let mut current = None;
    for &port in &classes.ports.lowest {
        while let Some((_, mask)) = changes.next_if(|&(at, _)| at <= u32::from(port)) {
            // A list's ranges are merged and a rule has one list, so a bit is on exactly inside.
            let mask = &masks[mask * width..][..width];
            row.iter_mut().zip(mask).for_each(|(r, m)| *r ^= m);
            current = None;
        }
        let local = match current {
            Some(local) => local,
            None => *current.insert(rows.intern(&row)?),
        };
        locals.push(local);
    }
    Ok(Field { locals, rows: rows.rows, ..Field::default() })
}

fn protocol_rows(rules: &[Rule], width: usize) -> Vec<u64> {
    let mut rows = vec![0u64; width * PROTOCOL_CLASSES as usize];
    for (i, rule) in rules.iter().enumerate() {
        let classes = match rule.protocol {
            RuleProtocol::Any => 0..6,
            RuleProtocol::Tcp => 0..1,
            RuleProtocol::Udp => 1..2,
            RuleProtocol::Icmp => 2..3,
            RuleProtocol::Esp => 3..4,
            RuleProtocol::Ah => 4..5,
        };
        for class in classes {
            rows[class * width + i / 64] |= 1 << (i % 64);
        }
    }
    rows
}

/// A hash that is fast on words. Equality is always checked where it matters.
pub(super) fn hash(words: impl Iterator<Item = u64>, seed: u64) -> u64 {
    words.fold(seed ^ 0x9e37_79b9_7f4a_7c15, |h, word| {
        let h = (h ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^ h >> 32
    })
}
