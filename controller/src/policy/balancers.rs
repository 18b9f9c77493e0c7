//! Load balancers: their parts are read and resolved each by its own module, and checked together here.

use super::allocation;
use super::balancing_rules;
use super::capacity;
use super::diagnostics::Problems;
use super::fields::Fields;
use super::frontends::{self, Frontends};
use super::interfaces::Interfaces;
use super::listeners;
use super::names::Names;
use super::nat_rules;
use super::network::{self, Allocation, FrontendUse, Uplink};
use super::outbound_rules;
use super::pools::{self, Pools};
use super::probes::{self, Probes};
use super::publics::Publics;
use super::register::Register;
use super::shape;
use super::source::{Span, Text};
use super::tree::Node;
use super::ways_out::WaysOut;

/// The words of `snatAllocation`.
const ALLOCATIONS: &[(&str, Allocation)] =
    &[("min1024", Allocation::Min1024), ("multiply", Allocation::Multiply), ("basic", Allocation::Basic)];

/// The words of `frontendUse`.
const FRONTEND_USES: &[(&str, FrontendUse)] =
    &[("sequential", FrontendUse::Sequential), ("spread", FrontendUse::Spread)];

/// A load balancer as read.
pub struct Balancer {
    name: Option<Text>,
    span: Span,
    frontends: Vec<frontends::Frontend>,
    pools: Vec<pools::Pool>,
    outbound_rules: Vec<outbound_rules::Rule>,
    rules: Vec<balancing_rules::Rule>,
    nat_rules: Vec<nat_rules::Rule>,
    probes: Vec<probes::Probe>,
    allocation: Allocation,
    frontend_use: FrontendUse,
}

/// Reads `loadBalancers`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Balancer> {
    items.iter().filter_map(|node| read_one(node, problems)).collect()
}

fn read_one(node: &Node<'_>, problems: &mut Problems) -> Option<Balancer> {
    let fields = Fields::open(node, &shape::LOAD_BALANCER, problems)?;
    Some(Balancer {
        name: fields.text("name", problems),
        span: fields.span,
        frontends: each(&fields, "frontendIPConfigurations", frontends::read, problems),
        pools: each(&fields, "backendAddressPools", pools::read, problems),
        outbound_rules: each(&fields, "outboundRules", outbound_rules::read, problems),
        rules: each(&fields, "loadBalancingRules", balancing_rules::read, problems),
        nat_rules: each(&fields, "inboundNatRules", nat_rules::read, problems),
        probes: each(&fields, "probes", probes::read, problems),
        allocation: fields
            .choice("snatAllocation", ALLOCATIONS, problems)
            .map(|w| w.value)
            .unwrap_or_default(),
        frontend_use: fields
            .choice("frontendUse", FRONTEND_USES, problems)
            .map(|w| w.value)
            .unwrap_or_default(),
    })
}

fn each<T>(
    fields: &Fields<'_, '_>,
    list: &str,
    read: fn(&Node<'_>, &mut Problems) -> Option<T>,
    problems: &mut Problems,
) -> Vec<T> {
    fields.list(list, problems).iter().filter_map(|item| read(item, problems)).collect()
}

/// What the rules of one load balancer refer to.
pub struct Parts<'a> {
    /// Its name.
    pub balancer: &'a str,
    pub frontends: Frontends,
    pub pools: Pools,
    pub interfaces: &'a Interfaces,
}

/// The load balancers, with what is needed to warn about them.
pub struct Balancers {
    pub built: Vec<network::LoadBalancer>,
    ways_out: WaysOut,
    places: Vec<Places>,
}

struct Places {
    pools: Vec<pools::Place>,
    rules: Vec<Span>,
    probes: Probes,
}

impl Balancers {
    /// Says what is allowed but hardly meant; only for policies without an error.
    pub fn warn(&self, interfaces: &Interfaces, problems: &mut Problems) {
        for (balancer, places) in self.built.iter().zip(&self.places) {
            places.probes.warn_unused(problems);
            self.ways_out.warn(balancer, &places.pools, &places.rules, interfaces, problems);
        }
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
) -> Balancers {
    let mut names = Names::new("load balancer");
    let mut all = Balancers { built: Vec::new(), ways_out: WaysOut::default(), places: Vec::new() };
    for (index, balancer) in read.into_iter().enumerate() {
        let name = balancer.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &balancer.name {
            names.declare(text, index, problems);
            register.add(&["loadBalancers", &name], balancer.span);
        }
        resolve_one(name, balancer, interfaces, publics, uplinks, &mut all, register, problems);
    }
    all
}

fn resolve_one(
    name: String,
    read: Balancer,
    interfaces: &Interfaces,
    publics: &mut Publics,
    uplinks: &[Uplink],
    all: &mut Balancers,
    register: &mut Register,
    problems: &mut Problems,
) {
    let frontends = frontends::resolve(&read.frontends, &name, publics, register, problems);
    let pools = pools::resolve(&read.pools, &name, interfaces, register, problems);
    let mut probes = probes::resolve(read.probes, &name, register, problems);
    let parts = Parts { balancer: &name, frontends, pools, interfaces };
    let (outbound_rules, outbound_places) =
        outbound_rules::resolve(&read.outbound_rules, &parts, register, problems);
    let mut listeners = Vec::new();
    let (rules, rule_places) =
        balancing_rules::resolve(&read.rules, &parts, &mut probes, &mut listeners, register, problems);
    let nat_rules = nat_rules::resolve(&read.nat_rules, &parts, &mut listeners, register, problems);
    listeners::check(&listeners, &parts.frontends, problems);
    balancing_rules::check_outbound(
        &rules,
        &rule_places,
        &outbound_rules,
        &outbound_places,
        &parts,
        problems,
    );
    let (frontends, pools) = (parts.frontends.built, parts.pools);
    let balancer = network::LoadBalancer {
        name,
        frontends,
        pools: pools.built,
        outbound_rules,
        rules,
        nat_rules,
        probes: probes.built.clone(),
        allocation: read.allocation,
        frontend_use: read.frontend_use,
    };
    let claims = allocation::claims(&balancer, &publics.addresses);
    let places = capacity::Places { outbound: &outbound_places, rules: &rule_places };
    let frame = capacity::Frame { addresses: &publics.addresses, uplinks, interfaces };
    capacity::check(&balancer, &claims, &places, &frame, problems);
    all.ways_out.add(&balancer, &claims, &pools.places, interfaces, problems);
    all.places.push(Places { pools: pools.places, rules: rule_places, probes });
    all.built.push(balancer);
}
