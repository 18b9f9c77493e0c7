//! The two sides of a rule: addresses, tags or application groups (`reference/azure.md` §1.1).

use ipnet::IpNet;

use super::application::Applications;
use super::diagnostics::Problems;
use super::fields::{Fields, OneOrMany, parse_text};
use super::names::Names;
use super::network::{AddressMatch, Direction, Limits};
use super::prefixes;
use super::source::{At, Span};
use super::tags::{self, Tags};

/// What a rule's sides may name.
pub struct Words<'a> {
    pub tags: &'a Tags,
    pub applications: &'a Names,
    pub limits: &'a Limits,
}

/// The fields of a side.
pub struct SideNames {
    single: &'static str,
    plural: &'static str,
    applications: &'static str,
}

pub const SOURCE: SideNames = SideNames {
    single: "sourceAddressPrefix",
    plural: "sourceAddressPrefixes",
    applications: "sourceApplicationSecurityGroups",
};

pub const DESTINATION: SideNames = SideNames {
    single: "destinationAddressPrefix",
    plural: "destinationAddressPrefixes",
    applications: "destinationApplicationSecurityGroups",
};

/// A side as read, every term with its place.
pub struct Side {
    pub terms: Vec<At<AddressMatch>>,
}

impl Side {
    pub fn terms(self) -> Vec<AddressMatch> {
        self.terms.into_iter().map(|term| term.value).collect()
    }

    /// The application groups among its terms.
    pub fn applications(&self) -> Vec<At<usize>> {
        let index = |term: &At<AddressMatch>| match term.value {
            AddressMatch::Application(index) => Some(At::new(index, term.span)),
            _ => None,
        };
        self.terms.iter().filter_map(index).collect()
    }
}

/// Reads a side; `direction` is the rule's, if it has one. Nothing if something in it was wrong.
pub fn read(
    fields: &Fields<'_, '_>,
    names: &SideNames,
    direction: Option<Direction>,
    words: &Words<'_>,
    problems: &mut Problems,
) -> Option<Side> {
    let SideNames { single, plural, applications } = *names;
    if fields.node(applications).is_some() {
        return read_applications(fields, names, words, problems);
    }
    let OneOrMany { items, many, .. } = fields.one_or_many(single, plural, true, problems)?;
    let count = items.len();
    let parse = |text: &str| prefixes::parse_match(text, plural, words.tags);
    let terms: Vec<At<AddressMatch>> =
        items.into_iter().filter_map(|text| parse_text(text, parse, problems)).collect();
    let complete = terms.len() == count;
    platform_tags(&terms, names, direction, problems);
    if many {
        check_list(&terms, names, problems);
    }
    complete.then_some(Side { terms })
}

/// Platform tags stand for what guests ask of the platform: destinations of outbound rules.
fn platform_tags(
    terms: &[At<AddressMatch>],
    names: &SideNames,
    direction: Option<Direction>,
    problems: &mut Problems,
) {
    for term in terms {
        if let AddressMatch::Tag(tag) = term.value
            && tags::is_platform(tag)
            && (names.single == SOURCE.single || direction == Some(Direction::Inbound))
        {
            problems
                .error(term.span, "an AzurePlatform tag can only be the destination of an outbound rule")
                .help("write `direction: Outbound` and the tag as `destinationAddressPrefix`");
        }
    }
}

fn check_list(terms: &[At<AddressMatch>], names: &SideNames, problems: &mut Problems) {
    let SideNames { single, plural, .. } = names;
    let mut tag: Option<Span> = None;
    let mut family: Option<(bool, Span)> = None;
    for term in terms {
        match &term.value {
            AddressMatch::Any if terms.len() > 1 => {
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
}

fn read_applications(
    fields: &Fields<'_, '_>,
    names: &SideNames,
    words: &Words<'_>,
    problems: &mut Problems,
) -> Option<Side> {
    let field = names.applications;
    for other in [names.single, names.plural] {
        if fields.node(other).is_some() {
            problems
                .error(fields.key(field), format!("`{other}` and `{field}` are given together"))
                .also(fields.key(other), "the other one")
                .help("a side is addresses or application security groups: write two rules");
        }
    }
    let references = fields.texts(field, problems);
    if fields.is_empty_list(field) {
        problems.error(fields.key(field), format!("`{field}` is empty")).help("add at least one group");
    }
    let most = words.limits.application_groups_per_rule;
    if let Some(over) = references.get(most as usize) {
        problems
            .error(over.span, format!("more than {most} application security groups on one side of a rule"))
            .help("write several rules, or raise `limits.applicationSecurityGroupsPerRule`");
    }
    let found = Applications::find_all(words.applications, &references, problems);
    let complete = !found.is_empty() && found.len() == references.len();
    let term = |at: At<usize>| At::new(AddressMatch::Application(at.value), at.span);
    complete.then(|| Side { terms: found.into_iter().map(term).collect() })
}

/// A packet has one family: a rule from IPv4 to IPv6 is a slip, though it does no harm.
pub fn never_matches(fields: &Fields<'_, '_>, source: &Side, destination: &Side, problems: &mut Problems) {
    let family = |side: &Side| {
        let mut families = side.terms.iter().map(|term| match &term.value {
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
