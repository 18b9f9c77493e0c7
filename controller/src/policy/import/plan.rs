//! From what the input holds to a policy: names, references, and what has to be made up so that the policy is whole.
//!
//! What the input refers to but does not contain is made up *closed*: a group that is not there denies everything, a
//! public address is a placeholder nobody has. Nothing that is missing lets more through than Azure did.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::draft::{self, Draft, Side};
use super::names::{Devices, Index, Unique};
use super::object::Reference;
use super::plan_networks::{Networks, Wanted};
use super::plan_publics::Taken;
use super::report::{Level, Place, Report};
use super::rules::Term;
use super::sources::{Named, Sources};
use super::{Options, plan_balancers, plan_guests, plan_rules};
use crate::policy::network::{Access, Direction};
use crate::policy::ports;

/// A policy under construction.
pub struct Plan {
    pub draft: Draft,
    pub networks: Networks,
    pub group_names: Unique,
    pub group_ids: Index,
    pub application_ids: Index,
    application_names: Unique,
    pub public_names: Unique,
    pub public_ids: Index,
    /// For each public resource what it became.
    pub publics: Vec<Vec<Taken>>,
    /// Positions in the draft that have a user; and whether of a prefix.
    pub public_users: HashSet<(usize, bool)>,
    pub public_addresses: HashSet<IpAddr>,
    pub placeholder: u32,
    pub placeholder_v6: u32,
    pub devices: Devices,
}

/// Makes the policy.
pub fn plan(sources: &Sources, options: &Options, report: &mut Report) -> Draft {
    let mut plan = Plan {
        draft: Draft::default(),
        networks: Networks::default(),
        group_names: Unique::default(),
        group_ids: Index::default(),
        application_ids: Index::default(),
        application_names: Unique::default(),
        public_names: Unique::default(),
        public_ids: Index::default(),
        publics: Vec::new(),
        public_users: HashSet::new(),
        public_addresses: HashSet::new(),
        placeholder: 0,
        placeholder_v6: 0,
        devices: Devices::default(),
    };
    let tags = plan.tags(sources, options, report);
    plan.application_groups(sources, report);
    plan.groups(sources, &tags, report);
    plan.networks(sources, report);
    plan_guests::missing_subnets(&mut plan, sources, report);
    plan.publics(sources, report);
    plan_guests::interfaces(&mut plan, sources, options, report);
    plan_balancers::balancers(&mut plan, sources, report);
    plan_guests::placeholders(&mut plan, options, report);
    plan.default_outbound(report);
    plan.finish(options, report)
}

/// Notes that something has another name here.
pub fn renamed(named: &Named, name: &str, report: &mut Report) {
    if named.name != name {
        let why = format!("it is called `{name}` here");
        report.add(Level::Note, &named.place, &named.title, "name", why, "choose a name you like");
    }
}

impl Plan {
    fn tags(&mut self, sources: &Sources, options: &Options, report: &mut Report) -> HashMap<String, String> {
        let mut known = HashMap::new();
        if let Some(file) = &options.tag_file {
            self.draft.tag_file = Some(file.written.clone());
            known.extend(file.names.iter().map(|name| (name.to_lowercase(), name.clone())));
        }
        let mut names = Unique::default();
        for tag in &sources.tags {
            let title = format!("serviceTags/{}", tag.name);
            let twice = known.contains_key(&tag.name.to_lowercase());
            if plan_rules::built_in(&tag.name).is_some() {
                report.add(Level::Note, &tag.place, &title, "", "the tag is built in", "none needed");
            } else if twice {
                report.add(
                    Level::Note,
                    &tag.place,
                    &title,
                    "",
                    "the tag is known already; the first list counts",
                    "none needed",
                );
            } else if tag.prefixes.is_empty() {
                report.add(
                    Level::Error,
                    &tag.place,
                    &title,
                    "addressPrefixes",
                    "the tag has no prefix",
                    "leave its rules out",
                );
            } else {
                let name = names.take(&tag.name, "tag");
                if name != tag.name {
                    let why = format!("it is called `{name}` here");
                    report.add(Level::Note, &tag.place, &title, "name", why, "choose a name you like");
                }
                known.insert(tag.name.to_lowercase(), name.clone());
                self.draft.tags.push(draft::Tag { name, prefixes: tag.prefixes.clone() });
            }
        }
        known
    }

    fn application_groups(&mut self, sources: &Sources, report: &mut Report) {
        for named in &sources.application_groups {
            self.add_application_group(named, report);
        }
        let rules = sources.groups.iter().flat_map(|group| &group.rules);
        let of_rules = rules.flat_map(|rule| rule.source.iter().chain(&rule.destination)).filter_map(
            |term| match term {
                Term::Application(reference) => Some(reference),
                _ => None,
            },
        );
        let configurations = sources.interfaces.iter().flat_map(|interface| &interface.configurations);
        for reference in
            of_rules.chain(configurations.flat_map(|configuration| &configuration.application_groups))
        {
            if reference.id.types.is_empty() || self.application_ids.find(&reference.id).is_some() {
                continue;
            }
            let why = "the group is not in the input; those of its members that are say so themselves";
            report.add(
                Level::Note,
                &reference.place,
                &reference.id.title(),
                "",
                why,
                "import its members too",
            );
            self.add_application_group(&unknown(reference), report);
        }
    }

    fn add_application_group(&mut self, named: &Named, report: &mut Report) {
        let name = self.application_names.take(&named.name, "asg");
        renamed(named, &name, report);
        self.application_ids.add(&named.id);
        self.draft.application_groups.push(name);
    }

    fn groups(&mut self, sources: &Sources, tags: &HashMap<String, String>, report: &mut Report) {
        for group in &sources.groups {
            let name = self.group_names.take(&group.named.name, "nsg");
            renamed(&group.named, &name, report);
            self.group_ids.add(&group.named.id);
            let names = plan_rules::Names {
                application_groups: &self.application_ids,
                application_names: &self.draft.application_groups,
                tags,
            };
            let rules = plan_rules::plan(group, &names, report);
            self.draft.groups.push(draft::Group { name, rules, comment: None });
            if group.flush {
                let why = "`onRuleChange: reevaluate` holds for the whole policy, not for one group";
                report.add(
                    Level::Note,
                    &group.named.place,
                    &group.named.title,
                    "flushConnection",
                    why,
                    "none needed",
                );
                self.draft.reevaluate = true;
            }
        }
    }

    /// The name of a group that something refers to. One that is not in the input denies everything here.
    pub fn group(&mut self, reference: &Reference, user: &str, report: &mut Report) -> String {
        if let Some(at) = self.group_ids.find(&reference.id) {
            return self.draft.groups[at].name.clone();
        }
        let name = self.group_names.take(reference.id.name(), "nsg");
        let why = format!(
            "{} is not in the input (or several could be meant): `{name}` denies everything",
            reference.id.title()
        );
        let action = "import the group too, or write its rules";
        report.add(Level::Warning, &reference.place, user, "networkSecurityGroup", why, action);
        let deny = |direction: Direction| draft::Rule {
            name: format!("DenyAll{direction:?}"),
            description: String::new(),
            priority: 4096,
            direction,
            access: Access::Deny,
            protocol: "*",
            source: Side::Addresses(vec!["*".to_owned()]),
            destination: Side::Addresses(vec!["*".to_owned()]),
            source_ports: vec![ports::ANY],
            destination_ports: vec![ports::ANY],
        };
        let comment = Some(
            "REPLACE: the group is not in the input; until its rules are written here nothing passes"
                .to_owned(),
        );
        let rules = vec![deny(Direction::Inbound), deny(Direction::Outbound)];
        self.draft.groups.push(draft::Group { name: name.clone(), rules, comment });
        // Others that refer to it mean the same one; an expression that says nothing stays alone.
        self.group_ids.add(&reference.id);
        name
    }

    fn networks(&mut self, sources: &Sources, report: &mut Report) {
        let mut tables = Index::default();
        let mut table_names = Unique::default();
        for table in &sources.route_tables {
            let name = table_names.take(&table.named.name, "routes");
            renamed(&table.named, &name, report);
            tables.add(&table.named.id);
            let mut names = Unique::default();
            let mut routes: Vec<draft::Route> = Vec::new();
            for route in &table.routes {
                let v6 = |net: &IpNet| net.addr().is_ipv6();
                let why = if routes.iter().any(|other| other.prefix == route.prefix) {
                    "a route of this table leads to the same prefix"
                } else if route.address.is_some_and(|address| address.is_ipv6() != v6(&route.prefix)) {
                    "the appliance is not of the prefix's family"
                } else {
                    let name = names.take(&route.named.name, "route");
                    renamed(&route.named, &name, report);
                    routes.push(draft::Route {
                        name,
                        prefix: route.prefix,
                        hop: route.hop,
                        address: route.address,
                    });
                    continue;
                };
                report.add(
                    Level::Error,
                    &route.named.place,
                    &route.named.title,
                    "",
                    why,
                    "write the route you want",
                );
            }
            self.draft.route_tables.push(draft::RouteTable { name, routes });
        }
        for network in &sources.networks {
            let at = self.networks.add(network, report);
            for subnet in &network.subnets {
                let title = &subnet.named.title;
                let group = subnet.group.as_ref().map(|group| self.group(group, title, report));
                let route_table = subnet.route_table.as_ref().and_then(|table| {
                    let found = tables.find(&table.id).map(|at| self.draft.route_tables[at].name.clone());
                    if found.is_none() {
                        let why = format!("{} is not in the input", table.id.title());
                        let action = "import the route table too: without it packets take the usual way";
                        report.add(Level::Error, &table.place, title, "routeTable", why, action);
                    }
                    found
                });
                if subnet.default_outbound.is_none() {
                    let why = "without this property Azure lets its guests leave by a default address; here they do not";
                    let action = "write `defaultOutboundAccess: true`, and `defaultOutbound` at the top, if they should";
                    report.add(Level::Note, &subnet.named.place, title, "defaultOutboundAccess", why, action);
                }
                let wanted = Wanted {
                    id: &subnet.named.id,
                    title,
                    place: &subnet.named.place,
                    prefixes: subnet.prefixes.clone(),
                    group,
                    route_table,
                    default_outbound: subnet.default_outbound == Some(true),
                    comment: None,
                };
                self.networks.add_subnet(at, wanted, report);
            }
        }
        self.peerings(sources, report);
    }

    fn finish(mut self, options: &Options, report: &mut Report) -> Draft {
        self.networks.fill_empty(report);
        self.drop_appliances_nobody_reaches(report);
        let mut draft = self.draft;
        draft.networks = self.networks.networks;
        if !draft.publics.is_empty() || !draft.prefixes.is_empty() {
            // A device of its own: an uplink cannot be a guest's.
            draft.uplink = Some(self.devices.take(&options.uplink, ""));
            let nowhere = Place::nowhere();
            let why =
                "Azure has no word for it; the device towards the world and `announce: proxy` are made up";
            report.add(
                Level::Note,
                &nowhere,
                "uplinks",
                "device",
                why,
                "write the device that faces the world",
            );
        }
        let most = |count: fn(&draft::Group) -> usize| draft.groups.iter().map(count).max().unwrap_or(0);
        for (name, default, needed) in [
            ("networkSecurityGroups", 5000, draft.groups.len()),
            ("applicationSecurityGroups", 3000, draft.application_groups.len()),
            ("securityRulesPerGroup", 1000, most(|group| group.rules.len())),
            (
                "addressPrefixesPerGroup",
                4000,
                most(|group| {
                    addresses(group, |rule| &rule.source).max(addresses(group, |rule| &rule.destination))
                }),
            ),
            ("applicationSecurityGroupsPerGroup", 100, most(named_groups)),
        ] {
            if needed > default {
                draft.limits.push((name, needed));
            }
        }
        draft
    }
}

fn addresses(group: &draft::Group, side: fn(&draft::Rule) -> &Side) -> usize {
    let count = |rule: &draft::Rule| if let Side::Addresses(terms) = side(rule) { terms.len() } else { 0 };
    group.rules.iter().map(count).sum()
}

fn named_groups(group: &draft::Group) -> usize {
    let sides = group.rules.iter().flat_map(|rule| [&rule.source, &rule.destination]);
    let names: HashSet<&String> = sides
        .filter_map(|side| if let Side::Groups(names) = side { Some(names) } else { None })
        .flatten()
        .collect();
    names.len()
}

/// A resource that is only referred to.
pub fn unknown(reference: &Reference) -> Named {
    Named {
        id: reference.id.clone(),
        name: reference.id.name().to_owned(),
        place: reference.place.clone(),
        title: reference.id.title(),
    }
}
