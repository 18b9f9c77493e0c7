//! Where an address is, seen from a subnet: its virtual network's space, its peers', and its routes
//! ([`portcullis_common::policy`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use portcullis_common::layout::WORLD;
use portcullis_common::policy::{
    IN_APPLIANCE, IN_GATEWAY, IN_NETWORK, IN_NOWHERE, IN_PLATFORM, IN_WORLD, space_value,
};

use super::error::CompileError;
use super::prefix::Prefix;
use crate::policy::network::{Network, RouteHop};

/// Routing id, length, address and [`space_value`].
pub type Space<const BYTES: usize> = (u16, u8, [u8; BYTES], u32);

/// The entries of both families, and what each subnet is looked up under.
pub(super) struct Spaces {
    entries: BTreeMap<(u16, Prefix), u32>,
    /// Routing id of each subnet.
    pub of_subnet: Vec<u16>,
    pub warnings: Vec<CompileError>,
}

/// Builds the spaces. `ids` are the virtual networks' ids, `guest` answers the endpoint of an address in a virtual
/// network (by id).
pub(super) fn spaces(
    network: &Network,
    ids: &[u16],
    guest: impl Fn(u16, IpAddr) -> Option<u32>,
) -> Result<Spaces, CompileError> {
    let mut spaces = Spaces { entries: BTreeMap::new(), of_subnet: Vec::new(), warnings: Vec::new() };
    for (number, (space, &id)) in network.virtual_networks.iter().zip(ids).enumerate() {
        for prefix in &space.address_space {
            spaces.entries.insert((WORLD, prefix.into()), space_value(IN_NETWORK, WORLD.into()));
        }
        spaces.network(network, ids, number, id);
        spaces.platform(network, id);
    }

    let taken: HashSet<u16> = ids.iter().copied().collect();
    let mut free = (1..=u16::MAX).rev().filter(|id| !taken.contains(id));
    let mut of_table: HashMap<(usize, usize), u16> = HashMap::new();
    for subnet in &network.subnets {
        let Some(table) = subnet.route_table else {
            spaces.of_subnet.push(ids[subnet.network]);
            continue;
        };
        if let Some(&routing) = of_table.get(&(subnet.network, table)) {
            spaces.of_subnet.push(routing);
            continue;
        }
        let name = &network.route_tables[table].name;
        let routing = free.next().ok_or_else(|| {
            let message = "more than 65,535 virtual networks and route tables in them";
            CompileError::new(format!("routeTables/{name}"), message)
        })?;
        spaces.network(network, ids, subnet.network, routing);
        spaces.routes(network, ids, subnet.network, table, routing, &guest);
        spaces.platform(network, routing);
        of_table.insert((subnet.network, table), routing);
        spaces.of_subnet.push(routing);
    }
    Ok(spaces)
}

impl Spaces {
    /// The system's routes: the own space and those of the peers.
    fn network(&mut self, network: &Network, ids: &[u16], own: usize, routing: u16) {
        let peers = &network.virtual_networks[own].peers;
        for &number in peers.iter().chain([&own]) {
            for prefix in &network.virtual_networks[number].address_space {
                let value = space_value(IN_NETWORK, ids[number].into());
                self.entries.insert((routing, prefix.into()), value);
            }
        }
    }

    /// A table's routes, which take the place of the system's where the prefix is the same.
    fn routes(
        &mut self,
        network: &Network,
        ids: &[u16],
        own: usize,
        table: usize,
        routing: u16,
        guest: &impl Fn(u16, IpAddr) -> Option<u32>,
    ) {
        let table = &network.route_tables[table];
        for route in &table.routes {
            let value = match route.next_hop {
                RouteHop::VnetLocal => space_value(IN_NETWORK, ids[own].into()),
                RouteHop::Internet => space_value(IN_WORLD, 0),
                RouteHop::None => space_value(IN_NOWHERE, 0),
                RouteHop::VirtualNetworkGateway => space_value(IN_GATEWAY, 0),
                RouteHop::VirtualAppliance(address) => {
                    let peers = &network.virtual_networks[own].peers;
                    let mut networks = std::iter::once(&own).chain(peers);
                    match networks.find_map(|&number| guest(ids[number], address)) {
                        Some(endpoint) => space_value(IN_APPLIANCE, endpoint),
                        None => {
                            let message = format!(
                                "no ip configuration has {address} in {} or a network it is peered with; \
                                 what the route leads there is dropped",
                                network.virtual_networks[own].name
                            );
                            let place = format!("routeTables/{}/routes/{}", table.name, route.name);
                            self.warnings.push(CompileError::new(place, message));
                            space_value(IN_NOWHERE, 0)
                        }
                    }
                }
            };
            self.entries.insert((routing, (&route.prefix).into()), value);
        }
    }

    /// The platform's services, which no route leads away from.
    fn platform(&mut self, network: &Network, routing: u16) {
        for service in &network.platform.services {
            let address = Prefix::from(&IpNet::from(IpAddr::V4(service.address)));
            self.entries.insert((routing, address), space_value(IN_PLATFORM, 0));
        }
    }

    /// The tables of both families, each sorted by routing id, length and address.
    pub fn tables(&self) -> (Vec<Space<4>>, Vec<Space<16>>) {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (&(routing, prefix), &value) in &self.entries {
            v4.extend(prefix.parts4().map(|(len, address)| (routing, len, address, value)));
            v6.extend(prefix.parts6().map(|(len, address)| (routing, len, address, value)));
        }
        v4.sort_unstable();
        v6.sort_unstable();
        (v4, v6)
    }
}
