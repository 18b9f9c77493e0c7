//! Who leaves by which frontends: outbound rules that fit their ports, and load balancing rules that give out ports too.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use super::balancers::{Balancer, OutboundRule};
use super::draft;
use super::names::Unique;
use super::plan::renamed;
use super::plan_balancers::{Parts, Timeouts};
use super::report::{Level, Report};
use crate::policy::allocation::{UNIT, capacity, default_ports};
use crate::policy::network::{Allocation, Announce, PublicAddress};
use crate::policy::ports;

/// Who already has outbound ports, for Udp or for Tcp: over all load balancers a member has them of one pool.
#[derive(Default)]
pub struct Served(HashSet<(draft::Member, bool)>);

impl Served {
    fn has(&self, member: &draft::Member, protocol: &str) -> bool {
        both(protocol).any(|udp| self.0.contains(&(member.clone(), udp)))
    }

    fn add(&mut self, pool: &draft::Pool, v6: bool, protocol: &str) {
        for member in pool.members.iter().filter(|member| member.v6 == v6) {
            self.0.extend(both(protocol).map(|udp| (member.clone(), udp)));
        }
    }
}

/// Tcp, Udp or both of them: is it Udp?
fn both(protocol: &str) -> impl Iterator<Item = bool> {
    let (tcp, udp) = (protocol != "Udp", protocol != "Tcp");
    [(false, tcp), (true, udp)].into_iter().filter(|(_, is)| *is).map(|(udp, _)| udp)
}

/// Ports that are left of each frontend, for Tcp and for Udp.
struct Room([Vec<u32>; 2]);

impl Room {
    fn new(built: &draft::Balancer) -> Self {
        let unit = |port: u16| port / UNIT as u16;
        let mut taken = vec![Vec::new(); built.frontends.len()];
        for rule in &built.rules {
            taken[rule.frontend].push((unit(rule.frontend_port), unit(rule.frontend_port)));
        }
        for rule in &built.nat_rules {
            taken[rule.frontend].push(match rule.target {
                draft::NatTarget::Single { port, .. } => (unit(port), unit(port)),
                draft::NatTarget::Range { first, last, .. } => (unit(first), unit(last)),
            });
        }
        // Imported addresses are all announced like this one.
        let address = PublicAddress {
            name: String::new(),
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            announce: Announce::Proxy,
        };
        let all = built.frontends.iter().zip(taken);
        let left: Vec<u32> = all
            .map(|(frontend, taken)| frontend.addresses * capacity(&address, &[], &ports::merge(taken)))
            .collect();
        Self([left.clone(), left])
    }

    fn have(&self, frontends: &[usize], protocol: &str) -> u32 {
        let sum = |udp: bool| frontends.iter().map(|at| self.0[usize::from(udp)][*at]).sum::<u32>();
        both(protocol).map(sum).min().unwrap_or(0)
    }

    fn take(&mut self, frontends: &[usize], protocol: &str, need: u32) {
        for udp in both(protocol) {
            let mut need = need;
            for at in frontends {
                let left = &mut self.0[usize::from(udp)][*at];
                let taken = need.min(*left);
                *left -= taken;
                need -= taken;
            }
        }
    }
}

/// Adds the outbound rules to a load balancer whose other rules are there, and sees to it that those fit.
pub fn plan(
    built: &mut draft::Balancer,
    balancer: &Balancer,
    parts: &Parts,
    served: &mut Served,
    timeouts: &mut Timeouts,
    report: &mut Report,
) {
    let mut names = Unique::default();
    let mut room = Room::new(built);
    for rule in &balancer.outbound_rules {
        let named = &rule.named;
        match outbound(built, rule, parts, served, &mut room) {
            Ok((mut outbound, notes)) => {
                outbound.name = names.take(&named.name, "outbound");
                renamed(named, &outbound.name, report);
                outbound.idle_minutes = timeouts.take(rule.idle_minutes, named, report);
                for (property, why) in notes {
                    let action = "see whether that is enough";
                    report.add(Level::Warning, &named.place, &named.title, property, why, action);
                }
                built.outbound_rules.push(outbound);
            }
            Err((property, why)) => {
                let action = "write the rule into the policy by hand";
                report.add(Level::Warning, &named.place, &named.title, property, why, action);
            }
        }
    }
    by_rules(built, balancer, served, &mut room, report);
}

/// Load balancing rules that give out ports: those that may not, or whose ports do not fit, no longer do.
fn by_rules(
    built: &mut draft::Balancer,
    balancer: &Balancer,
    served: &mut Served,
    room: &mut Room,
    report: &mut Report,
) {
    let ruled: HashSet<usize> =
        built.outbound_rules.iter().flat_map(|rule| rule.frontends.iter().copied()).collect();
    let mut disable: BTreeMap<usize, String> = BTreeMap::new();
    let mut claims: BTreeMap<(usize, bool, &'static str), Vec<usize>> = BTreeMap::new();
    for (at, rule) in built.rules.iter().enumerate().filter(|(_, rule)| !rule.disable_outbound_snat) {
        if ruled.contains(&rule.frontend) {
            disable.insert(at, "an outbound rule gives out the frontend's ports".to_owned());
            continue;
        }
        let v6 = built.frontends[rule.frontend].v6;
        let has = built.outbound_rules.iter().any(|other| {
            other.pool == rule.pool
                && built.frontends[other.frontends[0]].v6 == v6
                && both(other.protocol).any(|udp| both(rule.protocol).any(|own| own == udp))
        });
        if !has {
            claims.entry((rule.pool, v6, rule.protocol)).or_default().push(at);
        }
    }
    for ((pool, v6, protocol), rules) in claims {
        let own = &built.pools[pool];
        let mut frontends: Vec<usize> = rules.iter().map(|at| built.rules[*at].frontend).collect();
        frontends.sort_unstable();
        frontends.dedup();
        let count = own.count(v6);
        let need = default_ports(count, frontends.len(), Allocation::Min1024)
            .and_then(|each| each.checked_mul(u32::try_from(count).ok()?));
        let others =
            own.members.iter().filter(|member| member.v6 == v6 && served.has(member, protocol)).count();
        let why = match need {
            _ if others > 0 => {
                format!("{others} members of `{}` have outbound ports of another pool", own.name)
            }
            Some(need) if need <= room.have(&frontends, protocol) => {
                room.take(&frontends, protocol, need);
                served.add(own, v6, protocol);
                continue;
            }
            _ => format!("the frontends have no ports left for the {count} members of `{}`", own.name),
        };
        disable.extend(rules.into_iter().map(|at| (at, why.clone())));
    }
    for (at, why) in disable {
        let rule = &mut built.rules[at];
        rule.disable_outbound_snat = true;
        let named = &balancer.rules[rule.source].named;
        let why = format!("{why}: `disableOutboundSnat: true` is written");
        let action = "see by which way its members leave";
        report.add(Level::Warning, &named.place, &named.title, "disableOutboundSnat", why, action);
    }
}

type Notes = Vec<(&'static str, String)>;

/// An outbound rule that fits; or which property of it does not, and why.
fn outbound(
    built: &mut draft::Balancer,
    rule: &OutboundRule,
    parts: &Parts,
    served: &mut Served,
    room: &mut Room,
) -> Result<(draft::OutboundRule, Notes), (&'static str, String)> {
    let mut notes = Vec::new();
    let mut frontends: Vec<usize> = Vec::new();
    for at in rule.frontends.iter().flat_map(|reference| parts.frontends(reference)) {
        if !frontends.contains(at) {
            frontends.push(*at);
        }
    }
    let Some(v6) = frontends.first().map(|at| built.frontends[*at].v6) else {
        return Err(("frontendIPConfigurations", "none of its frontends was carried over".to_owned()));
    };
    let before = frontends.len();
    frontends.retain(|at| built.frontends[*at].v6 == v6);
    if frontends.len() < before {
        notes.push(("frontendIPConfigurations", "the frontends of the other family are left out".to_owned()));
    }
    let Some(pool) = rule.pool.as_ref().and_then(|pool| parts.pool(pool, built.pools.len())) else {
        return Err(("backendAddressPool", "its pool is not in the input".to_owned()));
    };
    let own = &mut built.pools[pool];
    let clash = |other: &&draft::OutboundRule| {
        other.pool == pool
            && built.frontends[other.frontends[0]].v6 == v6
            && both(other.protocol).any(|udp| both(rule.protocol).any(|own| own == udp))
    };
    if built.outbound_rules.iter().any(|other| clash(&other)) {
        let why = format!("another rule gives pool `{}` ports for its protocol", own.name);
        return Err(("backendAddressPool", why));
    }
    let others =
        own.members.iter().filter(|member| member.v6 == v6 && served.has(member, rule.protocol)).count();
    if others > 0 {
        // The pool keeps them if something else needs them there.
        let nat = built
            .nat_rules
            .iter()
            .any(|nat| matches!(nat.target, draft::NatTarget::Range { pool: other, .. } if other == pool));
        if nat || built.rules.iter().any(|rule| rule.pool == pool) {
            let why = format!("{others} members of `{}` have outbound ports of another pool", own.name);
            return Err(("backendAddressPool", why));
        }
        own.members.retain(|member| member.v6 != v6 || !served.has(member, rule.protocol));
        let why = format!("{others} members have outbound ports of another pool");
        notes.push(("backendAddressPool", why));
    }
    let members = own.count(v6);
    let count = u32::try_from(members).unwrap_or(u32::MAX);
    let have = room.have(&frontends, rule.protocol);
    let addresses = frontends.iter().map(|at| built.frontends[*at].addresses as usize).sum();
    let default = default_ports(members, addresses, Allocation::Min1024);
    let mut ports = rule.ports.filter(|ports| *ports > 0);
    let wanted = ports.or(default).unwrap_or(u32::MAX);
    if count > 0 && u64::from(wanted) * u64::from(count) > u64::from(have) {
        let most = have / count / UNIT * UNIT;
        if most == 0 {
            let why = format!("its frontends have no ports left for {count} members");
            return Err(("allocatedOutboundPorts", why));
        }
        let why = format!("its frontends have {have} ports: {most} for each of {count} members");
        notes.push(("allocatedOutboundPorts", why));
        ports = Some(most);
    }
    let each = ports.or(default).unwrap_or(0);
    room.take(&frontends, rule.protocol, each.saturating_mul(count));
    served.add(own, v6, rule.protocol);
    let (name, protocol, tcp_reset) = (String::new(), rule.protocol, rule.tcp_reset);
    Ok((draft::OutboundRule { name, frontends, pool, protocol, ports, idle_minutes: None, tcp_reset }, notes))
}
