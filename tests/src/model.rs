//! An oracle for the groups: the policy evaluated rule by rule, in the words of Azure's page, with none of the
//! datapath's tables (design §7). Written from `Network` alone. The controller's tests include this file too.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis::policy::network::{
    Access, AddressMatch, Direction, Network, RouteHop, RuleProtocol, SecurityRule, ServiceTag,
    TransportProtocol,
};

/// A packet as the groups see it: private addresses, ports 0 where the protocol has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub protocol: u8,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
}

/// Which rule of which group decided: its index in the group's list by priority, or a default rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision {
    /// The rule's key, as the registry has it.
    pub rule: String,
    pub allow: bool,
}

/// First match in one group and direction, user rules by priority, then the three defaults. `subnet` is where the
/// guest is: tags mean what they mean there.
pub fn decide(network: &Network, group: usize, direction: Direction, subnet: usize, flow: &Flow) -> Decision {
    let g = &network.groups[group];
    let mut rules: Vec<&SecurityRule> = g.rules.iter().filter(|r| r.direction == direction).collect();
    rules.sort_by_key(|r| r.priority);
    let way = way(direction);
    for rule in rules {
        if matches(network, subnet, rule, flow) {
            return Decision {
                rule: format!("{}/{way}/securityRules/{}", g.name, rule.name),
                allow: rule.access == Access::Allow,
            };
        }
    }
    let vnet_to_vnet = in_tag(network, subnet, ServiceTag::VirtualNetwork, flow.source)
        && in_tag(network, subnet, ServiceTag::VirtualNetwork, flow.destination);
    let (name, allow) = match direction {
        Direction::Inbound if vnet_to_vnet => ("AllowVnetInBound", true),
        Direction::Inbound if in_tag(network, subnet, ServiceTag::AzureLoadBalancer, flow.source) => {
            ("AllowAzureLoadBalancerInBound", true)
        }
        Direction::Inbound => ("DenyAllInBound", false),
        Direction::Outbound if vnet_to_vnet => ("AllowVnetOutBound", true),
        Direction::Outbound if in_tag(network, subnet, ServiceTag::Internet, flow.destination) => {
            ("AllowInternetOutBound", true)
        }
        Direction::Outbound => ("DenyAllOutBound", false),
    };
    Decision { rule: format!("{}/{way}/defaultSecurityRules/{name}", g.name), allow }
}

fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "Inbound",
        Direction::Outbound => "Outbound",
    }
}

fn in_ranges(ranges: &[(u16, u16)], port: u16) -> bool {
    ranges.iter().any(|(lo, hi)| *lo <= port && port <= *hi)
}

fn matches(network: &Network, subnet: usize, rule: &SecurityRule, flow: &Flow) -> bool {
    protocol_and_ports(rule, flow)
        && side(network, subnet, &rule.source, flow.source)
        && side(network, subnet, &rule.destination, flow.destination)
}

fn protocol_and_ports(rule: &SecurityRule, flow: &Flow) -> bool {
    let (protocol, has_ports) = match rule.protocol {
        RuleProtocol::Any => (true, true),
        RuleProtocol::Tcp => (flow.protocol == 6, true),
        RuleProtocol::Udp => (flow.protocol == 17, true),
        RuleProtocol::Icmp => (flow.protocol == 1 || flow.protocol == 58, false),
        RuleProtocol::Esp => (flow.protocol == 50, false),
        RuleProtocol::Ah => (flow.protocol == 51, false),
    };
    let ports = || {
        in_ranges(&rule.source_ports, flow.source_port)
            && in_ranges(&rule.destination_ports, flow.destination_port)
    };
    protocol && (!has_ports || ports())
}

fn side(network: &Network, subnet: usize, terms: &[AddressMatch], address: IpAddr) -> bool {
    terms.iter().any(|term| match term {
        AddressMatch::Any => true,
        AddressMatch::Prefix(net) => net.contains(&address),
        AddressMatch::Tag(tag) => in_tag(network, subnet, *tag, address),
        AddressMatch::Application(group) => is_member(network, subnet, *group, address),
    })
}

/// Does a configuration of this subnet's virtual network with this address name the group?
fn is_member(network: &Network, subnet: usize, group: usize, address: IpAddr) -> bool {
    let vnet = network.subnets[subnet].network;
    network.interfaces.iter().flat_map(|interface| &interface.addresses).any(|configuration| {
        configuration.address == address
            && network.subnets[configuration.subnet].network == vnet
            && configuration.application_groups.contains(&group)
    })
}

/// Space that no packet of the Internet has.
const RESERVED: [&str; 9] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

const PLATFORM: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Is the address in the subnet's virtual network or a peer of it?
fn inside(network: &Network, subnet: usize, address: IpAddr) -> bool {
    let vnet = network.subnets[subnet].network;
    network.virtual_networks.iter().enumerate().any(|(number, other)| {
        (number == vnet || network.virtual_networks[vnet].peers.contains(&number))
            && other.address_space.iter().any(|net| net.contains(&address))
    })
}

/// Does a route of the subnet keep the address in the wider sense of the virtual network?
fn routed(network: &Network, subnet: usize, address: IpAddr) -> bool {
    let Some(table) = network.subnets[subnet].route_table else { return false };
    let table = &network.route_tables[table];
    table.routes.iter().any(|route| {
        route.prefix.contains(&address)
            && !matches!(route.next_hop, RouteHop::Internet | RouteHop::None)
            && (table.widen_virtual_network || route.prefix.prefix_len() != 0)
    })
}

fn in_tag(network: &Network, subnet: usize, tag: ServiceTag, address: IpAddr) -> bool {
    match tag {
        ServiceTag::VirtualNetwork => {
            inside(network, subnet, address) || routed(network, subnet, address) || address == PLATFORM
        }
        ServiceTag::AzureLoadBalancer | ServiceTag::AzurePlatformDns => address == PLATFORM,
        ServiceTag::AzurePlatformImds => address == METADATA,
        ServiceTag::AzurePlatformLkm => network.platform.kms_servers.iter().any(|net| net.contains(&address)),
        ServiceTag::Named(tag) => network.tags[tag].prefixes.iter().any(|net| net.contains(&address)),
        ServiceTag::Internet => {
            let public = match address {
                IpAddr::V4(address) => {
                    address != PLATFORM
                        && !RESERVED
                            .iter()
                            .any(|net| net.parse::<Ipv4Net>().expect("a literal").contains(&address))
                }
                IpAddr::V6(address) => "2000::/3".parse::<Ipv6Net>().expect("a literal").contains(&address),
            };
            public && !inside(network, subnet, address)
        }
    }
}

/// What an exemption from the groups is for; rules that name its tag still hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exemption {
    Dns,
    Imds,
    Kms,
    /// No tag stands for it.
    Other,
}

/// What the rules before the groups say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platform {
    /// They have no word for this packet.
    Nothing,
    /// The packet passes but for what [`platform_tag`] says; by the rule of this key.
    Exempt(Exemption, String),
    /// By the rule of this key.
    Blocked(String),
}

/// The rules before the groups, for a packet a guest of this subnet sends.
pub fn before_groups(network: &Network, subnet: usize, flow: &Flow) -> Platform {
    let platform = &network.platform;
    for service in &platform.services {
        let protocol = match service.protocol {
            TransportProtocol::Tcp => flow.protocol == 6,
            TransportProtocol::Udp => flow.protocol == 17,
            TransportProtocol::All => flow.protocol == 6 || flow.protocol == 17,
        };
        if protocol && flow.destination == service.address && flow.destination_port == service.port {
            let exemption = if service.address == METADATA {
                Exemption::Imds
            } else if service.address == PLATFORM && service.port == 53 {
                Exemption::Dns
            } else {
                Exemption::Other
            };
            let rule = format!("platformRules/AllowPlatformService-{}", service.name);
            return Platform::Exempt(exemption, rule);
        }
    }
    let default_route = network.subnets[subnet].route_table.is_some_and(|table| {
        network.route_tables[table].routes.iter().any(|route| route.prefix.to_string() == "0.0.0.0/0")
    });
    if platform.allow_kms
        && !default_route
        && flow.protocol == 6
        && flow.destination_port == 1688
        && in_tag(network, subnet, ServiceTag::AzurePlatformLkm, flow.destination)
    {
        return Platform::Exempt(Exemption::Kms, "platformRules/AllowKms".into());
    }
    if platform.block_smtp
        && flow.protocol == 6
        && flow.destination_port == 25
        && in_tag(network, subnet, ServiceTag::Internet, flow.destination)
    {
        return Platform::Blocked("platformRules/BlockSmtp25".into());
    }
    Platform::Nothing
}

/// What a group says of a packet that is exempt from it: the first of its outbound rules that name the exemption's tag
/// and match the packet but for the destination, which is the exemption's already.
pub fn platform_tag(
    network: &Network,
    group: usize,
    subnet: usize,
    exemption: Exemption,
    flow: &Flow,
) -> Option<Decision> {
    let tag = match exemption {
        Exemption::Dns => ServiceTag::AzurePlatformDns,
        Exemption::Imds => ServiceTag::AzurePlatformImds,
        Exemption::Kms => ServiceTag::AzurePlatformLkm,
        Exemption::Other => return None,
    };
    let g = &network.groups[group];
    let applies = |rule: &&SecurityRule| {
        rule.direction == Direction::Outbound
            && rule.destination.contains(&AddressMatch::Tag(tag))
            && side(network, subnet, &rule.source, flow.source)
            && protocol_and_ports(rule, flow)
    };
    let first = g.rules.iter().filter(applies).min_by_key(|rule| rule.priority)?;
    Some(Decision {
        rule: format!("{}/Outbound/securityRules/{}", g.name, first.name),
        allow: first.access == Access::Allow,
    })
}

/// Where an address is, seen from a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Outside,
    /// In this virtual network.
    Inside(usize),
    /// A service of this host under a platform address.
    Service,
    /// A route leads nowhere, or to an appliance that does not exist.
    Nowhere,
    Gateway,
    /// The guest (interface, configuration) that a route leads through.
    Appliance(usize, usize),
}

/// Looks an address up among the spaces and routes of a subnet: the longest prefix, and of equal ones the route.
pub fn locate(network: &Network, subnet: usize, address: IpAddr) -> Where {
    if network.platform.services.iter().any(|service| service.address == address) {
        return Where::Service;
    }
    let vnet = network.subnets[subnet].network;
    let mut networks = vec![vnet];
    networks.extend(&network.virtual_networks[vnet].peers);
    let mut best: Option<(u8, Where)> = None;
    let mut offer = |prefix: &IpNet, place: Where| {
        if prefix.contains(&address) && best.is_none_or(|(length, _)| length <= prefix.prefix_len()) {
            best = Some((prefix.prefix_len(), place));
        }
    };
    for &number in &networks {
        for prefix in &network.virtual_networks[number].address_space {
            offer(prefix, Where::Inside(number));
        }
    }
    let routes = network.subnets[subnet].route_table.map(|table| &network.route_tables[table].routes);
    for route in routes.into_iter().flatten() {
        let place = match route.next_hop {
            RouteHop::VnetLocal => Where::Inside(vnet),
            RouteHop::Internet => Where::Outside,
            RouteHop::None => Where::Nowhere,
            RouteHop::VirtualNetworkGateway => Where::Gateway,
            RouteHop::VirtualAppliance(hop) => {
                let owner = networks.iter().find_map(|&number| owner(network, number, hop));
                owner.map_or(Where::Nowhere, |(i, c)| Where::Appliance(i, c))
            }
        };
        offer(&route.prefix, place);
    }
    best.map_or(Where::Outside, |(_, place)| place)
}

/// The guest that has an address in a virtual network.
fn owner(network: &Network, vnet: usize, address: IpAddr) -> Option<(usize, usize)> {
    network.interfaces.iter().enumerate().find_map(|(i, interface)| {
        let configuration = interface.addresses.iter().position(|configuration| {
            configuration.address == address && network.subnets[configuration.subnet].network == vnet
        })?;
        Some((i, configuration))
    })
}
