//! Ways out under a shared public address: whose ports come from which rule.
//!
//! `reference/azure.md` §2.1: an outbound rule comes before a load balancing rule with SNAT, that before default outbound, for
//! each protocol. An instance-level public IP comes before all of them; the datapath looks for it first, and its guest
//! counts in its pool all the same.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use portcullis_common::policy::FRONTEND_HOST;

use super::edge::{DEFAULT_OUTBOUND, Edge, guests};
use super::ports::{self, Ground, Ownership, Pool, TCP, UDP, UnitSet};
use super::registry::Registry;
use crate::policy::network::{
    Allocation, Announce, FrontendUse, LoadBalancer, LoadBalancingRule, OutboundRule, TransportProtocol,
};

/// How one endpoint leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutboundOf {
    /// Its instance-level public IP, by which it leaves whatever else it has.
    pub instance: Option<IpAddr>,
    /// By `ALLOC_*`.
    pub allocations: [Option<AllocationOf>; 3],
}

/// Ports of one endpoint for one protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocationOf {
    pub scenario: Scenario,
    /// `loadBalancers/lb/outboundRules/out`, `loadBalancers/lb/loadBalancingRules/http` or `defaultOutbound`.
    pub place: String,
    /// In the order they are used.
    pub frontends: Vec<IpAddr>,
    /// That it may claim now.
    pub ports: u32,
    /// That it will have when nothing drains any more.
    pub entitled: u32,
    /// That it must not claim any more, but has flows on.
    pub draining: u32,
}

/// What gives a guest its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    OutboundRule,
    LoadBalancingRule,
    Default,
}

/// What the flows of a pool are like.
pub(super) struct Way {
    pub scenario: Scenario,
    pub idle_class: u8,
    pub tcp_reset: bool,
    pub frontend_use: FrontendUse,
}

/// The pools, and whose ports come from which.
#[derive(Default)]
pub(super) struct Pools {
    pub pools: Vec<Pool>,
    pub ways: Vec<Way>,
    /// (endpoint, [`TCP`] or [`UDP`]) -> pool.
    pub of: HashMap<(u32, u8), usize>,
    /// Endpoints that some rule of a load balancer stands for, with ports or without: no default outbound.
    linked: HashSet<u32>,
}

impl Edge<'_> {
    /// Hands out SNAT ports. After [`Edge::listeners`], whose ports are not for SNAT.
    pub fn outbound(&mut self, registry: &mut Registry, previous: &Ownership) -> Ownership {
        let mut pools = Pools::default();
        let network = self.network;
        for balancer in &network.load_balancers {
            for rule in &balancer.outbound_rules {
                self.outbound_rule(&mut pools, balancer, rule, registry);
            }
        }
        for balancer in &network.load_balancers {
            for pool in 0..balancer.pools.len() {
                for v6 in [false, true] {
                    self.balanced_pool(&mut pools, balancer, pool, v6, registry);
                }
            }
        }
        self.default_outbound(&mut pools, registry);

        let ground = Ground {
            addresses: self.eligible(),
            exists: self.names.iter().map(String::as_str).collect(),
            live: &self.facts.live,
            now: self.facts.now,
            drain_seconds: network.snat.drain_seconds,
        };
        let allocated = match ports::allocate(previous.clone(), &pools.pools, &ground) {
            Ok(allocated) => allocated,
            Err(errors) => {
                self.errors.extend(errors);
                return previous.clone();
            }
        };
        self.unit_tables(&pools, &allocated);
        if self.reserves() {
            self.reserved_ports = self.reserved(&allocated.ownership);
        }
        allocated.ownership
    }

    /// May the host's ports be reserved, so that an address of the host's has all its ports for SNAT?
    fn reserves(&self) -> bool {
        self.network.uplinks.iter().any(|uplink| uplink.reserve_host_ports)
    }

    /// Ports of the host's addresses that its own sockets must not take.
    fn reserved(&self, ownership: &Ownership) -> Vec<(u16, u16)> {
        let host = |address: &IpAddr| {
            let number = self.frontend_numbers[address] as usize;
            self.frontends[number].flags & FRONTEND_HOST != 0
        };
        let hosts = self.frontend_numbers.keys().filter(|address| host(address));
        let listening = self.listening.keys().filter(|(address, ..)| host(address));
        let owned = hosts.flat_map(|&address| ownership.port_ranges(address));
        ports::merge(owned.chain(listening.map(|&(_, port, _)| (port, port))).collect())
    }

    /// Units SNAT may use of each frontend, for TCP and UDP: not those where something listens.
    fn eligible(&self) -> BTreeMap<IpAddr, [UnitSet; 2]> {
        let shared: HashSet<IpAddr> = self
            .network
            .public_addresses
            .iter()
            .filter(|public| public.announce == Announce::Address && !self.reserves())
            .map(|public| public.address)
            .collect();
        let units = |address: &IpAddr| {
            if shared.contains(address) {
                UnitSet::beside_host(self.facts.ephemeral)
            } else {
                UnitSet::whole_address()
            }
        };
        let of = |address: &IpAddr| (*address, [units(address), units(address)]);
        let mut eligible: BTreeMap<_, _> = self.frontend_numbers.keys().map(of).collect();
        for &(address, protocol, first, last) in &self.listener_ports {
            if let Some(units) = eligible.get_mut(&address) {
                units[usize::from(protocol == UDP)].remove_ports(first, last);
            }
        }
        eligible
    }

    /// The addresses of a load balancer's frontends, each once, in order.
    fn addresses(&self, balancer: &LoadBalancer, frontends: impl Iterator<Item = usize>) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for public in frontends.flat_map(|frontend| &balancer.frontends[frontend].public_addresses) {
            let address = self.network.public_addresses[*public].address;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// The endpoints of a backend pool that are of a family, each once.
    pub fn members(&self, balancer: &LoadBalancer, pool: usize, v6: bool) -> Vec<u32> {
        let mut seen = HashSet::new();
        let members = balancer.pools[pool].members.iter().filter_map(|member| self.numbers.get(member));
        let of_family = members.copied().filter(|&n| (self.endpoints[n as usize].v6 != 0) == v6);
        of_family.filter(|&number| seen.insert(number)).collect()
    }

    /// The idle class of a rule's timeout; an error is noted and the timers of the policy taken.
    pub fn idle_class(&mut self, registry: &mut Registry, seconds: Option<u32>, place: &str) -> u8 {
        let class = seconds.map_or(Ok(0), |seconds| registry.idle_class(seconds));
        class.unwrap_or_else(|full| {
            self.error(place.into(), full.to_string());
            0
        })
    }

    fn outbound_rule(
        &mut self,
        pools: &mut Pools,
        balancer: &LoadBalancer,
        rule: &OutboundRule,
        registry: &mut Registry,
    ) {
        let place = format!("loadBalancers/{}/outboundRules/{}", balancer.name, rule.name);
        let frontends = self.addresses(balancer, rule.frontends.iter().copied());
        let Some(first) = frontends.first() else { return };
        let idle_class = self.idle_class(registry, rule.idle_timeout_seconds, &place);
        let number = pools.pools.len();
        let mut members = Vec::new();
        for endpoint in self.members(balancer, rule.pool, first.is_ipv6()) {
            pools.linked.insert(endpoint);
            let other = protocols(rule.protocol).iter().find_map(|&p| pools.of.get(&(endpoint, p)));
            if let Some(&other) = other {
                let (name, other) = (&self.names[endpoint as usize], &pools.pools[other].place);
                let message = format!(
                    "{name} is in the pool of {other} already; an address has one outbound rule for a protocol"
                );
                self.error(place.clone(), message);
                continue;
            }
            pools.of.extend(protocols(rule.protocol).iter().map(|&p| ((endpoint, p), number)));
            members.push(self.names[endpoint as usize].clone());
        }
        pools.pools.push(Pool {
            place,
            protocol: rule.protocol,
            frontends,
            members,
            allocated_outbound_ports: rule.allocated_outbound_ports,
            allocation: balancer.allocation,
        });
        pools.ways.push(Way {
            scenario: Scenario::OutboundRule,
            idle_class,
            tcp_reset: rule.tcp_reset,
            frontend_use: balancer.frontend_use,
        });
    }

    /// The ports that load balancing rules give their pool: for the protocols of the rules, under their frontends, where no
    /// outbound rule does. Neither a listener nor a healthy member is needed.
    fn balanced_pool(
        &mut self,
        pools: &mut Pools,
        balancer: &LoadBalancer,
        pool: usize,
        v6: bool,
        registry: &mut Registry,
    ) {
        let network = self.network;
        let of_family = |frontend: usize| {
            let publics = &balancer.frontends[frontend].public_addresses;
            publics.first().is_some_and(|&public| network.public_addresses[public].address.is_ipv6() == v6)
        };
        let rules: Vec<&LoadBalancingRule> =
            balancer.rules.iter().filter(|rule| rule.pool == pool && of_family(rule.frontend)).collect();
        if rules.is_empty() {
            return;
        }
        let endpoints = self.members(balancer, pool, v6);
        pools.linked.extend(&endpoints);
        for protocol in [TransportProtocol::Tcp, TransportProtocol::Udp] {
            let both = |other| other == TransportProtocol::All || other == protocol;
            let ruled = balancer
                .outbound_rules
                .iter()
                .any(|o| o.pool == pool && both(o.protocol) && o.frontends.iter().any(|&f| of_family(f)));
            let giving =
                rules.iter().copied().filter(|rule| both(rule.protocol) && !rule.disable_outbound_snat);
            let giving: Vec<&LoadBalancingRule> = giving.collect();
            let Some(first) = giving.first().filter(|_| !ruled) else { continue };
            let place = format!("loadBalancers/{}/loadBalancingRules/{}", balancer.name, first.name);
            let frontends = self.addresses(balancer, giving.iter().map(|rule| rule.frontend));
            let idle_class = self.idle_class(registry, first.idle_timeout_seconds, &place);
            let number = pools.pools.len();
            let mut members = Vec::new();
            for &endpoint in &endpoints {
                for &p in protocols(protocol) {
                    // Of several pools the first counts.
                    if pools.of.contains_key(&(endpoint, p)) {
                        continue;
                    }
                    pools.of.insert((endpoint, p), number);
                    members.push(self.names[endpoint as usize].clone());
                }
            }
            pools.pools.push(Pool {
                place,
                protocol,
                frontends,
                members,
                allocated_outbound_ports: 0,
                allocation: balancer.allocation,
            });
            pools.ways.push(Way {
                scenario: Scenario::LoadBalancingRule,
                idle_class,
                tcp_reset: first.tcp_reset,
                frontend_use: balancer.frontend_use,
            });
        }
    }

    /// The shared address, for who has no other way out, in subnets that allow it: one pool for each family.
    fn default_outbound(&mut self, pools: &mut Pools, registry: &mut Registry) {
        let network = self.network;
        let Some(default) = &network.default_outbound else { return };
        let idle_class = self.idle_class(registry, default.idle_timeout_seconds, DEFAULT_OUTBOUND);
        for &public in &default.public_addresses {
            let address = network.public_addresses[public].address;
            let number = pools.pools.len();
            let mut members = Vec::new();
            for (i, c) in guests(network) {
                let configuration = &network.interfaces[i].addresses[c];
                let Some(&endpoint) = self.numbers.get(&(i, c)) else { continue };
                if configuration.address.is_ipv6() != address.is_ipv6()
                    || !network.subnets[configuration.subnet].default_outbound
                    || self.instance(i, c).is_some()
                    || pools.linked.contains(&endpoint)
                {
                    continue;
                }
                pools.of.extend([TCP, UDP].map(|p| ((endpoint, p), number)));
                members.push(self.names[endpoint as usize].clone());
            }
            pools.pools.push(Pool {
                place: DEFAULT_OUTBOUND.into(),
                protocol: TransportProtocol::All,
                frontends: vec![address],
                members,
                allocated_outbound_ports: 0,
                allocation: Allocation::Min1024,
            });
            pools.ways.push(Way {
                scenario: Scenario::Default,
                idle_class,
                tcp_reset: false,
                frontend_use: FrontendUse::Sequential,
            });
        }
    }
}

/// A rule's protocols as ownership counts them.
pub(super) fn protocols(protocol: TransportProtocol) -> &'static [u8] {
    match protocol {
        TransportProtocol::Tcp => &[TCP],
        TransportProtocol::Udp => &[UDP],
        TransportProtocol::All => &[TCP, UDP],
    }
}
