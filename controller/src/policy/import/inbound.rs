//! What leads from a load balancer's frontends to guests, as the input has it: load balancing rules, inbound NAT rules
//! and pools, probes.

use super::balancers::number;
use super::names::render;
use super::object::{Object, Reference};
use super::report::{Level, Report};
use super::sources::Named;
use crate::policy::probes::{MOST_PROBES, NO_HTTP};

/// Minutes that flows from the world may be idle.
const IDLE_MINUTES: (u32, u32) = (4, 30);

#[derive(Debug)]
pub struct BalancingRule {
    pub named: Named,
    pub frontend: Option<Reference>,
    pub pools: Vec<Reference>,
    pub probe: Option<Reference>,
    /// `Tcp`, `Udp` or `All`; nothing if it cannot be read.
    pub protocol: Option<&'static str>,
    /// 0 of HA ports.
    pub frontend_port: Option<u16>,
    pub backend_port: Option<u16>,
    pub distribution: Option<&'static str>,
    pub flow: Flow,
    pub disable_outbound_snat: bool,
}

/// What rules for flows from the world have in common.
#[derive(Debug, Clone)]
pub struct Flow {
    pub idle_minutes: Option<u32>,
    pub tcp_reset: bool,
    pub floating_ip: bool,
}

#[derive(Debug)]
pub struct NatRule {
    pub named: Named,
    pub frontend: Option<Reference>,
    pub protocol: Option<&'static str>,
    pub backend_port: Option<u16>,
    pub flow: Flow,
    pub ports: NatPorts,
    /// The rule itself says where it leads; interfaces may say so too.
    pub member: Option<Reference>,
    pub pool: Option<Reference>,
}

#[derive(Debug, Clone, Copy)]
pub enum NatPorts {
    Single(Option<u16>),
    Range(Option<(u16, u16)>),
    /// The same, of an inbound NAT pool: a scale set says which machines are meant.
    Pool(Option<(u16, u16)>),
}

#[derive(Debug)]
pub struct Probe {
    pub named: Named,
    /// Path of HTTP; nothing of Tcp.
    pub path: Option<String>,
    pub port: Option<u16>,
    pub interval: Option<u32>,
    pub threshold: Option<u32>,
}

/// A word of a property, as we write it.
fn word(
    object: &mut Object<'_>,
    name: &str,
    words: &[&'static str],
    report: &mut Report,
) -> Option<&'static str> {
    let (text, _) = object.scalar(name, report)?;
    words.iter().copied().find(|word| word.eq_ignore_ascii_case(&text))
}

/// A port; what cannot be read is told with the rule that is lost by it.
fn port(object: &mut Object<'_>, name: &str, report: &mut Report) -> Option<u16> {
    object.scalar(name, report)?.0.parse().ok()
}

fn flow(object: &mut Object<'_>, report: &mut Report) -> Flow {
    Flow {
        idle_minutes: number(object, "idleTimeoutInMinutes", IDLE_MINUTES, report),
        tcp_reset: object.flag("enableTcpReset", report) == Some(true),
        floating_ip: object.flag("enableFloatingIP", report) == Some(true),
    }
}

/// Reads a load balancing rule.
pub fn read_rule(mut object: Object<'_>, named: Named, report: &mut Report) -> BalancingRule {
    let mut pools = object.references("backendAddressPools", Level::Warning, report);
    if let Some(pool) = object.reference("backendAddressPool", Level::Warning, report)
        && !pools.iter().any(|other| other.id.same(&pool.id))
    {
        pools.push(pool);
    }
    let rule = BalancingRule {
        named,
        frontend: object.reference("frontendIPConfiguration", Level::Warning, report),
        pools,
        probe: object.reference("probe", Level::Warning, report),
        protocol: word(&mut object, "protocol", &["Tcp", "Udp", "All"], report),
        frontend_port: port(&mut object, "frontendPort", report),
        backend_port: port(&mut object, "backendPort", report),
        distribution: word(
            &mut object,
            "loadDistribution",
            &["Default", "SourceIP", "SourceIPProtocol"],
            report,
        ),
        flow: flow(&mut object, report),
        disable_outbound_snat: object.flag("disableOutboundSnat", report) == Some(true),
    };
    object.finish(&["balancingRule"], report);
    rule
}

/// Reads an inbound NAT rule, or an inbound NAT pool.
pub fn read_nat(mut object: Object<'_>, named: Named, of_scale_set: bool, report: &mut Report) -> NatRule {
    let single = port(&mut object, "frontendPort", report).filter(|port| *port > 0);
    let first = port(&mut object, "frontendPortRangeStart", report).filter(|port| *port > 0);
    let last = port(&mut object, "frontendPortRangeEnd", report).filter(|port| *port > 0);
    let range = first.zip(last).filter(|(first, last)| first <= last);
    let member = object.reference("backendIPConfiguration", Level::Warning, report);
    let pool = object.reference("backendAddressPool", Level::Warning, report);
    let rule = NatRule {
        named,
        frontend: object.reference("frontendIPConfiguration", Level::Warning, report),
        protocol: word(&mut object, "protocol", &["Tcp", "Udp", "All"], report),
        backend_port: port(&mut object, "backendPort", report),
        flow: flow(&mut object, report),
        ports: match of_scale_set {
            true => NatPorts::Pool(range),
            false if pool.is_some() || first.is_some() => NatPorts::Range(range),
            false => NatPorts::Single(single),
        },
        member,
        pool,
    };
    object.finish(&["natRule"], report);
    rule
}

/// Reads a probe. What cannot be asked for here is asked for by a handshake instead.
pub fn read_probe(mut object: Object<'_>, named: Named, report: &mut Report) -> Probe {
    let (place, title) = (object.place.clone(), object.title.clone());
    let protocol = object.scalar("protocol", report).map(|(text, _)| text).unwrap_or_default();
    let http = protocol.eq_ignore_ascii_case("http");
    let port = port(&mut object, "port", report).filter(|port| *port > 0);
    let path = object.scalar("requestPath", report).map(|(text, _)| render(&text)).unwrap_or_default();
    let absolute = if path.starts_with('/') { path.clone() } else { format!("/{path}") };
    let why = if !http && !protocol.eq_ignore_ascii_case("tcp") {
        Some(format!("there is no `{protocol}` probe here: a Tcp handshake is made instead"))
    } else if http && port.is_some_and(|port| NO_HTTP.contains(&u32::from(port))) {
        Some("HTTP is not sent to this port: a Tcp handshake is made instead".to_owned())
    } else if http && (path.contains('[') || !absolute.chars().all(|c| c.is_ascii_graphic())) {
        Some(format!("`{path}` is no path: a Tcp handshake is made instead"))
    } else {
        None
    };
    if let Some(why) = &why {
        let action = "see whether a handshake says enough about the guest's health";
        report.add(Level::Warning, &place, &title, "protocol", why, action);
    } else if http && absolute != path {
        let why = format!("the path is written `{absolute}` here");
        report.add(Level::Note, &place, &title, "requestPath", why, "none needed");
    }
    let interval = number(&mut object, "intervalInSeconds", (5, 86_400), report);
    let newer = number(&mut object, "probeThreshold", (1, MOST_PROBES), report);
    let older = object.take("numberOfProbes");
    let threshold = match (newer, older) {
        (Some(newer), Some(older)) => {
            report.ignore(&older.place, "`probeThreshold` says it");
            Some(newer)
        }
        (newer, None) => newer,
        (None, Some(older)) => {
            let value = older.json.scalar().and_then(|text| text.parse().ok());
            let value = value.filter(|value| (1..=MOST_PROBES).contains(value));
            if value.is_none() {
                let why = format!("not a number from 1 to {MOST_PROBES}; the default is used");
                let action = "write the number you want";
                report.add(Level::Warning, &older.place, &title, "numberOfProbes", why, action);
            }
            value
        }
    };
    if let Some((text, place)) = object.scalar("noHealthyBackendsBehavior", report)
        && !text.eq_ignore_ascii_case("AllProbedDown")
    {
        let why = "with no healthy member there are no new flows here";
        let action = "nothing can be done about it";
        report.add(Level::Warning, &place, &title, "noHealthyBackendsBehavior", why, action);
    }
    object.finish(&["probe"], report);
    Probe { named, path: (http && why.is_none()).then_some(absolute), port, interval, threshold }
}
