//! Backend pools and their members.

use std::collections::HashMap;
use std::net::IpAddr;

use super::allocation::of_family;
use super::diagnostics::Problems;
use super::fields::Fields;
use super::interfaces::Interfaces;
use super::names::{Names, nearest};
use super::network;
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// A pool as read.
pub struct Pool {
    name: Option<Text>,
    members: Vec<Text>,
}

/// Reads one of `backendAddressPools`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Pool> {
    let fields = Fields::open(node, &shape::BACKEND_POOL, problems)?;
    Some(Pool {
        name: fields.text("name", problems),
        members: fields.texts("backendIPConfigurations", problems),
    })
}

/// The pools of a load balancer by name.
pub struct Pools {
    names: Names,
    pub built: Vec<network::BackendPool>,
    pub places: Vec<Place>,
    /// For each pool its IPv4 and its IPv6 members.
    counts: Vec<[usize; 2]>,
}

/// Where a pool and its members stand.
pub struct Place {
    pub name: Span,
    pub members: Vec<Span>,
}

impl Pools {
    /// Finds the pool a rule means.
    pub fn find(&self, reference: &Text, problems: &mut Problems) -> Option<usize> {
        self.names.find(reference, "backendAddressPools", problems)
    }

    /// How many members of a family a pool has.
    pub fn count(&self, pool: usize, v6: bool) -> usize {
        self.counts[pool][usize::from(v6)]
    }

    /// Says that a rule serves nobody for want of members of its frontends' family.
    pub fn warn_no_family(&self, pool: &Text, index: usize, v6: bool, problems: &mut Problems) {
        if !self.built[index].members.is_empty() && self.count(index, v6) == 0 {
            let family = super::frontends::family(v6);
            problems
                .warning(pool.span, format!("pool `{}` has no {family} member for this rule", pool.value))
                .help(format!(
                    "its frontend is {family}: add members such as `vm1/NAME` with the name of an {family} ip configuration"
                ));
        }
    }
}

/// Builds the pools of load balancer `balancer`.
pub fn resolve(
    read: &[Pool],
    balancer: &str,
    interfaces: &Interfaces,
    register: &mut Register,
    problems: &mut Problems,
) -> Pools {
    let names = Names::new("backend pool of this load balancer");
    let mut pools = Pools { names, built: Vec::new(), places: Vec::new(), counts: Vec::new() };
    for (index, pool) in read.iter().enumerate() {
        let name = pool.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        let span = pool.name.as_ref().map(|name| name.span).unwrap_or_default();
        if let Some(text) = &pool.name {
            pools.names.declare(text, index, problems);
            register.add(&["loadBalancers", balancer, "backendAddressPools", &name], text.span);
        }
        let (members, spans) = resolve_members(&name, &pool.members, interfaces, problems);
        let count = |v6| of_family(&members, v6, |member| interfaces.address(member));
        pools.counts.push([false, true].map(count));
        pools.built.push(network::BackendPool { name, members });
        pools.places.push(Place { name: span, members: spans });
    }
    pools
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
pub fn resolve_member(
    text: &Text,
    interfaces: &Interfaces,
    problems: &mut Problems,
) -> Option<(usize, usize)> {
    let (name, configuration) = match text.value.split_once('/') {
        Some((name, configuration)) => (name, Some(configuration)),
        None => (text.value.as_str(), None),
    };
    let reference = At::new(name.to_owned(), text.span);
    let index = interfaces.names.find(&reference, "networkInterfaces", problems)?;
    let all = &interfaces.members[index].configurations;
    let choices =
        |of: &[usize]| of.iter().map(|at| format!("{name}/{}", all[*at].0)).collect::<Vec<_>>().join(" or ");
    let every: Vec<usize> = (0..all.len()).collect();
    if let Some(wanted) = configuration {
        let found = all.iter().position(|(own, _)| own.eq_ignore_ascii_case(wanted));
        if found.is_none() {
            let help = match nearest(wanted, all.iter().map(|(own, _)| own.as_str())) {
                Some(near) => format!("did you mean `{name}/{near}`?"),
                None => format!("write {}", choices(&every)),
            };
            problems.error(text.span, format!("`{name}` has no ip configuration `{wanted}`")).help(help);
        }
        return Some((index, found?));
    }
    let is_v6 = |address: &Option<IpAddr>| address.is_some_and(|address| address.is_ipv6());
    let v4: Vec<usize> = every.iter().copied().filter(|at| !is_v6(&all[*at].1)).collect();
    match v4.as_slice() {
        [only] => return Some((index, *only)),
        // An interface without ip configurations has been reported.
        [] if all.is_empty() => {}
        [] => {
            problems
                .error(text.span, format!("`{name}` has no IPv4 ip configuration"))
                .help(format!("write which of the others: {}", choices(&every)));
        }
        several => {
            problems
                .error(text.span, format!("`{name}` has {} IPv4 ip configurations", several.len()))
                .help(format!("write which: {}", choices(several)));
        }
    }
    None
}
