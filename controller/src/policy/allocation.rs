//! How many SNAT ports there are, and how many an outbound rule asks for (`reference/azure.md` §2.2, §2.3).

use super::network::{Announce, LoadBalancer, OutboundRule, PublicAddress, TransportProtocol, Uplink};

/// Ports are handed out in blocks of this size.
pub const UNIT: u32 = 8;

/// Ports of one frontend whose address is ours alone.
pub const PORTS_PER_FRONTEND: u32 = 64_000;

/// Ports of a frontend on an address the host itself uses: those outside the kernel's ephemeral range.
pub const PORTS_BESIDE_HOST: u32 = 36_280;

/// The largest pool that has a default allocation.
pub const MAX_POOL: usize = 1000;

/// More than this no member gets by default, however many frontends there are.
const MAX_DEFAULT: u32 = 1024;

/// Azure's tiers: ports per member of a pool of this size on one frontend; nothing above `MAX_POOL`.
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

/// Ports per member when the rule leaves it to us: `MIN(tier x frontends, 1024)`.
pub fn default_ports(members: usize, frontends: usize) -> Option<u32> {
    let frontends = u32::try_from(frontends).unwrap_or(u32::MAX);
    Some(tier(members)?.saturating_mul(frontends).min(MAX_DEFAULT))
}

/// Ports per member of a rule, given or by tier.
pub fn ports_per_member(rule: &OutboundRule, members: usize) -> Option<u32> {
    match rule.allocated_outbound_ports {
        0 => default_ports(members, rule.frontends.len()),
        ports => Some(ports),
    }
}

/// Ports that one frontend on this address has.
pub fn capacity(address: &PublicAddress, uplinks: &[Uplink]) -> u32 {
    let reserved = uplinks.iter().any(|uplink| uplink.reserve_host_ports);
    match address.announce {
        Announce::Address if !reserved => PORTS_BESIDE_HOST,
        _ => PORTS_PER_FRONTEND,
    }
}

/// Do two rules draw on the same ports?
pub fn same_ports(a: TransportProtocol, b: TransportProtocol) -> bool {
    a == b || a == TransportProtocol::All || b == TransportProtocol::All
}

/// Rules of a balancer that share frontends, directly or through others, for one protocol: they share capacity.
pub fn sharing(balancer: &LoadBalancer, protocol: TransportProtocol) -> Vec<Vec<usize>> {
    let rules = &balancer.outbound_rules;
    let mut sets: Vec<Vec<usize>> = Vec::new();
    for index in (0..rules.len()).filter(|index| same_ports(rules[*index].protocol, protocol)) {
        let touches = |set: &Vec<usize>| {
            set.iter().any(|other| rules[*other].frontends.iter().any(|f| rules[index].frontends.contains(f)))
        };
        let (mut joined, apart): (Vec<_>, Vec<_>) = sets.into_iter().partition(touches);
        joined.push(vec![index]);
        sets = apart;
        sets.push(joined.concat());
    }
    sets
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
    fn several_frontends_multiply_the_default_up_to_1024() {
        assert_eq!(
            [1, 2, 3].map(|frontends| default_ports(100, frontends)),
            [Some(512), Some(1024), Some(1024)]
        );
        assert_eq!(default_ports(2, 4), Some(1024));
    }
}
