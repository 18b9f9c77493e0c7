//! ClassBench filter sets and traces (`shared/data/README.md`) as security rules, and a linear search over them. The
//! controller's tests include this file too.
//!
//! How a filter becomes a rule, on both sides of every comparison:
//!
//! * Filters are asked in the order of the file: priorities from 100 on. Whether one allows is drawn from its number, so
//!   that a wrong match shows half the time even where only verdicts can be seen.
//! * Protocols are TCP, UDP, ICMP, ESP, AH or any. Another number (fw1 has GRE, 0x2f) cannot be said in a security rule
//!   and becomes any.
//! * ICMP, ESP and AH have no ports: what a filter says of ports there is ignored, and a header of any protocol but TCP
//!   and UDP has port 0 on both sides.
//! * The column of TCP flags is ignored; security rules do not look at flags.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, bail};
use ipnet::{IpNet, Ipv4Net};
use portcullis::policy::network::{Access, AddressMatch, Direction, RuleProtocol, SecurityRule};

/// Filters that fit into one group and direction beside its default rules.
pub const MOST: usize = 3997;

/// A filter as far as it can be a security rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    pub source: Ipv4Net,
    pub destination: Ipv4Net,
    /// Inclusive.
    pub source_ports: (u16, u16),
    pub destination_ports: (u16, u16),
    /// `None`: any.
    pub protocol: Option<u8>,
}

/// What a packet is classified by. Ports are 0 but for TCP and UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub source_port: u16,
    pub destination_port: u16,
    pub protocol: u8,
}

impl Header {
    fn new(source: u32, destination: u32, ports: (u16, u16), protocol: u8) -> Self {
        let ports = if has_ports(protocol) { ports } else { (0, 0) };
        Self {
            source: source.into(),
            destination: destination.into(),
            source_port: ports.0,
            destination_port: ports.1,
            protocol,
        }
    }
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17)
}

/// Reads a filter set: `@src/len  dst/len  low : high  low : high  proto/mask  flags/mask`.
pub fn filters(text: &str) -> anyhow::Result<Vec<Filter>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(i, line)| filter(line).with_context(|| format!("line {}: {line}", i + 1))).collect()
}

fn filter(line: &str) -> anyhow::Result<Filter> {
    let words: Vec<&str> = line.trim_start_matches('@').split_whitespace().collect();
    let [source, destination, s_low, ":", s_high, d_low, ":", d_high, protocol, ..] = words[..] else {
        bail!("not a filter");
    };
    let protocol = match protocol.split_once('/') {
        Some((_, "0x00")) => None,
        Some((number, "0xFF")) => Some(u8::from_str_radix(number.trim_start_matches("0x"), 16)?),
        _ => bail!("protocol {protocol}"),
    };
    Ok(Filter {
        source: source.parse::<Ipv4Net>()?.trunc(),
        destination: destination.parse::<Ipv4Net>()?.trunc(),
        source_ports: (s_low.parse()?, s_high.parse()?),
        destination_ports: (d_low.parse()?, d_high.parse()?),
        protocol: protocol.filter(|number| rule_protocol(*number).is_some()),
    })
}

/// Reads a trace: `src dst sport dport proto flags filter`, all decimal. The last two columns are passed over.
pub fn trace(text: &str) -> anyhow::Result<Vec<Header>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(i, line)| header(line).with_context(|| format!("line {}: {line}", i + 1))).collect()
}

fn header(line: &str) -> anyhow::Result<Header> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [source, destination, source_port, destination_port, protocol, ..] = words[..] else {
        bail!("not a header");
    };
    let ports = (source_port.parse()?, destination_port.parse()?);
    Ok(Header::new(source.parse()?, destination.parse()?, ports, protocol.parse()?))
}

fn rule_protocol(number: u8) -> Option<RuleProtocol> {
    match number {
        1 => Some(RuleProtocol::Icmp),
        6 => Some(RuleProtocol::Tcp),
        17 => Some(RuleProtocol::Udp),
        50 => Some(RuleProtocol::Esp),
        51 => Some(RuleProtocol::Ah),
        _ => None,
    }
}

/// Does the rule of this filter allow?
pub fn allows(filter: usize) -> bool {
    (filter as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1
}

/// The first [`MOST`] filters as the rules of one group in one direction; filter `n` is rule `f<n>`.
pub fn rules(filters: &[Filter], direction: Direction) -> Vec<SecurityRule> {
    let rule = |(number, filter): (usize, &Filter)| SecurityRule {
        name: format!("f{number}"),
        description: String::new(),
        priority: 100 + number as u16,
        direction,
        access: if allows(number) { Access::Allow } else { Access::Deny },
        protocol: filter.protocol.and_then(rule_protocol).unwrap_or(RuleProtocol::Any),
        source: vec![AddressMatch::Prefix(IpNet::V4(filter.source))],
        destination: vec![AddressMatch::Prefix(IpNet::V4(filter.destination))],
        source_ports: vec![filter.source_ports],
        destination_ports: vec![filter.destination_ports],
    };
    filters.iter().take(MOST).enumerate().map(rule).collect()
}

/// The first of the first [`MOST`] filters that matches, by looking at one after the other.
pub fn first_match(filters: &[Filter], header: &Header) -> Option<usize> {
    filters.iter().take(MOST).position(|filter| {
        let within = |(low, high): (u16, u16), port: u16| low <= port && port <= high;
        let ports = within(filter.source_ports, header.source_port)
            && within(filter.destination_ports, header.destination_port);
        filter.source.contains(&header.source)
            && filter.destination.contains(&header.destination)
            && match filter.protocol {
                Some(protocol) => protocol == header.protocol && (ports || !has_ports(protocol)),
                None => ports,
            }
    })
}

/// Headers at the ends of the filters' prefixes and ranges and one beside them; `random` answers a number below its
/// argument.
pub fn corner_headers(
    filters: &[Filter],
    count: usize,
    mut random: impl FnMut(usize) -> usize,
) -> Vec<Header> {
    let filters = &filters[..filters.len().min(MOST)];
    let mut headers = Vec::with_capacity(count);
    while headers.len() < count && !filters.is_empty() {
        // Now and then the fields are from different filters.
        let mixed = random(4) == 0;
        let base = random(filters.len());
        let mut pick = || filters[if mixed && random(2) == 0 { random(filters.len()) } else { base }];
        let of = [pick(), pick(), pick(), pick(), pick()];
        let mut corner = |low: u32, high: u32| match random(12) {
            0..=4 => low,
            5..=9 => high,
            10 => low.wrapping_sub(1),
            _ => high.wrapping_add(1),
        };
        let mut address = |net: Ipv4Net| corner(net.network().into(), net.broadcast().into());
        let (source, destination) = (address(of[0].source), address(of[1].destination));
        let mut port = |(low, high): (u16, u16)| corner(low.into(), high.into()) as u16;
        let ports = (port(of[2].source_ports), port(of[3].destination_ports));
        let protocol = match of[4].protocol {
            Some(protocol) if random(10) > 0 => protocol,
            _ => [1, 6, 6, 6, 17, 17, 47, 50, 51, 255][random(10)],
        };
        headers.push(Header::new(source, destination, ports, protocol));
    }
    headers
}

/// The header's addresses for a classifier of both families.
pub fn addresses(header: &Header) -> (IpAddr, IpAddr) {
    (header.source.into(), header.destination.into())
}
