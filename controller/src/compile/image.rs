//! Lays the tables of a generation out as pages ([`portcullis_common::policy`]).
//!
//! Most of an image is rows and class numbers of rulesets. Two things keep it small:
//!
//! * Equal blocks are stored once: the same group in two virtual networks, or every group that names no source port.
//! * A row is 4,096 bits wide, most groups have some dozens of rules. So rulesets share rows, each with words of its
//!   own: [`Ruleset`]'s bits begin at its *first word*, and `rule_base` is less by that many bits, so that `rule_base`
//!   plus the bit is the rule's entry all the same. What keeps a look-up inside its own words are the protocol's
//!   rows, which are never shared: their summaries have no bit for anybody else's words, and the datapath visits only
//!   words that all five summaries have. (Measured with 200 groups of 1,000 rules: a fifth of the memory.)

use std::collections::HashMap;

use portcullis_common::policy::{
    ADDRESS_UNITS, Endpoint, Frontend, Header, Listener, PAGE_BYTES, PROTOCOL, PROTOCOL_CLASSES, Page,
    Ruleset, Segment,
};

use super::ruleset::CompiledRuleset;

/// The tables outgrow the 32-bit numbers that rulesets refer to them with.
#[derive(Debug)]
pub(super) struct TooLarge;

/// A block of rows as it lies in the image.
#[derive(Clone, Copy)]
struct RowBlock {
    base: u32,
    count: usize,
    first_word: usize,
    width: usize,
}

/// An image under construction: the header's page and the rows are in place from the start, as they are the bulk and
/// should not be copied; the other tables follow at the end.
pub(super) struct Image {
    pages: Vec<Page>,
    /// Rows and class numbers of rulesets larger than this are not kept.
    limit: usize,
    /// The limit is passed: everything is only counted, and taken for equal if its hash is.
    counting: bool,
    summaries: Vec<u64>,
    /// For each of a row's words the first row in which it is free.
    height: [u32; WORDS],
    locals: Vec<u16>,
    /// How many there are, kept or not.
    locals_count: usize,
    rules: Vec<u32>,
    rulesets: Vec<Ruleset>,
    /// Rows of the protocol field, which go behind all others; until then rulesets have the block's number.
    protocols: Vec<(usize, Vec<u64>)>,
    row_blocks: HashMap<u64, Vec<RowBlock>>,
    /// First class number and how many.
    local_blocks: HashMap<u64, Vec<(u32, usize)>>,
}

/// The pages of a generation.
pub(super) struct Finished {
    /// Only the header's if they passed the limit.
    pub pages: Vec<Page>,
    /// How large they are, or would be.
    pub bytes: usize,
}

/// Words of a row.
const WORDS: usize = PAGE_BYTES / 8;

/// The tables that are not made of rulesets.
pub(super) struct Records<'a> {
    pub ports: &'a [u16],
    pub endpoints: &'a [Endpoint],
    pub units: &'a [u32],
    pub segments: &'a [Segment],
    pub frontends: &'a [Frontend],
    /// Two times [`ADDRESS_UNITS`] for each frontend.
    pub owners: &'a [u16],
    pub listeners: &'a [Listener],
    pub slots: &'a [u16],
    /// [`Header::flow_quota`].
    pub flow_quota: [u32; 2],
}

/// The rows begin behind the header.
const ROWS: u32 = 1;

impl Image {
    /// An image for this many rulesets, to be added from the widest to the narrowest: that packs best. It keeps
    /// `limit` bytes of them, about.
    pub fn new(rulesets: usize, limit: usize) -> Self {
        Self {
            pages: vec![Page::default(); ROWS as usize],
            limit,
            counting: false,
            summaries: Vec::new(),
            height: [0; WORDS],
            locals: Vec::new(),
            locals_count: 0,
            // So that no ruleset's `rule_base` is below zero, wherever in the row it begins.
            rules: vec![0; WORDS * 64],
            // Number 0 is "no group".
            rulesets: vec![Ruleset::default(); rulesets + 1],
            protocols: Vec::new(),
            row_blocks: HashMap::new(),
            local_blocks: HashMap::new(),
        }
    }

    /// Adds entries of the `rules` table; answers where they begin.
    pub fn rules(&mut self, entries: impl IntoIterator<Item = u32>) -> u32 {
        let base = self.rules.len() as u32;
        self.rules.extend(entries);
        base
    }

    /// Puts a ruleset at its number; its rules' entries begin at `entries`. Answers the bit of its first rule.
    pub fn ruleset(
        &mut self,
        number: u32,
        compiled: &CompiledRuleset,
        entries: u32,
        rules: u32,
        platform: [u32; 3],
    ) -> Result<u32, TooLarge> {
        if !self.counting && self.summaries.len() * PAGE_BYTES + self.locals_count * 2 > self.limit {
            self.counting = true;
            self.pages = vec![Page::default(); ROWS as usize];
            self.locals = Vec::new();
        }
        let first_word = self.choose_words(compiled);
        let first_bit = first_word as u32 * 64;
        let rule_base = entries - first_bit;
        let mut ruleset = Ruleset { rule_base, rules, platform, ..Ruleset::default() };
        for (i, field) in compiled.fields[..PROTOCOL].iter().enumerate() {
            ruleset.row_base[i] = self.rows(&field.rows, field.rows_hash, first_word, compiled.width)?;
            ruleset.local_base[i] = self.locals(&field.locals, field.locals_hash)?;
        }
        let protocol = (first_word, &compiled.fields[PROTOCOL].rows);
        let known = self.protocols.iter().rposition(|(word, rows)| (*word, rows) == protocol);
        ruleset.row_base[PROTOCOL] = known.unwrap_or(self.protocols.len()) as u32;
        if known.is_none() {
            self.protocols.push((first_word, protocol.1.clone()));
        }
        self.rulesets[number as usize] = ruleset;
        Ok(first_bit)
    }

    /// Where in the row a ruleset's words go: where its largest block is already, else where there is most room.
    fn choose_words(&self, compiled: &CompiledRuleset) -> usize {
        let largest = compiled.fields[..PROTOCOL].iter().max_by_key(|field| field.rows.len());
        if let Some(block) = largest.and_then(|f| self.known(&f.rows, f.rows_hash, None, compiled.width)) {
            return block.first_word;
        }
        // Aligned to a power of two, so that narrower ones fill what wider ones leave.
        let width = compiled.width.next_power_of_two();
        let top = |first: &usize| self.height[*first..first + width].iter().max().copied();
        (0..WORDS).step_by(width).min_by_key(top).unwrap_or(0)
    }

    /// Equal rows that are in the image already.
    fn known(&self, rows: &[u64], hash: u64, first_word: Option<usize>, width: usize) -> Option<&RowBlock> {
        self.row_blocks.get(&hash)?.iter().find(|block| {
            let words = block.first_word..block.first_word + width;
            block.width == width
                && block.count == rows.len() / width
                && first_word.is_none_or(|first| first == block.first_word)
                && (self.counting
                    || self.pages[(ROWS + block.base) as usize..]
                        .iter()
                        .zip(rows.chunks(width))
                        .all(|(page, row)| &page.words[words.clone()] == row))
        })
    }

    fn rows(&mut self, rows: &[u64], hash: u64, first_word: usize, width: usize) -> Result<u32, TooLarge> {
        if let Some(block) = self.known(rows, hash, Some(first_word), width) {
            return Ok(block.base);
        }
        let count = rows.len() / width;
        let words = first_word..first_word + width;
        let base = self.height[words.clone()].iter().max().copied().unwrap_or(0);
        let end =
            (base as usize).checked_add(count).and_then(|end| u32::try_from(end).ok()).ok_or(TooLarge)?;
        self.height[words.clone()].fill(end);
        if self.summaries.len() < end as usize {
            self.summaries.resize(end as usize, 0);
            if !self.counting {
                self.pages.resize((ROWS + end) as usize, Page::default());
            }
        }
        for (number, row) in (base..).zip(rows.chunks(width)).filter(|_| !self.counting) {
            self.pages[(ROWS + number) as usize].words[words.clone()].copy_from_slice(row);
            self.summaries[number as usize] |= summary(row, first_word);
        }
        self.row_blocks.entry(hash).or_default().push(RowBlock { base, count, first_word, width });
        Ok(base)
    }

    /// Appends the rows of the protocol field and points the rulesets at them.
    fn protocols(&mut self) -> Result<(), TooLarge> {
        let base = self.summaries.len() as u32;
        for (first_word, rows) in std::mem::take(&mut self.protocols) {
            let width = rows.len() / PROTOCOL_CLASSES as usize;
            for row in rows.chunks(width) {
                let mut page = Page::default();
                page.words[first_word..first_word + width].copy_from_slice(row);
                self.pages.push(page);
                self.summaries.push(summary(row, first_word));
            }
        }
        u32::try_from(self.summaries.len()).map_err(|_| TooLarge)?;
        for ruleset in self.rulesets.iter_mut().skip(1) {
            ruleset.row_base[PROTOCOL] = base + ruleset.row_base[PROTOCOL] * PROTOCOL_CLASSES;
        }
        Ok(())
    }

    fn locals(&mut self, locals: &[u16], hash: u64) -> Result<u32, TooLarge> {
        let known = self.local_blocks.entry(hash).or_default();
        let equal = |&&(base, count): &&(u32, usize)| {
            count == locals.len() && (self.counting || &self.locals[base as usize..][..count] == locals)
        };
        if let Some(&(base, _)) = known.iter().find(equal) {
            return Ok(base);
        }
        let base = self.locals_count as u32;
        self.locals_count += locals.len();
        u32::try_from(self.locals_count).map_err(|_| TooLarge)?;
        known.push((base, locals.len()));
        if !self.counting {
            self.locals.extend_from_slice(locals);
        }
        Ok(base)
    }

    /// The finished pages.
    pub fn finish(mut self, generation: u32, records: &Records<'_>) -> Result<Finished, TooLarge> {
        debug_assert_eq!(records.owners.len(), records.frontends.len() * 2 * ADDRESS_UNITS as usize);
        let missing =
            if self.counting { self.summaries.len() * PAGE_BYTES + self.locals_count * 2 } else { 0 };
        self.protocols()?;
        let mut header = Header {
            generation,
            rows: ROWS,
            endpoints_used: records.endpoints.len() as u32,
            frontends_used: records.frontends.len() as u32,
            listeners_used: records.listeners.len() as u32,
            flow_quota: records.flow_quota,
            ..Header::default()
        };
        let (summaries, locals) = (std::mem::take(&mut self.summaries), std::mem::take(&mut self.locals));
        let (rules, rulesets) = (std::mem::take(&mut self.rules), std::mem::take(&mut self.rulesets));
        self.pages.reserve_exact(summaries.len() / 64 + locals.len() / 256 + rules.len() / 128 + 1024);
        header.summaries = self.table(summaries.into_iter())?;
        header.locals = self.table(words_of_u16(&locals))?;
        header.rules = self.table(words_of_u32(&rules))?;
        header.rulesets = self.table(rulesets.iter().flat_map(|r| ruleset_words(*r)))?;
        header.ports = self.table(words_of_u16(records.ports))?;
        header.endpoints = self.table(records.endpoints.iter().flat_map(|e| endpoint_words(*e)))?;
        header.units = self.table(words_of_u32(records.units))?;
        header.segments = self.table(records.segments.iter().map(|s| segment_word(*s)))?;
        header.frontends = self.table(records.frontends.iter().flat_map(|f| frontend_words(*f)))?;
        header.owners = self.table(words_of_u16(records.owners))?;
        header.listeners = self.table(records.listeners.iter().flat_map(|l| listener_words(*l)))?;
        header.slots = self.table(words_of_u16(records.slots))?;
        header.pages = u32::try_from(self.pages.len()).map_err(|_| TooLarge)?;
        self.pages[0].words[..HEADER_WORDS].copy_from_slice(&header_words(header));
        let bytes = size_of_val(&*self.pages) + missing;
        Ok(Finished { pages: self.pages, bytes })
    }

    /// Appends a table from the next page on and answers which page that is. Never empty: a look-up past the end of
    /// the last table should find zeros, not the end of the map.
    fn table(&mut self, mut words: impl Iterator<Item = u64>) -> Result<u32, TooLarge> {
        let base = u32::try_from(self.pages.len()).map_err(|_| TooLarge)?;
        let mut word = words.next();
        loop {
            let mut page = Page::default();
            for to in &mut page.words {
                let Some(value) = word else { break };
                *to = value;
                word = words.next();
            }
            self.pages.push(page);
            if word.is_none() {
                return Ok(base);
            }
        }
    }
}

/// The bits of the words that are not zero.
fn summary(row: &[u64], first_word: usize) -> u64 {
    row.iter().zip(first_word..).fold(0, |summary, (&bits, word)| summary | u64::from(bits != 0) << word)
}

/// Packs as an array of `u16` lies in memory.
fn words_of_u16(values: &[u16]) -> impl Iterator<Item = u64> {
    let pack = |chunk: &[u16]| {
        let mut bytes = [0; 8];
        for (to, value) in bytes.chunks_exact_mut(2).zip(chunk) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        u64::from_ne_bytes(bytes)
    };
    values.chunks(4).map(pack)
}

/// Packs as an array of `u32` lies in memory.
fn words_of_u32(values: &[u32]) -> impl Iterator<Item = u64> {
    let pack = |chunk: &[u32]| {
        let mut bytes = [0; 8];
        for (to, value) in bytes.chunks_exact_mut(4).zip(chunk) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        u64::from_ne_bytes(bytes)
    };
    values.chunks(2).map(pack)
}

const HEADER_WORDS: usize = size_of::<Header>() / 8;

fn header_words(header: Header) -> [u64; HEADER_WORDS] {
    // SAFETY: `Header` is `repr(C)`, twenty `u32` without padding; any bits are valid words.
    unsafe { std::mem::transmute::<Header, [u64; HEADER_WORDS]>(header) }
}

fn endpoint_words(endpoint: Endpoint) -> [u64; 16] {
    // SAFETY: `Endpoint` is `repr(C)`, 128 bytes of integers with its padding spelt out.
    unsafe { std::mem::transmute::<Endpoint, [u64; 16]>(endpoint) }
}

fn segment_word(segment: Segment) -> u64 {
    // SAFETY: `Segment` is `repr(C)`, two `u32` without padding.
    unsafe { std::mem::transmute::<Segment, u64>(segment) }
}

fn listener_words(listener: Listener) -> [u64; 2] {
    // SAFETY: `Listener` is `repr(C)`, 16 bytes of integers with its padding spelt out.
    unsafe { std::mem::transmute::<Listener, [u64; 2]>(listener) }
}

fn ruleset_words(ruleset: Ruleset) -> [u64; 8] {
    // SAFETY: `Ruleset` is `repr(C)`, sixteen `u32` without padding.
    unsafe { std::mem::transmute::<Ruleset, [u64; 8]>(ruleset) }
}

fn frontend_words(frontend: Frontend) -> [u64; 4] {
    // SAFETY: `Frontend` is `repr(C)`, eight `u32` without padding.
    unsafe { std::mem::transmute::<Frontend, [u64; 4]>(frontend) }
}
