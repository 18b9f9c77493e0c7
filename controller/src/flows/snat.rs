//! `snat`: each guest's ports on load balancer frontends, and how many are in use right now.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::Reason;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, FLAG_SNAT};
use portcullis_common::layout::{HalfRecord, KIND_MAPPING, WORLD};
use portcullis_common::policy::{ALLOC_ECHO, ALLOC_TCP, ALLOC_UDP, UNIT_PORTS};
use serde::{Deserialize, Serialize};

use super::list::address;
use crate::api::Failure;
use crate::cli::table::Table;
use crate::daemon::Shared;
use crate::datapath::now_tick;

/// SNAT ports by guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnatUse {
    pub guests: Vec<GuestPorts>,
    /// Packets dropped because their guest had no port left, of all guests together.
    pub exhausted_packets: u64,
}

/// Ports of one address of one guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestPorts {
    /// `vm1/ipconfig1`
    pub guest: String,
    pub private_address: IpAddr,
    /// Public addresses it leaves under.
    pub addresses: Vec<Ipv4Addr>,
    /// Protocols its outbound rule translates.
    pub protocols: Vec<String>,
    /// Ports it owns, for each protocol.
    pub allocated: u32,
    /// TCP: ports with at least one live flow (each serves many destinations). UDP and ICMP: ports taken by an inside
    /// socket.
    pub used: ByProtocol,
    pub free: ByProtocol,
    /// Sampled drops for want of a port since the daemon's start; a lower bound.
    pub exhausted_sampled: u64,
    /// Inclusive ranges of the ports owned, by public address.
    pub ranges: Vec<OwnedPorts>,
}

/// A number for each protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByProtocol {
    pub tcp: u32,
    pub udp: u32,
    pub icmp: u32,
}

/// Ports of one public address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedPorts {
    pub address: Ipv4Addr,
    pub first: u16,
    pub last: u16,
}

/// The guests' SNAT ports.
pub fn snat(shared: &Shared) -> Result<SnatUse, Failure> {
    let in_force = shared.in_force();
    let image = in_force.image();
    let now = now_tick();
    // (next hop of the guest, protocol) -> public ports in use.
    let mut used: HashMap<(u16, u8), HashSet<(u32, u16)>> = HashMap::new();
    for (_, record) in shared.flows.iter() {
        if let Some(guest) = claimed_by(&record)
            && shared.flows.is_alive(&record, now)
        {
            let port = (record.key.destination, record.key.destination_port);
            used.entry((guest, record.key.protocol)).or_default().insert(port);
        }
    }
    let mut guests = Vec::new();
    for guest in
        in_force.guests().filter(|guest| guest.endpoint.alloc.iter().any(|alloc| alloc.segments != 0))
    {
        let which = (0..3).max_by_key(|&i| guest.endpoint.alloc[i].ports).unwrap_or(ALLOC_TCP);
        let allocated = guest.endpoint.alloc[which].ports;
        let in_use =
            |protocol| used.get(&(guest.endpoint.next_hop, protocol)).map_or(0, |ports| ports.len() as u32);
        let now = ByProtocol { tcp: in_use(6), udp: in_use(17), icmp: in_use(1) };
        let mut ranges: Vec<OwnedPorts> = Vec::new();
        let mut units = image.units(&guest.endpoint, which);
        units.sort_unstable();
        for (frontend, unit) in units {
            let public = address(image.frontend(frontend).address);
            let first = (unit * UNIT_PORTS) as u16;
            let last = first + (UNIT_PORTS - 1) as u16;
            match ranges.last_mut() {
                Some(range) if range.address == public && u32::from(range.last) + 1 == u32::from(first) => {
                    range.last = last;
                }
                _ => ranges.push(OwnedPorts { address: public, first, last }),
            }
        }
        let mut addresses: Vec<Ipv4Addr> = ranges.iter().map(|range| range.address).collect();
        addresses.dedup();
        let translates = [(ALLOC_TCP, "tcp"), (ALLOC_UDP, "udp"), (ALLOC_ECHO, "icmp")];
        let protocols = translates.iter().filter(|(which, _)| guest.endpoint.alloc[*which].segments != 0);
        guests.push(GuestPorts {
            guest: guest.name.to_owned(),
            private_address: guest.address,
            addresses,
            protocols: protocols.map(|(_, name)| (*name).to_owned()).collect(),
            allocated,
            used: now,
            free: ByProtocol {
                tcp: allocated.saturating_sub(now.tcp),
                udp: allocated.saturating_sub(now.udp),
                icmp: allocated.saturating_sub(now.icmp),
            },
            exhausted_sampled: shared.events.exhausted(guest.endpoint.network, guest.endpoint.address),
            ranges,
        });
    }
    let reasons = shared.datapath().reasons()?;
    let count = |reason: Reason| reasons.get(reason as usize).map_or(0, |count| count.packets);
    let exhausted_packets = count(Reason::SnatExhausted) + count(Reason::SnatRefused);
    Ok(SnatUse { guests, exhausted_packets })
}

/// The next hop of the guest that has claimed a public port by this record; `None` if the record is no claim.
fn claimed_by(record: &HalfRecord) -> Option<u16> {
    let flags = Ctl(record.ctl).flags();
    if flags & FLAG_SNAT == 0 || flags & FLAG_FORWARD != 0 || record.key.network != WORLD {
        return None;
    }
    match (record.key.protocol, record.key.kind == KIND_MAPPING) {
        // The claim of a TCP port is the reverse half of its flow, whose packets go to the guest.
        (6, false) => Some(record.next_hop()),
        (17 | 1, true) => Some(record.ingress()),
        _ => None,
    }
}

impl SnatUse {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&[
            "GUEST",
            "ADDRESSES",
            "PORTS>",
            "TCP USED>",
            "FREE>",
            "UDP USED>",
            "FREE>",
            "ICMP USED>",
            "FREE>",
            "EXHAUSTED>",
        ]);
        for guest in &self.guests {
            let addresses: Vec<String> = guest.addresses.iter().map(Ipv4Addr::to_string).collect();
            let pair = |name: &str, used: u32, free: u32| {
                // What the outbound rule does not translate has no ports at all.
                if guest.protocols.iter().any(|p| p == name) {
                    [used.to_string(), free.to_string()]
                } else {
                    ["-".to_owned(), "-".to_owned()]
                }
            };
            let [tcp_used, tcp_free] = pair("tcp", guest.used.tcp, guest.free.tcp);
            let [udp_used, udp_free] = pair("udp", guest.used.udp, guest.free.udp);
            let [icmp_used, icmp_free] = pair("icmp", guest.used.icmp, guest.free.icmp);
            table.row([
                guest.guest.clone(),
                addresses.join(","),
                guest.allocated.to_string(),
                tcp_used,
                tcp_free,
                udp_used,
                udp_free,
                icmp_used,
                icmp_free,
                guest.exhausted_sampled.to_string(),
            ]);
        }
        let mut text = table.render("no guest has SNAT ports: the policy has no outbound rules");
        if self.exhausted_packets > 0 {
            text +=
                &format!("{} packets dropped because their guest had no port left\n", self.exhausted_packets);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_common::flow::LIVE;
    use portcullis_common::layout::{FlowKey, KIND_FLOW, hops};

    #[test]
    fn only_the_reverse_half_of_tcp_and_the_outer_mapping_of_others_are_claims() {
        let record = |protocol, kind, network, flags| HalfRecord {
            key: FlowKey { protocol, kind, network, ..FlowKey::default() },
            ctl: Ctl::new(1, LIVE, 0, 0, flags).0,
            hops: hops(7, 8),
            ..HalfRecord::default()
        };
        assert_eq!(claimed_by(&record(6, KIND_FLOW, WORLD, FLAG_SNAT)), Some(7));
        assert_eq!(claimed_by(&record(17, KIND_MAPPING, WORLD, FLAG_SNAT)), Some(8));
        assert_eq!(claimed_by(&record(17, KIND_FLOW, WORLD, FLAG_SNAT)), None, "the mapping counts, once");
        assert_eq!(claimed_by(&record(6, KIND_FLOW, 1, FLAG_SNAT | FLAG_FORWARD)), None);
        assert_eq!(
            claimed_by(&record(6, KIND_FLOW, WORLD, 0)),
            None,
            "an instance-level address needs no port"
        );
    }
}
