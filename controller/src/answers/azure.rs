//! Azure's spelling: resource ids, rule names, and the words of its requests.

use serde::{Deserialize, Deserializer};

use crate::api::Failure;
use crate::policy::network::{AddressMatch, Direction, Network, RuleProtocol, SecurityRule};

/// What stands before every id. A policy has no subscription; tools that take ids apart find something at each place.
const PROVIDER: &str = "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/portcullis/providers/Microsoft.Network";

/// Id of a network security group.
pub fn group_id(network: &Network, group: usize) -> String {
    format!("{PROVIDER}/networkSecurityGroups/{}", network.groups[group].name)
}

/// Id of a subnet.
pub fn subnet_id(network: &Network, subnet: usize) -> String {
    let subnet = &network.subnets[subnet];
    let vnet = &network.virtual_networks[subnet.network].name;
    format!("{PROVIDER}/virtualNetworks/{vnet}/subnets/{}", subnet.name)
}

/// Id of a network interface.
pub fn interface_id(network: &Network, interface: usize) -> String {
    format!("{PROVIDER}/networkInterfaces/{}", network.interfaces[interface].name)
}

/// The name at the end of an id; a name is its own.
pub fn short(id: &str) -> &str {
    id.rsplit_once('/').map_or(id, |(_, name)| name)
}

/// Is it one of the three every group ends with?
pub fn is_default(rule: &SecurityRule) -> bool {
    rule.priority > 4096
}

/// `UserRule_AllowSsh` or `DefaultRule_DenyAllInBound`, as diagnostics and flow logs write it.
pub fn rule_name(rule: &SecurityRule) -> String {
    format!("{}_{}", if is_default(rule) { "DefaultRule" } else { "UserRule" }, rule.name)
}

/// The direction a request names, in any case.
pub fn direction(text: &str) -> Result<Direction, Failure> {
    match text.to_ascii_lowercase().as_str() {
        "inbound" => Ok(Direction::Inbound),
        "outbound" => Ok(Direction::Outbound),
        _ => Err(Failure::input(format!("direction: `{text}` is neither Inbound nor Outbound"))),
    }
}

/// The protocol a rule or request names, in any case.
pub fn protocol(text: &str) -> Result<RuleProtocol, Failure> {
    match text.to_ascii_lowercase().as_str() {
        "*" | "any" | "all" => Ok(RuleProtocol::Any),
        "tcp" => Ok(RuleProtocol::Tcp),
        "udp" => Ok(RuleProtocol::Udp),
        "icmp" => Ok(RuleProtocol::Icmp),
        "esp" => Ok(RuleProtocol::Esp),
        "ah" => Ok(RuleProtocol::Ah),
        _ => Err(Failure::input(format!("protocol: `{text}` is none of TCP, UDP, ICMP, ESP, AH and *"))),
    }
}

/// A port, a range or `*`.
pub fn ports(field: &str, text: &str) -> Result<(u16, u16), Failure> {
    let wrong = || {
        Failure::input(format!("{field}: `{text}` is no port; write 0 to 65535, a range such as 80-90, or *"))
    };
    let port = |text: &str| -> Result<u16, Failure> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits).ok_or_else(wrong)
    };
    if text == "*" {
        return Ok((0, u16::MAX));
    }
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (port(low)?, port(high)?);
    if low > high { Err(wrong()) } else { Ok((low, high)) }
}

/// The address term a request names: `*`, an address, a prefix or a service tag.
pub fn address(network: &Network, field: &str, text: &str) -> Result<AddressMatch, Failure> {
    if text == "*" {
        return Ok(AddressMatch::Any);
    }
    if let Ok(address) = text.parse::<std::net::IpAddr>() {
        return Ok(AddressMatch::Prefix(address.into()));
    }
    if let Ok(net) = text.parse::<ipnet::IpNet>() {
        return Ok(AddressMatch::Prefix(net.trunc()));
    }
    super::expand::find_tag(network, text).map(AddressMatch::Tag).ok_or_else(|| {
        Failure::input(format!(
            "{field}: `{text}` is no address, prefix or `*`, and the policy has no service tag of that name; \
             `portcullis tags list` shows them"
        ))
    })
}

/// The interface that a request names by its name or by an id that ends in it (of the interface or its virtual machine).
pub fn interface(network: &Network, text: &str) -> Result<usize, Failure> {
    let name = short(text.trim_end_matches('/'));
    let found = network.interfaces.iter().position(|interface| interface.name.eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let names: Vec<&str> = network.interfaces.iter().take(8).map(|i| i.name.as_str()).collect();
        let more = if network.interfaces.len() > names.len() { ", ..." } else { "" };
        Failure::input(format!(
            "there is no network interface `{name}` in the policy; there is {}{more}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        ))
    })
}

/// Text, or a number as text: Azure's own templates write ports both ways.
pub fn text_or_number<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    match serde_json::Value::deserialize(from)? {
        serde_json::Value::String(text) => Ok(text),
        serde_json::Value::Number(number) => Ok(number.to_string()),
        other => Err(serde::de::Error::custom(format!("{other} is neither text nor a number"))),
    }
}
