//! Who owns which unit: the state that outlives a policy (ADR 0008).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use portcullis_common::policy::UNIT_PORTS;
use serde::{Deserialize, Serialize};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Live flows by (public address, [`TCP`] or [`UDP`], unit). Echo counts with TCP, whose units it uses. A UDP socket or
/// echo identifier that holds a port counts as a flow.
pub type LiveUnits = HashMap<(IpAddr, u8, u16), u32>;

/// Everything that was handed out once and stays with who has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    pub frontends: BTreeMap<IpAddr, AddressUnits>,
    /// Place of an inbound NAT rule with a range -> frontend port -> member.
    #[serde(default)]
    pub nat: BTreeMap<String, BTreeMap<u16, String>>,
    /// Place of a rule under `snatAllocation: basic` -> the address it got.
    #[serde(default)]
    pub chosen: BTreeMap<String, IpAddr>,
}

/// Units of one public address: TCP and UDP are counted apart (`reference/azure.md` §2.2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressUnits {
    #[serde(with = "super::runs")]
    pub tcp: BTreeMap<u16, Owner>,
    #[serde(with = "super::runs")]
    pub udp: BTreeMap<u16, Owner>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// `vm1/ipconfig1`
    pub member: String,
    /// Unix seconds: no new claims, and what still lives then is ended. `None`: in use.
    pub draining_until: Option<u64>,
}

impl AddressUnits {
    /// Of [`TCP`], or of [`UDP`].
    pub fn of(&self, protocol: u8) -> &BTreeMap<u16, Owner> {
        if protocol == UDP { &self.udp } else { &self.tcp }
    }

    pub(super) fn of_mut(&mut self, protocol: u8) -> &mut BTreeMap<u16, Owner> {
        if protocol == UDP { &mut self.udp } else { &mut self.tcp }
    }

    fn both(&self) -> impl Iterator<Item = (u8, u16, &Owner)> {
        [TCP, UDP].into_iter().flat_map(|p| self.of(p).iter().map(move |(&unit, owner)| (p, unit, owner)))
    }
}

impl Ownership {
    /// Every owned unit: address, [`TCP`] or [`UDP`], unit, owner.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, u8, u16, &Owner)> {
        self.frontends
            .iter()
            .flat_map(|(&address, units)| units.both().map(move |(p, unit, owner)| (address, p, unit, owner)))
    }

    /// The units a member may claim ports of, by address and number.
    pub fn units_of(&self, member: &str, protocol: u8) -> Vec<(IpAddr, u16)> {
        let of = |owner: &Owner| owner.member == member && owner.draining_until.is_none();
        let mine = self.iter().filter(|&(_, p, _, owner)| p == protocol && of(owner));
        mine.map(|(address, _, unit, _)| (address, unit)).collect()
    }

    /// The owner of a port; it may drain.
    pub fn owner(&self, address: IpAddr, protocol: u8, port: u16) -> Option<&Owner> {
        self.frontends.get(&address)?.of(protocol).get(&(port / UNIT_PORTS as u16))
    }

    /// The owned ports of an address, of either protocol, as inclusive ranges, ascending.
    pub fn port_ranges(&self, address: IpAddr) -> Vec<(u16, u16)> {
        let units = self.frontends.get(&address).into_iter().flat_map(AddressUnits::both);
        merge(units.map(|(_, unit, _)| unit_ports(unit)).collect())
    }

    /// The units that drain: address, [`TCP`] or [`UDP`], unit, until when.
    pub fn draining(&self) -> impl Iterator<Item = (IpAddr, u8, u16, u64)> {
        self.iter().filter_map(|(address, p, unit, owner)| Some((address, p, unit, owner.draining_until?)))
    }
}

/// First and last port of a unit.
fn unit_ports(unit: u16) -> (u16, u16) {
    let first = unit * UNIT_PORTS as u16;
    (first, first + (UNIT_PORTS as u16 - 1))
}

/// Sorts inclusive ranges and joins those that touch.
pub(in crate::compile) fn merge(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                previous.1 = previous.1.max(last)
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}
