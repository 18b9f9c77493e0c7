//! An oracle for the groups: the policy evaluated rule by rule, in the words of Azure's page, with none of the
//! datapath's tables (design §7). Written from `Network` alone.

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use portcullis::policy::network::{
    Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag,
};

/// A packet as the groups see it: private addresses, ports 0 where the protocol has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub protocol: u8,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
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

/// First match in one group and direction, user rules by priority, then the three defaults.
pub fn decide(network: &Network, group: usize, direction: Direction, vnet: usize, flow: &Flow) -> Decision {
    let g = &network.groups[group];
    let mut rules: Vec<&SecurityRule> = g.rules.iter().filter(|r| r.direction == direction).collect();
    rules.sort_by_key(|r| r.priority);
    let way = match direction {
        Direction::Inbound => "Inbound",
        Direction::Outbound => "Outbound",
    };
    for rule in rules {
        if matches(network, vnet, rule, flow) {
            return Decision {
                rule: format!("{}/{way}/securityRules/{}", g.name, rule.name),
                allow: rule.access == Access::Allow,
            };
        }
    }
    let vnet_to_vnet = in_tag(network, vnet, ServiceTag::VirtualNetwork, flow.source)
        && in_tag(network, vnet, ServiceTag::VirtualNetwork, flow.destination);
    let (name, allow) = match direction {
        Direction::Inbound if vnet_to_vnet => ("AllowVnetInBound", true),
        Direction::Inbound if in_tag(network, vnet, ServiceTag::AzureLoadBalancer, flow.source) => {
            ("AllowAzureLoadBalancerInBound", true)
        }
        Direction::Inbound => ("DenyAllInBound", false),
        Direction::Outbound if vnet_to_vnet => ("AllowVnetOutBound", true),
        Direction::Outbound if in_tag(network, vnet, ServiceTag::Internet, flow.destination) => {
            ("AllowInternetOutBound", true)
        }
        Direction::Outbound => ("DenyAllOutBound", false),
    };
    Decision { rule: format!("{}/{way}/defaultSecurityRules/{name}", g.name), allow }
}

fn matches(network: &Network, vnet: usize, rule: &SecurityRule, flow: &Flow) -> bool {
    let (protocol, has_ports) = match rule.protocol {
        RuleProtocol::Any => (true, true),
        RuleProtocol::Tcp => (flow.protocol == 6, true),
        RuleProtocol::Udp => (flow.protocol == 17, true),
        RuleProtocol::Icmp => (flow.protocol == 1, false),
        RuleProtocol::Esp => (flow.protocol == 50, false),
        RuleProtocol::Ah => (flow.protocol == 51, false),
    };
    let port = |ranges: &[(u16, u16)], port: u16| ranges.iter().any(|(lo, hi)| *lo <= port && port <= *hi);
    protocol
        && side(network, vnet, &rule.source, flow.source)
        && side(network, vnet, &rule.destination, flow.destination)
        && (!has_ports
            || (port(&rule.source_ports, flow.source_port)
                && port(&rule.destination_ports, flow.destination_port)))
}

fn side(network: &Network, vnet: usize, terms: &[AddressMatch], address: Ipv4Addr) -> bool {
    terms.iter().any(|term| match term {
        AddressMatch::Any => true,
        AddressMatch::Prefix(IpNet::V4(net)) => net.contains(&address),
        AddressMatch::Prefix(IpNet::V6(_)) => false,
        AddressMatch::Tag(tag) => in_tag(network, vnet, *tag, address),
        AddressMatch::Application(_) => todo!(),
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

fn in_tag(network: &Network, vnet: usize, tag: ServiceTag, address: Ipv4Addr) -> bool {
    let inside = network.virtual_networks[vnet]
        .address_space
        .iter()
        .any(|net| matches!(net, IpNet::V4(net) if net.contains(&address)));
    match tag {
        ServiceTag::VirtualNetwork => inside || address == PLATFORM,
        ServiceTag::AzureLoadBalancer => address == PLATFORM,
        ServiceTag::Internet => {
            let reserved =
                RESERVED.iter().any(|net| net.parse::<Ipv4Net>().expect("a literal").contains(&address));
            !inside && !reserved && address != PLATFORM
        }
        _ => todo!(),
    }
}
