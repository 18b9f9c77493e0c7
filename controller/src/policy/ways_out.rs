//! Which pools give which members SNAT ports, and which members that leaves without a way to the world.

use std::collections::HashMap;

use super::allocation::{self, Claim, Source};
use super::diagnostics::Problems;
use super::interfaces::Interfaces;
use super::network::{LoadBalancer, NatTarget, TransportProtocol};
use super::pools::Place;
use super::source::Span;

/// A member, and whether it is about Udp.
type Key = ((usize, usize), bool);

/// Who has ports of which pool, over all load balancers.
#[derive(Default)]
pub struct WaysOut {
    by_member: HashMap<Key, (String, Span)>,
}

impl WaysOut {
    /// Takes down the claims of a load balancer. For each protocol a member's ports come from one pool.
    pub fn add(
        &mut self,
        balancer: &LoadBalancer,
        claims: &[Claim],
        places: &[Place],
        interfaces: &Interfaces,
        problems: &mut Problems,
    ) {
        for claim in claims {
            let pool = format!("{}/{}", balancer.name, balancer.pools[claim.pool].name);
            let members = balancer.pools[claim.pool].members.iter().zip(&places[claim.pool].members);
            for (member, span) in members {
                if interfaces.address(*member).is_some_and(|address| address.is_ipv6() != claim.v6) {
                    continue;
                }
                for udp in [false, true] {
                    let protocol = if udp { TransportProtocol::Udp } else { TransportProtocol::Tcp };
                    if !allocation::same_ports(claim.protocol, protocol) {
                        continue;
                    }
                    let (other, first) =
                        self.by_member.entry((*member, udp)).or_insert_with(|| (pool.clone(), *span));
                    if *other == pool {
                        continue;
                    }
                    let title = interfaces.title(*member);
                    let in_order = first.used < span.used;
                    let (earlier, later) = if in_order { (&*first, span) } else { (span, &*first) };
                    let found = problems.error(
                        *later,
                        format!("`{title}` has outbound ports from two pools: `{other}` and `{pool}`"),
                    );
                    found.also(*earlier, "the other one");
                    found.help(match claim.source {
                        Source::OutboundRule(_) => "remove it from one of them",
                        Source::BalancingRules(_) => {
                            "remove it from one of them, or add `disableOutboundSnat: true` to the load balancing \
                             rules of one"
                        }
                    });
                }
            }
        }
    }

    /// Pools without a rule, and pools whose rules give no ports to members that have no other way out.
    /// Only for policies without an error: something else may be what a wrong part meant.
    pub fn warn(
        &self,
        balancer: &LoadBalancer,
        places: &[Place],
        rule_places: &[Span],
        interfaces: &Interfaces,
        problems: &mut Problems,
    ) {
        let mut outbound = vec![false; balancer.pools.len()];
        let mut nat = vec![false; balancer.pools.len()];
        let mut first_rule = vec![None; balancer.pools.len()];
        for rule in &balancer.outbound_rules {
            outbound[rule.pool] = true;
        }
        for (rule, place) in balancer.rules.iter().zip(rule_places) {
            first_rule[rule.pool].get_or_insert(*place);
        }
        for rule in &balancer.nat_rules {
            if let NatTarget::Range { pool, .. } = rule.target {
                nat[pool] = true;
            }
        }
        for (at, pool) in balancer.pools.iter().enumerate().filter(|(_, pool)| !pool.members.is_empty()) {
            match first_rule[at] {
                None if !outbound[at] && !nat[at] => {
                    problems
                        .warning(
                            places[at].name,
                            format!("no rule links backend pool `{}` to a frontend: it does nothing", pool.name),
                        )
                        .help(
                            "add an outbound or a load balancing rule with `backendAddressPool` set to it; without one \
                             its members leave by `defaultOutbound` where their subnet allows it, or not at all",
                        );
                }
                Some(rule) if !outbound[at] && pool.members.iter().any(|m| !self.has_any(*m, interfaces)) => {
                    problems
                        .warning(
                            rule,
                            format!("members of pool `{}` have no way out: `disableOutboundSnat` and no outbound rule", pool.name),
                        )
                        .help("add an outbound rule for the pool, or remove `disableOutboundSnat`");
                }
                _ => {}
            }
        }
    }

    fn has_any(&self, member: (usize, usize), interfaces: &Interfaces) -> bool {
        let public = || interfaces.built[member.0].addresses[member.1].public_address.is_some();
        [false, true].iter().any(|udp| self.by_member.contains_key(&(member, *udp))) || public()
    }
}
