//! Inbound NAT rules: a frontend's port, or one of a range, goes to one member (`reference/azure.md` §3).

use super::balancers::Parts;
use super::balancing_rules::{Flow, read_flow};
use super::diagnostics::Problems;
use super::fields::Fields;
use super::frontends::family;
use super::listeners::Listener;
use super::names::Names;
use super::network::{self, NatTarget, TransportProtocol};
use super::outbound_rules::PROTOCOLS;
use super::pools::resolve_member;
use super::register::Register;
use super::shape;
use super::source::{At, Text};
use super::tree::Node;

/// An inbound NAT rule as read.
pub struct Rule {
    title: String,
    name: Option<Text>,
    frontend: Option<Text>,
    protocol: Option<At<TransportProtocol>>,
    backend_port: Option<u16>,
    flow: Flow,
    target: Option<Target>,
}

enum Target {
    Single { port: At<u32>, member: Text },
    Range { first: At<u32>, last: At<u32>, pool: Text },
}

const SINGLE: [&str; 2] = ["frontendPort", "backendIPConfiguration"];
const RANGE: [&str; 3] = ["frontendPortRangeStart", "frontendPortRangeEnd", "backendAddressPool"];

/// Reads one of `inboundNatRules`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Rule> {
    let fields = Fields::open(node, &shape::INBOUND_NAT_RULE, problems)?;
    let name = fields.text("name", problems);
    let frontend = fields.text("frontendIPConfiguration", problems);
    let protocol = fields.choice("protocol", PROTOCOLS, problems);
    let backend_port = fields.number("backendPort", 1, u32::from(u16::MAX), problems);
    let flow = read_flow(&fields, problems);
    let target = read_target(&fields, problems);
    let backend_port = backend_port.map(|port| port.value as u16);
    Some(Rule { title: fields.title.clone(), name, frontend, protocol, backend_port, flow, target })
}

/// Either the fields of a single port or those of a range, and all of them.
fn read_target(fields: &Fields<'_, '_>, problems: &mut Problems) -> Option<Target> {
    let given = |names: &[&'static str]| -> Vec<&'static str> {
        names.iter().copied().filter(|name| fields.node(name).is_some()).collect()
    };
    let (single, range) = (given(&SINGLE), given(&RANGE));
    let mut number = |field| fields.number(field, 1, u32::from(u16::MAX), problems);
    let (port, first, last) =
        (number("frontendPort"), number("frontendPortRangeStart"), number("frontendPortRangeEnd"));
    let member = fields.text("backendIPConfiguration", problems);
    let pool = fields.text("backendAddressPool", problems);
    if let (Some(one), Some(many)) = (single.first(), range.first()) {
        problems
            .error(fields.key(many), format!("`{many}` and `{one}` are given together"))
            .also(fields.key(one), "the other one")
            .help(format!(
                "one port and one member: `{}`; a range and a pool: `{}`",
                SINGLE.join("`, `"),
                RANGE.join("`, `")
            ));
        return None;
    }
    let needed: &[&str] = if range.is_empty() { &SINGLE } else { &RANGE };
    for field in needed.iter().filter(|field| !single.contains(field) && !range.contains(field)) {
        let found = problems.error(fields.span, format!("{} lacks `{field}`", fields.title));
        found.help(format!("add `{field}: ...`"));
        if single.is_empty() && range.is_empty() {
            found.help(format!("or, for all members of a pool, `{}`", RANGE.join("`, `")));
        }
    }
    if range.is_empty() {
        return Some(Target::Single { port: port?, member: member? });
    }
    let (first, last) = (first?, last?);
    if first.value > last.value {
        problems
            .error(last.span, format!("the range of {} ends before it begins", fields.title))
            .also(first.span, "its beginning")
            .help(format!(
                "write `frontendPortRangeStart: {}` and `frontendPortRangeEnd: {}`",
                last.value, first.value
            ));
        return None;
    }
    Some(Target::Range { first, last, pool: pool? })
}

/// Builds the inbound NAT rules.
pub fn resolve(
    read: &[Rule],
    parts: &Parts<'_>,
    listeners: &mut Vec<Listener>,
    register: &mut Register,
    problems: &mut Problems,
) -> Vec<network::InboundNatRule> {
    let mut names = Names::new("inbound NAT rule of this load balancer");
    let mut rules = Vec::new();
    for (index, rule) in read.iter().enumerate() {
        if let Some(text) = &rule.name {
            names.declare(text, index, problems);
            register.add(&["loadBalancers", parts.balancer, "inboundNatRules", &text.value], text.span);
        }
        rules.extend(resolve_one(rule, parts, listeners, problems));
    }
    rules
}

fn resolve_one(
    rule: &Rule,
    parts: &Parts<'_>,
    listeners: &mut Vec<Listener>,
    problems: &mut Problems,
) -> Option<network::InboundNatRule> {
    let frontend = rule.frontend.as_ref();
    let frontend = frontend.and_then(|text| parts.frontends.find_single(text, &rule.title, problems));
    let v6 = frontend.and_then(|at| parts.frontends.is_v6(at));
    let protocol = rule.protocol.as_ref().map(|protocol| protocol.value);
    let mut listen = |ports: (u16, u16), span| {
        if let (Some(frontend), Some(protocol)) = (frontend, protocol) {
            listeners.push(Listener { frontend, protocol, ports, title: rule.title.clone(), span });
        }
    };
    let target = match rule.target.as_ref()? {
        Target::Single { port, member } => {
            let frontend_port = port.value as u16;
            listen((frontend_port, frontend_port), port.span);
            let found = resolve_member(member, parts.interfaces, problems)?;
            if let (Some(v6), Some(address)) = (v6, parts.interfaces.address(found))
                && address.is_ipv6() != v6
            {
                problems
                    .error(member.span, format!("{} sends from {} to {address}", rule.title, family(v6)))
                    .help(format!("name an {} ip configuration, or another frontend", family(v6)));
            }
            NatTarget::Single { frontend_port, member: found }
        }
        Target::Range { first, last, pool: text } => {
            let range = (first.value as u16, last.value as u16);
            listen(range, first.span);
            let pool = parts.pools.find(text, problems)?;
            if let Some(v6) = v6 {
                parts.pools.warn_no_family(text, pool, v6, problems);
                let members = parts.pools.count(pool, v6);
                let ports = usize::from(range.1 - range.0) + 1;
                if ports < members {
                    problems
                        .error(
                            last.span,
                            format!(
                                "{} has {ports} ports ({} to {}) for the {members} members of pool `{}`",
                                rule.title, range.0, range.1, text.value
                            ),
                        )
                        .help(format!("every member gets one: the range needs {} more", members - ports));
                }
            }
            NatTarget::Range { first: range.0, last: range.1, pool }
        }
    };
    Some(network::InboundNatRule {
        name: rule.name.as_ref()?.value.clone(),
        frontend: frontend?,
        protocol: protocol?,
        backend_port: rule.backend_port?,
        idle_timeout_seconds: rule.flow.idle_timeout_seconds,
        tcp_reset: rule.flow.tcp_reset,
        floating_ip: rule.flow.floating_ip,
        target,
    })
}
