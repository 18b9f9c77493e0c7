//! Which rulesets there are: groups, directions and the contexts they are asked in; and their rules as numbered lists.
//!
//! None of it needs the rules' ids, so it is done while those are found.

use std::collections::HashMap;

use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_LKM, RULE_ALLOW, RULE_NONE};

use super::addresses::AddressClasses;
use super::contexts::{Context, Contexts, Meaning};
use super::edge;
use super::error::CompileError;
use super::numbers::RuleIds;
use super::platform::{allows_kms, platform_rules};
use super::port_classes::{PortClasses, PortLists};
use super::rules::{MAX_RULES, default_rules, in_order};
use super::sides::{Prefixes, Prepared, naming_platform_tag};
use crate::policy::network::{Access, Direction, Network, SecurityRule};

/// The rules of a ruleset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RulesetOf {
    /// A group, as an index into the policy's groups.
    Group(usize),
    /// The rules of a group that name a platform tag as destination; the tag is
    /// [`EXEMPT_DNS`](portcullis_common::policy::EXEMPT_DNS) or one of its siblings. Any destination matches here.
    PlatformTag { group: usize, tag: u32 },
    /// The rules before the groups, [`platform_rules`].
    Platform { kms: bool },
}

/// Rules in one direction, seen from one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    pub of: RulesetOf,
    pub direction: Direction,
    /// Index into the contexts.
    pub context: usize,
}

/// The rulesets endpoints ask for, numbered from 1 in the order of the first request.
#[derive(Default)]
struct Rulesets {
    asked: Vec<Asked>,
    numbers: HashMap<Asked, u32>,
}

impl Rulesets {
    /// The ruleset's number; 0 where no group is.
    fn of_group(&mut self, group: Option<usize>, direction: Direction, context: usize) -> u32 {
        group.map_or(0, |group| self.number(Asked { of: RulesetOf::Group(group), direction, context }))
    }

    /// The ruleset's number. There must be rules in it.
    fn number(&mut self, asked: Asked) -> u32 {
        *self.numbers.entry(asked).or_insert_with(|| {
            self.asked.push(asked);
            self.asked.len() as u32
        })
    }
}

/// What one endpoint asks: its interface's and its subnet's groups, and the rules before them. 0 for none.
#[derive(Debug, Clone, Copy)]
pub(super) struct AskedBy {
    pub nic_outbound: u32,
    pub subnet_outbound: u32,
    pub subnet_inbound: u32,
    pub nic_inbound: u32,
    pub platform_outbound: u32,
}

/// All rulesets of a policy, their rules as lists, and the classes that these make.
pub(super) struct Groups {
    /// The rulesets, numbered from 1.
    pub asked: Vec<Asked>,
    /// For each outbound ruleset of a group those of its platform tags.
    pub platform: HashMap<u32, [u32; 3]>,
    pub rules: HashMap<(RulesetOf, Direction), Vec<Prepared>>,
    /// What each configuration asks, in the order of the endpoints.
    pub endpoints: Vec<AskedBy>,
    pub contexts: Vec<Context>,
    pub meanings: Vec<Meaning>,
    pub addresses: AddressClasses,
    pub ports: PortClasses,
    pub port_lists: PortLists,
}

impl Groups {
    /// Finds out what is asked, and prepares it.
    pub fn prepare(network: &Network) -> Self {
        let mut contexts = Contexts::new(network);
        let mut rulesets = Rulesets::default();
        let endpoints: Vec<AskedBy> = edge::guests(network)
            .map(|(i, c)| asked_by(network, i, c, &mut contexts, &mut rulesets))
            .collect();

        let mut port_lists = PortLists::default();
        let mut scratch = Prefixes::new();
        let mut prepare = |of, direction| {
            let mut prepared = Vec::new();
            each_rule(network, of, direction, |_, rule, _| {
                prepared.push(Prepared::new(network, rule, &mut contexts, &mut port_lists, &mut scratch));
            });
            prepared
        };
        let mut rules: HashMap<(RulesetOf, Direction), Vec<Prepared>> = HashMap::new();
        let mut platform = HashMap::new();
        for number in 0..rulesets.asked.len() {
            let Asked { of, direction, context } = rulesets.asked[number];
            rules.entry((of, direction)).or_insert_with(|| prepare(of, direction));
            if let (RulesetOf::Group(group), Direction::Outbound) = (of, direction) {
                let numbers: [u32; 3] = std::array::from_fn(|i| {
                    let of = RulesetOf::PlatformTag { group, tag: EXEMPT_DNS + i as u32 };
                    let rules = rules.entry((of, direction)).or_insert_with(|| prepare(of, direction));
                    if rules.is_empty() { 0 } else { rulesets.number(Asked { of, direction, context }) }
                });
                platform.insert(number as u32 + 1, numbers);
            }
        }
        Self {
            asked: rulesets.asked,
            platform,
            rules,
            endpoints,
            addresses: AddressClasses::build(&contexts.lists),
            contexts: contexts.contexts,
            meanings: contexts.meanings,
            ports: PortClasses::build(&port_lists),
            port_lists,
        }
    }
}

/// What a configuration of an interface asks.
fn asked_by(
    network: &Network,
    interface: usize,
    configuration: usize,
    contexts: &mut Contexts<'_>,
    rulesets: &mut Rulesets,
) -> AskedBy {
    let interface = &network.interfaces[interface];
    let number = interface.addresses[configuration].subnet;
    let subnet = &network.subnets[number];
    let context = contexts.of_subnet(number);
    let mut of_group = |group, direction| rulesets.of_group(group, direction, context);
    let mut asked = AskedBy {
        nic_outbound: of_group(interface.group, Direction::Outbound),
        subnet_outbound: of_group(subnet.group, Direction::Outbound),
        subnet_inbound: of_group(subnet.group, Direction::Inbound),
        nic_inbound: of_group(interface.group, Direction::Inbound),
        platform_outbound: 0,
    };
    let kms = allows_kms(network, subnet);
    if kms || network.platform.block_smtp || !network.platform.services.is_empty() {
        let of = RulesetOf::Platform { kms };
        asked.platform_outbound = rulesets.number(Asked { of, direction: Direction::Outbound, context });
    }
    asked
}

/// The words of a ruleset's rules in the `rules` table.
pub(super) fn words(network: &Network, of: RulesetOf, direction: Direction, ids: &RuleIds) -> Vec<u32> {
    let of_group = match of {
        RulesetOf::Group(group) | RulesetOf::PlatformTag { group, .. } => ids.of_group(group, direction),
        RulesetOf::Platform { .. } => &[],
    };
    let mut words = Vec::new();
    each_rule(network, of, direction, |position, rule, action| {
        let id = match of {
            RulesetOf::Platform { .. } => ids.of_platform(&rule.name),
            _ => of_group.get(position).copied().unwrap_or(RULE_NONE),
        };
        let allow = if rule.access == Access::Allow { RULE_ALLOW } else { 0 };
        words.push(allow | action << 24 | id);
    });
    words
}

/// Calls `visit` for the rules of a ruleset in the order they are asked: position in the group, rule, and the action
/// of a rule before the groups.
fn each_rule(
    network: &Network,
    of: RulesetOf,
    direction: Direction,
    mut visit: impl FnMut(usize, &SecurityRule, u32),
) {
    match of {
        RulesetOf::Group(group) => {
            let rules = in_order(&network.groups[group], direction);
            rules.into_iter().enumerate().for_each(|(position, rule)| visit(position, rule, 0));
        }
        RulesetOf::PlatformTag { group, tag } => {
            let rules = naming_platform_tag(&in_order(&network.groups[group], direction), tag);
            rules.iter().for_each(|(position, rule)| visit(*position, rule, 0));
        }
        RulesetOf::Platform { kms } => {
            let rules = platform_rules(network, kms);
            let rules = rules.iter().enumerate();
            rules.for_each(|(position, rule)| visit(position, &rule.rule, rule.action));
        }
    }
}

/// Where in the policy a ruleset comes from.
pub(super) fn place(network: &Network, of: RulesetOf) -> String {
    match of {
        RulesetOf::Group(group) | RulesetOf::PlatformTag { group, .. } => {
            format!("networkSecurityGroups/{}", network.groups[group].name)
        }
        RulesetOf::Platform { .. } => "platformServices".into(),
    }
}

/// Refuses groups with more rules than a row has bits for.
pub(super) fn check_size(network: &Network, errors: &mut Vec<CompileError>) {
    for (number, group) in network.groups.iter().enumerate() {
        for direction in [Direction::Inbound, Direction::Outbound] {
            let own = group.rules.iter().filter(|rule| rule.direction == direction).count();
            let rules = own + default_rules(direction).len();
            if rules > MAX_RULES {
                let message =
                    format!("{rules} {direction:?} rules, default rules included; at most {MAX_RULES}");
                errors.push(CompileError::new(place(network, RulesetOf::Group(number)), message));
            }
        }
    }
    let rules = platform_rules(network, true).len();
    if rules > MAX_RULES {
        let message = format!("{rules} rules before the groups (two for a service of both protocols); ")
            + &format!("at most {MAX_RULES}");
        errors.push(CompileError::new("platformServices", message));
    }
}

const _: () = assert!(EXEMPT_LKM == EXEMPT_DNS + 2, "the platform tags are numbered without a gap");
