//! `rules`: every rule in force with its hits, default rules among them.

use serde::{Deserialize, Serialize};

use super::time::{bytes, seconds};
use crate::api::Failure;
use crate::cli::table::Table;
use crate::daemon::Shared;
use crate::daemon::shared::{direction, short};
use crate::datapath::now_tick;
use crate::policy::network::Access;

/// Rules in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleHits {
    pub rules: Vec<RuleHit>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleHit {
    pub group: String,
    /// `Inbound` or `Outbound`.
    pub direction: String,
    pub priority: u16,
    pub name: String,
    /// One of the three every group ends with.
    pub default_rule: bool,
    /// `Allow` or `Deny`.
    pub access: String,
    /// New flows allowed, or packets denied.
    pub hits: u64,
    /// Bytes of those packets.
    pub bytes: u64,
    /// Seconds since the last of them; `null` if there was none.
    pub last_hit_seconds_ago: Option<f64>,
}

/// The rules and their hits; of one group only, if it is named.
pub fn rules(shared: &Shared, group: Option<&str>) -> Result<RuleHits, Failure> {
    let in_force = shared.in_force();
    let groups = &in_force.loaded.network.groups;
    if let Some(name) = group
        && !groups.iter().any(|group| group.name == name)
    {
        let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        return Err(Failure::input(format!(
            "there is no network security group `{name}` in the policy in force; there is {}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        )));
    }
    let counts = shared.datapath().rule_counts()?;
    let now = now_tick();
    let rules = in_force.compiled.rules.iter().filter(|rule| group.is_none_or(|name| rule.group == name));
    let rules = rules.map(|rule| {
        let count = counts.get(&rule.id).copied().unwrap_or_default();
        let ago = seconds(now.saturating_sub(count.last as u32));
        RuleHit {
            group: rule.group.clone(),
            direction: direction(rule.direction).to_owned(),
            priority: rule.priority,
            name: short(&rule.name).to_owned(),
            default_rule: rule.priority > 4096,
            access: match rule.access {
                Access::Allow => "Allow".to_owned(),
                Access::Deny => "Deny".to_owned(),
            },
            hits: count.hits,
            bytes: count.bytes,
            last_hit_seconds_ago: (count.hits != 0).then_some(ago),
        }
    });
    Ok(RuleHits { rules: rules.collect() })
}

impl RuleHits {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&[
            "GROUP",
            "DIRECTION",
            "PRIORITY>",
            "NAME",
            "ACCESS",
            "HITS>",
            "BYTES>",
            "LAST HIT>",
        ]);
        for rule in &self.rules {
            table.row([
                rule.group.clone(),
                rule.direction.clone(),
                rule.priority.to_string(),
                rule.name.clone(),
                rule.access.clone(),
                rule.hits.to_string(),
                bytes(rule.bytes),
                rule.last_hit_seconds_ago.map_or_else(|| "never".to_owned(), |ago| format!("{ago:.0}s ago")),
            ]);
        }
        table.render("the policy has no network security groups")
    }
}
