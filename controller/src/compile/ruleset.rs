//! One ruleset: for each field the rows of bits and which row each global class has.

use std::collections::HashMap;

use portcullis_common::policy::{DESTINATION, DESTINATION_PORT, PROTOCOL_CLASSES, SOURCE, SOURCE_PORT};

use super::addresses::AddressClasses;
use super::contexts::Meaning;
use super::port_classes::{ANY_PORT, PortClasses, PortLists};
use super::sides::Prepared;
use crate::policy::network::RuleProtocol;

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
    rows: RowIndex,
}

/// Compiles one ruleset.
pub(super) fn compile(
    rules: &[Prepared],
    meaning: &Meaning,
    classes: &Classes<'_>,
    scratch: &mut Scratch,
) -> Result<CompiledRuleset, TooManyRows> {
    let width = rules.len().div_ceil(64);
    let mut fields: [Field; 5] = Default::default();
    for field in [SOURCE, DESTINATION] {
        fields[field] = address_field(rules, meaning, field, width, classes.addresses, scratch)?;
    }
    for field in [SOURCE_PORT, DESTINATION_PORT] {
        fields[field] = port_field(rules, field - SOURCE_PORT, width, classes, &mut scratch.rows)?;
    }
    fields[4].rows = protocol_rows(rules, width);
    for field in &mut fields {
        field.rows_hash = hash(field.rows.iter().copied(), width as u64);
        let words = field.locals.chunks(4).map(|c| c.iter().fold(0, |word, &l| word << 16 | u64::from(l)));
        field.locals_hash = hash(words, field.locals.len() as u64);
    }
    Ok(CompiledRuleset { width, fields })
}

/// Finds rows by their hash: open addressing, numbers plus one, at most half full.
#[derive(Default)]
struct RowIndex(Vec<u32>);

/// Rows of one field, numbered as they come; equal rows have one number.
struct Rows<'a> {
    width: usize,
    rows: Vec<u64>,
    count: usize,
    index: &'a mut RowIndex,
}

impl<'a> Rows<'a> {
    fn new(width: usize, index: &'a mut RowIndex) -> Self {
        index.0.clear();
        index.0.resize(256, 0);
        Self { width, rows: Vec::new(), count: 0, index }
    }

    fn row(&self, number: usize) -> &[u64] {
        &self.rows[number * self.width..][..self.width]
    }

    /// Where in the index a row is, or would be.
    fn slot(&self, row: &[u64]) -> usize {
        let mask = self.index.0.len() - 1;
        let mut slot = hash(row.iter().copied(), 0) as usize & mask;
        loop {
            match self.index.0[slot] {
                0 => return slot,
                known if self.row(known as usize - 1) == row => return slot,
                _ => slot = (slot + 1) & mask,
            }
        }
    }

    fn intern(&mut self, row: &[u64]) -> Result<u16, TooManyRows> {
        let slot = self.slot(row);
        if let Some(known) = self.index.0[slot].checked_sub(1) {
            return Ok(known as u16);
        }
        let number = u16::try_from(self.count).map_err(|_| TooManyRows)?;
        self.count += 1;
        self.rows.extend_from_slice(row);
        self.index.0[slot] = self.count as u32;
        if self.count * 2 > self.index.0.len() {
            let slots = self.index.0.len() * 2;
            self.index.0.clear();
            self.index.0.resize(slots, 0);
            for known in 0..self.count {
                let slot = self.slot(self.row(known));
                self.index.0[slot] = known as u32 + 1;
            }
        }
        Ok(number)
    }
}

/// Splits the global classes by the lists this ruleset names: one pass for each list moves the classes it covers
/// from the part they are in to that part's successor. What is left together no rule tells apart.
fn address_field(
    rules: &[Prepared],
    meaning: &Meaning,
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
        if rule.is_any(side) {
            any[word] |= bit;
        }
        for list in rule.lists(side, meaning) {
            let pass = *pass_of.entry(list).or_insert_with(|| {
                passes.push(list);
                masks.resize(masks.len() + width, 0);
                passes.len() - 1
            });
            masks[pass * width + word] |= bit;
        }
    }

    let Scratch { part, moved, split, rows: index } = scratch;
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
    let mut rows = Rows::new(width, index);
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
    rules: &[Prepared],
    which: usize,
    width: usize,
    classes: &Classes<'_>,
    index: &mut RowIndex,
) -> Result<Field, TooManyRows> {
    let mut row = vec![0u64; width];
    let mut masks: Vec<u64> = Vec::new();
    let mut mask_of: HashMap<u32, usize> = HashMap::new();
    // (port, mask that changes there)
    let mut changes: Vec<(u32, usize)> = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let (word, bit) = (i / 64, 1 << (i % 64));
        let list = rule.ports()[which];
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

    let mut rows = Rows::new(width, index);
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

fn protocol_rows(rules: &[Prepared], width: usize) -> Vec<u64> {
    let mut rows = vec![0u64; width * PROTOCOL_CLASSES as usize];
    for (i, rule) in rules.iter().enumerate() {
        let classes = match rule.protocol() {
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
