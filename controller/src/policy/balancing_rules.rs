//! Load balancing rules: what arrives at a frontend's port goes to one of a pool (`reference/azure.md` §3).

use std::collections::HashMap;

use super::balancers::Parts;
use super::diagnostics::Problems;
use super::fields::Fields;
use super::listeners::Listener;
use super::names::Names;
use super::network::{self, Distribution, OutboundRule, TransportProtocol};
use super::outbound_rules::{self, PROTOCOLS};
use super::probes::Probes;
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// Minutes that flows from the world may be idle; also of inbound NAT rules.
pub const IDLE_MINUTES: std::ops::RangeInclusive<u32> = 4..=30;

const DISTRIBUTIONS: &[(&str, Distribution)] = &[
    ("Default", Distribution::Default),
    ("SourceIP", Distribution::SourceIp),
    ("SourceIPProtocol", Distribution::SourceIpProtocol),
];

/// A load balancing rule as read.
pub struct Rule {
    title: String,
    name: Option<Text>,
    frontend: Option<Text>,
    pool: Option<Text>,
    probe: Option<Text>,
    protocol: Option<At<TransportProtocol>>,
    frontend_port: Option<At<u32>>,
    /// `None` if it was given and wrong.
    backend_port: Option<u16>,
    distribution: Distribution,
    flow: Flow,
    disable_outbound_snat: bool,
}

/// What load balancing and inbound NAT rules say about flows alike.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    pub idle_timeout_seconds: Option<u32>,
    pub tcp_reset: bool,
    pub floating_ip: bool,
}

/// Reads what rules for flows from the world have in common.
pub fn read_flow(fields: &Fields<'_, '_>, problems: &mut Problems) -> Flow {
    let idle = fields.number("idleTimeoutInMinutes", *IDLE_MINUTES.start(), *IDLE_MINUTES.end(), problems);
    let mut flag = |field| fields.flag(field, problems).is_some_and(|flag| flag.value);
    Flow {
        idle_timeout_seconds: idle.map(|idle| idle.value * 60),
        tcp_reset: flag("enableTcpReset"),
        floating_ip: flag("enableFloatingIP"),
    }
}

/// Reads one of `loadBalancingRules`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Rule> {
    let fields = Fields::open(node, &shape::LOAD_BALANCING_RULE, problems)?;
    let name = fields.text("name", problems);
    let frontend = fields.text("frontendIPConfiguration", problems);
    let pool = fields.text("backendAddressPool", problems);
    let probe = fields.text("probe", problems);
    let mut protocol = fields.choice("protocol", PROTOCOLS, problems);
    let ha = protocol.as_ref().is_some_and(|protocol| protocol.value == TransportProtocol::All);
    // HA ports are ports 0; one word about them is enough.
    let least = u32::from(!ha);
    let frontend_port = fields.number("frontendPort", least, u32::from(u16::MAX), problems);
    let given = fields.number("backendPort", least, u32::from(u16::MAX), problems);
    let backend_port = match (&given, fields.node("backendPort")) {
        (None, Some(_)) => None,
        (None, None) => frontend_port.as_ref().map(|port| port.value as u16),
        (Some(port), _) => Some(port.value as u16),
    };
    if ha && let Some(all) = protocol.take() {
        problems
            .error(all.span, format!("{} is for all protocols and ports (HA ports)", fields.title))
            .help("only internal load balancers have HA ports, which there are none of: write a Tcp or Udp rule for each port");
    }
    let distribution = fields.choice("loadDistribution", DISTRIBUTIONS, problems);
    let flow = read_flow(&fields, problems);
    let disable_outbound_snat = fields.flag("disableOutboundSnat", problems).is_some_and(|flag| flag.value);
    Some(Rule {
        title: fields.title.clone(),
        name,
        frontend,
        pool,
        probe,
        protocol,
        frontend_port,
        backend_port,
        distribution: distribution.map(|word| word.value).unwrap_or_default(),
        flow,
        disable_outbound_snat,
    })
}

/// Builds the load balancing rules, and says where the name of each stands.
pub fn resolve(
    read: &[Rule],
    parts: &Parts<'_>,
    probes: &mut Probes,
    listeners: &mut Vec<Listener>,
    register: &mut Register,
    problems: &mut Problems,
) -> (Vec<network::LoadBalancingRule>, Vec<Span>) {
    let mut names = Names::new("load balancing rule of this load balancer");
    let (mut rules, mut places) = (Vec::new(), Vec::new());
    for (index, rule) in read.iter().enumerate() {
        if let Some(text) = &rule.name {
            names.declare(text, index, problems);
            register.add(&["loadBalancers", parts.balancer, "loadBalancingRules", &text.value], text.span);
        }
        let place = rule.name.as_ref().map(|name| name.span);
        if let (Some(resolved), Some(place)) = (resolve_one(rule, parts, probes, listeners, problems), place)
        {
            rules.push(resolved);
            places.push(place);
        }
    }
    warn_shared_ports(&rules, &places, parts, problems);
    (rules, places)
}

/// Azure refuses two rules that lead to one port of a pool, unless they keep the frontend's address. Here only a client that
/// uses one socket for both frontends is in its own way.
fn warn_shared_ports(
    rules: &[network::LoadBalancingRule],
    places: &[Span],
    parts: &Parts<'_>,
    problems: &mut Problems,
) {
    for (index, rule) in rules.iter().enumerate() {
        let family = parts.frontends.is_v6(rule.frontend);
        let same = |other: &network::LoadBalancingRule| {
            (other.pool, other.protocol, other.backend_port) == (rule.pool, rule.protocol, rule.backend_port)
                && !other.floating_ip
                && !rule.floating_ip
                && parts.frontends.is_v6(other.frontend) == family
        };
        if let Some(first) = rules[..index].iter().position(same) {
            problems
                .warning(
                    places[index],
                    format!("two load balancing rules send to port {} of one pool", rule.backend_port),
                )
                .also(places[first], format!("`{}` does so already", rules[first].name))
                .help(
                    "a client that talks to both frontends from one port is dropped as `contended` (Azure refuses such \
                    rules: RulesUseSameBackendPortProtocolAndPool): choose another backendPort, or enableFloatingIP",
                );
        }
    }
}

fn resolve_one(
    rule: &Rule,
    parts: &Parts<'_>,
    probes: &mut Probes,
    listeners: &mut Vec<Listener>,
    problems: &mut Problems,
) -> Option<network::LoadBalancingRule> {
    let frontend = rule.frontend.as_ref();
    let frontend = frontend.and_then(|text| parts.frontends.find_single(text, &rule.title, problems));
    let pool = rule.pool.as_ref().and_then(|text| parts.pools.find(text, problems));
    let probe = rule.probe.as_ref().map(|text| probes.take(text, problems));
    let v6 = frontend.and_then(|at| parts.frontends.is_v6(at));
    if let (Some(v6), Some(text), Some(pool)) = (v6, &rule.pool, pool) {
        parts.pools.warn_no_family(text, pool, v6, problems);
    }
    let (frontend, protocol) = (frontend?, rule.protocol.as_ref()?.value);
    let port = rule.frontend_port.as_ref()?;
    let frontend_port = port.value as u16;
    listeners.push(Listener {
        frontend,
        protocol,
        ports: (frontend_port, frontend_port),
        title: rule.title.clone(),
        span: port.span,
    });
    let probe = match probe {
        Some(found) => Some(found?),
        None => None,
    };
    Some(network::LoadBalancingRule {
        name: rule.name.as_ref()?.value.clone(),
        frontend,
        pool: pool?,
        protocol,
        frontend_port,
        backend_port: rule.backend_port?,
        distribution: rule.distribution,
        idle_timeout_seconds: rule.flow.idle_timeout_seconds,
        tcp_reset: rule.flow.tcp_reset,
        floating_ip: rule.flow.floating_ip,
        disable_outbound_snat: rule.disable_outbound_snat,
        probe,
    })
}

/// A frontend has its ports given out by outbound rules or by load balancing rules, not by both: Azure's rule.
pub fn check_outbound(
    rules: &[network::LoadBalancingRule],
    places: &[Span],
    outbound: &[OutboundRule],
    outbound_places: &[outbound_rules::Place],
    parts: &Parts<'_>,
    problems: &mut Problems,
) {
    const CODE: &str =
        "LoadBalancingRuleMustDisableSNATSinceSameFrontendIPConfigurationIsReferencedByOutboundRule";
    let mut ruled: HashMap<usize, (&str, Span)> = HashMap::new();
    for (rule, place) in outbound.iter().zip(outbound_places) {
        for (frontend, span) in rule.frontends.iter().zip(&place.frontends) {
            ruled.entry(*frontend).or_insert((&rule.name, *span));
        }
    }
    for (rule, place) in rules.iter().zip(places).filter(|(rule, _)| !rule.disable_outbound_snat) {
        let Some((other, span)) = ruled.get(&rule.frontend) else { continue };
        let frontend = &parts.frontends.built[rule.frontend].name;
        problems
            .error(
                *place,
                format!(
                    "{CODE}: load balancing rule `{}` gives out ports of frontend `{frontend}`",
                    rule.name
                ),
            )
            .also(*span, format!("outbound rule `{other}` does so too"))
            .help(format!(
                "add `disableOutboundSnat: true` to `{}`, or give the outbound rule another frontend",
                rule.name
            ));
    }
}
