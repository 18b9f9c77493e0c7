//! Do those who have SNAT ports of a load balancer's frontends fit them?

use super::allocation::{
    Claim, MAX_POOL, PORTS_BESIDE_HOST, Source, UNIT, capacity, entitlement, of_family, sharing, taken_units,
};
use super::diagnostics::{Diagnostic, Problems};
use super::interfaces::Interfaces;
use super::network::{Allocation, Announce, LoadBalancer, PublicAddress, TransportProtocol, Uplink};
use super::outbound_rules::Place;
use super::source::Span;

const TOO_MANY: &str = "SpecifiedAllocatedOutboundPortsForOutboundRuleExceedsTotalNumberOfAvailablePorts";

/// Where the rules of a load balancer stand.
pub struct Places<'a> {
    pub outbound: &'a [Place],
    pub rules: &'a [Span],
}

/// What the ports depend on besides the load balancer.
pub struct Frame<'a> {
    pub addresses: &'a [PublicAddress],
    pub uplinks: &'a [Uplink],
    pub interfaces: &'a Interfaces,
}

struct Check<'a> {
    balancer: &'a LoadBalancer,
    claims: &'a [Claim],
    places: &'a Places<'a>,
    frame: &'a Frame<'a>,
    /// Ports of each frontend, of all its addresses together; nothing if its address is not known.
    ports: Vec<Option<u64>>,
}

/// Checks every claim alone, then claims that share frontends together.
pub fn check(
    balancer: &LoadBalancer,
    claims: &[Claim],
    places: &Places<'_>,
    frame: &Frame<'_>,
    problems: &mut Problems,
) {
    let taken = taken_units(balancer);
    let ports = balancer.frontends.iter().zip(&taken).map(|(frontend, taken)| {
        let each =
            |at: &usize| frame.addresses.get(*at).map(|a| u64::from(capacity(a, frame.uplinks, taken)));
        // A frontend whose address is unknown has been reported; what it could hold is anyone's guess.
        if frontend.public_addresses.is_empty() {
            return None;
        }
        frontend.public_addresses.iter().map(each).sum()
    });
    let check = Check { balancer, claims, places, frame, ports: ports.collect() };
    let needs: Vec<Option<u64>> = claims.iter().map(|claim| check.alone(claim, problems)).collect();
    check.together(&needs, problems);
}

impl Check<'_> {
    /// Where to point, and what gives the ports.
    fn place(&self, claim: &Claim) -> (Span, String) {
        match claim.source {
            Source::OutboundRule(at) => {
                let place = &self.places.outbound[at];
                let title = format!("outbound rule {}", self.balancer.outbound_rules[at].name);
                (place.ports.unwrap_or(place.rule), title)
            }
            Source::BalancingRules(at) => {
                let title = format!("load balancing rule {}", self.balancer.rules[at].name);
                (self.places.rules[at], title)
            }
        }
    }

    /// What a set of frontends holds; of the `basic` allocation any one of their addresses may have to hold it all.
    fn have(&self, frontends: &[usize]) -> Option<u64> {
        let all = || frontends.iter().map(|at| self.ports[*at]);
        if self.balancer.allocation != Allocation::Basic {
            return all().sum();
        }
        let addresses = |at: &usize| self.balancer.frontends[*at].public_addresses.len() as u64;
        let each = frontends.iter().map(|at| self.ports[*at].map(|ports| ports / addresses(at).max(1)));
        each.collect::<Option<Vec<_>>>()?.into_iter().min()
    }

    fn frontends(&self, count: usize) -> String {
        match count {
            1 => "frontend".to_owned(),
            _ if self.balancer.allocation == Allocation::Basic => {
                format!("smallest of {count} frontends")
            }
            _ => format!("set of {count} frontends"),
        }
    }

    /// Ports that a claim needs; nothing if that cannot be said or is more than there are, which is reported.
    fn alone(&self, claim: &Claim, problems: &mut Problems) -> Option<u64> {
        let pool = &self.balancer.pools[claim.pool];
        let members = of_family(&pool.members, claim.v6, |member| self.frame.interfaces.address(member));
        let (at, title) = self.place(claim);
        if !claim.asked.is_multiple_of(UNIT) {
            return None; // reported where it was read
        }
        let Some(ports) = entitlement(claim.asked, members, claim.addresses.len(), self.balancer.allocation)
        else {
            let found = problems.error(
                at,
                format!("there is no default allocation for the {members} members of pool `{}`", pool.name),
            );
            found.help(match claim.source {
                Source::OutboundRule(_) => {
                    format!("defaults end at {MAX_POOL} members: set `allocatedOutboundPorts`")
                }
                Source::BalancingRules(_) => format!(
                    "defaults end at {MAX_POOL} members: set `disableOutboundSnat: true` on the pool's load balancing \
                     rules and write an outbound rule with `allocatedOutboundPorts`"
                ),
            });
            return None;
        };
        let need = u64::from(ports) * members as u64;
        let have = self.have(&claim.frontends)?;
        if need <= have {
            return Some(need);
        }
        let kind = if claim.asked == 0 { " (the default)" } else { "" };
        let set = self.frontends(claim.frontends.len());
        let message = format!(
            "{TOO_MANY}: {title} needs {need} ports ({ports} per member{kind} x {members} members), its {set} has {have}"
        );
        let found = problems.error(at, message);
        let most = have / members as u64 / u64::from(UNIT) * u64::from(UNIT);
        if most > 0 {
            found.help(format!("at most {most} ports per member fit; or add a frontend or remove members"));
        } else {
            found.help("add frontends or remove members: not even 8 ports per member fit");
        }
        self.help_host(found, claim);
        None
    }

    /// Claims that share frontends must fit together.
    fn together(&self, needs: &[Option<u64>], problems: &mut Problems) {
        let mut reported = Vec::new();
        for protocol in [TransportProtocol::Tcp, TransportProtocol::Udp] {
            for set in sharing(self.claims, protocol) {
                let all = set.iter().map(|index| needs[*index]).collect::<Option<Vec<_>>>();
                let mut shared: Vec<usize> =
                    set.iter().flat_map(|index| self.claims[*index].frontends.iter().copied()).collect();
                shared.sort_unstable();
                shared.dedup();
                let (Some(all), Some(have)) = (all, self.have(&shared)) else { continue };
                let need: u64 = all.iter().sum();
                let place = |index: &usize| self.place(&self.claims[*index]);
                let last = set.iter().max_by_key(|index| place(index).0.used);
                let Some(last) = last.filter(|_| set.len() > 1 && need > have) else { continue };
                if reported.contains(&set) {
                    continue;
                }
                let names: Vec<_> = set.iter().map(|index| place(index).1).collect();
                let message = format!(
                    "{TOO_MANY}: {} need {need} ports together, the {} they share has {have}",
                    names.join(", "),
                    self.frontends(shared.len())
                );
                let found = problems.error(place(last).0, message);
                for index in set.iter().filter(|index| *index != last) {
                    let need = needs[*index].unwrap_or_default();
                    found.also(place(index).0, format!("{need} of them here"));
                }
                found.help("lower `allocatedOutboundPorts`, or give the rules frontends of their own");
                reported.push(set);
            }
        }
    }

    /// An address of the host itself has fewer ports, and there are ways out of that.
    fn help_host(&self, found: &mut Diagnostic, claim: &Claim) {
        let mut used = claim.addresses.iter().filter_map(|at| self.frame.addresses.get(*at));
        if used.any(|address| beside_host(address, self.frame.uplinks)) {
            found.help(help_host());
        }
    }
}

/// Does the host use ports of this address that SNAT then cannot?
pub fn beside_host(address: &PublicAddress, uplinks: &[Uplink]) -> bool {
    address.announce == Announce::Address && !uplinks.iter().any(|uplink| uplink.reserve_host_ports)
}

/// What to do about that.
pub fn help_host() -> String {
    format!(
        "on an address of this host (`announce: address`) only {PORTS_BESIDE_HOST} ports lie outside the host's own: \
         set `reserveHostPorts: true` on an uplink, or announce it as proxy or routed"
    )
}
