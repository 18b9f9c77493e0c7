//! `lint`: what a policy says and hardly means.
//!
//! Nothing is sampled: what is said of rules holds for every packet ([`super::regions`]), in every subnet where the group
//! stands. Codes are stable: 1xx rules without effect, 2xx openings, 3xx health probes, 4xx unused things, 5xx the host.

mod attachment;
mod exposure;
mod probes;
pub mod shadow;
mod view;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::trace::Packet;
use crate::policy::network::{Direction, Network, Places, SecurityRule};

use view::View;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    Info,
    Warning,
    Error,
}

impl Severity {
    /// The word that stands before the message.
    pub fn word(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// `PC101`
    pub code: String,
    pub severity: Severity,
    /// What it is about: `networkSecurityGroups/web/securityRules/AllowSsh`.
    pub about: String,
    /// Where that stands; absent if the policy was not read from a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<usize>,
    pub message: String,
    /// What to do.
    pub help: String,
    /// The rules that take every packet before it, for PC101.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
}

/// All findings, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LintReport {
    pub errors: usize,
    pub warnings: usize,
    pub infos: usize,
    pub findings: Vec<Finding>,
}

/// What may be known besides the policy.
#[derive(Debug, Clone, Copy, Default)]
pub struct Surroundings<'a> {
    /// Addresses of this host's devices; `None` if the policy is looked at elsewhere.
    pub host_addresses: Option<&'a [IpAddr]>,
}

/// Collects findings.
struct Findings<'a> {
    places: &'a Places,
    found: Vec<Finding>,
}

impl Findings<'_> {
    fn add(
        &mut self,
        code: &str,
        severity: Severity,
        about: String,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> &mut Finding {
        let place = self.places.get(&about).cloned();
        let (file, line, column) = match place {
            Some((file, line, column)) => (Some(file), Some(line), Some(column)),
            None => (None, None, None),
        };
        let (message, help) = (message.into(), help.into());
        let code = code.to_owned();
        let rules = Vec::new();
        self.found.push(Finding { code, severity, about, file, line, column, message, help, rules });
        let last = self.found.len() - 1;
        &mut self.found[last]
    }
}

fn group_path(network: &Network, group: usize) -> String {
    format!("networkSecurityGroups/{}", network.groups[group].name)
}

fn rule_path(network: &Network, group: usize, rule: &SecurityRule) -> String {
    format!("{}/securityRules/{}", group_path(network, group), rule.name)
}

/// Looks at a policy.
pub fn lint(network: &Network, places: &Places, around: Surroundings<'_>) -> LintReport {
    let mut findings = Findings { places, found: Vec::new() };
    for group in 0..network.groups.len() {
        let contexts = view::contexts(network, group);
        for direction in [Direction::Inbound, Direction::Outbound] {
            let views: Vec<View<'_>> =
                contexts.iter().map(|&subnet| View::new(network, group, direction, subnet)).collect();
            shadow::check(&views, &mut findings);
            attachment::local_side(&views, &mut findings);
            if direction == Direction::Inbound {
                exposure::check(&views, &mut findings);
                probes::check(&views, &mut findings);
            }
        }
    }
    attachment::check(network, around, &mut findings);
    exposure::widened(network, &mut findings);
    let mut found = findings.found;
    found.sort_by(|a, b| (a.line, &a.code, &a.about).cmp(&(b.line, &b.code, &b.about)));
    let count = |severity| found.iter().filter(|finding| finding.severity == severity).count();
    LintReport {
        errors: count(Severity::Error),
        warnings: count(Severity::Warning),
        infos: count(Severity::Info),
        findings: found,
    }
}

/// A packet with ports as an example: `TCP 1.0.0.0 -> 10.0.1.4:22`.
fn example(packet: &Packet) -> String {
    let protocol = if packet.protocol == 6 { "TCP" } else { "UDP" };
    let to = std::net::SocketAddr::new(packet.destination, packet.destination_port);
    format!("{protocol} {} -> {to}", packet.source)
}

impl LintReport {
    /// Is there a finding of this severity or a worse one?
    pub fn at_least(&self, severity: Severity) -> bool {
        self.findings.iter().any(|finding| finding.severity >= severity)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            text += &format!("{}[{}]: {}\n", finding.severity.word(), finding.code, finding.message);
            match (&finding.file, finding.line, finding.column) {
                (Some(file), Some(line), Some(column)) => text += &format!("  --> {file}:{line}:{column}\n"),
                _ => text += &format!("  --> {}\n", finding.about),
            }
            text += &format!("  help: {}\n\n", finding.help);
        }
        let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
        text += &if self.findings.is_empty() {
            "nothing to say\n".to_owned()
        } else {
            let (errors, warnings) = (plural(self.errors, "error"), plural(self.warnings, "warning"));
            format!("{errors}, {warnings}, {} for information\n", self.infos)
        };
        text
    }
}
