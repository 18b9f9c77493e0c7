//! Load balancers of the policy: frontends with addresses and pools with members; their rules are planned by
//! `plan_inbound` and `plan_outbound`.

use std::collections::{HashMap, HashSet};

use super::balancers::Balancer;
use super::draft;
use super::names::{Id, Index, Unique};
use super::object::Reference;
use super::plan::{Plan, renamed};
use super::plan_outbound::Served;
use super::plan_publics::Taken;
use super::report::{Level, Report};
use super::sources::{Named, Sources};
use super::{plan_inbound, plan_outbound};

/// Different idle timeouts that one policy may have.
const MAX_TIMEOUTS: usize = 12;

/// The idle timeouts of a policy, in minutes.
#[derive(Default)]
pub struct Timeouts(HashSet<u32>);

impl Timeouts {
    /// The timeout if the policy has room for it; otherwise that is told, and the default holds.
    pub fn take(&mut self, minutes: Option<u32>, named: &Named, report: &mut Report) -> Option<u32> {
        let minutes = minutes?;
        if self.0.len() < MAX_TIMEOUTS || self.0.contains(&minutes) {
            self.0.insert(minutes);
            return Some(minutes);
        }
        let why = format!("a policy has at most {MAX_TIMEOUTS} different timeouts: the default is used");
        let action = "see whether that is enough";
        report.add(Level::Warning, &named.place, &named.title, "idleTimeoutInMinutes", why, action);
        None
    }
}

/// The members that pools and rules name.
pub struct Members {
    /// Every ip configuration of the input.
    pub ids: Index,
    /// What it is in the policy; nothing if it was not carried over.
    pub names: Vec<Option<draft::Member>>,
}

/// Which parts of a load balancer in the policy those of the input are.
pub struct Parts {
    frontend_ids: Index,
    /// A frontend with a prefix may have become several.
    frontends: Vec<Vec<usize>>,
    pool_ids: Index,
    pub probe_ids: Index,
}

impl Parts {
    /// What a frontend that a rule names has become.
    pub fn frontends(&self, reference: &Reference) -> &[usize] {
        own(&self.frontend_ids, &reference.id, self.frontends.len())
            .map_or(&[], |at| self.frontends[at].as_slice())
    }

    pub fn pool(&self, reference: &Reference, count: usize) -> Option<usize> {
        own(&self.pool_ids, &reference.id, count)
    }
}

/// A part of this load balancer that one of its rules names. Where a template leaves the name open and there is one part
/// only, it is that one: rules cannot name parts of others.
pub fn own(ids: &Index, id: &Id, count: usize) -> Option<usize> {
    let open = id.name().is_empty() || id.name().contains('[');
    ids.find(id).or_else(|| (open && count == 1).then_some(0))
}

/// All load balancers.
pub fn balancers(plan: &mut Plan, sources: &Sources, report: &mut Report) {
    let members = members(plan, sources);
    let mut names = Unique::default();
    let mut timeouts = Timeouts::default();
    let mut served = Served::default();
    // Pools and NAT rules by id, so that interfaces can say that they are in one.
    let (mut pools, mut nat_rules) = (Index::default(), Index::default());
    for balancer in &sources.balancers {
        balancer.pools.iter().for_each(|pool| pools.add(&pool.named.id));
        balancer.nat_rules.iter().for_each(|rule| nat_rules.add(&rule.named.id));
    }
    let mut in_pool: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut by_nat: HashMap<usize, Vec<usize>> = HashMap::new();
    let configurations = sources.interfaces.iter().flat_map(|interface| &interface.configurations);
    for (at, configuration) in configurations.enumerate() {
        let lists = [
            (&configuration.pools, &pools, &mut in_pool, "loadBalancerBackendAddressPools"),
            (&configuration.nat_rules, &nat_rules, &mut by_nat, "loadBalancerInboundNatRules"),
        ];
        for (references, ids, found, property) in lists {
            for reference in references {
                if let Some(part) = ids.find(&reference.id) {
                    found.entry(part).or_default().push(at);
                    continue;
                }
                let why = format!("{} is not in the input", reference.id.title());
                let action = "import the load balancer too";
                let title = &configuration.named.title;
                report.add(Level::Warning, &reference.place, title, property, why, action);
            }
        }
    }
    let (mut first_pool, mut first_nat) = (0, 0);
    for balancer in &sources.balancers {
        let name = names.take(&balancer.named.name, "lb");
        renamed(&balancer.named, &name, report);
        let (frontend_ids, frontends, by_frontend) = frontends(plan, balancer, report);
        let joined = |at: usize| in_pool.get(&(first_pool + at)).cloned().unwrap_or_default();
        let (pool_ids, pools) = self::pools(balancer, joined, &members, report);
        let mut parts = Parts { frontend_ids, frontends: by_frontend, pool_ids, probe_ids: Index::default() };
        let mut built = draft::Balancer {
            name,
            frontends,
            pools,
            probes: Vec::new(),
            rules: Vec::new(),
            nat_rules: Vec::new(),
            outbound_rules: Vec::new(),
        };
        let leads_to = |at: usize| by_nat.get(&(first_nat + at)).cloned().unwrap_or_default();
        plan_inbound::plan(&mut built, balancer, &mut parts, &members, leads_to, &mut timeouts, report);
        plan_outbound::plan(&mut built, balancer, &parts, &mut served, &mut timeouts, report);
        first_pool += balancer.pools.len();
        first_nat += balancer.nat_rules.len();
        plan.draft.balancers.push(built);
    }
}

fn members(plan: &Plan, sources: &Sources) -> Members {
    let mut members = Members { ids: Index::default(), names: Vec::new() };
    let mut built: HashMap<&str, &draft::Interface> = HashMap::new();
    for interface in &plan.draft.interfaces {
        built.insert(&interface.source, interface);
    }
    for interface in &sources.interfaces {
        let own = built.get(interface.named.place.id().as_str()).copied();
        for configuration in &interface.configurations {
            members.ids.add(&configuration.named.id);
            let found = own.and_then(|own| {
                let found = own.configurations.iter().find(|c| c.source == configuration.named.place.id())?;
                let name = format!("{}/{}", own.name, found.name);
                Some(draft::Member { name, v6: found.address.is_ipv6() })
            });
            members.names.push(found);
        }
    }
    members
}

fn frontends(
    plan: &mut Plan,
    balancer: &Balancer,
    report: &mut Report,
) -> (Index, Vec<draft::Frontend>, Vec<Vec<usize>>) {
    let mut ids = Index::default();
    let mut names = Unique::default();
    let (mut frontends, mut by_frontend) = (Vec::new(), Vec::new());
    for frontend in &balancer.frontends {
        ids.add(&frontend.named.id);
        let mut own = Vec::new();
        let references = [(&frontend.public, "publicIPAddress"), (&frontend.prefix, "publicIPPrefix")];
        for (reference, property) in references {
            let Some(reference) = reference else { continue };
            for taken in plan.take_public(reference, &frontend.named.title, property, frontend.v6, report) {
                let name = names.take(&frontend.named.name, "frontend");
                if own.is_empty() {
                    renamed(&frontend.named, &name, report);
                }
                own.push(frontends.len());
                frontends.push(match taken {
                    Taken::Address(at) => {
                        let public = &plan.draft.publics[at];
                        let v6 = public.address.is_ipv6();
                        draft::Frontend { name, public: public.name.clone(), prefix: false, v6, addresses: 1 }
                    }
                    Taken::Prefix(at) => {
                        let public = &plan.draft.prefixes[at];
                        let net = public.prefix;
                        let v6 = net.addr().is_ipv6();
                        let addresses = 1 << (net.max_prefix_len() - net.prefix_len());
                        draft::Frontend { name, public: public.name.clone(), prefix: true, v6, addresses }
                    }
                });
            }
        }
        by_frontend.push(own);
    }
    (ids, frontends, by_frontend)
}

fn pools(
    balancer: &Balancer,
    joined: impl Fn(usize) -> Vec<usize>,
    members: &Members,
    report: &mut Report,
) -> (Index, Vec<draft::Pool>) {
    let mut ids = Index::default();
    let mut names = Unique::default();
    let mut pools = Vec::new();
    for (at, pool) in balancer.pools.iter().enumerate() {
        let named = &pool.named;
        ids.add(&named.id);
        let name = names.take(&named.name, "pool");
        renamed(named, &name, report);
        let mut all = joined(at);
        for reference in &pool.members {
            match members.ids.find(&reference.id) {
                Some(member) => all.push(member),
                None => {
                    let why = format!("{} is not in the input", reference.id.title());
                    let action = "import the interface too";
                    let property = "backendIPConfigurations";
                    report.add(Level::Warning, &reference.place, &named.title, property, why, action);
                }
            }
        }
        let mut seen = HashSet::new();
        all.retain(|member| seen.insert(*member));
        let mut list = Vec::new();
        for member in all {
            match &members.names[member] {
                Some(member) => list.push(member.clone()),
                None => {
                    let why = "a member was not carried over";
                    let action = "add it by hand";
                    let property = "backendIPConfigurations";
                    report.add(Level::Warning, &named.place, &named.title, property, why, action);
                }
            }
        }
        pools.push(draft::Pool { name, members: list });
    }
    (ids, pools)
}
