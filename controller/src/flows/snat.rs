//! `snat`: each guest's ports on each public address, what they are used for, and why a guest has none.

use std::collections::BTreeMap;
use std::net::IpAddr;

use portcullis_common::Reason;
use serde::{Deserialize, Serialize};

use super::allocations::{self, Allocations, Units, WITH_PORTS, port_ranges};
use super::list::{end, no_guest};
use super::ports::{Holder, PortUse, Taken};
use crate::api::Failure;
use crate::daemon::shared::Guest;
use crate::daemon::{InForce, Shared};
use crate::observe::outbound::no_ports;
use crate::observe::time::unix;

/// SNAT ports by guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnatUse {
    pub guests: Vec<GuestPorts>,
    /// By protocol, of the guests and addresses above.
    pub totals: Vec<Total>,
    /// Packets dropped because their guest had no port left, of all guests together.
    pub exhausted_packets: u64,
}

/// Ports of one address of one guest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestPorts {
    /// `vm1/ipconfig1`
    pub guest: String,
    pub private_address: String,
    /// Public addresses it has ports of.
    pub addresses: Vec<IpAddr>,
    /// Why it has none; `null` if it has.
    pub no_data_because: Option<String>,
    /// One for each public address and protocol.
    pub ports: Vec<PortsOn>,
    /// Sampled drops for want of a port since the daemon's start; a lower bound.
    pub exhausted_sampled: u64,
    /// Inclusive ranges of the ports that new flows of any protocol may claim, by public address.
    pub ranges: Vec<OwnedPorts>,
}

/// Ports of one guest on one public address for one protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortsOn {
    pub frontend: String,
    /// `tcp`, `udp` or `icmp` (identifiers of pings, of either family).
    pub protocol: String,
    /// Ports that new flows may claim: `used`, `holding` and `free` together.
    pub allocated: u32,
    /// With at least one live flow; a port may have many, to different destinations.
    pub used: u32,
    /// Without a live flow, but kept: TCP until nothing of its ended flows can be under way, a port of one socket (UDP, and
    /// TCP by the profile `rfc`) until that has been quiet for long enough.
    pub holding: u32,
    pub free: u32,
    /// Ports that are being given back: nothing new is claimed there.
    pub draining: u32,
    /// Ports with a live flow that new flows may not claim: those, and any of a way out the guest has no more.
    pub draining_used: u32,
    /// Live flows on them.
    pub draining_flows: u32,
    /// When they are ended at the latest, RFC 3339.
    pub draining_until: Option<String>,
    /// The destination towards which most ports are taken, which is what exhausts.
    pub busiest: Option<Towards>,
}

/// Ports taken towards a destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Towards {
    /// `198.51.100.7:443`; the address alone for pings.
    pub destination: String,
    pub ports: u32,
}

/// Sums for one protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    pub protocol: String,
    pub allocated: u32,
    pub used: u32,
    pub holding: u32,
    pub free: u32,
    pub draining: u32,
}

/// Ports of one public address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedPorts {
    pub address: IpAddr,
    pub first: u16,
    pub last: u16,
}

impl GuestPorts {
    /// Ports in use for a protocol, on all public addresses.
    pub fn used(&self, protocol: &str) -> u32 {
        self.ports.iter().filter(|on| on.protocol == protocol).map(|on| on.used).sum()
    }

    /// Ports that may be claimed for the protocol that has most.
    pub fn allocated(&self) -> u32 {
        let of = |name| self.ports.iter().filter(|on| on.protocol == name).map(|on| on.allocated).sum();
        WITH_PORTS.map(|(.., name)| of(name)).into_iter().max().unwrap_or(0)
    }
}

/// The guests' SNAT ports: of one guest or all, on one public address (or frontend, by name) or all.
pub fn snat(shared: &Shared, guest: Option<&str>, frontend: Option<&str>) -> Result<SnatUse, Failure> {
    let in_force = shared.in_force();
    if let Some(name) = guest
        && !in_force.has_guest(name)
    {
        return Err(no_guest(&in_force, name));
    }
    let wanted = frontend.map(|name| addresses_of(&in_force, name)).transpose()?;
    let used = PortUse::look(shared.flow_tables());
    let named = |found: &Guest<'_>| guest.is_none_or(|name| found.is_named(name));
    let mut guests = of_guests(shared, &in_force, &used, named, wanted.as_deref());
    guests.retain(|guest| wanted.is_none() || !guest.ports.is_empty());
    let reasons = shared.datapath().reasons()?;
    let count = |reason: Reason| reasons.get(reason as usize).map_or(0, |count| count.packets);
    let exhausted_packets = count(Reason::SnatExhausted) + count(Reason::SnatRefused);
    Ok(SnatUse { totals: totals(&guests), guests, exhausted_packets })
}

/// Every guest's ports on every public address.
pub fn guests(shared: &Shared, in_force: &InForce, used: &PortUse) -> Vec<GuestPorts> {
    of_guests(shared, in_force, used, |_| true, None)
}

fn of_guests(
    shared: &Shared,
    in_force: &InForce,
    used: &PortUse,
    named: impl Fn(&Guest<'_>) -> bool,
    wanted: Option<&[IpAddr]>,
) -> Vec<GuestPorts> {
    let allocations = Allocations::of(in_force);
    let guests = in_force.guests().filter(|guest| named(guest));
    let ports = guests.map(|guest| {
        let exhausted = shared.events.exhausted(guest.endpoint.network, guest.endpoint.address);
        guest_ports(in_force, &guest, &allocations, used, wanted, exhausted)
    });
    ports.collect()
}

/// The public addresses that a word means: an address, `lb/frontend`, or the name of a frontend.
pub(super) fn addresses_of(in_force: &InForce, word: &str) -> Result<Vec<IpAddr>, Failure> {
    if let Ok(address) = word.parse() {
        return Ok(vec![address]);
    }
    let network = &in_force.loaded.network;
    let mut found = Vec::new();
    for balancer in &network.load_balancers {
        for frontend in &balancer.frontends {
            if word == frontend.name || word == format!("{}/{}", balancer.name, frontend.name) {
                found.extend(frontend.public_addresses.iter().map(|&i| network.public_addresses[i].address));
            }
        }
    }
    if found.is_empty() {
        let word: String = word.chars().take(80).collect();
        return Err(Failure::input(format!(
            "there is no frontend `{word}` in the policy in force: give its name, lb/name or its address"
        )));
    }
    Ok(found)
}

fn guest_ports(
    in_force: &InForce,
    guest: &Guest<'_>,
    allocations: &Allocations,
    used: &PortUse,
    wanted: Option<&[IpAddr]>,
    exhausted_sampled: u64,
) -> GuestPorts {
    let mut rows: BTreeMap<(IpAddr, usize), (Units, Taken)> = BTreeMap::new();
    for (&(_, address, which), units) in allocations.of_endpoint(guest.number) {
        rows.entry((address, which)).or_default().0 = units.clone();
    }
    // Also where it has no ports any more: its flows there go on.
    for (holder, taken) in used.holders().filter(|(holder, _)| holder.hop == guest.endpoint.next_hop) {
        if let Some(which) = portcullis_common::policy::alloc_of(holder.protocol) {
            rows.entry((holder.frontend, which)).or_default().1 = taken.clone();
        }
    }
    rows.retain(|(address, _), _| wanted.is_none_or(|wanted| wanted.contains(address)));
    let mut ranges = Vec::new();
    let mut addresses: Vec<IpAddr> = rows.keys().map(|(address, _)| *address).collect();
    addresses.dedup();
    for &address in &addresses {
        let of_address = rows.iter().filter(|((a, _), _)| *a == address);
        let units: std::collections::BTreeSet<u16> =
            of_address.flat_map(|(_, (units, _))| units.claimable.iter().copied()).collect();
        let owned = port_ranges(units).into_iter();
        ranges.extend(owned.map(|(first, last)| OwnedPorts { address, first, last }));
    }
    let until = |address, which, units: &Units| draining_until(in_force, address, which, units);
    let ports: Vec<PortsOn> = rows
        .iter()
        .map(|(&(address, which), (units, taken))| {
            ports_on(address, which, units, taken, until(address, which, units))
        })
        .collect();
    GuestPorts {
        guest: guest.name.to_owned(),
        private_address: guest.address.to_string(),
        addresses,
        no_data_because: ports.is_empty().then(|| no_ports(in_force, guest)),
        ports,
        exhausted_sampled,
        ranges,
    }
}

/// The last moment at which one of the units is taken back.
fn draining_until(in_force: &InForce, address: IpAddr, which: usize, units: &Units) -> Option<String> {
    let owned = &in_force.compiled.ownership;
    let ends = units
        .draining
        .iter()
        .filter_map(|&unit| allocations::draining_until(owned, address, which == 1, unit));
    ends.max().map(unix)
}

fn ports_on(
    address: IpAddr,
    which: usize,
    units: &Units,
    taken: &Taken,
    draining_until: Option<String>,
) -> PortsOn {
    let mut on = PortsOn {
        frontend: address.to_string(),
        protocol: WITH_PORTS[which].2.to_owned(),
        allocated: units.ports(),
        draining: units.draining_ports(),
        draining_until,
        ..PortsOn::default()
    };
    for (&port, flows) in &taken.ports {
        if !units.may_claim(port) {
            on.draining_flows += flows.live;
            on.draining_used += u32::from(flows.live > 0);
        } else if flows.live > 0 {
            on.used += 1;
        } else {
            on.holding += 1;
        }
    }
    on.free = on.allocated.saturating_sub(on.used + on.holding);
    on.busiest = taken.busiest().map(|(to, ports)| Towards { destination: end(to.ip(), to.port()), ports });
    on
}

fn totals(guests: &[GuestPorts]) -> Vec<Total> {
    let of = |name: &str| {
        let rows = guests.iter().flat_map(|guest| &guest.ports).filter(|on| on.protocol == name);
        rows.fold(Total { protocol: name.to_owned(), ..Total::default() }, |sum, on| Total {
            allocated: sum.allocated + on.allocated,
            used: sum.used + on.used,
            holding: sum.holding + on.holding,
            free: sum.free + on.free,
            draining: sum.draining + on.draining,
            ..sum
        })
    };
    WITH_PORTS.map(|(.., name)| of(name)).into_iter().filter(|t| t.allocated + t.draining > 0).collect()
}

/// One guest's ports for one protocol (`ALLOC_*`): taken, and owned, on all public addresses. Where a port serves a flow for each
/// destination, those taken towards this one.
pub fn towards(
    guest: &Guest<'_>,
    allocations: &Allocations,
    used: &PortUse,
    which: usize,
    destination: Option<std::net::SocketAddr>,
) -> [u32; 2] {
    let mut sums = [0; 2];
    for (&(_, frontend, of), units) in allocations.of_endpoint(guest.number) {
        if of != which {
            continue;
        }
        let protocol = match (which, frontend) {
            (2, IpAddr::V6(_)) => 58,
            _ => WITH_PORTS[which].0,
        };
        let taken = used.of(Holder { hop: guest.endpoint.next_hop, frontend, protocol });
        let taken = taken.map_or(0, |taken| match destination {
            Some(to) => taken.destinations.get(&to).copied().unwrap_or(0),
            None => taken.ports.keys().filter(|&&port| units.may_claim(port)).count() as u32,
        });
        sums = [sums[0] + taken, sums[1] + units.ports()];
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::ports::tests::found;
    use super::*;

    fn row(protocol: u8, which: usize, flows: &[(&str, u16, bool)], quiet: &[u16]) -> PortsOn {
        let address: IpAddr = "203.0.113.10".parse().unwrap();
        let used = found(7, "203.0.113.10", protocol, flows, quiet);
        let units = Units { claimable: [128, 129].into(), draining: [130].into() };
        let taken = used.of(Holder { hop: 7, frontend: address, protocol }).unwrap();
        ports_on(address, which, &units, taken, None)
    }

    #[test]
    fn used_holding_and_free_are_all_that_is_allocated_and_drained_ports_are_apart() {
        let flows = [
            ("198.51.100.1:443", 1024, false),
            ("198.51.100.2:443", 1024, false),
            ("198.51.100.1:443", 1025, true),
            ("198.51.100.1:443", 1040, false),
            ("198.51.100.1:443", 1041, true),
        ];
        let on = row(6, 0, &flows, &[]);
        assert_eq!((on.allocated, on.used, on.holding, on.free), (16, 1, 1, 14));
        assert_eq!((on.draining, on.draining_flows), (8, 1));
        assert_eq!(on.busiest, Some(Towards { destination: "198.51.100.1:443".into(), ports: 4 }));
    }

    #[test]
    fn a_udp_socket_that_is_quiet_holds_its_port() {
        let on = row(17, 1, &[("198.51.100.1:53", 1024, false)], &[1024, 1030]);
        assert_eq!((on.used, on.holding, on.free), (1, 1, 14));
    }

    #[test]
    fn totals_are_by_protocol_and_leave_out_what_nobody_has() {
        let guest = |ports| GuestPorts { ports, ..GuestPorts::default() };
        let tcp = row(6, 0, &[("198.51.100.1:443", 1024, false)], &[]);
        let sums = totals(&[guest(vec![tcp.clone()]), guest(vec![tcp])]);
        assert_eq!(sums.len(), 1);
        assert_eq!((sums[0].allocated, sums[0].used, sums[0].free, sums[0].draining), (32, 2, 30, 16));
    }
}
