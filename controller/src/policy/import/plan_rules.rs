//! From rules as read to rules that the policy takes: several tags or families on one side become several rules, and
//! priorities that two rules have become different ones. The order of what decides stays.

use std::collections::HashMap;

use super::draft::{self, Side};
use super::names::{Index, Unique};
use super::report::{Level, Report};
use super::rules::{Rule, Term};
use super::sources::Group;
use crate::policy::network::{Access, Direction};

/// Tags that every policy has.
const BUILT_IN: &[&str] = &[
    "VirtualNetwork",
    "Internet",
    "AzureLoadBalancer",
    "AzurePlatformDNS",
    "AzurePlatformIMDS",
    "AzurePlatformLKM",
];
/// Their names in the classic deployment model.
const CLASSIC: &[(&str, &str)] =
    &[("VIRTUAL_NETWORK", "VirtualNetwork"), ("AZURE_LOADBALANCER", "AzureLoadBalancer")];

/// Application security groups that one rule may name on one side.
const MAX_GROUPS: usize = 10;

/// What rules refer to.
pub struct Names<'a> {
    pub application_groups: &'a Index,
    pub application_names: &'a [String],
    /// Tags of the file and of the input: by lower case, as written.
    pub tags: &'a HashMap<String, String>,
}

/// One side, cut into parts that a rule may have; `v6` if it is of one family.
struct Part {
    side: Side,
    v6: Option<bool>,
}

/// The rules of a group.
pub fn plan(group: &Group, names: &Names<'_>, report: &mut Report) -> Vec<draft::Rule> {
    let mut unique = Unique::default();
    // Whole names first, so that a rule that is split does not take the name of another.
    let own: Vec<String> = group.rules.iter().map(|rule| unique.take(&rule.name, "rule")).collect();
    let mut planned = Vec::new();
    for direction in [Direction::Inbound, Direction::Outbound] {
        let mut rules: Vec<(&Rule, Vec<draft::Rule>)> = Vec::new();
        for (rule, name) in group.rules.iter().zip(&own).filter(|(rule, _)| rule.direction == direction) {
            if *name != rule.name {
                let why = format!("the rule is called `{name}` here");
                report.add(Level::Note, &rule.place, &rule.title, "name", why, "choose a name you like");
            }
            rules.push((rule, pieces(rule, name, names, &mut unique, report)));
        }
        // What is denied comes first where two rules have one priority, which Azure does not allow.
        rules.sort_by_key(|(rule, _)| (rule.priority, rule.access == Access::Allow));
        place(rules, &mut planned, report);
    }
    planned
}

/// Gives every piece a priority of its own without changing the order.
fn place(rules: Vec<(&Rule, Vec<draft::Rule>)>, planned: &mut Vec<draft::Rule>, report: &mut Report) {
    let priorities: Vec<u32> = rules.iter().map(|(rule, _)| rule.priority).collect();
    let mut free = 100;
    let mut at = 0;
    let mut rules = rules.into_iter().peekable();
    while let Some((rule, pieces)) = rules.next() {
        let priority = rule.priority;
        let mut all: Vec<(&Rule, draft::Rule)> = pieces.into_iter().map(|piece| (rule, piece)).collect();
        at += 1;
        while let Some((other, more)) = rules.next_if(|(other, _)| other.priority == priority) {
            let why = format!("`{}` has the same priority and direction; it comes first here", rule.name);
            report.add(
                Level::Note,
                &other.place,
                &other.title,
                "priority",
                why,
                "see whether that is the order you want",
            );
            all.extend(more.into_iter().map(|piece| (other, piece)));
            at += 1;
        }
        let next = priorities.get(at).copied().unwrap_or(4097);
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        let start = if count <= next - priority { priority } else { free.max(next.saturating_sub(count)) };
        for (offset, (rule, mut piece)) in (start..).zip(all) {
            if offset >= next {
                let why = format!("no priority is free before {next} for this part of the rule");
                report.add(
                    rule.loss(),
                    &rule.place,
                    &rule.title,
                    "priority",
                    why,
                    "move the rules behind it and add it",
                );
                continue;
            }
            if offset != priority {
                let why = format!("`{}` has priority {offset} here", piece.name);
                report.add(
                    Level::Note,
                    &rule.place,
                    &rule.title,
                    "priority",
                    why,
                    "none needed: the order is the same",
                );
            }
            piece.priority = offset;
            free = offset + 1;
            planned.push(piece);
        }
    }
}

fn pieces(
    rule: &Rule,
    name: &str,
    names: &Names<'_>,
    unique: &mut Unique,
    report: &mut Report,
) -> Vec<draft::Rule> {
    let sources = parts(&rule.source, rule, "source", names, report);
    let destinations = parts(&rule.destination, rule, "destination", names, report);
    let mut pieces = Vec::new();
    for source in &sources {
        for destination in &destinations {
            // A packet has one family.
            if sources.len() * destinations.len() > 1
                && matches!((source.v6, destination.v6), (Some(from), Some(to)) if from != to)
            {
                continue;
            }
            pieces.push(draft::Rule {
                name: if pieces.is_empty() { name.to_owned() } else { unique.take(name, "rule") },
                description: rule.description.clone(),
                priority: rule.priority,
                direction: rule.direction,
                access: rule.access,
                protocol: rule.protocol,
                source: source.side.clone(),
                destination: destination.side.clone(),
                source_ports: rule.source_ports.clone(),
                destination_ports: rule.destination_ports.clone(),
            });
        }
    }
    if pieces.len() > 1 {
        let why = format!("written as {} rules: one family and one tag on each side of a rule", pieces.len());
        report.add(
            Level::Note,
            &rule.place,
            &rule.title,
            "",
            why,
            "none needed: together they match the same",
        );
    }
    if pieces.is_empty() {
        let why = match rule.access {
            Access::Deny => "the rule is left out: what it denies may be allowed now",
            Access::Allow => "the rule is left out: what it allows is denied now",
        };
        report.add(rule.loss(), &rule.place, &rule.title, "", why, "write the rule into the policy by hand");
    }
    pieces
}

/// Cuts one side of a rule: IPv4 with one tag, IPv6, further tags one by one, application security groups by tens.
fn parts(terms: &[Term], rule: &Rule, side: &str, names: &Names<'_>, report: &mut Report) -> Vec<Part> {
    let whole = |text: &str| Part { side: Side::Addresses(vec![text.to_owned()]), v6: None };
    if terms.iter().any(|term| matches!(term, Term::Any)) {
        return vec![whole("*")];
    }
    let (mut v4, mut v6, mut tags, mut groups) =
        (Vec::new(), Vec::new(), Vec::<String>::new(), Vec::<String>::new());
    for term in terms {
        match term {
            Term::Any => {}
            Term::Net(net) => {
                let text = if net.prefix_len() == net.max_prefix_len() {
                    net.addr().to_string()
                } else {
                    net.to_string()
                };
                let list = if net.addr().is_ipv4() { &mut v4 } else { &mut v6 };
                list.push(text);
            }
            Term::Tag(tag, place) => match known_tag(tag, rule, side, names) {
                Ok(tag) if tags.contains(&tag) => {}
                Ok(tag) => tags.push(tag),
                Err(why) => {
                    let action =
                        "import again with `--service-tags` and Azure's published file, or with a tag list";
                    report.add(rule.loss(), place, &rule.title, &format!("{side}AddressPrefix"), why, action);
                }
            },
            Term::Application(reference) => {
                // Every group that a rule names has been declared, if its id could be read at all.
                match names.application_groups.find(&reference.id) {
                    Some(at) if groups.contains(&names.application_names[at]) => {}
                    Some(at) => groups.push(names.application_names[at].clone()),
                    None => {
                        let why = format!("it is not clear which group {} is", reference.id.title());
                        let property = format!("{side}ApplicationSecurityGroups");
                        report.add(
                            rule.loss(),
                            &reference.place,
                            &rule.title,
                            &property,
                            why,
                            "name it in the policy",
                        );
                    }
                }
            }
        }
    }
    let mut parts: Vec<Part> = groups
        .chunks(MAX_GROUPS)
        .map(|chunk| Part { side: Side::Groups(chunk.to_vec()), v6: None })
        .collect();
    let mut tags = tags.into_iter();
    for (mut list, family) in [(v4, false), (v6, true)] {
        if list.is_empty() {
            continue;
        }
        list = dedup(list);
        let tag = tags.next();
        let v6 = tag.is_none().then_some(family);
        list.extend(tag);
        parts.push(Part { side: Side::Addresses(list), v6 });
    }
    parts.extend(tags.map(|tag| whole(&tag)));
    parts
}

fn dedup(list: Vec<String>) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    list.into_iter().filter(|text| seen.insert(text.clone())).collect()
}

/// The name of a tag that every policy has.
pub fn built_in(tag: &str) -> Option<&'static str> {
    let own = BUILT_IN.iter().find(|known| known.eq_ignore_ascii_case(tag)).copied();
    own.or_else(|| CLASSIC.iter().find(|(old, _)| old.eq_ignore_ascii_case(tag)).map(|(_, new)| *new))
}

/// The tag's name as the policy knows it; why not otherwise.
fn known_tag(tag: &str, rule: &Rule, side: &str, names: &Names<'_>) -> Result<String, String> {
    match built_in(tag) {
        Some(name)
            if name.starts_with("AzurePlatform")
                && (side == "source" || rule.direction == Direction::Inbound) =>
        {
            Err(format!("service tag `{tag}` can only be the destination of an outbound rule"))
        }
        Some(name) => Ok(name.to_owned()),
        None => names
            .tags
            .get(&tag.to_lowercase())
            .cloned()
            .ok_or_else(|| format!("service tag `{tag}` is not built in, and no tag list has it")),
    }
}
