//! What service tags and application groups mean, seen from a subnet (`reference/azure.md` §1.4, §1.5).

use std::collections::HashMap;

use ipnet::IpNet;

use super::addresses::Lists;
use super::prefix::{METADATA_ADDRESS, PLATFORM_ADDRESS, Prefix, internet, normalise};
use crate::policy::network::{Network, RouteHop, ServiceTag};

/// Subnets from where tags mean the same: rulesets are compiled once for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Index into the policy's virtual networks.
    pub network: usize,
    /// Indices into the policy's subnets; those without any address are not in here.
    pub subnets: Vec<usize>,
}

/// What a tag stands for in a subnet, sorted and without what another prefix covers.
pub fn tag_prefixes(network: &Network, subnet: usize, tag: ServiceTag) -> Vec<IpNet> {
    let subnet = &network.subnets[subnet];
    let list = match tag {
        ServiceTag::VirtualNetwork => virtual_network(network, subnet.network, subnet.route_table),
        ServiceTag::Internet => internet(reachable(network, subnet.network)),
        ServiceTag::AzureLoadBalancer
        | ServiceTag::AzurePlatformDns
        | ServiceTag::AzurePlatformImds
        | ServiceTag::AzurePlatformLkm
        | ServiceTag::Named(_) => fixed(network, tag),
    };
    normalise(list).iter().filter_map(Prefix::net).collect()
}

/// The address spaces of a virtual network and its peers.
fn reachable(network: &Network, own: usize) -> impl Iterator<Item = &IpNet> + Clone {
    let networks = &network.virtual_networks;
    let peers = networks[own].peers.iter().map(|&peer| &networks[peer]);
    std::iter::once(&networks[own]).chain(peers).flat_map(|network| &network.address_space)
}

/// Own, peered and routed space, and the platform's address. Routes to the Internet and to nowhere lead out of it,
/// and a default route would make it everything: that must be asked for.
fn virtual_network(network: &Network, own: usize, route_table: Option<usize>) -> Vec<Prefix> {
    let table = route_table.map(|table| &network.route_tables[table]);
    let routes = table.into_iter().flat_map(|table| {
        table.routes.iter().filter(|route| {
            let inside = match route.next_hop {
                RouteHop::VnetLocal | RouteHop::VirtualAppliance(_) | RouteHop::VirtualNetworkGateway => true,
                RouteHop::Internet | RouteHop::None => false,
            };
            inside && (route.prefix.prefix_len() > 0 || table.widen_virtual_network)
        })
    });
    let spaces = reachable(network, own).chain(routes.map(|route| &route.prefix));
    spaces.map(Prefix::from).chain([Prefix::host(PLATFORM_ADDRESS)]).collect()
}

/// Tags that mean the same everywhere; nothing for the others.
fn fixed(network: &Network, tag: ServiceTag) -> Vec<Prefix> {
    match tag {
        ServiceTag::AzureLoadBalancer | ServiceTag::AzurePlatformDns => vec![Prefix::host(PLATFORM_ADDRESS)],
        ServiceTag::AzurePlatformImds => vec![Prefix::host(METADATA_ADDRESS)],
        ServiceTag::AzurePlatformLkm => network.platform.kms_servers.iter().map(Prefix::from).collect(),
        ServiceTag::Named(tag) => network.tags[tag].prefixes.iter().map(Prefix::from).collect(),
        ServiceTag::VirtualNetwork | ServiceTag::Internet => Vec::new(),
    }
}

/// What differs from context to context, as numbers of lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Meaning {
    pub network: usize,
    pub virtual_network: u32,
    pub internet: u32,
}

/// All contexts that are asked for, and the lists of what is named in them.
pub(super) struct Contexts<'a> {
    network: &'a Network,
    pub lists: Lists,
    pub contexts: Vec<Context>,
    pub meanings: Vec<Meaning>,
    by_place: HashMap<(usize, Option<usize>), usize>,
    by_meaning: HashMap<Meaning, usize>,
    /// The context of each subnet that was asked for.
    by_subnet: HashMap<usize, usize>,
    fixed: HashMap<ServiceTag, u32>,
    /// Addresses of each application group's members.
    members: Vec<Vec<Prefix>>,
    applications: HashMap<usize, u32>,
}

impl<'a> Contexts<'a> {
    pub fn new(network: &'a Network) -> Self {
        let mut members = vec![Vec::new(); network.application_groups.len()];
        for configuration in network.interfaces.iter().flat_map(|interface| &interface.addresses) {
            for &group in &configuration.application_groups {
                members[group].push(Prefix::host(configuration.address));
            }
        }
        Self {
            network,
            lists: Lists::default(),
            contexts: Vec::new(),
            meanings: Vec::new(),
            by_place: HashMap::new(),
            by_meaning: HashMap::new(),
            by_subnet: HashMap::new(),
            fixed: HashMap::new(),
            members,
            applications: HashMap::new(),
        }
    }

    /// The context of a subnet, as an index into `contexts` and `meanings`.
    pub fn of_subnet(&mut self, number: usize) -> usize {
        if let Some(&context) = self.by_subnet.get(&number) {
            return context;
        }
        let subnet = &self.network.subnets[number];
        let place = (subnet.network, subnet.route_table);
        let context = match self.by_place.get(&place) {
            Some(&context) => context,
            None => {
                let virtual_network = virtual_network(self.network, place.0, place.1);
                let internet = internet(reachable(self.network, place.0));
                let meaning = Meaning {
                    network: place.0,
                    virtual_network: self.lists.intern_shared(virtual_network),
                    internet: self.lists.intern_shared(internet),
                };
                let context = *self.by_meaning.entry(meaning).or_insert_with(|| {
                    self.contexts.push(Context { network: place.0, subnets: Vec::new() });
                    self.meanings.push(meaning);
                    self.meanings.len() - 1
                });
                self.by_place.insert(place, context);
                context
            }
        };
        self.contexts[context].subnets.push(number);
        self.by_subnet.insert(number, context);
        context
    }

    /// The list of a tag that means the same everywhere.
    pub fn fixed(&mut self, tag: ServiceTag) -> u32 {
        let (network, lists) = (self.network, &mut self.lists);
        *self.fixed.entry(tag).or_insert_with(|| lists.intern_shared(fixed(network, tag)))
    }

    /// The list of an application group's members. It holds in the contexts of their virtual network only.
    pub fn application(&mut self, group: usize) -> u32 {
        let (members, lists) = (&mut self.members, &mut self.lists);
        let entry = self.applications.entry(group);
        *entry.or_insert_with(|| lists.intern_shared(std::mem::take(&mut members[group])))
    }
}
