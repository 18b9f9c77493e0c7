//! Where the world is: the kernel's routes and neighbours, mirrored into the datapath.
//!
//! Each router has a next hop of its own, `world:eth0/192.0.2.1` or `world:eth0/fe80::1`, and each uplink one for
//! everything that is its own next hop, `world:eth0/onlink`, for both families. The latter is never resolved: TC hands such packets to `bpf_redirect_neigh`, which
//! asks the kernel. Live flows refer to next hops by index, so one that no route uses any more is left there, without
//! a hardware address: its flows go where the kernel's routes say.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};

use portcullis_common::clock::ticks;
use portcullis_common::layout::{HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_WORLD, NextHop, v4, v6};

use super::image::mtu;
use super::shared::{InForce, Shared};
use super::state::StateDir;
use crate::compile::{Ownership, Registry};
use crate::datapath::{Datapath, Route, now_tick};
use crate::hosts::{DeviceRole, Host, Neighbour, Routes, Solicited, jit_warnings};
use crate::policy::network::{Announce, Network};

/// Seconds for which XDP trusts a router's hardware address. With a dead daemon it then leaves the packets to TC.
const TRUST: u32 = 60;

/// The routing table of each family has room for this many.
const MAX_ROUTES: usize = 65_536;

/// What was mirrored last.
#[derive(Debug, Default)]
pub struct World {
    /// Routers in use: (device, address).
    routers: BTreeSet<(u32, IpAddr)>,
    /// So that questions for proxied IPv6 addresses arrive.
    solicited: Solicited,
    /// Complained of already.
    too_many: bool,
}

/// Next hops by prefix; 0 is a hole.
type Prefixes = BTreeMap<(IpAddr, u8), u32>;

/// What the datapath's tables should say of the world.
struct Mirror {
    hops: BTreeMap<u16, NextHop>,
    routes: Prefixes,
}

/// What the kernel says.
pub struct View {
    routes: Routes,
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
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
    pub fn doubtful(&self, view: &View) -> Vec<(u32, IpAddr)> {
        let fresh =
            |router: &&(u32, IpAddr)| view.neighbours.get(*router).is_some_and(|n| n.state.is_fresh());
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
        let Mirror { hops, routes } = self.picture(view, registry, &datapath.next_hops()?)?;
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

    /// What the tables should say. `known` are the next hops they have.
    fn picture(
        &mut self,
        view: &View,
        registry: &mut Registry,
        known: &[(u16, NextHop)],
    ) -> anyhow::Result<Mirror> {
        let mut hops: BTreeMap<u16, NextHop> = BTreeMap::new();
        let mut routes = Prefixes::new();
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
        for &(index, hop) in known {
            if hop.kind == HOP_WORLD && !hops.contains_key(&index) {
                let key = registry.next_hop_key(index).unwrap_or_default().to_owned();
                registry.release_next_hop(&key);
                hops.insert(index, view.abandoned(&key));
            }
        }
        Ok(Mirror { hops, routes })
    }

    fn write_routes(&mut self, datapath: &Datapath, mut wanted: Prefixes) -> anyhow::Result<()> {
        for v4 in [true, false] {
            let mut keys: Vec<_> = wanted.keys().filter(|(to, _)| to.is_ipv4() == v4).copied().collect();
            if keys.len() <= MAX_ROUTES {
                continue;
            }
            if !std::mem::replace(&mut self.too_many, true) {
                log::warn!(
                    "this host has {} routes of {}, the datapath has room for {MAX_ROUTES}: the longest prefixes are \
                     left out, and packets to them take the next shorter route",
                    keys.len(),
                    if v4 { "IPv4" } else { "IPv6" }
                );
            }
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
    fn hop(&self, uplink: &Uplink, gateway: Option<IpAddr>) -> NextHop {
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
            address: gateway.map_or(0, v4),
            address6: gateway.map_or([0; 4], v6),
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

/// The IPv6 addresses that the datapath answers neighbour solicitations for.
fn proxied(network: &Network) -> Vec<Ipv6Addr> {
    let proxied = network.public_addresses.iter().filter(|public| public.announce == Announce::Proxy);
    proxied
        .filter_map(|public| match public.address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        })
        .collect()
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
    shared.set_host_warnings([jit_warnings(), host.rule_warnings().await].concat());
    let view = look(host, &in_force.choices).await?;
    let mut registry = shared.registry().clone();
    let mirrored = tokio::task::block_in_place(|| {
        world.mirror(&view, &shared.datapath(), &mut registry, ownership, state)
    });
    // Also after an error: an id that is on disk must not be given to another.
    shared.set_registry(registry);
    mirrored?;
    let uplinks: Vec<u32> = view.uplinks.iter().map(|uplink| uplink.ifindex).collect();
    for error in world.solicited.listen(&proxied(&in_force.loaded.network), &uplinks) {
        log::warn!("{error:#}");
    }
    for (ifindex, router) in world.doubtful(&view) {
        if let Err(error) = host.probe(ifindex, router).await {
            log::debug!("{error:#}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::{Elsewhere, Resolution, Route};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn route(prefix: &str, gateway: Option<&str>) -> Route {
        let prefix = prefix.parse().unwrap();
        Route { prefix, ifindex: 7, gateway: gateway.map(ip), metric: 0, source: None }
    }

    fn neighbour(address: &str, state: Resolution, mac: Option<[u8; 6]>) -> ((u32, IpAddr), Neighbour) {
        let address = ip(address);
        ((7, address), Neighbour { ifindex: 7, address, mac, state })
    }

    fn view() -> View {
        let uplinks = vec![
            route("0.0.0.0/0", Some("192.0.2.1")),
            route("192.0.2.0/24", None),
            route("::/0", Some("fe80::1")),
            route("2001:db8::/64", None),
            route("2001:db8:5::/48", Some("fe80::5")),
        ];
        let elsewhere = vec![
            Elsewhere { prefix: "fd00:9::/32".parse().unwrap(), ifindex: Some(9) },
            Elsewhere { prefix: "2001:db8:66::/48".parse().unwrap(), ifindex: None },
        ];
        let neighbours = [
            neighbour("192.0.2.1", Resolution::Reachable, Some([2, 0, 0, 0, 0, 1])),
            neighbour("fe80::1", Resolution::Stale, Some([2, 0, 0, 0, 0, 6])),
            neighbour("fe80::5", Resolution::Incomplete, None),
        ];
        let uplink =
            Uplink { ifindex: 7, name: "eth0".into(), xdp: true, mac: [2, 0, 0, 0, 0, 9], mtu: 1500 };
        View {
            routes: Routes { uplinks, elsewhere },
            neighbours: neighbours.into_iter().collect(),
            uplinks: vec![uplink],
        }
    }

    #[test]
    fn both_families_are_mirrored_with_their_routers_and_their_holes() {
        let (mut world, mut registry) = (World::default(), Registry::default());
        let Mirror { hops, routes } = world.picture(&view(), &mut registry, &[]).unwrap();
        let by_key = |key: &str| {
            let at = hops.keys().find(|index| registry.next_hop_key(**index) == Some(key));
            *at.unwrap_or_else(|| panic!("no next hop {key}"))
        };
        let (router4, router6) = (by_key("world:eth0/192.0.2.1"), by_key("world:eth0/fe80::1"));
        let (onlink, silent) = (by_key("world:eth0/onlink"), by_key("world:eth0/fe80::5"));
        assert_eq!(hops.len(), 4, "what is on the link shares one next hop");

        let to = |prefix: &str, length: u8| routes.get(&(ip(prefix), length)).copied();
        assert_eq!((to("0.0.0.0", 0), to("::", 0)), (Some(router4.into()), Some(router6.into())));
        assert_eq!((to("192.0.2.0", 24), to("2001:db8::", 64)), (Some(onlink.into()), Some(onlink.into())));
        assert_eq!(to("2001:db8:5::", 48), Some(silent.into()));
        assert_eq!((to("fd00:9::", 32), to("2001:db8:66::", 48)), (Some(0), Some(0)), "holes");

        let hop = hops[&router6];
        assert_eq!((hop.kind, hop.ifindex, hop.mtu), (HOP_WORLD, 7, 1500));
        assert_eq!((hop.address, hop.address6), (0, v6(ip("fe80::1"))));
        assert_eq!((hop.mac, hop.source_mac), ([2, 0, 0, 0, 0, 6], [2, 0, 0, 0, 0, 9]));
        assert_eq!(hop.flags, HOP_FLAG_RESOLVED | HOP_FLAG_XDP);
        assert!(hop.fresh_until != 0, "a router's hardware address is trusted for a while only");
        let hop = hops[&silent];
        assert_eq!((hop.flags, hop.fresh_until), (HOP_FLAG_XDP, 0), "TC finds it out");
        assert_eq!((hops[&router4].address6, hops[&onlink].address6), ([0; 4], [0; 4]));
        // Stale is usable, and wants asking for like what is unknown.
        assert_eq!(world.doubtful(&view()), [(7, ip("fe80::1")), (7, ip("fe80::5"))]);
    }

    #[test]
    fn a_router_of_ipv6_that_is_gone_leaves_its_flows_to_the_kernel() {
        let (mut world, mut registry) = (World::default(), Registry::default());
        let known: Vec<(u16, NextHop)> =
            world.picture(&view(), &mut registry, &[]).unwrap().hops.into_iter().collect();
        let router = registry.next_hop("world:eth0/fe80::5").unwrap();
        let mut less = view();
        less.routes.uplinks.pop();
        let hop = world.picture(&less, &mut registry, &known).unwrap().hops[&router];
        assert_eq!((hop.kind, hop.ifindex, hop.flags, hop.address6), (HOP_WORLD, 7, HOP_FLAG_XDP, [0; 4]));
        assert!(!world.uses(&neighbour("fe80::5", Resolution::Reachable, Some([2; 6])).1));
    }
}
