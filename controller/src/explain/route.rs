//! Where the datapath takes the destination to be, in words: the second thing it finds out of a packet, after the sender.

use std::net::IpAddr;

use ipnet::IpNet;
use portcullis_common::engine::{Context, NOBODY};
use portcullis_common::layout::WORLD;
use portcullis_common::policy::{
    AT_FRONTEND, AT_GUEST, AT_HOST, AT_INSTANCE, AT_PROXY, AT_UNUSED, IN_APPLIANCE, IN_GATEWAY, IN_NETWORK,
    IN_NOWHERE, IN_PLATFORM,
};

use super::arrival::arrival;
use super::ends::{Ends, Sender};
use crate::compile::{Registry, lookup};
use crate::daemon::InForce;
use crate::daemon::shared::Guest;
use crate::policy::network::{Network, Route, RouteTable};

/// The answer for this packet.
pub fn route(in_force: &InForce, registry: &Registry, ends: &Ends<'_>, context: &Context) -> String {
    match &ends.from {
        Sender::Guest(guest) => from_guest(in_force, registry, guest, ends, context),
        Sender::Host => match in_force.guest(context.to as usize) {
            Some(to) => format!("guest {} in {}", to.name, in_force.network_name(ends.network, registry)),
            None => "no guest".to_owned(),
        },
        Sender::World => public(in_force, ends),
    }
}

fn from_guest(
    in_force: &InForce,
    registry: &Registry,
    guest: &Guest<'_>,
    ends: &Ends<'_>,
    context: &Context,
) -> String {
    let network = &in_force.loaded.network;
    let space = lookup::space_value(&in_force.compiled, guest.endpoint.routing, ends.destination);
    let (kind, argument) = (space >> 24, space & 0xff_ffff);
    if kind == IN_PLATFORM {
        return "an address under which this host serves the platform's own services".to_owned();
    }
    let by = entry(network, guest, ends.destination).map_or_else(String::new, |(table, route)| {
        format!("route {}/{} ({}): ", table.name, route.name, route.prefix)
    });
    let place = match kind {
        IN_NETWORK => {
            let id = argument as u16;
            let name = in_force.network_name(id, registry);
            let at = lookup::endpoint_value(&in_force.compiled, id, ends.destination) >> 24 & !AT_PROXY;
            let who = match (at, in_force.guest(context.to as usize)) {
                (AT_GUEST, Some(to)) => format!("guest {}", to.name),
                (AT_HOST, _) => "this host's gateway address".to_owned(),
                _ => "an address that no guest has".to_owned(),
            };
            let peer = if id == ends.network { "" } else { "the peered " };
            format!("{who} in {peer}{name}")
        }
        IN_APPLIANCE => match in_force.guest(context.to as usize) {
            Some(to) => format!("through the appliance {}", to.name),
            None => "through an appliance".to_owned(),
        },
        IN_NOWHERE => "leads nowhere".to_owned(),
        IN_GATEWAY => "through a virtual network gateway, which there is not".to_owned(),
        _ if context.to == NOBODY
            && lookup::endpoint_value(&in_force.compiled, WORLD, ends.destination) != 0 =>
        {
            public(in_force, ends)
        }
        _ => "the world".to_owned(),
    };
    by + &place
}

/// What a public address is to the policy.
fn public(in_force: &InForce, ends: &Ends<'_>) -> String {
    let destination = ends.destination;
    let network = &in_force.loaded.network;
    let value = lookup::endpoint_value(&in_force.compiled, WORLD, destination);
    let name = |place: Option<String>| place.unwrap_or_else(|| "?".to_owned());
    match value >> 24 & !AT_PROXY {
        AT_INSTANCE => {
            let guest = in_force.guest((value & 0xff_ffff) as usize);
            format!("the public address of guest {}", name(guest.map(|guest| guest.name.to_owned())))
        }
        AT_FRONTEND => {
            let mut frontends = network.load_balancers.iter().flat_map(|balancer| {
                balancer.frontends.iter().map(move |frontend| (&balancer.name, frontend))
            });
            let found = frontends.find(|(_, frontend)| {
                let mut publics = frontend.public_addresses.iter();
                publics.any(|&i| network.public_addresses[i].address == destination)
            });
            let is_default = network.default_outbound.as_ref().is_some_and(|default| {
                default.public_addresses.iter().any(|&i| network.public_addresses[i].address == destination)
            });
            let listens = arrival(in_force, destination, ends.destination_port, ends.protocol);
            let listens = listens.and_then(|arrival| arrival.rule);
            let listens = listens.map_or_else(String::new, |rule| format!(", where {rule} listens"));
            if found.is_none() && is_default {
                return "the address of default outbound".to_owned();
            }
            format!(
                "load balancer frontend {}{listens}",
                name(found.map(|(balancer, frontend)| format!("{balancer}/{}", frontend.name)))
            )
        }
        AT_HOST => "an address of this host".to_owned(),
        AT_UNUSED => "a public address of the policy that nothing uses".to_owned(),
        _ => "no address of the policy".to_owned(),
    }
}

/// The entry of the subnet's route table that has the destination: the longest prefix, if none of the system's own routes
/// (the virtual network's space and its peers') is longer.
fn entry<'n>(
    network: &'n Network,
    guest: &Guest<'_>,
    destination: IpAddr,
) -> Option<(&'n RouteTable, &'n Route)> {
    let subnet = &network.subnets[network.interfaces[guest.place.0].addresses[guest.place.1].subnet];
    let table = &network.route_tables[subnet.route_table?];
    let has = |prefix: &IpNet| prefix.contains(&destination);
    let route = table.routes.iter().filter(|r| has(&r.prefix)).max_by_key(|r| r.prefix.prefix_len())?;
    let peers = network.virtual_networks[subnet.network].peers.iter().chain([&subnet.network]);
    let spaces = peers.flat_map(|&number| &network.virtual_networks[number].address_space);
    let system = spaces.filter(|space| has(space)).map(IpNet::prefix_len).max();
    system.is_none_or(|system| system <= route.prefix.prefix_len()).then_some((table, route))
}
