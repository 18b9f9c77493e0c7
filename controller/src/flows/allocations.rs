//! Who may claim which ports under the policy in force, and which drain: read from its tables, which is what the kernel does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::policy::{ADDRESS_UNITS, Frontend, UNIT_PORTS};

use super::list::address;
use crate::compile::Ownership;
use crate::compile::ports;
use crate::daemon::InForce;
use crate::datapath::address6;

/// The three protocols that have ports, as answers name them: IANA number of IPv4, number of the allocation, name.
pub const WITH_PORTS: [(u8, usize, &str); 3] = [(6, 0, "tcp"), (17, 1, "udp"), (1, 2, "icmp")];

/// Whose: endpoint, public address, which allocation (`ALLOC_*`).
pub type Key = (usize, IpAddr, usize);

/// Units of 8 ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Units {
    /// New flows may claim ports of these.
    pub claimable: BTreeSet<u16>,
    /// These still have their owner, for the flows that are on them.
    pub draining: BTreeSet<u16>,
}

/// All of them, in the order of the endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocations(BTreeMap<Key, Units>);

impl Allocations {
    /// Those of the policy in force.
    pub fn of(in_force: &InForce) -> Self {
        let image = in_force.image();
        let header = image.header();
        let frontends: Vec<IpAddr> =
            (0..header.frontends_used).map(|number| public(&image.frontend(number))).collect();
        let mut all: BTreeMap<Key, Units> = BTreeMap::new();
        for guest in in_force.guests() {
            for (_, which, _) in WITH_PORTS {
                for (frontend, unit) in image.units(&guest.endpoint, which) {
                    let Some(&address) = frontends.get(frontend as usize) else { continue };
                    let units = all.entry((guest.number, address, which)).or_default();
                    units.claimable.insert(unit as u16);
                }
            }
        }
        for (number, &address) in frontends.iter().enumerate() {
            for (udp, which) in [(false, 0), (true, 1)] {
                for unit in 0..ADDRESS_UNITS as u16 {
                    let port = unit * UNIT_PORTS as u16;
                    let Some(owner) = image.owner(number as u32, udp, port) else { continue };
                    let key = (owner as usize, address, which);
                    if !all.get(&key).is_some_and(|units| units.claimable.contains(&unit)) {
                        all.entry(key).or_default().draining.insert(unit);
                    }
                }
            }
        }
        Self(all)
    }

    /// One endpoint's, by public address and allocation.
    pub fn of_endpoint(&self, number: usize) -> impl Iterator<Item = (&Key, &Units)> {
        let first = (number, IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        self.0.range(first..).take_while(move |((endpoint, ..), _)| *endpoint == number)
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Units)> {
        self.0.iter()
    }

    /// Does any endpoint have ports?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What one endpoint has on one address.
    pub fn get(&self, key: &Key) -> Option<&Units> {
        self.0.get(key)
    }
}

impl Units {
    /// Ports new flows may claim.
    pub fn ports(&self) -> u32 {
        self.claimable.len() as u32 * UNIT_PORTS
    }

    /// Ports that drain.
    pub fn draining_ports(&self) -> u32 {
        self.draining.len() as u32 * UNIT_PORTS
    }

    /// May new flows claim this port?
    pub fn may_claim(&self, port: u16) -> bool {
        self.claimable.contains(&(port / UNIT_PORTS as u16))
    }
}

/// Until when a unit drains, Unix seconds; `None`: it does not.
pub fn draining_until(ownership: &Ownership, address: IpAddr, udp: bool, unit: u16) -> Option<u64> {
    let units = ownership.frontends.get(&address)?.of(if udp { ports::UDP } else { ports::TCP });
    units.get(&unit)?.draining_until
}

/// First and last port of runs of units.
pub fn port_ranges(units: impl IntoIterator<Item = u16>) -> Vec<(u16, u16)> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for unit in units {
        let first = unit * UNIT_PORTS as u16;
        let last = first + (UNIT_PORTS as u16 - 1);
        match ranges.last_mut() {
            Some(range) if u32::from(range.1) + 1 == u32::from(first) => range.1 = last,
            _ => ranges.push((first, last)),
        }
    }
    ranges
}

/// The address of a frontend record.
pub fn public(frontend: &Frontend) -> IpAddr {
    if frontend.address6 == [0; 4] {
        IpAddr::V4(address(frontend.address))
    } else {
        IpAddr::V6(address6(frontend.address6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_units_are_one_range_up_to_the_last_port() {
        assert_eq!(port_ranges([128, 129, 131]), [(1024, 1039), (1048, 1055)]);
        assert_eq!(port_ranges([8190, 8191]), [(65520, 65535)]);
        assert_eq!(port_ranges([]), []);
    }

    #[test]
    fn a_frontend_has_one_address_of_either_family() {
        use portcullis_common::layout::{v4, v6};
        let four: IpAddr = "203.0.113.10".parse().unwrap();
        let six: IpAddr = "2001:db8:ffff::10".parse().unwrap();
        let record =
            |address| Frontend { address: v4(address), address6: v6(address), ..Frontend::default() };
        assert_eq!([public(&record(four)), public(&record(six))], [four, six]);
    }
}
