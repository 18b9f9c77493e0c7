//! Rules of policy routing, VRFs among them: the datapath follows the main table alone.
//!
//! A guest's packet takes the way that the main table shows for it, whatever mark, device or source a rule of this host asks
//! for; the few that TC leaves to the kernel (a next hop that is not resolved) take the rules' way. So a host that has rules is
//! warned. A VRF shows here too: the kernel adds its `l3mdev` rule with the first one.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::IpVersion;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::Host;
use super::netlink::explained;

/// RT_TABLE_DEFAULT, RT_TABLE_MAIN and RT_TABLE_LOCAL, with the priorities at which every host has them.
const EVERYWHERE: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];
/// Rules told one by one; more are counted.
const TOLD: usize = 4;

impl Host {
    /// One warning for each family that has rules beyond those of every host; none where it cannot be asked (a kernel
    /// without CONFIG_IP_MULTIPLE_TABLES has no rules).
    pub async fn rule_warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (version, family) in [(IpVersion::V4, "IPv4"), (IpVersion::V6, "IPv6")] {
            match self.rules(version).await {
                Ok(rules) => warnings.extend(warning(family, &rules)),
                Err(error) => log::debug!("{error:#}"),
            }
        }
        warnings
    }

    async fn rules(&self, version: IpVersion) -> Result<Vec<RuleMessage>> {
        let rules = self.handle().rule().get(version).execute();
        rules.try_collect().await.map_err(explained).context("cannot read this host's routing rules")
    }
}

fn warning(family: &str, rules: &[RuleMessage]) -> Option<String> {
    let others: Vec<String> = rules.iter().filter(|rule| !is_everywhere(rule)).map(describe).collect();
    if others.is_empty() {
        return None;
    }
    let more = match others.len().saturating_sub(TOLD) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "this host has routing rules for {family} that guests' packets do not follow ({}{more}): the gateway takes the main \
         table's routes; put what guests need there, or remove the rules (`ip rule`)",
        others[..others.len().min(TOLD)].join("; ")
    ))
}

fn is_everywhere(rule: &RuleMessage) -> bool {
    let (mut priority, mut table, mut plain) = (0, u32::from(rule.header.table), true);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            // Says who made it, and nothing of what it asks for; -1 is "no".
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => plain = false,
        }
    }
    plain
        && rule.header.action == RuleAction::ToTable
        && (rule.header.src_len, rule.header.dst_len) == (0, 0)
        && EVERYWHERE.contains(&(priority, table))
}

/// As `ip rule` says it, as far as people need to find it there.
fn describe(rule: &RuleMessage) -> String {
    let (mut priority, mut table) = (0, u32::from(rule.header.table));
    let any = match rule.header.family {
        AddressFamily::Inet6 => "::",
        _ => "0.0.0.0",
    };
    let mut asks = String::new();
    for attribute in &rule.attributes {
        // Writing to a string does not fail.
        let _ = match attribute {
            RuleAttribute::Priority(value) => {
                priority = *value;
                Ok(())
            }
            RuleAttribute::Table(value) => {
                table = *value;
                Ok(())
            }
            RuleAttribute::Source(from) => write!(asks, " from {from}/{}", rule.header.src_len),
            RuleAttribute::Destination(to) => write!(asks, " to {to}/{}", rule.header.dst_len),
            RuleAttribute::Iifname(device) => write!(asks, " iif {device}"),
            RuleAttribute::Oifname(device) => write!(asks, " oif {device}"),
            RuleAttribute::FwMark(mark) => write!(asks, " fwmark {mark:#x}"),
            RuleAttribute::L3MDev(true) => write!(asks, " of a VRF"),
            _ => Ok(()),
        };
    }
    if asks.is_empty() {
        asks = format!(" from {any}/0");
    }
    let does = match rule.header.action {
        RuleAction::ToTable if table == 0 => String::new(),
        RuleAction::ToTable => format!(" lookup {table}"),
        other => format!(" {other:?}").to_lowercase(),
    };
    format!("{priority}:{asks}{does}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn rules_beyond_those_of_every_host_are_warned_of_by_family() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let warnings = || lab.run(|| async { Host::open().unwrap().rule_warnings().await });
        assert_eq!(warnings(), [""; 0], "what every host has is no news");
        lab.ip(&["rule", "add", "from", "10.0.0.0/8", "lookup", "100", "priority", "500"]);
        lab.ip(&["rule", "add", "fwmark", "0x7", "lookup", "main", "priority", "501"]);
        let found = warnings();
        assert_eq!(found.len(), 1, "{found:?}");
        for part in ["IPv4", "500: from 10.0.0.0/8 lookup 100; 501: fwmark 0x7 lookup 254", "ip rule"] {
            assert!(found[0].contains(part), "{part}: {found:?}");
        }
        lab.ip(&["-6", "rule", "add", "iif", "lo", "lookup", "7", "priority", "9"]);
        let found = warnings();
        assert!(
            found.len() == 2 && found[1].contains("IPv6") && found[1].contains("9: iif lo lookup 7"),
            "{found:?}"
        );
        // A rule of a VRF's kind; devices of that kind want a kernel that has them.
        lab.ip(&["rule", "del", "priority", "500"]);
        lab.ip(&["rule", "del", "priority", "501"]);
        for priority in 600..606 {
            lab.ip(&["rule", "add", "from", "10.0.0.0/8", "unreachable", "priority", &priority.to_string()]);
        }
        let found = warnings();
        assert!(
            found[0].contains("600: from 10.0.0.0/8 unreachable") && found[0].contains("and 2 more"),
            "{found:?}"
        );
    }

    #[test]
    fn the_rule_that_comes_with_a_vrf_is_told_as_one() {
        let mut rule = RuleMessage::default();
        rule.header.family = AddressFamily::Inet;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Priority(1000), RuleAttribute::L3MDev(true)];
        assert_eq!(describe(&rule), "1000: of a VRF");
        assert!(warning("IPv4", &[rule]).is_some());
    }
}
