//! What security groups say of a packet, rule by rule: the plain linear search through the policy.
//!
//! The datapath finds the same rule through its tables. This looks at the policy alone, so it is what the tables are held
//! against, and it can show every rule that was tried with the fields that matched.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use super::expand::{METADATA, PLATFORM, Terms, route_table};
use crate::compile::rules::{default_rules, in_order};
use crate::policy::network::{
    Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule, ServiceTag, TransportProtocol,
};

/// TCP port of KMS (`reference/azure.md` §1.8).
const KMS_PORT: u16 = 1688;
/// TCP port of SMTP between mail servers.
const SMTP_PORT: u16 = 25;

/// What rules look at: private addresses, ports in native order, 0 for protocols without ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    /// IANA protocol number.
    pub protocol: u8,
}

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Level {
    Subnet,
    NetworkInterface,
}

impl Level {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Level::Subnet => "subnet",
            Level::NetworkInterface => "network interface",
        }
    }
}

/// Which fields of a rule a packet matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldsMatched {
    pub protocol_matched: bool,
    pub source_matched: bool,
    pub source_port_matched: bool,
    pub destination_matched: bool,
    pub destination_port_matched: bool,
}

impl FieldsMatched {
    /// Do all?
    pub fn all(&self) -> bool {
        self.protocol_matched
            && self.source_matched
            && self.source_port_matched
            && self.destination_matched
            && self.destination_port_matched
    }
}

/// A rule that was tried.
#[derive(Debug, Clone)]
pub struct Trial<'n> {
    pub rule: &'n SecurityRule,
    pub fields: FieldsMatched,
}

/// A group that was asked.
#[derive(Debug, Clone)]
pub struct GroupTrace<'n> {
    /// Index into the policy's groups.
    pub group: usize,
    pub level: Level,
    /// In order; the last one matched, if any did. One always does unless only a platform tag's rules were asked.
    pub trials: Vec<Trial<'n>>,
}

impl<'n> GroupTrace<'n> {
    /// The rule that decided.
    pub fn matched(&self) -> Option<&'n SecurityRule> {
        self.trials.last().filter(|trial| trial.fields.all()).map(|trial| trial.rule)
    }
}

/// What decides before the groups are asked (design §4, `reference/azure.md` §1.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlatformRule {
    /// A platform address under which this host serves nothing of that kind: dropped.
    PlatformAddress,
    /// TCP 25 to the Internet, blocked by switch.
    BlockSmtp25,
    /// A declared service (index into the policy's): allowed, unless a rule names the tag that stands for it, if one does.
    Service(usize, Option<ServiceTag>),
    /// KMS: allowed, unless a rule names `AzurePlatformLKM`.
    AllowKms,
}

impl PlatformRule {
    /// Does it end the matter with a deny?
    pub fn denies(self) -> bool {
        matches!(self, PlatformRule::PlatformAddress | PlatformRule::BlockSmtp25)
    }

    /// The tag whose rules are still asked; `None`: no rule is.
    pub fn exempt(self) -> Option<ServiceTag> {
        match self {
            PlatformRule::PlatformAddress | PlatformRule::BlockSmtp25 => None,
            PlatformRule::Service(_, tag) => tag,
            PlatformRule::AllowKms => Some(ServiceTag::AzurePlatformLkm),
        }
    }

    /// As answers call it.
    pub fn name(self, network: &Network) -> String {
        match self {
            PlatformRule::PlatformAddress => "PlatformAddress".to_owned(),
            PlatformRule::BlockSmtp25 => "BlockSmtp25".to_owned(),
            PlatformRule::Service(index, _) => format!("Service_{}", network.platform.services[index].name),
            PlatformRule::AllowKms => "AllowKms".to_owned(),
        }
    }
}

/// What became of a packet at one interface.
#[derive(Debug, Clone)]
pub struct Trace<'n> {
    pub platform: Option<PlatformRule>,
    /// Those that were asked: none behind the first that denied.
    pub groups: Vec<GroupTrace<'n>>,
    pub access: Access,
}

/// The groups that guard one ip configuration in a direction, in the order they are asked: inbound the subnet's first,
/// outbound the interface's (`reference/azure.md` §1.7).
pub fn stages(network: &Network, place: (usize, usize), direction: Direction) -> Vec<(Level, usize)> {
    let interface = &network.interfaces[place.0];
    let subnet = &network.subnets[interface.addresses[place.1].subnet];
    let mut stages: Vec<_> = [(Level::Subnet, subnet.group), (Level::NetworkInterface, interface.group)]
        .into_iter()
        .filter_map(|(level, group)| Some((level, group?)))
        .collect();
    if direction == Direction::Outbound {
        stages.reverse();
    }
    stages
}

/// Does a rule name this tag as its destination?
pub fn names_tag(rule: &SecurityRule, tag: ServiceTag) -> bool {
    rule.destination.contains(&AddressMatch::Tag(tag))
}

/// Does the subnet's route table have a default route for IPv4? It ends the exemption of KMS.
pub fn forced_tunnel(network: &Network, subnet: usize) -> bool {
    let routes = route_table(network, subnet).into_iter().flat_map(|table| &table.routes);
    routes.into_iter().any(|route| route.prefix.prefix_len() == 0 && route.prefix.addr().is_ipv4())
}

/// The protocols that a platform service answers to.
pub fn service_protocols(protocol: TransportProtocol) -> &'static [u8] {
    match protocol {
        TransportProtocol::Tcp => &[6],
        TransportProtocol::Udp => &[17],
        TransportProtocol::All => &[6, 17],
    }
}

/// The tag that stands for a platform service: that of DNS is about port 53.
pub fn service_tag(address: Ipv4Addr, port: u16) -> Option<ServiceTag> {
    match (address, port) {
        (METADATA, _) => Some(ServiceTag::AzurePlatformImds),
        (PLATFORM, 53) => Some(ServiceTag::AzurePlatformDns),
        _ => None,
    }
}

fn protocol_matches(protocol: RuleProtocol, number: u8) -> bool {
    match protocol {
        RuleProtocol::Any => true,
        RuleProtocol::Tcp => number == 6,
        RuleProtocol::Udp => number == 17,
        // ICMP, and ICMPv6 (RFC 4443).
        RuleProtocol::Icmp => number == 1 || number == 58,
        RuleProtocol::Esp => number == 50,
        RuleProtocol::Ah => number == 51,
    }
}

fn in_ranges(ranges: &[(u16, u16)], port: u16) -> bool {
    ranges.iter().any(|&(low, high)| low <= port && port <= high)
}

/// Evaluates packets in one subnet.
pub struct Evaluator<'n> {
    terms: Terms<'n>,
}

impl<'n> Evaluator<'n> {
    pub fn new(network: &'n Network, subnet: usize) -> Self {
        Self { terms: Terms::new(network, subnet) }
    }

    /// Which fields of a rule match.
    pub fn fields(&mut self, rule: &SecurityRule, packet: &Packet) -> FieldsMatched {
        FieldsMatched {
            protocol_matched: protocol_matches(rule.protocol, packet.protocol),
            source_matched: self.terms.side_has(&rule.source, packet.source),
            source_port_matched: in_ranges(&rule.source_ports, packet.source_port),
            destination_matched: self.terms.side_has(&rule.destination, packet.destination),
            destination_port_matched: in_ranges(&rule.destination_ports, packet.destination_port),
        }
    }

    /// Tries the rules of a group until one matches. `only`: no others than those that name this tag, and no default
    /// rules.
    pub fn group(
        &mut self,
        group: usize,
        level: Level,
        direction: Direction,
        packet: &Packet,
        only: Option<ServiceTag>,
    ) -> GroupTrace<'n> {
        let network = self.terms.network;
        let defaults = default_rules(direction).len();
        let mut rules = in_order(&network.groups[group], direction);
        if let Some(tag) = only {
            rules.truncate(rules.len() - defaults);
            rules.retain(|rule| names_tag(rule, tag));
        }
        let mut trials = Vec::new();
        for rule in rules {
            let fields = self.fields(rule, packet);
            trials.push(Trial { rule, fields });
            if fields.all() {
                break;
            }
        }
        GroupTrace { group, level, trials }
    }

    /// What the platform has to say of a packet that a guest sends.
    pub fn platform(&mut self, packet: &Packet) -> Option<PlatformRule> {
        let platform = &self.terms.network.platform;
        if let IpAddr::V4(address @ (PLATFORM | METADATA)) = packet.destination {
            let service = platform.services.iter().position(|service| {
                service.address == address
                    && service.port == packet.destination_port
                    && service_protocols(service.protocol).contains(&packet.protocol)
            });
            return Some(match service {
                Some(index) => PlatformRule::Service(index, service_tag(address, packet.destination_port)),
                None => PlatformRule::PlatformAddress,
            });
        }
        if packet.protocol != 6 {
            return None;
        }
        if platform.block_smtp
            && packet.destination_port == SMTP_PORT
            && self.terms.tag(ServiceTag::Internet).contains(packet.destination)
        {
            return Some(PlatformRule::BlockSmtp25);
        }
        let kms = platform.allow_kms
            && packet.destination_port == KMS_PORT
            && platform.kms_servers.iter().any(|net| net.contains(&packet.destination))
            && !forced_tunnel(self.terms.network, self.terms.subnet);
        kms.then_some(PlatformRule::AllowKms)
    }
}

/// Judges a packet at one ip configuration: (interface, configuration). Inbound packets carry private destinations.
pub fn judge<'n>(
    network: &'n Network,
    place: (usize, usize),
    direction: Direction,
    packet: &Packet,
) -> Trace<'n> {
    let subnet = network.interfaces[place.0].addresses[place.1].subnet;
    let mut evaluator = Evaluator::new(network, subnet);
    let platform = match direction {
        Direction::Outbound => evaluator.platform(packet),
        Direction::Inbound => None,
    };
    let only = platform.and_then(PlatformRule::exempt);
    if let (Some(rule), None) = (platform, only) {
        let access = if rule.denies() { Access::Deny } else { Access::Allow };
        return Trace { platform, groups: Vec::new(), access };
    }
    let mut groups = Vec::new();
    let mut access = Access::Allow;
    for (level, group) in stages(network, place, direction) {
        let trace = evaluator.group(group, level, direction, packet, only);
        let said = trace.matched().map_or(Access::Allow, |rule| rule.access);
        groups.push(trace);
        if said == Access::Deny {
            access = Access::Deny;
            break;
        }
    }
    Trace { platform, groups, access }
}
