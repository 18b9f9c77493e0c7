//! Next hops and routes to the world: written by the controller between generations, because a gateway's hardware
//! address does not wait for a policy.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use aya::maps::lpm_trie::Key;
use portcullis_common::layout::{NEXT_HOP_SLOTS, NextHop};

use super::load::Datapath;

/// A route to the world, of either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub destination: IpAddr,
    pub prefix_length: u8,
    /// Index of the next hop.
    pub next_hop: u32,
}

impl Datapath {
    /// Every next hop in use, by index.
    pub fn next_hops(&self) -> anyhow::Result<Vec<(u16, NextHop)>> {
        let hops = self.tables.next_hops.entries::<u32, NextHop>()?;
        Ok(hops
            .into_iter()
            .filter(|(_, hop)| hop.kind != 0)
            .map(|(index, hop)| (index as u16, hop))
            .collect())
    }

    /// The next hop with this index; an empty one if it is not in use.
    pub fn next_hop(&self, index: u16) -> anyhow::Result<NextHop> {
        self.tables
            .next_hops
            .lookup(&u32::from(index))?
            .with_context(|| format!("there is no next hop {index}"))
    }

    /// Writes a next hop. Live flows that have this index use it from their next packet on. The kernel copies the
    /// element without a lock: a packet may see the old device with the new hardware address, once.
    pub fn set_next_hop(&self, index: u16, hop: &NextHop) -> anyhow::Result<()> {
        ensure!(
            index != 0 && u32::from(index) < NEXT_HOP_SLOTS,
            "next hop {index} is not between 1 and 4095"
        );
        self.tables.next_hops.update(&u32::from(index), hop, 0)
    }

    /// Sets the next hop towards a prefix of the world.
    pub fn set_route(&self, route: &Route) -> anyhow::Result<()> {
        route.check()?;
        let length = u32::from(route.prefix_length);
        match route.destination {
            IpAddr::V4(a) => self.tables.routes.update(&Key::new(length, a.octets()), &route.next_hop, 0),
            IpAddr::V6(a) => self.tables.routes6.update(&Key::new(length, a.octets()), &route.next_hop, 0),
        }
    }

    /// Removes the route of a prefix; whether there was one.
    pub fn remove_route(&self, destination: IpAddr, prefix_length: u8) -> anyhow::Result<bool> {
        Route { destination, prefix_length, next_hop: 0 }.check()?;
        let length = u32::from(prefix_length);
        match destination {
            IpAddr::V4(a) => self.tables.routes.delete(&Key::new(length, a.octets())),
            IpAddr::V6(a) => self.tables.routes6.delete(&Key::new(length, a.octets())),
        }
    }

    /// All routes to the world.
    pub fn routes(&self) -> anyhow::Result<Vec<Route>> {
        let route =
            |destination, length, next_hop| Route { destination, prefix_length: length as u8, next_hop };
        let of4 = self.tables.routes.entries::<Key<[u8; 4]>, u32>()?.into_iter();
        let of6 = self.tables.routes6.entries::<Key<[u8; 16]>, u32>()?.into_iter();
        let of4 = of4.map(|(key, hop)| route(IpAddr::from(key.data()), key.prefix_len(), hop));
        let mut routes: Vec<Route> =
            of4.chain(of6.map(|(key, hop)| route(IpAddr::from(key.data()), key.prefix_len(), hop))).collect();
        routes.sort_unstable();
        Ok(routes)
    }
}

impl Route {
    fn check(&self) -> anyhow::Result<()> {
        let (longest, family) = if self.destination.is_ipv4() { (32, "IPv4") } else { (128, "IPv6") };
        ensure!(self.prefix_length <= longest, "/{} is no {family} prefix", self.prefix_length);
        Ok(())
    }
}
