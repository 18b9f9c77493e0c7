//! Do the outbound rules of a load balancer fit the ports of its frontends?

use super::allocation::{MAX_POOL, PORTS_BESIDE_HOST, UNIT, capacity, ports_per_member, sharing};
use super::balancers::RulePlace;
use super::diagnostics::{Diagnostic, Problems};
use super::network::{Announce, LoadBalancer, OutboundRule, PublicAddress, TransportProtocol, Uplink};

const TOO_MANY: &str = "SpecifiedAllocatedOutboundPortsForOutboundRuleExceedsTotalNumberOfAvailablePorts";

/// Checks every rule alone, then rules that share frontends together. `places` goes with the balancer's rules.
pub fn check(
    balancer: &LoadBalancer,
    places: &[RulePlace],
    addresses: &[PublicAddress],
    uplinks: &[Uplink],
    problems: &mut Problems,
) {
    // A frontend whose address is unknown has been reported; what it could hold is anyone's guess.
    let known = |rule: &OutboundRule| {
        rule.frontends
            .iter()
            .all(|frontend| addresses.get(balancer.frontends[*frontend].public_addresses[0]).is_some())
    };
    let ports_of = |frontend: usize| {
        u64::from(capacity(&addresses[balancer.frontends[frontend].public_addresses[0]], uplinks))
    };
    let mut needs: Vec<Option<u64>> = Vec::new();
    for (rule, place) in balancer.outbound_rules.iter().zip(places) {
        needs.push(None);
        let members = balancer.pools[rule.pool].members.len();
        let asked = rule.allocated_outbound_ports;
        let at = place.ports.unwrap_or(place.rule);
        if asked % UNIT != 0 {
            continue; // reported where it was read
        }
        let Some(ports) = ports_per_member(rule, members) else {
            problems
                .error(
                    at,
                    format!(
                        "there is no default allocation for the {members} members of pool `{}`",
                        balancer.pools[rule.pool].name
                    ),
                )
                .help(format!("defaults end at {MAX_POOL} members: set `allocatedOutboundPorts`"));
            continue;
        };
        if !known(rule) {
            continue;
        }
        let need = u64::from(ports) * members as u64;
        let have: u64 = rule.frontends.iter().map(|frontend| ports_of(*frontend)).sum();
        if need > have {
            let kind = if asked == 0 { " (the default)" } else { "" };
            let message = format!(
                "{TOO_MANY}: outbound rule {} needs {need} ports ({ports} per member{kind} x \
                    {members} members), its {} has {have}",
                rule.name,
                frontends(rule.frontends.len())
            );
            let found = problems.error(at, message);
            help_smaller(found, have, members);
            help_host(found, balancer, rule, addresses, uplinks);
            continue;
        }
        if let Some(last) = needs.last_mut() {
            *last = Some(need);
        }
    }
    together(balancer, places, &needs, &ports_of, problems);
}

/// Rules that share frontends must fit together.
fn together(
    balancer: &LoadBalancer,
    places: &[RulePlace],
    needs: &[Option<u64>],
    ports_of: &dyn Fn(usize) -> u64,
    problems: &mut Problems,
) {
    let mut reported = Vec::new();
    for protocol in [TransportProtocol::Tcp, TransportProtocol::Udp] {
        for set in sharing(balancer, protocol) {
            let Some(all) = set.iter().map(|index| needs[*index]).collect::<Option<Vec<_>>>() else {
                continue;
            };
            let mut shared: Vec<usize> = set
                .iter()
                .flat_map(|index| balancer.outbound_rules[*index].frontends.iter().copied())
                .collect();
            shared.sort_unstable();
            shared.dedup();
            let need: u64 = all.iter().sum();
            let have: u64 = shared.iter().map(|frontend| ports_of(*frontend)).sum();
            let Some(last) = set.iter().max().filter(|_| set.len() > 1 && need > have) else { continue };
            if reported.contains(&set) {
                continue;
            }
            let names: Vec<_> =
                set.iter().map(|index| balancer.outbound_rules[*index].name.as_str()).collect();
            let message = format!(
                "{TOO_MANY}: outbound rules {} need {need} ports together, the {} they share has {have}",
                names.join(", "),
                frontends(shared.len())
            );
            let found = problems.error(places[*last].ports.unwrap_or(places[*last].rule), message);
            for index in set.iter().filter(|index| *index != last) {
                let need = needs[*index].unwrap_or_default();
                found.also(
                    places[*index].ports.unwrap_or(places[*index].rule),
                    format!("{need} of them here"),
                );
            }
            found.help("lower `allocatedOutboundPorts`, or give the rules frontends of their own");
            reported.push(set);
        }
    }
}

fn frontends(count: usize) -> String {
    if count == 1 { "frontend".to_owned() } else { format!("set of {count} frontends") }
}

fn help_smaller(found: &mut Diagnostic, have: u64, members: usize) {
    let most = have / members as u64 / u64::from(UNIT) * u64::from(UNIT);
    if most > 0 {
        found.help(format!("at most {most} ports per member fit; or add a frontend or remove members"));
    } else {
        found.help("add frontends or remove members: not even 8 ports per member fit");
    }
}

/// An address of the host itself has fewer ports, and there are ways out of that.
fn help_host(
    found: &mut Diagnostic,
    balancer: &LoadBalancer,
    rule: &OutboundRule,
    addresses: &[PublicAddress],
    uplinks: &[Uplink],
) {
    let reserved = uplinks.iter().any(|uplink| uplink.reserve_host_ports);
    let mut used =
        rule.frontends.iter().map(|frontend| &addresses[balancer.frontends[*frontend].public_addresses[0]]);
    if !reserved && used.any(|address| address.announce == Announce::Address) {
        found.help(format!(
            "on an address of this host (`announce: address`) only {PORTS_BESIDE_HOST} ports lie outside the host's own: \
             set `reserveHostPorts: true` on an uplink, or announce it as proxy or routed"
        ));
    }
}
