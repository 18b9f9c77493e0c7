//! Load balancing rules, inbound NAT rules and probes of the policy. One that is lost lets nobody in, so that is told as
//! a warning.

use std::collections::{BTreeMap, HashMap};

use super::balancers::Balancer;
use super::draft;
use super::inbound::{BalancingRule, Flow, NatPorts, NatRule};
use super::names::Unique;
use super::object::Reference;
use super::plan::renamed;
use super::plan_balancers::{Members, Parts, Timeouts, own};
use super::report::{Level, Report};
use super::sources::Named;

/// A property of a rule that keeps it from being carried over, and why.
type Loss = (&'static str, String);

/// Ports of frontends that rules listen at.
#[derive(Default)]
struct Listeners {
    /// (frontend, is it Udp) to first and last port of each rule.
    taken: HashMap<(usize, bool), BTreeMap<u16, u16>>,
}

impl Listeners {
    /// Takes ports of a frontend, unless another rule has one of them.
    fn take(&mut self, frontend: usize, protocol: &str, (first, last): (u16, u16)) -> Result<(), Loss> {
        let which = || [false, true].into_iter().filter(|udp| protocol != if *udp { "Tcp" } else { "Udp" });
        let clash = which().any(|udp| {
            let taken = self.taken.get(&(frontend, udp));
            taken.is_some_and(|taken| taken.range(..=last).next_back().is_some_and(|(_, end)| *end >= first))
        });
        if clash {
            return Err(("frontendPort", "another rule has this port of the frontend".to_owned()));
        }
        for udp in which() {
            self.taken.entry((frontend, udp)).or_default().insert(first, last);
        }
        Ok(())
    }
}

/// Adds probes, load balancing and inbound NAT rules to a load balancer. `leads_to` says which ip configurations name the
/// NAT rule of a position.
pub fn plan(
    built: &mut draft::Balancer,
    balancer: &Balancer,
    parts: &mut Parts,
    members: &Members,
    leads_to: impl Fn(usize) -> Vec<usize>,
    timeouts: &mut Timeouts,
    report: &mut Report,
) {
    let probes = probes(built, balancer, parts, report);
    let mut listeners = Listeners::default();
    let mut names = Unique::default();
    for (source, rule) in balancer.rules.iter().enumerate() {
        match resolve_rule(built, rule, parts, &probes, &mut listeners, report) {
            Ok(mut resolved) => {
                resolved.name = names.take(&rule.named.name, "rule");
                renamed(&rule.named, &resolved.name, report);
                resolved.flow = flow(&rule.flow, &rule.named, timeouts, report);
                resolved.source = source;
                built.rules.push(resolved);
            }
            Err(loss) => lost(&rule.named, loss, report),
        }
    }
    let mut names = Unique::default();
    for (at, rule) in balancer.nat_rules.iter().enumerate() {
        let mut all = leads_to(at);
        all.extend(rule.member.iter().filter_map(|reference| members.ids.find(&reference.id)));
        let found = all.into_iter().find_map(|member| members.names[member].clone());
        match resolve_nat(built, rule, parts, found, &mut listeners) {
            Ok(mut resolved) => {
                resolved.name = names.take(&rule.named.name, "nat");
                renamed(&rule.named, &resolved.name, report);
                resolved.flow = flow(&rule.flow, &rule.named, timeouts, report);
                if let (NatPorts::Pool(_), draft::NatTarget::Range { pool, .. }) =
                    (rule.ports, &resolved.target)
                {
                    let why = format!(
                        "which machines of the scale set are meant is not in the input; the members of pool `{}` are here",
                        built.pools[*pool].name
                    );
                    let action = "see whether they are the same";
                    report.add(Level::Note, &rule.named.place, &rule.named.title, "", why, action);
                }
                built.nat_rules.push(resolved);
            }
            Err(loss) => lost(&rule.named, loss, report),
        }
    }
}

fn lost(named: &Named, (property, why): Loss, report: &mut Report) {
    let action = "write the rule into the policy by hand";
    report.add(Level::Warning, &named.place, &named.title, property, why, action);
}

fn flow(flow: &Flow, named: &Named, timeouts: &mut Timeouts, report: &mut Report) -> draft::Flow {
    draft::Flow {
        idle_minutes: timeouts.take(flow.idle_minutes, named, report),
        tcp_reset: flow.tcp_reset,
        floating_ip: flow.floating_ip,
    }
}

/// The probes, and for each of the input which it is.
fn probes(
    built: &mut draft::Balancer,
    balancer: &Balancer,
    parts: &mut Parts,
    report: &mut Report,
) -> Vec<Option<usize>> {
    let mut names = Unique::default();
    let mut found = Vec::new();
    for probe in &balancer.probes {
        parts.probe_ids.add(&probe.named.id);
        let Some(port) = probe.port else {
            lost(&probe.named, ("port", "its port is missing or cannot be read".to_owned()), report);
            found.push(None);
            continue;
        };
        let name = names.take(&probe.named.name, "probe");
        renamed(&probe.named, &name, report);
        let (path, interval, threshold) = (probe.path.clone(), probe.interval, probe.threshold);
        found.push(Some(built.probes.len()));
        built.probes.push(draft::Probe { name, path, port, interval, threshold });
    }
    found
}

/// The one frontend of a rule: with an address, not a prefix.
fn frontend(built: &draft::Balancer, reference: Option<&Reference>, parts: &Parts) -> Result<usize, Loss> {
    let why = match reference.map(|reference| parts.frontends(reference)) {
        Some([only]) if !built.frontends[*only].prefix => return Ok(*only),
        None => "it names no frontend",
        Some([]) => "its frontend was not carried over",
        Some(_) => "its frontend is a public prefix, which outbound rules only can use",
    };
    Err(("frontendIPConfiguration", why.to_owned()))
}

fn resolve_rule(
    built: &draft::Balancer,
    rule: &BalancingRule,
    parts: &Parts,
    probes: &[Option<usize>],
    listeners: &mut Listeners,
    report: &mut Report,
) -> Result<draft::BalancingRule, Loss> {
    let frontend = frontend(built, rule.frontend.as_ref(), parts)?;
    let pool = match rule.pools.as_slice() {
        [only] => parts.pool(only, built.pools.len()),
        [] => return Err(("backendAddressPool", "it names no pool".to_owned())),
        _ => return Err(("backendAddressPools", "a rule has one pool here".to_owned())),
    };
    let pool = pool.ok_or_else(|| ("backendAddressPool", "its pool is not in the input".to_owned()))?;
    let protocol = match rule.protocol {
        Some("All") => {
            let why = "HA ports are for internal load balancers, which there are none of";
            return Err(("protocol", why.to_owned()));
        }
        Some(protocol) => protocol,
        None => return Err(("protocol", "its protocol is none of Tcp and Udp".to_owned())),
    };
    let read = |port: Option<u16>, property: &'static str| {
        let port = port.filter(|port| *port > 0);
        port.ok_or_else(|| (property, "its port is missing or cannot be read".to_owned()))
    };
    let frontend_port = read(rule.frontend_port, "frontendPort")?;
    let backend_port = read(rule.backend_port, "backendPort")?;
    listeners.take(frontend, protocol, (frontend_port, frontend_port))?;
    let mut probe = None;
    if let Some(reference) = &rule.probe {
        probe = own(&parts.probe_ids, &reference.id, probes.len()).and_then(|at| probes[at]);
        if probe.is_none() {
            let why = "its probe was not carried over: every member is taken to live";
            let action = "add a probe to the policy";
            report.add(Level::Warning, &reference.place, &rule.named.title, "probe", why, action);
        }
    }
    Ok(draft::BalancingRule {
        source: 0,
        name: String::new(),
        frontend,
        pool,
        probe,
        protocol,
        frontend_port,
        backend_port,
        distribution: rule.distribution.filter(|word| *word != "Default"),
        flow: draft::Flow { idle_minutes: None, tcp_reset: false, floating_ip: false },
        disable_outbound_snat: rule.disable_outbound_snat,
    })
}

fn resolve_nat(
    built: &draft::Balancer,
    rule: &NatRule,
    parts: &Parts,
    member: Option<draft::Member>,
    listeners: &mut Listeners,
) -> Result<draft::NatRule, Loss> {
    let frontend = frontend(built, rule.frontend.as_ref(), parts)?;
    let v6 = built.frontends[frontend].v6;
    let protocol =
        rule.protocol.ok_or_else(|| ("protocol", "its protocol is none of Tcp, Udp and All".to_owned()))?;
    let unread = |property: &'static str| (property, "it is missing or cannot be read".to_owned());
    let backend_port = rule.backend_port.filter(|port| *port > 0).ok_or_else(|| unread("backendPort"))?;
    let (target, ports) = match rule.ports {
        NatPorts::Single(port) => {
            let port = port.ok_or_else(|| unread("frontendPort"))?;
            let Some(member) = member else {
                let why = "no ip configuration of the input says that it leads there";
                return Err(("backendIPConfiguration", why.to_owned()));
            };
            if member.v6 != v6 {
                let why = format!("`{}` is not of the frontend's family", member.name);
                return Err(("backendIPConfiguration", why));
            }
            (draft::NatTarget::Single { port, member }, (port, port))
        }
        NatPorts::Range(range) | NatPorts::Pool(range) => {
            let (first, last) = range.ok_or_else(|| unread("frontendPortRangeStart"))?;
            let pool = match (&rule.pool, rule.ports) {
                (Some(pool), _) => parts.pool(pool, built.pools.len()),
                // A scale set's machines are in the load balancer's pool, if it has one only.
                (None, NatPorts::Pool(_)) => (built.pools.len() == 1).then_some(0),
                (None, _) => None,
            };
            let Some(pool) = pool else {
                return Err(("backendAddressPool", "it is not known which pool is meant".to_owned()));
            };
            let (count, room) = (built.pools[pool].count(v6), usize::from(last - first) + 1);
            if room < count {
                return Err((
                    "frontendPortRangeEnd",
                    format!("{room} ports are too few for {count} members"),
                ));
            }
            (draft::NatTarget::Range { first, last, pool }, (first, last))
        }
    };
    listeners.take(frontend, protocol, ports)?;
    let flow = draft::Flow { idle_minutes: None, tcp_reset: false, floating_ip: false };
    Ok(draft::NatRule { name: String::new(), frontend, protocol, backend_port, flow, target })
}
