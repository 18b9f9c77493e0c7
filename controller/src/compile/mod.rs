//! Policy to tables: pure functions, no kernel in sight (design §3).
//!
//! [`compile`] takes a validated policy and a few facts of the host and answers everything `datapath` must write. What
//! must outlive one policy (numbers that flows refer to, ownership of ports) goes in and comes out as data, for the
//! caller to keep on disk.

mod addresses;
pub mod contexts;
mod edge;
pub mod error;
pub mod facts;
mod groups;
mod host_policy;
mod image;
pub mod lookup;
mod memory;
mod numbers;
pub mod platform;
mod port_classes;
pub mod ports;
mod prefix;
pub mod registry;
pub mod rules;
mod ruleset;
mod settings;
mod sides;
mod spaces;
mod workers;

use portcullis_common::layout::{Device, Settings};
use portcullis_common::policy::{EndpointKey, EndpointKey6, Page};

pub use contexts::{Context, tag_prefixes};
pub use edge::GuestHop;
pub use error::CompileError;
pub use facts::{DeviceFacts, HostFacts};
pub use groups::RulesetOf;
pub use platform::platform_rules;
pub use ports::Ownership;
pub use prefix::{METADATA_ADDRESS, PLATFORM_ADDRESS};
pub use registry::Registry;
pub use rules::RuleInfo;
pub use settings::epoch;

use crate::policy::network::{Direction, Network};
use contexts::Contexts;
use edge::Edge;
use groups::{Asked, Rulesets};
use image::{Records, TooLarge};

/// The tables of one generation.
#[derive(Debug, Clone)]
pub struct Compiled {
    pub generation: u32,
    /// The image; page 0 is the header.
    pub pages: Vec<Page>,
    /// Length, address and global address class, sorted by the first two. A miss is class 0.
    pub prefixes: Vec<(u8, [u8; 4], u32)>,
    /// The same for IPv6; classes have one numbering.
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
    /// All rules of all groups, asked by anybody or not, and those before the groups.
    pub rules: Vec<RuleInfo>,
    /// What each ruleset of the image is: ruleset `n` is element `n - 1`, number 0 being "no group".
    pub rulesets: Vec<RulesetInfo>,
    /// Where rulesets are seen from.
    pub contexts: Vec<Context>,
    /// Name of each endpoint of the image, `vm1/ipconfig1`.
    pub members: Vec<String>,
    /// Who owns which ports from now on.
    pub ownership: Ownership,
    /// Ranges for `net.ipv4.ip_local_reserved_ports`; empty unless an uplink has `reserve_host_ports`.
    pub reserved_ports: Vec<(u16, u16)>,
    /// What is in force but hardly meant so.
    pub warnings: Vec<CompileError>,
    /// Kernel memory of this generation's tables, about. While a policy is applied there are two generations.
    pub memory_bytes: usize,
}

/// A ruleset of the image, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulesetInfo {
    pub of: RulesetOf,
    pub direction: Direction,
    /// Index into the policy's virtual networks.
    pub network: usize,
    /// Index into [`Compiled::contexts`].
    pub context: usize,
    /// Bit of its first rule in its rows: rulesets with few rules share rows.
    pub first_bit: u32,
}

/// Compiles a policy.
///
/// `registry` and the result's `ownership` are new state for the caller to keep; on failure `registry` is as it was.
/// Only IPv4 has public addresses; those of IPv6 are passed over.
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

    let rules = numbers::all_rules(network);
    let mut ids = registry.clone();
    ids.begin(&numbers::wanted(network, &rules));
    let network_ids = numbers::network_ids(network, &mut ids, &mut errors);
    let (rules, rule_ids) = numbers::number_rules(rules, &mut ids, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }

    let mut edge = Edge::new(network, facts, &network_ids);
    edge.guests(&mut ids);
    edge.devices();
    edge.public_addresses();
    edge.host_addresses();
    let ownership = edge.outbound(&mut ids, ownership);
    let settings = settings::settings(network, &ids, generation).map_err(|error| edge.errors.push(error));
    let (Ok(settings), true) = (settings, edge.errors.is_empty()) else { return Err(edge.errors) };

    let spaces = spaces::spaces(network, &network_ids, |id, address| edge.guest_at(id, address));
    let spaces = spaces.map_err(|error| vec![error])?;
    let mut contexts = Contexts::new(network);
    let mut rulesets = Rulesets::default();
    for ((i, c), endpoint) in edge::guests(network).zip(&mut edge.endpoints) {
        let interface = &network.interfaces[i];
        let subnet = &network.subnets[interface.addresses[c].subnet];
        let context = contexts.of_subnet(interface.addresses[c].subnet);
        let mut of_group = |group, direction| rulesets.of_group(group, direction, context);
        endpoint.nic_outbound = of_group(interface.group, Direction::Outbound);
        endpoint.subnet_outbound = of_group(subnet.group, Direction::Outbound);
        endpoint.subnet_inbound = of_group(subnet.group, Direction::Inbound);
        endpoint.nic_inbound = of_group(interface.group, Direction::Inbound);
        let kms = platform::allows_kms(network, subnet);
        if kms || network.platform.block_smtp || !network.platform.services.is_empty() {
            let of = RulesetOf::Platform { kms };
            endpoint.platform_outbound =
                rulesets.number(Asked { of, direction: Direction::Outbound, context });
        }
        endpoint.routing = spaces.of_subnet[interface.addresses[c].subnet];
    }
    let limit = memory::limit(network);
    let classified = groups::compile(network, contexts, rulesets, &rule_ids, limit)?;
    let records = Records {
        ports: &classified.ports.of_port,
        endpoints: &edge.endpoints,
        units: &edge.units,
        frontends: &edge.frontends,
        owners: &edge.owners,
    };
    let image = classified.image.finish(generation, &records).map_err(|TooLarge| {
        vec![CompileError::new("networkSecurityGroups", "the tables of all groups are too large together")]
    })?;
    let (mut prefixes, mut prefixes6) = (Vec::new(), Vec::new());
    for (prefix, class) in classified.addresses.prefixes {
        prefixes.extend(prefix.parts4().map(|(len, address)| (len, address, class)));
        prefixes6.extend(prefix.parts6().map(|(len, address)| (len, address, class)));
    }
    prefixes.sort_unstable();
    prefixes6.sort_unstable();
    let (spaces4, spaces6) = spaces.tables();
    let (endpoints, endpoints6) = edge.entries();

    let info = |(asked, first_bit): (&Asked, u32)| RulesetInfo {
        of: asked.of,
        direction: asked.direction,
        network: classified.contexts[asked.context].network,
        context: asked.context,
        first_bit,
    };
    let mut compiled = Compiled {
        generation,
        memory_bytes: 0,
        prefixes,
        prefixes6,
        spaces: spaces4,
        spaces6,
        endpoints,
        endpoints6,
        devices: edge.devices,
        missing_devices: edge.missing_devices,
        guest_hops: edge.hops,
        settings,
        rules,
        rulesets: classified.asked.iter().zip(classified.first_bits).map(info).collect(),
        contexts: classified.contexts,
        members: edge.names,
        ownership,
        reserved_ports: edge.reserved_ports,
        warnings: spaces.warnings,
        pages: image.pages,
    };
    compiled.memory_bytes = memory::kernel_bytes(&compiled, image.bytes);
    memory::check(network, compiled.memory_bytes).map_err(|error| vec![error])?;
    *registry = ids;
    Ok(compiled)
}
