//! `drops`: what became of packets, by reason, and the latest that were dropped.

use std::net::IpAddr;

use portcullis_common::Reason;
use portcullis_common::layout::{Event, FLOW_RULE};
use serde::{Deserialize, Serialize};

use super::time::{bytes, seconds};
use crate::api::Failure;
use crate::cli::table::Table;
use crate::compile::Registry;
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::datapath::{address6, now_tick};
use crate::flows::{address, end, protocol_name};

/// Counters by reason, and recent drops.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drops {
    pub reasons: Vec<ReasonCount>,
    /// What the kernel lost after a redirect by XDP in this network namespace, by its tracepoints.
    pub lost: Vec<Lost>,
    /// Sampled drops since the daemon's start, newest first, at most 256.
    pub recent: Vec<RecentDrop>,
}

/// One reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReasonCount {
    pub reason: String,
    /// Did the packets end there?
    pub is_drop: bool,
    pub packets: u64,
    pub bytes: u64,
    pub description: String,
}

/// One kind of loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// The tracepoint that told.
    pub at: String,
    pub packets: u64,
}

/// One packet that was dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecentDrop {
    pub seconds_ago: f64,
    pub reason: String,
    pub device: String,
    /// `guest`, `uplink` or `host`: where the packet came from.
    pub side: String,
    /// `xdp` or `tc`.
    pub hook: String,
    pub network: String,
    pub protocol: String,
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// The guest it came from or went to, as far as its addresses tell; else empty.
    pub guest: String,
    /// `web-nsg/Outbound/DenySmtp`; empty if no rule decided.
    pub rule: String,
    pub length: u32,
}

/// Counters that are not zero (all of them with `all`) and recent drops.
pub fn drops(shared: &Shared, all: bool) -> Result<Drops, Failure> {
    let (counts, lost) = {
        let datapath = shared.datapath();
        (datapath.reasons()?, datapath.lost()?)
    };
    let reasons = Reason::ALL.iter().zip(&counts).filter(|(_, count)| all || count.packets != 0);
    let reasons = reasons.map(|(reason, count)| ReasonCount {
        reason: reason.label().to_owned(),
        is_drop: reason.is_drop(),
        packets: count.packets,
        bytes: count.bytes,
        description: reason.description().trim().to_owned(),
    });
    let in_force = shared.in_force();
    let registry = shared.registry().clone();
    let now = now_tick();
    let recent = shared.events.latest();
    Ok(Drops {
        reasons: reasons.collect(),
        lost: losses(&lost, all),
        recent: recent.iter().map(|event| recent_drop(&in_force, &registry, event, now)).collect(),
    })
}

/// The kernel's losses by the name of their tracepoint (`dataplane-ebpf`, `losses`).
pub fn losses(counts: &[u64], all: bool) -> Vec<Lost> {
    let names = ["xdp_redirect_err", "xdp_devmap_xmit"];
    let named = names.iter().zip(counts).filter(|(_, packets)| all || **packets != 0);
    named.map(|(at, packets)| Lost { at: (*at).to_owned(), packets: *packets }).collect()
}

/// Source and destination of a packet that was dropped.
fn ends(event: &Event) -> [IpAddr; 2] {
    if event.v6 == 0 {
        [event.source, event.destination].map(|a| IpAddr::V4(address(a)))
    } else {
        [event.source6, event.destination6].map(|a| IpAddr::V6(address6(a)))
    }
}

fn recent_drop(in_force: &InForce, registry: &Registry, event: &Event, now: u32) -> RecentDrop {
    let [source, destination] = ends(event);
    let at = |address: IpAddr| {
        let mut guests = in_force.guests_at(address);
        guests.find(|guest| event.network == 0 || guest.endpoint.network == event.network)
    };
    // Only IPv4 has them; 0 is "none".
    let instance = || {
        let public = (event.v6 == 0 && event.destination != 0).then_some(event.destination)?;
        in_force
            .guests()
            .find(|guest| guest.endpoint.instance != 0 && guest.endpoint.instance_address[0] == public)
    };
    let guest = at(source).or_else(|| at(destination)).or_else(instance);
    let reason = Reason::from_index(u32::from(event.reason));
    RecentDrop {
        seconds_ago: seconds(now.saturating_sub(event.tick)),
        reason: reason.map_or_else(|| event.reason.to_string(), |reason| reason.label().to_owned()),
        device: if event.ifindex == 0 { String::new() } else { in_force.device_name(event.ifindex) },
        side: match event.side {
            1 => "guest",
            2 => "uplink",
            3 => "host",
            // The guard, which knows no side: it stands where packets leave.
            _ => "egress",
        }
        .to_owned(),
        hook: if event.hook == 1 { "xdp" } else { "tc" }.to_owned(),
        network: in_force.network_name(event.network, registry).to_owned(),
        protocol: protocol_name(event.protocol),
        source,
        source_port: u16::from_be(event.source_port),
        destination,
        destination_port: u16::from_be(event.destination_port),
        guest: guest.map_or_else(String::new, |guest| guest.name.to_owned()),
        rule: rule_text(in_force, registry, event.rule & FLOW_RULE),
        length: event.length,
    }
}

impl Drops {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["REASON", "PACKETS>", "BYTES>", "DROPPED", "WHAT IT MEANS"]);
        for reason in &self.reasons {
            table.row([
                reason.reason.clone(),
                reason.packets.to_string(),
                bytes(reason.bytes),
                if reason.is_drop { "yes" } else { "" }.to_owned(),
                reason.description.clone(),
            ]);
        }
        let mut text = table.render("no packet has come yet");
        for lost in &self.lost {
            text +=
                &format!("{} packets lost by the kernel after an XDP redirect ({})\n", lost.packets, lost.at);
        }
        if !self.recent.is_empty() {
            let mut table =
                Table::new(&["AGO>", "REASON", "DEVICE", "PROTO", "SOURCE", "DESTINATION", "GUEST", "RULE"]);
            for drop in &self.recent {
                table.row([
                    format!("{:.0}s", drop.seconds_ago),
                    drop.reason.clone(),
                    drop.device.clone(),
                    drop.protocol.clone(),
                    end(drop.source, drop.source_port),
                    end(drop.destination, drop.destination_port),
                    drop.guest.clone(),
                    drop.rule.clone(),
                ]);
            }
            text += "\nLatest drops (sampled):\n";
            text += &table.render("");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_have_the_names_of_their_tracepoints_and_zeroes_are_left_out() {
        assert_eq!(losses(&[0, 3, 0], false), [Lost { at: "xdp_devmap_xmit".into(), packets: 3 }]);
        assert_eq!(losses(&[0, 3, 0], true).len(), 2);
    }

    #[test]
    fn an_event_of_ipv6_is_told_by_its_whole_addresses_and_one_of_ipv4_by_its_own() {
        use portcullis_common::layout::{v4, v6};
        let (a, b): (IpAddr, IpAddr) = ("fd00:1::4".parse().unwrap(), "2001:db8::5".parse().unwrap());
        let event = Event { v6: 1, source6: v6(a), destination6: v6(b), ..Event::default() };
        assert_eq!(ends(&event), [a, b]);
        let (a, b) = (IpAddr::from([10, 0, 0, 4]), IpAddr::from([198, 51, 100, 1]));
        assert_eq!(ends(&Event { source: v4(a), destination: v4(b), ..Event::default() }), [a, b]);
    }
}
