//! Policy to tables: pure functions, no kernel in sight (design §3).
//!
//! [`compile`] takes a validated policy and a few facts of the host and answers everything `datapath` must write. What
//! must outlive one policy (numbers that flows refer to, ownership of ports) goes in and comes out as data, for the
//! caller to keep on disk.

mod addresses;
mod classifier;
pub mod contexts;
mod edge;
pub mod error;
pub mod facts;
mod groups;
mod host_policy;
mod image;
mod listeners;
pub mod lookup;
mod memory;
mod numbers;
mod outbound;
pub mod platform;
mod port_classes;
pub mod ports;
mod prefix;
pub mod registry;
pub mod rules;
mod ruleset;
mod settings;
mod sides;
mod slots;
mod spaces;
mod unit_tables;
mod workers;

use portcullis_common::layout::{Device, Settings};
use portcullis_common::policy::{EndpointKey, EndpointKey6, Page};

pub use contexts::{Context, tag_prefixes};
pub use edge::GuestHop;
pub use error::CompileError;
pub use facts::{DeviceFacts, HostFacts};
pub use groups::RulesetOf;
pub use listeners::{ListenerKind, ListenerOf};
pub use outbound::{AllocationOf, OutboundOf, Scenario};
pub use platform::platform_rules;
pub use ports::{LiveUnits, Ownership};
pub use prefix::{METADATA_ADDRESS, PLATFORM_ADDRESS};
pub use registry::Registry;
pub use rules::RuleInfo;
pub use settings::epoch;

use crate::policy::network::{Direction, Network};
use edge::Edge;
use groups::{Asked, Groups};
use image::{Records, TooLarge};
use numbers::RuleIds;
use spaces::Spaces;

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
    /// How each endpoint leaves.
    pub outbound: Vec<OutboundOf>,
    /// What each listener of the image is.
    pub listeners: Vec<ListenerOf>,
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

    let mut ids = registry.clone();
    let (groups, numbered) = std::thread::scope(|scope| {
        let groups = scope.spawn(|| Groups::prepare(network));
        let numbered = number(network, facts, &mut ids, ownership, generation);
        let groups = groups.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (groups, numbered)
    });
    let Numbered { rules, rule_ids, mut edge, ownership, settings, spaces } = numbered?;
    for ((asked, endpoint), (i, c)) in
        groups.endpoints.iter().zip(&mut edge.endpoints).zip(edge::guests(network))
    {
        endpoint.nic_outbound = asked.nic_outbound;
        endpoint.subnet_outbound = asked.subnet_outbound;
        endpoint.subnet_inbound = asked.subnet_inbound;
        endpoint.nic_inbound = asked.nic_inbound;
        endpoint.platform_outbound = asked.platform_outbound;
        endpoint.routing = spaces.of_subnet[network.interfaces[i].addresses[c].subnet];
    }
    let (image, first_bits) = classifier::compile(network, &groups, &rule_ids, memory::limit(network))?;
    let records = Records {
        ports: &groups.ports.of_port,
        endpoints: &edge.endpoints,
        units: &edge.units,
        segments: &edge.segments,
        listeners: &edge.listeners,
        slots: &edge.slots,
        frontends: &edge.frontends,
        owners: &edge.owners,
        flow_quota: [network.flow_table.max_flows_per_guest, network.flow_table.max_flows_per_guest_v6],
    };
    let image = image.finish(generation, &records).map_err(|TooLarge| {
        vec![CompileError::new("networkSecurityGroups", "the tables of all groups are too large together")]
    })?;
    let (mut prefixes, mut prefixes6) = (Vec::new(), Vec::new());
    for (prefix, class) in groups.addresses.prefixes {
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
        network: groups.contexts[asked.context].network,
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
        rulesets: groups.asked.iter().zip(first_bits).map(info).collect(),
        contexts: groups.contexts,
        members: edge.names,
        outbound: edge.outbound,
        listeners: edge.listeners_of,
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

/// What has numbers that outlive a policy.
struct Numbered<'a> {
    rules: Vec<RuleInfo>,
    rule_ids: RuleIds,
    edge: Edge<'a>,
    ownership: Ownership,
    settings: Settings,
    spaces: Spaces,
}

/// Numbers rules and networks, and lays out everything that does not depend on the groups.
fn number<'a>(
    network: &'a Network,
    facts: &'a HostFacts,
    ids: &mut Registry,
    ownership: &Ownership,
    generation: u32,
) -> Result<Numbered<'a>, Vec<CompileError>> {
    let mut errors = Vec::new();
    ids.begin(&numbers::wanted(network));
    let network_ids = numbers::network_ids(network, ids, &mut errors);
    let (rules, rule_ids) = numbers::number_rules(numbers::all_rules(network), ids, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }
    let mut edge = Edge::new(network, facts, network_ids);
    edge.guests(ids);
    edge.devices();
    edge.public_addresses();
    edge.host_addresses();
    let nat = edge.listeners(ids, ownership);
    let ownership = Ownership { nat, ..edge.outbound(ids, ownership) };
    let settings = settings::settings(network, ids, generation).map_err(|error| edge.errors.push(error));
    let (Ok(settings), true) = (settings, edge.errors.is_empty()) else { return Err(edge.errors) };
    let spaces = spaces::spaces(network, &edge.network_ids, |id, address| edge.guest_at(id, address));
    let spaces = spaces.map_err(|error| vec![error])?;
    Ok(Numbered { rules, rule_ids, edge, ownership, settings, spaces })
}
