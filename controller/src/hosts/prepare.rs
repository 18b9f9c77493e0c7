//! Making the host what a policy wants, and unmaking what the next policy no longer wants.
//!
//! Order for a change of policy: `prepare` with the new one, put its tables in force, `unprepare_stale` with the new
//! one. If anything fails in between, `unprepare_stale` and then `prepare` with the *old* policy take back what was
//! new.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use anyhow::{Context, Result};

use super::guest_routes::DeviceRoute;
use super::links::Links;
use super::netlink::{explained, is_present};
use super::sysctl::{self, RESERVED_PORTS, Ranges};
use super::wishes::{Purpose, Wish, wishes};
use super::{DeviceChoice, Host, HostAddress, HostChange, Journal, UndoReport, ethtool};
use crate::policy::network::Network;

/// What `prepare` did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prepared {
    /// The changes made now; empty when the host was right already.
    pub made: Vec<String>,
    /// What could not be had although the gateway works without it.
    pub warnings: Vec<String>,
    /// Devices that do not exist or are not up yet: call `prepare` again when `Watch` reports them.
    pub waiting: Vec<String>,
}

/// What the host has at the moment.
struct State<'a> {
    addresses: Vec<HostAddress>,
    /// Every unicast route of the main table with a device, best metric per prefix.
    routes: Vec<DeviceRoute>,
    /// What we made, by key.
    journal: HashMap<String, &'a HostChange>,
    /// Keys of what we made and this policy does not want: as good as gone.
    stale: HashSet<String>,
}

impl State<'_> {
    fn is_stale(&self, address: &HostAddress) -> bool {
        let HostAddress { ifindex, address } = *address;
        self.stale.contains(&HostChange::AddressAdded { device: String::new(), ifindex, address }.key())
    }

    /// Our own entry for a route the host has.
    fn ours(&self, route: &DeviceRoute) -> Option<&HostChange> {
        let DeviceRoute { ifindex, prefix, source, .. } = *route;
        let entry = HostChange::RouteAdded { device: String::new(), ifindex, prefix, source };
        self.journal.get(&entry.key()).copied()
    }
}

/// Makes true what the policy wants of the host and is not yet: addresses, the host's routes to guests, reserved
/// ports, offloads. Everything that has to be changed is in the journal, on disk, before the first change is made.
///
/// What the host has already, by whoever's hand, is left untouched and not journaled. `choices` come from
/// `choose_hooks`, `reserved` are the ports to keep the host's own sockets away from (only used with
/// `reserveHostPorts`). Run on a thread in the namespace `host` was opened in.
///
/// Errors: the journal cannot be written; a public address cannot be added; ports cannot be reserved. Whatever was
/// done until then is in the journal. Failures that only cost the host its own way to a guest are warnings.
pub async fn prepare(
    host: &Host,
    network: &Network,
    links: &Links,
    choices: &[DeviceChoice],
    reserved: &Ranges,
    journal: &mut Journal,
) -> Result<Prepared> {
    let wanted = wishes(network, links, choices, reserved);
    let mut prepared =
        Prepared { made: Vec::new(), warnings: wanted.warnings.clone(), waiting: wanted.missing.clone() };
    let everywhere: Vec<u32> = links.iter().map(|link| link.ifindex).collect();
    let addresses = host.addresses().await?;
    let routes = host.device_routes(&everywhere).await?;

    let mut needed: Vec<(Wish, HostChange)> = Vec::new();
    let mut in_the_way: Vec<DeviceRoute> = Vec::new();
    {
        let keys = wanted.keys();
        let known = journal.by_key();
        let stale = known.keys().filter(|key| !keys.contains(*key)).cloned().collect();
        let state = State { addresses, routes, journal: known, stale };
        for wish in wanted.all {
            if let Some(change) = needed_change(&wish, links, &state, &mut prepared, &mut in_the_way)? {
                needed.push((wish, change));
            }
        }
    }
    // Before the new entries are journaled: killed in between, the old ones undo to nothing.
    for route in in_the_way {
        // Gone already is what is wanted; anything else shows when the new one is added.
        let _ = host.remove_host_route(route.ifindex, route.prefix, route.source).await;
    }
    journal.record(needed.iter().map(|(_, change)| change.clone()))?;
    for (wish, change) in needed {
        match make(host, &wish, &change).await {
            Ok(true) => prepared.made.push(change.to_string()),
            // Someone else was quicker: it is theirs.
            Ok(false) => journal.forget(&[change.key()])?,
            Err(error) => match wish {
                Wish::Address { purpose: Purpose::Announce, .. } | Wish::ReservedPorts(_) => {
                    return Err(error.context(format!("cannot make the {change}")));
                }
                _ => {
                    prepared.warnings.push(format!("no {change}: {error:#}"));
                    journal.forget(&[change.key()])?;
                }
            },
        }
    }
    prepared.waiting.sort();
    prepared.waiting.dedup();
    Ok(prepared)
}

/// Undoes, one by one, what `prepare` made for an earlier policy and this one does not want. Neighbours and
/// clsact qdiscs, which `prepare` does not make, stay.
pub async fn unprepare_stale(
    host: &Host,
    network: &Network,
    links: &Links,
    choices: &[DeviceChoice],
    reserved: &Ranges,
    journal: &mut Journal,
) -> Result<UndoReport> {
    let keys = wishes(network, links, choices, reserved).keys();
    let stale = |change: &HostChange| match change {
        HostChange::NeighbourAdded { .. } | HostChange::ClsactAdded { .. } => false,
        _ => !keys.contains(&change.key()),
    };
    journal.undo_if(host, stale).await
}

/// The journal entry for what has to be done, or `None` when the wish is fulfilled or has to wait. Routes of ours
/// that have to go first, since the kernel takes no second one to the same prefix, are added to `in_the_way`.
fn needed_change(
    wish: &Wish,
    links: &Links,
    state: &State<'_>,
    prepared: &mut Prepared,
    in_the_way: &mut Vec<DeviceRoute>,
) -> Result<Option<HostChange>> {
    match wish {
        Wish::Address { device, ifindex, address, purpose } => {
            if address.addr().is_ipv6() && !ready_for_ipv6(device, *purpose, links, prepared) {
                return Ok(None);
            }
            let is_there = state.addresses.iter().any(|known| {
                // Whatever its prefix length: the host may have its own idea of this subnet.
                known.address.addr() == address.addr()
                    && (*purpose == Purpose::Announce || known.ifindex == *ifindex)
                    && !state.is_stale(known)
            });
            Ok((!is_there).then(|| wish.change(String::new())))
        }
        Wish::Route { device, ifindex, prefix, source } => {
            if !links.get(device).is_some_and(|link| link.up) {
                prepared.waiting.push(device.clone());
                return Ok(None);
            }
            if prefix.addr().is_ipv6() && !ready_for_ipv6(device, Purpose::GuestGateway, links, prepared) {
                return Ok(None);
            }
            if let Some(exact) = state.routes.iter().find(|route| route.prefix == *prefix) {
                if exact.ifindex == *ifindex && exact.source == Some(*source) {
                    return Ok(None);
                }
                if state.ours(exact).is_some() {
                    // The guest moved to another device, or its gateway got another address.
                    in_the_way.push(exact.clone());
                    return Ok(Some(wish.change(String::new())));
                }
                if exact.ifindex != *ifindex {
                    let by = links.by_index(exact.ifindex).map_or("another device", |link| &link.name);
                    prepared.warnings.push(format!(
                        "the host has a route to {prefix} by {by}, left as it is: it does not reach the guest on \
                         {device}"
                    ));
                }
                return Ok(None);
            }
            let covered = longest(&state.routes, prefix.addr())
                .is_some_and(|route| route.ifindex == *ifindex && route.direct);
            Ok((!covered).then(|| wish.change(String::new())))
        }
        Wish::ReservedPorts(ranges) => {
            let now = sysctl::read(RESERVED_PORTS)?;
            // Ours of before is not the base: a smaller wish must give ports back.
            let base = match state.journal.get(&wish.key()) {
                Some(HostChange::Sysctl { old, new, before, .. })
                    if sysctl::same(RESERVED_PORTS, &now, new)
                        || before
                            .as_ref()
                            .is_some_and(|before| sysctl::same(RESERVED_PORTS, &now, before)) =>
                {
                    old.clone()
                }
                _ => now.clone(),
            };
            let merged = base.parse::<Ranges>()?.union(ranges);
            let right = sysctl::same(RESERVED_PORTS, &now, &merged.to_string());
            Ok((!right).then(|| Wish::ReservedPorts(merged).change(now)))
        }
        Wish::OffloadOff { device, feature, .. } => match ethtool::feature(device, feature) {
            Ok(Some(now)) if now.on && now.changeable => Ok(Some(wish.change(String::new()))),
            Ok(Some(now)) if now.on => {
                prepared.warnings.push(format!(
                    "{feature} of {device} is on and its driver keeps it so: XDP may not see every packet as it \
                     came; set `hook: tc` on {device} if VLAN tags or large merged packets arrive there"
                ));
                Ok(None)
            }
            Ok(_) => Ok(None),
            Err(error) => {
                prepared.warnings.push(format!("{error:#}"));
                Ok(None)
            }
        },
    }
}

/// Can the device have addresses and routes of IPv6 now? The kernel takes them away from a device that goes down.
fn ready_for_ipv6(device: &str, purpose: Purpose, links: &Links, prepared: &mut Prepared) -> bool {
    if !links.get(device).is_some_and(|link| link.up) {
        prepared.waiting.push(device.to_owned());
        return false;
    }
    let Some(why) = sysctl::without_ipv6(device) else { return true };
    let warning = match purpose {
        Purpose::Announce => format!(
            "{device} has no IPv6 ({why}): public IPv6 addresses with `announce: address` cannot be put on it, and nobody \
             outside finds them"
        ),
        _ => format!(
            "{device} has no IPv6 ({why}): the host itself has no gateway address there and does not reach the IPv6 \
             guests behind it; guests are served all the same"
        ),
    };
    if !prepared.warnings.contains(&warning) {
        prepared.warnings.push(warning);
    }
    false
}

fn longest(routes: &[DeviceRoute], destination: IpAddr) -> Option<&DeviceRoute> {
    let matching = routes.iter().filter(|route| route.prefix.contains(&destination));
    matching.max_by_key(|route| route.prefix.prefix_len())
}

/// Makes one change; false when it turned out to be there already.
async fn make(host: &Host, wish: &Wish, change: &HostChange) -> Result<bool> {
    let result = match wish {
        Wish::Address { ifindex, address, purpose, .. } => {
            host.add_address(*ifindex, *address, purpose.is_shy(*address)).await
        }
        Wish::Route { ifindex, prefix, source, .. } => {
            host.add_host_route(*ifindex, *prefix, Some(*source)).await
        }
        Wish::ReservedPorts(_) => {
            let HostChange::Sysctl { path, new, .. } = change else { return Ok(false) };
            return sysctl::write(path, new).map(|()| true).context("the host's ports cannot be reserved");
        }
        Wish::OffloadOff { device, feature, .. } => {
            return ethtool::set_feature(device, feature, false).map(|()| true);
        }
    };
    match result {
        Ok(()) => Ok(true),
        Err(error) if is_present(&error) => Ok(false),
        Err(error) => Err(explained(error)),
    }
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "prepare_ipv6_tests.rs"]
mod ipv6_tests;
