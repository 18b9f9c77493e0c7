//! What an interface's groups say of a whole set of packets: a profile with a prefix, a tag or every port.
//!
//! Azure does not document what its diagnostics answer when rules decide parts of a profile differently. Here the answer
//! is **Allow only if every packet of the profile is allowed**, found exactly ([`super::regions`]). A field "matched" if the
//! rule's field covers the profile's whole field, so a rule with five of them decides all that is left. A deny rule that
//! takes any packet which no rule before it took ends the search; allow rules that take a part each are named together.

use super::addresses::{AddressSet, Family};
use super::expand::{METADATA, PLATFORM, Terms};
use super::regions::{Cover, Protocols, Region, Space, ports_cover};
use super::trace::{
    FieldsMatched, Level, PlatformRule, Trial, forced_tunnel, names_tag, service_protocols, service_tag,
    stages,
};
use crate::api::Failure;
use crate::compile::rules::{default_rules, in_order};
use crate::policy::network::{Access, Direction, Network, SecurityRule, ServiceTag};

/// What one group said.
#[derive(Debug, Clone)]
pub struct GroupJudgement<'n> {
    /// Index into the policy's groups.
    pub group: usize,
    pub level: Level,
    pub access: Access,
    /// The rules that were tried, up to the one that ended the search.
    pub trials: Vec<Trial<'n>>,
    /// The rule that ended the search; `None` if only a platform tag's rules were asked and none denied.
    pub matched: Option<&'n SecurityRule>,
    /// Every rule that decided a part, where `matched` does not decide all of the profile.
    pub parts: Vec<&'n SecurityRule>,
}

/// What all said.
#[derive(Debug, Clone)]
pub struct Judgement<'n> {
    pub platform: Option<PlatformRule>,
    pub groups: Vec<GroupJudgement<'n>>,
    pub access: Access,
}

/// Drops what no packet can have: a family that only one side has.
pub fn one_family_each(region: &mut Region) -> Result<(), Failure> {
    for family in Family::BOTH {
        if region.source.ranges(family).is_empty() || region.destination.ranges(family).is_empty() {
            let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
            region.source = region.source.only(other);
            region.destination = region.destination.only(other);
        }
    }
    if region.source.is_empty() || region.destination.is_empty() {
        return Err(Failure::input(
            "source and destination have no address family in common: no packet goes between them",
        ));
    }
    Ok(())
}

/// Judges a set of packets at one ip configuration. Errors only if the rules defeat the search.
pub fn judge<'n>(
    network: &'n Network,
    place: (usize, usize),
    direction: Direction,
    profile: &Region,
) -> Result<Judgement<'n>, Failure> {
    let subnet = network.interfaces[place.0].addresses[place.1].subnet;
    let mut terms = Terms::new(network, subnet);
    let platform = match direction {
        Direction::Outbound => platform_rule(&mut terms, profile),
        Direction::Inbound => None,
    };
    let only = platform.and_then(PlatformRule::exempt);
    if let (Some(rule), None) = (platform, only) {
        let access = if rule.denies() { Access::Deny } else { Access::Allow };
        return Ok(Judgement { platform, groups: Vec::new(), access });
    }
    let mut groups = Vec::new();
    let mut access = Access::Allow;
    for (level, group) in stages(network, place, direction) {
        let said = judge_group(&mut terms, group, level, direction, profile, only)?;
        access = said.access;
        groups.push(said);
        if access == Access::Deny {
            break;
        }
    }
    Ok(Judgement { platform, groups, access })
}

/// The platform rule that decides a whole profile. A profile that reaches further than the rule is the groups' business.
fn platform_rule(terms: &mut Terms<'_>, profile: &Region) -> Option<PlatformRule> {
    let platform = &terms.network.platform;
    for address in [PLATFORM, METADATA] {
        if AddressSet::single(address.into()).covers(&profile.destination) {
            let service = platform.services.iter().position(|service| {
                let protocols = service_protocols(service.protocol).iter().map(|&p| Protocols::of_number(p));
                service.address == address
                    && protocols.reduce(Protocols::and).is_some_and(|all| all.covers(profile.protocols))
                    && ports_cover(&[(service.port, service.port)], &profile.destination_ports)
            });
            return Some(match service {
                Some(index) => {
                    PlatformRule::Service(index, service_tag(address, platform.services[index].port))
                }
                None => PlatformRule::PlatformAddress,
            });
        }
    }
    let all_to = |port: u16| {
        Protocols::TCP.covers(profile.protocols) && ports_cover(&[(port, port)], &profile.destination_ports)
    };
    if platform.block_smtp && all_to(25) && terms.tag(ServiceTag::Internet).covers(&profile.destination) {
        return Some(PlatformRule::BlockSmtp25);
    }
    let kms = platform.allow_kms
        && all_to(1688)
        && AddressSet::from_prefixes(&platform.kms_servers).covers(&profile.destination)
        && !forced_tunnel(terms.network, terms.subnet);
    kms.then_some(PlatformRule::AllowKms)
}

fn judge_group<'n>(
    terms: &mut Terms<'n>,
    group: usize,
    level: Level,
    direction: Direction,
    profile: &Region,
    only: Option<ServiceTag>,
) -> Result<GroupJudgement<'n>, Failure> {
    let network = terms.network;
    let mut rules = in_order(&network.groups[group], direction);
    if let Some(tag) = only {
        rules.truncate(rules.len() - default_rules(direction).len());
        rules.retain(|rule| names_tag(rule, tag));
    }
    let mut regions: Vec<Region> = rules.iter().map(|rule| Region::of_rule(rule, terms)).collect();
    let profile_at = regions.len();
    regions.push(profile.clone());
    let space = Space::new(&regions);
    let mut trials = Vec::new();
    // Allow rules that took a part, as indices.
    let mut took: Vec<usize> = Vec::new();
    for (i, &rule) in rules.iter().enumerate() {
        let fields = fields(&regions[i], profile);
        trials.push(Trial { rule, fields });
        let takes = match space.covered(&[profile_at, i], &took) {
            Cover::Left(_) => true,
            Cover::Covered(_) => false,
            Cover::Undecided => return Err(undecided(&network.groups[group].name)),
        };
        if !takes {
            continue;
        }
        let whole = fields.all() && took.is_empty();
        took.push(i);
        let ends = rule.access == Access::Deny
            || match space.covered(&[profile_at], &took) {
                Cover::Covered(_) => true,
                Cover::Left(_) => false,
                Cover::Undecided => return Err(undecided(&network.groups[group].name)),
            };
        if ends {
            let parts = if whole { Vec::new() } else { took.iter().map(|&i| rules[i]).collect() };
            return Ok(GroupJudgement {
                group,
                level,
                access: rule.access,
                trials,
                matched: Some(rule),
                parts,
            });
        }
    }
    // Only where the default rules were not asked: what no rule of the tag takes is exempt.
    let parts = took.iter().map(|&i| rules[i]).collect();
    Ok(GroupJudgement { group, level, access: Access::Allow, trials, matched: None, parts })
}

fn undecided(group: &str) -> Failure {
    Failure::input(format!(
        "the rules of {group} divide this profile into too many parts to be judged: ask about a single address, \
         protocol and port"
    ))
}

fn fields(rule: &Region, profile: &Region) -> FieldsMatched {
    FieldsMatched {
        protocol_matched: rule.protocols.covers(profile.protocols),
        source_matched: rule.source.covers(&profile.source),
        source_port_matched: ports_cover(&rule.source_ports, &profile.source_ports),
        destination_matched: rule.destination.covers(&profile.destination),
        destination_port_matched: ports_cover(&rule.destination_ports, &profile.destination_ports),
    }
}
