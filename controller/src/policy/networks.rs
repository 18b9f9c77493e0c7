//! Virtual networks and their subnets.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::diagnostics::Problems;
use super::fields::{Fields, parse_text};
use super::names::{Names, nearest};
use super::network::{self, default_gateway};
use super::register::Register;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{prefixes, shape};

/// A /30 is the smallest prefix with room for a gateway and a guest.
const LONGEST_SUBNET: u8 = 30;

/// A virtual network as read.
pub struct Network {
    name: Option<Text>,
    span: Span,
    /// `None` when something in it was wrong: then nothing is measured against it.
    space: Option<Vec<At<Ipv4Net>>>,
    subnets: Vec<Subnet>,
}

struct Subnet {
    name: Option<Text>,
    prefixes: Option<Vec<At<Ipv4Net>>>,
    gateway: Option<At<Ipv4Addr>>,
    group: Option<Text>,
}

/// Reads `virtualNetworks`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Network> {
    items.iter().filter_map(|node| read_network(node, problems)).collect()
}

fn read_network(node: &Node<'_>, problems: &mut Problems) -> Option<Network> {
    let fields = Fields::open(node, &shape::VIRTUAL_NETWORK, problems)?;
    let name = fields.text("name", problems);
    let space = fields.node("addressSpace").and_then(|node| read_space(node, problems));
    let items = fields.list("subnets", problems);
    let subnets = items.iter().filter_map(|item| read_subnet(item, problems)).collect();
    Some(Network { name, span: fields.span, space, subnets })
}

fn read_space(node: &Node<'_>, problems: &mut Problems) -> Option<Vec<At<Ipv4Net>>> {
    let fields = Fields::open(node, &shape::ADDRESS_SPACE, problems)?;
    let items = fields.texts("addressPrefixes", problems);
    if items.is_empty() && fields.node("addressPrefixes").is_some() {
        problems
            .error(fields.key("addressPrefixes"), "the address space is empty")
            .help("add a prefix, such as 10.0.0.0/16");
    }
    all_prefixes(items, "address space", problems)
}

fn read_subnet(node: &Node<'_>, problems: &mut Problems) -> Option<Subnet> {
    let fields = Fields::open(node, &shape::SUBNET, problems)?;
    let name = fields.text("name", problems);
    let written = fields.one_or_many("addressPrefix", "addressPrefixes", true, problems);
    let prefixes = written.and_then(|written| all_prefixes(written.items, "subnet", problems));
    let gateway = fields.parsed("gateway", |text| prefixes::parse_v4(text, "gateway"), problems);
    let group = fields.text("networkSecurityGroup", problems);
    Some(Subnet { name, prefixes, gateway, group })
}

/// All of them, or nothing if one is wrong.
fn all_prefixes(items: Vec<Text>, what: &str, problems: &mut Problems) -> Option<Vec<At<Ipv4Net>>> {
    let count = items.len();
    let parse = |text: &str| prefixes::parse_v4_prefix(text, what);
    let nets: Vec<_> = items.into_iter().filter_map(|text| parse_text(text, parse, problems)).collect();
    (count > 0 && nets.len() == count).then_some(nets)
}

/// Resolved networks, with what is needed to check references to them.
pub struct Resolved {
    pub networks: Vec<network::VirtualNetwork>,
    pub subnets: Vec<network::Subnet>,
    /// Prefixes of all address spaces: (network, prefix).
    pub spaces: Vec<(usize, At<Ipv4Net>)>,
    names: SubnetNames,
}

/// Checks what concerns more than one object and builds networks and subnets.
pub fn resolve(
    read: Vec<Network>,
    groups: &Names,
    used_groups: &mut Vec<usize>,
    register: &mut Register,
    problems: &mut Problems,
) -> Resolved {
    let mut names = Names::new("virtual network");
    let mut resolved = Resolved {
        networks: Vec::new(),
        subnets: Vec::new(),
        spaces: Vec::new(),
        names: SubnetNames::default(),
    };
    for (index, net) in read.into_iter().enumerate() {
        let name = net.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &net.name {
            names.declare(text, index, problems);
            register.add(&["virtualNetworks", &name], net.span);
        }
        let space = net.space.unwrap_or_default();
        check_space(&space, problems);
        resolved.spaces.extend(space.iter().map(|prefix| (index, prefix.clone())));
        check_subnets(&name, &space, &net.subnets, problems);
        let mut own = Names::new("subnet of this network");
        for subnet in net.subnets {
            let position = resolved.subnets.len();
            if let Some(text) = &subnet.name {
                own.declare(text, position, problems);
                register.add(&["virtualNetworks", &name, "subnets", &text.value], text.span);
                resolved.names.add(&name, &text.value, position);
            }
            let group =
                subnet.group.as_ref().and_then(|text| groups.find(text, "networkSecurityGroups", problems));
            used_groups.extend(group);
            let prefixes: Vec<IpNet> =
                subnet.prefixes.iter().flatten().map(|prefix| IpNet::V4(prefix.value)).collect();
            let gateways = gateways(&subnet, problems);
            let name = subnet.name.map(|text| text.value).unwrap_or_default();
            resolved.subnets.push(network::Subnet {
                name,
                network: index,
                prefixes,
                gateways,
                group,
                route_table: None,
            });
        }
        let address_space = space.iter().map(|prefix| IpNet::V4(prefix.value)).collect();
        resolved.networks.push(network::VirtualNetwork { name, id: 0, address_space, peers: Vec::new() });
    }
    assign_ids(&mut resolved.networks);
    resolved
}

fn check_space(space: &[At<Ipv4Net>], problems: &mut Problems) {
    for prefix in space {
        for (range, why) in prefixes::FORBIDDEN {
            let range: Ipv4Net = range.parse().expect("a constant prefix");
            if range.contains(&prefix.value) || prefix.value.contains(&range) {
                problems
                    .error(
                        prefix.span,
                        format!(
                            "{} covers {range} ({why}), which no virtual network can \
                            have",
                            prefix.value
                        ),
                    )
                    .help("use private ranges such as 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16");
                break;
            }
        }
    }
    let all: Vec<_> = space.iter().map(|prefix| (prefix, "")).collect();
    for (later, earlier) in overlaps(&all) {
        problems
            .error(
                later.0.span,
                format!("{} and {} overlap in one address space", later.0.value, earlier.0.value),
            )
            .also(earlier.0.span, "the other one")
            .help("remove the smaller one, or make them apart");
    }
}

fn check_subnets(network: &str, space: &[At<Ipv4Net>], subnets: &[Subnet], problems: &mut Problems) {
    let mut all = Vec::new();
    for subnet in subnets {
        let title = subnet.name.as_ref().map_or("(unnamed)", |name| name.value.as_str());
        for prefix in subnet.prefixes.iter().flatten() {
            all.push((prefix, title));
            if prefix.value.prefix_len() > LONGEST_SUBNET {
                problems
                    .error(prefix.span, format!("{} has no room for a gateway and a guest", prefix.value))
                    .help(format!("the smallest subnet is a /{LONGEST_SUBNET}"));
            }
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

type Named<'a> = (&'a At<Ipv4Net>, &'a str);

/// Pairs that overlap, the one that stands later in the file first. Prefixes nest or are apart, so one sweep in order
/// of addresses finds for each the innermost one around it.
fn overlaps<'a>(all: &[Named<'a>]) -> Vec<(Named<'a>, Named<'a>)> {
    let mut sorted = all.to_vec();
    sorted.sort_by_key(|(prefix, _)| (prefix.value.network(), prefix.value.prefix_len()));
    let mut around: Vec<Named<'a>> = Vec::new();
    let mut found = Vec::new();
    for item in sorted {
        while around.last().is_some_and(|outer| !outer.0.value.contains(&item.0.value)) {
            around.pop();
        }
        if let Some(outer) = around.last() {
            let later_first = item.0.span.used >= outer.0.span.used;
            found.push(if later_first { (item, *outer) } else { (*outer, item) });
        }
        around.push(item);
    }
    found
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
                        format!(
                            "gateway {} is not in subnet `{title}` \
                            ({})",
                            gateway.value,
                            list.join(", ")
                        ),
                    )
                    .help("choose an address of the subnet, or leave `gateway` out to use its first one");
            }
            Some(prefix)
                if gateway.value == prefix.value.network() || gateway.value == prefix.value.broadcast() =>
            {
                problems
                    .error(
                        gateway.span,
                        format!(
                            "gateway {} is the network or broadcast address of {}",
                            gateway.value, prefix.value
                        ),
                    )
                    .help("choose an address between them");
            }
            Some(_) => {}
        }
    }
    let gateway = |prefix: &At<Ipv4Net>| match &subnet.gateway {
        Some(given) if prefix.value.contains(&given.value) => Some(IpAddr::V4(given.value)),
        _ => default_gateway(&IpNet::V4(prefix.value)),
    };
    prefixes.iter().filter_map(gateway).collect()
}

/// Network ids by a hash of the name, so that moving a network about in the file does not change the id its flows are
/// recorded under. Networks that collide step on in the order of their names.
fn assign_ids(networks: &mut [network::VirtualNetwork]) {
    let mut order: Vec<usize> = (0..networks.len()).collect();
    order.sort_by_key(|index| networks[*index].name.to_ascii_lowercase());
    let mut taken = std::collections::HashSet::new();
    for index in order.into_iter().take(usize::from(u16::MAX)) {
        let name = networks[index].name.to_ascii_lowercase();
        // FNV-1a: stable across versions, unlike the standard library's hasher.
        let hash =
            name.bytes().fold(0x811c_9dc5_u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let mut id = (hash % u32::from(u16::MAX)) as u16 + 1;
        while !taken.insert(id) {
            id = id % u16::MAX + 1;
        }
        networks[index].id = id;
    }
}

/// Subnets by `web` and by `vnet1/web`.
#[derive(Default)]
struct SubnetNames {
    bare: HashMap<String, Vec<usize>>,
    full: HashMap<String, usize>,
    written: Vec<(String, String)>,
}

impl SubnetNames {
    fn add(&mut self, network: &str, subnet: &str, index: usize) {
        self.bare.entry(subnet.to_ascii_lowercase()).or_default().push(index);
        let full = format!("{network}/{subnet}");
        self.full.entry(full.to_ascii_lowercase()).or_insert(index);
        self.written.push((subnet.to_owned(), full));
    }
}

impl Resolved {
    /// Finds the subnet a reference means.
    pub fn find_subnet(&self, reference: &Text, problems: &mut Problems) -> Option<usize> {
        let key = reference.value.to_ascii_lowercase();
        if let Some(index) = self.names.full.get(&key) {
            return Some(*index);
        }
        match self.names.bare.get(&key).map(Vec::as_slice) {
            Some([index]) => return Some(*index),
            Some(several) => {
                let network = |index: &usize| self.subnets[*index].network;
                let first = network(&several[0]);
                if several.iter().all(|index| network(index) == first) {
                    // Named twice in one network, which has been reported.
                    return Some(several[0]);
                }
                let of = |index: &usize| {
                    format!("{}/{}", self.networks[network(index)].name, self.subnets[*index].name)
                };
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
        let words = self.names.written.iter().flat_map(|(bare, full)| [bare.as_str(), full.as_str()]);
        let help = match nearest(&reference.value, words) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "define it in a virtual network's `subnets`".to_owned(),
        };
        problems.error(reference.span, format!("no subnet is named `{}`", reference.value)).help(help);
        None
    }
}
