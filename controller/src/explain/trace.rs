//! Which groups were asked, and which of their rules answered.

use std::net::IpAddr;

use portcullis_common::engine::{Context, WAY_INSTANCE_IN};
use serde::{Deserialize, Serialize};

use crate::compile::lookup::{self, PacketKey};
use crate::daemon::InForce;
use crate::daemon::shared::{Guest, direction, short};
use crate::flows::address;
use crate::policy::network::Access;

/// One group's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupAnswer {
    /// Whose group it is, `vm1/ipconfig1`.
    pub guest: String,
    /// `networkInterface` or `subnet`: where the group stands.
    pub level: String,
    pub group: String,
    /// `Inbound` or `Outbound`.
    pub direction: String,
    pub rule: String,
    pub priority: u16,
    /// One of the three every group ends with.
    pub default_rule: bool,
    /// `Allow` or `Deny`.
    pub access: String,
}

/// The first `asked` groups for this packet, in the engine's order: the sender's (network interface, subnet), then the
/// receiver's (subnet, network interface).
///
/// The engine says how many it asked (none, if the packet ended before); this looks up what each said, by the slow and
/// obvious way of [`lookup`].
pub fn groups(in_force: &InForce, context: &Context, asked: usize) -> Vec<GroupAnswer> {
    let from = in_force.guest(context.from as usize);
    let to = in_force.guest(context.to as usize);
    let mut rulesets: Vec<(&Guest<'_>, &str, u32)> = Vec::new();
    if let Some(guest) = &from {
        rulesets.push((guest, "networkInterface", guest.endpoint.nic_outbound));
        rulesets.push((guest, "subnet", guest.endpoint.subnet_outbound));
    }
    if let Some(guest) = &to {
        rulesets.push((guest, "subnet", guest.endpoint.subnet_inbound));
        rulesets.push((guest, "networkInterface", guest.endpoint.nic_inbound));
    }
    let key = key(context);
    let present = rulesets.into_iter().filter(|(_, _, ruleset)| *ruleset != 0).take(asked);
    present.filter_map(|(guest, level, ruleset)| answer(in_force, guest, level, ruleset, &key)).collect()
}

/// What rules look at: the private destination, no ports for ICMP.
fn key(context: &Context) -> PacketKey {
    let destination =
        if context.way == WAY_INSTANCE_IN { context.new.destination } else { context.key.destination };
    let ports = context.key.protocol != 1;
    let port = |network_order: u16| if ports { u16::from_be(network_order) } else { 0 };
    PacketKey {
        source: IpAddr::from(context.key.source.to_ne_bytes()),
        destination: IpAddr::V4(address(destination)),
        source_port: port(context.key.source_port),
        destination_port: port(context.key.destination_port),
        protocol: context.key.protocol,
    }
}

fn answer(
    in_force: &InForce,
    guest: &Guest<'_>,
    level: &str,
    ruleset: u32,
    key: &PacketKey,
) -> Option<GroupAnswer> {
    let position = lookup::classify(&in_force.compiled, ruleset, key)?;
    let (id, _) = lookup::rule(&in_force.compiled, ruleset, position);
    let rule = in_force.rule(id)?;
    Some(GroupAnswer {
        guest: guest.name.to_owned(),
        level: level.to_owned(),
        group: rule.group.clone(),
        direction: direction(rule.direction).to_owned(),
        rule: short(&rule.name).to_owned(),
        priority: rule.priority,
        default_rule: rule.priority > 4096,
        access: match rule.access {
            Access::Allow => "Allow".to_owned(),
            Access::Deny => "Deny".to_owned(),
        },
    })
}
