//! How addresses change on the way.

use std::net::IpAddr;

use portcullis_common::engine::{Context, WAY_IN, WAY_INSTANCE_OUT, WAY_SNAT};
use serde::{Deserialize, Serialize};

use super::arrival::{Arrival, arrival};
use super::ends::Ends;
use super::engine_run::translated;
use super::way_out::WayOut;
use crate::daemon::InForce;

/// How addresses change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Translation {
    /// `direct` (not at all), `instance` (a public address of the guest's own), `loadBalancer` (a frontend's address and a port
    /// from outbound or load balancing rules), `default` (the same of the shared address) or `listener` (in, by a rule).
    pub method: String,
    /// What the world sees; `null` for `direct`.
    pub public_address: Option<IpAddr>,
    /// A port it might get, for `loadBalancer` and `default`.
    pub example_port: Option<u16>,
    /// `lb/web-frontend`, for `loadBalancer`.
    pub frontend: Option<String>,
    /// `lb/web-out`: the outbound or load balancing rule, for `loadBalancer`.
    pub outbound_rule: Option<String>,
    /// Where it comes in, or back in.
    pub inbound: Option<Arrival>,
    pub new_source: IpAddr,
    pub new_source_port: u16,
    pub new_destination: IpAddr,
    pub new_destination_port: u16,
}

/// What the engine has decided in one pass.
pub fn translation(
    in_force: &InForce,
    ends: &Ends<'_>,
    context: &Context,
    way: Option<&WayOut>,
) -> Translation {
    let direct = Translation {
        method: "direct".to_owned(),
        public_address: None,
        example_port: None,
        frontend: None,
        outbound_rule: None,
        inbound: None,
        new_source: ends.source,
        new_source_port: ends.source_port,
        new_destination: ends.destination,
        new_destination_port: ends.destination_port,
    };
    if !matches!(context.way, WAY_SNAT | WAY_INSTANCE_OUT | WAY_IN) {
        return direct;
    }
    let [(source, source_port), (destination, destination_port)] = translated(context);
    let changed = Translation {
        new_source: source,
        new_source_port: source_port,
        new_destination: destination,
        new_destination_port: destination_port,
        ..direct
    };
    match context.way {
        WAY_IN => {
            let inbound = arrival(in_force, ends.destination, ends.destination_port, ends.protocol);
            let listener = inbound.as_ref().is_some_and(|arrival| arrival.kind == "listener");
            Translation {
                method: if listener { "listener" } else { "instance" }.to_owned(),
                public_address: Some(ends.destination),
                inbound,
                ..changed
            }
        }
        WAY_INSTANCE_OUT => {
            Translation { method: "instance".to_owned(), public_address: Some(source), ..changed }
        }
        _ => {
            let default = way.is_some_and(|way| way.scenario == "default");
            Translation {
                method: if default { "default" } else { "loadBalancer" }.to_owned(),
                public_address: Some(source),
                example_port: Some(source_port),
                frontend: frontend(in_force, source),
                outbound_rule: way.and_then(|way| way.rule.clone()),
                ..changed
            }
        }
    }
}

/// The frontend with this address.
fn frontend(in_force: &InForce, public: IpAddr) -> Option<String> {
    let network = &in_force.loaded.network;
    network.load_balancers.iter().find_map(|balancer| {
        let has = |i: &usize| network.public_addresses[*i].address == public;
        let found = balancer.frontends.iter().find(|frontend| frontend.public_addresses.iter().any(has))?;
        Some(format!("{}/{}", balancer.name, found.name))
    })
}

impl Translation {
    /// The packet that leaves by this one, comes back in and is translated by `inbound`, in one.
    pub fn and_back(self, inbound: Translation) -> Translation {
        Translation {
            inbound: inbound.inbound,
            new_destination: inbound.new_destination,
            new_destination_port: inbound.new_destination_port,
            ..self
        }
    }

    /// For people; `to` is the guest it reaches, if it does.
    pub fn text(&self, to: &str) -> String {
        let port = self.example_port.unwrap_or(0);
        match (self.method.as_str(), self.public_address) {
            (_, Some(_)) if self.inbound.is_some() => {
                self.inbound.as_ref().map_or_else(String::new, |arrival| arrival.text(to))
            }
            ("instance", Some(public)) => format!("by the guest's own public address {public}"),
            ("default", Some(public)) => {
                format!("by the address of default outbound, {public}, a port such as {port}")
            }
            ("loadBalancer", Some(public)) => format!(
                "by load balancer frontend {} ({public}, a port such as {port}), outbound rule {}",
                self.frontend.as_deref().unwrap_or("?"),
                self.outbound_rule.as_deref().unwrap_or("?")
            ),
            _ => "none: addresses stay as they are".to_owned(),
        }
    }
}
