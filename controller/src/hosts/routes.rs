//! Where the world is: the kernel's main table, as far as it leads out of the uplinks.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags,
    RouteType,
};

use super::Host;
use super::netlink::explained;

/// A prefix that leaves by an uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub prefix: Ipv4Net,
    pub ifindex: u32,
    /// The router to send to. `None` is *on-link*: every destination is its own next hop, which only TC
    /// (`bpf_redirect_neigh`) resolves. A router known by its IPv6 address only (RFC 5549) counts as on-link too,
    /// because the kernel's own look-up under TC finds it and a mirrored IPv4 neighbour cannot.
    pub gateway: Option<Ipv4Addr>,
    /// Lower wins; 0 when the kernel says nothing.
    pub metric: u32,
    /// The source address the kernel would prefer.
    pub source: Option<Ipv4Addr>,
}

/// A prefix whose best route does *not* leave by an uplink: another device, or nowhere (blackhole and its kin).
///
/// The datapath needs these as holes: a guest's packet to such a prefix must not take a shorter uplink route that
/// the kernel would not have taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    pub prefix: Ipv4Net,
    /// `None` for blackhole, unreachable, prohibit and throw.
    pub ifindex: Option<u32>,
}

/// The main table's IPv4 routes, one per prefix: the one with the lowest metric.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    pub uplinks: Vec<Route>,
    pub elsewhere: Vec<Elsewhere>,
}

impl Routes {
    /// Where the kernel would send `destination`: `Ok` by an uplink, `Err` elsewhere, `None` no route.
    pub fn lookup(&self, destination: Ipv4Addr) -> Option<Result<&Route, &Elsewhere>> {
        let out = self.uplinks.iter().filter(|route| route.prefix.contains(&destination));
        let away = self.elsewhere.iter().filter(|hole| hole.prefix.contains(&destination));
        let longest_out = out.max_by_key(|route| route.prefix.prefix_len());
        let longest_away = away.max_by_key(|hole| hole.prefix.prefix_len());
        match (longest_out, longest_away) {
            (Some(route), Some(hole)) if hole.prefix.prefix_len() > route.prefix.prefix_len() => {
                Some(Err(hole))
            }
            (Some(route), _) => Some(Ok(route)),
            (None, hole) => hole.map(Err),
        }
    }
}

impl Host {
    /// Reads the main table. `uplinks` are ifindices.
    ///
    /// Of a multipath route the live hop of greatest weight is taken (the first among equals), uplinks first: one
    /// next hop per prefix. Routes with a TOS and tables other than main are not looked at.
    pub async fn routes(&self, uplinks: &[u32]) -> Result<Routes> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let messages: Vec<RouteMessage> = self
            .handle()
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(explained)
            .context("cannot read this host's routes")?;
        Ok(best_routes(messages.iter().filter_map(|message| candidate_of(message, uplinks)), uplinks))
    }
}

/// One route of the table with the hop chosen from it.
#[derive(Debug, Clone)]
struct Candidate {
    prefix: Ipv4Net,
    metric: u32,
    ifindex: Option<u32>,
    gateway: Option<Ipv4Addr>,
    source: Option<Ipv4Addr>,
}

fn best_routes(candidates: impl Iterator<Item = Candidate>, uplinks: &[u32]) -> Routes {
    let mut best: BTreeMap<Ipv4Net, Candidate> = BTreeMap::new();
    for candidate in candidates {
        let worse = best.get(&candidate.prefix).is_some_and(|known| known.metric <= candidate.metric);
        if !worse {
            best.insert(candidate.prefix, candidate);
        }
    }
    let mut routes = Routes::default();
    for (prefix, route) in best {
        match route.ifindex {
            Some(ifindex) if uplinks.contains(&ifindex) => routes.uplinks.push(Route {
                prefix,
                ifindex,
                gateway: route.gateway,
                metric: route.metric,
                source: route.source,
            }),
            ifindex => routes.elsewhere.push(Elsewhere { prefix, ifindex }),
        }
    }
    routes
}

/// `None` for what the mirror does not look at: other tables, local and broadcast routes, dead ones.
fn candidate_of(message: &RouteMessage, uplinks: &[u32]) -> Option<Candidate> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut prefix = Ipv4Net::new(Ipv4Addr::UNSPECIFIED, 0).ok()?;
    let mut metric = 0;
    let mut source = None;
    let mut ifindex = None;
    let mut hops: &[RouteNextHop] = &[];
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                prefix = Ipv4Net::new(*address, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(*address),
            RouteAttribute::Oif(value) => ifindex = Some(*value),
            RouteAttribute::MultiPath(value) => hops = value,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN)
        || header.tos != 0
        || header.flags.intersects(RouteFlags::Cloned | RouteFlags::Dead)
    {
        return None;
    }
    let (ifindex, gateway) = match header.kind {
        RouteType::Unicast if hops.is_empty() => (ifindex, gateway_of(&message.attributes)),
        RouteType::Unicast => {
            let live = hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead));
            // Without a carrier a hop is the last choice, not dead: the kernel keeps using it by default.
            let rank = |hop: &&RouteNextHop| {
                let carrier = !hop.flags.contains(RouteNextHopFlags::Linkdown);
                (carrier, uplinks.contains(&hop.interface_index), hop.hops)
            };
            // `max_by_key` takes the last among equals: reversed, the first.
            let hop = live.rev().max_by_key(rank)?;
            (Some(hop.interface_index), gateway_of(&hop.attributes))
        }
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            (None, None)
        }
        _ => return None,
    };
    Some(Candidate { prefix, metric, ifindex, gateway, source })
}

fn gateway_of(attributes: &[RouteAttribute]) -> Option<Ipv4Addr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn the_mirror_takes_the_best_metric_and_keeps_holes_for_what_leaves_elsewhere() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        for (device, peer, address) in [("up0", "up1", "192.0.2.2/24"), ("vpn0", "vpn1", "10.8.0.1/24")] {
            lab.ip(&["link", "add", device, "type", "veth", "peer", "name", peer]);
            lab.ip(&["link", "set", peer, "up"]);
            lab.ip(&["link", "set", device, "up"]);
            lab.ip(&["addr", "add", address, "dev", device]);
        }
        lab.ip(&["route", "add", "default", "via", "192.0.2.1", "metric", "100"]);
        lab.ip(&["route", "add", "default", "via", "192.0.2.9", "metric", "50"]);
        lab.ip(&["route", "add", "10.9.0.0/16", "via", "10.8.0.7", "metric", "1"]);
        lab.ip(&["route", "add", "10.9.0.0/16", "via", "192.0.2.1", "metric", "9"]);
        lab.ip(&["route", "add", "blackhole", "198.51.100.0/24"]);
        lab.ip(&["route", "add", "203.0.113.0/24", "via", "192.0.2.3", "table", "77"]);
        lab.ip(&[
            "route",
            "add",
            "100.64.0.0/10",
            "nexthop",
            "via",
            "192.0.2.4",
            "weight",
            "1",
            "nexthop",
            "via",
            "192.0.2.5",
            "weight",
            "3",
        ]);

        let (routes, up0, vpn0) = lab.run(|| async {
            let host = Host::open().unwrap();
            let links = host.links().await.unwrap();
            let (up0, vpn0) = (links.get("up0").unwrap().ifindex, links.get("vpn0").unwrap().ifindex);
            (host.routes(&[up0]).await.unwrap(), up0, vpn0)
        });
        let at = |address: &str| routes.lookup(address.parse().unwrap());
        let default = at("8.8.8.8").unwrap().unwrap();
        assert_eq!((default.gateway, default.metric), (Some("192.0.2.9".parse().unwrap()), 50));
        assert_eq!(default.ifindex, up0);
        // On-link: each destination is its own next hop.
        let onlink = at("192.0.2.77").unwrap().unwrap();
        assert_eq!((onlink.gateway, onlink.source), (None, Some("192.0.2.2".parse().unwrap())));
        assert_eq!(at("10.9.1.1").unwrap().unwrap_err().ifindex, Some(vpn0));
        assert_eq!(at("198.51.100.1").unwrap().unwrap_err().ifindex, None);
        assert_eq!(at("100.64.1.1").unwrap().unwrap().gateway, Some("192.0.2.5".parse().unwrap()));
        // Table 77 is not ours to follow.
        assert_eq!(at("203.0.113.1").unwrap().unwrap(), default);
    }
}
