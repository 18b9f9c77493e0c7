//! `snat --by destination` and `snat --port`: the same ports, asked from the other end.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use portcullis_common::policy::{UNIT_PORTS, alloc_of};
use serde::{Deserialize, Serialize};

use super::allocations::{Allocations, WITH_PORTS, draining_until, public};
use super::list::{Flow, MOST, end, live, no_guest, protocol_number, told};
use super::ports::PortUse;
use super::snat::addresses_of;
use crate::api::Failure;
use crate::daemon::{InForce, Shared};
use crate::datapath::now_tick;
use crate::observe::time::unix;
use crate::observe::whois::end_and_protocol;

/// Where the guests' ports go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ByDestination {
    /// Destinations there are.
    pub total: usize,
    /// Those with the largest share.
    pub destinations: Vec<DestinationPorts>,
}

/// Ports one guest has taken towards one destination.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DestinationPorts {
    pub guest: String,
    pub destination: String,
    pub protocol: String,
    /// Ports taken, those held back after their flow's end among them.
    pub ports: u32,
    /// Ports the guest may claim, on all its public addresses.
    pub of: u32,
    pub share_percent: f64,
}

/// The destinations of one guest or all, at most `limit`.
pub fn by_destination(
    shared: &Shared,
    guest: Option<&str>,
    frontend: Option<&str>,
    limit: Option<usize>,
) -> Result<ByDestination, Failure> {
    let in_force = shared.in_force();
    if let Some(name) = guest
        && !in_force.has_guest(name)
    {
        return Err(no_guest(&in_force, name));
    }
    let wanted = frontend.map(|name| addresses_of(&in_force, name)).transpose()?;
    let elsewhere = |address: &IpAddr| wanted.as_ref().is_some_and(|wanted| !wanted.contains(address));
    let used = PortUse::look(shared.flow_tables());
    let allocations = Allocations::of(&in_force);
    let mut sums: BTreeMap<(usize, usize, SocketAddr), u32> = BTreeMap::new();
    let mut owned: BTreeMap<(usize, usize), u32> = BTreeMap::new();
    for (&(number, address, which), units) in allocations.iter() {
        if !elsewhere(&address) {
            *owned.entry((number, which)).or_default() += units.ports();
        }
    }
    for (holder, taken) in used.holders() {
        let (Some(found), Some(which)) = (in_force.guest_of_hop(holder.hop), alloc_of(holder.protocol))
        else {
            continue;
        };
        if guest.is_some_and(|name| !found.is_named(name)) || elsewhere(&holder.frontend) {
            continue;
        }
        for (&to, &ports) in &taken.destinations {
            *sums.entry((found.number, which, to)).or_default() += ports;
        }
    }
    let mut destinations: Vec<DestinationPorts> = sums
        .into_iter()
        .filter_map(|((number, which, to), ports)| {
            let of = owned.get(&(number, which)).copied().unwrap_or(0);
            Some(DestinationPorts {
                guest: in_force.guest(number)?.name.to_owned(),
                destination: end(to.ip(), to.port()),
                protocol: WITH_PORTS[which].2.to_owned(),
                ports,
                of,
                share_percent: share(ports, of),
            })
        })
        .collect();
    destinations.sort_by(|a, b| b.share_percent.total_cmp(&a.share_percent).then(b.ports.cmp(&a.ports)));
    let total = destinations.len();
    destinations.truncate(limit.unwrap_or(MOST).min(MOST));
    Ok(ByDestination { total, destinations })
}

/// In a hundred, to a tenth; more than there are is as many as there are.
pub fn share(ports: u32, of: u32) -> f64 {
    if of == 0 { 100.0 } else { (f64::from(ports) * 1000.0 / f64::from(of)).round().min(1000.0) / 10.0 }
}

/// Who has a public port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortHolders {
    /// `203.0.113.5:23456`
    pub port: String,
    /// One for each protocol that was asked for.
    pub holders: Vec<PortHolder>,
    /// Live flows on it.
    pub flows: Vec<Flow>,
}

/// Who has it for one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortHolder {
    pub protocol: String,
    /// `vm1/ipconfig1`; `null` if nobody has it.
    pub guest: Option<String>,
    /// Is it being given back? New flows do not get it then.
    pub draining: bool,
    pub draining_until: Option<String>,
    /// For people.
    pub text: String,
}

/// Who has this port: `203.0.113.5:23456`, `[2001:db8::5]:23456`, perhaps with `/tcp` or `/udp`.
pub fn port_holders(shared: &Shared, port: &str) -> Result<PortHolders, Failure> {
    let (asked, protocol) = end_and_protocol(port)?;
    let in_force = shared.in_force();
    let now = now_tick();
    let number = protocol.as_deref().and_then(protocol_number);
    let pairs: Vec<_> = shared
        .flow_tables()
        .into_iter()
        .flat_map(|table| live(table, now))
        .filter(|pair| number.is_none_or(|number| number == pair.forward.key.protocol))
        .filter(|pair| pair.ends().is_some_and(|ends| ends.new_source == asked || ends.destination == asked))
        .take(MOST)
        .collect();
    let protocols = ["tcp", "udp"].into_iter().filter(|name| protocol.as_deref().is_none_or(|p| p == *name));
    Ok(PortHolders {
        port: asked.to_string(),
        holders: protocols.map(|name| holder(&in_force, asked, name)).collect(),
        flows: told(&in_force, &shared.registry().clone(), &pairs, now),
    })
}

fn holder(in_force: &InForce, asked: SocketAddr, protocol: &str) -> PortHolder {
    let image = in_force.image();
    let udp = protocol == "udp";
    let frontends = 0..image.header().frontends_used;
    let frontend = frontends.into_iter().find(|&n| public(&image.frontend(n)) == asked.ip());
    let owner = frontend.and_then(|n| image.owner(n, udp, asked.port()));
    let guest = owner.and_then(|number| in_force.guest(number as usize));
    let mut holder = PortHolder {
        protocol: protocol.to_owned(),
        guest: guest.as_ref().map(|guest| guest.name.to_owned()),
        draining: false,
        draining_until: None,
        text: String::new(),
    };
    holder.text = match guest {
        Some(guest) => {
            let unit = asked.port() / UNIT_PORTS as u16;
            let units = image.units(&guest.endpoint, usize::from(udp));
            let claimable = units.iter().any(|&(n, u)| Some(n) == frontend && u == u32::from(unit));
            holder.draining = !claimable;
            if claimable {
                format!("owned by {}", guest.name)
            } else {
                let until = draining_until(&in_force.compiled.ownership, asked.ip(), udp, unit);
                holder.draining_until = until.map(unix);
                let until =
                    holder.draining_until.as_ref().map_or_else(String::new, |at| format!(" until {at}"));
                format!("owned by {}, draining{until}: no new flow gets it", guest.name)
            }
        }
        None => crate::observe::whois::not_snat(in_force, asked, protocol, frontend.is_some()),
    };
    holder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_in_a_hundred_and_never_more() {
        assert_eq!([share(1, 1024), share(768, 1024), share(9, 8), share(1, 0)], [0.1, 75.0, 100.0, 100.0]);
    }
}
