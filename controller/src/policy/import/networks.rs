//! Virtual networks, subnets, peerings and route tables as the input has them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::discover::Kind;
use super::names::render;
use super::object::{Field, Object, Reference, what_to_do};
use super::report::{Level, Report};
use super::sources::{Named, open};

#[derive(Debug)]
pub struct Network {
    pub named: Named,
    /// Is it in the input, or only something that belongs to it?
    pub given: bool,
    pub space: Vec<IpNet>,
    pub subnets: Vec<Subnet>,
    pub peerings: Vec<Peering>,
}

impl Network {
    /// A network of which only a part is in the input.
    pub fn unknown(named: Named) -> Self {
        Self { named, given: false, space: Vec::new(), subnets: Vec::new(), peerings: Vec::new() }
    }
}

#[derive(Debug)]
pub struct Subnet {
    pub named: Named,
    pub prefixes: Vec<IpNet>,
    pub group: Option<Reference>,
    pub route_table: Option<Reference>,
    /// May its guests leave under an address that Azure picks? Nothing means that they may.
    pub default_outbound: Option<bool>,
}

#[derive(Debug)]
pub struct Peering {
    pub named: Named,
    pub remote: Reference,
}

#[derive(Debug)]
pub struct RouteTable {
    pub named: Named,
    pub routes: Vec<Route>,
}

#[derive(Debug)]
pub struct Route {
    pub named: Named,
    pub prefix: IpNet,
    pub hop: &'static str,
    pub address: Option<IpAddr>,
}

/// Reads a virtual network with its subnets and peerings.
pub fn read(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Network> {
    let mut object = open(field, &named.title, report)?;
    let mut network = Network { given: true, ..Network::unknown(named) };
    if let Some(space) = object.take("addressSpace")
        && let Some(mut inner) =
            Object::open(space.json, &space.place, &network.named.title, Level::Warning, report)
    {
        network.space = prefixes(&mut inner, &["addressPrefixes"], Level::Warning, report);
        inner.finish(&["network"], report);
    }
    for (list, kind, type_name) in [
        ("subnets", Kind::Subnet, "subnets"),
        ("virtualNetworkPeerings", Kind::Peering, "virtualNetworkPeerings"),
    ] {
        for item in object.list(list, Level::Error, report) {
            let name = item.json.get("name").and_then(|name| name.scalar()).unwrap_or_default();
            let part = network.named.part(type_name, &render(&name), &item.place);
            read_part(kind, &item, &mut network, part, report);
        }
    }
    object.finish(&["network"], report);
    Some(network)
}

/// Reads a subnet or a peering into its network.
pub fn read_part(kind: Kind, field: &Field<'_>, network: &mut Network, named: Named, report: &mut Report) {
    let Some(mut object) = open(field, &named.title, report) else { return };
    if kind == Kind::Subnet {
        let prefixes = prefixes(&mut object, &["addressPrefix", "addressPrefixes"], Level::Warning, report);
        let group = object.reference("networkSecurityGroup", Level::Error, report);
        let route_table = object.reference("routeTable", Level::Error, report);
        let default_outbound = object.flag("defaultOutboundAccess", report);
        object.finish(&["subnet"], report);
        network.subnets.push(Subnet { named, prefixes, group, route_table, default_outbound });
        return;
    }
    let remote = object.reference("remoteVirtualNetwork", Level::Warning, report);
    let mut stops = None;
    for (property, wanted, why) in [
        ("allowVirtualNetworkAccess", "true", "the peering does not let the networks reach each other"),
        ("peeringState", "connected", "the peering is not connected"),
        ("peerCompleteVnets", "true", "only some subnets are peered"),
    ] {
        if let Some((text, _)) = object.scalar(property, report)
            && !text.eq_ignore_ascii_case(wanted)
        {
            stops = Some((property, why));
        }
    }
    let (place, title) = (object.place.clone(), object.title.clone());
    object.finish(&["peering"], report);
    match (stops, remote) {
        (Some((property, why)), _) => {
            report.add(
                Level::Warning,
                &place,
                &title,
                property,
                why,
                "peer the networks in the policy if they should be",
            );
        }
        (None, Some(remote)) => network.peerings.push(Peering { named, remote }),
        (None, None) => {
            report.add(
                Level::Warning,
                &place,
                &title,
                "remoteVirtualNetwork",
                "the peering names no network",
                "name it in the policy",
            );
        }
    }
}

/// Reads a route table.
pub fn read_table(field: &Field<'_>, named: Named, report: &mut Report) -> Option<RouteTable> {
    let mut object = open(field, &named.title, report)?;
    let items = object.list("routes", Level::Error, report);
    let routes = items.iter().filter_map(|item| read_route(item, &named, report)).collect();
    object.finish(&["routeTable"], report);
    Some(RouteTable { named, routes })
}

/// Reads a route. One that is lost lets packets go where they were kept from, if it led nowhere or to an appliance.
pub fn read_route(field: &Field<'_>, table: &Named, report: &mut Report) -> Option<Route> {
    const HOPS: &[(&str, &str)] = &[
        ("VnetLocal", "VnetLocal"),
        ("Internet", "Internet"),
        ("VirtualAppliance", "VirtualAppliance"),
        ("VirtualNetworkGateway", "VirtualNetworkGateway"),
        ("None", "None"),
    ];
    let name = field.json.get("name").and_then(|name| name.scalar()).unwrap_or_default();
    let named = table.part("routes", render(&name).rsplit('/').next().unwrap_or_default(), &field.place);
    let mut object = open(field, &named.title, report)?;
    let hop_text = object.scalar("nextHopType", report);
    let hop =
        hop_text.as_ref().and_then(|(text, _)| HOPS.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)));
    let hop = hop.map(|(_, word)| *word);
    let level = if matches!(hop, Some("Internet" | "VnetLocal")) { Level::Warning } else { Level::Error };
    let given = object.take("nextHopIpAddress");
    let address = given.as_ref().and_then(|field| field.json.scalar()).and_then(|text| text.parse().ok());
    let prefix = prefixes(&mut object, &["addressPrefix"], level, report).into_iter().next();
    object.finish(&["route"], report);
    let needs = hop == Some("VirtualAppliance");
    match (prefix, hop) {
        (Some(prefix), Some(hop)) if !needs || address.is_some() => {
            Some(Route { named, prefix, hop, address: address.filter(|_| needs) })
        }
        _ => {
            let why = match hop_text {
                Some((text, _)) if hop.is_none() => format!("the next hop `{text}` does not exist here"),
                _ => "prefix, next hop or its address is missing or cannot be read".to_owned(),
            };
            report.add(level, &field.place, &named.title, "", why, "write the route into the policy by hand");
            None
        }
    }
}

/// All prefixes of some properties; those that cannot be read are reported at `level`.
pub fn prefixes(
    object: &mut Object<'_>,
    properties: &[&str],
    level: Level,
    report: &mut Report,
) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for property in properties {
        let Some(field) = object.take(property) else { continue };
        let items: Vec<Field<'_>> = match field.json {
            super::json::Json::List(items) => items
                .iter()
                .enumerate()
                .map(|(at, json)| Field { json, place: field.place.index(at) })
                .collect(),
            _ => vec![field],
        };
        for item in items {
            let text = item.json.scalar().unwrap_or_default();
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            match net {
                Ok(net) => {
                    if net.addr() != net.network() {
                        let why =
                            format!("{text} has bits set behind its length: written as {}", net.trunc());
                        report.add(
                            Level::Note,
                            &item.place,
                            &object.title,
                            property,
                            why,
                            "see whether that is what is meant",
                        );
                    }
                    nets.push(net.trunc());
                }
                Err(_) => {
                    let shown: String = text.chars().take(60).collect();
                    let why = format!("`{shown}` ({}) is not an address prefix", item.json.kind());
                    report.add(level, &item.place, &object.title, property, why, what_to_do(item.json));
                }
            }
        }
    }
    // Once each, in the order they were written.
    let mut seen = std::collections::HashSet::new();
    nets.retain(|net| seen.insert(*net));
    nets
}
