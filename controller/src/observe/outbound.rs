//! Which way out a guest has, by the precedence of `reference/azure.md` §2.1 (an instance-level address beats a load
//! balancer's, that beats the shared one), and why it has not the others. From the policy alone: whether the tables say the
//! same is what `explain` shows beside it.

use std::net::IpAddr;

use portcullis_common::policy::{ALLOC_ECHO, ALLOC_TCP, ALLOC_UDP};

use crate::compile::Scenario as Compiled;
use crate::daemon::InForce;
use crate::daemon::shared::Guest;
use crate::policy::network::{LoadBalancer, Network, TransportProtocol};

/// The scenarios, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    Instance,
    OutboundRule,
    LoadBalancingRule,
    Default,
}

/// A way out that a guest could take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WayOut {
    pub scenario: Scenario,
    /// `lb/out`; of an instance-level address and the shared one nothing.
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

/// All a guest's address could take for one protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ways {
    /// The first is the one that is taken.
    pub open: Vec<WayOut>,
    /// What does not count, and why.
    pub closed: Vec<String>,
}

impl WayOut {
    /// For people.
    pub fn text(&self) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(IpAddr::to_string).collect();
        let addresses = addresses.join(", ");
        match self.scenario {
            Scenario::Instance => format!("its instance-level public IP {addresses}"),
            Scenario::OutboundRule => format!("outbound rule {} ({addresses})", self.name),
            Scenario::LoadBalancingRule => format!("load balancing rule {} ({addresses})", self.name),
            Scenario::Default => format!("default outbound ({addresses})"),
        }
    }
}

/// The ways of a guest's address for `ALLOC_*`, the one that its tables have first.
pub fn ways_of(in_force: &InForce, guest: &Guest<'_>, which: usize) -> Ways {
    let mut ways = ways(&in_force.loaded.network, guest.place, which);
    let of = in_force.compiled.outbound.get(guest.number);
    let Some(allocation) = of.and_then(|of| of.allocations[which].as_ref()) else { return ways };
    let scenario = match allocation.scenario {
        Compiled::OutboundRule => Scenario::OutboundRule,
        Compiled::LoadBalancingRule => Scenario::LoadBalancingRule,
        Compiled::Default => Scenario::Default,
    };
    // `loadBalancers/lb/outboundRules/out` is lb/out to people.
    let words: Vec<&str> = allocation.place.split('/').collect();
    let name = match words.as_slice() {
        [_, balancer, _, rule] => format!("{balancer}/{rule}"),
        _ => String::new(),
    };
    let taken = WayOut { scenario, name, addresses: allocation.frontends.clone() };
    // Several load balancing rules of a pool are one way out.
    ways.open.retain(|way| way.scenario != scenario);
    let at = ways.open.iter().position(|way| way.scenario > scenario).unwrap_or(ways.open.len());
    ways.open.insert(at, taken);
    ways
}

/// The same from the policy alone.
fn ways(network: &Network, place: (usize, usize), which: usize) -> Ways {
    if which == ALLOC_ECHO {
        // Identifiers are TCP's ports, for those that have UDP's as well.
        let (tcp, udp) = (ways(network, place, ALLOC_TCP), ways(network, place, ALLOC_UDP));
        let shared = |ways: &Ways| ways.open.iter().any(|way| way.scenario != Scenario::Instance);
        if shared(&tcp) && shared(&udp) {
            return tcp;
        }
        let open = tcp.open.into_iter().filter(|way| way.scenario == Scenario::Instance).collect();
        let mut closed = vec!["a ping needs ports of TCP and of UDP".to_owned()];
        for why in tcp.closed.into_iter().chain(udp.closed) {
            if !closed.contains(&why) {
                closed.push(why);
            }
        }
        return Ways { open, closed };
    }
    let mut ways = Ways::default();
    let configuration = &network.interfaces[place.0].addresses[place.1];
    let v6 = configuration.address.is_ipv6();
    let family = if v6 { "IPv6" } else { "IPv4" };
    let of_family = |publics: &[usize]| -> Vec<IpAddr> {
        let addresses = publics.iter().map(|&i| network.public_addresses[i].address);
        addresses.filter(|address| address.is_ipv6() == v6).collect()
    };
    match configuration.public_address.map(|public| of_family(&[public])) {
        Some(addresses) if !addresses.is_empty() => {
            ways.open.push(WayOut { scenario: Scenario::Instance, name: String::new(), addresses });
        }
        Some(_) => ways.closed.push(format!("its instance-level public IP is not of {family}")),
        None => ways.closed.push("no instance-level public IP".to_owned()),
    }
    let (mut pooled, mut ruled) = (false, false);
    for balancer in &network.load_balancers {
        let has = |pool: usize| balancer.pools[pool].members.contains(&place);
        let frontend =
            |frontend: usize| !of_family(&balancer.frontends[frontend].public_addresses).is_empty();
        pooled |= (0..balancer.pools.len()).any(has);
        ruled |= balancer.rules.iter().any(|rule| has(rule.pool) && frontend(rule.frontend));
        ruled |= balancer
            .outbound_rules
            .iter()
            .any(|rule| has(rule.pool) && rule.frontends.iter().any(|&f| frontend(f)));
        of_balancer(&mut ways, balancer, place, which, &of_family, family);
    }
    if !pooled {
        ways.closed.push("in no backend pool".to_owned());
    } else if !ruled {
        ways.closed.push(format!("no rule links its backend pool to a frontend of {family}"));
    }
    let subnet = &network.subnets[configuration.subnet];
    match &network.default_outbound {
        None => ways.closed.push("the policy has no defaultOutbound".to_owned()),
        Some(_) if !subnet.default_outbound => {
            ways.closed.push(format!("subnet {} has defaultOutboundAccess off", subnet.name));
        }
        Some(_) if ruled => {
            ways.closed
                .push("default outbound is only for who stands behind no rule of a load balancer".to_owned());
        }
        Some(default) => match of_family(&default.public_addresses) {
            none if none.is_empty() => ways.closed.push(format!("defaultOutbound has no {family} address")),
            addresses => {
                ways.open.push(WayOut { scenario: Scenario::Default, name: String::new(), addresses })
            }
        },
    }
    // Within one scenario in the order of the policy.
    ways.open.sort_by_key(|way| way.scenario);
    ways
}

fn of_balancer(
    ways: &mut Ways,
    balancer: &LoadBalancer,
    place: (usize, usize),
    which: usize,
    of_family: &impl Fn(&[usize]) -> Vec<IpAddr>,
    family: &str,
) {
    let has = |pool: usize| balancer.pools[pool].members.contains(&place);
    let frontends = |numbers: &[usize]| -> Vec<IpAddr> {
        numbers.iter().flat_map(|&f| of_family(&balancer.frontends[f].public_addresses)).collect()
    };
    for rule in balancer.outbound_rules.iter().filter(|rule| has(rule.pool)) {
        let name = format!("{}/{}", balancer.name, rule.name);
        let addresses = frontends(&rule.frontends);
        if addresses.is_empty() {
            ways.closed.push(format!("outbound rule {name} has no {family} frontend"));
        } else if !covers(rule.protocol, which) {
            ways.closed.push(format!("outbound rule {name} is for {:?} only", rule.protocol));
        } else {
            ways.open.push(WayOut { scenario: Scenario::OutboundRule, name, addresses });
        }
    }
    for rule in balancer.rules.iter().filter(|rule| has(rule.pool)) {
        let name = format!("{}/{}", balancer.name, rule.name);
        let addresses = frontends(&[rule.frontend]);
        if addresses.is_empty() {
            ways.closed.push(format!("load balancing rule {name} has no {family} frontend"));
        } else if rule.disable_outbound_snat {
            ways.closed.push(format!("load balancing rule {name} has disableOutboundSnat"));
        } else if !covers(rule.protocol, which) {
            ways.closed.push(format!("load balancing rule {name} is for {:?} only", rule.protocol));
        } else {
            ways.open.push(WayOut { scenario: Scenario::LoadBalancingRule, name, addresses });
        }
    }
}

/// Gives a rule for this protocol ports for that allocation?
fn covers(protocol: TransportProtocol, which: usize) -> bool {
    match protocol {
        TransportProtocol::All => true,
        TransportProtocol::Tcp => which == ALLOC_TCP,
        TransportProtocol::Udp => which == ALLOC_UDP,
    }
}

/// Why a guest has no SNAT ports.
pub fn no_ports(in_force: &InForce, guest: &Guest<'_>) -> String {
    let both = [ALLOC_TCP, ALLOC_UDP].map(|which| ways_of(in_force, guest, which));
    let first = both.iter().find_map(|ways| ways.open.first());
    match first {
        Some(way) if way.scenario == Scenario::Instance => {
            format!("it leaves under {}, with any port", way.text())
        }
        Some(way) => format!("{} has given it no ports yet: see `status`", way.text()),
        None => {
            let mut said: Vec<&str> = Vec::new();
            for why in both.iter().flat_map(|ways| &ways.closed) {
                if !said.contains(&why.as_str()) {
                    said.push(why);
                }
            }
            format!("it has no way out: {}", said.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "
virtualNetworks:
  - name: v
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets: [{ name: s, addressPrefix: 10.0.0.0/24 }]
publicIPAddresses:
  - { name: own, ipAddress: 203.0.113.20, announce: proxy }
  - { name: pip, ipAddress: 203.0.113.10, announce: proxy }
networkInterfaces:
  - { name: vm1, device: tap1, ipConfigurations: [{ subnet: s, privateIPAddress: 10.0.0.4, publicIPAddress: own }] }
  - { name: vm2, device: tap2, ipConfigurations: [{ subnet: s, privateIPAddress: 10.0.0.5 }] }
  - { name: vm3, device: tap3, ipConfigurations: [{ subnet: s, privateIPAddress: 10.0.0.6 }] }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: Tcp }]
uplinks: [{ device: up }]
";

    fn policy() -> Network {
        let path = std::env::temp_dir().join(format!("pcd-outbound-{}.yaml", std::process::id()));
        std::fs::write(&path, POLICY).unwrap();
        let loaded = crate::policy::load(&path);
        std::fs::remove_file(&path).unwrap();
        loaded.unwrap_or_else(|found| panic!("{}", found.render(false))).network
    }

    #[test]
    fn an_instance_level_address_beats_a_rule_and_what_does_not_count_is_told() {
        let network = policy();
        let scenarios = |guest, which| {
            let ways = ways(&network, (guest, 0), which);
            (ways.open.iter().map(|way| way.scenario).collect::<Vec<_>>(), ways.closed.join("; "))
        };
        assert_eq!(scenarios(0, ALLOC_TCP).0, [Scenario::Instance, Scenario::OutboundRule]);
        assert_eq!(scenarios(1, ALLOC_TCP).0, [Scenario::OutboundRule]);
        let (open, closed) = scenarios(1, ALLOC_UDP);
        assert!(open.is_empty() && closed.contains("outbound rule lb/out is for Tcp only"), "{closed}");
        assert!(scenarios(1, ALLOC_ECHO).0.is_empty(), "a ping needs a rule for either");
        let (open, closed) = scenarios(2, ALLOC_TCP);
        assert!(open.is_empty());
        for why in ["no instance-level public IP", "in no backend pool", "no defaultOutbound"] {
            assert!(closed.contains(why), "{why} in {closed}");
        }
    }
}
