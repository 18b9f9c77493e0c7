//! What is opened wider than it reads: rules that swallow the Internet, and tags that do.

use super::view::View;
use super::{Findings, Severity, example, rule_path};
use crate::answers::addresses::Family;
use crate::answers::expand::{routed_inside, tag_name};
use crate::answers::regions::{ANY_PORT, ports_cover};
use crate::policy::network::{Access, AddressMatch, Network};

/// A source with this share of the Internet's addresses has swallowed it.
const MOST: f64 = 0.5;

/// Allow rules inbound from most of the Internet to ports for administration, or to every port.
pub(super) fn check(views: &[View<'_>], findings: &mut Findings<'_>) {
    let Some(first) = views.first() else { return };
    for index in first.own() {
        let rule = first.rules[index];
        if rule.access != Access::Allow {
            continue;
        }
        let open = views.iter().find_map(|view| {
            let swallows = swallows(view, index);
            swallows.then(|| view.takes(index, view.management)).flatten()
        });
        let Some(packet) = open else { continue };
        let every_port = ports_cover(&rule.destination_ports, &[ANY_PORT]);
        let (code, what) = match every_port {
            true => ("PC202", "every port"),
            false => ("PC201", "ports for administration"),
        };
        let names: Vec<String> = rule.source.iter().map(|term| word(first.network, term)).collect();
        findings.add(
            code,
            Severity::Error,
            rule_path(first.network, first.group, rule),
            format!(
                "Inbound rule {} ({}) opens {what} to most of the Internet ({}): {} is allowed",
                rule.name,
                rule.priority,
                names.join(", "),
                example(&packet)
            ),
            "name the addresses that may come in, and the ports that are served",
        );
    }
}

fn word(network: &Network, term: &AddressMatch) -> String {
    match term {
        AddressMatch::Any => "*".to_owned(),
        AddressMatch::Prefix(net) => net.to_string(),
        AddressMatch::Tag(tag) => tag_name(network, *tag).to_owned(),
        AddressMatch::Application(index) => network.application_groups[*index].name.clone(),
    }
}

fn swallows(view: &View<'_>, rule: usize) -> bool {
    let public = view.regions[rule].source.common(&view.internet);
    Family::BOTH.into_iter().any(|family| {
        let all = view.internet.share(family);
        all > 0.0 && public.share(family) >= MOST * all
    })
}

/// Route tables by which `VirtualNetwork` means everything.
pub(super) fn widened(network: &Network, findings: &mut Findings<'_>) {
    for (index, table) in network.route_tables.iter().enumerate() {
        let route = table
            .routes
            .iter()
            .find(|r| r.prefix.prefix_len() == 0 && routed_inside(table, &r.prefix, r.next_hop));
        let Some(route) = route else { continue };
        let subnets: Vec<&str> = network
            .subnets
            .iter()
            .filter(|subnet| subnet.route_table == Some(index))
            .map(|subnet| subnet.name.as_str())
            .collect();
        if subnets.is_empty() {
            continue;
        }
        findings.add(
            "PC203",
            Severity::Warning,
            format!("routeTables/{}", table.name),
            format!(
                "route {} ({}) makes VirtualNetwork mean every address in {}: AllowVnetInBound and AllowVnetOutBound \
                 then allow the whole world",
                route.name,
                route.prefix,
                subnets.join(", ")
            ),
            "leave widenVirtualNetwork out, or deny what must not pass before priority 65000",
        );
    }
}
