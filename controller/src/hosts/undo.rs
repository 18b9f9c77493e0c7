//! Putting back what the journal lists.

use std::fmt;

use anyhow::Result;
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};

use super::netlink::{errno, explained, is_absent, is_present};
use super::{Host, HostAddress, HostChange, Journal, Links, ethtool, sysctl};

/// What became of the changes that were to be undone, each with its description.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UndoReport {
    pub restored: Vec<String>,
    /// Nothing to undo any more: never made, or gone with its device.
    pub gone: Vec<String>,
    /// Left as it is because someone else changed it meanwhile, with what is there now. Struck from the journal.
    pub left: Vec<(String, String)>,
    /// Could not be undone, with the reason. Still in the journal, so that another `down` tries again.
    pub failed: Vec<(String, String)>,
}

impl UndoReport {
    /// Everything is as it was before, as far as we are concerned.
    pub fn is_clean(&self) -> bool {
        self.left.is_empty() && self.failed.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        self.is_clean() && self.restored.is_empty() && self.gone.is_empty()
    }
}

impl fmt::Display for UndoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for what in &self.restored {
            writeln!(f, "restored: {what}")?;
        }
        for what in &self.gone {
            writeln!(f, "already gone: {what}")?;
        }
        for (what, why) in &self.left {
            writeln!(f, "left alone: {what}: {why}")?;
        }
        for (what, why) in &self.failed {
            writeln!(f, "not restored: {what}: {why}")?;
        }
        Ok(())
    }
}

enum Outcome {
    Restored,
    Gone,
    Left(String),
}

impl Journal {
    /// Undoes everything listed, newest first, and strikes out what is done with.
    ///
    /// Detach the datapath first: a clsact qdisc that still carries filters is left alone. A single change that
    /// cannot be undone stops nothing; the error is the journal's own (it cannot be written, netlink is dead).
    pub async fn undo_all(&mut self, host: &Host) -> Result<UndoReport> {
        self.undo_if(host, |_| true).await
    }

    /// Undoes the listed changes that `wanted` picks, newest first.
    pub async fn undo_if(&mut self, host: &Host, wanted: impl Fn(&HostChange) -> bool) -> Result<UndoReport> {
        let chosen: Vec<HostChange> = self.changes().iter().rev().filter(|c| wanted(c)).cloned().collect();
        let mut report = UndoReport::default();
        if chosen.is_empty() {
            return Ok(report);
        }
        let links = host.links().await?;
        let mut done = Vec::with_capacity(chosen.len());
        for change in chosen {
            let what = change.to_string();
            match undo(host, &links, &change).await {
                Ok(Outcome::Restored) => report.restored.push(what),
                Ok(Outcome::Gone) => report.gone.push(what),
                Ok(Outcome::Left(why)) => report.left.push((what, why)),
                Err(error) => {
                    report.failed.push((what, format!("{error:#}")));
                    continue;
                }
            }
            done.push(change.key());
        }
        // Once, at the end: undoing again what is undone already does no harm, should we be killed before this.
        self.forget(&done)?;
        Ok(report)
    }
}

async fn undo(host: &Host, links: &Links, change: &HostChange) -> Result<Outcome> {
    let link = match change.ifindex() {
        Some(ifindex) => match links.by_index(ifindex) {
            Some(link) => Some(link),
            // Addresses, routes, neighbours, offloads and qdiscs all die with their device.
            None => return Ok(Outcome::Gone),
        },
        None => None,
    };
    match change {
        HostChange::AddressAdded { ifindex, address, .. } => remove_address(host, *ifindex, *address).await,
        HostChange::RouteAdded { ifindex, prefix, source, .. } => {
            done(host.remove_host_route(*ifindex, *prefix, *source).await)
        }
        HostChange::NeighbourAdded { ifindex, address, mac, .. } => {
            let removed = host.remove_neighbour(*ifindex, *address, *mac).await?;
            Ok(if removed { Outcome::Restored } else { Outcome::Gone })
        }
        HostChange::Sysctl { path, old, new, before } => restore_sysctl(path, old, new, before.as_deref()),
        HostChange::Offload { feature, old, .. } => {
            let Some(link) = link else { return Ok(Outcome::Gone) };
            match ethtool::feature(&link.name, feature)? {
                None => Ok(Outcome::Gone),
                Some(now) if now.on == *old => Ok(Outcome::Gone),
                Some(_) => ethtool::set_feature(&link.name, feature, *old).map(|()| Outcome::Restored),
            }
        }
        HostChange::ClsactAdded { ifindex, .. } => remove_clsact(host, *ifindex as i32).await,
    }
}

fn done(result: Result<(), rtnetlink::Error>) -> Result<Outcome> {
    match result {
        Ok(()) => Ok(Outcome::Restored),
        Err(error) if is_absent(&error) => Ok(Outcome::Gone),
        Err(error) => Err(explained(error)),
    }
}

/// Removes an address and puts back those the kernel removes with it: the secondaries of the same prefix, which
/// someone else added and which go with their primary unless `promote_secondaries` is set.
async fn remove_address(host: &Host, ifindex: u32, address: IpNet) -> Result<Outcome> {
    let ours = HostAddress { ifindex, address };
    let same_prefix = |other: &HostAddress| {
        other.ifindex == ifindex && *other != ours && other.address.trunc() == address.trunc()
    };
    let before = host.addresses().await?;
    if !before.contains(&ours) {
        return Ok(Outcome::Gone);
    }
    let outcome = done(host.remove_address(ifindex, address).await)?;
    if before.iter().any(same_prefix) {
        let after = host.addresses().await?;
        for lost in before.iter().filter(|other| same_prefix(other) && !after.contains(other)) {
            match host.add_address(ifindex, lost.address, false).await {
                Err(error) if !is_present(&error) => return Err(explained(error)),
                _ => log::info!("kept {} beside the removed {address}", lost.address),
            }
        }
    }
    Ok(outcome)
}

fn restore_sysctl(path: &str, old: &str, new: &str, before: Option<&str>) -> Result<Outcome> {
    let now = sysctl::read(path)?;
    if sysctl::same(path, &now, old) {
        return Ok(Outcome::Gone);
    }
    let ours = sysctl::same(path, &now, new) || before.is_some_and(|before| sysctl::same(path, &now, before));
    if !ours {
        return Ok(Outcome::Left(format!(
            "it is `{now}` now, which is neither ours (`{new}`) nor what it was (`{old}`); set it yourself if \
             that is not wanted"
        )));
    }
    sysctl::write(path, old)?;
    Ok(Outcome::Restored)
}

async fn remove_clsact(host: &Host, ifindex: i32) -> Result<Outcome> {
    for egress in [false, true] {
        let request = host.handle().traffic_filter(ifindex).get();
        let request = if egress { request.egress() } else { request.ingress() };
        let filters: Vec<_> = match request.execute().try_collect().await {
            Ok(filters) => filters,
            // Without the qdisc the kernel calls the parent invalid.
            Err(error) if errno(&error) == Some(libc::EINVAL) || is_absent(&error) => Vec::new(),
            Err(error) => return Err(explained(error)),
        };
        if !filters.is_empty() {
            let side = if egress { "egress" } else { "ingress" };
            return Ok(Outcome::Left(format!("it still carries {side} filters (see `tc filter show`)")));
        }
    }
    let mut request = host.handle().qdisc().del(ifindex);
    request.message_mut().header.parent = TcHandle::CLSACT;
    request.message_mut().header.handle = TcHandle { major: 0xffff, minor: 0 };
    // With its kind, so that an `ingress` qdisc in the same place is not taken for ours.
    request.message_mut().attributes.push(TcAttribute::Kind("clsact".into()));
    match request.execute().await {
        Err(error) if errno(&error) == Some(libc::EINVAL) => Ok(Outcome::Gone),
        result => done(result),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::hosts::testing::{Lab, Scratch, needs_root};

    #[test]
    fn a_journal_written_before_a_crash_undoes_to_nothing_what_was_never_done() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        let directory = Scratch::new();
        let path = directory.0.clone();
        lab.run(move || async move {
            let host = Host::open().unwrap();
            let ifindex = host.links().await.unwrap().get("v0").unwrap().ifindex;
            let device = "v0".to_string();
            let address = "192.0.2.7/32".parse().unwrap();
            let prefix: IpNet = "10.0.0.4/32".parse().unwrap();
            let gone = |change: HostChange| change;
            Journal::open(&path)
                .unwrap()
                .record([
                    HostChange::AddressAdded { device: device.clone(), ifindex, address },
                    HostChange::RouteAdded { device: device.clone(), ifindex, prefix, source: None },
                    HostChange::NeighbourAdded {
                        device: device.clone(),
                        ifindex,
                        address: "10.0.0.4".parse().unwrap(),
                        mac: [2; 6],
                    },
                    HostChange::Sysctl {
                        path: sysctl::RESERVED_PORTS.into(),
                        old: String::new(),
                        new: "80".into(),
                        before: None,
                    },
                    HostChange::Offload { device, ifindex, feature: "rx-vlan-hw-parse".into(), old: true },
                    HostChange::ClsactAdded { device: "v0".into(), ifindex },
                    gone(HostChange::AddressAdded { device: "tap9".into(), ifindex: 9999, address }),
                ])
                .unwrap();
            // The process dies here; another one runs `down`.
            let mut journal = Journal::open(&path).unwrap();
            let report = journal.undo_all(&host).await.unwrap();
            assert_eq!(report.gone.len(), 7, "{report}");
            assert!(report.is_clean() && report.restored.is_empty(), "{report}");
            assert!(journal.changes().is_empty());
            assert!(journal.undo_all(&host).await.unwrap().is_empty());
        });
    }

    #[test]
    fn everything_that_was_done_is_restored_in_reverse_order() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        lab.ip(&["link", "set", "v0", "up"]);
        lab.ip(&["neigh", "add", "10.0.0.9", "lladdr", "02:02:02:02:02:02", "dev", "v0", "nud", "permanent"]);
        let tc = Command::new("tc").args(["-n", lab.name(), "qdisc", "add", "dev", "v0", "clsact"]).status();
        assert!(tc.unwrap().success());
        let directory = Scratch::new();
        let path = directory.0.clone();
        lab.run(move || async move {
            let host = Host::open().unwrap();
            let ifindex = host.links().await.unwrap().get("v0").unwrap().ifindex;
            let device = || "v0".to_string();
            let address: IpNet = "10.0.0.1/24".parse().unwrap();
            let prefix: IpNet = "10.7.0.4/32".parse().unwrap();
            let source = Some(address.addr());
            let mut journal = Journal::open(&path).unwrap();
            journal
                .record([
                    HostChange::AddressAdded { device: device(), ifindex, address },
                    HostChange::RouteAdded { device: device(), ifindex, prefix, source },
                    HostChange::NeighbourAdded {
                        device: device(),
                        ifindex,
                        address: "10.0.0.9".parse().unwrap(),
                        mac: [2; 6],
                    },
                    HostChange::Sysctl {
                        path: sysctl::RESERVED_PORTS.into(),
                        old: "22".into(),
                        new: "22,80-90".into(),
                        before: None,
                    },
                    HostChange::Offload {
                        device: device(),
                        ifindex,
                        feature: "rx-vlan-hw-parse".into(),
                        old: true,
                    },
                    HostChange::ClsactAdded { device: device(), ifindex },
                ])
                .unwrap();
            host.add_address(ifindex, address, false).await.unwrap();
            host.add_host_route(ifindex, prefix, source).await.unwrap();
            sysctl::write(sysctl::RESERVED_PORTS, "22,80-90").unwrap();
            ethtool::set_feature("v0", "rx-vlan-hw-parse", false).unwrap();
            // Someone else's address in the same prefix, which the kernel makes a secondary of ours.
            host.add_address(ifindex, "10.0.0.77/24".parse().unwrap(), false).await.unwrap();

            let report = journal.undo_all(&host).await.unwrap();
            assert_eq!(report.restored.len(), 6, "{report}");
            assert!(report.restored[0].contains("clsact") && report.restored[5].contains("10.0.0.1/24"));
            let addresses: Vec<_> = host.addresses().await.unwrap();
            let v4 = |a: &&HostAddress| a.ifindex == ifindex && a.address.addr().is_ipv4();
            let on_v0 = addresses.iter().filter(v4).map(|a| a.address.to_string());
            assert_eq!(on_v0.collect::<Vec<_>>(), ["10.0.0.77/24"]);
            assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "22");
            assert!(ethtool::feature("v0", "rx-vlan-hw-parse").unwrap().unwrap().on);
            assert!(host.neighbours().await.unwrap().iter().all(|n| n.mac != Some([2; 6])));
        });
        let qdiscs =
            Command::new("tc").args(["-n", lab.name(), "qdisc", "show", "dev", "v0"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&qdiscs.stdout).contains("clsact"));
    }

    #[test]
    fn a_sysctl_changed_by_someone_else_meanwhile_is_left_alone_and_reported() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let directory = Scratch::new();
        let path = directory.0.clone();
        lab.run(move || async move {
            let host = Host::open().unwrap();
            let mut journal = Journal::open(&path).unwrap();
            let ports = |old: &str, new: &str| HostChange::Sysctl {
                path: sysctl::RESERVED_PORTS.into(),
                old: old.into(),
                new: new.into(),
                before: None,
            };
            journal.record([ports("", "80")]).unwrap();
            sysctl::write(sysctl::RESERVED_PORTS, "80,9999").unwrap();
            let report = journal.undo_all(&host).await.unwrap();
            assert_eq!(report.left.len(), 1, "{report}");
            assert!(report.left[0].1.contains("80,9999"), "{report}");
            assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "80,9999");
            // Reported once; it is not ours any more.
            assert!(journal.changes().is_empty());

            // Killed between journaling our second value and setting it: the first is still recognised as ours.
            sysctl::write(sysctl::RESERVED_PORTS, "80").unwrap();
            journal.record([ports("", "80")]).unwrap();
            journal.record([ports("80", "80-81")]).unwrap();
            let report = journal.undo_all(&host).await.unwrap();
            assert_eq!(report.restored.len(), 1, "{report}");
            assert_eq!(sysctl::read(sysctl::RESERVED_PORTS).unwrap(), "");
        });
    }

    #[test]
    fn a_clsact_that_carries_someone_elses_filter_is_left() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        let tc = |arguments: &[&str]| {
            Command::new("tc").args(["-n", lab.name()]).args(arguments).status().unwrap()
        };
        assert!(tc(&["qdisc", "add", "dev", "v0", "clsact"]).success());
        // Classic BPF: one instruction, "return everything".
        let filter = ["filter", "add", "dev", "v0", "egress", "bpf", "da", "bytecode", "1,6 0 0 4294967295,"];
        if !tc(&filter).success() {
            eprintln!("skipped: this kernel has no bpf classifier");
            return;
        }
        let directory = Scratch::new();
        let path = directory.0.clone();
        let report = lab.run(move || async move {
            let host = Host::open().unwrap();
            let ifindex = host.links().await.unwrap().get("v0").unwrap().ifindex;
            let mut journal = Journal::open(&path).unwrap();
            journal.record([HostChange::ClsactAdded { device: "v0".into(), ifindex }]).unwrap();
            journal.undo_all(&host).await.unwrap()
        });
        assert_eq!(report.left.len(), 1, "{report}");
    }
}
