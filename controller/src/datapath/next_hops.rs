//! Next hops and routes to the world: written by the controller between generations, because a gateway's hardware
//! address does not wait for a policy.

use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use aya::maps::lpm_trie::Key;
use portcullis_common::layout::{NEXT_HOP_SLOTS, NextHop};

use super::load::Datapath;

/// A route to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub destination: Ipv4Addr,
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
        self.tables.routes.update(&route.key()?, &route.next_hop, 0)
    }

    /// Removes the route of a prefix; whether there was one.
    pub fn remove_route(&self, destination: Ipv4Addr, prefix_length: u8) -> anyhow::Result<bool> {
        self.tables.routes.delete(&Route { destination, prefix_length, next_hop: 0 }.key()?)
    }

    /// All routes to the world.
    pub fn routes(&self) -> anyhow::Result<Vec<Route>> {
        let routes = self.tables.routes.entries::<Key<[u8; 4]>, u32>()?;
        let mut routes: Vec<Route> = routes
            .into_iter()
            .map(|(key, next_hop)| Route {
                destination: Ipv4Addr::from(key.data()),
                prefix_length: key.prefix_len() as u8,
                next_hop,
            })
            .collect();
        routes.sort_unstable();
        Ok(routes)
    }
}

impl Route {
    fn key(&self) -> anyhow::Result<Key<[u8; 4]>> {
        ensure!(self.prefix_length <= 32, "/{} is no IPv4 prefix", self.prefix_length);
        Ok(Key::new(u32::from(self.prefix_length), self.destination.octets()))
    }
}
