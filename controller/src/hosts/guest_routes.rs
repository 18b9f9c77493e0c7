//! The host's own way to its guests: routes of the main table, of both families.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::{IpNet, Ipv6Net};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::Host;
use super::netlink::explained;

/// A route that the kernel takes for the host's own packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeviceRoute {
    pub prefix: IpNet,
    pub ifindex: u32,
    /// Is every destination its own next hop?
    pub direct: bool,
    pub source: Option<IpAddr>,
}

impl Host {
    /// Every unicast route of the main table with a device, best metric per prefix. `devices`: all ifindices.
    pub(super) async fn device_routes(&self, devices: &[u32]) -> Result<Vec<DeviceRoute>> {
        let v4 = self.routes(devices).await?.uplinks.into_iter().map(|route| DeviceRoute {
            prefix: IpNet::V4(route.prefix),
            ifindex: route.ifindex,
            direct: route.gateway.is_none(),
            source: route.source.map(IpAddr::V4),
        });
        let messages: Vec<RouteMessage> = self
            .handle()
            .route()
            .get(RouteMessageBuilder::<Ipv6Addr>::new().build())
            .execute()
            .try_collect()
            .await
            .map_err(explained)
            .context("cannot read this host's IPv6 routes")?;
        let mut best: BTreeMap<IpNet, (u32, DeviceRoute)> = BTreeMap::new();
        for (metric, route) in messages.iter().filter_map(route6_of) {
            if best.get(&route.prefix).is_none_or(|(known, _)| metric < *known) {
                best.insert(route.prefix, (metric, route));
            }
        }
        Ok(v4.chain(best.into_values().map(|(_, route)| route)).collect())
    }

    /// Adds a route of the main table to what is on the device's link.
    pub(super) async fn add_host_route(
        &self,
        ifindex: u32,
        prefix: IpNet,
        source: Option<IpAddr>,
    ) -> Result<(), rtnetlink::Error> {
        let route = host_route(ifindex, prefix, source);
        // A source of the other family: only a journal that somebody has edited says so.
        let Some(route) = route else { return Err(rtnetlink::Error::RequestFailed) };
        self.handle().route().add(route).execute().await
    }

    /// Removes the route that `add_host_route` added with the same arguments, and no other.
    pub(super) async fn remove_host_route(
        &self,
        ifindex: u32,
        prefix: IpNet,
        source: Option<IpAddr>,
    ) -> Result<(), rtnetlink::Error> {
        let route = host_route(ifindex, prefix, source);
        let Some(route) = route else { return Err(rtnetlink::Error::RequestFailed) };
        self.handle().route().del(route).execute().await
    }
}

fn host_route(ifindex: u32, prefix: IpNet, source: Option<IpAddr>) -> Option<RouteMessage> {
    // The kernel knows scopes of IPv4 only.
    let scope = if prefix.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(prefix.network(), prefix.prefix_len())
        .ok()?
        .output_interface(ifindex)
        .table_id(u32::from(RouteHeader::RT_TABLE_MAIN))
        .kind(RouteType::Unicast)
        .scope(scope)
        .protocol(RouteProtocol::Static);
    if let Some(source) = source {
        builder = builder.pref_source(source).ok()?;
    }
    Some(builder.build())
}

/// Metric and route; `None` for other tables, multipath routes and what is not unicast.
fn route6_of(message: &RouteMessage) -> Option<(u32, DeviceRoute)> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut prefix = Ipv6Net::new(Ipv6Addr::UNSPECIFIED, 0).ok()?;
    let (mut metric, mut source, mut ifindex, mut direct) = (0, None, None, true);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                prefix = Ipv6Net::new(*address, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(IpAddr::V6(*address)),
            RouteAttribute::Oif(value) => ifindex = Some(*value),
            RouteAttribute::Gateway(_) => direct = false,
            _ => {}
        }
    }
    let looked_at = header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && !header.flags.intersects(RouteFlags::Cloned | RouteFlags::Dead);
    let ifindex = ifindex.filter(|_| looked_at)?;
    Some((metric, DeviceRoute { prefix: IpNet::V6(prefix), ifindex, direct, source }))
}
