//! Policy to tables: pure functions, no kernel in sight (design §3).
//!
//! [`compile`] takes a validated policy and a few facts of the host and answers everything `datapath` must write. What
//! must outlive one policy (numbers that flows refer to, ownership of ports) goes in and comes out as data, for the
//! caller to keep on disk.

mod addresses;
mod edge;
pub mod error;
pub mod facts;
mod groups;
mod host_policy;
mod image;
pub mod lookup;
mod port_classes;
pub mod ports;
pub mod registry;
pub mod rules;
mod ruleset;
mod settings;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use portcullis_common::layout::{Device, Settings, WORLD};
use portcullis_common::policy::{EndpointKey, EndpointKey6, IN_NETWORK, Page, space_value};

pub use addresses::PLATFORM_ADDRESS;
pub use edge::GuestHop;
pub use error::CompileError;
pub use facts::{DeviceFacts, HostFacts};
pub use ports::Ownership;
pub use registry::Registry;
pub use rules::RuleInfo;

use crate::policy::network::{Direction, Network};
use edge::Edge;
use groups::Rulesets;
use image::{Records, TooLarge};
use registry::Wanted;

/// What a prefix costs in the kernel's trie: a node of 64 bytes for it and at worst one where it branches off.
const TRIE_BYTES: usize = 2 * 64;

/// The tables of one generation.
#[derive(Debug, Clone)]
pub struct Compiled {
    pub generation: u32,
    /// The image; page 0 is the header.
    pub pages: Vec<Page>,
    /// Length, address and global address class, sorted by the first two. A miss is class 0.
    pub prefixes: Vec<(u8, [u8; 4], u32)>,
    pub prefixes6: Vec<(u8, [u8; 16], u32)>,
    /// Routing id, length, address and [`portcullis_common::policy::space_value`], sorted.
    pub spaces: Vec<(u16, u8, [u8; 4], u32)>,
    pub spaces6: Vec<(u16, u8, [u8; 16], u32)>,
    /// Entries of the endpoints map, by network and address.
    pub endpoints: Vec<(EndpointKey, u32)>,
    pub endpoints6: Vec<(EndpointKey6, u32)>,
    /// Devices that exist and get programs.
    pub devices: Vec<Device>,
    /// Devices the policy names that do not exist (yet).
    pub missing_devices: Vec<String>,
    /// A next hop for each guest address.
    pub guest_hops: Vec<GuestHop>,
    pub settings: Settings,
    /// All rules of all groups, asked by anybody or not.
    pub rules: Vec<RuleInfo>,
    /// What each ruleset of the image is: ruleset `n` is element `n - 1`, number 0 being "no group".
    pub rulesets: Vec<RulesetInfo>,
    /// Name of each endpoint of the image, `vm1/ipconfig1`.
    pub members: Vec<String>,
    /// Who owns which ports from now on.
    pub ownership: Ownership,
    /// Ranges for `net.ipv4.ip_local_reserved_ports`; empty unless an uplink has `reserve_host_ports`.
    pub reserved_ports: Vec<(u16, u16)>,
    /// Kernel memory of the image and the prefixes, about.
    pub memory_bytes: usize,
}

/// A ruleset of the image, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulesetInfo {
    /// Index into the policy's groups.
    pub group: usize,
    pub direction: Direction,
    /// Index into the policy's virtual networks.
    pub network: usize,
    /// Bit of its first rule in its rows: rulesets with few rules share rows.
    pub first_bit: u32,
}

/// Compiles a policy.
///
/// `registry` and the result's `ownership` are new state for the caller to keep; on failure `registry` is as it was.
/// Only IPv4 is compiled; IPv6 addresses and prefixes are passed over.
pub fn compile(
    network: &Network,
    facts: &HostFacts,
    registry: &mut Registry,
    ownership: &Ownership,
    generation: u32,
) -> Result<Compiled, Vec<CompileError>> {
    let mut errors = Vec::new();
    groups::check_size(network, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }

    let (rules, keys) = rule_infos(network);
    let mut ids = registry.clone();
    ids.begin(&wanted(network, &keys));
    let network_ids = network_ids(network, &mut ids, &mut errors);
    let (rules, rule_ids) = number_rules(rules, &keys, &mut ids, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }

    let mut edge = Edge::new(network, facts, &network_ids);
    edge.guests(&mut ids);
    edge.devices();
    edge.public_addresses();
    edge.host_addresses();
    let ownership = edge.outbound(&mut ids, ownership);
    let settings = settings::settings(network, &ids).map_err(|error| edge.errors.push(error));
    let (Ok(settings), true) = (settings, edge.errors.is_empty()) else { return Err(edge.errors) };

    let mut rulesets = Rulesets::default();
    for ((i, c, _), endpoint) in edge::guests(network).zip(&mut edge.endpoints) {
        let interface = &network.interfaces[i];
        let subnet = &network.subnets[interface.addresses[c].subnet];
        let mut number = |group, direction| rulesets.number(group, direction, subnet.network);
        endpoint.nic_outbound = number(interface.group, Direction::Outbound);
        endpoint.subnet_outbound = number(subnet.group, Direction::Outbound);
        endpoint.subnet_inbound = number(subnet.group, Direction::Inbound);
        endpoint.nic_inbound = number(interface.group, Direction::Inbound);
    }
    let classified = groups::compile(network, &rulesets, &rule_ids)?;
    let records = Records {
        ports: &classified.ports.of_port,
        endpoints: &edge.endpoints,
        units: &edge.units,
        frontends: &edge.frontends,
        owners: &edge.owners,
    };
    let pages = classified.image.finish(generation, &records).map_err(|TooLarge| {
        vec![CompileError::new("networkSecurityGroups", "the tables of all groups are too large together")]
    })?;
    let prefixes = classified.addresses.prefixes.iter().map(|&(prefix, class)| {
        let (len, address) = addresses::parts(prefix);
        (len, address, class)
    });
    let prefixes: Vec<_> = prefixes.collect();

    *registry = ids;
    Ok(Compiled {
        generation,
        memory_bytes: size_of_val(&*pages) + prefixes.len() * TRIE_BYTES,
        pages,
        prefixes,
        prefixes6: Vec::new(),
        spaces6: Vec::new(),
        endpoints6: Vec::new(),
        spaces: spaces(network, &network_ids),
        endpoints: edge.entries(),
        devices: edge.devices,
        missing_devices: edge.missing_devices,
        guest_hops: edge.hops,
        settings,
        rules,
        rulesets: rulesets
            .asked
            .iter()
            .zip(classified.first_bits)
            .map(|(a, first_bit)| RulesetInfo {
                group: a.group,
                direction: a.direction,
                network: a.network,
                first_bit,
            })
            .collect(),
        members: edge.names,
        ownership,
        reserved_ports: edge.reserved_ports,
    })
}

/// Every rule of every group without its id, and its key in the registry.
fn rule_infos(network: &Network) -> (Vec<(usize, RuleInfo)>, Vec<String>) {
    let mut infos = Vec::new();
    let mut keys = Vec::new();
    for (number, group) in network.groups.iter().enumerate() {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for rule in rules::in_order(group, direction) {
                let name = rules::display_name(rule);
                keys.push(rules::key(&group.name, direction, &name));
                let (priority, access) = (rule.priority, rule.access);
                let info = RuleInfo { id: 0, group: group.name.clone(), direction, name, priority, access };
                infos.push((number, info));
            }
        }
    }
    (infos, keys)
}

/// The names the registry must not give up.
fn wanted(network: &Network, rule_keys: &[String]) -> Wanted {
    let hops = edge::guests(network).map(|(i, c, _)| format!("guest:{}", edge::member_name(network, i, c)));
    let rules = network.load_balancers.iter().flat_map(|balancer| &balancer.outbound_rules);
    Wanted {
        next_hops: hops.collect(),
        rules: rule_keys.iter().cloned().collect(),
        networks: network.virtual_networks.iter().map(|v| v.name.clone()).collect(),
        idle: rules.filter_map(|rule| rule.idle_timeout_seconds).map(|seconds| seconds.to_string()).collect(),
    }
}

/// The network id of each virtual network. What the policy numbers them with holds within one policy only; flows
/// live longer.
fn network_ids(network: &Network, registry: &mut Registry, errors: &mut Vec<CompileError>) -> Vec<u16> {
    let mut ids = Vec::new();
    for space in &network.virtual_networks {
        match registry.network(&space.name, space.id) {
            Ok(id) => ids.push(id),
            Err(full) => {
                errors.push(CompileError::new(format!("virtualNetworks/{}", space.name), full.to_string()));
                return ids;
            }
        }
    }
    ids
}

/// Ids of a group's rules in one direction, in priority order.
type RuleIds = HashMap<(usize, Direction), Vec<u32>>;

fn number_rules(
    infos: Vec<(usize, RuleInfo)>,
    keys: &[String],
    registry: &mut Registry,
    errors: &mut Vec<CompileError>,
) -> (Vec<RuleInfo>, RuleIds) {
    let mut ids = RuleIds::new();
    let mut rules = Vec::with_capacity(infos.len());
    for ((group, mut info), key) in infos.into_iter().zip(keys) {
        match registry.rule(key) {
            Ok(id) => info.id = id,
            Err(full) => {
                errors.push(CompileError::new(
                    format!("networkSecurityGroups/{}", info.group),
                    full.to_string(),
                ));
                return (rules, ids);
            }
        }
        ids.entry((group, info.direction)).or_default().push(info.id);
        rules.push(info);
    }
    (rules, ids)
}

/// Each virtual network's address space under its id, and all of them under the world's.
fn spaces(network: &Network, ids: &[u16]) -> Vec<(u16, u8, [u8; 4], u32)> {
    let mut spaces = BTreeSet::new();
    for (space, &id) in network.virtual_networks.iter().zip(ids) {
        for net in space.address_space.iter() {
            if let IpAddr::V4(address) = net.network() {
                spaces.insert((id, net.prefix_len(), address.octets(), space_value(IN_NETWORK, id.into())));
                spaces.insert((
                    WORLD,
                    net.prefix_len(),
                    address.octets(),
                    space_value(IN_NETWORK, WORLD.into()),
                ));
            }
        }
    }
    spaces.into_iter().collect()
}
