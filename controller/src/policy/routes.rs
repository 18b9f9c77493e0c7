//! Route tables: where a subnet's packets go instead of where they would (`reference/azure.md` §1.4, §2.1).

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::{Complaint, Fields};
use super::names::Names;
use super::network::{Interface, Route, RouteHop, RouteTable};
use super::networks::Resolved;
use super::register::Register;
use super::source::{At, Span, Text};
use super::tags::Tags;
use super::tree::Node;
use super::{prefixes, shape};

/// The words of `nextHopType`; an appliance's address stands in a field of its own.
const HOPS: &[(&str, Hop)] = &[
    ("VnetLocal", Hop::Plain(RouteHop::VnetLocal)),
    ("Internet", Hop::Plain(RouteHop::Internet)),
    ("VirtualAppliance", Hop::Appliance),
    ("VirtualNetworkGateway", Hop::Plain(RouteHop::VirtualNetworkGateway)),
    ("None", Hop::Plain(RouteHop::None)),
];

#[derive(Clone, Copy)]
enum Hop {
    Plain(RouteHop),
    Appliance,
}

/// The tables by name, and which virtual networks use each.
pub struct Tables {
    names: Names,
    pub built: Vec<RouteTable>,
    spans: Vec<Span>,
    /// Where the addresses of appliances stand: (table, address).
    appliances: Vec<(usize, At<IpAddr>)>,
    users: Vec<Vec<usize>>,
}

/// Reads `routeTables`.
pub fn read(items: &[Node<'_>], tags: &Tags, register: &mut Register, problems: &mut Problems) -> Tables {
    let mut tables = Tables {
        names: Names::new("route table"),
        built: Vec::new(),
        spans: Vec::new(),
        appliances: Vec::new(),
        users: Vec::new(),
    };
    for item in items {
        let Some(fields) = Fields::open(item, &shape::ROUTE_TABLE, problems) else { continue };
        let index = tables.built.len();
        let name = fields.text("name", problems);
        if let Some(name) = &name {
            tables.names.declare(name, index, problems);
            register.add(&["routeTables", &name.value], name.span);
        }
        let name = name.map(|name| name.value).unwrap_or_default();
        let widen = fields.flag("widenVirtualNetwork", problems).is_some_and(|flag| flag.value);
        let mut own = Own { names: Names::new("route of this table"), prefixes: HashMap::new() };
        let mut routes = Vec::new();
        for (at, item) in fields.list("routes", problems).iter().enumerate() {
            let Some(read) = read_route(item, tags, problems) else { continue };
            own.add(&read, at, problems);
            if let Some(text) = &read.name {
                register.add(&["routeTables", &name, "routes", &text.value], text.span);
            }
            tables.appliances.extend(read.appliance.clone().map(|address| (index, address)));
            routes.extend(read.build());
        }
        tables.built.push(RouteTable { name, routes, widen_virtual_network: widen });
        tables.spans.push(fields.span);
        tables.users.push(Vec::new());
    }
    tables
}

/// What a table has so far.
struct Own {
    names: Names,
    prefixes: HashMap<IpNet, Span>,
}

impl Own {
    fn add(&mut self, read: &ReadRoute, at: usize, problems: &mut Problems) {
        if let Some(name) = &read.name {
            self.names.declare(name, at, problems);
        }
        let Some(prefix) = &read.prefix else { return };
        if let Some(first) = self.prefixes.get(&prefix.value) {
            problems
                .error(prefix.span, format!("a second route of this table leads to {}", prefix.value))
                .also(*first, "the first one")
                .help("a packet goes one way: remove one of them");
        } else {
            self.prefixes.insert(prefix.value, prefix.span);
        }
    }
}

struct ReadRoute {
    name: Option<Text>,
    prefix: Option<At<IpNet>>,
    next_hop: Option<RouteHop>,
    appliance: Option<At<IpAddr>>,
}

impl ReadRoute {
    fn build(self) -> Option<Route> {
        Some(Route { name: self.name?.value, prefix: self.prefix?.value, next_hop: self.next_hop? })
    }
}

fn read_route(node: &Node<'_>, tags: &Tags, problems: &mut Problems) -> Option<ReadRoute> {
    let fields = Fields::open(node, &shape::ROUTE, problems)?;
    let name = fields.text("name", problems);
    let parse = |text: &str| match tags.get(text) {
        Some(_) => Err(Complaint::new(format!("routes to a service tag such as `{text}` are not available"))
            .help("write a route for each of its prefixes")),
        None => prefixes::parse_prefix(text),
    };
    let prefix = fields.parsed("addressPrefix", parse, problems);
    let hop = fields.choice("nextHopType", HOPS, problems);
    let appliance = fields.parsed("nextHopIpAddress", prefixes::parse_address, problems);
    let next_hop = match (hop.map(|hop| hop.value), &appliance) {
        (Some(Hop::Plain(_)), Some(_)) => {
            problems
                .error(fields.key("nextHopIpAddress"), "only a VirtualAppliance has a `nextHopIpAddress`")
                .help("remove it, or write `nextHopType: VirtualAppliance`");
            None
        }
        (Some(Hop::Plain(hop)), None) => Some(hop),
        (Some(Hop::Appliance), Some(address)) => {
            if let Some(prefix) = &prefix
                && prefix.value.addr().is_ipv4() != address.value.is_ipv4()
            {
                problems
                    .error(
                        address.span,
                        format!("{} is not of the family of {}", address.value, prefix.value),
                    )
                    .also(prefix.span, "the route's prefix")
                    .help("IPv4 goes to an IPv4 address of the appliance, IPv6 to an IPv6 address");
            }
            Some(RouteHop::VirtualAppliance(address.value))
        }
        (Some(Hop::Appliance), None) => {
            if fields.node("nextHopIpAddress").is_none() {
                problems
                    .error(fields.span, format!("{} lacks `nextHopIpAddress`", fields.title))
                    .help("add the address of the guest that is the appliance");
            }
            None
        }
        (None, _) => None,
    };
    let appliance = appliance.filter(|_| next_hop.is_some());
    Some(ReadRoute { name, prefix, next_hop, appliance })
}

impl Tables {
    /// Finds the table a subnet names, and notes that a subnet of this virtual network uses it.
    pub fn take(&mut self, reference: &Text, network: usize, problems: &mut Problems) -> Option<usize> {
        let index = self.names.find(reference, "routeTables", problems)?;
        if !self.users[index].contains(&network) {
            self.users[index].push(network);
        }
        Some(index)
    }

    /// Appliances are guests, so their addresses are in a network that uses the table or is peered with one.
    pub fn check_appliances(&self, networks: &Resolved, problems: &mut Problems) {
        for (table, address) in &self.appliances {
            let users = &self.users[*table];
            let reached = users.iter().flat_map(|network| self.reach(*network, networks));
            if !users.is_empty()
                && !reached.into_iter().any(|network| holds(networks, network, address.value))
            {
                let names: Vec<_> =
                    users.iter().map(|network| format!("`{}`", networks.networks[*network].name)).collect();
                problems
                    .error(
                        address.span,
                        format!(
                            "{} is not in the address space of {}, which uses `{}`, nor of a peer",
                            address.value,
                            names.join(", "),
                            self.built[*table].name
                        ),
                    )
                    .help("an appliance is a guest of the same or of a peered virtual network: correct the address");
            }
        }
    }

    /// An address without a guest, and a table without a subnet, are hardly meant.
    pub fn warn_unused(&self, networks: &Resolved, guests: &[Interface], problems: &mut Problems) {
        let configurations = guests.iter().flat_map(|guest| &guest.addresses);
        let taken: HashSet<(usize, IpAddr)> =
            configurations.map(|own| (networks.network_of(own.subnet), own.address)).collect();
        for (table, address) in self.appliances.iter().filter(|(table, _)| !self.users[*table].is_empty()) {
            let mut reached = self.users[*table].iter().flat_map(|network| self.reach(*network, networks));
            if !reached.any(|network| taken.contains(&(network, address.value))) {
                problems
                    .warning(
                        address.span,
                        format!("no guest has the address {} of this next hop", address.value),
                    )
                    .help("packets of this route are dropped until a network interface has it");
            }
        }
        for (index, table) in self.built.iter().enumerate().filter(|(index, _)| self.users[*index].is_empty())
        {
            problems
                .warning(self.spans[index], format!("nothing uses route table `{}`", table.name))
                .help("name it as `routeTable` of a subnet, or remove it");
        }
    }

    fn reach<'a>(&self, network: usize, networks: &'a Resolved) -> impl Iterator<Item = usize> + use<'a> {
        std::iter::once(network).chain(networks.networks[network].peers.iter().copied())
    }
}

fn holds(networks: &Resolved, network: usize, address: IpAddr) -> bool {
    networks.networks[network].address_space.iter().any(|prefix| prefix.contains(&address))
}
