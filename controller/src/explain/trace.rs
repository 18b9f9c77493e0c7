//! Which rules were asked, in the engine's order, and which of their fields matched: found from the policy alone, by the
//! linear search of [`crate::answers::trace`]. Which rule decided the engine says; [`disagreement`] holds the two together.

use std::collections::HashMap;

use portcullis_common::engine::{Context, WAY_DIRECT, WAY_IN, WAY_PLATFORM};
use portcullis_common::layout::{Count, NEXT_HOP_HOST};
use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM, IN_PLATFORM};
use serde::{Deserialize, Serialize};

use super::ends::Ends;
use super::engine_run::translated;
use crate::answers::expand::tag_name;
use crate::answers::trace::{
    Evaluator, FieldsMatched, Level, Packet, forced_tunnel, names_tag, stages as guards,
};
use crate::compile::platform::PLATFORM_RULES;
use crate::compile::{Registry, lookup, platform_rules};
use crate::daemon::InForce;
use crate::daemon::shared::{Guest, direction, rule_text};
use crate::policy::network::{Access, Direction, SecurityRule, ServiceTag};

/// The answer of one group, or of the rules before them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupAnswer {
    /// Whose group it is, `vm1/ipconfig1`.
    pub guest: String,
    /// Where it stands: `networkInterface`, `subnet`, or `platform` for the rules before the groups.
    pub level: String,
    /// `platformRules` for the rules before the groups.
    pub group: String,
    /// `Inbound` or `Outbound`.
    pub direction: String,
    /// The tag whose rules alone were asked, because a rule before the groups lets the packet through; `null`: all.
    pub only_tag: Option<String>,
    /// The rule that matched; empty if none did, which only rules before the groups and those of a tag may do.
    pub rule: String,
    pub priority: u16,
    /// One of the three every group ends with.
    pub default_rule: bool,
    /// `Allow` or `Deny`; empty without a rule.
    pub access: String,
    /// Every rule that was tried, in order; the last one is the one that matched.
    pub tried: Vec<Tried>,
}

/// A rule that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tried {
    pub rule: String,
    pub priority: u16,
    pub access: String,
    #[serde(flatten)]
    pub fields: FieldsMatched,
}

impl GroupAnswer {
    /// As the engine's rules are named, `web-nsg/Outbound/DenySmtp`.
    fn rule_text(&self) -> String {
        format!("{}/{}/{}", self.group, self.direction, self.rule)
    }

    /// Did it end the packet?
    pub fn denied(&self) -> bool {
        self.access == "Deny"
    }
}

/// What the rules are asked of, and by whom.
struct Asked<'a> {
    in_force: &'a InForce,
    packet: Packet,
    /// `EXEMPT_*`, once a rule before the groups has let the packet through.
    exempt: Option<u32>,
    answers: Vec<GroupAnswer>,
}

/// Everything that was asked of this packet: the rules before the groups, the sender's groups (network interface,
/// subnet), the receiver's (subnet, network interface), up to the first that denied. None, if the packet ended before.
pub fn groups(in_force: &InForce, ends: &Ends<'_>, context: &Context) -> Vec<GroupAnswer> {
    // Chosen when everything before the rules has been passed (`engine::judge`).
    if context.way == 0 {
        return Vec::new();
    }
    let ports = matches!(ends.protocol, 6 | 17);
    let packet = Packet {
        source: ends.source,
        destination: match context.way {
            WAY_IN => translated(context)[1].0,
            _ => ends.destination,
        },
        source_port: if ports { ends.source_port } else { 0 },
        // Rules see the port behind the listener.
        destination_port: match context.way {
            _ if !ports => 0,
            WAY_IN => translated(context)[1].1,
            _ => ends.destination_port,
        },
        protocol: ends.protocol,
    };
    let mut asked = Asked { in_force, packet, exempt: None, answers: Vec::new() };
    let (from, to) = (in_force.guest(context.from as usize), in_force.guest(context.to as usize));
    if let Some(guest) = from.filter(|guest| !is_host_access(in_force, guest, ends, context)) {
        asked.platform(&guest);
        if context.way == WAY_PLATFORM {
            // A platform address, and no rule knows a service there: that ended it.
            return asked.answers;
        }
        asked.guards(&guest, Direction::Outbound);
    }
    if let Some(guest) = to {
        asked.guards(&guest, Direction::Inbound);
    }
    asked.answers
}

/// Is it for the host itself, by `hostAccess`? No rule is asked then.
pub fn is_host_access(in_force: &InForce, guest: &Guest<'_>, ends: &Ends<'_>, context: &Context) -> bool {
    let to_host = context.way == WAY_DIRECT && context.egress == NEXT_HOP_HOST;
    to_host && !is_platform_service(in_force, guest, ends)
}

/// Is there a service of the platform at the destination, for this guest?
pub fn is_platform_service(in_force: &InForce, guest: &Guest<'_>, ends: &Ends<'_>) -> bool {
    let space = lookup::space_value(&in_force.compiled, guest.endpoint.routing, ends.destination);
    space >> 24 == IN_PLATFORM
}

impl Asked<'_> {
    fn denied(&self) -> bool {
        self.answers.last().is_some_and(GroupAnswer::denied)
    }

    /// The rules before the groups. They need not match.
    fn platform(&mut self, guest: &Guest<'_>) {
        let network = &self.in_force.loaded.network;
        let subnet = network.interfaces[guest.place.0].addresses[guest.place.1].subnet;
        let kms = network.platform.allow_kms && !forced_tunnel(network, subnet);
        let rules = platform_rules(network, kms);
        if rules.is_empty() {
            return;
        }
        let mut evaluator = Evaluator::new(network, subnet);
        let mut tried = Vec::new();
        let mut matched = None;
        for rule in &rules {
            let fields = evaluator.fields(&rule.rule, &self.packet);
            tried.push(trial(&rule.rule, fields));
            if fields.all() {
                matched = Some(rule);
                break;
            }
        }
        self.exempt = matched.map(|rule| rule.action).filter(|action| *action != 0);
        self.answer(guest, "platform", PLATFORM_RULES, Direction::Outbound, None, tried);
    }

    /// The groups in front of a guest in one direction, as long as none has denied.
    fn guards(&mut self, guest: &Guest<'_>, way: Direction) {
        let network = &self.in_force.loaded.network;
        let subnet = network.interfaces[guest.place.0].addresses[guest.place.1].subnet;
        let only = match self.exempt {
            None => None,
            Some(exempt) => match (way, exempt_tag(exempt)) {
                (Direction::Outbound, Some(tag)) => Some(tag),
                // No rule is left to ask: the tag's are outbound, and for a service without a tag there are none.
                _ => return,
            },
        };
        let mut evaluator = Evaluator::new(network, subnet);
        for (level, group) in guards(network, guest.place, way) {
            if self.denied() {
                return;
            }
            let of_tag = |rule: &SecurityRule, tag| rule.direction == way && names_tag(rule, tag);
            if only.is_some_and(|tag| !network.groups[group].rules.iter().any(|rule| of_tag(rule, tag))) {
                continue;
            }
            let trace = evaluator.group(group, level, way, &self.packet, only);
            let tried = trace.trials.iter().map(|tried| trial(tried.rule, tried.fields)).collect();
            let level = match level {
                Level::Subnet => "subnet",
                Level::NetworkInterface => "networkInterface",
            };
            self.answer(guest, level, &network.groups[group].name, way, only, tried);
        }
    }

    fn answer(
        &mut self,
        guest: &Guest<'_>,
        level: &str,
        group: &str,
        way: Direction,
        only: Option<ServiceTag>,
        tried: Vec<Tried>,
    ) {
        let matched = tried.last().filter(|tried| tried.fields.all()).cloned();
        let priority = matched.as_ref().map_or(0, |rule| rule.priority);
        let (rule, access) = matched.map_or_else(Default::default, |matched| (matched.rule, matched.access));
        self.answers.push(GroupAnswer {
            guest: guest.name.to_owned(),
            level: level.to_owned(),
            group: group.to_owned(),
            direction: direction(way).to_owned(),
            only_tag: only.map(|tag| tag_name(&self.in_force.loaded.network, tag).to_owned()),
            rule,
            priority,
            default_rule: priority > 4096,
            access,
            tried,
        });
    }
}

fn trial(rule: &SecurityRule, fields: FieldsMatched) -> Tried {
    let access = match rule.access {
        Access::Allow => "Allow",
        Access::Deny => "Deny",
    };
    Tried { rule: rule.name.clone(), priority: rule.priority, access: access.to_owned(), fields }
}

/// The tag whose rules may still refuse what a rule before the groups lets through.
fn exempt_tag(exempt: u32) -> Option<ServiceTag> {
    match exempt {
        EXEMPT_DNS => Some(ServiceTag::AzurePlatformDns),
        EXEMPT_IMDS => Some(ServiceTag::AzurePlatformImds),
        EXEMPT_LKM => Some(ServiceTag::AzurePlatformLkm),
        _ => None,
    }
}

/// The rules the engine counted hits of and those that were found here, if they are not the same.
pub fn disagreement(
    in_force: &InForce,
    registry: &Registry,
    hits: &HashMap<u32, Count>,
    groups: &[GroupAnswer],
) -> Option<String> {
    let hit = |(id, count): (&u32, &Count)| vec![rule_text(in_force, registry, *id); count.packets as usize];
    let mut engine: Vec<String> = hits.iter().flat_map(hit).collect();
    let mut here: Vec<String> =
        groups.iter().filter(|group| !group.rule.is_empty()).map(GroupAnswer::rule_text).collect();
    engine.sort_unstable();
    here.sort_unstable();
    (engine != here).then(|| {
        let list = |rules: &[String]| if rules.is_empty() { "none".to_owned() } else { rules.join(", ") };
        format!(
            "the engine decided by {}, but the policy alone says {}: this is a bug, please report it",
            list(&engine),
            list(&here)
        )
    })
}
