//! Reads an image back, the slow and obvious way: an independent check of what the compiler wrote, and what
//! `explain` shows of a classification.

use std::net::IpAddr;

use portcullis_common::layout::{WORLD, v4, v6};
use portcullis_common::policy::{
    AT_LISTENER, DESTINATION, DESTINATION_PORT, Endpoint, EndpointKey, EndpointKey6, Frontend, Header,
    Listener, PAGE_BYTES, PROTOCOL, Page, RULE_ALLOW, RULE_ID, Ruleset, SOURCE, SOURCE_PORT, Segment,
    UNIT_PORTS, owner_entry, protocol_class,
};

use aya::Pod;

use super::Compiled;

/// What rules look at. Ports in native order, 0 for packets without (ICMP, ESP, AH and others).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketKey {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    /// IANA protocol number.
    pub protocol: u8,
}

/// The rule of a ruleset that decides, as its position in priority order. `None` if none matches: a group's last default
/// rule matches everything, but rules before the groups and those of platform tags need not match.
pub fn classify(compiled: &Compiled, ruleset: u32, key: &PacketKey) -> Option<usize> {
    let image = Image { pages: &compiled.pages };
    let record = image.ruleset(ruleset);
    let rows = field_rows(compiled, &record, key);
    let mut words = rows.iter().fold(u64::MAX, |s, &row| s & image.summary(row));
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        let rules = rows.iter().fold(u64::MAX, |bits, &row| bits & image.row(row).words[word]);
        if rules != 0 {
            let bit = word * 64 + rules.trailing_zeros() as usize;
            return Some(bit - first_bit(compiled, ruleset));
        }
        words &= words - 1;
    }
    None
}

/// Which of the five fields (source, destination, source port, destination port, protocol) of one rule match.
pub fn matches(compiled: &Compiled, ruleset: u32, rule: usize, key: &PacketKey) -> [bool; 5] {
    let image = Image { pages: &compiled.pages };
    let rows = field_rows(compiled, &image.ruleset(ruleset), key);
    let bit = rule + first_bit(compiled, ruleset);
    rows.map(|row| image.row(row).words[bit / 64] >> (bit % 64) & 1 == 1)
}

/// The ruleset that says of a platform exemption (`EXEMPT_*`) what a group's rules for its tag do; 0 if none is for it.
pub fn platform_ruleset(compiled: &Compiled, ruleset: u32, exemption: u32) -> u32 {
    let record = Image { pages: &compiled.pages }.ruleset(ruleset);
    let index = (exemption as usize).checked_sub(1);
    index.and_then(|index| record.platform.get(index).copied()).unwrap_or(0)
}

/// Id and "is Allow" of a rule of a ruleset, by its position in priority order.
pub fn rule(compiled: &Compiled, ruleset: u32, rule: usize) -> (u32, bool) {
    let word = rule_word(compiled, ruleset, rule);
    (word & RULE_ID, word & RULE_ALLOW != 0)
}

/// The word of a rule as the datapath sees it: id, "is Allow" and [`portcullis_common::policy::rule_action`].
pub fn rule_word(compiled: &Compiled, ruleset: u32, rule: usize) -> u32 {
    let image = Image { pages: &compiled.pages };
    image.rule_entry(image.ruleset(ruleset).rule_base as usize + first_bit(compiled, ruleset) + rule)
}

/// The bit of a ruleset's first rule.
fn first_bit(compiled: &Compiled, ruleset: u32) -> usize {
    compiled.rulesets[ruleset as usize - 1].first_bit as usize
}

/// The row of each field.
fn field_rows(compiled: &Compiled, ruleset: &Ruleset, key: &PacketKey) -> [u32; 5] {
    let image = Image { pages: &compiled.pages };
    let mut rows = ruleset.row_base;
    for (field, class) in [
        (SOURCE, address_class(compiled, key.source)),
        (DESTINATION, address_class(compiled, key.destination)),
        (SOURCE_PORT, image.port_class(key.source_port)),
        (DESTINATION_PORT, image.port_class(key.destination_port)),
    ] {
        rows[field] += image.local(ruleset.local_base[field] + class);
    }
    rows[PROTOCOL] += protocol_class(key.protocol);
    rows
}

/// The global class of an address: the longest prefix that has it.
pub fn address_class(compiled: &Compiled, address: IpAddr) -> u32 {
    let found = match address {
        IpAddr::V4(address) => (0..=32u8).rev().find_map(|len| {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            let wanted = (len, (u32::from(address) & mask).to_be_bytes());
            let at = compiled.prefixes.binary_search_by_key(&wanted, |p| (p.0, p.1)).ok()?;
            Some(compiled.prefixes[at].2)
        }),
        IpAddr::V6(address) => (0..=128u8).rev().find_map(|len| {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            let wanted = (len, (u128::from(address) & mask).to_be_bytes());
            let at = compiled.prefixes6.binary_search_by_key(&wanted, |p| (p.0, p.1)).ok()?;
            Some(compiled.prefixes6[at].2)
        }),
    };
    found.unwrap_or(0)
}

/// What the spaces map says of an address under a routing id: `kind << 24 | argument`, 0 for outside.
pub fn space_value(compiled: &Compiled, routing: u16, address: IpAddr) -> u32 {
    let found = match address {
        IpAddr::V4(address) => (0..=32u8).rev().find_map(|len| {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            let wanted = (routing, len, (u32::from(address) & mask).to_be_bytes());
            let at = compiled.spaces.binary_search_by_key(&wanted, |s| (s.0, s.1, s.2)).ok()?;
            Some(compiled.spaces[at].3)
        }),
        IpAddr::V6(address) => (0..=128u8).rev().find_map(|len| {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            let wanted = (routing, len, (u128::from(address) & mask).to_be_bytes());
            let at = compiled.spaces6.binary_search_by_key(&wanted, |s| (s.0, s.1, s.2)).ok()?;
            Some(compiled.spaces6[at].3)
        }),
    };
    found.unwrap_or(0)
}

/// What the endpoints map says of an address: `kind << 24 | index`, 0 for nothing.
pub fn endpoint_value(compiled: &Compiled, network: u16, address: IpAddr) -> u32 {
    value_at(compiled, network, address, 0, 0)
}

/// The listener at a port (native order) of a public address.
pub fn listener_at(compiled: &Compiled, address: IpAddr, port: u16, protocol: u8) -> Option<u32> {
    let value = value_at(compiled, WORLD, address, port, protocol);
    (value >> 24 == AT_LISTENER).then_some(value & 0xff_ffff)
}

fn value_at(compiled: &Compiled, network: u16, address: IpAddr, port: u16, protocol: u8) -> u32 {
    let port = port.to_be();
    let found = match address {
        IpAddr::V4(_) => {
            let key = EndpointKey { address: v4(address), network, port, protocol, ..EndpointKey::default() };
            compiled.endpoints.iter().find(|(k, _)| *k == key).map(|&(_, value)| value)
        }
        IpAddr::V6(_) => {
            let key =
                EndpointKey6 { address: v6(address), network, port, protocol, ..EndpointKey6::default() };
            compiled.endpoints6.iter().find(|(k, _)| *k == key).map(|&(_, value)| value)
        }
    };
    found.unwrap_or(0)
}

/// The tables of an image.
pub struct Image<'a> {
    pub pages: &'a [Page],
}

impl Image<'_> {
    pub fn header(&self) -> Header {
        self.record(0, 0)
    }

    pub fn ruleset(&self, number: u32) -> Ruleset {
        self.record(self.header().rulesets, number)
    }

    pub fn endpoint(&self, number: u32) -> Endpoint {
        self.record(self.header().endpoints, number)
    }

    /// The units that an endpoint may claim ports of for one protocol (`ALLOC_*`), as (frontend, unit), in the order they
    /// are used.
    pub fn units(&self, endpoint: &Endpoint, which: usize) -> Vec<(u32, u32)> {
        let alloc = endpoint.alloc[which];
        let segments = alloc.first_segment..alloc.first_segment + u32::from(alloc.segments);
        segments
            .map(|number| self.segment(number))
            .flat_map(|segment| segment.first_unit..segment.first_unit + segment.units)
            .map(|i| self.u32(self.header().units, i as usize))
            .map(|u| (u >> 16, u & 0xffff))
            .collect()
    }

    pub fn segment(&self, number: u32) -> Segment {
        self.record(self.header().segments, number)
    }

    pub fn frontend(&self, number: u32) -> Frontend {
        self.record(self.header().frontends, number)
    }

    pub fn listener(&self, number: u32) -> Listener {
        self.record(self.header().listeners, number)
    }

    /// The endpoint behind a slot of a listener; `None`: no backend takes new flows.
    pub fn slot(&self, number: u32) -> Option<u32> {
        u32::from(self.u16(self.header().slots, number as usize)).checked_sub(1)
    }

    /// The endpoint that owns a port of a frontend for TCP or UDP.
    pub fn owner(&self, frontend: u32, udp: bool, port: u16) -> Option<u32> {
        let index = owner_entry(frontend, udp, u32::from(port) / UNIT_PORTS);
        u32::from(self.u16(self.header().owners, index as usize)).checked_sub(1)
    }

    /// A record of a table.
    fn record<T: Pod>(&self, table: u32, number: u32) -> T {
        let per_page = PAGE_BYTES / size_of::<T>();
        let page = &self.pages[table as usize + number as usize / per_page];
        // SAFETY: `T` is plain integers, valid for any bits, and its size divides the page's; pages are aligned to 8.
        unsafe { page.words.as_ptr().cast::<T>().add(number as usize % per_page).read() }
    }

    /// An entry of the rules table.
    fn rule_entry(&self, index: usize) -> u32 {
        self.u32(self.header().rules, index)
    }

    pub fn port_class(&self, port: u16) -> u32 {
        u32::from(self.u16(self.header().ports, usize::from(port)))
    }

    fn local(&self, index: u32) -> u32 {
        u32::from(self.u16(self.header().locals, index as usize))
    }

    fn summary(&self, row: u32) -> u64 {
        self.pages[(self.header().summaries + row / 64) as usize].words[row as usize % 64]
    }

    fn row(&self, row: u32) -> &Page {
        &self.pages[(self.header().rows + row) as usize]
    }

    fn u32(&self, table: u32, index: usize) -> u32 {
        let bytes = self.pages[table as usize + index / 128].words[index % 128 / 2].to_ne_bytes();
        let at = index % 2 * 4;
        u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    fn u16(&self, table: u32, index: usize) -> u16 {
        let bytes = self.pages[table as usize + index / 256].words[index % 256 / 4].to_ne_bytes();
        let at = index % 4 * 2;
        u16::from_ne_bytes([bytes[at], bytes[at + 1]])
    }
}
