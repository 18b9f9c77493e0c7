//! Load balancers as the input has them: frontends, pools and outbound rules here, the rest in `inbound`.

use super::discover::Kind;
use super::inbound::{self, BalancingRule, NatRule, Probe};
use super::names::render;
use super::object::{Field, Object, Reference};
use super::report::{Level, Report};
use super::sources::{Named, open};

#[derive(Debug)]
pub struct Balancer {
    pub named: Named,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<Pool>,
    pub outbound_rules: Vec<OutboundRule>,
    pub rules: Vec<BalancingRule>,
    pub nat_rules: Vec<NatRule>,
    pub probes: Vec<Probe>,
}

impl Balancer {
    /// One of which only parts are in the input.
    pub fn empty(named: Named) -> Self {
        Self {
            named,
            frontends: Vec::new(),
            pools: Vec::new(),
            outbound_rules: Vec::new(),
            rules: Vec::new(),
            nat_rules: Vec::new(),
            probes: Vec::new(),
        }
    }
}

#[derive(Debug)]
pub struct Frontend {
    pub named: Named,
    pub public: Option<Reference>,
    pub prefix: Option<Reference>,
    /// Is an IPv6 address wanted where none is given?
    pub v6: bool,
}

#[derive(Debug)]
pub struct Pool {
    pub named: Named,
    pub members: Vec<Reference>,
}

#[derive(Debug)]
pub struct OutboundRule {
    pub named: Named,
    pub frontends: Vec<Reference>,
    pub pool: Option<Reference>,
    pub protocol: &'static str,
    pub ports: Option<u32>,
    pub idle_minutes: Option<u32>,
    pub tcp_reset: bool,
}

/// Lists of a load balancer, and what is in them.
const LISTS: &[(&str, Kind)] = &[
    ("frontendIPConfigurations", Kind::Frontend),
    ("backendAddressPools", Kind::Pool),
    ("probes", Kind::Probe),
    ("loadBalancingRules", Kind::BalancingRule),
    ("inboundNatRules", Kind::NatRule),
    ("inboundNatPools", Kind::NatPool),
    ("outboundRules", Kind::OutboundRule),
];

/// Reads a load balancer.
pub fn read(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Balancer> {
    let mut object = open(field, &named.title, report)?;
    let mut balancer = Balancer::empty(named);
    for (list, kind) in LISTS {
        for item in object.list(list, Level::Warning, report) {
            read_part(*kind, &item, &mut balancer, report);
        }
    }
    object.finish(&["balancer"], report);
    Some(balancer)
}

/// Reads a part into its load balancer.
pub fn read_part(kind: Kind, field: &Field<'_>, balancer: &mut Balancer, report: &mut Report) {
    let type_name = LISTS.iter().find(|(_, known)| *known == kind).map_or("", |(list, _)| list);
    let name =
        field.json.get("name").and_then(|name| name.scalar()).map(|name| render(&name)).unwrap_or_default();
    let named = balancer.named.part(type_name, name.rsplit('/').next().unwrap_or_default(), &field.place);
    let Some(mut object) = open(field, &named.title, report) else { return };
    match kind {
        Kind::Frontend => {
            let public = object.reference("publicIPAddress", Level::Warning, report);
            let prefix = object.reference("publicIPPrefix", Level::Warning, report);
            let inside = object.take("subnet").is_some();
            let version = object.take("privateIPAddressVersion").and_then(|field| field.json.scalar());
            let v6 = version.is_some_and(|text| text.eq_ignore_ascii_case("IPv6"));
            let (place, title) = (object.place.clone(), object.title.clone());
            object.finish(&["frontend"], report);
            if inside {
                let why = "a frontend inside a network belongs to an internal load balancer, which there is none of";
                let action = "let the guests speak to each other directly";
                report.add(Level::Warning, &place, &title, "subnet", why, action);
            } else if public.is_none() && prefix.is_none() {
                let why = "the frontend names no public address";
                let action = "add the frontend to the policy by hand";
                report.add(Level::Warning, &place, &title, "publicIPAddress", why, action);
            } else {
                balancer.frontends.push(Frontend { named, public, prefix, v6 });
            }
        }
        Kind::Pool => {
            let members = object.references("backendIPConfigurations", Level::Warning, report);
            object.finish(&["pool"], report);
            balancer.pools.push(Pool { named, members });
        }
        Kind::BalancingRule => balancer.rules.push(inbound::read_rule(object, named, report)),
        Kind::NatRule => balancer.nat_rules.push(inbound::read_nat(object, named, false, report)),
        Kind::NatPool => balancer.nat_rules.push(inbound::read_nat(object, named, true, report)),
        Kind::Probe => balancer.probes.push(inbound::read_probe(object, named, report)),
        _ => balancer.outbound_rules.extend(read_outbound(object, named, report)),
    }
}

/// A number within limits; one that is none is told, and the default holds.
pub fn number(
    object: &mut Object<'_>,
    name: &str,
    (low, high): (u32, u32),
    report: &mut Report,
) -> Option<u32> {
    let (text, place) = object.scalar(name, report)?;
    let value = text.parse::<u32>().ok().filter(|value| (low..=high).contains(value));
    if value.is_none() {
        let why = format!("`{text}` is not a number from {low} to {high}; the default is used");
        report.add(Level::Warning, &place, &object.title, name, why, "write the number you want");
    }
    value
}

fn read_outbound(mut object: Object<'_>, named: Named, report: &mut Report) -> Option<OutboundRule> {
    let mut frontends = object.references("frontendIPConfigurations", Level::Warning, report);
    frontends.extend(object.reference("frontendIPConfiguration", Level::Warning, report));
    let pool = object.reference("backendAddressPool", Level::Warning, report);
    let protocol = object.scalar("protocol", report).map(|(text, _)| text).unwrap_or_default();
    let protocol = ["Tcp", "Udp", "All"].into_iter().find(|word| word.eq_ignore_ascii_case(&protocol));
    let mut ports = number(&mut object, "allocatedOutboundPorts", (0, 64_000), report);
    let idle_minutes = number(&mut object, "idleTimeoutInMinutes", (4, 120), report);
    if let Some(odd) = ports.filter(|ports| ports % 8 != 0) {
        ports = Some((odd - odd % 8).max(8));
        let why = format!("{odd} is not a multiple of 8");
        let action = "see whether it is enough";
        report.add(Level::Note, &object.place, &named.title, "allocatedOutboundPorts", why, action);
    }
    let tcp_reset = object.flag("enableTcpReset", report) == Some(true);
    let place = object.place.clone();
    object.finish(&["outboundRule"], report);
    let Some(protocol) = protocol else {
        let why = "the rule names no protocol of Tcp, Udp and All";
        let action = "add the rule to the policy by hand";
        report.add(Level::Warning, &place, &named.title, "protocol", why, action);
        return None;
    };
    Some(OutboundRule { named, frontends, pool, protocol, ports, idle_minutes, tcp_reset })
}
