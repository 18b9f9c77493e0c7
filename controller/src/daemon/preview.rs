//! `plan`: what applying a policy would change, found out without applying it: everything up to the tables is worked out as
//! for `apply`, compared with what is in force, and thrown away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use portcullis_common::policy::{ALLOC_TCP, ALLOC_UDP};
use serde::{Deserialize, Serialize};

use super::inventory::{Inventory, inventory};
use super::plan::Plan;
use super::shared::InForce;
use crate::cli::table::Table;
use crate::compile::LiveUnits;
use crate::compile::ports::{MoveKind, moves};
use crate::flows::allocations::port_ranges;
use crate::policy::Loaded;
use crate::policy::network::{OnRuleChange, Snat};

/// What would change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    pub file: String,
    /// Would anything? Findings about the file are no change.
    pub changes: bool,
    /// Things of the policy, by their path.
    pub things: Vec<Change>,
    /// Who gains and loses which SNAT ports.
    pub ports: Vec<PortsMove>,
    /// Who would not get all the ports it is entitled to at once, because others' drain first.
    pub owed: Vec<Owed>,
    /// Live flows on the ports that drain: they go on until they end, at the latest until the grace is over.
    pub draining_flows: u32,
    /// The grace (`snat.drainMinutes`).
    pub drain_seconds: u32,
    /// Live flows that would end with the apply itself.
    pub flows_cut_now: u32,
    pub warnings: Vec<String>,
    /// Findings in the file that are no errors, with carets.
    pub findings: String,
}

/// A thing that is added, removed or changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// `networkSecurityGroups/web/securityRules/AllowSsh`
    pub path: String,
    /// `added`, `removed` or `changed`.
    pub change: String,
    /// What it is; `null` if it is not there yet.
    pub before: Option<String>,
    /// What it would be; `null` if it would be gone.
    pub after: Option<String>,
}

/// SNAT ports of one guest on one public address that change their owner or state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortsMove {
    pub guest: String,
    pub address: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `gains`, `drains` (nothing new is claimed there, live flows go on) or `frees`.
    pub change: String,
    pub ports: u32,
    /// Inclusive.
    pub ranges: Vec<(u16, u16)>,
    /// Live flows on them.
    pub flows: u32,
}

/// A guest that has to wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    pub guest: String,
    pub protocol: String,
    /// Ports it gets at once, and those it is entitled to.
    pub ports: u32,
    pub entitled: u32,
}

/// Units that move, and the live flows on them.
type Moving = (BTreeSet<u16>, u32);

/// Longest line about a thing that is told.
const LINE: usize = 400;

/// Compares what is in force with what a policy would come to.
pub fn preview(file: &Path, in_force: &InForce, loaded: &Loaded, plan: &Plan, live: &LiveUnits) -> Preview {
    let things = compare(&inventory(&in_force.loaded.network), &inventory(&loaded.network));
    let moved = moves(&in_force.compiled.ownership, &plan.compiled.ownership, live);
    let mut grouped: BTreeMap<(String, IpAddr, u8, &str), Moving> = BTreeMap::new();
    for unit in moved {
        let (change, flows) = match unit.what {
            MoveKind::Drains { flows } => ("drains", flows),
            MoveKind::Frees => ("frees", 0),
            MoveKind::Gains => ("gains", 0),
        };
        let key = (unit.member, unit.address, unit.protocol, change);
        let (units, sum) = grouped.entry(key).or_default();
        units.insert(unit.unit);
        *sum += flows;
    }
    let ports: Vec<PortsMove> = grouped
        .into_iter()
        .map(|((guest, address, protocol, change), (units, flows))| PortsMove {
            guest,
            address,
            protocol: if protocol == 6 { "tcp" } else { "udp" }.to_owned(),
            change: change.to_owned(),
            ports: units.len() as u32 * portcullis_common::policy::UNIT_PORTS,
            ranges: port_ranges(units),
            flows,
        })
        .collect();
    let again =
        (loaded.network.on_rule_change == OnRuleChange::Reevaluate && !things.is_empty()).then(|| {
            "onRuleChange is reevaluate: live flows are judged again, and those that are denied then end"
                .to_owned()
        });
    let tcp = plan.compiled.outbound.iter().zip(&plan.compiled.members).filter_map(|(of, guest)| {
        of.allocations[ALLOC_TCP].as_ref().map(|allocation| (allocation.ports, guest.as_str()))
    });
    let fewer = by_socket(&in_force.loaded.network.snat, &loaded.network.snat, tcp);
    Preview {
        file: file.display().to_string(),
        changes: !things.is_empty() || !ports.is_empty(),
        things,
        draining_flows: ports.iter().map(|moved| moved.flows).sum(),
        ports,
        owed: owed(plan),
        drain_seconds: loaded.network.snat.drain_seconds,
        flows_cut_now: 0,
        warnings: plan.compiled.warnings.iter().map(ToString::to_string).chain(again).chain(fewer).collect(),
        findings: loaded.warnings.render(false),
    }
}

/// What a change to one TCP port for each socket costs those who have so many ports: the same number is far less.
fn by_socket<'g>(before: &Snat, after: &Snat, tcp: impl Iterator<Item = (u32, &'g str)>) -> Option<String> {
    if before.tcp_port_per_socket || !after.tcp_port_per_socket {
        return None;
    }
    let (ports, guest) = tcp.min()?;
    Some(format!(
        "with `profile: rfc` a TCP port is one socket's towards everybody: {guest}, who has the fewest, can have {ports} sockets \
         connected in all, and no longer {ports} to each destination; connections that are open go on"
    ))
}

fn owed(plan: &Plan) -> Vec<Owed> {
    let mut waiting = Vec::new();
    for (of, guest) in plan.compiled.outbound.iter().zip(&plan.compiled.members) {
        for (which, protocol) in [(ALLOC_TCP, "tcp"), (ALLOC_UDP, "udp")] {
            if let Some(allocation) = of.allocations[which].as_ref().filter(|a| a.ports < a.entitled) {
                waiting.push(Owed {
                    guest: guest.clone(),
                    protocol: protocol.to_owned(),
                    ports: allocation.ports,
                    entitled: allocation.entitled,
                });
            }
        }
    }
    waiting
}

/// What is in one and not in the other, or not the same.
fn compare(before: &Inventory, after: &Inventory) -> Vec<Change> {
    let paths: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let change = |path: &String| {
        let (was, is) = (before.get(path), after.get(path));
        let word = match (was, is) {
            (None, _) => "added",
            (_, None) => "removed",
            (was, is) if was != is => "changed",
            _ => return None,
        };
        let line = |text: &String| text.chars().take(LINE).collect::<String>();
        Some(Change {
            path: path.clone(),
            change: word.to_owned(),
            before: was.map(line),
            after: is.map(line),
        })
    };
    paths.into_iter().filter_map(change).collect()
}

impl Preview {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = self.findings.clone();
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        for thing in &self.things {
            text += &match (&thing.before, &thing.after) {
                (None, Some(after)) => format!("+ {}: {after}\n", thing.path),
                (Some(before), None) => format!("- {}: {before}\n", thing.path),
                (before, after) => {
                    let [before, after] = [before, after].map(|line| line.as_deref().unwrap_or_default());
                    format!("~ {}\n    was {before}\n    is  {after}\n", thing.path)
                }
            };
        }
        if !self.ports.is_empty() {
            let mut table =
                Table::new(&["GUEST", "FRONTEND", "PROTO", "SNAT", "PORTS>", "LIVE FLOWS>", "WHICH"]);
            for moved in &self.ports {
                table.row([
                    moved.guest.clone(),
                    moved.address.to_string(),
                    moved.protocol.clone(),
                    moved.change.clone(),
                    moved.ports.to_string(),
                    moved.flows.to_string(),
                    ranges(&moved.ranges),
                ]);
            }
            text += "\n";
            text += &table.render("");
        }
        for owed in &self.owed {
            text += &format!(
                "{} gets {} of its {} {} ports at once, the rest as others drain\n",
                owed.guest, owed.ports, owed.entitled, owed.protocol
            );
        }
        if self.draining_flows > 0 {
            text += &format!(
                "{} live flows are on ports that drain: they go on, and those that still live after {} minutes are ended\n",
                self.draining_flows,
                self.drain_seconds / 60
            );
        }
        if !self.changes {
            return text + &format!("{} changes nothing\n", self.file);
        }
        let count = |word: &str| self.things.iter().filter(|thing| thing.change == word).count();
        let [added, changed, removed] = ["added", "changed", "removed"].map(count);
        text + &format!(
            "{}: {added} to add, {changed} to change, {removed} to remove; {} flows would be cut at once. Nothing was \
             done: `portcullis apply` does it\n",
            self.file, self.flows_cut_now
        )
    }
}

/// The first few.
fn ranges(all: &[(u16, u16)]) -> String {
    let shown: Vec<String> = all.iter().take(4).map(|(first, last)| format!("{first}-{last}")).collect();
    let more = all.len().saturating_sub(shown.len());
    let more = if more == 0 { String::new() } else { format!(" and {more} more ranges") };
    shown.join(", ") + &more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_fewest_ports_is_named_where_a_port_becomes_one_sockets() {
        let (azure, rfc) = (Snat::default(), Snat { tcp_port_per_socket: true, ..Snat::default() });
        let guests = || [(128, "vm1"), (64, "vm2")].into_iter();
        let said = by_socket(&azure, &rfc, guests()).unwrap();
        assert!(said.contains("vm2, who has the fewest, can have 64 sockets"), "{said}");
        assert_eq!(by_socket(&rfc, &rfc, guests()), None);
        assert_eq!(by_socket(&rfc, &azure, guests()), None);
        assert_eq!(by_socket(&azure, &rfc, [].into_iter()), None);
    }

    fn policy(rule: &str, extra: &str) -> Inventory {
        let path = std::env::temp_dir().join(format!(
            "pcd-preview-{}-{}.yaml",
            std::process::id(),
            rule.len() + extra.len()
        ));
        let text = format!(
            "publicIPAddresses: [{extra}{{ name: pip, ipAddress: 203.0.113.10, announce: proxy }}]
virtualNetworks: [{{ name: v, addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}, subnets: [{{ name: s, addressPrefix: 10.0.0.0/24 }}] }}]
networkInterfaces: [{{ name: vm1, device: tap1, networkSecurityGroup: g, ipConfigurations: [{{ subnet: s, privateIPAddress: 10.0.0.4, publicIPAddress: pip }}] }}]
networkSecurityGroups: [{{ name: g, securityRules: [{rule}] }}]
uplinks: [{{ device: up }}]
"
        );
        std::fs::write(&path, text).unwrap();
        let loaded = crate::policy::load(&path);
        std::fs::remove_file(&path).unwrap();
        inventory(&loaded.unwrap_or_else(|found| panic!("{}", found.render(false))).network)
    }

    const SSH: &str = "{ name: Ssh, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 22 }";

    #[test]
    fn the_same_policy_changes_nothing_though_its_indices_may_move() {
        let before = policy(SSH, "");
        assert_eq!(compare(&before, &policy(SSH, "")), []);
        let moved =
            compare(&before, &policy(SSH, "{ name: first, ipAddress: 203.0.113.9, announce: proxy }, "));
        assert_eq!(moved.len(), 1, "{moved:?}");
        assert_eq!((moved[0].path.as_str(), moved[0].change.as_str()), ("publicIPAddresses/first", "added"));
    }

    #[test]
    fn a_rule_that_is_added_changed_or_removed_is_told_by_its_group() {
        let with = policy(SSH, "");
        let path = "networkSecurityGroups/g/securityRules/Ssh";
        let changed = compare(&with, &policy(&SSH.replace("Allow", "Deny"), ""));
        assert_eq!(
            (changed.len(), changed[0].path.as_str(), changed[0].change.as_str()),
            (1, path, "changed")
        );
        assert_eq!(
            changed[0].before.as_deref(),
            Some("Inbound 100 Allow Tcp from Internet port * to * port 22")
        );
        let without = policy("", "");
        assert_eq!(compare(&with, &without)[0].change, "removed");
        assert_eq!(compare(&without, &with)[0].change, "added");
    }

    #[test]
    fn what_is_told_has_who_loses_which_ports_and_how_many_flows() {
        let moved = PortsMove {
            guest: "vm1/a".into(),
            address: [203, 0, 113, 10].into(),
            protocol: "tcp".into(),
            change: "drains".into(),
            ports: 512,
            ranges: vec![(1024, 1535)],
            flows: 7,
        };
        let owed = Owed { guest: "vm51/a".into(), protocol: "tcp".into(), ports: 64, entitled: 512 };
        let preview = Preview {
            file: "p.yaml".into(),
            changes: true,
            ports: vec![moved],
            owed: vec![owed],
            draining_flows: 7,
            drain_seconds: 3600,
            ..Preview::default()
        };
        let text = preview.text();
        for part in [
            "drains",
            "512",
            "1024-1535",
            "7 live flows",
            "60 minutes",
            "gets 64 of its 512 tcp ports",
            "0 flows would be cut",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(Preview { file: "p".into(), ..Preview::default() }.text().contains("p changes nothing"));
    }
}
