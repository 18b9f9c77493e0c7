//! Network security groups and their rules (`reference/azure.md` §1.1, §1.2).

use std::collections::{HashMap, HashSet};

use super::application::RuleUse;
use super::diagnostics::Problems;
use super::fields::{Fields, OneOrMany, parse_text};
use super::limits::MAX_RULES;
use super::names::{Names, check_name};
use super::network::{Access, AddressMatch, Direction, Limits, RuleProtocol, SecurityGroup, SecurityRule};
use super::register::Register;
use super::sides::{self, DESTINATION, SOURCE, Side, Words};
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{ports, shape};

/// Priorities of rules; the defaults stand behind them (65000 and up).
pub const PRIORITIES: std::ops::RangeInclusive<u32> = 100..=4096;

/// A group and direction holds this many rules: as many as there are priorities (design §5). Azure, and `Limits` unless
/// raised, stops at 1,000 for a whole group.
pub const MAX_RULES_PER_DIRECTION: usize = 3997;

/// Azure's limit for a rule's description.
const MAX_DESCRIPTION: usize = 140;

/// A group as read; `None` is what was wrong and has been reported.
pub struct Group {
    pub name: Option<Text>,
    span: Span,
    rules: Vec<Rule>,
}

struct Rule {
    name: Option<Text>,
    span: Span,
    priority: Option<At<u32>>,
    direction: Option<At<Direction>>,
    source: Option<Side>,
    destination: Option<Side>,
    rule: Option<Rest>,
}

/// What of a rule nothing else is compared with.
struct Rest {
    description: String,
    access: Access,
    protocol: RuleProtocol,
    source_ports: Vec<(u16, u16)>,
    destination_ports: Vec<(u16, u16)>,
}

/// Fewer groups than this are not worth a thread.
const GROUPS_PER_THREAD: usize = 16;

/// Reads `networkSecurityGroups`, many of them on all processors.
pub fn read(items: &[Node<'_>], words: &Words<'_>, problems: &mut Problems) -> Vec<Group> {
    let read = |share: &[Node<'_>]| {
        let mut problems = Problems::default();
        let groups: Vec<_> = share.iter().filter_map(|node| read_group(node, words, &mut problems)).collect();
        (groups, problems)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(items.len() / GROUPS_PER_THREAD).max(1);
    let mut shares = items.chunks(items.len().div_ceil(threads).max(1));
    let own = shares.next().unwrap_or_default();
    let mut all = Vec::with_capacity(items.len());
    std::thread::scope(|scope| {
        let read = &read;
        let running: Vec<_> = shares.map(|share| scope.spawn(move || read(share))).collect();
        let first = read(own);
        let others = running.into_iter().map(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        for (groups, found) in std::iter::once(first).chain(others) {
            all.extend(groups);
            problems.absorb(found);
        }
    });
    all
}

fn read_group(node: &Node<'_>, words: &Words<'_>, problems: &mut Problems) -> Option<Group> {
    let fields = Fields::open(node, &shape::SECURITY_GROUP, problems)?;
    let name = fields.text("name", problems);
    let items = fields.list("securityRules", problems);
    let rules = items.iter().filter_map(|item| read_rule(item, words, problems)).collect();
    Some(Group { name, span: fields.span, rules })
}

fn read_rule(node: &Node<'_>, words: &Words<'_>, problems: &mut Problems) -> Option<Rule> {
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
    let towards = direction.as_ref().map(|direction| direction.value);
    let source = sides::read(&fields, &SOURCE, towards, words, problems);
    let destination = sides::read(&fields, &DESTINATION, towards, words, problems);
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
        sides::never_matches(&fields, source, destination, problems);
    }
    let rule = (|| {
        Some(Rest {
            description: description.map(|text| text.value).unwrap_or_default(),
            access: access?.value,
            protocol: protocol?.value,
            source_ports: source_ports?,
            destination_ports: destination_ports?,
        })
    })();
    Some(Rule { name, span: fields.span, priority, direction, source, destination, rule })
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

impl Rule {
    fn build(self) -> Option<SecurityRule> {
        let rest = self.rule?;
        Some(SecurityRule {
            name: self.name?.value,
            description: rest.description,
            priority: self.priority?.value as u16,
            direction: self.direction?.value,
            access: rest.access,
            protocol: rest.protocol,
            source: self.source?.terms(),
            destination: self.destination?.terms(),
            source_ports: rest.source_ports,
            destination_ports: rest.destination_ports,
        })
    }

    /// The application groups it names, if any.
    fn uses(&self) -> Option<RuleUse> {
        let of = |side: &Option<Side>| side.as_ref().map(Side::applications).unwrap_or_default();
        let (source, destination) = (of(&self.source), of(&self.destination));
        let title = self.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        (!source.is_empty() || !destination.is_empty()).then_some(RuleUse { title, source, destination })
    }
}

/// Groups, and which application groups their rules name.
pub struct Resolved {
    pub groups: Vec<SecurityGroup>,
    pub uses: Vec<RuleUse>,
}

/// Checks what concerns more than one rule and builds the groups.
pub fn resolve(
    groups: Vec<Group>,
    names: &mut Names,
    limits: &Limits,
    register: &mut Register,
    problems: &mut Problems,
) -> Resolved {
    let mut built = Resolved { groups: Vec::with_capacity(groups.len()), uses: Vec::new() };
    for (index, group) in groups.into_iter().enumerate() {
        if index == limits.network_security_groups as usize {
            problems
                .error(group.span, format!("more than {index} network security groups"))
                .help("raise `limits.networkSecurityGroups`, or let subnets share groups");
        }
        if let Some(name) = &group.name {
            names.declare(name, index, problems);
            register.add(&["networkSecurityGroups", &name.value], name.span);
            for rule in group.rules.iter().filter_map(|rule| rule.name.as_ref()) {
                register
                    .add(&["networkSecurityGroups", &name.value, "securityRules", &rule.value], rule.span);
            }
        }
        check_rules(&group, limits, problems);
        check_sizes(&group, limits, problems);
        built.uses.extend(group.rules.iter().filter_map(Rule::uses));
        let rules = group.rules.into_iter().filter_map(Rule::build).collect();
        built
            .groups
            .push(SecurityGroup { name: group.name.map(|name| name.value).unwrap_or_default(), rules });
    }
    built
}

fn check_rules(group: &Group, limits: &Limits, problems: &mut Problems) {
    let mut by_name: HashMap<String, Span> = HashMap::new();
    let mut by_priority: HashMap<(u32, Direction), (&Rule, Span)> = HashMap::new();
    let mut counts: HashMap<Direction, usize> = HashMap::new();
    for (index, rule) in group.rules.iter().enumerate() {
        if index == limits.rules_per_group as usize {
            problems
                .error(rule.span, format!("more than {index} rules in one group"))
                .help(format!("join rules by using plural forms, or raise `limits.securityRulesPerGroup` (up to {MAX_RULES})"));
        }
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

/// What Azure counts over all rules of a group: addresses and prefixes for each side, and application groups.
fn check_sizes(group: &Group, limits: &Limits, problems: &mut Problems) {
    let most = limits.prefixes_per_group as usize;
    let sources: Vec<_> = group.rules.iter().filter_map(|rule| rule.source.as_ref()).collect();
    let destinations: Vec<_> = group.rules.iter().filter_map(|rule| rule.destination.as_ref()).collect();
    for (word, sides) in [("source", &sources), ("destination", &destinations)] {
        let mut count = 0;
        let over = sides.iter().flat_map(|side| &side.terms).find(|term| {
            count += usize::from(matches!(term.value, AddressMatch::Prefix(_)));
            count > most
        });
        if let Some(over) = over {
            problems
                .error(over.span, format!("more than {most} {word} addresses and prefixes in the rules of one group"))
                .help("define a service tag for them (tags do not count), or raise `limits.addressPrefixesPerGroup`");
        }
    }
    let most = limits.application_groups_per_group as usize;
    let mut seen = HashSet::new();
    for at in sources.iter().chain(&destinations).flat_map(|side| side.applications()) {
        if seen.insert(at.value) && seen.len() == most + 1 {
            problems
                .error(
                    at.span,
                    format!("more than {most} application security groups in the rules of one group"),
                )
                .help("join some of them, or raise `limits.applicationSecurityGroupsPerGroup`");
        }
    }
}
