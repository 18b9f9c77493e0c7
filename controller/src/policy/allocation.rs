//! How many SNAT ports there are, who gets them, and how many (`reference/azure.md` §2.1 to §2.3).

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use super::network::{
    Allocation, Announce, LoadBalancer, NatTarget, Network, PublicAddress, TransportProtocol, Uplink,
};
use super::ports;

/// Ports are handed out in blocks of this size.
pub const UNIT: u32 = 8;

/// Ports of one address that is ours alone.
pub const PORTS_PER_ADDRESS: u32 = 64_000;

/// Ports of an address the host itself uses: those outside the kernel's ephemeral range.
pub const PORTS_BESIDE_HOST: u32 = 36_280;

/// Inclusive ranges of units: ports 1024 to 65023.
const WHOLE: &[(u16, u16)] = &[(128, 8127)];

/// Ports 1024 to 32767 and 61000 to 65535: what the kernel's default `ip_local_port_range` leaves.
const BESIDE_HOST: &[(u16, u16)] = &[(128, 4095), (7625, 8191)];

/// The largest pool that has a default allocation.
pub const MAX_POOL: usize = 1000;

/// With [`Allocation::Min1024`] no member gets more than this by default, however many addresses there are.
const MAX_DEFAULT: u32 = 1024;

/// Azure's tiers: ports per member of a pool of this size on one address; nothing above `MAX_POOL`.
pub fn tier(members: usize) -> Option<u32> {
    match members {
        0..=50 => Some(1024),
        51..=100 => Some(512),
        101..=200 => Some(256),
        201..=400 => Some(128),
        401..=800 => Some(64),
        801..=MAX_POOL => Some(32),
        _ => None,
    }
}

/// Ports per member, of all addresses together, when the rule leaves it to us; nothing above `MAX_POOL`.
pub fn default_ports(members: usize, addresses: usize, allocation: Allocation) -> Option<u32> {
    let addresses = u32::try_from(addresses).unwrap_or(u32::MAX);
    let tier = tier(members)?;
    Some(match allocation {
        Allocation::Min1024 => tier.saturating_mul(addresses).min(MAX_DEFAULT),
        Allocation::Multiply => tier.saturating_mul(addresses),
        Allocation::Basic => tier,
    })
}

/// Ports per member, of all addresses together: as given, or with 0 the default.
pub fn entitlement(asked: u32, members: usize, addresses: usize, allocation: Allocation) -> Option<u32> {
    match asked {
        0 => default_ports(members, addresses, allocation),
        ports => Some(ports),
    }
}

/// Ports that an address has besides those in `taken`, inclusive ranges of units.
pub fn capacity(address: &PublicAddress, uplinks: &[Uplink], taken: &[(u16, u16)]) -> u32 {
    let reserved = uplinks.iter().any(|uplink| uplink.reserve_host_ports);
    let eligible = match address.announce {
        Announce::Address if !reserved => BESIDE_HOST,
        _ => WHOLE,
    };
    let count = |low: u16, high: u16| (u32::from(high) + 1).saturating_sub(u32::from(low));
    let all: u32 = eligible.iter().map(|(low, high)| count(*low, *high)).sum();
    let lost = |range: &(u16, u16)| -> u32 {
        eligible.iter().map(|(low, high)| count(range.0.max(*low), range.1.min(*high))).sum()
    };
    (all - taken.iter().map(lost).sum::<u32>()) * UNIT
}

/// For each frontend the units in which load balancing and inbound NAT rules listen: inclusive ranges, sorted and apart.
/// They are lost to SNAT, for all protocols alike.
pub fn taken_units(balancer: &LoadBalancer) -> Vec<Vec<(u16, u16)>> {
    let mut taken = vec![Vec::new(); balancer.frontends.len()];
    let unit = |port: u16| port / UNIT as u16;
    for rule in &balancer.rules {
        taken[rule.frontend].push((unit(rule.frontend_port), unit(rule.frontend_port)));
    }
    for rule in &balancer.nat_rules {
        let (first, last) = match rule.target {
            NatTarget::Single { frontend_port, .. } => (frontend_port, frontend_port),
            NatTarget::Range { first, last, .. } => (first, last),
        };
        taken[rule.frontend].push((unit(first), unit(last)));
    }
    taken.into_iter().map(ports::merge).collect()
}

/// Do two rules draw on the same ports?
pub fn same_ports(a: TransportProtocol, b: TransportProtocol) -> bool {
    a == b || a == TransportProtocol::All || b == TransportProtocol::All
}

/// A pool that has SNAT ports of frontends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub source: Source,
    /// Index into the load balancer's `pools`. Members of the other family get nothing.
    pub pool: usize,
    pub v6: bool,
    pub protocol: TransportProtocol,
    /// Indices into the load balancer's `frontends`, in the order they are used.
    pub frontends: Vec<usize>,
    /// Indices into the policy's public addresses, in that order too.
    pub addresses: Vec<usize>,
    /// Ports per member; 0 asks for the default.
    pub asked: u32,
}

/// What gives a pool its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Index into the load balancer's `outbound_rules`.
    OutboundRule(usize),
    /// Load balancing rules that link the pool to the frontends; the index of the first of them.
    BalancingRules(usize),
}

/// Who has SNAT ports of a load balancer's frontends: pools by their outbound rules, and, for families and protocols
/// that no outbound rule of theirs is about, by load balancing rules that do not say `disableOutboundSnat`.
pub fn claims(balancer: &LoadBalancer, addresses: &[PublicAddress]) -> Vec<Claim> {
    let mut claims = Vec::new();
    let mut ruled = HashSet::new();
    for (index, rule) in balancer.outbound_rules.iter().enumerate() {
        let Some(v6) = rule.frontends.first().and_then(|at| is_v6(balancer, *at, addresses)) else {
            continue;
        };
        for protocol in [TransportProtocol::Tcp, TransportProtocol::Udp] {
            if same_ports(rule.protocol, protocol) {
                ruled.insert((rule.pool, v6, protocol == TransportProtocol::Udp));
            }
        }
        let source = Source::OutboundRule(index);
        let (pool, protocol, asked) = (rule.pool, rule.protocol, rule.allocated_outbound_ports);
        let frontends = rule.frontends.clone();
        claims.push(Claim { source, pool, v6, protocol, frontends, addresses: Vec::new(), asked });
    }
    let mut linked: BTreeMap<(usize, bool, bool), (usize, Vec<usize>)> = BTreeMap::new();
    for (index, rule) in balancer.rules.iter().enumerate().filter(|(_, rule)| !rule.disable_outbound_snat) {
        let Some(v6) = is_v6(balancer, rule.frontend, addresses) else { continue };
        for udp in [false, true] {
            let protocol = if udp { TransportProtocol::Udp } else { TransportProtocol::Tcp };
            if !same_ports(rule.protocol, protocol) || ruled.contains(&(rule.pool, v6, udp)) {
                continue;
            }
            let (_, frontends) = linked.entry((rule.pool, v6, udp)).or_insert((index, Vec::new()));
            if !frontends.contains(&rule.frontend) {
                frontends.push(rule.frontend);
            }
        }
    }
    for ((pool, v6, udp), (first, frontends)) in linked {
        let protocol = if udp { TransportProtocol::Udp } else { TransportProtocol::Tcp };
        let source = Source::BalancingRules(first);
        claims.push(Claim { source, pool, v6, protocol, frontends, addresses: Vec::new(), asked: 0 });
    }
    for claim in &mut claims {
        let all = claim.frontends.iter().flat_map(|at| &balancer.frontends[*at].public_addresses);
        claim.addresses = all.copied().collect();
    }
    claims
}

/// The family of a frontend, if its address is known.
fn is_v6(balancer: &LoadBalancer, frontend: usize, addresses: &[PublicAddress]) -> Option<bool> {
    let first = balancer.frontends[frontend].public_addresses.first()?;
    Some(addresses.get(*first)?.address.is_ipv6())
}

/// Claims that share frontends, directly or through others, for one protocol: they share capacity. Indices into `claims`.
pub fn sharing(claims: &[Claim], protocol: TransportProtocol) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    for index in (0..claims.len()).filter(|index| same_ports(claims[*index].protocol, protocol)) {
        let touches = |set: &Vec<usize>| {
            set.iter()
                .any(|other| claims[*other].frontends.iter().any(|f| claims[index].frontends.contains(f)))
        };
        let (mut joined, apart): (Vec<_>, Vec<_>) = sets.into_iter().partition(touches);
        joined.push(vec![index]);
        sets = apart;
        sets.push(joined.concat());
    }
    sets
}

/// Whose way out of one family the shared address is (scenario 3): (interface, its ip configuration) of subnets that
/// allow it, without a public address and in no pool that an outbound or load balancing rule links to a frontend.
/// Whether such a rule gives ports does not matter: who said `disableOutboundSnat` wants none.
pub fn default_outbound_members(network: &Network, v6: bool) -> Vec<(usize, usize)> {
    let mut linked = HashSet::new();
    for balancer in &network.load_balancers {
        let outbound =
            balancer.outbound_rules.iter().map(|rule| (rule.pool, rule.frontends.first().copied()));
        let rules = balancer.rules.iter().map(|rule| (rule.pool, Some(rule.frontend)));
        let of_family = |frontend: Option<usize>| {
            frontend.and_then(|at| is_v6(balancer, at, &network.public_addresses)) == Some(v6)
        };
        let pools: HashSet<usize> =
            outbound.chain(rules).filter(|(_, at)| of_family(*at)).map(|(pool, _)| pool).collect();
        linked.extend(pools.into_iter().flat_map(|pool| balancer.pools[pool].members.iter().copied()));
    }
    let mut members = Vec::new();
    for (at, interface) in network.interfaces.iter().enumerate() {
        for (position, configuration) in interface.addresses.iter().enumerate() {
            if network.subnets[configuration.subnet].default_outbound
                && configuration.address.is_ipv6() == v6
                && configuration.public_address.is_none()
                && !linked.contains(&(at, position))
            {
                members.push((at, position));
            }
        }
    }
    members
}

/// Members of a pool that a claim of this family serves.
pub fn of_family(
    members: &[(usize, usize)],
    v6: bool,
    address: impl Fn((usize, usize)) -> Option<IpAddr>,
) -> usize {
    // A member whose address could not be read counts: the number is for messages beside one about it.
    members.iter().filter(|member| address(**member).is_none_or(|address| address.is_ipv6() == v6)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_azures() {
        let sizes =
            [(1, 1024), (50, 1024), (51, 512), (100, 512), (101, 256), (200, 256), (201, 128), (400, 128)];
        for (members, ports) in sizes.into_iter().chain([(401, 64), (800, 64), (801, 32), (1000, 32)]) {
            assert_eq!(tier(members), Some(ports), "{members}");
        }
        assert_eq!(tier(1001), None);
    }

    #[test]
    fn several_addresses_multiply_the_default_up_to_1024_or_without_end_or_not_at_all() {
        let of = |allocation, members| {
            [1, 2, 3, 16].map(|addresses| default_ports(members, addresses, allocation))
        };
        assert_eq!(of(Allocation::Min1024, 100), [512, 1024, 1024, 1024].map(Some));
        assert_eq!(of(Allocation::Min1024, 2), [1024; 4].map(Some));
        assert_eq!(of(Allocation::Multiply, 50), [1024, 2048, 3072, 16384].map(Some));
        assert_eq!(of(Allocation::Basic, 100), [512; 4].map(Some));
        assert_eq!(of(Allocation::Multiply, 1001), [None; 4]);
        assert_eq!(entitlement(40, 1001, 2, Allocation::Multiply), Some(40));
    }

    #[test]
    fn an_address_has_64000_ports_less_eight_for_each_unit_with_a_listener() {
        let address = |announce| PublicAddress {
            name: String::new(),
            address: IpAddr::from([203, 0, 113, 1]),
            announce,
        };
        let [own, host] = [Announce::Proxy, Announce::Address].map(address);
        assert_eq!(capacity(&own, &[], &[]), PORTS_PER_ADDRESS);
        assert_eq!(capacity(&host, &[], &[]), PORTS_BESIDE_HOST);
        // Ports 80 and 65500 are no SNAT ports of an address of ours; of the host's, the second is one.
        let taken = [(10, 10), (276, 277), (8187, 8187)];
        assert_eq!(capacity(&own, &[], &taken), PORTS_PER_ADDRESS - 16);
        assert_eq!(capacity(&host, &[], &taken), PORTS_BESIDE_HOST - 24);
        assert_eq!(capacity(&own, &[], &[(0, 8191)]), 0);
    }
}
