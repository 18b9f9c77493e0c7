//! `flows`: each live pair of half-records once, as the side that opened it sees it.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use portcullis_common::clock::passed;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, LIVE};
use portcullis_common::layout::{FLOW_RULE, HalfRecord, KIND_MAPPING, NEXT_HOP_HOST};
use portcullis_common::tcp_state::{self, State};
use serde::{Deserialize, Serialize};

use crate::api::Failure;
use crate::cli::table::Table;
use crate::compile::Registry;
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::datapath::{FlowTable, now_tick};
use crate::observe::time::{bytes, seconds};

/// At most this many are told at once.
pub(super) const MOST: usize = 100_000;

/// Live flows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowList {
    /// Live flows that match.
    pub total: usize,
    /// The busiest of them, by bytes.
    pub flows: Vec<Flow>,
}

/// One flow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// As [`protocol_name`] has it.
    pub protocol: String,
    /// Network the opener is in; `world` outside.
    pub network: String,
    /// The guest that opened it; `host`; empty for the world.
    pub from_guest: String,
    /// The guest it goes to; `host`; empty for the world.
    pub to_guest: String,
    pub source: IpAddr,
    /// The identifier, for ICMP and ICMPv6; 0 where the protocol has no ports.
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// What the receiver sees as source; equal to `source` when it is not translated.
    pub translated_source: IpAddr,
    pub translated_source_port: u16,
    /// Where it really goes; equal to `destination` when that is not translated.
    pub translated_destination: IpAddr,
    pub translated_destination_port: u16,
    /// TCP: `halfOpen`, `established`, `closed`, `reset`; others: `unanswered`, `answered`.
    pub state: String,
    pub packets_forward: u32,
    pub bytes_forward: u64,
    pub packets_reverse: u32,
    pub bytes_reverse: u64,
    /// Seconds of silence after which it ends.
    pub idle_seconds_left: f64,
    /// `web-nsg/Outbound/AllowInternetOutBound`; empty if no group was asked.
    pub rule: String,
}

/// Lists live flows of both families: only those of `guest`, at most `limit`.
pub fn list(shared: &Shared, guest: Option<&str>, limit: Option<usize>) -> Result<FlowList, Failure> {
    let in_force = shared.in_force();
    let hops = guest.map(|name| hops_of(&in_force, name)).transpose()?;
    let now = now_tick();
    let mut pairs: Vec<Pair<'_>> = shared
        .flow_tables()
        .into_iter()
        .flat_map(|table| live(table, now))
        .filter(|pair| hops.as_ref().is_none_or(|hops| is_of(&pair.forward, hops)))
        .collect();
    let total = pairs.len();
    pairs.sort_by_key(|pair| std::cmp::Reverse(pair.forward.bytes().saturating_add(pair.reverse.bytes())));
    pairs.truncate(limit.unwrap_or(MOST).min(MOST));
    Ok(FlowList { total, flows: told(&in_force, &shared.registry().clone(), &pairs, now) })
}

/// Says that there is no such guest, and which there are.
pub fn no_guest(in_force: &InForce, name: &str) -> Failure {
    let mut names: Vec<&str> = in_force.guests().map(|guest| guest.interface).collect();
    names.dedup();
    let more = if names.len() > 8 { ", ..." } else { "" };
    names.truncate(8);
    Failure::input(format!(
        "there is no guest `{name}` in the policy in force; there is {}{more}",
        names.join(", ")
    ))
}

/// The next hops of the guests of this name; an error if there is none.
pub(super) fn hops_of(in_force: &InForce, name: &str) -> Result<HashSet<u16>, Failure> {
    let named = in_force.guests().filter(|guest| guest.is_named(name));
    let hops: HashSet<u16> = named.map(|guest| guest.endpoint.next_hop).collect();
    if hops.is_empty() { Err(no_guest(in_force, name)) } else { Ok(hops) }
}

/// Is one of these next hops at either end?
pub(super) fn is_of(record: &HalfRecord, hops: &HashSet<u16>) -> bool {
    hops.contains(&record.ingress()) || hops.contains(&record.next_hop())
}

/// A live flow in its table.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'t> {
    pub table: &'t FlowTable,
    /// Slot of the half that opened it.
    pub slot: u32,
    pub forward: HalfRecord,
    pub reverse: HalfRecord,
}

/// Where a flow goes from and to; ports in native order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowEnds {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// As the receiver sees it.
    pub new_source: SocketAddr,
    pub new_destination: SocketAddr,
}

impl Pair<'_> {
    /// Id of the rule that allowed it; 0 is none.
    pub fn rule(&self) -> u32 {
        self.forward.rule & FLOW_RULE
    }

    /// Its addresses; `None` if an IPv6 slot has begun another life since it was read.
    pub fn ends(&self) -> Option<FlowEnds> {
        let HalfRecord { key, new_source, new_destination, new_source_port, new_destination_port, .. } =
            self.forward;
        let [source, destination, new_source, new_destination] = if self.table.is_v6() {
            self.table.addresses6(self.slot, &self.forward)?.map(IpAddr::V6)
        } else {
            [key.source, key.destination, new_source, new_destination].map(|a| IpAddr::V4(address(a)))
        };
        let at = |address: IpAddr, port: u16| SocketAddr::new(address, u16::from_be(port));
        Some(FlowEnds {
            source: at(source, key.source_port),
            destination: at(destination, key.destination_port),
            new_source: at(new_source, new_source_port),
            new_destination: at(new_destination, new_destination_port),
        })
    }
}

/// Every live flow of a table.
pub fn live(table: &FlowTable, now: u32) -> impl Iterator<Item = Pair<'_>> + '_ {
    table.iter().filter_map(move |(slot, forward)| {
        let ctl = Ctl(forward.ctl);
        let opener = forward.key.kind != KIND_MAPPING && ctl.flags() & FLAG_FORWARD != 0;
        if !opener || !table.is_alive(&forward, now) || forward.peer >= table.slots() {
            return None;
        }
        let reverse = table.read(forward.peer)?;
        let theirs = Ctl(reverse.ctl);
        // Read in two steps: the other slot may have begun another life meanwhile.
        let same = theirs.phase() == LIVE && theirs.generation() == ctl.generation();
        same.then_some(Pair { table, slot, forward, reverse })
    })
}

/// Protocols that have a name here, by IANA number.
const PROTOCOLS: [(u8, &str); 6] =
    [(6, "tcp"), (17, "udp"), (1, "icmp"), (58, "icmp6"), (50, "esp"), (51, "ah")];

/// `tcp`, `udp`, `icmp`, `icmp6`, `esp`, `ah`, or a number.
pub fn protocol_name(protocol: u8) -> String {
    let known = PROTOCOLS.iter().find(|(number, _)| *number == protocol);
    known.map_or_else(|| protocol.to_string(), |(_, name)| (*name).to_owned())
}

/// The protocol of a name that [`protocol_name`] gives, or of a number.
pub fn protocol_number(name: &str) -> Option<u8> {
    let known = PROTOCOLS.iter().find(|(_, known)| known.eq_ignore_ascii_case(name));
    known.map_or_else(|| name.parse().ok(), |(number, _)| Some(*number))
}

/// `10.0.1.4:443`, `[fd00::4]:443`, or the address alone where there is no port.
pub fn end(address: IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { SocketAddr::new(address, port).to_string() }
}

/// An IPv4 address as the tables have it.
pub fn address(network_order: u32) -> Ipv4Addr {
    Ipv4Addr::from(network_order.to_ne_bytes())
}

/// Flows as they are told; those that began another life meanwhile are left out.
pub(super) fn told(in_force: &InForce, registry: &Registry, pairs: &[Pair<'_>], now: u32) -> Vec<Flow> {
    pairs.iter().filter_map(|pair| flow(in_force, registry, pair, now)).collect()
}

fn flow(in_force: &InForce, registry: &Registry, pair: &Pair<'_>, now: u32) -> Option<Flow> {
    let Pair { forward, reverse, .. } = pair;
    let key = &forward.key;
    let ends = pair.ends()?;
    let guest = |hop: u16| match in_force.guest_of_hop(hop) {
        _ if hop == NEXT_HOP_HOST => "host".to_owned(),
        Some(guest) => guest.name.to_owned(),
        None => String::new(),
    };
    let left = |record: &HalfRecord| {
        if passed(record.deadline, now) { 0 } else { record.deadline.wrapping_sub(now) }
    };
    Some(Flow {
        protocol: protocol_name(key.protocol),
        network: in_force.network_name(key.network, registry).to_owned(),
        from_guest: guest(forward.ingress()),
        to_guest: guest(forward.next_hop()),
        source: ends.source.ip(),
        source_port: ends.source.port(),
        destination: ends.destination.ip(),
        destination_port: ends.destination.port(),
        translated_source: ends.new_source.ip(),
        translated_source_port: ends.new_source.port(),
        translated_destination: ends.new_destination.ip(),
        translated_destination_port: ends.new_destination.port(),
        state: state(forward, reverse).to_owned(),
        packets_forward: forward.packets,
        bytes_forward: forward.bytes(),
        packets_reverse: reverse.packets,
        bytes_reverse: reverse.bytes(),
        idle_seconds_left: seconds(left(forward).max(left(reverse))),
        rule: rule_text(in_force, registry, pair.rule()),
    })
}

fn state(forward: &HalfRecord, reverse: &HalfRecord) -> &'static str {
    if forward.key.protocol != 6 {
        return if reverse.packets == 0 { "unanswered" } else { "answered" };
    }
    match tcp_state::state(Ctl(forward.ctl).tcp()) {
        State::HalfOpen => "halfOpen",
        State::Established => "established",
        State::Transitory => "transitory",
        State::Closing => "closing",
        State::Closed => "closed",
        State::Reset => "reset",
    }
}

impl FlowList {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = table(&self.flows).render("no live flows");
        if self.total > self.flows.len() {
            text +=
                &format!("{} of {} flows, the busiest; --limit shows more\n", self.flows.len(), self.total);
        }
        text
    }
}

/// Flows for people.
pub(super) fn table(flows: &[Flow]) -> Table {
    let mut table = Table::new(&[
        "PROTO",
        "FROM",
        "SOURCE",
        "DESTINATION",
        "AS",
        "STATE",
        "PACKETS>",
        "BYTES>",
        "IDLE LEFT>",
        "RULE",
    ]);
    for flow in flows {
        let source = end(flow.source, flow.source_port);
        let destination = end(flow.destination, flow.destination_port);
        let new_source = end(flow.translated_source, flow.translated_source_port);
        let new_destination = end(flow.translated_destination, flow.translated_destination_port);
        let mut translated = String::new();
        if new_source != source {
            translated = new_source;
        }
        if new_destination != destination {
            translated = format!("{translated}->{new_destination}");
        }
        let from = if flow.from_guest.is_empty() { "world" } else { &flow.from_guest };
        table.row([
            flow.protocol.clone(),
            from.to_owned(),
            source,
            destination,
            translated,
            flow.state.clone(),
            format!("{}/{}", flow.packets_forward, flow.packets_reverse),
            format!("{}/{}", bytes(flow.bytes_forward), bytes(flow.bytes_reverse)),
            format!("{:.0}s", flow.idle_seconds_left),
            flow.rule.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_translated_flow_shows_under_which_address_it_goes() {
        let flow = Flow {
            protocol: "tcp".into(),
            network: "lab".into(),
            from_guest: "vm1/primary".into(),
            to_guest: String::new(),
            source: IpAddr::from([10, 0, 1, 4]),
            source_port: 40000,
            destination: IpAddr::from([198, 51, 100, 1]),
            destination_port: 443,
            translated_source: IpAddr::from([203, 0, 113, 10]),
            translated_source_port: 1024,
            translated_destination: IpAddr::from([198, 51, 100, 1]),
            translated_destination_port: 443,
            state: "established".into(),
            packets_forward: 3,
            bytes_forward: 2048,
            packets_reverse: 2,
            bytes_reverse: 100,
            idle_seconds_left: 239.6,
            rule: "web-nsg/Outbound/AllowInternetOutBound".into(),
        };
        let list = FlowList { total: 5, flows: vec![flow.clone()] };
        let text = list.text();
        for part in
            ["10.0.1.4:40000  198.51.100.1:443  203.0.113.10:1024  established", "3/2", "240s", "1 of 5"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        let json = serde_json::to_value(&list).unwrap();
        assert_eq!(json["flows"][0]["translatedSourcePort"], 1024);
        assert_eq!(serde_json::from_value::<FlowList>(json).unwrap(), list);
    }

    #[test]
    fn an_ipv6_end_has_its_port_behind_brackets_and_an_end_without_port_has_none() {
        let address: IpAddr = "fd00:1::4".parse().unwrap();
        assert_eq!((end(address, 443).as_str(), end(address, 0).as_str()), ("[fd00:1::4]:443", "fd00:1::4"));
        assert_eq!(end(IpAddr::from([10, 0, 1, 4]), 443), "10.0.1.4:443");
    }

    #[test]
    fn every_protocol_reads_back_from_the_name_it_is_told_by() {
        assert_eq!([58, 50, 51, 132].map(protocol_name), ["icmp6", "esp", "ah", "132"]);
        for number in 0..=u8::MAX {
            assert_eq!(protocol_number(&protocol_name(number)), Some(number));
        }
        assert_eq!(
            (protocol_number("TCP"), protocol_number("256"), protocol_number("")),
            (Some(6), None, None)
        );
    }
}
