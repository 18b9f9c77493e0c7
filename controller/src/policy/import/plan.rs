//! From what the input holds to a policy: names, references, and what has to be made up so that the policy is whole.
//!
//! What the input refers to but does not contain is made up *closed*: a group that is not there denies everything, a
//! public address is a placeholder nobody has. Nothing that is missing lets more through than Azure did.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use super::draft::{self, Draft, Side};
use super::names::{Devices, Id, Index, Unique};
use super::object::Reference;
use super::plan_networks::{Networks, Wanted};
use super::report::{Level, Place, Report};
use super::rules::Term;
use super::sources::{Named, Sources};
use super::{Options, plan_balancers, plan_guests, plan_rules};
use crate::policy::network::{Access, Direction};
use crate::policy::ports;

/// Where made-up public addresses are from: for documentation and benchmarks, nobody has them (RFC 5737, RFC 2544).
const PLACEHOLDERS: [&str; 4] = ["203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24", "198.18.0.0/15"];

/// The largest public prefix that is written out address by address; Azure's own limit.
const LONGEST_LIST: usize = 16;

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
    /// For each public resource the addresses it became: positions in the draft.
    pub publics: Vec<Vec<usize>>,
    pub public_users: HashSet<usize>,
    public_addresses: HashSet<Ipv4Addr>,
    placeholder: u32,
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
            if plan_rules::built_in(&tag.name).is_some() {
                report.add(Level::Note, &tag.place, &title, "", "the tag is built in", "none needed");
            } else if known.contains_key(&tag.name.to_lowercase()) {
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
                let wanted = Wanted {
                    id: &subnet.named.id,
                    title,
                    place: &subnet.named.place,
                    prefixes: subnet.prefixes.clone(),
                    group,
                    route_table,
                    comment: None,
                };
                self.networks.add_subnet(at, wanted, report);
            }
        }
        self.peerings(sources, report);
    }

    /// Only peerings with two sides, between networks that share no addresses, also not with another peer.
    fn peerings(&mut self, sources: &Sources, report: &mut Report) {
        let find = |ids: &Index, id: &Id| ids.find(id);
        let sides: HashSet<(usize, usize)> = sources
            .networks
            .iter()
            .enumerate()
            .flat_map(|(at, network)| network.peerings.iter().map(move |peering| (at, peering)))
            .filter_map(|(at, peering)| Some((at, find(&self.networks.ids, &peering.remote.id)?)))
            .collect();
        let mut peers: Vec<Vec<usize>> = vec![Vec::new(); sources.networks.len()];
        let spaces: Vec<Vec<IpNet>> =
            self.networks.networks.iter().map(|network| network.space.clone()).collect();
        let apart = |a: usize, b: usize| {
            spaces[a]
                .iter()
                .all(|one| spaces[b].iter().all(|other| !super::plan_networks::overlap(one, other)))
        };
        for (at, network) in sources.networks.iter().enumerate() {
            let mut names = Unique::default();
            for peering in &network.peerings {
                let remote = self.networks.ids.find(&peering.remote.id);
                let named = &peering.named;
                let why = match remote {
                    None => format!("{} is not in the input", peering.remote.id.title()),
                    Some(remote) if remote == at => "a network cannot be peered with itself".to_owned(),
                    Some(remote) if !sides.contains(&(remote, at)) => {
                        "the other network is not peered with this one".to_owned()
                    }
                    Some(remote)
                        if self.networks.networks[at]
                            .peerings
                            .iter()
                            .any(|(_, name)| *name == self.networks.networks[remote].name) =>
                    {
                        "the networks are peered already".to_owned()
                    }
                    Some(remote) => {
                        let together = peers[at].contains(&remote)
                            || (apart(at, remote)
                                && peers[at].iter().all(|other| apart(*other, remote))
                                && peers[remote].iter().all(|other| apart(*other, at)));
                        if together {
                            if !peers[at].contains(&remote) {
                                peers[at].push(remote);
                                peers[remote].push(at);
                            }
                            let name = names.take(&named.name, "peering");
                            renamed(named, &name, report);
                            let remote = self.networks.networks[remote].name.clone();
                            self.networks.networks[at].peerings.push((name, remote));
                            continue;
                        }
                        "the networks share addresses, or one does with another peer".to_owned()
                    }
                };
                report.add(
                    Level::Warning,
                    &named.place,
                    &named.title,
                    "remoteVirtualNetwork",
                    why,
                    "import both networks, or peer them in the policy",
                );
            }
        }
    }

    fn publics(&mut self, sources: &Sources, report: &mut Report) {
        for public in &sources.publics {
            self.public_ids.add(&public.named.id);
            let v6 = public.v6 || public.address.is_some_and(|address| address.is_ipv6());
            if v6 {
                let why = "public IPv6 addresses are not available yet";
                report.add(
                    Level::Warning,
                    &public.named.place,
                    &public.named.title,
                    "ipAddress",
                    why,
                    "give guests IPv6 addresses that are routed to them",
                );
                self.publics.push(Vec::new());
                continue;
            }
            let address = match public.address {
                Some(std::net::IpAddr::V4(address)) => Some(address),
                _ => None,
            };
            let added = self.add_public(&public.named, address, report);
            self.publics.push(added.into_iter().collect());
        }
        for prefix in &sources.prefixes {
            self.public_ids.add(&prefix.named.id);
            let mut all = Vec::new();
            match prefix.prefix {
                Some(IpNet::V4(net)) if net.prefix_len() >= 28 => {
                    for (at, address) in
                        (u32::from(net.network())..=u32::from(net.broadcast())).enumerate().take(LONGEST_LIST)
                    {
                        let address = Ipv4Addr::from(address);
                        // Addresses from the prefix that the input also has by name.
                        if let Some(known) =
                            self.draft.publics.iter().position(|public| public.address == address)
                        {
                            all.push(known);
                            continue;
                        }
                        let name = format!("{}-{at}", prefix.named.name);
                        let named = Named { name, ..prefix.named.clone() };
                        all.extend(self.add_public(&named, Some(address), report));
                    }
                }
                Some(net) => {
                    let why = format!("{net} is IPv6, or more than {LONGEST_LIST} addresses");
                    report.add(
                        Level::Warning,
                        &prefix.named.place,
                        &prefix.named.title,
                        "ipPrefix",
                        why,
                        "add the addresses you need by hand",
                    );
                }
                None => {
                    let why = "the prefix is not known";
                    report.add(
                        Level::Warning,
                        &prefix.named.place,
                        &prefix.named.title,
                        "ipPrefix",
                        why,
                        "add the addresses you need by hand",
                    );
                }
            }
            self.publics.push(all);
        }
    }

    fn add_public(&mut self, named: &Named, given: Option<Ipv4Addr>, report: &mut Report) -> Option<usize> {
        let usable = given.filter(|address| self.usable(*address));
        let mut comment = None;
        let address = match usable {
            Some(address) => address,
            None => {
                let Some(made_up) = self.placeholder() else {
                    report.add(
                        Level::Warning,
                        &named.place,
                        &named.title,
                        "ipAddress",
                        "there is no placeholder left",
                        "add the address by hand",
                    );
                    return None;
                };
                let why = match given {
                    Some(given) => format!(
                        "{given} is inside a virtual network, taken, or no public address; {made_up} is made up"
                    ),
                    None => format!("the address is not known; {made_up} is made up"),
                };
                report.add(
                    Level::Note,
                    &named.place,
                    &named.title,
                    "ipAddress",
                    why,
                    "write an address that the world routes here",
                );
                comment = Some("REPLACE: the address is made up".to_owned());
                made_up
            }
        };
        self.public_addresses.insert(address);
        let name = self.public_names.take(&named.name, "pip");
        renamed(named, &name, report);
        self.draft.publics.push(draft::Public { name, address, comment });
        Some(self.draft.publics.len() - 1)
    }

    fn usable(&self, address: Ipv4Addr) -> bool {
        let net = IpNet::V4(Ipv4Net::from(address));
        !self.public_addresses.contains(&address)
            && crate::policy::prefixes::forbidden(&net).is_none()
            && !self.networks.contains(address.into())
    }

    fn placeholder(&mut self) -> Option<Ipv4Addr> {
        let nets = PLACEHOLDERS.iter().filter_map(|net| net.parse::<Ipv4Net>().ok());
        let hosts = nets.flat_map(|net| net.hosts());
        for (at, address) in (0..).zip(hosts).skip(self.placeholder as usize) {
            self.placeholder = at + 1;
            if self.usable(address) {
                return Some(address);
            }
        }
        None
    }

    /// The addresses that a reference means, for one user alone; made up if it is not in the input.
    pub fn take_public(
        &mut self,
        reference: &Reference,
        user: &str,
        property: &str,
        report: &mut Report,
    ) -> Vec<usize> {
        let at = match self.public_ids.find(&reference.id) {
            Some(at) => at,
            None => {
                let why = format!("{} is not in the input", reference.id.title());
                report.add(Level::Note, &reference.place, user, property, why, "import the address too");
                self.public_ids.add(&reference.id);
                let added = self.add_public(&unknown(reference), None, report);
                self.publics.push(added.into_iter().collect());
                self.publics.len() - 1
            }
        };
        let all = self.publics[at].clone();
        let free: Vec<usize> =
            all.iter().copied().filter(|public| self.public_users.insert(*public)).collect();
        if free.is_empty() {
            let why = match all.is_empty() {
                true => "the address was not carried over",
                false => "the address has another user already",
            };
            report.add(
                Level::Warning,
                &reference.place,
                user,
                property,
                why,
                "give it an address of its own",
            );
        }
        free
    }

    fn finish(mut self, options: &Options, report: &mut Report) -> Draft {
        self.networks.fill_empty(report);
        self.drop_appliances_nobody_reaches(report);
        let mut draft = self.draft;
        draft.networks = self.networks.networks;
        if !draft.publics.is_empty() {
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

    /// An appliance is a guest of a network that uses the table, or of a peer.
    fn drop_appliances_nobody_reaches(&mut self, report: &mut Report) {
        for table in &mut self.draft.route_tables {
            let networks = &self.networks.networks;
            let uses = |network: &draft::Network| {
                network.subnets.iter().any(|s| s.route_table.as_ref() == Some(&table.name))
            };
            let users: Vec<&draft::Network> = networks.iter().filter(|network| uses(network)).collect();
            let holds =
                |network: &draft::Network, address| network.space.iter().any(|part| part.contains(&address));
            let reached = |address: std::net::IpAddr| {
                users.is_empty()
                    || users.iter().any(|user| {
                        holds(user, address)
                            || user.peerings.iter().any(|(_, peer)| {
                                networks.iter().any(|other| other.name == *peer && holds(other, address))
                            })
                    })
            };
            let name = table.name.clone();
            for route in &mut table.routes {
                let Some(address) = route.address.filter(|address| !reached(*address)) else { continue };
                let why = format!(
                    "no network that uses the table reaches the appliance {address}: the route leads nowhere here"
                );
                let title = format!("routetables/{name}/routes/{}", route.name);
                let nowhere = Place::nowhere();
                report.add(
                    Level::Warning,
                    &nowhere,
                    &title,
                    "nextHopIpAddress",
                    why,
                    "import the appliance's network, or write the next hop",
                );
                (route.hop, route.address) = ("None", None);
            }
        }
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
