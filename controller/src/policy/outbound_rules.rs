//! Outbound rules: which pool leaves by which frontends, and with how many ports (`reference/azure.md` §2.3).

use std::collections::HashMap;

use super::allocation::{UNIT, same_ports};
use super::balancers::Parts;
use super::diagnostics::Problems;
use super::fields::Fields;
use super::frontends::family;
use super::names::Names;
use super::network::{self, TransportProtocol};
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// Minutes that flows with SNAT ports may be idle.
pub const IDLE_MINUTES: std::ops::RangeInclusive<u32> = 4..=120;

/// The words of `protocol`.
pub const PROTOCOLS: &[(&str, TransportProtocol)] =
    &[("Tcp", TransportProtocol::Tcp), ("Udp", TransportProtocol::Udp), ("All", TransportProtocol::All)];

/// An outbound rule as read.
pub struct Rule {
    name: Option<Text>,
    frontends: Vec<Text>,
    pool: Option<Text>,
    protocol: Option<At<TransportProtocol>>,
    ports: Option<At<u32>>,
    idle_minutes: Option<u32>,
    tcp_reset: bool,
}

/// Reads one of `outboundRules`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Rule> {
    let fields = Fields::open(node, &shape::OUTBOUND_RULE, problems)?;
    let name = fields.text("name", problems);
    let frontends = fields.texts("frontendIPConfigurations", problems);
    if frontends.is_empty() && fields.node("frontendIPConfigurations").is_some() {
        problems
            .error(fields.key("frontendIPConfigurations"), format!("{} has no frontend", fields.title))
            .help("name at least one of this load balancer's frontends");
    }
    let pool = fields.text("backendAddressPool", problems);
    let protocol = fields.choice("protocol", PROTOCOLS, problems);
    // Whether that many exist is said in `capacity`, with the numbers.
    let ports = fields.number("allocatedOutboundPorts", 0, u32::MAX, problems);
    if let Some(ports) = &ports {
        check_unit(ports, &fields.title, problems);
    }
    let idle = fields.number("idleTimeoutInMinutes", *IDLE_MINUTES.start(), *IDLE_MINUTES.end(), problems);
    let idle_minutes = idle.map(|idle| idle.value);
    let tcp_reset = fields.flag("enableTcpReset", problems).is_some_and(|reset| reset.value);
    Some(Rule { name, frontends, pool, protocol, ports, idle_minutes, tcp_reset })
}

/// Ports are handed out in blocks of 8, as in Azure.
fn check_unit(ports: &At<u32>, title: &str, problems: &mut Problems) {
    let below = ports.value - ports.value % UNIT;
    if ports.value != below {
        let near = match below {
            0 => format!("write {UNIT}, or 0 for the default"),
            _ => format!("write {below} or {}", u64::from(below) + u64::from(UNIT)),
        };
        let code = "SpecifiedAllocatedOutboundPortsForOutboundRuleIsNotAMultipleOfEight";
        problems
            .error(ports.span, format!("{code}: {title} asks for {} ports per member", ports.value))
            .help(format!("ports are handed out in blocks of {UNIT}: {near}"));
    }
}

/// Where the parts of an outbound rule stand.
pub struct Place {
    pub ports: Option<Span>,
    pub rule: Span,
    pool: Span,
    /// Those of the rule's frontends, in their order.
    pub frontends: Vec<Span>,
}

/// Builds the outbound rules, and says where each stands.
pub fn resolve(
    read: &[Rule],
    parts: &Parts<'_>,
    register: &mut Register,
    problems: &mut Problems,
) -> (Vec<network::OutboundRule>, Vec<Place>) {
    let mut names = Names::new("outbound rule of this load balancer");
    let (mut rules, mut places) = (Vec::new(), Vec::new());
    for (index, rule) in read.iter().enumerate() {
        if let Some(text) = &rule.name {
            names.declare(text, index, problems);
            register.add(&["loadBalancers", parts.balancer, "outboundRules", &text.value], text.span);
        }
        if let Some((resolved, place)) = resolve_one(rule, parts, problems) {
            rules.push(resolved);
            places.push(place);
        }
    }
    check_pools(&rules, &places, parts, problems);
    (rules, places)
}

fn resolve_one(
    rule: &Rule,
    parts: &Parts<'_>,
    problems: &mut Problems,
) -> Option<(network::OutboundRule, Place)> {
    let (mut frontends, mut spans) = (Vec::new(), Vec::new());
    let mut complete = !rule.frontends.is_empty();
    for text in &rule.frontends {
        match parts.frontends.find(text, problems) {
            Some(index) if frontends.contains(&index) => {
                problems
                    .error(
                        text.span,
                        format!("frontend `{}` is named twice in one outbound rule", text.value),
                    )
                    .help("remove one of them");
            }
            Some(index) => {
                frontends.push(index);
                spans.push(text.span);
            }
            None => complete = false,
        }
    }
    let v6 = one_family(&frontends, &spans, parts, problems);
    let pool = rule.pool.as_ref().and_then(|text| parts.pools.find(text, problems));
    if let (Some(v6), Some(text), Some(pool)) = (v6, &rule.pool, pool) {
        parts.pools.warn_no_family(text, pool, v6, problems);
    }
    let name = rule.name.as_ref()?;
    let place = Place {
        ports: rule.ports.as_ref().filter(|ports| ports.value > 0).map(|ports| ports.span),
        rule: name.span,
        pool: rule.pool.as_ref()?.span,
        frontends: spans,
    };
    let resolved = network::OutboundRule {
        name: name.value.clone(),
        frontends,
        pool: pool?,
        protocol: rule.protocol.as_ref()?.value,
        allocated_outbound_ports: rule.ports.as_ref().map_or(0, |ports| ports.value),
        idle_timeout_seconds: rule.idle_minutes.map(|minutes| minutes * 60),
        tcp_reset: rule.tcp_reset,
    };
    complete.then_some((resolved, place))
}

/// The family of all of a rule's frontends; nothing if they differ, which is reported, or are not known.
fn one_family(
    frontends: &[usize],
    spans: &[Span],
    parts: &Parts<'_>,
    problems: &mut Problems,
) -> Option<bool> {
    let known =
        frontends.iter().zip(spans).filter_map(|(at, span)| Some((parts.frontends.is_v6(*at)?, *span)));
    let known: Vec<(bool, Span)> = known.collect();
    let (first, place) = *known.first()?;
    let Some((other, span)) = known.iter().find(|(v6, _)| *v6 != first) else { return Some(first) };
    problems
        .error(*span, "an outbound rule has frontends of both families")
        .label(format!("this one is {}", family(*other)))
        .also(place, format!("this one is {}", family(first)))
        .help("write two rules, one for each family: their pool may be the same");
    None
}

/// A pool has ports of each family and protocol from one outbound rule.
fn check_pools(
    rules: &[network::OutboundRule],
    places: &[Place],
    parts: &Parts<'_>,
    problems: &mut Problems,
) {
    let mut seen: HashMap<(usize, bool), Vec<usize>> = HashMap::new();
    for (index, rule) in rules.iter().enumerate() {
        let Some(v6) = rule.frontends.first().and_then(|at| parts.frontends.is_v6(*at)) else { continue };
        let earlier = seen.entry((rule.pool, v6)).or_default();
        if let Some(other) = earlier.iter().find(|other| same_ports(rules[**other].protocol, rule.protocol)) {
            problems
                .error(
                    places[index].pool,
                    format!(
                        "two outbound rules give pool `{}` ports for one protocol",
                        parts.pools.built[rule.pool].name
                    ),
                )
                .also(places[*other].pool, format!("`{}` does so already", rules[*other].name))
                .help("join the rules, or let one be Tcp and the other Udp");
        } else {
            // At most one for each protocol gets here.
            earlier.push(index);
        }
    }
}
