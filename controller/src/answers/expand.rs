//! What tags and application groups stand for in a subnet, from the policy alone (`reference/azure.md` §1.4, §1.5).
//!
//! `compile` works the same out for its tables. This is written apart from it, so that each can be held against the other.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::addresses::AddressSet;
use crate::policy::network::{AddressMatch, Network, RouteHop, RouteTable, ServiceTag};

/// 168.63.129.16: probes come from it, DNS and DHCP are served under it.
pub const PLATFORM: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);
/// 169.254.169.254: instance metadata.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Not reachable over the public Internet, wherever one stands (RFC 6890, RFC 1112, RFC 6598). The documentation prefixes
/// are the world of every lab and tutorial and count as public.
const NOT_PUBLIC: [&str; 10] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Global unicast (RFC 4291 §2.4, as assigned).
const PUBLIC_V6: &str = "2000::/3";

fn net(text: &str) -> IpNet {
    text.parse().expect("a constant prefix")
}

/// The tag's name as Azure spells it.
pub fn tag_name(network: &Network, tag: ServiceTag) -> &str {
    match tag {
        ServiceTag::VirtualNetwork => "VirtualNetwork",
        ServiceTag::Internet => "Internet",
        ServiceTag::AzureLoadBalancer => "AzureLoadBalancer",
        ServiceTag::AzurePlatformDns => "AzurePlatformDNS",
        ServiceTag::AzurePlatformImds => "AzurePlatformIMDS",
        ServiceTag::AzurePlatformLkm => "AzurePlatformLKM",
        ServiceTag::Named(index) => &network.tags[index].name,
    }
}

/// The tags that every policy has.
pub const BUILT_IN: [ServiceTag; 6] = [
    ServiceTag::VirtualNetwork,
    ServiceTag::Internet,
    ServiceTag::AzureLoadBalancer,
    ServiceTag::AzurePlatformDns,
    ServiceTag::AzurePlatformImds,
    ServiceTag::AzurePlatformLkm,
];

/// The tag of this name, in any case; classic spellings too (`reference/azure.md` §1.4).
pub fn find_tag(network: &Network, name: &str) -> Option<ServiceTag> {
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    if let Some(tag) = BUILT_IN.into_iter().find(|tag| is(tag_name(network, *tag))) {
        return Some(tag);
    }
    if is("VIRTUAL_NETWORK") {
        return Some(ServiceTag::VirtualNetwork);
    }
    if is("AZURE_LOADBALANCER") {
        return Some(ServiceTag::AzureLoadBalancer);
    }
    network.tags.iter().position(|tag| is(&tag.name)).map(ServiceTag::Named)
}

/// Own and peered address space of a subnet's virtual network.
fn space(network: &Network, subnet: usize) -> impl Iterator<Item = &IpNet> {
    let own = network.subnets[subnet].network;
    let peers = network.virtual_networks[own].peers.iter().copied();
    [own].into_iter().chain(peers).flat_map(|vnet| &network.virtual_networks[vnet].address_space)
}

/// The subnet's route table.
pub fn route_table(network: &Network, subnet: usize) -> Option<&RouteTable> {
    network.subnets[subnet].route_table.map(|table| &network.route_tables[table])
}

/// Does this route's prefix belong to `VirtualNetwork`? A default route does only where the table asks for it.
pub fn routed_inside(table: &RouteTable, prefix: &IpNet, hop: RouteHop) -> bool {
    let inside = match hop {
        RouteHop::VnetLocal | RouteHop::VirtualAppliance(_) | RouteHop::VirtualNetworkGateway => true,
        RouteHop::Internet | RouteHop::None => false,
    };
    inside && (prefix.prefix_len() != 0 || table.widen_virtual_network)
}

/// The prefixes that a tag stands for in the groups of a subnet and of the interfaces in it. The named ones are as
/// published; those of `Internet` are the fewest that make it up, in order.
pub fn tag_prefixes(network: &Network, subnet: usize, tag: ServiceTag) -> Vec<IpNet> {
    let platform = IpNet::from(IpAddr::V4(PLATFORM));
    match tag {
        ServiceTag::VirtualNetwork => {
            let mut nets: Vec<IpNet> = space(network, subnet).copied().collect();
            if let Some(table) = route_table(network, subnet) {
                let inside = table.routes.iter().filter(|r| routed_inside(table, &r.prefix, r.next_hop));
                nets.extend(inside.map(|route| route.prefix));
            }
            nets.push(platform);
            let mut seen = std::collections::HashSet::new();
            nets.retain(|net| seen.insert(*net));
            nets
        }
        ServiceTag::Internet => {
            let public = AddressSet::from_prefixes(&[net("0.0.0.0/0"), net(PUBLIC_V6)]);
            let special = AddressSet::from_prefixes(&NOT_PUBLIC.map(net));
            public.without(&special).without(&AddressSet::from_prefixes(space(network, subnet))).prefixes()
        }
        ServiceTag::AzureLoadBalancer | ServiceTag::AzurePlatformDns => vec![platform],
        ServiceTag::AzurePlatformImds => vec![IpNet::from(IpAddr::V4(METADATA))],
        ServiceTag::AzurePlatformLkm => network.platform.kms_servers.clone(),
        ServiceTag::Named(index) => network.tags[index].prefixes.to_vec(),
    }
}

/// The addresses of an application group's members, in order; none outside of its own virtual network.
pub fn members(network: &Network, subnet: usize, application_group: usize) -> Vec<IpNet> {
    let own = network.subnets[subnet].network;
    let configurations = network.interfaces.iter().flat_map(|interface| &interface.addresses);
    let mut addresses: Vec<IpAddr> = configurations
        .filter(|c| c.application_groups.contains(&application_group))
        .filter(|c| network.subnets[c.subnet].network == own)
        .map(|c| c.address)
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.into_iter().map(IpNet::from).collect()
}

/// What terms of rules mean in one subnet. Remembers what it has worked out.
pub struct Terms<'n> {
    pub network: &'n Network,
    pub subnet: usize,
    tags: HashMap<ServiceTag, Arc<AddressSet>>,
    application_groups: HashMap<usize, Arc<AddressSet>>,
}

impl<'n> Terms<'n> {
    pub fn new(network: &'n Network, subnet: usize) -> Self {
        Self { network, subnet, tags: HashMap::new(), application_groups: HashMap::new() }
    }

    /// The addresses of a tag.
    pub fn tag(&mut self, tag: ServiceTag) -> Arc<AddressSet> {
        let (network, subnet) = (self.network, self.subnet);
        let build = || Arc::new(AddressSet::from_prefixes(&tag_prefixes(network, subnet, tag)));
        Arc::clone(self.tags.entry(tag).or_insert_with(build))
    }

    /// The addresses of a term.
    pub fn term(&mut self, term: &AddressMatch) -> Arc<AddressSet> {
        match term {
            AddressMatch::Any => Arc::new(AddressSet::everything()),
            AddressMatch::Prefix(net) => Arc::new(AddressSet::from_prefixes([net])),
            AddressMatch::Tag(tag) => self.tag(*tag),
            AddressMatch::Application(index) => {
                let (network, subnet) = (self.network, self.subnet);
                let build = || Arc::new(AddressSet::from_prefixes(&members(network, subnet, *index)));
                Arc::clone(self.application_groups.entry(*index).or_insert_with(build))
            }
        }
    }

    /// The addresses of a side of a rule.
    pub fn side(&mut self, terms: &[AddressMatch]) -> AddressSet {
        let sets: Vec<Arc<AddressSet>> = terms.iter().map(|term| self.term(term)).collect();
        AddressSet::union(sets.iter().map(AsRef::as_ref))
    }

    /// Does a side of a rule have this address?
    pub fn side_has(&mut self, terms: &[AddressMatch], address: IpAddr) -> bool {
        terms.iter().any(|term| match term {
            AddressMatch::Any => true,
            AddressMatch::Prefix(net) => net.contains(&address),
            _ => self.term(term).contains(address),
        })
    }
}
