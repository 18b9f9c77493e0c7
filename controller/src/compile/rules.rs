//! A group's rules in the order they are asked, default rules included (`reference/azure.md` §1.3).

use std::sync::LazyLock;

use crate::policy::network::{
    Access, AddressMatch, Direction, RuleProtocol, SecurityGroup, SecurityRule, ServiceTag,
};

/// Priorities 100..=4096, each once, and the three default rules.
pub const MAX_RULES: usize = 4000;

/// A rule as people see it: in counters, `explain` and events.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleInfo {
    pub id: u32,
    pub group: String,
    pub direction: Direction,
    /// With its prefix: `securityRules/AllowSsh` or `defaultSecurityRules/DenyAllInBound`.
    pub name: String,
    pub priority: u16,
    pub access: Access,
}

/// The name under which the registry keeps a rule's id: `web-nsg/Inbound/securityRules/AllowSsh`.
pub fn key(group: &str, direction: Direction, rule: &str) -> String {
    format!("{group}/{direction:?}/{rule}")
}

/// The rule's name with the prefix Azure shows it with.
pub fn display_name(rule: &SecurityRule) -> String {
    let default = rule.priority > 4096;
    format!("{}/{}", if default { "defaultSecurityRules" } else { "securityRules" }, rule.name)
}

/// The three rules every group ends with.
pub fn default_rules(direction: Direction) -> &'static [SecurityRule; 3] {
    static INBOUND: LazyLock<[SecurityRule; 3]> = LazyLock::new(|| {
        use AddressMatch::{Any, Tag};
        let d = |n, p, a, s, t, x| default_rule(Direction::Inbound, n, p, a, s, t, x);
        [
            d(
                "AllowVnetInBound",
                65000,
                Access::Allow,
                Tag(ServiceTag::VirtualNetwork),
                Tag(ServiceTag::VirtualNetwork),
                "Allow inbound traffic from all VMs in VNET",
            ),
            d(
                "AllowAzureLoadBalancerInBound",
                65001,
                Access::Allow,
                Tag(ServiceTag::AzureLoadBalancer),
                Any,
                "Allow inbound traffic from azure load balancer",
            ),
            d("DenyAllInBound", 65500, Access::Deny, Any, Any, "Deny all inbound traffic"),
        ]
    });
    static OUTBOUND: LazyLock<[SecurityRule; 3]> = LazyLock::new(|| {
        use AddressMatch::{Any, Tag};
        let d = |n, p, a, s, t, x| default_rule(Direction::Outbound, n, p, a, s, t, x);
        [
            d(
                "AllowVnetOutBound",
                65000,
                Access::Allow,
                Tag(ServiceTag::VirtualNetwork),
                Tag(ServiceTag::VirtualNetwork),
                "Allow outbound traffic from all VMs to all VMs in VNET",
            ),
            d(
                "AllowInternetOutBound",
                65001,
                Access::Allow,
                Any,
                Tag(ServiceTag::Internet),
                "Allow outbound traffic from all VMs to Internet",
            ),
            d("DenyAllOutBound", 65500, Access::Deny, Any, Any, "Deny all outbound traffic"),
        ]
    });
    match direction {
        Direction::Inbound => &INBOUND,
        Direction::Outbound => &OUTBOUND,
    }
}

fn default_rule(
    direction: Direction,
    name: &str,
    priority: u16,
    access: Access,
    source: AddressMatch,
    destination: AddressMatch,
    description: &str,
) -> SecurityRule {
    SecurityRule {
        name: name.into(),
        description: description.into(),
        priority,
        direction,
        access,
        protocol: RuleProtocol::Any,
        source: vec![source],
        destination: vec![destination],
        source_ports: vec![(0, 65535)],
        destination_ports: vec![(0, 65535)],
    }
}

/// The rules of one direction as they are asked: by priority, the default rules last.
pub fn in_order(group: &SecurityGroup, direction: Direction) -> Vec<&SecurityRule> {
    let mut rules: Vec<&SecurityRule> = group.rules.iter().filter(|r| r.direction == direction).collect();
    rules.sort_by_key(|r| r.priority);
    rules.extend(default_rules(direction));
    rules
}
