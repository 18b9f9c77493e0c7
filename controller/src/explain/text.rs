//! An explanation for people.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::Explanation;
use crate::api::Protocol;
use crate::cli::table::Table;

impl Explanation {
    /// For people: the verdict first, then how it came about.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let end = |address: Ipv4Addr, port: u16| match self.protocol {
            Protocol::Icmp => address.to_string(),
            _ => format!("{address}:{port}"),
        };
        let what = match self.protocol {
            Protocol::Tcp => "TCP SYN",
            Protocol::Udp => "UDP",
            Protocol::Icmp => "ICMP echo request",
        };
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<12}{value}");
        };
        let verdict = match self.verdict.as_str() {
            "forward" => "forwarded",
            "host" => "given to this host",
            _ => "DROPPED",
        };
        line("verdict", &format!("{verdict} ({}): {}", self.reason, self.description));
        line(
            "packet",
            &format!(
                "{what} {} -> {}, met on {}",
                end(self.source, self.source_port),
                end(self.destination, self.destination_port),
                self.device
            ),
        );
        line("from", &self.from);
        if !self.to.is_empty() {
            line("to", &self.to);
        }
        if !self.rule.is_empty() {
            line("rule", &self.rule);
        }
        if let Some(translation) = &self.translation {
            let how = match (translation.method.as_str(), translation.public_address) {
                ("direct", _) => "none: addresses stay as they are".to_owned(),
                ("instance", Some(public)) => format!("by the guest's own public address {public}"),
                (_, Some(public)) => format!(
                    "by load balancer frontend {} ({public}, a port such as {}), outbound rule {}",
                    translation.frontend.as_deref().unwrap_or("?"),
                    translation.example_port.unwrap_or(0),
                    translation.outbound_rule.as_deref().unwrap_or("?")
                ),
                (other, None) => other.to_owned(),
            };
            line("translation", &how);
            if translation.method != "direct" {
                line(
                    "becomes",
                    &format!(
                        "{} -> {}",
                        end(translation.new_source, translation.new_source_port),
                        end(translation.new_destination, translation.new_destination_port)
                    ),
                );
            }
        }
        if let Some(hop) = &self.next_hop {
            let known = if hop.resolved { "" } else { ", hardware address asked of the kernel" };
            line("next hop", &format!("{} on {}{known}", hop.name, hop.device));
        }
        match (self.live_flow, self.live_flow_rules.as_slice()) {
            (false, _) => line("live flow", "none"),
            (true, []) => line("live flow", "yes: its packets pass without asking a group"),
            (true, rules) => {
                line("live flow", &format!("yes, allowed by {}: its packets pass", rules.join(" and by ")))
            }
        }
        for note in &self.notes {
            line("note", note);
        }
        if !self.groups.is_empty() {
            let mut table = Table::new(&["GUEST", "AT", "GROUP", "DIRECTION", "PRIORITY>", "RULE", "ACCESS"]);
            for group in &self.groups {
                table.row([
                    group.guest.clone(),
                    if group.level == "subnet" { "subnet" } else { "network interface" }.to_owned(),
                    group.group.clone(),
                    group.direction.clone(),
                    group.priority.to_string(),
                    group.rule.clone(),
                    group.access.clone(),
                ]);
            }
            text += "\nGroups asked, in order:\n";
            text += &table.render("");
        }
        text
    }
}
