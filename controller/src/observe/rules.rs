//! `rules`: every rule in force with its hits, default rules among them.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::time::{bytes, seconds};
use crate::answers::lint::shadow;
use crate::api::Failure;
use crate::cli::table::Table;
use crate::compile::rules::in_order;
use crate::daemon::Shared;
use crate::daemon::shared::{direction, short};
use crate::datapath::now_tick;
use crate::policy::network::{Access, Direction, Network};

/// Rules in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleHits {
    /// The policy generation in force, whose rules these are. A rule keeps its counter from one generation to the next as
    /// long as group, direction and name stay.
    #[serde(default)]
    pub generation: u32,
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
    /// Of the hits, those under the generation in force.
    #[serde(default)]
    pub hits_this_generation: u64,
    /// Bytes of those.
    #[serde(default)]
    pub bytes_this_generation: u64,
    /// Seconds since the last of them; `null` if there was none.
    pub last_hit_seconds_ago: Option<f64>,
    /// With `--shadowed`, of a rule that can never match: the rules that take its packets before it (none if there is no
    /// such packet). Absent for a rule that can match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadowed_by: Option<Vec<String>>,
}

/// The rules and their hits; of one group only, if it is named. `shadowed`: look for rules that can never match.
pub fn rules(shared: &Shared, group: Option<&str>, shadowed: bool) -> Result<RuleHits, Failure> {
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
    let shadows = match shadowed {
        true => shadows(&in_force.loaded.network, group),
        false => HashMap::new(),
    };
    let datapath = shared.datapath();
    let counts = datapath.rule_counts()?;
    let now = now_tick();
    let rules = in_force.compiled.rules.iter().filter(|rule| group.is_none_or(|name| rule.group == name));
    let rules = rules.map(|rule| {
        let count = counts.get(&rule.id).copied().unwrap_or_default();
        let before = datapath.counted_before(rule.id);
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
            hits_this_generation: count.hits.saturating_sub(before.hits),
            bytes_this_generation: count.bytes.saturating_sub(before.bytes),
            last_hit_seconds_ago: (count.hits != 0).then_some(ago),
            shadowed_by: shadows.get(&(rule.group.as_str(), rule.direction, short(&rule.name))).cloned(),
        }
    });
    Ok(RuleHits { generation: in_force.compiled.generation, rules: rules.collect() })
}

/// A rule by group, direction and name.
type RuleKey<'n> = (&'n str, Direction, &'n str);

/// The rules that can never match, with those that shadow them.
fn shadows<'n>(network: &'n Network, only: Option<&str>) -> HashMap<RuleKey<'n>, Vec<String>> {
    let mut shadows = HashMap::new();
    for (index, group) in network.groups.iter().enumerate() {
        if only.is_some_and(|name| group.name != name) {
            continue;
        }
        for direction in [Direction::Inbound, Direction::Outbound] {
            let rules = in_order(group, direction);
            for (rule, by) in rules.into_iter().zip(shadow::shadowed(network, index, direction)) {
                if let Some(by) = by {
                    shadows.insert((group.name.as_str(), direction, rule.name.as_str()), by);
                }
            }
        }
    }
    shadows
}

impl RuleHits {
    /// For people.
    pub fn text(&self) -> String {
        let shadowed = self.rules.iter().any(|rule| rule.shadowed_by.is_some());
        let mut headings =
            vec!["GROUP", "DIRECTION", "PRIORITY>", "NAME", "ACCESS", "HITS>", "NOW>", "BYTES>", "LAST HIT>"];
        if shadowed {
            headings.push("NEVER MATCHES: SHADOWED BY");
        }
        let mut table = Table::new(&headings);
        for rule in &self.rules {
            table.row([
                rule.group.clone(),
                rule.direction.clone(),
                rule.priority.to_string(),
                rule.name.clone(),
                rule.access.clone(),
                rule.hits.to_string(),
                rule.hits_this_generation.to_string(),
                bytes(rule.bytes),
                rule.last_hit_seconds_ago.map_or_else(|| "never".to_owned(), |ago| format!("{ago:.0}s ago")),
                match rule.shadowed_by.as_deref() {
                    None => String::new(),
                    Some([]) => "nothing: no packet is like that".to_owned(),
                    Some(by) => by.join(", "),
                },
            ]);
        }
        let mut text = table.render("the policy has no network security groups");
        if !self.rules.is_empty() {
            text += &format!("\nNOW: hits under generation {}, which is in force\n", self.generation);
        }
        text
    }
}
