//! Security groups as numbered lists, ready to be compiled once for each virtual network they are asked in.

use std::collections::HashMap;
use std::num::NonZero;

use super::addresses::{AddressClasses, Lists, PLATFORM_ADDRESS, internet, prefix, v4, virtual_network};
use super::error::CompileError;
use super::image::{Image, TooLarge};
use super::port_classes::{ANY_PORT, PortClasses, PortLists};
use super::rules::{MAX_RULES, in_order};
use super::ruleset::{self, Classes, CompiledRuleset, Rule, Scratch, Side, TooManyRows};
use crate::policy::network::{
    Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag, VirtualNetwork,
};
use portcullis_common::policy::RULE_ALLOW;

/// One group in one direction, seen from one virtual network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    pub group: usize,
    pub direction: Direction,
    /// Index into the policy's virtual networks.
    pub network: usize,
}

/// The rulesets endpoints ask for, numbered from 1 in the order of the first request.
#[derive(Default)]
pub(super) struct Rulesets {
    pub asked: Vec<Asked>,
    numbers: HashMap<Asked, u32>,
}

impl Rulesets {
    /// The ruleset's number; 0 where no group is.
    pub fn number(&mut self, group: Option<usize>, direction: Direction, network: usize) -> u32 {
        let Some(group) = group else { return 0 };
        let asked = Asked { group, direction, network };
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
    /// For each ruleset the bit of its first rule, see [`super::image`].
    pub first_bits: Vec<u32>,
}

/// Rulesets compiled at once before they are put into the image: enough for the threads to be busy, few enough
/// that what waits does not matter beside the image.
const BATCH: usize = 64;

/// Compiles all rulesets. `ids` has the rules' ids, by group, direction and position.
pub(super) fn compile(
    network: &Network,
    rulesets: &Rulesets,
    ids: &HashMap<(usize, Direction), Vec<u32>>,
) -> Result<Classified, Vec<CompileError>> {
    let mut lists = Lists::default();
    let mut port_lists = PortLists::default();
    let mut prepared: HashMap<(usize, Direction), Vec<Prepared>> = HashMap::new();
    for asked in &rulesets.asked {
        prepared.entry((asked.group, asked.direction)).or_insert_with(|| {
            let rules = in_order(&network.groups[asked.group], asked.direction);
            rules.into_iter().map(|rule| Prepared::new(rule, &mut lists, &mut port_lists)).collect()
        });
    }
    let mut tags: HashMap<usize, TagLists> = HashMap::new();
    for asked in &rulesets.asked {
        let space = &network.virtual_networks[asked.network];
        tags.entry(asked.network).or_insert_with(|| TagLists::new(space, &mut lists));
    }
    let addresses = AddressClasses::build(&lists);
    let ports = PortClasses::build(&port_lists);

    let mut image = Image::new(rulesets.asked.len());
    let mut first_bits = vec![0; rulesets.asked.len()];
    let mut rule_bases: HashMap<(usize, Direction), u32> = HashMap::new();
    let classes = Classes { addresses: &addresses, ports: &ports, port_lists: &port_lists };
    let mut errors = Vec::new();
    let mut order: Vec<(usize, Asked)> = rulesets.asked.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, asked)| std::cmp::Reverse(ids[&(asked.group, asked.direction)].len()));
    for batch in order.chunks(BATCH) {
        let one = |asked: &Asked, scratch: &mut Scratch| {
            let tags = &tags[&asked.network];
            let rules: Vec<Rule> =
                prepared[&(asked.group, asked.direction)].iter().map(|rule| rule.seen_with(tags)).collect();
            ruleset::compile(&rules, &classes, scratch)
        };
        for (&(i, asked), compiled) in batch.iter().zip(in_parallel(batch, one)) {
            let place = || format!("networkSecurityGroups/{}", network.groups[asked.group].name);
            let compiled = match compiled {
                Ok(compiled) => compiled,
                Err(TooManyRows) => {
                    let message = "one of its fields tells more than 65,536 kinds of packets apart";
                    errors.push(CompileError::new(place(), message));
                    continue;
                }
            };
            let of_group = (asked.group, asked.direction);
            let ids = &ids[&of_group];
            let rules = in_order(&network.groups[asked.group], asked.direction);
            let entries = rules
                .iter()
                .zip(ids)
                .map(|(rule, id)| if rule.access == Access::Allow { RULE_ALLOW | id } else { *id });
            let rule_base = *rule_bases.entry(of_group).or_insert_with(|| image.rules(entries));
            match image.ruleset(i as u32 + 1, &compiled, rule_base, ids.len() as u32) {
                Ok(first_bit) => first_bits[i] = first_bit,
                Err(TooLarge) => {
                    return Err(vec![CompileError::new(
                        place(),
                        "the tables of all groups are too large together",
                    )]);
                }
            }
        }
    }
    if errors.is_empty() { Ok(Classified { addresses, ports, image, first_bits }) } else { Err(errors) }
}

/// Refuses groups with more rules than a row has bits for.
pub(super) fn check_size(network: &Network, errors: &mut Vec<CompileError>) {
    for group in &network.groups {
        for direction in [Direction::Inbound, Direction::Outbound] {
            let rules = in_order(group, direction).len();
            if rules > MAX_RULES {
                let place = format!("networkSecurityGroups/{}", group.name);
                let message =
                    format!("{rules} {direction:?} rules, default rules included; at most {MAX_RULES}");
                errors.push(CompileError::new(place, message));
            }
        }
    }
}

/// Compiles a batch on as many threads as there are processors; the answers in the order of the batch.
fn in_parallel(
    batch: &[(usize, Asked)],
    one: impl Fn(&Asked, &mut Scratch) -> Result<CompiledRuleset, TooManyRows> + Sync,
) -> Vec<Result<CompiledRuleset, TooManyRows>> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(8).min(batch.len());
    let share = |start: usize| {
        let mut scratch = Scratch::default();
        batch
            .iter()
            .skip(start)
            .step_by(threads.max(1))
            .map(|(_, asked)| one(asked, &mut scratch))
            .collect::<Vec<_>>()
    };
    if threads <= 1 {
        return share(0);
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|start| scope.spawn(move || share(start))).collect();
        let mut shares: Vec<_> = running
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(share) => share.into_iter(),
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect();
        (0..batch.len()).filter_map(|i| shares[i % threads].next()).collect()
    })
}

/// What the tags mean in one virtual network, as lists.
struct TagLists {
    virtual_network: u32,
    internet: u32,
    load_balancer: u32,
}

impl TagLists {
    fn new(network: &VirtualNetwork, lists: &mut Lists) -> Self {
        Self {
            virtual_network: lists.intern(virtual_network(&network.address_space)),
            internet: lists.intern(internet(&network.address_space)),
            load_balancer: lists.intern(vec![prefix(PLATFORM_ADDRESS, 32)]),
        }
    }
}

/// A rule with its explicit prefixes and ports as lists, tags still open.
struct Prepared {
    protocol: RuleProtocol,
    sides: [PreparedSide; 2],
    ports: [u32; 2],
}

struct PreparedSide {
    any: bool,
    list: Option<u32>,
    tags: Vec<ServiceTag>,
}

impl Prepared {
    fn new(rule: &SecurityRule, lists: &mut Lists, ports: &mut PortLists) -> Self {
        // Packets of these have no ports, and the datapath looks up port 0 for them. A range on such a rule means
        // nothing (`reference/azure.md` §1.8), so the rule must match whatever it says. A rule for any protocol with
        // a range is about ports: a packet without matches only if the range has 0.
        let portless = matches!(rule.protocol, RuleProtocol::Icmp | RuleProtocol::Esp | RuleProtocol::Ah);
        let mut ports_of = |ranges: &[(u16, u16)]| if portless { ANY_PORT } else { ports.intern(ranges) };
        Self {
            protocol: rule.protocol,
            ports: [ports_of(&rule.source_ports), ports_of(&rule.destination_ports)],
            sides: [&rule.source, &rule.destination].map(|terms| PreparedSide::new(terms, lists)),
        }
    }

    fn seen_with(&self, tags: &TagLists) -> Rule {
        let side = |side: &PreparedSide| {
            if side.any {
                return Side::Any;
            }
            let tag = |tag: &ServiceTag| match tag {
                ServiceTag::VirtualNetwork => tags.virtual_network,
                ServiceTag::Internet => tags.internet,
                ServiceTag::AzureLoadBalancer => tags.load_balancer,
                _ => todo!(),
            };
            Side::Lists(side.list.into_iter().chain(side.tags.iter().map(tag)).collect())
        };
        let [source, destination] = &self.sides;
        Rule { protocol: self.protocol, addresses: [side(source), side(destination)], ports: self.ports }
    }
}

impl PreparedSide {
    fn new(terms: &[AddressMatch], lists: &mut Lists) -> Self {
        let mut any = false;
        let mut prefixes = Vec::new();
        let mut tags = Vec::new();
        for term in terms {
            match term {
                AddressMatch::Any => any = true,
                AddressMatch::Prefix(net) => prefixes.extend(v4(net)),
                AddressMatch::Tag(tag) => tags.push(*tag),
                AddressMatch::Application(_) => todo!(),
            }
        }
        // 0.0.0.0/0 is spelt out now and then; as a list it would be one more class around all others.
        any |= prefixes.contains(&prefix(std::net::Ipv4Addr::UNSPECIFIED, 0));
        let list = (!any && !prefixes.is_empty()).then(|| lists.intern(prefixes));
        Self { any, list, tags }
    }
}
