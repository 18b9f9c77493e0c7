//! A group's rules of one direction, as sets of packets in one subnet.

use std::collections::BTreeSet;

use crate::answers::addresses::AddressSet;
use crate::answers::expand::PLATFORM;
use crate::answers::expand::Terms;
use crate::answers::regions::{ANY_PORT, Protocols, Region, Space};
use crate::answers::trace::Packet;
use crate::compile::rules::in_order;
use crate::policy::network::{Direction, Network, SecurityRule, ServiceTag};

/// Ports by which machines are administered, or that give away what is behind them, and that nobody means to open to
/// the whole Internet: FTP, SSH, Telnet, RPC, NetBIOS, LDAP, SMB, rlogin, MSSQL, Oracle, Docker, MySQL, RDP, PostgreSQL, VNC,
/// WinRM, Redis, Kubernetes, etcd, Elasticsearch, memcached, MongoDB.
pub const MANAGEMENT: [(u16, u16); 23] = [
    (20, 23),
    (111, 111),
    (135, 135),
    (137, 139),
    (389, 389),
    (445, 445),
    (512, 514),
    (873, 873),
    (1433, 1434),
    (1521, 1521),
    (2049, 2049),
    (2375, 2376),
    (2379, 2380),
    (3306, 3306),
    (3389, 3389),
    (5432, 5432),
    (5900, 5901),
    (5985, 5986),
    (6379, 6379),
    (6443, 6443),
    (9200, 9200),
    (11211, 11211),
    (27017, 27017),
];

/// Subnets whose tags mean something different each: one for every virtual network and route table where the group
/// stands. A group that stands nowhere is looked at in all.
pub fn contexts(network: &Network, group: usize) -> Vec<usize> {
    let of_subnets =
        (0..network.subnets.len()).filter(|&subnet| network.subnets[subnet].group == Some(group));
    let interfaces = network.interfaces.iter().filter(|interface| interface.group == Some(group));
    let of_interfaces = interfaces.flat_map(|interface| interface.addresses.iter().map(|c| c.subnet));
    let mut subnets: Vec<usize> = of_subnets.chain(of_interfaces).collect();
    if subnets.is_empty() {
        subnets = (0..network.subnets.len()).collect();
    }
    let mut seen = std::collections::HashSet::new();
    subnets.retain(|&subnet| {
        let subnet = &network.subnets[subnet];
        seen.insert((subnet.network, subnet.route_table))
    });
    subnets
}

/// What the group guards in the virtual network of this subnet: subnets' prefixes and interfaces' addresses. Empty for a
/// group that stands nowhere.
pub fn guarded(network: &Network, group: usize, subnet: usize) -> AddressSet {
    let same = |other: usize| {
        let (a, b) = (&network.subnets[subnet], &network.subnets[other]);
        (a.network, a.route_table) == (b.network, b.route_table)
    };
    let mut nets: Vec<ipnet::IpNet> = Vec::new();
    for (index, other) in network.subnets.iter().enumerate() {
        if other.group == Some(group) && same(index) {
            nets.extend(&other.prefixes);
        }
    }
    for interface in network.interfaces.iter().filter(|interface| interface.group == Some(group)) {
        let own = interface.addresses.iter().filter(|c| same(c.subnet));
        nets.extend(own.map(|c| ipnet::IpNet::from(c.address)));
    }
    AddressSet::from_prefixes(&nets)
}

/// Does the group guard this ip configuration (of an interface) there?
fn guards(
    network: &Network,
    group: usize,
    subnet: usize,
    (interface, configuration): (usize, usize),
) -> bool {
    let interface = &network.interfaces[interface];
    let configuration = &interface.addresses[configuration];
    let (here, there) = (&network.subnets[subnet], &network.subnets[configuration.subnet]);
    let same = (here.network, here.route_table) == (there.network, there.route_table);
    same && (interface.group == Some(group) || there.group == Some(group))
}

/// Addresses of load balancer pools' members that the group guards there.
fn pool_members(network: &Network, group: usize, subnet: usize) -> AddressSet {
    let members = network.load_balancers.iter().flat_map(|lb| &lb.pools).flat_map(|pool| &pool.members);
    let guarded = members.filter(|member| guards(network, group, subnet, **member));
    let addresses = guarded.map(|&(i, c)| ipnet::IpNet::from(network.interfaces[i].addresses[c].address));
    AddressSet::from_prefixes(&addresses.collect::<Vec<_>>())
}

/// The ports at which rules' probes ask members that the group guards there; any if no rule has a probe.
fn probed_ports(network: &Network, group: usize, subnet: usize) -> Vec<(u16, u16)> {
    let mut ports = BTreeSet::new();
    for balancer in &network.load_balancers {
        for rule in &balancer.rules {
            let Some(probe) = rule.probe else { continue };
            let mut members = balancer.pools[rule.pool].members.iter();
            if members.any(|member| guards(network, group, subnet, *member)) {
                ports.insert(balancer.probes[probe].port);
            }
        }
    }
    if ports.is_empty() { vec![ANY_PORT] } else { ports.into_iter().map(|port| (port, port)).collect() }
}

/// The rules of one direction in one subnet, and what is asked of them.
pub struct View<'n> {
    pub network: &'n Network,
    pub group: usize,
    pub subnet: usize,
    pub direction: Direction,
    /// In the order they are asked; the last three are the default rules.
    pub rules: Vec<&'n SecurityRule>,
    pub regions: Vec<Region>,
    pub space: Space,
    pub internet: AddressSet,
    /// Region: TCP and UDP from the Internet to any port for administration of what the group guards.
    pub management: usize,
    /// Region: TCP from 168.63.129.16 to pool members that the group guards; empty if there are none.
    pub probes: usize,
    /// The ports that these are probed at; any as long as no rule of their load balancers has a probe.
    pub probed: Vec<(u16, u16)>,
}

impl<'n> View<'n> {
    pub fn new(network: &'n Network, group: usize, direction: Direction, subnet: usize) -> Self {
        let mut terms = Terms::new(network, subnet);
        let rules = in_order(&network.groups[group], direction);
        let mut regions: Vec<Region> = rules.iter().map(|rule| Region::of_rule(rule, &mut terms)).collect();
        let internet = terms.tag(ServiceTag::Internet).as_ref().clone();
        let management = regions.len();
        regions.push(Region {
            protocols: Protocols::TCP.and(Protocols::UDP),
            source: internet.clone(),
            source_ports: vec![ANY_PORT],
            destination: match guarded(network, group, subnet) {
                nowhere if nowhere.is_empty() => AddressSet::everything(),
                guarded => guarded,
            },
            destination_ports: MANAGEMENT.to_vec(),
        });
        let probes = regions.len();
        let probed = probed_ports(network, group, subnet);
        regions.push(Region {
            protocols: Protocols::TCP,
            source: AddressSet::single(PLATFORM.into()),
            source_ports: vec![ANY_PORT],
            destination: pool_members(network, group, subnet),
            destination_ports: probed.clone(),
        });
        let space = Space::new(&regions);
        Self {
            network,
            group,
            subnet,
            direction,
            rules,
            regions,
            space,
            internet,
            management,
            probes,
            probed,
        }
    }

    /// The rules that somebody wrote, by place.
    pub fn own(&self) -> std::ops::Range<usize> {
        0..self.rules.len() - 3
    }

    /// A packet of the region that this rule is the first to match.
    pub fn takes(&self, rule: usize, region: usize) -> Option<Packet> {
        let before: Vec<usize> = (0..rule).collect();
        match self.space.covered(&[rule, region], &before) {
            crate::answers::regions::Cover::Left(packet) => Some(packet),
            _ => None,
        }
    }
}
