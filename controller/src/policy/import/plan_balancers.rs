//! Load balancers of the policy: frontends with addresses, pools with members, outbound rules that fit their ports.

use std::collections::{HashMap, HashSet};

use super::balancers::{Balancer, Rule};
use super::draft;
use super::names::{Id, Index, Unique};
use super::plan::{Plan, renamed};
use super::report::{Level, Report};
use super::sources::Sources;
use crate::policy::allocation::{MAX_POOL, PORTS_PER_ADDRESS, UNIT, default_ports};
use crate::policy::network::Allocation;

/// Different idle timeouts that one policy may have.
const MAX_TIMEOUTS: usize = 12;

/// The members that interfaces and pools name: pool ids to `interface/configuration`.
struct Members {
    /// Every ip configuration of the input.
    ids: Index,
    /// Its name in the policy; nothing if it was not carried over or is IPv6.
    names: Vec<Option<String>>,
    /// Who already has outbound ports.
    served: HashSet<String>,
}

/// All load balancers.
pub fn balancers(plan: &mut Plan, sources: &Sources, report: &mut Report) {
    let mut members = members(plan, sources);
    let mut names = Unique::default();
    let mut timeouts = HashSet::new();
    // Pools by id, so that interfaces can say that they are in one.
    let mut pools = Index::default();
    for pool in sources.balancers.iter().flat_map(|balancer| &balancer.pools) {
        pools.add(&pool.named.id);
    }
    let mut joined: HashMap<usize, Vec<usize>> = HashMap::new();
    let configurations = sources.interfaces.iter().flat_map(|interface| &interface.configurations);
    for (at, configuration) in configurations.enumerate() {
        for reference in &configuration.pools {
            match pools.find(&reference.id) {
                Some(pool) => joined.entry(pool).or_default().push(at),
                None => {
                    let why = format!("{} is not in the input", reference.id.title());
                    let property = "loadBalancerBackendAddressPools";
                    report.add(
                        Level::Warning,
                        &reference.place,
                        &configuration.named.title,
                        property,
                        why,
                        "import the load balancer too",
                    );
                }
            }
        }
    }
    let mut first_pool = 0;
    for balancer in &sources.balancers {
        let name = names.take(&balancer.named.name, "lb");
        renamed(&balancer.named, &name, report);
        let built = one(plan, balancer, name, first_pool, &joined, &mut members, &mut timeouts, report);
        first_pool += balancer.pools.len();
        plan.draft.balancers.push(built);
    }
}

fn members(plan: &Plan, sources: &Sources) -> Members {
    let mut members = Members { ids: Index::default(), names: Vec::new(), served: HashSet::new() };
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
                found.address.is_ipv4().then(|| format!("{}/{}", own.name, found.name))
            });
            members.names.push(found);
        }
    }
    members
}

fn one(
    plan: &mut Plan,
    balancer: &Balancer,
    name: String,
    first_pool: usize,
    joined: &HashMap<usize, Vec<usize>>,
    members: &mut Members,
    timeouts: &mut HashSet<u32>,
    report: &mut Report,
) -> draft::Balancer {
    let mut frontend_ids = Index::default();
    let mut frontend_names = Unique::default();
    // A frontend with a prefix becomes one for each address.
    let mut by_frontend: Vec<Vec<String>> = Vec::new();
    let mut frontends = Vec::new();
    for frontend in &balancer.frontends {
        frontend_ids.add(&frontend.named.id);
        let mut own = Vec::new();
        let references = [(&frontend.public, "publicIPAddress"), (&frontend.prefix, "publicIPPrefix")];
        for (reference, property) in references {
            let Some(reference) = reference else { continue };
            for public in plan.take_public(reference, &frontend.named.title, property, report) {
                let name = frontend_names.take(&frontend.named.name, "frontend");
                if own.is_empty() {
                    renamed(&frontend.named, &name, report);
                }
                frontends.push((name.clone(), plan.draft.publics[public].name.clone()));
                own.push(name);
            }
        }
        by_frontend.push(own);
    }
    let mut pool_ids = Index::default();
    let mut pool_names = Unique::default();
    let mut pools: Vec<(String, Vec<String>)> = Vec::new();
    for (at, pool) in balancer.pools.iter().enumerate() {
        pool_ids.add(&pool.named.id);
        let name = pool_names.take(&pool.named.name, "pool");
        renamed(&pool.named, &name, report);
        let mut all: Vec<usize> = joined.get(&(first_pool + at)).cloned().unwrap_or_default();
        for reference in &pool.members {
            match members.ids.find(&reference.id) {
                Some(member) => all.push(member),
                None => {
                    let why = format!("{} is not in the input", reference.id.title());
                    report.add(
                        Level::Warning,
                        &reference.place,
                        &pool.named.title,
                        "backendIPConfigurations",
                        why,
                        "import the interface too",
                    );
                }
            }
        }
        let mut seen = HashSet::new();
        all.retain(|member| seen.insert(*member));
        let mut list = Vec::new();
        for member in all {
            match &members.names[member] {
                Some(name) => list.push(name.clone()),
                None => {
                    let why = "a member is IPv6 or was not carried over";
                    report.add(
                        Level::Warning,
                        &pool.named.place,
                        &pool.named.title,
                        "backendIPConfigurations",
                        why,
                        "add it by hand",
                    );
                }
            }
        }
        pools.push((name, list));
    }
    let mut built = draft::Balancer { name, frontends, pools, outbound_rules: Vec::new() };
    let mut rule_names = Unique::default();
    let mut free = [HashMap::new(), HashMap::new()];
    for rule in &balancer.rules {
        let names: Vec<String> = rule
            .frontends
            .iter()
            .flat_map(|reference| match own(&frontend_ids, &reference.id, balancer.frontends.len()) {
                Some(at) => by_frontend[at].clone(),
                None => Vec::new(),
            })
            .collect();
        let mut seen = HashSet::new();
        let names: Vec<String> = names.into_iter().filter(|name| seen.insert(name.clone())).collect();
        let pool = rule.pool.as_ref().and_then(|pool| own(&pool_ids, &pool.id, balancer.pools.len()));
        match outbound(&mut built, rule, names, pool, members, &mut free, timeouts) {
            Ok((mut outbound, notes)) => {
                outbound.name = rule_names.take(&rule.named.name, "outbound");
                renamed(&rule.named, &outbound.name, report);
                for (level, property, why) in notes {
                    report.add(
                        level,
                        &rule.named.place,
                        &rule.named.title,
                        property,
                        why,
                        "see whether that is enough",
                    );
                }
                built.outbound_rules.push(outbound);
            }
            Err((property, why)) => {
                report.add(
                    Level::Warning,
                    &rule.named.place,
                    &rule.named.title,
                    property,
                    why,
                    "write the rule into the policy by hand",
                );
            }
        }
    }
    built
}

/// A part of this load balancer that one of its rules names. Where a template leaves the name open and there is one part
/// only, it is that one: rules cannot name parts of others.
fn own(ids: &Index, id: &Id, count: usize) -> Option<usize> {
    let open = id.name().is_empty() || id.name().contains('[');
    ids.find(id).or_else(|| (open && count == 1).then_some(0))
}

type Notes = Vec<(Level, &'static str, String)>;

/// An outbound rule that fits; or which property of it does not, and why.
fn outbound(
    balancer: &mut draft::Balancer,
    rule: &Rule,
    frontends: Vec<String>,
    pool: Option<usize>,
    members: &mut Members,
    free: &mut [HashMap<String, u32>; 2],
    timeouts: &mut HashSet<u32>,
) -> Result<(draft::OutboundRule, Notes), (&'static str, String)> {
    if frontends.is_empty() {
        return Err(("frontendIPConfigurations", "none of its frontends was carried over".to_owned()));
    }
    let Some(pool) = pool else {
        return Err(("backendAddressPool", "its pool is not in the input".to_owned()));
    };
    let mut notes = Vec::new();
    let both = |a: &str, b: &str| a == b || a == "All" || b == "All";
    let (pool_name, list) = &mut balancer.pools[pool];
    let earlier: Vec<&draft::OutboundRule> =
        balancer.outbound_rules.iter().filter(|other| other.pool == *pool_name).collect();
    if earlier.iter().any(|other| both(other.protocol, rule.protocol)) {
        return Err((
            "backendAddressPool",
            format!("another rule gives pool `{pool_name}` ports for its protocol"),
        ));
    }
    if earlier.is_empty() {
        let before = list.len();
        list.retain(|member| !members.served.contains(member));
        if list.len() < before {
            let why = format!("{} members have outbound ports from another pool", before - list.len());
            notes.push((Level::Warning, "backendAddressPool", why));
        }
        members.served.extend(list.iter().cloned());
    }
    let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
    let which: &[usize] = match rule.protocol {
        "Tcp" => &[0],
        "Udp" => &[1],
        _ => &[0, 1],
    };
    let left = |at: usize, name: &String| free[at].get(name).copied().unwrap_or(PORTS_PER_ADDRESS);
    let have =
        which.iter().map(|at| frontends.iter().map(|name| left(*at, name)).sum::<u32>()).min().unwrap_or(0);
    let default = default_ports(list.len(), frontends.len(), Allocation::Min1024);
    let mut ports = rule.ports.filter(|ports| *ports > 0);
    let wanted = ports.or(default.filter(|_| list.len() <= MAX_POOL)).unwrap_or(u32::MAX);
    if count > 0 && u64::from(wanted) * u64::from(count) > u64::from(have) {
        let most = have / count / UNIT * UNIT;
        if most == 0 {
            return Err((
                "allocatedOutboundPorts",
                format!("its frontends have no ports left for {count} members"),
            ));
        }
        notes.push((
            Level::Warning,
            "allocatedOutboundPorts",
            format!("its frontends have {have} ports: {most} for each of {count} members"),
        ));
        ports = Some(most);
    }
    let each = ports.or(default).unwrap_or(0);
    for at in which {
        let mut need = each.saturating_mul(count);
        for name in &frontends {
            let entry = free[*at].entry(name.clone()).or_insert(PORTS_PER_ADDRESS);
            let taken = need.min(*entry);
            *entry -= taken;
            need -= taken;
        }
    }
    let mut idle_minutes = rule.idle_minutes;
    if let Some(minutes) = idle_minutes
        && !timeouts.contains(&minutes)
    {
        if timeouts.len() >= MAX_TIMEOUTS {
            notes.push((
                Level::Warning,
                "idleTimeoutInMinutes",
                format!("a policy has at most {MAX_TIMEOUTS} different timeouts: the default is used"),
            ));
            idle_minutes = None;
        } else {
            timeouts.insert(minutes);
        }
    }
    let pool = pool_name.clone();
    let name = String::new();
    Ok((draft::OutboundRule { name, frontends, pool, protocol: rule.protocol, ports, idle_minutes }, notes))
}
