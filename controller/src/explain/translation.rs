//! How addresses change on the way.

use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::engine::{Context, WAY_IN, WAY_INSTANCE_OUT, WAY_SNAT};
use serde::{Deserialize, Serialize};

use super::ends::{Ends, Sender};
use crate::daemon::InForce;
use crate::flows::address;

/// How addresses change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Translation {
    /// `direct` (not at all), `instance` (a public address of the guest's own) or `loadBalancer`.
    pub method: String,
    /// What the world sees; `null` for `direct`.
    pub public_address: Option<IpAddr>,
    /// A port it might get, for `loadBalancer`.
    pub example_port: Option<u16>,
    /// `lb/web-frontend`, for `loadBalancer`.
    pub frontend: Option<String>,
    /// `lb/web-out`, for `loadBalancer`.
    pub outbound_rule: Option<String>,
    pub new_source: IpAddr,
    pub new_source_port: u16,
    pub new_destination: IpAddr,
    pub new_destination_port: u16,
}

/// What the engine has decided. Nothing of IPv6 is translated.
pub fn translation(in_force: &InForce, ends: &Ends<'_>, context: &Context) -> Translation {
    let direct = Translation {
        method: "direct".to_owned(),
        public_address: None,
        example_port: None,
        frontend: None,
        outbound_rule: None,
        new_source: ends.source,
        new_source_port: ends.source_port,
        new_destination: ends.destination,
        new_destination_port: ends.destination_port,
    };
    if !matches!(context.way, WAY_SNAT | WAY_INSTANCE_OUT | WAY_IN) {
        return direct;
    }
    let new = &context.new;
    let public = if context.way == WAY_IN { ends.destination } else { IpAddr::V4(address(new.source)) };
    let translated = Translation {
        method: "instance".to_owned(),
        public_address: Some(public),
        new_source: IpAddr::V4(address(new.source)),
        new_source_port: u16::from_be(new.source_port),
        new_destination: IpAddr::V4(address(new.destination)),
        new_destination_port: u16::from_be(new.destination_port),
        ..direct
    };
    if context.way != WAY_SNAT {
        return translated;
    }
    let (frontend, outbound_rule) = names_of_snat(in_force, ends, address(new.source));
    Translation {
        method: "loadBalancer".to_owned(),
        example_port: Some(u16::from_be(new.source_port)),
        frontend,
        outbound_rule,
        ..translated
    }
}

/// The frontend with this address, and the outbound rule of the sender's pool.
fn names_of_snat(in_force: &InForce, ends: &Ends<'_>, public: Ipv4Addr) -> (Option<String>, Option<String>) {
    let network = &in_force.loaded.network;
    let Sender::Guest(guest) = &ends.from else { return (None, None) };
    for balancer in &network.load_balancers {
        for rule in &balancer.outbound_rules {
            if !balancer.pools[rule.pool].members.contains(&guest.place) {
                continue;
            }
            let has_it = |frontend: usize| {
                network.public_addresses[balancer.frontends[frontend].public_addresses[0]].address == public
            };
            let frontend = rule.frontends.iter().copied().find(|&frontend| has_it(frontend));
            let frontend = frontend.map(|f| format!("{}/{}", balancer.name, balancer.frontends[f].name));
            return (frontend, Some(format!("{}/{}", balancer.name, rule.name)));
        }
    }
    (None, None)
}

impl Translation {
    /// For people.
    pub fn text(&self) -> String {
        match (self.method.as_str(), self.public_address) {
            ("instance", Some(public)) => format!("by the guest's own public address {public}"),
            ("loadBalancer", Some(public)) => format!(
                "by load balancer frontend {} ({public}, a port such as {}), outbound rule {}",
                self.frontend.as_deref().unwrap_or("?"),
                self.example_port.unwrap_or(0),
                self.outbound_rule.as_deref().unwrap_or("?")
            ),
            _ => "none: addresses stay as they are".to_owned(),
        }
    }
}
