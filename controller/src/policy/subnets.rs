//! Subnets: their prefixes, gateways, groups and routes.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::nearest;
use super::network::{self, default_gateway};
use super::networks::{References, all_prefixes};
use super::overlap::overlaps;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{prefixes, shape};

/// A /30 is the smallest prefix with room for a gateway and a guest.
const LONGEST_V4: u8 = 30;

/// The same for IPv6, where the first address is no guest's either.
const LONGEST_V6: u8 = 126;

/// Larger than a site's usual prefix is hardly one subnet.
const SHORTEST_V6: u8 = 48;

/// What Azure allows, and what autoconfiguration needs (RFC 4862 §5.5.3).
const USUAL_V6: u8 = 64;

/// A subnet as read.
pub struct Subnet {
    pub name: Option<Text>,
    prefixes: Option<Vec<At<IpNet>>>,
    gateway: Option<At<IpAddr>>,
    group: Option<Text>,
    route_table: Option<Text>,
    /// `defaultOutboundAccess: true`, where it stands.
    pub default_outbound: Option<Span>,
}

/// Reads `subnets`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Subnet> {
    items.iter().filter_map(|node| read_subnet(node, problems)).collect()
}

fn read_subnet(node: &Node<'_>, problems: &mut Problems) -> Option<Subnet> {
    let fields = Fields::open(node, &shape::SUBNET, problems)?;
    let name = fields.text("name", problems);
    let written = fields.one_or_many("addressPrefix", "addressPrefixes", true, problems);
    let prefixes = written.and_then(|written| all_prefixes(written.items, problems));
    let gateway = fields.parsed("gateway", prefixes::parse_address, problems);
    let group = fields.text("networkSecurityGroup", problems);
    let route_table = fields.text("routeTable", problems);
    let default_outbound = fields.flag("defaultOutboundAccess", problems);
    let default_outbound = default_outbound.filter(|flag| flag.value).map(|flag| flag.span);
    Some(Subnet { name, prefixes, gateway, group, route_table, default_outbound })
}

/// Resolves what a subnet refers to.
pub fn build(
    subnet: Subnet,
    network: usize,
    references: &mut References<'_>,
    problems: &mut Problems,
) -> network::Subnet {
    let References { groups, used_groups, tables } = references;
    let group = subnet.group.as_ref().and_then(|text| groups.find(text, "networkSecurityGroups", problems));
    used_groups.extend(group);
    let route_table = subnet.route_table.as_ref().and_then(|text| tables.take(text, network, problems));
    network::Subnet {
        default_outbound: subnet.default_outbound.is_some(),
        network,
        prefixes: subnet.prefixes.iter().flatten().map(|prefix| prefix.value).collect(),
        gateways: gateways(&subnet, problems),
        name: subnet.name.map(|text| text.value).unwrap_or_default(),
        group,
        route_table,
    }
}

/// Checks the subnets of a network against its address space and each other.
pub fn check(network: &str, space: &[At<IpNet>], subnets: &[Subnet], problems: &mut Problems) {
    let mut all = Vec::new();
    for subnet in subnets {
        let title = subnet.name.as_ref().map_or("(unnamed)", |name| name.value.as_str());
        for prefix in subnet.prefixes.iter().flatten() {
            all.push((prefix, title));
            check_length(prefix, problems);
            if !space.is_empty() && !space.iter().any(|whole| whole.value.contains(&prefix.value)) {
                let list: Vec<_> = space.iter().map(|whole| whole.value.to_string()).collect();
                problems
                    .error(
                        prefix.span,
                        format!(
                            "subnet `{title}` ({}) is outside the address space of `{network}`",
                            prefix.value
                        ),
                    )
                    .also(space[0].span, format!("the address space: {}", list.join(", ")))
                    .help(
                        "choose a prefix inside the address space, or add one to `addressPrefixes` \
                        there",
                    );
            }
        }
    }
    for (later, earlier) in overlaps(&all) {
        problems
            .error(
                later.0.span,
                format!(
                    "subnet `{}` ({}) overlaps subnet `{}` ({})",
                    later.1, later.0.value, earlier.1, earlier.0.value
                ),
            )
            .also(earlier.0.span, format!("`{}` is here", earlier.1))
            .help("subnets of one virtual network must not share addresses: change one of the prefixes");
    }
}

fn check_length(prefix: &At<IpNet>, problems: &mut Problems) {
    let (shortest, longest) = match prefix.value {
        IpNet::V4(_) => (0, LONGEST_V4),
        IpNet::V6(_) => (SHORTEST_V6, LONGEST_V6),
    };
    let length = prefix.value.prefix_len();
    if length > longest {
        problems
            .error(prefix.span, format!("{} has no room for a gateway and a guest", prefix.value))
            .help(format!("the smallest subnet is a /{longest}"));
    } else if length < shortest {
        problems
            .error(prefix.span, format!("{} is too large for a subnet", prefix.value))
            .help(format!("the largest IPv6 subnet is a /{shortest}; Azure has only /{USUAL_V6}"));
    } else if matches!(prefix.value, IpNet::V6(_)) && length != USUAL_V6 {
        problems
            .warning(prefix.span, format!("the IPv6 subnet {} is not a /{USUAL_V6}", prefix.value))
            .help("Azure allows only /64, and guests cannot configure themselves in any other");
    }
}

/// The given gateway, and Azure's first address for every other prefix.
fn gateways(subnet: &Subnet, problems: &mut Problems) -> Vec<IpAddr> {
    let Some(prefixes) = &subnet.prefixes else { return Vec::new() };
    if let Some(gateway) = &subnet.gateway {
        let title = subnet.name.as_ref().map_or("(unnamed)", |name| name.value.as_str());
        match prefixes.iter().find(|prefix| prefix.value.contains(&gateway.value)) {
            None => {
                let list: Vec<_> = prefixes.iter().map(|prefix| prefix.value.to_string()).collect();
                problems
                    .error(
                        gateway.span,
                        format!("gateway {} is not in subnet `{title}` ({})", gateway.value, list.join(", ")),
                    )
                    .help("choose an address of the subnet, or leave `gateway` out to use its first one");
            }
            Some(prefix) => {
                if let Some(what) = reserved(&prefix.value, gateway.value) {
                    problems
                        .error(
                            gateway.span,
                            format!("gateway {} is the {what} of {}", gateway.value, prefix.value),
                        )
                        .help("choose another address of the subnet");
                }
            }
        }
    }
    let gateway = |prefix: &At<IpNet>| match &subnet.gateway {
        Some(given) if prefix.value.contains(&given.value) => Some(given.value),
        _ => default_gateway(&prefix.value),
    };
    let mut gateways: Vec<_> = prefixes.iter().filter_map(gateway).collect();
    gateways.sort_by_key(IpAddr::is_ipv6);
    gateways
}

/// What makes an address of a prefix unfit for a router or a guest. IPv6 has no broadcast, and its first address is
/// that of all routers of the subnet (RFC 4291 §2.6.1).
pub fn reserved(prefix: &IpNet, address: IpAddr) -> Option<&'static str> {
    match prefix {
        IpNet::V4(net) if address == net.network() => Some("network address"),
        IpNet::V4(net) if address == net.broadcast() => Some("broadcast address"),
        IpNet::V6(net) if address == net.network() => Some("subnet-router anycast address"),
        _ => None,
    }
}

/// Subnets by `web` and by `vnet1/web`.
#[derive(Default)]
pub struct SubnetNames {
    bare: HashMap<String, Vec<usize>>,
    full: HashMap<String, usize>,
    written: Vec<(String, String)>,
}

impl SubnetNames {
    pub fn add(&mut self, network: &str, subnet: &str, index: usize) {
        self.bare.entry(subnet.to_ascii_lowercase()).or_default().push(index);
        let full = format!("{network}/{subnet}");
        self.full.entry(full.to_ascii_lowercase()).or_insert(index);
        self.written.push((subnet.to_owned(), full));
    }

    /// Finds the subnet a reference means.
    pub fn find(
        &self,
        reference: &Text,
        subnets: &[network::Subnet],
        networks: &[network::VirtualNetwork],
        problems: &mut Problems,
    ) -> Option<usize> {
        let key = reference.value.to_ascii_lowercase();
        if let Some(index) = self.full.get(&key) {
            return Some(*index);
        }
        match self.bare.get(&key).map(Vec::as_slice) {
            Some([index]) => return Some(*index),
            Some(several) => {
                let network = |index: &usize| subnets[*index].network;
                let first = network(&several[0]);
                if several.iter().all(|index| network(index) == first) {
                    // Named twice in one network, which has been reported.
                    return Some(several[0]);
                }
                let of =
                    |index: &usize| format!("{}/{}", networks[network(index)].name, subnets[*index].name);
                let choices: Vec<_> = several.iter().map(of).collect();
                problems
                    .error(
                        reference.span,
                        format!("several virtual networks have a subnet `{}`", reference.value),
                    )
                    .help(format!("write which: {}", choices.join(" or ")));
                return None;
            }
            None => {}
        }
        let words = self.written.iter().flat_map(|(bare, full)| [bare.as_str(), full.as_str()]);
        let help = match nearest(&reference.value, words) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "define it in a virtual network's `subnets`".to_owned(),
        };
        problems.error(reference.span, format!("no subnet is named `{}`", reference.value)).help(help);
        None
    }
}
