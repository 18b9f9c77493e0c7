//! Application security groups: sets of ip configurations that rules name (`reference/azure.md` §1.5).

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::Names;
use super::network::{self, Limits};
use super::networks::Resolved;
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// The groups by name, and who is in them so far.
pub struct Applications {
    pub names: Names,
    groups: Vec<Group>,
}

struct Group {
    name: String,
    span: Span,
    first: Option<Member>,
    members: u32,
}

/// The member that decides which virtual network a group belongs to.
struct Member {
    title: String,
    network: usize,
    span: Span,
}

/// The groups that one rule names.
pub struct RuleUse {
    pub title: String,
    pub source: Vec<At<usize>>,
    pub destination: Vec<At<usize>>,
}

/// Reads `applicationSecurityGroups`.
pub fn read(
    items: &[Node<'_>],
    limits: &Limits,
    register: &mut Register,
    problems: &mut Problems,
) -> Applications {
    let mut applications =
        Applications { names: Names::new("application security group"), groups: Vec::new() };
    for item in items {
        let Some(fields) = Fields::open(item, &shape::APPLICATION_SECURITY_GROUP, problems) else { continue };
        let Some(name) = fields.text("name", problems) else { continue };
        applications.names.declare(&name, applications.groups.len(), problems);
        register.add(&["applicationSecurityGroups", &name.value], name.span);
        if applications.groups.len() == limits.application_groups as usize {
            let most = limits.application_groups;
            problems
                .error(name.span, format!("more than {most} application security groups"))
                .help("raise `limits.applicationSecurityGroups`, or remove groups");
        }
        applications.groups.push(Group { name: name.value, span: name.span, first: None, members: 0 });
    }
    applications
}

impl Applications {
    /// Finds the groups that something names; reports unknown ones and those named twice.
    pub fn find_all(names: &Names, references: &[Text], problems: &mut Problems) -> Vec<At<usize>> {
        let mut found: Vec<At<usize>> = Vec::new();
        for text in references {
            let Some(index) = names.find(text, "applicationSecurityGroups", problems) else { continue };
            match found.iter().find(|other| other.value == index) {
                Some(first) => {
                    problems
                        .error(
                            text.span,
                            format!("application security group `{}` is named twice", text.value),
                        )
                        .also(first.span, "the first time")
                        .help("remove one of them");
                }
                None => found.push(At::new(index, text.span)),
            }
        }
        found
    }

    /// Makes an ip configuration a member of the groups it names; their indices, sorted. `network` is the virtual
    /// network it is in, if that is known.
    pub fn join(
        &mut self,
        references: &[Text],
        title: &str,
        network: Option<usize>,
        networks: &Resolved,
        limits: &Limits,
        problems: &mut Problems,
    ) -> Vec<usize> {
        let most = limits.application_groups_per_configuration;
        if let Some(over) = references.get(most as usize) {
            problems
                .error(over.span, format!("`{title}` is in more than {most} application security groups"))
                .help("leave some, or raise `limits.applicationSecurityGroupsPerIpConfiguration`");
        }
        let found = Self::find_all(&self.names, references, problems);
        for At { value: index, span } in &found {
            let group = &mut self.groups[*index];
            group.members += 1;
            if group.members == limits.configurations_per_application_group.saturating_add(1) {
                let most = limits.configurations_per_application_group;
                problems
                    .error(
                        *span,
                        format!("application security group `{}` has more than {most} members", group.name),
                    )
                    .help(
                        "use several groups, or raise `limits.ipConfigurationsPerApplicationSecurityGroup`",
                    );
            }
            let Some(network) = network else { continue };
            match &group.first {
                None => group.first = Some(Member { title: title.to_owned(), network, span: *span }),
                Some(first) if first.network != network => {
                    let name = |network: usize| networks.networks[network].name.as_str();
                    problems
                        .error(
                            *span,
                            format!(
                                "`{title}` is in virtual network `{}`, application security group `{}` is in `{}`",
                                name(network),
                                group.name,
                                name(first.network)
                            ),
                        )
                        .also(first.span, format!("its first member, `{}`, is in `{}`", first.title, name(first.network)))
                        .help("all members of a group are in the virtual network of the first: make a second group");
                }
                Some(_) => {}
            }
        }
        let mut indices: Vec<usize> = found.into_iter().map(|at| at.value).collect();
        indices.sort_unstable();
        indices
    }

    /// A rule with groups on both sides needs all of them in one virtual network.
    pub fn check_rules(&self, uses: &[RuleUse], networks: &Resolved, problems: &mut Problems) {
        let network = |at: &At<usize>| self.groups[at.value].first.as_ref().map(|first| first.network);
        for rule in uses {
            let pairs = rule.source.iter().flat_map(|from| rule.destination.iter().map(move |to| (from, to)));
            let apart = |(from, to): &(&At<usize>, &At<usize>)| match (network(from), network(to)) {
                (Some(from), Some(to)) => from != to,
                _ => false,
            };
            let Some((from, to)) = pairs.into_iter().find(apart) else { continue };
            let (Some(one), Some(other)) = (network(from), network(to)) else { continue };
            let name = |index: usize| networks.networks[index].name.as_str();
            problems
                .error(
                    to.span,
                    format!(
                        "rule `{}` names application security groups of two virtual networks",
                        rule.title
                    ),
                )
                .label(format!("`{}` is in `{}`", self.groups[to.value].name, name(other)))
                .also(from.span, format!("`{}` is in `{}`", self.groups[from.value].name, name(one)))
                .help("both have to be in one virtual network: use address prefixes for the other side");
        }
    }

    /// A group without members that no rule names is hardly meant.
    pub fn warn_unused(&self, uses: &[RuleUse], problems: &mut Problems) {
        let mut used: Vec<bool> = self.groups.iter().map(|group| group.members > 0).collect();
        for at in uses.iter().flat_map(|rule| rule.source.iter().chain(&rule.destination)) {
            used[at.value] = true;
        }
        for (group, _) in self.groups.iter().zip(used).filter(|(_, used)| !used) {
            problems
                .warning(group.span, format!("nothing uses application security group `{}`", group.name))
                .help("name it in `applicationSecurityGroups` of an ip configuration and in a rule, or remove it");
        }
    }

    /// The groups as the rest of the program knows them.
    pub fn finish(self) -> Vec<network::ApplicationGroup> {
        let network = |group: &Group| group.first.as_ref().map(|first| first.network);
        let built = |group: Group| network::ApplicationGroup { network: network(&group), name: group.name };
        self.groups.into_iter().map(built).collect()
    }
}
