//! Load balancers: frontends, backend pools, outbound rules.

use std::collections::HashMap;
use std::net::IpAddr;

use super::allocation::{UNIT, same_ports};
use super::diagnostics::Problems;
use super::fields::Fields;
use super::interfaces::Interfaces;
use super::names::{Names, nearest};
use super::network::{self, TransportProtocol, Uplink};
use super::publics::Publics;
use super::register::Register;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{capacity, shape};

/// Minutes an outbound rule's flows may be idle.
const IDLE_MINUTES: std::ops::RangeInclusive<u32> = 4..=120;

/// A load balancer as read.
pub struct Balancer {
    name: Option<Text>,
    span: Span,
    frontends: Vec<(Option<Text>, Option<Text>)>,
    pools: Vec<Pool>,
    rules: Vec<Rule>,
}

struct Pool {
    name: Option<Text>,
    members: Vec<Text>,
}

struct Rule {
    name: Option<Text>,
    frontends: Vec<Text>,
    pool: Option<Text>,
    protocol: Option<At<TransportProtocol>>,
    ports: Option<At<u32>>,
    idle_minutes: Option<u32>,
}

/// Reads `loadBalancers`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Balancer> {
    items.iter().filter_map(|node| read_balancer(node, problems)).collect()
}

fn read_balancer(node: &Node<'_>, problems: &mut Problems) -> Option<Balancer> {
    let fields = Fields::open(node, &shape::LOAD_BALANCER, problems)?;
    let name = fields.text("name", problems);
    let frontends = fields.list("frontendIPConfigurations", problems);
    let frontends = frontends.iter().filter_map(|item| read_frontend(item, problems)).collect();
    let pools = fields.list("backendAddressPools", problems);
    let pools = pools.iter().filter_map(|item| read_pool(item, problems)).collect();
    let rules = fields.list("outboundRules", problems);
    let rules = rules.iter().filter_map(|item| read_rule(item, problems)).collect();
    Some(Balancer { name, span: fields.span, frontends, pools, rules })
}

fn read_frontend(node: &Node<'_>, problems: &mut Problems) -> Option<(Option<Text>, Option<Text>)> {
    let fields = Fields::open(node, &shape::FRONTEND, problems)?;
    Some((fields.text("name", problems), fields.text("publicIPAddress", problems)))
}

fn read_pool(node: &Node<'_>, problems: &mut Problems) -> Option<Pool> {
    let fields = Fields::open(node, &shape::BACKEND_POOL, problems)?;
    Some(Pool {
        name: fields.text("name", problems),
        members: fields.texts("backendIPConfigurations", problems),
    })
}

fn read_rule(node: &Node<'_>, problems: &mut Problems) -> Option<Rule> {
    let fields = Fields::open(node, &shape::OUTBOUND_RULE, problems)?;
    let name = fields.text("name", problems);
    let frontends = fields.texts("frontendIPConfigurations", problems);
    if frontends.is_empty() && fields.node("frontendIPConfigurations").is_some() {
        problems
            .error(fields.key("frontendIPConfigurations"), format!("{} has no frontend", fields.title))
            .help("name at least one of this load balancer's frontends");
    }
    let pool = fields.text("backendAddressPool", problems);
    let protocol = fields.choice(
        "protocol",
        &[("Tcp", TransportProtocol::Tcp), ("Udp", TransportProtocol::Udp), ("All", TransportProtocol::All)],
        problems,
    );
    // Whether that many exist is said below, with the numbers.
    let ports = fields.number("allocatedOutboundPorts", 0, u32::MAX, problems);
    if let Some(ports) = &ports {
        check_unit(ports, &fields.title, problems);
    }
    let idle = fields.number("idleTimeoutInMinutes", *IDLE_MINUTES.start(), *IDLE_MINUTES.end(), problems);
    if let Some(reset) = fields.flag("enableTcpReset", problems)
        && reset.value
    {
        problems
            .error(reset.span, "`enableTcpReset: true` is not available yet: idle flows end silently")
            .help("write `enableTcpReset: false` or leave it out");
    }
    let idle_minutes = idle.map(|idle| idle.value);
    Some(Rule { name, frontends, pool, protocol, ports, idle_minutes })
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

/// Checks what concerns more than one object and builds the load balancers.
pub fn resolve(
    read: Vec<Balancer>,
    interfaces: &Interfaces,
    publics: &mut Publics,
    uplinks: &[Uplink],
    register: &mut Register,
    problems: &mut Problems,
) -> Vec<network::LoadBalancer> {
    let mut names = Names::new("load balancer");
    let mut outbound = Outbound::default();
    let mut built = Vec::with_capacity(read.len());
    for (index, balancer) in read.into_iter().enumerate() {
        let name = balancer.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &balancer.name {
            names.declare(text, index, problems);
            register.add(&["loadBalancers", &name], balancer.span);
        }
        built.push(resolve_one(
            name,
            balancer,
            interfaces,
            publics,
            uplinks,
            &mut outbound,
            register,
            problems,
        ));
    }
    built
}

fn resolve_one(
    name: String,
    read: Balancer,
    interfaces: &Interfaces,
    publics: &mut Publics,
    uplinks: &[Uplink],
    outbound: &mut Outbound,
    register: &mut Register,
    problems: &mut Problems,
) -> network::LoadBalancer {
    let title = |text: &Option<Text>| text.as_ref().map(|text| text.value.clone()).unwrap_or_default();
    let mut frontend_names = Names::new("frontend of this load balancer");
    let mut frontends = Vec::new();
    for (index, (own, public)) in read.frontends.iter().enumerate() {
        let own_title = title(own);
        if let Some(text) = own {
            frontend_names.declare(text, index, problems);
            register.add(&["loadBalancers", &name, "frontendIPConfigurations", &own_title], text.span);
        }
        let user = format!("frontend `{name}/{own_title}`");
        let public = public.as_ref().and_then(|text| publics.take(text, &user, problems));
        frontends.push(network::Frontend {
            name: own_title,
            public_addresses: vec![public.unwrap_or(usize::MAX)],
        });
    }
    let mut pool_names = Names::new("backend pool of this load balancer");
    let mut pools = Vec::new();
    let mut member_spans: Vec<Vec<Span>> = Vec::new();
    for (index, pool) in read.pools.iter().enumerate() {
        let pool_title = title(&pool.name);
        if let Some(text) = &pool.name {
            pool_names.declare(text, index, problems);
            register.add(&["loadBalancers", &name, "backendAddressPools", &pool_title], text.span);
        }
        let (members, spans) = resolve_members(&pool_title, &pool.members, interfaces, problems);
        pools.push(network::BackendPool { name: pool_title, members });
        member_spans.push(spans);
    }
    let mut rule_names = Names::new("outbound rule of this load balancer");
    let mut rules = Vec::new();
    let mut places = Vec::new();
    for (index, rule) in read.rules.iter().enumerate() {
        if let Some(text) = &rule.name {
            rule_names.declare(text, index, problems);
            register.add(&["loadBalancers", &name, "outboundRules", &text.value], text.span);
        }
        let Some((resolved, place)) = resolve_rule(rule, &frontend_names, &pool_names, problems) else {
            continue;
        };
        places.push(place);
        rules.push(resolved);
    }
    for (index, rule) in rules.iter().enumerate() {
        for (earlier, other) in rules[..index].iter().enumerate() {
            if other.pool == rule.pool && same_ports(other.protocol, rule.protocol) {
                problems
                    .error(
                        places[index].pool,
                        format!(
                            "two outbound rules give pool `{}` ports for one protocol",
                            pools[rule.pool].name
                        ),
                    )
                    .also(places[earlier].pool, format!("`{}` does so already", other.name))
                    .help("join the rules, or let one be Tcp and the other Udp");
            }
        }
        if !rules[..index].iter().any(|other| other.pool == rule.pool) {
            let members = pools[rule.pool].members.iter().zip(&member_spans[rule.pool]);
            outbound.claim(&format!("{name}/{}", pools[rule.pool].name), members, interfaces, problems);
        }
    }
    for (index, pool) in read.pools.iter().enumerate() {
        if let Some(text) = &pool.name
            && !pool.members.is_empty()
            && read
                .rules
                .iter()
                .all(|rule| rule.pool.as_ref().and_then(|p| pool_names.get(&p.value)) != Some(index))
        {
            problems
                .warning(
                    text.span,
                    format!(
                        "no outbound rule serves backend pool `{}`: its members \
                    cannot reach the world through it",
                        text.value
                    ),
                )
                .help("add an outbound rule with `backendAddressPool` set to it");
        }
    }
    let balancer = network::LoadBalancer {
        name,
        frontends,
        pools,
        outbound_rules: rules,
        rules: Vec::new(),
        nat_rules: Vec::new(),
        probes: Vec::new(),
        allocation: network::Allocation::default(),
        frontend_use: network::FrontendUse::default(),
    };
    capacity::check(&balancer, &places, &publics.addresses, uplinks, problems);
    balancer
}

/// Where the parts of an outbound rule stand.
pub struct RulePlace {
    pub ports: Option<Span>,
    pub rule: Span,
    pool: Span,
}

fn resolve_rule(
    rule: &Rule,
    frontend_names: &Names,
    pool_names: &Names,
    problems: &mut Problems,
) -> Option<(network::OutboundRule, RulePlace)> {
    let mut frontends = Vec::new();
    let mut complete = !rule.frontends.is_empty();
    for text in &rule.frontends {
        match frontend_names.find(text, "frontendIPConfigurations", problems) {
            Some(index) if frontends.contains(&index) => {
                problems
                    .error(
                        text.span,
                        format!("frontend `{}` is named twice in one outbound rule", text.value),
                    )
                    .help("remove one of them");
            }
            Some(index) => frontends.push(index),
            None => complete = false,
        }
    }
    let pool = rule.pool.as_ref().and_then(|text| pool_names.find(text, "backendAddressPools", problems));
    let name = rule.name.as_ref()?;
    let rule_place = RulePlace {
        ports: rule.ports.as_ref().filter(|ports| ports.value > 0).map(|ports| ports.span),
        rule: name.span,
        pool: rule.pool.as_ref()?.span,
    };
    let resolved = network::OutboundRule {
        name: name.value.clone(),
        frontends,
        pool: pool?,
        protocol: rule.protocol.as_ref()?.value,
        allocated_outbound_ports: rule.ports.as_ref().map_or(0, |ports| ports.value),
        idle_timeout_seconds: rule.idle_minutes.map(|minutes| minutes * 60),
        tcp_reset: false,
    };
    complete.then_some((resolved, rule_place))
}

/// Members as (interface, ip configuration), and where each is named.
fn resolve_members(
    pool: &str,
    members: &[Text],
    interfaces: &Interfaces,
    problems: &mut Problems,
) -> (Vec<(usize, usize)>, Vec<Span>) {
    let mut seen: HashMap<(usize, usize), Span> = HashMap::new();
    let (mut found, mut spans) = (Vec::new(), Vec::new());
    for text in members {
        let Some(member) = resolve_member(text, interfaces, problems) else { continue };
        match seen.get(&member) {
            Some(first) => {
                problems
                    .error(text.span, format!("`{}` is in pool `{pool}` twice", text.value))
                    .also(*first, "the first one")
                    .help("remove one of them");
            }
            None => {
                seen.insert(member, text.span);
                found.push(member);
                spans.push(text.span);
            }
        }
    }
    (found, spans)
}

/// `vm1` for an interface with one IPv4 ip configuration, `vm1/primary` for any.
fn resolve_member(text: &Text, interfaces: &Interfaces, problems: &mut Problems) -> Option<(usize, usize)> {
    let (name, configuration) = match text.value.split_once('/') {
        Some((name, configuration)) => (name, Some(configuration)),
        None => (text.value.as_str(), None),
    };
    let reference = At::new(name.to_owned(), text.span);
    let index = interfaces.names.find(&reference, "networkInterfaces", problems)?;
    let all = &interfaces.members[index].configurations;
    let is_v6 = |address: &Option<IpAddr>| address.is_some_and(|address| address.is_ipv6());
    let v4: Vec<usize> = (0..all.len()).filter(|at| !is_v6(&all[*at].1)).collect();
    let choices = || v4.iter().map(|at| format!("{name}/{}", all[*at].0)).collect::<Vec<_>>().join(" or ");
    let found = match (configuration, v4.as_slice()) {
        (None, [only]) => *only,
        (None, []) => (!all.is_empty()).then_some(0)?,
        (None, several) => {
            problems
                .error(text.span, format!("`{name}` has {} ip configurations", several.len()))
                .help(format!("write which: {}", choices()));
            return None;
        }
        (Some(wanted), _) => match all.iter().position(|(own, _)| own.eq_ignore_ascii_case(wanted)) {
            Some(found) => found,
            None => {
                let help = match nearest(wanted, all.iter().map(|(own, _)| own.as_str())) {
                    Some(near) => format!("did you mean `{name}/{near}`?"),
                    None => format!("write {}", choices()),
                };
                problems.error(text.span, format!("`{name}` has no ip configuration `{wanted}`")).help(help);
                return None;
            }
        },
    };
    if let (own, Some(IpAddr::V6(address))) = &all[found] {
        problems
            .error(
                text.span,
                format!("`{name}/{own}` is IPv6 ({address}): load balancers translate IPv4 only"),
            )
            .help("name an IPv4 ip configuration, or remove it from the pool");
        return None;
    }
    Some((index, found))
}

/// Which members have outbound ports already, over all load balancers.
#[derive(Default)]
struct Outbound {
    by_member: HashMap<(usize, usize), (String, Span)>,
}

impl Outbound {
    fn claim<'m>(
        &mut self,
        pool: &str,
        members: impl Iterator<Item = (&'m (usize, usize), &'m Span)>,
        interfaces: &Interfaces,
        problems: &mut Problems,
    ) {
        for (member, span) in members {
            let interface = &interfaces.members[member.0];
            let title = format!("{}/{}", interface.name, interface.configurations[member.1].0);
            match self.by_member.get(member) {
                Some((other, first)) => {
                    problems
                        .error(
                            *span,
                            format!(
                                "`{title}` is in two pools with outbound rules: `{other}` and \
                                `{pool}`"
                            ),
                        )
                        .also(*first, format!("in `{other}` here"))
                        .help("its outbound ports can come from one pool only: remove it from the other");
                }
                None => {
                    self.by_member.insert(*member, (pool.to_owned(), *span));
                }
            }
        }
    }
}
