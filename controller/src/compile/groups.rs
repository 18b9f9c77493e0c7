//! Security groups as numbered lists, compiled once for each context they are asked in.

use std::collections::HashMap;

use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_LKM, RULE_ALLOW, RULE_NONE};

use super::addresses::AddressClasses;
use super::contexts::{Context, Contexts};
use super::error::CompileError;
use super::image::{Image, TooLarge};
use super::numbers::RuleIds;
use super::platform::platform_rules;
use super::port_classes::{PortClasses, PortLists};
use super::rules::{MAX_RULES, in_order};
use super::ruleset::{self, Classes, Rule, Scratch, TooManyRows};
use super::sides::{Prepared, naming_platform_tag};
use super::workers::in_parallel;
use crate::policy::network::{Access, Direction, Network};

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
pub(super) struct Rulesets {
    pub asked: Vec<Asked>,
    numbers: HashMap<Asked, u32>,
}

impl Rulesets {
    /// The ruleset's number; 0 where no group is.
    pub fn of_group(&mut self, group: Option<usize>, direction: Direction, context: usize) -> u32 {
        group.map_or(0, |group| self.number(Asked { of: RulesetOf::Group(group), direction, context }))
    }

    /// The ruleset's number. There must be rules in it.
    pub fn number(&mut self, asked: Asked) -> u32 {
        *self.numbers.entry(asked).or_insert_with(|| {
            self.asked.push(asked);
            self.asked.len() as u32
        })
    }
}

/// Address classes and the image with all rulesets in it.
pub(super) struct Classified {
    pub addresses: AddressClasses,
    pub ports: PortClasses,
    pub image: Image,
    /// What each ruleset is, those of platform tags included.
    pub asked: Vec<Asked>,
    /// For each ruleset the bit of its first rule, see [`super::image`].
    pub first_bits: Vec<u32>,
    pub contexts: Vec<Context>,
}

/// Rulesets compiled at once before they are put into the image: enough for the threads to be busy, few enough
/// that what waits does not matter beside the image.
const BATCH: usize = 64;

/// Rules of one group and direction, ready to be seen from any context.
struct Body {
    rules: Vec<Prepared>,
    /// Their words in the `rules` table.
    words: Vec<u32>,
}

/// Compiles all rulesets. The image keeps no more than `limit` bytes; past that it only counts.
pub(super) fn compile(
    network: &Network,
    mut contexts: Contexts<'_>,
    mut rulesets: Rulesets,
    ids: &RuleIds,
    limit: usize,
) -> Result<Classified, Vec<CompileError>> {
    let mut port_lists = PortLists::default();
    let mut bodies: HashMap<(RulesetOf, Direction), Body> = HashMap::new();
    // Platform rulesets of each group's ruleset, by its number.
    let mut platform: HashMap<u32, [u32; 3]> = HashMap::new();
    for number in 0..rulesets.asked.len() {
        let Asked { of, direction, context } = rulesets.asked[number];
        bodies
            .entry((of, direction))
            .or_insert_with(|| body(network, of, direction, ids, &mut contexts, &mut port_lists));
        if let (RulesetOf::Group(group), Direction::Outbound) = (of, direction) {
            let numbers: [u32; 3] = std::array::from_fn(|i| {
                let of = RulesetOf::PlatformTag { group, tag: EXEMPT_DNS + i as u32 };
                let body = bodies
                    .entry((of, direction))
                    .or_insert_with(|| body(network, of, direction, ids, &mut contexts, &mut port_lists));
                if body.rules.is_empty() { 0 } else { rulesets.number(Asked { of, direction, context }) }
            });
            platform.insert(number as u32 + 1, numbers);
        }
    }
    let addresses = AddressClasses::build(&contexts.lists);
    let ports = PortClasses::build(&port_lists);

    let mut image = Image::new(rulesets.asked.len(), limit);
    let mut first_bits = vec![0; rulesets.asked.len()];
    let mut rule_bases: HashMap<(RulesetOf, Direction), u32> = HashMap::new();
    let classes = Classes { addresses: &addresses, ports: &ports, port_lists: &port_lists };
    let mut errors = Vec::new();
    let mut order: Vec<(usize, Asked)> = rulesets.asked.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, asked)| std::cmp::Reverse(bodies[&(asked.of, asked.direction)].words.len()));
    for batch in order.chunks(BATCH) {
        let compiled = in_parallel(batch, Scratch::default, |(_, asked), scratch| {
            let meaning = &contexts.meanings[asked.context];
            let rules = &bodies[&(asked.of, asked.direction)].rules;
            let rules: Vec<Rule> = rules.iter().map(|rule| rule.seen_from(meaning)).collect();
            ruleset::compile(&rules, &classes, scratch)
        });
        for (&(i, asked), compiled) in batch.iter().zip(compiled) {
            let Ok(compiled) = compiled.map_err(|TooManyRows| {
                let message = "one of its fields tells more than 65,536 kinds of packets apart";
                errors.push(CompileError::new(place(network, asked.of), message));
            }) else {
                continue;
            };
            let words = &bodies[&(asked.of, asked.direction)].words;
            let rule_base = *rule_bases
                .entry((asked.of, asked.direction))
                .or_insert_with(|| image.rules(words.iter().copied()));
            let number = i as u32 + 1;
            let of_platform = platform.get(&number).copied().unwrap_or_default();
            match image.ruleset(number, &compiled, rule_base, words.len() as u32, of_platform) {
                Ok(first_bit) => first_bits[i] = first_bit,
                Err(TooLarge) => {
                    let message = "the tables of all groups are too large together";
                    return Err(vec![CompileError::new(place(network, asked.of), message)]);
                }
            }
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let asked = rulesets.asked;
    Ok(Classified { addresses, ports, image, asked, first_bits, contexts: contexts.contexts })
}

/// The rules of one group (or the platform's) in one direction.
fn body(
    network: &Network,
    of: RulesetOf,
    direction: Direction,
    ids: &RuleIds,
    contexts: &mut Contexts<'_>,
    ports: &mut PortLists,
) -> Body {
    let word = |access, id: u32| if access == Access::Allow { RULE_ALLOW | id } else { id };
    let mut prepare = |rule: &_| Prepared::new(network, rule, contexts, ports);
    let mut body = Body { rules: Vec::new(), words: Vec::new() };
    match of {
        RulesetOf::Group(group) => {
            let ids = ids.of_group(group, direction);
            for (rule, &id) in in_order(&network.groups[group], direction).into_iter().zip(ids) {
                body.rules.push(prepare(rule));
                body.words.push(word(rule.access, id));
            }
        }
        RulesetOf::PlatformTag { group, tag } => {
            let ids = ids.of_group(group, direction);
            for (position, rule) in naming_platform_tag(&in_order(&network.groups[group], direction), tag) {
                body.rules.push(prepare(&rule));
                body.words.push(word(rule.access, ids.get(position).copied().unwrap_or(RULE_NONE)));
            }
        }
        RulesetOf::Platform { kms } => {
            for rule in platform_rules(network, kms) {
                body.rules.push(prepare(&rule.rule));
                body.words.push(word(rule.rule.access, ids.of_platform(&rule.rule.name)) | rule.action << 24);
            }
        }
    }
    body
}

/// Where in the policy a ruleset comes from.
fn place(network: &Network, of: RulesetOf) -> String {
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
            let rules = own + super::rules::default_rules(direction).len();
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
