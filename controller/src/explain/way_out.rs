//! How a guest leaves for the world: which scenario, why it and not the others, and whether it has ports left there.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::engine::{Context, WAY_INSTANCE_OUT, WAY_SNAT};
use portcullis_common::policy::{ALLOC_TCP, alloc_of};
use serde::{Deserialize, Serialize};

use super::ends::{Ends, Sender};
use crate::daemon::{InForce, Shared};
use crate::flows::allocations::Allocations;
use crate::flows::ports::PortUse;
use crate::flows::{end, snat};
use crate::observe::outbound::{Scenario, ways_of};

/// What to do about a guest without ports, in the words of Azure's page on outbound connections.
const ADVICE: [&str; 6] = [
    "reuse connections instead of opening one for each request (HTTP keep-alive)",
    "pool connections to the same destination",
    "back off when a connection fails: fast retries keep the ports exhausted",
    "give the guest an instance-level public IP: it then has every port to itself",
    "add frontends to the outbound rule, or raise its allocatedOutboundPorts",
    "keep idle connections alive by keepalives instead of connecting anew",
];

/// The way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WayOut {
    /// `instance`, `outboundRule`, `loadBalancingRule`, `default` or `none`.
    pub scenario: String,
    /// `lb/out`
    pub rule: Option<String>,
    /// The public addresses it may leave under.
    pub addresses: Vec<IpAddr>,
    /// The other ways, each with the reason why it is not taken.
    pub not_taken: Vec<String>,
    /// Ports taken and owned; `null` where none are needed.
    pub ports: Option<PortsLeft>,
    /// What to do, if no port is left.
    pub advice: Vec<String>,
    /// For people.
    pub text: String,
}

/// A guest's ports towards a destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsLeft {
    /// The destination, where a port serves many of them: of TCP, but by the profile `rfc`.
    pub towards: Option<String>,
    pub taken: u32,
    pub of: u32,
}

impl PortsLeft {
    /// Is there none for another flow?
    fn exhausted(&self) -> bool {
        self.of > 0 && self.taken >= self.of
    }
}

/// The way out of this packet; `None` unless a guest sends it to the world.
pub fn way_out(shared: &Shared, in_force: &InForce, ends: &Ends<'_>, context: &Context) -> Option<WayOut> {
    let Sender::Guest(guest) = &ends.from else { return None };
    if !matches!(context.way, WAY_SNAT | WAY_INSTANCE_OUT) {
        return None;
    }
    let which = alloc_of(ends.protocol);
    let mut ways = ways_of(in_force, guest, which.unwrap_or(ALLOC_TCP));
    if which.is_none() {
        // Ports are what everything else translates by.
        for way in ways.open.extract_if(.., |way| way.scenario != Scenario::Instance) {
            ways.closed.push(format!("{} cannot translate a protocol without ports", way.text()));
        }
    }
    let mut open = ways.open.into_iter();
    let taken = open.next();
    let mut not_taken = ways.closed;
    if let Some(first) = &taken {
        let why = match first.scenario {
            Scenario::Instance => "an instance-level public IP comes first",
            Scenario::OutboundRule => "the outbound rule comes first",
            Scenario::LoadBalancingRule => "the load balancing rule comes first",
            Scenario::Default => "default outbound comes first",
        };
        // Several rules with SNAT of one pool are one way out.
        let others = open.filter(|way| way.scenario != first.scenario);
        not_taken.extend(others.map(|way| format!("{}: not taken, {why}", way.text())));
    }
    let ports = which.filter(|_| context.way == WAY_SNAT && taken.is_some()).map(|which| {
        let by_destination = which == ALLOC_TCP && !in_force.loaded.network.snat.tcp_port_per_socket;
        let to = by_destination.then(|| SocketAddr::new(ends.destination, ends.destination_port));
        let used = PortUse::look(shared.flow_tables());
        let [taken, of] = snat::towards(guest, &Allocations::of(in_force), &used, which, to);
        PortsLeft { towards: to.map(|to| end(to.ip(), to.port())), taken, of }
    });
    let exhausted = ports.as_ref().is_some_and(PortsLeft::exhausted);
    let mut way = WayOut {
        scenario: match taken.as_ref().map(|way| way.scenario) {
            Some(Scenario::Instance) => "instance",
            Some(Scenario::OutboundRule) => "outboundRule",
            Some(Scenario::LoadBalancingRule) => "loadBalancingRule",
            Some(Scenario::Default) => "default",
            None => "none",
        }
        .to_owned(),
        rule: taken.as_ref().map(|way| way.name.clone()).filter(|name| !name.is_empty()),
        addresses: taken.as_ref().map_or_else(Vec::new, |way| way.addresses.clone()),
        not_taken,
        ports,
        advice: if exhausted { ADVICE.map(str::to_owned).to_vec() } else { Vec::new() },
        text: taken.map_or_else(|| "none".to_owned(), |way| way.text()),
    };
    way.text = way.tell();
    Some(way)
}

impl WayOut {
    fn tell(&self) -> String {
        let mut text = self.text.clone();
        if !self.not_taken.is_empty() {
            text += &format!(" ({})", self.not_taken.join("; "));
        }
        if let Some(ports) = &self.ports {
            let towards = ports.towards.as_ref().map_or_else(String::new, |to| format!(" towards {to}"));
            text += &format!(", {} of {} ports taken{towards}", ports.taken, ports.of);
            if ports.exhausted() {
                text += ": EXHAUSTED, a new flow is refused until one is free";
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_exhausted_when_every_port_it_has_is_taken() {
        let left = |taken, of| PortsLeft { towards: None, taken, of };
        assert!(left(8, 8).exhausted() && !left(7, 8).exhausted());
        assert!(!left(0, 0).exhausted(), "none at all is another trouble");
        let way = WayOut {
            scenario: "outboundRule".into(),
            rule: Some("lb/out".into()),
            addresses: Vec::new(),
            not_taken: vec!["no instance-level public IP".into()],
            ports: Some(PortsLeft { towards: Some("198.51.100.1:443".into()), taken: 8, of: 8 }),
            advice: Vec::new(),
            text: "outbound rule lb/out (203.0.113.10)".into(),
        };
        assert_eq!(
            way.tell(),
            "outbound rule lb/out (203.0.113.10) (no instance-level public IP), 8 of 8 ports taken towards \
             198.51.100.1:443: EXHAUSTED, a new flow is refused until one is free"
        );
    }
}
