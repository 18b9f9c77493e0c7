//! `status` of load balancing rules: which backends get new flows, and why others do not.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::time::rfc3339;
use crate::answers::trace::{Packet, judge};
use crate::compile::PLATFORM_ADDRESS;
use crate::policy::network::{Access, Direction, Network, Probe};
use crate::probes::{Book, Health, down_name};

/// A load balancing rule and its backends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Balanced {
    /// `lb/loadBalancingRules/http`
    pub rule: String,
    /// `alive`; absent if the rule has no probe: all its backends get flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    pub backends: Vec<Backend>,
}

/// A member of the rule's pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// `vm1/ipconfig1`
    pub name: String,
    pub state: BackendState,
    /// Of a backend that is probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// `no answer`, `connection refused`, `HTTP 503`, and the rule that denies probes if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Does it get new flows?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BackendState {
    Up,
    Down,
    /// Nobody asks; it gets them.
    NotProbed,
}

/// All load balancing rules of a policy, and warnings of groups that block probes.
pub fn balanced(network: &Network, health: &Book) -> (Vec<Balanced>, Vec<String>) {
    let (mut rules, mut warnings) = (Vec::new(), Vec::new());
    let mut told = HashSet::new();
    for balancer in &network.load_balancers {
        for rule in &balancer.rules {
            let probe = rule.probe.map(|probe| &balancer.probes[probe]);
            let backends = balancer.pools[rule.pool].members.iter().map(|&place| {
                let name = member(network, place);
                let known =
                    probe.and_then(|probe| Some((probe, health.of(&down_name(&balancer.name, &probe.name, &name))?)));
                let Some((probe, health)) = known else {
                    return Backend { name, state: BackendState::NotProbed, since: None, why: None };
                };
                let denied = denied_by(network, place, probe);
                if let Some(rule) = &denied
                    && told.insert((place, rule.clone()))
                {
                    warnings.push(format!(
                        "{rule} denies health probes (from 168.63.129.16) to {name}: it counts as down and gets no new \
                         flows; allow AzureLoadBalancer before it"
                    ));
                }
                backend(name, &health, denied)
            });
            let backends = backends.collect();
            let rule = format!("{}/loadBalancingRules/{}", balancer.name, rule.name);
            rules.push(Balanced { rule, probe: probe.map(|probe| probe.name.clone()), backends });
        }
    }
    (rules, warnings)
}

fn member(network: &Network, (interface, configuration): (usize, usize)) -> String {
    let interface = &network.interfaces[interface];
    format!("{}/{}", interface.name, interface.addresses[configuration].name)
}

fn backend(name: String, health: &Health, denied: Option<String>) -> Backend {
    let why = health.why.as_ref().map(|why| match denied {
        Some(rule) => format!("{why}: a rule denies it: {rule}"),
        None => why.to_string(),
    });
    let state = if health.up { BackendState::Up } else { BackendState::Down };
    let since = rfc3339(UNIX_EPOCH + Duration::from_secs(health.since));
    Backend { name, state, since: Some(since), why }
}

/// The rule that keeps a probe from a backend, `web-nsg/Inbound/DenyAll`.
fn denied_by(network: &Network, place: (usize, usize), probe: &Probe) -> Option<String> {
    let packet = Packet {
        source: IpAddr::V4(PLATFORM_ADDRESS),
        destination: network.interfaces[place.0].addresses[place.1].address,
        // Some port of a client: a rule that tells them apart is beyond help.
        source_port: 50_000,
        destination_port: probe.port,
        protocol: 6,
    };
    let trace = judge(network, place, Direction::Inbound, &packet);
    let last = trace.groups.last().filter(|_| trace.access == Access::Deny)?;
    let rule = last.matched().map_or("", |rule| &rule.name);
    Some(format!("{}/Inbound/{rule}", network.groups[last.group].name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::Scratch;
    use crate::policy::network::{AddressMatch, RuleProtocol, SecurityGroup, SecurityRule, ServiceTag};
    use crate::probes::{Failure, balanced_policy, targets};

    #[test]
    fn every_backend_says_whether_it_gets_new_flows_and_a_group_that_blocks_probes_is_named() {
        let directory = Scratch::new();
        let mut network = balanced_policy();
        let health = Book::open(&directory.0);
        let targets = targets(&network);
        health.keep(targets.iter().map(|target| target.name.as_str()));
        for failure in [Failure::NoAnswer, Failure::NoAnswer] {
            health.note(&targets[0], Err(failure));
        }
        let (rules, warnings) = balanced(&network, &health);
        assert_eq!((rules.len(), warnings.len()), (3, 0));
        assert_eq!(
            (rules[0].rule.as_str(), rules[0].probe.as_deref()),
            ("lb/loadBalancingRules/http", Some("alive"))
        );
        let [down, up] = &rules[0].backends[..] else { panic!("{rules:?}") };
        assert_eq!((down.name.as_str(), down.state), ("vm-first/ip", BackendState::Down));
        assert_eq!(down.why.as_deref(), Some("no answer"));
        assert!(down.since.is_some());
        assert_eq!((up.state, &up.why), (BackendState::Up, &None));
        assert!(rules[2].backends.iter().all(|backend| backend.state == BackendState::NotProbed));

        network.groups.push(SecurityGroup {
            name: "web".into(),
            rules: vec![SecurityRule {
                name: "NoProbes".into(),
                description: String::new(),
                priority: 100,
                direction: Direction::Inbound,
                access: Access::Deny,
                protocol: RuleProtocol::Any,
                source: vec![AddressMatch::Tag(ServiceTag::AzureLoadBalancer)],
                destination: vec![AddressMatch::Any],
                source_ports: vec![(0, 65535)],
                destination_ports: vec![(0, 65535)],
            }],
        });
        network.interfaces[0].group = Some(0);
        let (rules, warnings) = balanced(&network, &health);
        let why = rules[0].backends[0].why.as_deref();
        assert_eq!(why, Some("no answer: a rule denies it: web/Inbound/NoProbes"));
        assert_eq!(warnings.len(), 1, "once, though two rules ask: {warnings:?}");
        assert!(warnings[0].starts_with("web/Inbound/NoProbes denies health probes"), "{warnings:?}");
    }
}
