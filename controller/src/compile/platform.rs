//! The rules before the groups (design §4): services of the platform, KMS, and the block of outbound SMTP.

use std::net::IpAddr;

use ipnet::IpNet;
use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM, EXEMPT_OTHER};

use super::prefix::{METADATA_ADDRESS, PLATFORM_ADDRESS};
use crate::policy::network::{
    Access, AddressMatch, Direction, Network, PlatformService, RuleProtocol, SecurityRule, ServiceTag,
    Subnet, TransportProtocol,
};

/// What stands where the rules of a group have the group's name, and before their names in the registry.
pub const PLATFORM_RULES: &str = "platformRules";

/// A rule before the groups.
#[derive(Debug, Clone, PartialEq)]
pub struct PlatformRule {
    pub rule: SecurityRule,
    /// `EXEMPT_*` of [`portcullis_common::policy`]; 0 for a rule that denies.
    pub action: u32,
}

/// The key of a rule's id in the registry.
pub(super) fn key(name: &str) -> String {
    format!("{PLATFORM_RULES}/{name}")
}

/// Is KMS let through in this subnet? Not under forced tunnelling (`reference/azure.md` §1.8).
pub(super) fn allows_kms(network: &Network, subnet: &Subnet) -> bool {
    let tunnelled = subnet.route_table.is_some_and(|table| {
        let mut prefixes = network.route_tables[table].routes.iter().map(|route| route.prefix);
        prefixes.any(|prefix| matches!(prefix, IpNet::V4(net) if net.prefix_len() == 0))
    });
    network.platform.allow_kms && !tunnelled
}

/// The rules of a subnet in the order they are asked, outbound. A packet that matches none is left to the groups.
/// A service for both protocols has two rules of one name.
pub fn platform_rules(network: &Network, kms: bool) -> Vec<PlatformRule> {
    let mut rules = Vec::new();
    for service in &network.platform.services {
        let protocols: &[RuleProtocol] = match service.protocol {
            TransportProtocol::Tcp => &[RuleProtocol::Tcp],
            TransportProtocol::Udp => &[RuleProtocol::Udp],
            TransportProtocol::All => &[RuleProtocol::Tcp, RuleProtocol::Udp],
        };
        for &protocol in protocols {
            let name = format!("AllowPlatformService-{}", service.name);
            let to = AddressMatch::Prefix(IpAddr::V4(service.address).into());
            let rule = rule(name, Access::Allow, protocol, vec![to], service.port);
            rules.push(PlatformRule { rule, action: exemption(service) });
        }
    }
    if kms {
        let to = vec![AddressMatch::Tag(ServiceTag::AzurePlatformLkm)];
        let rule = rule("AllowKms".into(), Access::Allow, RuleProtocol::Tcp, to, 1688);
        rules.push(PlatformRule { rule, action: EXEMPT_LKM });
    }
    if network.platform.block_smtp {
        let to = vec![AddressMatch::Tag(ServiceTag::Internet)];
        let rule = rule("BlockSmtp25".into(), Access::Deny, RuleProtocol::Tcp, to, 25);
        rules.push(PlatformRule { rule, action: 0 });
    }
    for (priority, rule) in (1..).zip(&mut rules) {
        rule.rule.priority = priority;
    }
    rules
}

/// The tag that still reaches what the service's rule lets through.
fn exemption(service: &PlatformService) -> u32 {
    match (service.address, service.port) {
        (PLATFORM_ADDRESS, 53) => EXEMPT_DNS,
        (METADATA_ADDRESS, _) => EXEMPT_IMDS,
        _ => EXEMPT_OTHER,
    }
}

fn rule(
    name: String,
    access: Access,
    protocol: RuleProtocol,
    destination: Vec<AddressMatch>,
    port: u16,
) -> SecurityRule {
    SecurityRule {
        name,
        description: String::new(),
        priority: 0,
        direction: Direction::Outbound,
        access,
        protocol,
        source: vec![AddressMatch::Any],
        destination,
        source_ports: vec![(0, 65535)],
        destination_ports: vec![(port, port)],
    }
}
