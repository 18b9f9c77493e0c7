//! `verify`: IP flow verify, with Azure's input and output (`reference/azure.md` §1.9).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::addresses::{AddressSet, Family};
use super::azure;
use super::judge::judge;
use super::regions::{Protocols, Region};
use crate::api::Failure;
use crate::policy::network::{Access, Direction, Network, RuleProtocol};

/// Azure's `VerificationIPFlowParameters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowParameters {
    /// The virtual machine, by name or id: the interface of that name.
    pub target_resource_id: String,
    /// `Inbound` or `Outbound`.
    pub direction: String,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// 0 to 65535; `*` where it is the source port, outbound.
    #[serde(deserialize_with = "azure::text_or_number")]
    pub local_port: String,
    /// 0 to 65535; `*` where it is the source port, inbound.
    #[serde(deserialize_with = "azure::text_or_number")]
    pub remote_port: String,
    #[serde(rename = "localIPAddress")]
    pub local_ip_address: String,
    #[serde(rename = "remoteIPAddress")]
    pub remote_ip_address: String,
    /// The interface, by name or id, if it is not called as its machine is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_nic_resource_id: Option<String>,
}

/// Azure's `VerificationIPFlowResult`, and which group decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowVerdict {
    pub access: Access,
    /// `UserRule_x`, `DefaultRule_x` or `PlatformRule_x`; of an allowed flow that of the last group asked, empty if no group
    /// was asked.
    pub rule_name: String,
    /// Id of the group; absent if none decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_security_group_id: Option<String>,
    /// Where it stands: `subnet` or `network interface`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_to: Option<String>,
}

/// Azure's part of the verdict, and no more.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AzureVerdict<'a> {
    pub access: Access,
    pub rule_name: &'a str,
}

/// Judges one flow.
pub fn verify(network: &Network, ask: &FlowParameters) -> Result<FlowVerdict, Failure> {
    let target = ask.target_nic_resource_id.as_ref().unwrap_or(&ask.target_resource_id);
    let interface = azure::interface(network, target)?;
    let direction = azure::direction(&ask.direction)?;
    let protocols = match azure::protocol(&ask.protocol)? {
        RuleProtocol::Tcp => Protocols::TCP,
        RuleProtocol::Udp => Protocols::UDP,
        _ => {
            return Err(Failure::input(format!(
                "protocol: IP flow verify knows TCP and UDP, not `{}`; `portcullis diagnose` knows them all",
                ask.protocol
            )));
        }
    };
    let local = address("localIPAddress", &ask.local_ip_address)?;
    let remote = address("remoteIPAddress", &ask.remote_ip_address)?;
    if Family::of(local) != Family::of(remote) {
        return Err(Failure::input(format!(
            "{local} and {remote} are not of one family: no packet has both"
        )));
    }
    let configurations = &network.interfaces[interface].addresses;
    let configuration = configurations.iter().position(|c| c.address == local).ok_or_else(|| {
        let own: Vec<String> = configurations.iter().map(|c| c.address.to_string()).collect();
        let name = &network.interfaces[interface].name;
        Failure::input(format!(
            "localIPAddress: {local} is no address of {name}; its own: {}",
            if own.is_empty() { "none".to_owned() } else { own.join(", ") }
        ))
    })?;
    let local_port = port("localPort", &ask.local_port, direction == Direction::Outbound)?;
    let remote_port = port("remotePort", &ask.remote_port, direction == Direction::Inbound)?;
    let (local, remote) =
        ((AddressSet::single(local), local_port), (AddressSet::single(remote), remote_port));
    let (from, to) = match direction {
        Direction::Outbound => (local, remote),
        Direction::Inbound => (remote, local),
    };
    let flow = Region {
        protocols,
        source: from.0,
        source_ports: vec![from.1],
        destination: to.0,
        destination_ports: vec![to.1],
    };
    let judgement = judge(network, (interface, configuration), direction, &flow)?;
    let mut verdict = FlowVerdict {
        access: judgement.access,
        rule_name: String::new(),
        network_security_group_id: None,
        applied_to: None,
    };
    let last = judgement.groups.last();
    if let Some((group, rule)) = last.and_then(|group| Some((group, group.matched?))) {
        verdict.rule_name = azure::rule_name(rule);
        verdict.network_security_group_id = Some(azure::group_id(network, group.group));
        verdict.applied_to = Some(group.level.text().to_owned());
    } else if let Some(platform) = judgement.platform {
        verdict.rule_name = format!("PlatformRule_{}", platform.name(network));
    }
    Ok(verdict)
}

fn address(field: &str, text: &str) -> Result<IpAddr, Failure> {
    text.parse().map_err(|_| Failure::input(format!("{field}: `{text}` is no IP address")))
}

fn port(field: &str, text: &str, is_source: bool) -> Result<(u16, u16), Failure> {
    if text == "*" && is_source {
        return Ok((0, u16::MAX));
    }
    match azure::ports(field, text) {
        Ok((low, high)) if low == high => Ok((low, high)),
        _ => {
            let star =
                if is_source { ", or * for every source port" } else { "; * is for the source port only" };
            Err(Failure::input(format!("{field}: `{text}` is no port from 0 to 65535{star}")))
        }
    }
}

impl FlowVerdict {
    /// What Azure answers.
    pub fn azure(&self) -> AzureVerdict<'_> {
        AzureVerdict { access: self.access, rule_name: &self.rule_name }
    }

    /// For people.
    pub fn text(&self) -> String {
        let by = match (&self.network_security_group_id, &self.applied_to) {
            (Some(group), Some(place)) => {
                format!("by {} of {} on the {place}", self.rule_name, azure::short(group))
            }
            _ if self.rule_name.is_empty() => {
                "no group on this interface or its subnet: everything is allowed".to_owned()
            }
            _ => format!("by {}, before any group", self.rule_name),
        };
        format!("{:?}: {by}\n", self.access)
    }
}
