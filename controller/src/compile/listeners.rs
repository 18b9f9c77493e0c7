//! What listens at the frontends: load balancing rules and inbound NAT rules (`reference/azure.md` §3).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use portcullis_common::policy::{
    DISTRIBUTE_FLOW, DISTRIBUTE_SOURCE, DISTRIBUTE_SOURCE_PROTOCOL, LISTENER_FLOATING, LISTENER_RESET,
    Listener, PAGE_BYTES, Page,
};

use super::edge::Edge;
use super::lookup::Image;
use super::outbound::protocols;
use super::ports::{Ownership, TCP};
use super::registry::Registry;
use super::{Compiled, slots};
use crate::policy::network::{Distribution, InboundNatRule, LoadBalancer, LoadBalancingRule, NatTarget};

/// A listener of the image, for display and for probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerOf {
    /// `loadBalancers/lb/loadBalancingRules/http`
    pub place: String,
    pub kind: ListenerKind,
    pub frontend: IpAddr,
    pub port: u16,
    /// 6 or 17.
    pub protocol: u8,
    pub backend_port: u16,
    /// `lb/probes/alive`; `None`: its candidates are never taken out.
    pub probe: Option<String>,
    /// Name and endpoint of each member a flow may go to, healthy or not.
    pub candidates: Vec<(String, u32)>,
    /// First in the image's slots; rules for the same pool with the same probe share theirs.
    pub first_slot: u32,
    pub slots: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerKind {
    LoadBalancingRule,
    InboundNatRule,
}

/// Slots that rules share: of this balancer's pool, for this family, under this probe.
type SharedSlots = HashMap<(usize, usize, bool, Option<usize>), u32>;

/// The name a member has among those taken out.
fn down_name(probe: &str, member: &str) -> String {
    format!("{probe}/{member}")
}

impl Edge<'_> {
    /// Lays out all listeners. Answers which port of a NAT range each member has from now on.
    pub fn listeners(
        &mut self,
        registry: &mut Registry,
        previous: &Ownership,
    ) -> BTreeMap<String, BTreeMap<u16, String>> {
        let network = self.network;
        let mut shared = SharedSlots::new();
        let mut nat = BTreeMap::new();
        for (number, balancer) in network.load_balancers.iter().enumerate() {
            for rule in &balancer.rules {
                self.balancing_rule(balancer, number, rule, &mut shared, registry);
            }
            for rule in &balancer.nat_rules {
                self.nat_rule(balancer, rule, previous, &mut nat, registry);
            }
        }
        nat
    }

    /// The address of a frontend that something listens at.
    fn frontend_address(&self, balancer: &LoadBalancer, frontend: usize) -> Option<IpAddr> {
        let public = *balancer.frontends[frontend].public_addresses.first()?;
        Some(self.network.public_addresses[public].address)
    }

    fn balancing_rule(
        &mut self,
        balancer: &LoadBalancer,
        number: usize,
        rule: &LoadBalancingRule,
        shared: &mut SharedSlots,
        registry: &mut Registry,
    ) {
        let place = format!("loadBalancers/{}/loadBalancingRules/{}", balancer.name, rule.name);
        let Some(frontend) = self.frontend_address(balancer, rule.frontend) else { return };
        let v6 = frontend.is_ipv6();
        let probe =
            rule.probe.map(|probe| format!("{}/probes/{}", balancer.name, balancer.probes[probe].name));
        let members = self.members(balancer, rule.pool, v6);
        let candidates: Vec<(String, u32)> =
            members.into_iter().map(|endpoint| (self.names[endpoint as usize].clone(), endpoint)).collect();
        let slots = slots::count(candidates.len());
        let first_slot = *shared.entry((number, rule.pool, v6, rule.probe)).or_insert_with(|| {
            let first = self.slots.len() as u32;
            self.slots.extend(filled(slots, &candidates, probe.as_deref(), &self.facts.down));
            first
        });
        for &protocol in protocols(rule.protocol) {
            // Azure's timeout of a rule is for TCP that is not passed on as it is.
            let timeout = rule.idle_timeout_seconds.filter(|_| protocol == TCP && !rule.floating_ip);
            let listener = Listener {
                first_slot,
                mask: slots - 1,
                backend_port: rule.backend_port.to_be(),
                distribution: match rule.distribution {
                    Distribution::Default => DISTRIBUTE_FLOW,
                    Distribution::SourceIp => DISTRIBUTE_SOURCE,
                    Distribution::SourceIpProtocol => DISTRIBUTE_SOURCE_PROTOCOL,
                },
                flags: flags(protocol, rule.floating_ip, rule.tcp_reset),
                idle_class: self.idle_class(registry, timeout, &place),
                pad: [0; 3],
            };
            let of = ListenerOf {
                place: place.clone(),
                kind: ListenerKind::LoadBalancingRule,
                frontend,
                port: rule.frontend_port,
                protocol,
                backend_port: rule.backend_port,
                probe: probe.clone(),
                candidates: candidates.clone(),
                first_slot,
                slots,
            };
            self.listener_ports.push((frontend, protocol, rule.frontend_port, rule.frontend_port));
            self.listener(listener, of);
        }
    }

    fn nat_rule(
        &mut self,
        balancer: &LoadBalancer,
        rule: &InboundNatRule,
        previous: &Ownership,
        nat: &mut BTreeMap<String, BTreeMap<u16, String>>,
        registry: &mut Registry,
    ) {
        let place = format!("loadBalancers/{}/inboundNatRules/{}", balancer.name, rule.name);
        let Some(frontend) = self.frontend_address(balancer, rule.frontend) else { return };
        let (first, last, targets) = match rule.target {
            NatTarget::Single { frontend_port, member } => {
                let Some(&endpoint) = self.numbers.get(&member) else { return };
                (frontend_port, frontend_port, vec![(frontend_port, endpoint)])
            }
            NatTarget::Range { first, last, pool } => {
                let members = self.members(balancer, pool, frontend.is_ipv6());
                let names: Vec<(&str, u32)> = members
                    .iter()
                    .map(|&endpoint| (self.names[endpoint as usize].as_str(), endpoint))
                    .collect();
                let held = previous.nat.get(&place);
                let Some(ports) = range_ports(first, last, &names, held) else {
                    let message = format!(
                        "{} members, but the frontend ports {first}-{last} are only {}; widen the range",
                        names.len(),
                        u32::from(last) - u32::from(first) + 1
                    );
                    return self.error(place, message);
                };
                let name = |(&port, &endpoint): (&u16, &u32)| (port, self.names[endpoint as usize].clone());
                nat.insert(place.clone(), ports.iter().map(name).collect());
                (first, last, ports.into_iter().collect())
            }
        };
        for &protocol in protocols(rule.protocol) {
            self.listener_ports.push((frontend, protocol, first, last));
            let idle_class =
                self.idle_class(registry, rule.idle_timeout_seconds.filter(|_| !rule.floating_ip), &place);
            for &(port, endpoint) in &targets {
                let first_slot = self.slots.len() as u32;
                self.slots.push(endpoint as u16 + 1);
                let listener = Listener {
                    first_slot,
                    mask: 0,
                    backend_port: rule.backend_port.to_be(),
                    distribution: DISTRIBUTE_FLOW,
                    flags: flags(protocol, rule.floating_ip, rule.tcp_reset),
                    idle_class,
                    pad: [0; 3],
                };
                let of = ListenerOf {
                    place: place.clone(),
                    kind: ListenerKind::InboundNatRule,
                    frontend,
                    port,
                    protocol,
                    backend_port: rule.backend_port,
                    probe: None,
                    candidates: vec![(self.names[endpoint as usize].clone(), endpoint)],
                    first_slot,
                    slots: 1,
                };
                self.listener(listener, of);
            }
        }
    }

    fn listener(&mut self, listener: Listener, of: ListenerOf) {
        let number = self.listeners.len() as u32;
        let key = (of.frontend, of.port, of.protocol);
        if let Some(other) = self.listening.insert(key, number) {
            let protocol = if of.protocol == TCP { "TCP" } else { "UDP" };
            let other = &self.listeners_of[other as usize].place;
            let message =
                format!("{protocol} port {} of {} is taken by {other} already", of.port, of.frontend);
            return self.error(of.place, message);
        }
        self.listeners.push(listener);
        self.listeners_of.push(of);
    }
}

fn flags(protocol: u8, floating: bool, reset: bool) -> u8 {
    let floating = if floating { LISTENER_FLOATING } else { 0 };
    floating | if reset && protocol == TCP { LISTENER_RESET } else { 0 }
}

/// The slots of a listener while these members are down.
fn filled(
    count: u32,
    candidates: &[(String, u32)],
    probe: Option<&str>,
    down: &BTreeSet<String>,
) -> Vec<u16> {
    let up =
        |member: &str| down.is_empty() || probe.is_none_or(|probe| !down.contains(&down_name(probe, member)));
    let healthy = candidates.iter().filter(|(member, _)| up(member));
    slots::fill(count, healthy.map(|(member, endpoint)| (member.as_str(), *endpoint)))
}

/// A port of the range for each member: the one it had, else the lowest nobody has. `None` if there are too few.
fn range_ports(
    first: u16,
    last: u16,
    members: &[(&str, u32)],
    held: Option<&BTreeMap<u16, String>>,
) -> Option<BTreeMap<u16, u32>> {
    let by_name: HashMap<&str, u32> = members.iter().copied().collect();
    let mut ports = BTreeMap::new();
    let mut served = BTreeSet::new();
    for (&port, member) in held.into_iter().flatten() {
        if let Some(&endpoint) = by_name.get(member.as_str()).filter(|_| (first..=last).contains(&port))
            && served.insert(endpoint)
        {
            ports.insert(port, endpoint);
        }
    }
    let mut free = (first..=last).filter(|port| !ports.contains_key(port)).collect::<Vec<_>>().into_iter();
    for &(_, endpoint) in members.iter().filter(|(_, endpoint)| !served.contains(endpoint)) {
        ports.insert(free.next()?, endpoint);
    }
    Some(ports)
}

impl Compiled {
    /// The pages of the image that hold slots of listeners with a probe, as they are while these backends are down
    /// (`lb/probes/alive/vm1/ipconfig1`): to be written over those in force. Page number and contents, ascending.
    pub fn slot_pages(&self, down: &BTreeSet<String>) -> Vec<(u32, Page)> {
        let table = Image { pages: &self.pages }.header().slots;
        let mut pages: BTreeMap<u32, Page> = BTreeMap::new();
        let mut done = BTreeSet::new();
        for listener in self.listeners.iter().filter(|listener| listener.probe.is_some()) {
            if !done.insert(listener.first_slot) {
                continue;
            }
            let slots = filled(listener.slots, &listener.candidates, listener.probe.as_deref(), down);
            for (number, slot) in (listener.first_slot as usize..).zip(slots) {
                let page = table + (number * 2 / PAGE_BYTES) as u32;
                let page = pages.entry(page).or_insert_with(|| self.pages[page as usize]);
                let word = &mut page.words[number * 2 % PAGE_BYTES / 8];
                let mut bytes = word.to_ne_bytes();
                bytes[number % 4 * 2..][..2].copy_from_slice(&slot.to_ne_bytes());
                *word = u64::from_ne_bytes(bytes);
            }
        }
        pages.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_keeps_its_port_of_a_range_and_who_joins_gets_the_lowest_that_is_free() {
        let held: BTreeMap<u16, String> = [(2210, "a"), (2211, "b"), (2212, "c"), (2300, "d")]
            .map(|(port, member)| (port, member.to_owned()))
            .into();
        let ports =
            range_ports(2210, 2214, &[("new", 0), ("c", 1), ("a", 2), ("d", 3)], Some(&held)).unwrap();
        let expected = [(2210, 2), (2211, 0), (2212, 1), (2213, 3)];
        assert_eq!(ports, expected.into(), "b has left, d's port is not in the range any more");
        assert_eq!(range_ports(10, 11, &[("a", 0), ("b", 1)], None), Some([(10, 0), (11, 1)].into()));
        assert_eq!(range_ports(10, 11, &[("a", 0), ("b", 1), ("c", 2)], None), None);
    }
}
