//! Network security groups and their rules (`reference/azure.md` §1.1, §1.2).

use std::collections::HashMap;

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::{Fields, OneOrMany, parse_text};
use super::names::{Names, check_name};
use super::network::{Access, AddressMatch, Direction, RuleProtocol, SecurityGroup, SecurityRule};
use super::register::Register;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{ports, prefixes, shape};

/// Priorities of rules; the defaults stand behind them (65000 and up).
pub const PRIORITIES: std::ops::RangeInclusive<u32> = 100..=4096;

/// A group and direction holds this many rules: as many as there are priorities (design §5). Azure stops at 1,000 for
/// a whole group.
pub const MAX_RULES_PER_DIRECTION: usize = 3997;

/// Azure's limit for a rule's description.
const MAX_DESCRIPTION: usize = 140;

/// A group as read; `None` is what was wrong and has been reported.
pub struct Group {
    pub name: Option<Text>,
    rules: Vec<Rule>,
}

struct Rule {
    name: Option<Text>,
    priority: Option<At<u32>>,
    direction: Option<At<Direction>>,
    rule: Option<SecurityRule>,
}

/// Reads `networkSecurityGroups`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Group> {
    items.iter().filter_map(|node| read_group(node, problems)).collect()
}

fn read_group(node: &Node<'_>, problems: &mut Problems) -> Option<Group> {
    let fields = Fields::open(node, &shape::SECURITY_GROUP, problems)?;
    let name = fields.text("name", problems);
    let items = fields.list("securityRules", problems);
    Some(Group { name, rules: items.iter().filter_map(|item| read_rule(item, problems)).collect() })
}

fn read_rule(node: &Node<'_>, problems: &mut Problems) -> Option<Rule> {
    let fields = Fields::open(node, &shape::SECURITY_RULE, problems)?;
    let name = fields.text("name", problems);
    let description = fields.text("description", problems);
    let priority = fields.number("priority", *PRIORITIES.start(), *PRIORITIES.end(), problems);
    let direction = fields.choice(
        "direction",
        &[("Inbound", Direction::Inbound), ("Outbound", Direction::Outbound)],
        problems,
    );
    let access = fields.choice("access", &[("Allow", Access::Allow), ("Deny", Access::Deny)], problems);
    let protocol = fields.choice(
        "protocol",
        &[
            ("Tcp", RuleProtocol::Tcp),
            ("Udp", RuleProtocol::Udp),
            ("Icmp", RuleProtocol::Icmp),
            ("Esp", RuleProtocol::Esp),
            ("Ah", RuleProtocol::Ah),
            ("*", RuleProtocol::Any),
        ],
        problems,
    );
    let has_ports = protocol
        .as_ref()
        .is_none_or(|p| matches!(p.value, RuleProtocol::Tcp | RuleProtocol::Udp | RuleProtocol::Any));
    let source = read_side(&fields, "sourceAddressPrefix", "sourceAddressPrefixes", problems);
    let destination = read_side(&fields, "destinationAddressPrefix", "destinationAddressPrefixes", problems);
    // Hardly any rule says something about source ports; to leave destination ports out would be to open all of them
    // by forgetting a line.
    let source_ports = read_ports(&fields, "sourcePortRange", "sourcePortRanges", false, has_ports, problems);
    let destination_ports =
        read_ports(&fields, "destinationPortRange", "destinationPortRanges", has_ports, has_ports, problems);
    if let Some(text) = &description
        && text.value.chars().count() > MAX_DESCRIPTION
    {
        let count = text.value.chars().count();
        problems
            .error(text.span, format!("the description is {count} characters long"))
            .help(format!("Azure allows {MAX_DESCRIPTION}: put the rest into a YAML comment"));
    }
    if let (Some(source), Some(destination)) = (&source, &destination) {
        never_matches(&fields, source, destination, problems);
    }
    let rule = (|| {
        Some(SecurityRule {
            name: name.as_ref()?.value.clone(),
            description: description.map(|text| text.value).unwrap_or_default(),
            priority: priority.as_ref()?.value as u16,
            direction: direction.as_ref()?.value,
            access: access?.value,
            protocol: protocol?.value,
            source: source?,
            destination: destination?,
            source_ports: source_ports?,
            destination_ports: destination_ports?,
        })
    })();
    Some(Rule { name, priority, direction, rule })
}

/// Reads a rule's source or destination addresses.
fn read_side(
    fields: &Fields<'_, '_>,
    single: &str,
    plural: &str,
    problems: &mut Problems,
) -> Option<Vec<AddressMatch>> {
    let OneOrMany { items, many, .. } = fields.one_or_many(single, plural, true, problems)?;
    let count = items.len();
    let parse = |text: &str| prefixes::parse_match(text, plural);
    let terms: Vec<At<AddressMatch>> =
        items.into_iter().filter_map(|text| parse_text(text, parse, problems)).collect();
    let errors = terms.len() < count;
    if !many {
        return (!errors).then(|| terms.into_iter().map(|term| term.value).collect());
    }
    let mut tag: Option<Span> = None;
    let mut family: Option<(bool, Span)> = None;
    for term in &terms {
        match &term.value {
            AddressMatch::Any if count > 1 => {
                problems
                    .error(term.span, format!("'*' stands among others in `{plural}`"))
                    .help(format!("'*' covers the rest: write `{single}: '*'`"));
            }
            AddressMatch::Any | AddressMatch::Application(_) => {}
            AddressMatch::Tag(_) => match tag {
                Some(first) => {
                    problems
                        .error(term.span, "a rule cannot name several service tags on one side")
                        .also(first, "the first one")
                        .help("write one rule per tag, as in Azure");
                }
                None => tag = Some(term.span),
            },
            AddressMatch::Prefix(net) => {
                let v6 = matches!(net, IpNet::V6(_));
                match family {
                    Some((other, first)) if other != v6 => {
                        problems
                            .error(term.span, "IPv4 and IPv6 are mixed on one side of a rule")
                            .also(first, "the other family")
                            .help("write one rule per family, as in Azure");
                    }
                    _ => family = Some((v6, term.span)),
                }
            }
        }
    }
    (!errors).then(|| terms.into_iter().map(|term| term.value).collect())
}

/// Reads a rule's source or destination ports; any if absent and not required.
fn read_ports(
    fields: &Fields<'_, '_>,
    single: &str,
    plural: &str,
    required: bool,
    has_ports: bool,
    problems: &mut Problems,
) -> Option<Vec<(u16, u16)>> {
    if fields.node(single).is_none() && fields.node(plural).is_none() && !required {
        return Some(vec![ports::ANY]);
    }
    let OneOrMany { items, span, .. } = fields.one_or_many(single, plural, required, problems)?;
    let count = items.len();
    let parse = |text: &str| ports::parse_range(text, plural);
    let ranges: Vec<(u16, u16)> =
        items.into_iter().filter_map(|text| Some(parse_text(text, parse, problems)?.value)).collect();
    let ranges = (ranges.len() == count).then(|| ports::merge(ranges))?;
    if !has_ports && ranges != [ports::ANY] {
        // To ignore the port would widen the rule, to heed it would make the rule match nothing.
        problems
            .error(span, "Icmp, Esp and Ah have no ports")
            .help(format!("write `{single}: '*'`, or choose protocol Tcp or Udp"));
        return None;
    }
    Some(ranges)
}

/// A packet has one family: a rule from IPv4 to IPv6 is a slip, though it does no harm.
fn never_matches(
    fields: &Fields<'_, '_>,
    source: &[AddressMatch],
    destination: &[AddressMatch],
    problems: &mut Problems,
) {
    let family = |side: &[AddressMatch]| {
        let mut families = side.iter().map(|term| match term {
            AddressMatch::Prefix(net) => Some(matches!(net, IpNet::V6(_))),
            _ => None,
        });
        let first = families.next().flatten()?;
        families.all(|other| other == Some(first)).then_some(first)
    };
    if let (Some(from), Some(to)) = (family(source), family(destination))
        && from != to
    {
        problems
            .warning(
                fields.span,
                format!("{} matches nothing: one side is IPv4, the other IPv6", fields.title),
            )
            .help("write both sides in one family");
    }
}

/// Checks what concerns more than one rule and builds the groups.
pub fn resolve(
    groups: Vec<Group>,
    names: &mut Names,
    register: &mut Register,
    problems: &mut Problems,
) -> Vec<SecurityGroup> {
    let mut built = Vec::with_capacity(groups.len());
    for (index, group) in groups.into_iter().enumerate() {
        if let Some(name) = &group.name {
            names.declare(name, index, problems);
            register.add(&["networkSecurityGroups", &name.value], name.span);
            for rule in group.rules.iter().filter_map(|rule| rule.name.as_ref()) {
                register
                    .add(&["networkSecurityGroups", &name.value, "securityRules", &rule.value], rule.span);
            }
        }
        check_rules(&group, problems);
        let rules = group.rules.into_iter().filter_map(|rule| rule.rule).collect();
        built.push(SecurityGroup { name: group.name.map(|name| name.value).unwrap_or_default(), rules });
    }
    built
}

fn check_rules(group: &Group, problems: &mut Problems) {
    let mut by_name: HashMap<String, Span> = HashMap::new();
    let mut by_priority: HashMap<(u32, Direction), (&Rule, Span)> = HashMap::new();
    let mut counts: HashMap<Direction, usize> = HashMap::new();
    for rule in &group.rules {
        if let Some(name) = &rule.name {
            check_name(name, "security rule", problems);
            if let Some(first) = by_name.get(&name.value.to_ascii_lowercase()) {
                problems
                    .error(name.span, format!("a second rule of this group is named `{}`", name.value))
                    .also(*first, "the first one")
                    .help("names are compared without regard to case: rename one of them");
            } else {
                by_name.insert(name.value.to_ascii_lowercase(), name.span);
            }
        }
        let Some(direction) = &rule.direction else { continue };
        let count = counts.entry(direction.value).or_default();
        *count += 1;
        if *count == MAX_RULES_PER_DIRECTION + 1 {
            problems
                .error(
                    direction.span,
                    format!("more than {MAX_RULES_PER_DIRECTION} rules in one group and direction"),
                )
                .help("there are no more priorities: join rules by using plural forms");
        }
        let Some(priority) = &rule.priority else { continue };
        match by_priority.get(&(priority.value, direction.value)) {
            Some((first, span)) => {
                let title = |rule: &Rule| {
                    rule.name.as_ref().map_or("(unnamed)", |name| name.value.as_str()).to_owned()
                };
                let message = format!(
                    "SecurityRuleConflict: Security rule {} conflicts with rule {}. Rules cannot \
                        have the same Priority and Direction.",
                    title(rule),
                    title(first)
                );
                let word = if direction.value == Direction::Inbound { "Inbound" } else { "Outbound" };
                problems
                    .error(priority.span, message)
                    .label(format!("second {word} rule with priority {}", priority.value))
                    .also(*span, "first used here")
                    .help("give one of them a free priority; the lower number is asked first");
            }
            None => {
                by_priority.insert((priority.value, direction.value), (rule, priority.span));
            }
        }
    }
}
