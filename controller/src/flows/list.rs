//! `flows`: each live pair of half-records once, as the side that opened it sees it.

use std::net::Ipv4Addr;

use portcullis_common::clock::passed;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, LIVE};
use portcullis_common::layout::{HalfRecord, KIND_FLOW, NEXT_HOP_HOST};
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
const MOST: usize = 100_000;

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
    /// `tcp`, `udp`, `icmp`, or a number.
    pub protocol: String,
    /// Network the opener is in; `world` outside.
    pub network: String,
    /// The guest that opened it; `host`; empty for the world.
    pub from_guest: String,
    /// The guest it goes to; `host`; empty for the world.
    pub to_guest: String,
    pub source: Ipv4Addr,
    /// The identifier, for ICMP.
    pub source_port: u16,
    pub destination: Ipv4Addr,
    pub destination_port: u16,
    /// What the receiver sees as source; equal to `source` when it is not translated.
    pub translated_source: Ipv4Addr,
    pub translated_source_port: u16,
    /// Where it really goes; equal to `destination` when that is not translated.
    pub translated_destination: Ipv4Addr,
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

/// Lists live flows: only those of `guest`, at most `limit`.
pub fn list(shared: &Shared, guest: Option<&str>, limit: Option<usize>) -> Result<FlowList, Failure> {
    let in_force = shared.in_force();
    if let Some(name) = guest
        && !in_force.has_guest(name)
    {
        return Err(no_guest(&in_force, name));
    }
    let now = now_tick();
    let of_guest = |record: &HalfRecord| {
        guest.is_none_or(|name| {
            [record.ingress, record.next_hop]
                .iter()
                .any(|hop| in_force.guest_of_hop(*hop).is_some_and(|guest| guest.is_named(name)))
        })
    };
    let mut pairs: Vec<(HalfRecord, HalfRecord)> =
        live(&shared.flows, now).filter(|(forward, _)| of_guest(forward)).collect();
    let total = pairs.len();
    pairs.sort_by_key(|(forward, reverse)| std::cmp::Reverse(forward.bytes + reverse.bytes));
    pairs.truncate(limit.unwrap_or(MOST).min(MOST));
    let registry = shared.registry().clone();
    let flows =
        pairs.iter().map(|(forward, reverse)| flow(&in_force, &registry, forward, reverse, now)).collect();
    Ok(FlowList { total, flows })
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

/// Every live flow: the half that opened it, and the other.
pub fn live(table: &FlowTable, now: u32) -> impl Iterator<Item = (HalfRecord, HalfRecord)> + '_ {
    table.iter().filter_map(move |(_, forward)| {
        let ctl = Ctl(forward.ctl);
        let opener = forward.key.kind == KIND_FLOW && ctl.flags() & FLAG_FORWARD != 0;
        if !opener || !table.is_alive(&forward, now) || forward.peer >= table.slots() {
            return None;
        }
        let reverse = table.read(forward.peer)?;
        let theirs = Ctl(reverse.ctl);
        // Read in two steps: the other slot may have begun another life meanwhile.
        (theirs.phase() == LIVE && theirs.generation() == ctl.generation()).then_some((forward, reverse))
    })
}

/// `tcp`, `udp`, `icmp`, or a number.
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        6 => "tcp".into(),
        17 => "udp".into(),
        1 => "icmp".into(),
        other => other.to_string(),
    }
}

/// An address as the tables have it.
pub fn address(network_order: u32) -> Ipv4Addr {
    Ipv4Addr::from(network_order.to_ne_bytes())
}

fn flow(
    in_force: &InForce,
    registry: &Registry,
    forward: &HalfRecord,
    reverse: &HalfRecord,
    now: u32,
) -> Flow {
    let key = &forward.key;
    let end = |hop: u16| match in_force.guest_of_hop(hop) {
        _ if hop == NEXT_HOP_HOST => "host".to_owned(),
        Some(guest) => guest.name.to_owned(),
        None => String::new(),
    };
    let left = |record: &HalfRecord| {
        if passed(record.deadline, now) { 0 } else { record.deadline.wrapping_sub(now) }
    };
    Flow {
        protocol: protocol_name(key.protocol),
        network: in_force.network_name(key.network, registry).to_owned(),
        from_guest: end(forward.ingress),
        to_guest: end(forward.next_hop),
        source: address(key.source),
        source_port: u16::from_be(key.source_port),
        destination: address(key.destination),
        destination_port: u16::from_be(key.destination_port),
        translated_source: address(forward.new_source),
        translated_source_port: u16::from_be(forward.new_source_port),
        translated_destination: address(forward.new_destination),
        translated_destination_port: u16::from_be(forward.new_destination_port),
        state: state(forward, reverse).to_owned(),
        packets_forward: forward.packets,
        bytes_forward: forward.bytes,
        packets_reverse: reverse.packets,
        bytes_reverse: reverse.bytes,
        idle_seconds_left: seconds(left(forward).max(left(reverse))),
        rule: rule_text(in_force, registry, forward.rule),
    }
}

fn state(forward: &HalfRecord, reverse: &HalfRecord) -> &'static str {
    if forward.key.protocol != 6 {
        return if reverse.packets == 0 { "unanswered" } else { "answered" };
    }
    match tcp_state::state(Ctl(forward.ctl).tcp()) {
        State::HalfOpen => "halfOpen",
        State::Established => "established",
        State::Closed => "closed",
        State::Reset => "reset",
    }
}

impl FlowList {
    /// For people.
    pub fn text(&self) -> String {
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
        for flow in &self.flows {
            let end = |address: Ipv4Addr, port: u16| {
                if port == 0 { address.to_string() } else { format!("{address}:{port}") }
            };
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
        let mut text = table.render("no live flows");
        if self.total > self.flows.len() {
            text +=
                &format!("{} of {} flows, the busiest; --limit shows more\n", self.flows.len(), self.total);
        }
        text
    }
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
            source: [10, 0, 1, 4].into(),
            source_port: 40000,
            destination: [198, 51, 100, 1].into(),
            destination_port: 443,
            translated_source: [203, 0, 113, 10].into(),
            translated_source_port: 1024,
            translated_destination: [198, 51, 100, 1].into(),
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
}
