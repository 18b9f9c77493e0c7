//! The ids of rules and virtual networks, from the registry.

use std::collections::HashMap;

use super::edge;
use super::error::CompileError;
use super::platform::{self, PLATFORM_RULES, platform_rules};
use super::registry::{Registry, Wanted};
use super::rules::{self, RuleInfo};
use crate::policy::network::{Direction, Network};

/// Ids of rules, in priority order.
#[derive(Default)]
pub(super) struct RuleIds {
    groups: HashMap<(usize, Direction), Vec<u32>>,
    platform: HashMap<String, u32>,
}

impl RuleIds {
    pub fn of_group(&self, group: usize, direction: Direction) -> &[u32] {
        self.groups.get(&(group, direction)).map_or(&[], Vec::as_slice)
    }

    /// The id of a rule before the groups.
    pub fn of_platform(&self, name: &str) -> u32 {
        self.platform.get(name).copied().unwrap_or(portcullis_common::policy::RULE_NONE)
    }
}

/// A rule that has no id yet.
pub(super) struct Unnumbered {
    /// Its group; `None` for those before the groups.
    group: Option<usize>,
    info: RuleInfo,
    key: String,
}

/// Every rule of every group, and those before the groups whether or not a subnet has them.
pub(super) fn all_rules(network: &Network) -> Vec<Unnumbered> {
    let mut all: Vec<Unnumbered> = Vec::new();
    for rule in platform_rules(network, network.platform.allow_kms).into_iter().map(|rule| rule.rule) {
        // A service for both protocols has two rules and one name.
        if all.last().is_some_and(|last| last.info.name == rule.name) {
            continue;
        }
        let info = RuleInfo {
            id: 0,
            group: PLATFORM_RULES.into(),
            direction: rule.direction,
            name: rule.name.clone(),
            priority: rule.priority,
            access: rule.access,
        };
        all.push(Unnumbered { group: None, info, key: platform::key(&rule.name) });
    }
    for (number, group) in network.groups.iter().enumerate() {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for rule in rules::in_order(group, direction) {
                let name = rules::display_name(rule);
                let key = rules::key(&group.name, direction, &name);
                let (priority, access) = (rule.priority, rule.access);
                let info = RuleInfo { id: 0, group: group.name.clone(), direction, name, priority, access };
                all.push(Unnumbered { group: Some(number), info, key });
            }
        }
    }
    all
}

/// The names the registry must not give up.
pub(super) fn wanted(network: &Network) -> Wanted {
    let hops = edge::guests(network).map(|(i, c)| edge::hop_key(network, i, c));
    let timeouts = network.load_balancers.iter().flat_map(|balancer| {
        let outbound = balancer.outbound_rules.iter().map(|rule| rule.idle_timeout_seconds);
        let inbound = balancer.rules.iter().map(|rule| rule.idle_timeout_seconds);
        outbound.chain(inbound).chain(balancer.nat_rules.iter().map(|rule| rule.idle_timeout_seconds))
    });
    let timeouts = timeouts.chain(network.default_outbound.iter().map(|d| d.idle_timeout_seconds));
    Wanted {
        next_hops: hops.collect(),
        networks: network.virtual_networks.iter().map(|v| v.name.clone()).collect(),
        idle: timeouts.flatten().map(|seconds| seconds.to_string()).collect(),
    }
}

/// The network id of each virtual network. What the policy numbers them with holds within one policy only; flows
/// live longer.
pub(super) fn network_ids(
    network: &Network,
    registry: &mut Registry,
    errors: &mut Vec<CompileError>,
) -> Vec<u16> {
    let mut ids = Vec::new();
    for space in &network.virtual_networks {
        match registry.network(&space.name, space.id) {
            Ok(id) => ids.push(id),
            Err(full) => {
                errors.push(CompileError::new(format!("virtualNetworks/{}", space.name), full.to_string()));
                return ids;
            }
        }
    }
    ids
}

/// Gives every rule its id.
pub(super) fn number_rules(
    all: Vec<Unnumbered>,
    registry: &mut Registry,
    errors: &mut Vec<CompileError>,
) -> (Vec<RuleInfo>, RuleIds) {
    let mut ids = RuleIds::default();
    let mut rules = Vec::with_capacity(all.len());
    let numbers = registry.rules(all.iter().map(|rule| &*rule.key));
    let numbers = numbers.unwrap_or_else(|full| {
        errors.push(CompileError::new("networkSecurityGroups", full.to_string()));
        Vec::new()
    });
    for (Unnumbered { group, mut info, .. }, id) in all.into_iter().zip(numbers) {
        info.id = id;
        match group {
            Some(group) => ids.groups.entry((group, info.direction)).or_default().push(info.id),
            None => _ = ids.platform.insert(info.name.clone(), info.id),
        }
        rules.push(info);
    }
    (rules, ids)
}
