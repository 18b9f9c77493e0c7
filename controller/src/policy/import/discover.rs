//! Finds the resources in whatever shape Azure's tools put them: answers of the REST interface, lists, templates.

use super::json::Json;
use super::names::{Id, render};
use super::object::{Field, Object};
use super::report::{Level, Place, Report};

/// What a resource is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Group,
    Rule,
    DefaultRule,
    ApplicationGroup,
    Network,
    Subnet,
    Peering,
    RouteTable,
    Route,
    Interface,
    PublicAddress,
    PublicPrefix,
    Balancer,
    Frontend,
    Pool,
    OutboundRule,
    BalancingRule,
    NatRule,
    NatPool,
    Probe,
    TagList,
}

/// Types without their provider, in lower case.
const TYPES: &[(&str, Kind)] = &[
    ("networksecuritygroups", Kind::Group),
    ("networksecuritygroups/securityrules", Kind::Rule),
    ("networksecuritygroups/defaultsecurityrules", Kind::DefaultRule),
    ("applicationsecuritygroups", Kind::ApplicationGroup),
    ("virtualnetworks", Kind::Network),
    ("virtualnetworks/subnets", Kind::Subnet),
    ("virtualnetworks/virtualnetworkpeerings", Kind::Peering),
    ("routetables", Kind::RouteTable),
    ("routetables/routes", Kind::Route),
    ("networkinterfaces", Kind::Interface),
    ("publicipaddresses", Kind::PublicAddress),
    ("publicipprefixes", Kind::PublicPrefix),
    ("loadbalancers", Kind::Balancer),
    ("loadbalancers/frontendipconfigurations", Kind::Frontend),
    ("loadbalancers/backendaddresspools", Kind::Pool),
    ("loadbalancers/outboundrules", Kind::OutboundRule),
    ("loadbalancers/loadbalancingrules", Kind::BalancingRule),
    ("loadbalancers/inboundnatrules", Kind::NatRule),
    ("loadbalancers/inboundnatpools", Kind::NatPool),
    ("loadbalancers/probes", Kind::Probe),
    ("servicetags", Kind::TagList),
];

/// A resource and where it stands.
#[derive(Debug)]
pub struct Found<'j> {
    pub kind: Kind,
    pub id: Id,
    /// The name as written; empty if there is none.
    pub name: String,
    pub json: &'j Json,
    pub place: Place,
    /// Does the input say which resource this is, so that a second one with the same id is the same one?
    pub identified: bool,
}

/// Finds all resources of a document.
pub fn discover<'j>(json: &'j Json, place: &Place, found: &mut Vec<Found<'j>>, report: &mut Report) {
    walk(json, place, None, found, report);
}

fn walk<'j>(
    json: &'j Json,
    place: &Place,
    parent: Option<(&Id, &str)>,
    found: &mut Vec<Found<'j>>,
    report: &mut Report,
) {
    if let Json::List(items) = json {
        for (index, item) in items.iter().enumerate() {
            walk(item, &place.index(index), parent, found, report);
        }
        return;
    }
    let Some(mut object) = Object::open(json, place, "document", Level::Warning, report) else { return };
    if let Some(kind) = declared(json, parent.map(|(_, kind)| kind)).or_else(|| guess(json)) {
        resource(json, place, kind, parent, found, report);
    } else if let Some(responses) = object.take("responses") {
        answers(&responses, found, report);
        object.finish(&["example"], report);
    } else if let Some(resolved) = object.take("resource_resolved") {
        walk(resolved.json, &resolved.place, None, found, report);
        object.finish(&["quickstart"], report);
    } else if json
        .get("type")
        .and_then(Json::text)
        .is_some_and(|kind| kind.eq_ignore_ascii_case("Microsoft.Resources/deployments"))
        && let Some(template) = object.take("template")
    {
        walk(template.json, &template.place, None, found, report);
        object.finish(&["deployment"], report);
    } else if json.get("type").is_none()
        && let Some(resources) = object.take("resources")
    {
        children(&resources, None, found, report);
        object.finish(&["template"], report);
    } else if let Some(Field { json: Json::List(items), place: list }) = object.take("value") {
        for (index, item) in items.iter().enumerate() {
            walk(item, &list.index(index), None, found, report);
        }
        object.finish(&[], report);
    } else {
        let kind = json.get("type").and_then(Json::text).unwrap_or("");
        let (why, action) = match kind {
            "" => (
                "not a resource of a kind that Portcullis knows".to_owned(),
                "import the resources it is about",
            ),
            _ => (
                format!("Portcullis has nothing for resources of type {kind}"),
                "see whether the guests need it",
            ),
        };
        report.add(Level::Warning, place, "document", "", why, action);
    }
}

/// The answers of a REST example; several differ in their status code only.
fn answers<'j>(responses: &Field<'j>, found: &mut Vec<Found<'j>>, report: &mut Report) {
    let Json::Map(entries) = responses.json else {
        let why = format!("expected an object, found {}", responses.json.kind());
        report.add(
            Level::Warning,
            &responses.place,
            "document",
            "responses",
            why,
            "import the answer itself",
        );
        return;
    };
    let mut read = false;
    for (code, answer) in entries {
        let place = responses.place.key(code);
        let Some(mut answer) = Object::open(answer, &place, "response", Level::Warning, report) else {
            continue;
        };
        if let Some(body) = answer.take("body") {
            match read {
                true => report.ignore(&body.place, "the same resource, answered with another status code"),
                false => walk(body.json, &body.place, None, found, report),
            }
            read = true;
        }
        answer.finish(&["example"], report);
    }
}

fn children<'j>(
    resources: &Field<'j>,
    parent: Option<(&Id, &str)>,
    found: &mut Vec<Found<'j>>,
    report: &mut Report,
) {
    match resources.json {
        Json::List(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, &resources.place.index(index), parent, found, report);
            }
        }
        // Templates of language version 2 name their resources.
        Json::Map(items) => {
            for (key, item) in items {
                walk(item, &resources.place.key(key), parent, found, report);
            }
        }
        other => {
            let why = format!("expected a list of resources, found {}", other.kind());
            report.add(
                Level::Warning,
                &resources.place,
                "document",
                "resources",
                why,
                "import what is deployed",
            );
        }
    }
}

fn resource<'j>(
    json: &'j Json,
    place: &Place,
    kind: Kind,
    parent: Option<(&Id, &str)>,
    found: &mut Vec<Found<'j>>,
    report: &mut Report,
) {
    let kind_path = TYPES.iter().find(|(_, known)| *known == kind).map_or("", |(path, _)| path);
    let name = json.get("name").and_then(Json::scalar).map(|name| render(&name)).unwrap_or_default();
    let own = json.get("id").and_then(Json::text).map(|id| Id::parse(&render(id)));
    let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let given = own.filter(|id| id.types.last().is_some_and(|kind| *kind == last(kind_path)));
    let identified = given.is_some();
    let id = given.unwrap_or_else(|| match parent {
        Some((parent, _)) => {
            let short = name.rsplit('/').next().unwrap_or_default();
            parent.child(&last(kind_path), short)
        }
        None => Id::of(&format!("Microsoft.Network/{kind_path}"), &name),
    });
    if let Some(place_of) = json.get("resources").map(|_| place.key("resources"))
        && let Some(nested) = json.get("resources")
    {
        let full = format!("Microsoft.Network/{kind_path}");
        children(&Field { json: nested, place: place_of }, Some((&id, &full)), found, report);
    }
    let name = if name.is_empty() {
        id.name().to_owned()
    } else {
        name.rsplit('/').next().unwrap_or_default().to_owned()
    };
    found.push(Found { kind, id, name, json, place: place.clone(), identified });
}

/// The kind that `type` or `id` says.
fn declared(json: &Json, parent: Option<&str>) -> Option<Kind> {
    let known = |path: &str| TYPES.iter().find(|(known, _)| *known == path).map(|(_, kind)| *kind);
    if let Some(text) = json.get("type").and_then(Json::text) {
        let full = text.to_lowercase();
        let nested = parent.map(|parent| format!("{parent}/{full}").to_lowercase());
        let strip = |path: &str| path.strip_prefix("microsoft.network/").map(str::to_owned);
        if let Some(kind) =
            strip(&full).or_else(|| nested.as_deref().and_then(strip)).as_deref().and_then(known)
        {
            return Some(kind);
        }
        // A type that is something else's is believed, not guessed around.
        if full.contains('/') {
            return None;
        }
    }
    let id = Id::parse(json.get("id")?.text()?);
    match id.types.join("/").as_str() {
        path if path.ends_with("/networkinterfaces") => Some(Kind::Interface),
        path => known(path),
    }
}

/// By what it has, where neither type nor id says it.
fn guess(json: &Json) -> Option<Kind> {
    if json.get("type").is_some()
        || json.get("id").and_then(Json::text).is_some_and(|id| id.contains("/providers/"))
    {
        return None;
    }
    let has = |name: &str| {
        json.get(name).is_some() || json.get("properties").is_some_and(|p| p.get(name).is_some())
    };
    let kind = if has("securityRules") || has("defaultSecurityRules") {
        Kind::Group
    } else if has("addressSpace") {
        Kind::Network
    } else if has("priority") && has("direction") && has("access") && has("protocol") {
        Kind::Rule
    } else if has("frontendIPConfigurations") && has("backendAddressPools") {
        Kind::Balancer
    } else if has("values") && (has("changeNumber") || has("cloud")) {
        Kind::TagList
    } else if has("addressPrefix") && has("nextHopType") {
        Kind::Route
    } else if has("routes") {
        Kind::RouteTable
    } else if has("addressPrefix") || has("addressPrefixes") {
        Kind::Subnet
    } else if has("ipConfigurations") {
        Kind::Interface
    } else if has("publicIPAllocationMethod") {
        Kind::PublicAddress
    } else if has("ipPrefix") {
        Kind::PublicPrefix
    } else {
        return None;
    };
    Some(kind)
}
