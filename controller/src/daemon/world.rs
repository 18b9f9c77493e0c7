//! Where the world is: the kernel's routes and neighbours, mirrored into the datapath.
//!
//! Each router has a next hop of its own, `world:eth0/192.0.2.1`, and each uplink one for everything that is its own
//! next hop, `world:eth0/onlink`. The latter is never resolved: TC hands such packets to `bpf_redirect_neigh`, which
//! asks the kernel. Live flows refer to next hops by index, so one that no route uses any more is left there, without
//! a hardware address: its flows go where the kernel's routes say.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

use portcullis_common::clock::ticks;
use portcullis_common::layout::{HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_WORLD, NextHop};

use super::image::mtu;
use super::shared::{InForce, Shared};
use super::state::StateDir;
use crate::compile::{Ownership, Registry};
use crate::datapath::{Datapath, Route, now_tick};
use crate::hosts::{DeviceRole, Host, Neighbour, Routes};

/// Seconds for which XDP trusts a router's hardware address. With a dead daemon it then leaves the packets to TC.
const TRUST: u32 = 60;

/// The routing table has room for this many.
const MAX_ROUTES: usize = 65_536;

/// What was mirrored last.
#[derive(Debug, Default)]
pub struct World {
    /// Routers in use: (device, address).
    routers: BTreeSet<(u32, Ipv4Addr)>,
    /// Complained of already.
    too_many: bool,
}

/// What the kernel says.
pub struct View {
    routes: Routes,
    neighbours: HashMap<(u32, Ipv4Addr), Neighbour>,
    uplinks: Vec<Uplink>,
}

struct Uplink {
    ifindex: u32,
    name: String,
    xdp: bool,
    mac: [u8; 6],
    mtu: u32,
}

/// Asks the kernel about the uplinks of a policy.
pub async fn look(host: &Host, choices: &[crate::hosts::DeviceChoice]) -> anyhow::Result<View> {
    let links = host.links().await?;
    let uplinks: Vec<Uplink> = choices
        .iter()
        .filter(|choice| choice.role == DeviceRole::Uplink)
        .filter_map(|choice| {
            let link = links.by_index(choice.ifindex)?;
            Some(Uplink {
                ifindex: link.ifindex,
                name: choice.name.clone(),
                xdp: choice.xdp_redirect_ok,
                mac: link.mac,
                mtu: link.mtu,
            })
        })
        .collect();
    let indices: Vec<u32> = uplinks.iter().map(|uplink| uplink.ifindex).collect();
    let routes = host.routes(&indices).await?;
    let neighbours = host.neighbours().await?.into_iter();
    let neighbours =
        neighbours.filter(|n| indices.contains(&n.ifindex)).map(|n| ((n.ifindex, n.address), n)).collect();
    Ok(View { routes, neighbours, uplinks })
}

impl World {
    /// Is this neighbour one of the routers in use?
    pub fn uses(&self, neighbour: &Neighbour) -> bool {
        self.routers.contains(&(neighbour.ifindex, neighbour.address))
    }

    /// Routers whose hardware address wants asking for: unknown, or not confirmed for a while.
    pub fn doubtful(&self, view: &View) -> Vec<(u32, Ipv4Addr)> {
        let fresh =
            |router: &&(u32, Ipv4Addr)| view.neighbours.get(*router).is_some_and(|n| n.state.is_fresh());
        self.routers.iter().filter(|router| !fresh(router)).copied().collect()
    }

    /// Writes what differs. The registry may get new ids; they are on disk before the kernel sees them.
    pub fn mirror(
        &mut self,
        view: &View,
        datapath: &Datapath,
        registry: &mut Registry,
        ownership: &Ownership,
        state: &StateDir,
    ) -> anyhow::Result<()> {
        let before = registry.clone();
        let mut hops: BTreeMap<u16, NextHop> = BTreeMap::new();
        let mut routes: BTreeMap<(Ipv4Addr, u8), u32> = BTreeMap::new();
        self.routers.clear();
        for route in &view.routes.uplinks {
            let Some(uplink) = view.uplinks.iter().find(|uplink| uplink.ifindex == route.ifindex) else {
                continue;
            };
            let key = match route.gateway {
                Some(gateway) => format!("world:{}/{gateway}", uplink.name),
                None => format!("world:{}/onlink", uplink.name),
            };
            let index = registry.next_hop(&key)?;
            routes.insert((route.prefix.network(), route.prefix.prefix_len()), u32::from(index));
            if let Some(gateway) = route.gateway {
                self.routers.insert((uplink.ifindex, gateway));
            }
            hops.entry(index).or_insert_with(|| view.hop(uplink, route.gateway));
        }
        // Holes: what the kernel sends elsewhere or nowhere must not take a shorter route of an uplink.
        for hole in &view.routes.elsewhere {
            routes.insert((hole.prefix.network(), hole.prefix.prefix_len()), 0);
        }
        // Not by the registry, which forgets: live flows may refer to one that was given up long ago, and its device may
        // have been replaced since.
        for (index, hop) in datapath.next_hops()? {
            if hop.kind == HOP_WORLD && !hops.contains_key(&index) {
                let key = registry.next_hop_key(index).unwrap_or_default().to_owned();
                registry.release_next_hop(&key);
                hops.insert(index, view.abandoned(&key));
            }
        }
        if *registry != before {
            state.save(registry, ownership)?;
        }
        for (index, hop) in hops {
            if datapath.next_hop(index)? != hop {
                datapath.set_next_hop(index, &hop)?;
            }
        }
        self.write_routes(datapath, routes)
    }

    fn write_routes(
        &mut self,
        datapath: &Datapath,
        mut wanted: BTreeMap<(Ipv4Addr, u8), u32>,
    ) -> anyhow::Result<()> {
        if wanted.len() > MAX_ROUTES {
            if !std::mem::replace(&mut self.too_many, true) {
                log::warn!(
                    "this host has {} routes, the datapath has room for {MAX_ROUTES}: the longest prefixes are left out, \
                     and packets to them take the next shorter route",
                    wanted.len()
                );
            }
            let mut keys: Vec<_> = wanted.keys().copied().collect();
            keys.sort_by_key(|(_, length)| *length);
            for key in keys.split_off(MAX_ROUTES) {
                wanted.remove(&key);
            }
        }
        let mut stale = Vec::new();
        for route in datapath.routes()? {
            let key = (route.destination, route.prefix_length);
            match wanted.get(&key) {
                Some(next_hop) if *next_hop == route.next_hop => _ = wanted.remove(&key),
                Some(_) => {}
                None => stale.push(key),
            }
        }
        for ((destination, prefix_length), next_hop) in wanted {
            datapath.set_route(&Route { destination, prefix_length, next_hop })?;
        }
        for (destination, prefix_length) in stale {
            datapath.remove_route(destination, prefix_length)?;
        }
        Ok(())
    }
}

impl View {
    fn hop(&self, uplink: &Uplink, gateway: Option<Ipv4Addr>) -> NextHop {
        let neighbour = gateway.and_then(|gateway| self.neighbours.get(&(uplink.ifindex, gateway)));
        let mac = neighbour.filter(|n| n.state.is_valid()).and_then(|n| n.mac);
        let resolved = if mac.is_some() { HOP_FLAG_RESOLVED } else { 0 };
        NextHop {
            ifindex: uplink.ifindex,
            kind: HOP_WORLD,
            flags: resolved | if uplink.xdp { HOP_FLAG_XDP } else { 0 },
            mtu: mtu(uplink.mtu),
            mac: mac.unwrap_or_default(),
            source_mac: uplink.mac,
            // 0 would mean "for ever".
            fresh_until: if mac.is_some() { now_tick().wrapping_add(ticks(TRUST)).max(1) } else { 0 },
            address: gateway.map_or(0, |gateway| u32::from_ne_bytes(gateway.octets())),
            ..NextHop::default()
        }
    }

    /// What becomes of a next hop that no route uses: its device while that is an uplink, else the one of the default
    /// route, for flows that still refer to it; TC finds the way.
    fn abandoned(&self, key: &str) -> NextHop {
        let device = key.trim_start_matches("world:").rsplit_once('/').map_or("", |(device, _)| device);
        let default = self.routes.uplinks.iter().find(|route| route.prefix.prefix_len() == 0);
        let uplink = self.uplinks.iter().find(|uplink| uplink.name == device).or_else(|| {
            self.uplinks.iter().find(|uplink| default.is_some_and(|d| d.ifindex == uplink.ifindex))
        });
        uplink.map_or_else(NextHop::default, |uplink| self.hop(uplink, None))
    }
}

/// Mirrors for the policy in force.
pub async fn refresh(
    world: &mut World,
    host: &Host,
    shared: &Shared,
    ownership: &Ownership,
    state: &StateDir,
) -> anyhow::Result<()> {
    let in_force: std::sync::Arc<InForce> = shared.in_force();
    let view = look(host, &in_force.choices).await?;
    let mut registry = shared.registry().clone();
    let mirrored = tokio::task::block_in_place(|| {
        world.mirror(&view, &shared.datapath(), &mut registry, ownership, state)
    });
    // Also after an error: an id that is on disk must not be given to another.
    shared.set_registry(registry);
    mirrored?;
    for (ifindex, router) in world.doubtful(&view) {
        if let Err(error) = host.probe(ifindex, router).await {
            log::debug!("{error:#}");
        }
    }
    Ok(())
}
