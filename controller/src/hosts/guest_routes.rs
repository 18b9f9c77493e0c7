//! The host's own way to its guests: routes of the main table, of both families.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};

use super::Host;

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
        let routes = self.routes(devices).await?.uplinks.into_iter().map(|route| DeviceRoute {
            prefix: route.prefix,
            ifindex: route.ifindex,
            direct: route.gateway.is_none(),
            source: route.source,
        });
        Ok(routes.collect())
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
