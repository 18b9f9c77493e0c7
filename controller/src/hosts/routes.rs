//! Where the world is: the kernel's main table, as far as it leads out of the uplinks.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags,
    RoutePreference, RouteType,
};

use super::Host;
use super::netlink::explained;

/// A prefix that leaves by an uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub prefix: IpNet,
    pub ifindex: u32,
    /// The router to send to, of IPv6 mostly by its link-local address. `None` is *on-link*: every destination is its own next hop, which only TC
    /// (`bpf_redirect_neigh`) resolves. A router known by its IPv6 address only (RFC 5549) counts as on-link too,
    /// because the kernel's own look-up under TC finds it and a mirrored IPv4 neighbour cannot.
    pub gateway: Option<IpAddr>,
    /// Lower wins; 0 when the kernel says nothing.
    pub metric: u32,
    /// The source address the kernel would prefer.
    pub source: Option<IpAddr>,
}

/// A prefix whose best route does *not* leave by an uplink: another device, or nowhere (blackhole and its kin).
///
/// The datapath needs these as holes: a guest's packet to such a prefix must not take a shorter uplink route that
/// the kernel would not have taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    pub prefix: IpNet,
    /// `None` for blackhole, unreachable, prohibit and throw.
    pub ifindex: Option<u32>,
}

/// The main table's routes of both families, one per prefix: the one with the lowest metric.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    pub uplinks: Vec<Route>,
    pub elsewhere: Vec<Elsewhere>,
}

impl Routes {
    /// Where the kernel would send `destination`: `Ok` by an uplink, `Err` elsewhere, `None` no route.
    pub fn lookup(&self, destination: IpAddr) -> Option<Result<&Route, &Elsewhere>> {
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
    /// next hop per prefix. Of IPv6 routers with the same metric the one that recommends itself most is taken; the kernel
    /// would also ask which of them answers. Routes with a TOS, by source, of link-local or multicast prefixes and tables
    /// other than main are not looked at.
    pub async fn routes(&self, uplinks: &[u32]) -> Result<Routes> {
        let requests =
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
        let mut messages: Vec<RouteMessage> = Vec::new();
        for request in requests {
            let family: Vec<RouteMessage> = self
                .handle()
                .route()
                .get(request)
                .execute()
                .try_collect()
                .await
                .map_err(explained)
                .context("cannot read this host's routes")?;
            messages.extend(family);
        }
        Ok(best_routes(messages.iter().filter_map(|message| candidate_of(message, uplinks)), uplinks))
    }
}

/// One route of the table with the hop chosen from it.
#[derive(Debug, Clone)]
struct Candidate {
    prefix: IpNet,
    metric: u32,
    ifindex: Option<u32>,
    /// How much an IPv6 router recommends itself (RFC 4191 §2.1), among routes of the same metric; else 0.
    recommended: i8,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
}

fn best_routes(candidates: impl Iterator<Item = Candidate>, uplinks: &[u32]) -> Routes {
    let mut best: BTreeMap<IpNet, Candidate> = BTreeMap::new();
    for candidate in candidates {
        let rank = |route: &Candidate| (route.metric, -route.recommended);
        let worse = best.get(&candidate.prefix).is_some_and(|known| rank(known) <= rank(&candidate));
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
    let mut destination: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut metric = 0;
    let mut recommended = 0;
    let mut source = None;
    let mut ifindex = None;
    let mut hops: &[RouteNextHop] = &[];
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(address) => destination = address_of(address)?,
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::PrefSource(address) => source = address_of(address),
            RouteAttribute::Preference(RoutePreference::High) => recommended = 1,
            RouteAttribute::Preference(RoutePreference::Low) => recommended = -1,
            RouteAttribute::Oif(value) => ifindex = Some(*value),
            RouteAttribute::MultiPath(value) => hops = value,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN)
        || header.tos != 0
        || header.source_prefix_length != 0
        || stays_on_the_link(destination)
        || header.flags.intersects(RouteFlags::Cloned | RouteFlags::Dead)
    {
        return None;
    }
    let prefix = IpNet::new(destination, header.destination_prefix_length).ok()?;
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
    Some(Candidate { prefix, metric, recommended, ifindex, gateway, source })
}

fn gateway_of(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => address_of(address),
        _ => None,
    })
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// fe80::/10, which every device has a route for, and multicast: the datapath forwards neither.
fn stays_on_the_link(destination: IpAddr) -> bool {
    matches!(destination, IpAddr::V6(address) if address.is_unicast_link_local() || address.is_multicast())
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

    #[test]
    fn routes_of_ipv6_are_mirrored_with_link_local_routers_and_what_stays_on_the_link_is_not() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        for (device, peer, address) in [("up0", "up1", "2001:db8::2/64"), ("vpn0", "vpn1", "fd00:8::1/64")] {
            lab.ip(&["link", "add", device, "type", "veth", "peer", "name", peer]);
            lab.ip(&["link", "set", peer, "up"]);
            lab.ip(&["link", "set", device, "up"]);
            lab.ip(&["addr", "add", address, "dev", device, "nodad"]);
        }
        let route = |words: &str| {
            lab.ip(&[&["-6", "route", "add"], words.split(' ').collect::<Vec<_>>().as_slice()].concat());
        };
        route("default via fe80::9 dev up0 metric 512");
        route("default via fe80::1 dev up0 metric 100");
        route("2001:db8:9::/48 via fd00:8::7 metric 1");
        route("2001:db8:9::/48 via fe80::1 dev up0 metric 9");
        route("unreachable 2001:db8:66::/48");
        route("2001:db8:77::/48 via fe80::3 dev up0 table 77");
        route("from 2001:db8::/64 2001:db8:78::/48 via fe80::3 dev up0");
        route("2001:db8:64::/48 nexthop via fe80::4 dev up0 weight 1 nexthop via fe80::5 dev up0 weight 3");

        let (routes, up0, vpn0) = lab.run(|| async {
            let host = Host::open().unwrap();
            let links = host.links().await.unwrap();
            let (up0, vpn0) = (links.get("up0").unwrap().ifindex, links.get("vpn0").unwrap().ifindex);
            (host.routes(&[up0]).await.unwrap(), up0, vpn0)
        });
        let at = |address: &str| routes.lookup(address.parse().unwrap());
        let default = at("2001:4860:4860::8888").unwrap().unwrap();
        let router = Some("fe80::1".parse().unwrap());
        assert_eq!((default.gateway, default.metric, default.ifindex), (router, 100, up0));
        let onlink = at("2001:db8::77").unwrap().unwrap();
        assert_eq!((onlink.gateway, onlink.prefix), (None, "2001:db8::/64".parse().unwrap()));
        assert_eq!(at("2001:db8:9::1").unwrap().unwrap_err().ifindex, Some(vpn0));
        assert_eq!(at("2001:db8:66::1").unwrap().unwrap_err().ifindex, None);
        assert_eq!(at("2001:db8:64::1").unwrap().unwrap().gateway, Some("fe80::5".parse().unwrap()));
        // Another table, and a route for some sources only: not ours to follow.
        assert_eq!(at("2001:db8:77::1").unwrap().unwrap(), default);
        assert_eq!(at("2001:db8:78::1").unwrap().unwrap(), default);
        let all = routes.uplinks.iter().map(|r| r.prefix).chain(routes.elsewhere.iter().map(|r| r.prefix));
        assert!(all.into_iter().all(|prefix| !prefix.to_string().starts_with("fe80")));
        assert!(at("8.8.8.8").is_none(), "the default route of one family is none of the other");
    }
}
