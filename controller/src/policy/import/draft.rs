//! The policy to be written: names resolved, gaps filled. `yaml` writes it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::policy::network::{Access, Direction};

/// A policy to be. References are names of things in here.
#[derive(Debug, Default)]
pub struct Draft {
    pub reevaluate: bool,
    pub limits: Vec<(&'static str, usize)>,
    pub application_groups: Vec<String>,
    /// Azure's tag file, as the policy will name it.
    pub tag_file: Option<String>,
    pub tags: Vec<Tag>,
    pub route_tables: Vec<RouteTable>,
    pub networks: Vec<Network>,
    pub interfaces: Vec<Interface>,
    pub groups: Vec<Group>,
    pub publics: Vec<Public>,
    pub prefixes: Vec<PublicPrefix>,
    /// The public address of guests that have no other way out.
    pub default_outbound: Option<String>,
    pub balancers: Vec<Balancer>,
    pub uplink: Option<String>,
}

#[derive(Debug)]
pub struct Tag {
    pub name: String,
    pub prefixes: Vec<IpNet>,
}

#[derive(Debug)]
pub struct RouteTable {
    pub name: String,
    pub routes: Vec<Route>,
}

#[derive(Debug)]
pub struct Route {
    pub name: String,
    pub prefix: IpNet,
    pub hop: &'static str,
    pub address: Option<IpAddr>,
}

#[derive(Debug)]
pub struct Network {
    pub name: String,
    pub space: Vec<IpNet>,
    /// Name and the other network.
    pub peerings: Vec<(String, String)>,
    pub subnets: Vec<Subnet>,
    /// A YAML comment: what was made up.
    pub comment: Option<String>,
}

#[derive(Debug)]
pub struct Subnet {
    pub name: String,
    pub prefixes: Vec<IpNet>,
    pub group: Option<String>,
    pub route_table: Option<String>,
    pub default_outbound: bool,
    pub comment: Option<String>,
}

#[derive(Debug)]
pub struct Interface {
    /// Which interface of the input this is: its file and path; empty for one that is made up.
    pub source: String,
    pub name: String,
    pub device: String,
    pub mac: Option<String>,
    pub group: Option<String>,
    pub configurations: Vec<Configuration>,
    pub comment: Option<String>,
}

#[derive(Debug)]
pub struct Configuration {
    /// Which ip configuration of the input this is, as for the interface.
    pub source: String,
    pub name: String,
    /// `network/subnet`.
    pub subnet: String,
    pub address: IpAddr,
    pub public: Option<String>,
    pub application_groups: Vec<String>,
    pub comment: Option<String>,
}

#[derive(Debug)]
pub struct Group {
    pub name: String,
    pub rules: Vec<Rule>,
    pub comment: Option<String>,
}

/// A rule as the policy takes it: one family and at most one tag on each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub name: String,
    pub description: String,
    pub priority: u32,
    pub direction: Direction,
    pub access: Access,
    pub protocol: &'static str,
    pub source: Side,
    pub destination: Side,
    pub source_ports: Vec<(u16, u16)>,
    pub destination_ports: Vec<(u16, u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// `*`, prefixes and tags as they are written.
    Addresses(Vec<String>),
    Groups(Vec<String>),
}

#[derive(Debug)]
pub struct Public {
    pub name: String,
    pub address: IpAddr,
    pub comment: Option<String>,
}

#[derive(Debug)]
pub struct PublicPrefix {
    pub name: String,
    pub prefix: IpNet,
}

/// Rules refer to the other parts by their positions.
#[derive(Debug)]
pub struct Balancer {
    pub name: String,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<Pool>,
    pub probes: Vec<Probe>,
    pub rules: Vec<BalancingRule>,
    pub nat_rules: Vec<NatRule>,
    pub outbound_rules: Vec<OutboundRule>,
}

#[derive(Debug)]
pub struct Frontend {
    pub name: String,
    /// Name of a public address, or of a prefix.
    pub public: String,
    pub prefix: bool,
    pub v6: bool,
    pub addresses: u32,
}

#[derive(Debug)]
pub struct Pool {
    pub name: String,
    pub members: Vec<Member>,
}

/// `interface/configuration`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    pub name: String,
    pub v6: bool,
}

impl Pool {
    /// How many members of a family it has.
    pub fn count(&self, v6: bool) -> usize {
        self.members.iter().filter(|member| member.v6 == v6).count()
    }
}

#[derive(Debug)]
pub struct Probe {
    pub name: String,
    /// Path of HTTP; nothing of Tcp.
    pub path: Option<String>,
    pub port: u16,
    pub interval: Option<u32>,
    pub threshold: Option<u32>,
}

#[derive(Debug)]
pub struct BalancingRule {
    /// Which rule of the load balancer in the input this is.
    pub source: usize,
    pub name: String,
    pub frontend: usize,
    pub pool: usize,
    pub probe: Option<usize>,
    pub protocol: &'static str,
    pub frontend_port: u16,
    pub backend_port: u16,
    pub distribution: Option<&'static str>,
    pub flow: Flow,
    pub disable_outbound_snat: bool,
}

/// What rules for flows from the world have in common.
#[derive(Debug)]
pub struct Flow {
    pub idle_minutes: Option<u32>,
    pub tcp_reset: bool,
    pub floating_ip: bool,
}

#[derive(Debug)]
pub struct NatRule {
    pub name: String,
    pub frontend: usize,
    pub protocol: &'static str,
    pub backend_port: u16,
    pub flow: Flow,
    pub target: NatTarget,
}

#[derive(Debug)]
pub enum NatTarget {
    Single { port: u16, member: Member },
    Range { first: u16, last: u16, pool: usize },
}

#[derive(Debug)]
pub struct OutboundRule {
    pub name: String,
    pub frontends: Vec<usize>,
    pub pool: usize,
    pub protocol: &'static str,
    pub ports: Option<u32>,
    pub idle_minutes: Option<u32>,
    pub tcp_reset: bool,
}
