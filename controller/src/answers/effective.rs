//! `effective`: the rules in force on an interface, tags and application groups expanded, in the shape of Azure's
//! `EffectiveNetworkSecurityGroupListResult` (`reference/azure.md` §1.9).

use serde::{Deserialize, Serialize};

use super::azure::{self, group_id, interface_id, short, subnet_id};
use super::expand::{Terms, tag_name};
use crate::api::Failure;
use crate::cli::table::Table;
use crate::compile::rules::{display_name, in_order};
use crate::policy::network::{Access, AddressMatch, Direction, Network, RuleProtocol, SecurityRule};

/// Prefixes a table cell shows; JSON has them all.
const SHOWN: usize = 3;

/// The groups in force on an interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EffectiveGroups {
    /// The subnets' groups, then the interface's own. One entry for each subnet that it has an address in: tags mean
    /// something else in each.
    pub value: Vec<EffectiveGroup>,
}

/// A resource by its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    pub id: String,
}

/// Where a group stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Association {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Resource>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_interface: Option<Resource>,
}

/// One group and its rules, inbound first, in the order they are asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EffectiveGroup {
    pub network_security_group: Resource,
    pub association: Association,
    pub effective_security_rules: Vec<EffectiveRule>,
}

/// One rule. The singular fields are there where there is one value, the plural ones always; expansions where a term is a
/// tag or an application group (which stands there by its name).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EffectiveRule {
    /// `securityRules/AllowSsh` or `defaultSecurityRules/DenyAllInBound`.
    pub name: String,
    /// `Tcp`, `Udp`, `Icmp`, `Esp`, `Ah` or `All`.
    pub protocol: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port_range: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port_range: Option<String>,
    pub source_port_ranges: Vec<String>,
    pub destination_port_ranges: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_address_prefix: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_address_prefix: Option<String>,
    pub source_address_prefixes: Vec<String>,
    pub destination_address_prefixes: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expanded_source_address_prefix: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expanded_destination_address_prefix: Option<Vec<String>>,
    pub access: Access,
    pub priority: u16,
    pub direction: Direction,
}

/// The rules in force on the interface of this name or id.
pub fn effective(network: &Network, interface: &str) -> Result<EffectiveGroups, Failure> {
    let index = azure::interface(network, interface)?;
    let interface = &network.interfaces[index];
    let mut subnets: Vec<usize> = Vec::new();
    for configuration in &interface.addresses {
        if !subnets.contains(&configuration.subnet) {
            subnets.push(configuration.subnet);
        }
    }
    let mut value = Vec::new();
    for subnet in subnets {
        let mut terms = Terms::new(network, subnet);
        let of_subnet = Association {
            subnet: Some(Resource { id: subnet_id(network, subnet) }),
            network_interface: None,
        };
        let of_interface = Association {
            subnet: None,
            network_interface: Some(Resource { id: interface_id(network, index) }),
        };
        let groups = [(network.subnets[subnet].group, of_subnet), (interface.group, of_interface)];
        for (group, association) in groups {
            let Some(group) = group else { continue };
            let directions = [Direction::Inbound, Direction::Outbound];
            let rules = directions.into_iter().flat_map(|way| in_order(&network.groups[group], way));
            value.push(EffectiveGroup {
                network_security_group: Resource { id: group_id(network, group) },
                association,
                effective_security_rules: rules.map(|rule| rule_answer(rule, &mut terms)).collect(),
            });
        }
    }
    Ok(EffectiveGroups { value })
}

fn rule_answer(rule: &SecurityRule, terms: &mut Terms<'_>) -> EffectiveRule {
    let (source_address_prefix, source_address_prefixes, expanded_source_address_prefix) =
        side(&rule.source, terms);
    let (destination_address_prefix, destination_address_prefixes, expanded_destination_address_prefix) =
        side(&rule.destination, terms);
    let ports = |ranges: &[(u16, u16)]| -> Vec<String> {
        ranges.iter().map(|(low, high)| format!("{low}-{high}")).collect()
    };
    let (source_port_ranges, destination_port_ranges) =
        (ports(&rule.source_ports), ports(&rule.destination_ports));
    EffectiveRule {
        name: display_name(rule),
        protocol: protocol_word(rule.protocol).to_owned(),
        source_port_range: only(&source_port_ranges),
        destination_port_range: only(&destination_port_ranges),
        source_port_ranges,
        destination_port_ranges,
        source_address_prefix,
        destination_address_prefix,
        source_address_prefixes,
        destination_address_prefixes,
        expanded_source_address_prefix,
        expanded_destination_address_prefix,
        access: rule.access,
        priority: rule.priority,
        direction: rule.direction,
    }
}

/// The value of a list of one.
fn only(list: &[String]) -> Option<String> {
    match list {
        [one] => Some(one.clone()),
        _ => None,
    }
}

/// A rule's protocol as effective rules write it.
pub fn protocol_word(protocol: RuleProtocol) -> &'static str {
    match protocol {
        RuleProtocol::Any => "All",
        RuleProtocol::Tcp => "Tcp",
        RuleProtocol::Udp => "Udp",
        RuleProtocol::Icmp => "Icmp",
        RuleProtocol::Esp => "Esp",
        RuleProtocol::Ah => "Ah",
    }
}

/// Singular, plural and expansion of one side.
fn side(
    terms: &[AddressMatch],
    meaning: &mut Terms<'_>,
) -> (Option<String>, Vec<String>, Option<Vec<String>>) {
    let network = meaning.network;
    let mut names = Vec::new();
    let mut expands = false;
    for term in terms {
        match term {
            AddressMatch::Any => names.extend(["0.0.0.0/0".to_owned(), "::/0".to_owned()]),
            AddressMatch::Prefix(net) => names.push(net.to_string()),
            AddressMatch::Tag(tag) => {
                names.push(tag_name(network, *tag).to_owned());
                expands = true;
            }
            AddressMatch::Application(index) => {
                names.push(network.application_groups[*index].name.clone());
                expands = true;
            }
        }
    }
    let expanded = expands.then(|| meaning.side(terms).prefixes().iter().map(ToString::to_string).collect());
    let single = match terms {
        // As Azure prints it, though IPv6 is meant too; the plural says so.
        [AddressMatch::Any] => Some("0.0.0.0/0".to_owned()),
        _ => only(&names),
    };
    (single, names, expanded)
}

impl EffectiveGroups {
    /// For people.
    pub fn text(&self) -> String {
        if self.value.is_empty() {
            return "no group on this interface or its subnet: everything is allowed\n".to_owned();
        }
        let mut text = String::new();
        for group in &self.value {
            let place = match (&group.association.subnet, &group.association.network_interface) {
                (Some(subnet), _) => format!("subnet {}", short(&subnet.id)),
                (None, Some(interface)) => format!("network interface {}", short(&interface.id)),
                (None, None) => "nothing".to_owned(),
            };
            if !text.is_empty() {
                text.push('\n');
            }
            text += &format!("{} on {place}\n", short(&group.network_security_group.id));
            let mut table = Table::new(&[
                "DIRECTION",
                "PRIORITY>",
                "NAME",
                "ACCESS",
                "PROTOCOL",
                "SOURCE",
                "PORTS",
                "DESTINATION",
                "PORTS",
            ]);
            for rule in &group.effective_security_rules {
                table.row([
                    format!("{:?}", rule.direction),
                    rule.priority.to_string(),
                    short(&rule.name).to_owned(),
                    format!("{:?}", rule.access),
                    rule.protocol.clone(),
                    addresses(&rule.source_address_prefixes, rule.expanded_source_address_prefix.as_deref()),
                    ports(&rule.source_port_ranges),
                    addresses(
                        &rule.destination_address_prefixes,
                        rule.expanded_destination_address_prefix.as_deref(),
                    ),
                    ports(&rule.destination_port_ranges),
                ]);
            }
            text += &table.render("");
        }
        text
    }
}

fn ports(ranges: &[String]) -> String {
    let word = |range: &String| match range.split_once('-') {
        Some(("0", "65535")) => "*".to_owned(),
        Some((low, high)) if low == high => low.to_owned(),
        _ => range.clone(),
    };
    ranges.iter().map(word).collect::<Vec<_>>().join(",")
}

/// The first few of a list, and how many more there are.
pub fn few(list: &[String]) -> String {
    match list.len().checked_sub(SHOWN) {
        None | Some(0) => list.join(","),
        Some(more) => format!("{} +{more}", list[..SHOWN].join(",")),
    }
}

fn addresses(prefixes: &[String], expanded: Option<&[String]>) -> String {
    match expanded {
        _ if prefixes == ["0.0.0.0/0", "::/0"] => "*".to_owned(),
        None => few(prefixes),
        Some([]) => format!("{} (nobody)", few(prefixes)),
        Some(expanded) => format!("{} ({})", few(prefixes), few(expanded)),
    }
}
