//! What comes in from the world, or back in from a guest: whose address it is, or which rule listens there and for whom.

use std::net::IpAddr;

use portcullis_common::layout::WORLD;
use portcullis_common::policy::{AT_FRONTEND, AT_INSTANCE, AT_PROXY};
use serde::{Deserialize, Serialize};

use crate::compile::lookup;
use crate::daemon::InForce;
use crate::flows::end;

/// Where a packet to a public address arrives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrival {
    /// `instance` (a guest's own address), `listener` (a load balancing or inbound NAT rule), or `frontend` (where nothing
    /// listens).
    pub kind: String,
    /// `loadBalancers/lb/loadBalancingRules/http`
    pub rule: Option<String>,
    /// `203.0.113.10:80`
    pub at: String,
    /// The guests a new flow may go to, healthy or not.
    pub candidates: Vec<String>,
}

/// What is at this public address, port and protocol; `None`: nothing of the policy's.
pub fn arrival(in_force: &InForce, address: IpAddr, port: u16, protocol: u8) -> Option<Arrival> {
    let compiled = &in_force.compiled;
    let value = lookup::endpoint_value(compiled, WORLD, address);
    let index = (value & 0xff_ffff) as usize;
    match value >> 24 & !AT_PROXY {
        AT_INSTANCE => Some(Arrival {
            kind: "instance".to_owned(),
            rule: None,
            at: address.to_string(),
            candidates: in_force.guest(index).map(|guest| guest.name.to_owned()).into_iter().collect(),
        }),
        AT_FRONTEND => {
            let number = lookup::listener_at(compiled, address, port, protocol);
            let listener = number.and_then(|number| compiled.listeners.get(number as usize));
            let candidates = listener.into_iter().flat_map(|listener| &listener.candidates);
            Some(Arrival {
                kind: if listener.is_some() { "listener" } else { "frontend" }.to_owned(),
                rule: listener.map(|listener| listener.place.clone()),
                at: end(address, port),
                candidates: candidates.map(|(name, _)| name.clone()).collect(),
            })
        }
        _ => None,
    }
}

impl Arrival {
    /// For people; `to` is the guest that gets it, if one does.
    pub fn text(&self, to: &str) -> String {
        let rule = self.rule.as_deref().unwrap_or("a listener");
        match (self.kind.as_str(), self.candidates.as_slice()) {
            ("instance", _) => format!("by the guest's own public address {}", self.at),
            ("listener", []) => format!("by {rule} at {}: it has no backend", self.at),
            ("listener", [only]) => format!("by {rule} at {}, which is {only}'s alone", self.at),
            ("listener", all) => {
                const SHOWN: usize = 8;
                let shown = all.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
                let more = if all.len() > SHOWN { ", ..." } else { "" };
                format!("by {rule} at {}: {to}, chosen among {} ({shown}{more})", self.at, all.len())
            }
            _ => format!("nothing listens at {}", self.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_with_its_candidates() {
        let arrival = |kind: &str, candidates: &[&str]| Arrival {
            kind: kind.into(),
            rule: Some("loadBalancers/lb/loadBalancingRules/http".into()),
            at: "203.0.113.10:80".into(),
            candidates: candidates.iter().map(|name| (*name).to_owned()).collect(),
        };
        let text = arrival("listener", &["vm1/a", "vm2/a"]).text("vm2/a");
        assert!(
            text.contains("loadBalancingRules/http at 203.0.113.10:80: vm2/a, chosen among 2 (vm1/a, vm2/a)"),
            "{text}"
        );
        assert!(arrival("listener", &[]).text("").contains("it has no backend"));
        assert!(arrival("listener", &["vm1/a"]).text("vm1/a").contains("vm1/a's alone"));
        assert!(arrival("frontend", &[]).text("").contains("nothing listens"));
    }
}
