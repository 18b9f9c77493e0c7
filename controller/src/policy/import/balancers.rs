//! Load balancers as the input has them: frontends, pools and outbound rules.

use super::discover::Kind;
use super::names::render;
use super::object::{Field, Object, Reference};
use super::report::{Level, Report};
use super::sources::{Named, open};

#[derive(Debug)]
pub struct Balancer {
    pub named: Named,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<Pool>,
    pub rules: Vec<Rule>,
}

impl Balancer {
    /// One of which only parts are in the input.
    pub fn empty(named: Named) -> Self {
        Self { named, frontends: Vec::new(), pools: Vec::new(), rules: Vec::new() }
    }
}

#[derive(Debug)]
pub struct Frontend {
    pub named: Named,
    pub public: Option<Reference>,
    pub prefix: Option<Reference>,
}

#[derive(Debug)]
pub struct Pool {
    pub named: Named,
    pub members: Vec<Reference>,
}

#[derive(Debug)]
pub struct Rule {
    pub named: Named,
    pub frontends: Vec<Reference>,
    pub pool: Option<Reference>,
    pub protocol: &'static str,
    pub ports: Option<u32>,
    pub idle_minutes: Option<u32>,
}

/// Reads a load balancer. Rules, NAT rules and probes are told one by one.
pub fn read(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Balancer> {
    let mut object = open(field, &named.title, report)?;
    let mut balancer = Balancer::empty(named);
    for (list, kind) in [
        ("frontendIPConfigurations", Kind::Frontend),
        ("backendAddressPools", Kind::Pool),
        ("outboundRules", Kind::OutboundRule),
    ] {
        for item in object.list(list, Level::Warning, report) {
            read_part(kind, &item, &mut balancer, report);
        }
    }
    object.finish(&["balancer"], report);
    Some(balancer)
}

/// Reads a part into its load balancer.
pub fn read_part(kind: Kind, field: &Field<'_>, balancer: &mut Balancer, report: &mut Report) {
    let type_name = match kind {
        Kind::Frontend => "frontendIPConfigurations",
        Kind::Pool => "backendAddressPools",
        _ => "outboundRules",
    };
    let name =
        field.json.get("name").and_then(|name| name.scalar()).map(|name| render(&name)).unwrap_or_default();
    let named = balancer.named.part(type_name, name.rsplit('/').next().unwrap_or_default(), &field.place);
    if kind == Kind::BalancerPart {
        let title = format!("{}/{name}", balancer.named.title);
        let why = "load balancing rules, inbound NAT rules and probes are not available yet";
        report.add(Level::Warning, &field.place, &title, "", why, "give the guests public addresses");
        return;
    }
    let Some(mut object) = open(field, &named.title, report) else { return };
    match kind {
        Kind::Frontend => {
            let public = object.reference("publicIPAddress", Level::Warning, report);
            let prefix = object.reference("publicIPPrefix", Level::Warning, report);
            let inside = object.take("subnet").is_some();
            let (place, title) = (object.place.clone(), object.title.clone());
            object.finish(&["frontend"], report);
            if inside {
                let why =
                    "a frontend inside a network needs load balancing rules, which are not available yet";
                report.add(
                    Level::Warning,
                    &place,
                    &title,
                    "subnet",
                    why,
                    "let the guests speak to each other directly",
                );
            } else if public.is_none() && prefix.is_none() {
                let why = "the frontend names no public address";
                report.add(
                    Level::Warning,
                    &place,
                    &title,
                    "publicIPAddress",
                    why,
                    "add the frontend to the policy by hand",
                );
            } else {
                balancer.frontends.push(Frontend { named, public, prefix });
            }
        }
        Kind::Pool => {
            let members = object.references("backendIPConfigurations", Level::Warning, report);
            object.finish(&["pool"], report);
            balancer.pools.push(Pool { named, members });
        }
        _ => balancer.rules.extend(read_rule(object, named, report)),
    }
}

fn read_rule(mut object: Object<'_>, named: Named, report: &mut Report) -> Option<Rule> {
    let mut frontends = object.references("frontendIPConfigurations", Level::Warning, report);
    frontends.extend(object.reference("frontendIPConfiguration", Level::Warning, report));
    let pool = object.reference("backendAddressPool", Level::Warning, report);
    let protocol = object.scalar("protocol", report).map(|(text, _)| text).unwrap_or_default();
    let protocol = ["Tcp", "Udp", "All"].into_iter().find(|word| word.eq_ignore_ascii_case(&protocol));
    let mut number = |name: &str, low: u32, high: u32| {
        let (text, place) = object.scalar(name, report)?;
        let value = text.parse::<u32>().ok().filter(|value| (low..=high).contains(value));
        if value.is_none() {
            let why = format!("`{text}` is not a number from {low} to {high}; the default is used");
            report.add(Level::Warning, &place, &named.title, name, why, "write the number you want");
        }
        value
    };
    let mut ports = number("allocatedOutboundPorts", 0, 64_000);
    let idle_minutes = number("idleTimeoutInMinutes", 4, 120);
    if let Some(odd) = ports.filter(|ports| ports % 8 != 0) {
        ports = Some((odd - odd % 8).max(8));
        let why = format!("{odd} is not a multiple of 8");
        report.add(
            Level::Note,
            &object.place,
            &named.title,
            "allocatedOutboundPorts",
            why,
            "see whether it is enough",
        );
    }
    if object.flag("enableTcpReset", report) == Some(true) {
        let why = "idle flows end silently here";
        report.add(
            Level::Warning,
            &object.place,
            &named.title,
            "enableTcpReset",
            why,
            "let the guests use keep-alives",
        );
    }
    let place = object.place.clone();
    object.finish(&["outboundRule"], report);
    let Some(protocol) = protocol else {
        let why = "the rule names no protocol of Tcp, Udp and All";
        report.add(
            Level::Warning,
            &place,
            &named.title,
            "protocol",
            why,
            "add the rule to the policy by hand",
        );
        return None;
    };
    Some(Rule { named, frontends, pool, protocol, ports, idle_minutes })
}
