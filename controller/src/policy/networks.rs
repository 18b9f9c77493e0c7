//! Virtual networks: their address spaces, and with them the subnets and peerings.

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::{Fields, parse_text};
use super::names::Names;
use super::network;
use super::overlap::overlaps;
use super::peerings::{self, Peering};
use super::register::Register;
use super::routes::Tables;
use super::source::{At, Span, Text};
use super::subnets::{self, Subnet, SubnetNames};
use super::tree::Node;
use super::{prefixes, shape};

/// A virtual network as read.
pub struct Network {
    name: Option<Text>,
    span: Span,
    /// `None` when something in it was wrong: then nothing is measured against it.
    space: Option<Vec<At<IpNet>>>,
    peerings: Vec<Peering>,
    subnets: Vec<Subnet>,
}

/// Reads `virtualNetworks`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Network> {
    items.iter().filter_map(|node| read_network(node, problems)).collect()
}

fn read_network(node: &Node<'_>, problems: &mut Problems) -> Option<Network> {
    let fields = Fields::open(node, &shape::VIRTUAL_NETWORK, problems)?;
    let name = fields.text("name", problems);
    let space = fields.node("addressSpace").and_then(|node| read_space(node, problems));
    let peerings = peerings::read(fields.list("virtualNetworkPeerings", problems), problems);
    let subnets = subnets::read(fields.list("subnets", problems), problems);
    Some(Network { name, span: fields.span, space, peerings, subnets })
}

fn read_space(node: &Node<'_>, problems: &mut Problems) -> Option<Vec<At<IpNet>>> {
    let fields = Fields::open(node, &shape::ADDRESS_SPACE, problems)?;
    let items = fields.texts("addressPrefixes", problems);
    if items.is_empty() && fields.node("addressPrefixes").is_some() {
        problems
            .error(fields.key("addressPrefixes"), "the address space is empty")
            .help("add a prefix, such as 10.0.0.0/16");
    }
    all_prefixes(items, problems)
}

/// All of them, or nothing if one is wrong.
pub fn all_prefixes(items: Vec<Text>, problems: &mut Problems) -> Option<Vec<At<IpNet>>> {
    let count = items.len();
    let parse = prefixes::parse_prefix;
    let nets: Vec<_> = items.into_iter().filter_map(|text| parse_text(text, parse, problems)).collect();
    (count > 0 && nets.len() == count).then_some(nets)
}

/// Resolved networks, with what is needed to check references to them.
pub struct Resolved {
    pub networks: Vec<network::VirtualNetwork>,
    pub subnets: Vec<network::Subnet>,
    /// Prefixes of all address spaces: (network, prefix).
    pub spaces: Vec<(usize, At<IpNet>)>,
    /// Subnets that allow default outbound, and where they say so.
    pub default_outbound: Vec<(usize, Span)>,
    names: SubnetNames,
}

/// What subnets refer to.
pub struct References<'a> {
    pub groups: &'a Names,
    pub used_groups: &'a mut Vec<usize>,
    pub tables: &'a mut Tables,
}

/// Checks what concerns more than one object and builds networks and subnets.
pub fn resolve(
    read: Vec<Network>,
    references: &mut References<'_>,
    register: &mut Register,
    problems: &mut Problems,
) -> Resolved {
    let mut names = Names::new("virtual network");
    let mut resolved = Resolved {
        networks: Vec::new(),
        subnets: Vec::new(),
        spaces: Vec::new(),
        default_outbound: Vec::new(),
        names: SubnetNames::default(),
    };
    let (mut all_peerings, mut spans) = (Vec::new(), Vec::new());
    for (index, net) in read.into_iter().enumerate() {
        let name = net.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &net.name {
            names.declare(text, index, problems);
            register.add(&["virtualNetworks", &name], net.span);
        }
        let space = net.space.unwrap_or_default();
        check_space(&space, problems);
        resolved.spaces.extend(space.iter().map(|prefix| (index, prefix.clone())));
        subnets::check(&name, &space, &net.subnets, problems);
        let mut own = Names::new("subnet of this network");
        for subnet in net.subnets {
            let position = resolved.subnets.len();
            if let Some(text) = &subnet.name {
                own.declare(text, position, problems);
                register.add(&["virtualNetworks", &name, "subnets", &text.value], text.span);
                resolved.names.add(&name, &text.value, position);
            }
            resolved.default_outbound.extend(subnet.default_outbound.map(|span| (position, span)));
            resolved.subnets.push(subnets::build(subnet, index, references, problems));
        }
        let address_space = space.iter().map(|prefix| prefix.value).collect();
        resolved.networks.push(network::VirtualNetwork { name, id: 0, address_space, peers: Vec::new() });
        all_peerings.push(net.peerings);
        spans.push(net.span);
    }
    let Resolved { networks, spaces, .. } = &mut resolved;
    peerings::resolve(&all_peerings, &names, networks, &spans, spaces, register, problems);
    assign_ids(&mut resolved.networks);
    resolved
}

fn check_space(space: &[At<IpNet>], problems: &mut Problems) {
    for prefix in space {
        if let Some((range, why)) = prefixes::forbidden(&prefix.value) {
            let help = match prefix.value {
                IpNet::V4(_) => "use private ranges such as 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
                IpNet::V6(_) => {
                    "use a unique local prefix such as fd00:1::/48, or the one your provider gave you"
                }
            };
            problems
                .error(
                    prefix.span,
                    format!("{} covers {range} ({why}), which no virtual network can have", prefix.value),
                )
                .help(help);
        }
    }
    let all: Vec<_> = space.iter().map(|prefix| (prefix, ())).collect();
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

impl Resolved {
    /// Finds the subnet a reference means.
    pub fn find_subnet(&self, reference: &Text, problems: &mut Problems) -> Option<usize> {
        self.names.find(reference, &self.subnets, &self.networks, problems)
    }

    /// The virtual network a subnet is in.
    pub fn network_of(&self, subnet: usize) -> usize {
        self.subnets[subnet].network
    }
}
