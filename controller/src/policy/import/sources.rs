//! What the input holds, resource by resource, before references are resolved: groups, their members, tags.

use std::collections::HashSet;

use ipnet::IpNet;

use super::balancers::Balancer;
use super::discover::{Found, Kind};
use super::interfaces::Interface;
use super::names::{Id, render};
use super::networks::{Network, RouteTable};
use super::object::{Field, Object};
use super::publics::{Prefix, Public};
use super::report::{Level, Place, Report};
use super::{balancers, interfaces, networks, publics, rules};

/// Which resource something is.
#[derive(Debug, Clone)]
pub struct Named {
    pub id: Id,
    /// As written; empty if it has none.
    pub name: String,
    pub place: Place,
    pub title: String,
}

impl Named {
    /// A part of this resource.
    pub fn part(&self, kind: &str, name: &str, place: &Place) -> Self {
        Self {
            id: self.id.child(kind, name),
            name: name.to_owned(),
            place: place.clone(),
            title: format!("{}/{kind}/{name}", self.title),
        }
    }
}

/// A network security group.
#[derive(Debug)]
pub struct Group {
    pub named: Named,
    pub rules: Vec<rules::Rule>,
    pub flush: bool,
}

/// A service tag.
#[derive(Debug)]
pub struct Tag {
    pub name: String,
    pub prefixes: Vec<IpNet>,
    pub place: Place,
}

/// Everything found.
#[derive(Debug, Default)]
pub struct Sources {
    pub groups: Vec<Group>,
    pub application_groups: Vec<Named>,
    pub networks: Vec<Network>,
    pub route_tables: Vec<RouteTable>,
    pub interfaces: Vec<Interface>,
    pub publics: Vec<Public>,
    pub prefixes: Vec<Prefix>,
    pub balancers: Vec<Balancer>,
    pub tags: Vec<Tag>,
}

/// Reads every resource; parts that stand alone join the resource they belong to.
pub fn read(found: &[Found<'_>], report: &mut Report) -> Sources {
    let mut sources = Sources::default();
    let mut seen: HashSet<(Kind, String)> = HashSet::new();
    let (parts, whole): (Vec<_>, Vec<_>) = found.iter().partition(|found| {
        let alone = [
            Kind::Group,
            Kind::ApplicationGroup,
            Kind::Network,
            Kind::RouteTable,
            Kind::Interface,
            Kind::PublicAddress,
            Kind::PublicPrefix,
            Kind::Balancer,
            Kind::TagList,
        ];
        !alone.contains(&found.kind)
    });
    for found in whole.into_iter().chain(parts) {
        if found.identified {
            let key = (found.kind, format!("{:?} {}", found.id.scope, found.id.title().to_lowercase()));
            if !seen.insert(key) {
                repeated(found, report);
                continue;
            }
        }
        read_one(found, &mut sources, report);
    }
    sources
}

/// A resource whose id has been seen: the first one counts.
fn repeated(found: &Found<'_>, report: &mut Report) {
    let level = match found.kind {
        Kind::Group | Kind::Rule => Level::Error,
        _ => Level::Warning,
    };
    report.add(
        level,
        &found.place,
        &found.id.title(),
        "",
        "a resource with this id has been read already; the first one counts",
        "import one version of it",
    );
}

fn named(found: &Found<'_>) -> Named {
    Named {
        id: found.id.clone(),
        name: found.name.clone(),
        place: found.place.clone(),
        title: found.id.title(),
    }
}

/// Opens a resource; its name and the resources nested in it have been read.
pub fn open<'j>(json: &Field<'j>, title: &str, report: &mut Report) -> Option<Object<'j>> {
    let mut object = Object::open(json.json, &json.place, title, Level::Warning, report)?;
    object.take("name");
    object.take("resources");
    Some(object)
}

fn read_one(found: &Found<'_>, sources: &mut Sources, report: &mut Report) {
    let field = Field { json: found.json, place: found.place.clone() };
    let own = named(found);
    let parent = || Named {
        id: found.id.parent(),
        name: found.id.parent().name().to_owned(),
        place: found.place.clone(),
        title: found.id.parent().title(),
    };
    match found.kind {
        Kind::Group => sources.groups.extend(read_group(&field, own, report)),
        Kind::Rule | Kind::DefaultRule => {
            let at = sources.groups.iter().position(|group| group.named.id.same(&found.id.parent()));
            let at = at.unwrap_or_else(|| {
                sources.groups.push(Group { named: parent(), rules: Vec::new(), flush: false });
                sources.groups.len() - 1
            });
            let group = &mut sources.groups[at];
            if found.kind == Kind::DefaultRule {
                default_rule(&field, &group.named.title, report);
            } else {
                group.rules.extend(rules::read(&field, &group.named.title, report));
            }
        }
        Kind::ApplicationGroup => {
            if let Some(object) = open(&field, &own.title, report) {
                object.finish(&["asg"], report);
                sources.application_groups.push(own);
            }
        }
        Kind::Network => sources.networks.extend(networks::read(&field, own, report)),
        Kind::Subnet | Kind::Peering => {
            let at = sources.networks.iter().position(|network| network.named.id.same(&found.id.parent()));
            let at = at.unwrap_or_else(|| {
                sources.networks.push(Network::unknown(parent()));
                sources.networks.len() - 1
            });
            networks::read_part(found.kind, &field, &mut sources.networks[at], own, report);
        }
        Kind::RouteTable => sources.route_tables.extend(networks::read_table(&field, own, report)),
        Kind::Route => {
            let at = sources.route_tables.iter().position(|table| table.named.id.same(&found.id.parent()));
            let at = at.unwrap_or_else(|| {
                sources.route_tables.push(RouteTable { named: parent(), routes: Vec::new() });
                sources.route_tables.len() - 1
            });
            let table = &mut sources.route_tables[at];
            table.routes.extend(networks::read_route(&field, &table.named, report));
        }
        Kind::Interface => sources.interfaces.extend(interfaces::read(&field, own, report)),
        Kind::PublicAddress => sources.publics.extend(publics::read(&field, own, report)),
        Kind::PublicPrefix => sources.prefixes.extend(publics::read_prefix(&field, own, report)),
        Kind::Balancer => sources.balancers.extend(balancers::read(&field, own, report)),
        Kind::Frontend
        | Kind::Pool
        | Kind::OutboundRule
        | Kind::BalancingRule
        | Kind::NatRule
        | Kind::NatPool
        | Kind::Probe => {
            let at = sources.balancers.iter().position(|balancer| balancer.named.id.same(&found.id.parent()));
            let at = at.unwrap_or_else(|| {
                sources.balancers.push(Balancer::empty(parent()));
                sources.balancers.len() - 1
            });
            balancers::read_part(found.kind, &field, &mut sources.balancers[at], report);
        }
        Kind::TagList => read_tags(&field, sources, report),
    }
}

fn read_group(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Group> {
    let mut object = open(field, &named.title, report)?;
    let mut rules = Vec::new();
    for item in object.list("securityRules", Level::Error, report) {
        rules.extend(rules::read(&item, &named.title, report));
    }
    for item in object.list("defaultSecurityRules", Level::Error, report) {
        default_rule(&item, &named.title, report);
    }
    let flush = object.flag("flushConnection", report).unwrap_or(false);
    object.finish(&["group"], report);
    Some(Group { named, rules, flush })
}

/// Every group here ends with the same default rules; one that is different is not carried over.
fn default_rule(field: &Field<'_>, group: &str, report: &mut Report) {
    const DEFAULTS: &[(&str, u64, &str, &str)] = &[
        ("AllowVnetInBound", 65000, "Inbound", "Allow"),
        ("AllowAzureLoadBalancerInBound", 65001, "Inbound", "Allow"),
        ("DenyAllInBound", 65500, "Inbound", "Deny"),
        ("AllowVnetOutBound", 65000, "Outbound", "Allow"),
        ("AllowInternetOutBound", 65001, "Outbound", "Allow"),
        ("DenyAllOutBound", 65500, "Outbound", "Deny"),
    ];
    let Some(mut object) = Object::open(field.json, &field.place, group, Level::Error, report) else {
        return;
    };
    let mut text = |name: &str| object.take(name).and_then(|field| field.json.scalar()).unwrap_or_default();
    let (name, priority, direction, access) =
        (text("name"), text("priority"), text("direction"), text("access"));
    let name = name.rsplit('/').next().unwrap_or_default();
    let ours = DEFAULTS.iter().any(|(known, number, way, verdict)| {
        known.eq_ignore_ascii_case(name)
            && number.to_string() == priority
            && way.eq_ignore_ascii_case(&direction)
            && verdict.eq_ignore_ascii_case(&access)
    });
    if ours {
        report.ignore(&field.place, "every group here ends with this rule");
    } else {
        let level = if access.eq_ignore_ascii_case("allow") { Level::Warning } else { Level::Error };
        let title = format!("{group}/defaultSecurityRules/{name}");
        let why = "not one of the six default rules";
        report.add(level, &field.place, &title, "", why, "write it as a security rule of its own");
    }
}

fn read_tags(field: &Field<'_>, sources: &mut Sources, report: &mut Report) {
    let Some(mut object) = Object::open(field.json, &field.place, "serviceTags", Level::Warning, report)
    else {
        return;
    };
    for item in object.list("values", Level::Warning, report) {
        let opened = Object::open(item.json, &item.place, "serviceTags", Level::Warning, report);
        let Some(mut tag) = opened else { continue };
        let name = tag.scalar("name", report).map(|(name, _)| render(&name)).unwrap_or_default();
        tag.title = format!("serviceTags/{name}");
        let prefixes = networks::prefixes(&mut tag, &["addressPrefixes"], Level::Error, report);
        tag.finish(&["tag"], report);
        sources.tags.push(Tag { name, prefixes, place: item.place });
    }
    object.finish(&["tagList"], report);
}
