//! What changes on this host while the gateway runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};

use anyhow::{Context, Result};
use futures::Stream;
use futures::channel::mpsc::UnboundedReceiver;
use ipnet::IpNet;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{AsyncSocket, SocketAddr};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::task::JoinHandle;

use super::addresses::address_of;
use super::neighbours::neighbour_of;
use super::{HostAddress, Neighbour};

/// A change, with enough to tell whether it matters; the new state is to be read afresh (`Host::links`,
/// `Host::routes`, …), except neighbours, which come complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent {
    /// Appeared, or changed in any way: up or down, master, address, MTU. The kernel says nothing about the IPv4
    /// routes it drops when a device goes down: read them again.
    Link {
        ifindex: u32,
        name: String,
        up: bool,
    },
    LinkGone {
        ifindex: u32,
        name: String,
    },
    /// The routes that had this as preferred source go silently with it: read them again.
    Address {
        address: HostAddress,
        gone: bool,
    },
    /// A route of the main table.
    Route {
        prefix: IpNet,
        gone: bool,
    },
    /// A rule of policy routing came or went; which, is to be read afresh.
    Rule,
    /// `gone` with the last known state when the entry was deleted.
    Neighbour {
        neighbour: Neighbour,
        gone: bool,
    },
    /// Events were lost because they came faster than they were read: read everything again.
    Lost,
}

impl HostEvent {
    /// Whether `Host::routes` may answer differently now.
    pub fn touches_routes(&self) -> bool {
        !matches!(self, Self::Neighbour { .. } | Self::Rule)
    }

    /// Whether `Host::links`, and with it `choose_hooks` and `prepare`, may answer differently now.
    pub fn touches_links(&self) -> bool {
        matches!(self, Self::Link { .. } | Self::LinkGone { .. } | Self::Lost)
    }
}

/// A stream of changes of the namespace it was opened in. Never ends unless its socket fails.
///
/// Open it *before* taking the snapshots it is to keep current, or a change in between is missed.
pub struct Watch {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Subscribes. Must run inside a tokio runtime, on a thread in the namespace to be watched.
    pub fn open() -> Result<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (mut connection, _, messages) = new_multicast_connection(&groups)
            .context("cannot subscribe to changes of this host's devices")?;
        // A burst (a thousand guests started at once) must not overrun the default 200 KiB. The kernel caps this at
        // net.core.rmem_max, silently; an overrun is reported as `Lost` anyway.
        let _ = connection.socket_mut().socket_mut().set_rx_buf_sz(4u32 << 20);
        Ok(Self { messages, task: tokio::spawn(connection) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Stream for Watch {
    type Item = HostEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Option<HostEvent>> {
        loop {
            match Pin::new(&mut self.messages).poll_next(context) {
                Poll::Ready(Some((message, _))) => {
                    if let Some(event) = event_of(message.payload) {
                        return Poll::Ready(Some(event));
                    }
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

fn event_of(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<HostEvent> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(HostEvent::Lost),
        _ => return None,
    };
    match message {
        RouteNetlinkMessage::NewLink(link) => {
            let up = link.header.flags.contains(LinkFlags::Up);
            Some(HostEvent::Link { ifindex: link.header.index, name: name_of(&link)?, up })
        }
        // A port leaving its bridge is announced as a deletion of family bridge: the device is still there.
        RouteNetlinkMessage::DelLink(link) if link.header.interface_family == AddressFamily::Bridge => {
            let up = link.header.flags.contains(LinkFlags::Up);
            Some(HostEvent::Link { ifindex: link.header.index, name: name_of(&link)?, up })
        }
        RouteNetlinkMessage::DelLink(link) => {
            Some(HostEvent::LinkGone { ifindex: link.header.index, name: name_of(&link)? })
        }
        RouteNetlinkMessage::NewAddress(address) => {
            Some(HostEvent::Address { address: address_of(&address)?, gone: false })
        }
        RouteNetlinkMessage::DelAddress(address) => {
            Some(HostEvent::Address { address: address_of(&address)?, gone: true })
        }
        RouteNetlinkMessage::NewRoute(route) => {
            Some(HostEvent::Route { prefix: main_prefix_of(&route)?, gone: false })
        }
        RouteNetlinkMessage::DelRoute(route) => {
            Some(HostEvent::Route { prefix: main_prefix_of(&route)?, gone: true })
        }
        RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Some(HostEvent::Rule),
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            Some(HostEvent::Neighbour { neighbour: neighbour_of(&neighbour)?, gone: false })
        }
        RouteNetlinkMessage::DelNeighbour(neighbour) => {
            Some(HostEvent::Neighbour { neighbour: neighbour_of(&neighbour)?, gone: true })
        }
        _ => None,
    }
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

/// The prefix of a route of the main table; the groups also carry local and broadcast routes.
fn main_prefix_of(route: &RouteMessage) -> Option<IpNet> {
    let mut address: IpAddr = match route.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut table = u32::from(route.header.table);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(RouteAddress::Inet(value)) => address = (*value).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(value)) => address = (*value).into(),
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::StreamExt;

    use super::*;
    use crate::hosts::testing::{Lab, needs_root};
    use crate::hosts::{Host, Resolution};

    /// The next event that `wanted` accepts; panics after three seconds.
    async fn next(watch: &mut Watch, what: &str, wanted: impl Fn(&HostEvent) -> bool) -> HostEvent {
        let search = async {
            loop {
                let event = watch.next().await.expect("the watch ended");
                if wanted(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(3), search)
            .await
            .unwrap_or_else(|_| panic!("no event: {what}"))
    }

    #[test]
    fn a_default_route_change_and_its_neighbour_are_seen_through_the_watch() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let world = Lab::new();
        lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1", "netns", world.name()]);
        world.ip(&["addr", "add", "192.0.2.1/24", "dev", "up1"]);
        world.ip(&["addr", "add", "192.0.2.9/24", "dev", "up1"]);
        world.ip(&["link", "set", "up1", "address", "02:00:00:00:00:99", "up"]);
        lab.ip(&["addr", "add", "192.0.2.2/24", "dev", "up0"]);
        lab.ip(&["link", "set", "up0", "up"]);
        lab.ip(&["route", "add", "default", "via", "192.0.2.1"]);

        let name = lab.name().to_string();
        lab.run(move || async move {
            let mut watch = Watch::open().unwrap();
            let host = Host::open().unwrap();
            let up0 = host.links().await.unwrap().get("up0").unwrap().ifindex;
            let gateway = async |host: &Host| {
                let routes = host.routes(&[up0]).await.unwrap();
                routes.lookup(Ipv4Addr::new(8, 8, 8, 8).into()).unwrap().unwrap().gateway.unwrap()
            };
            assert_eq!(gateway(&host).await, IpAddr::from([192, 0, 2, 1]));

            crate::hosts::testing::ip_in(&name, &["route", "replace", "default", "via", "192.0.2.9"]);
            let default = "0.0.0.0/0".parse().unwrap();
            next(&mut watch, "route", |event| *event == HostEvent::Route { prefix: default, gone: false })
                .await;
            let router = gateway(&host).await;
            assert_eq!(router, IpAddr::from([192, 0, 2, 9]));

            host.probe(up0, router).await.unwrap();
            let event = next(&mut watch, "neighbour", |event| {
                matches!(event, HostEvent::Neighbour { neighbour, gone: false } if neighbour.mac.is_some())
            })
            .await;
            let HostEvent::Neighbour { neighbour, .. } = event else { unreachable!() };
            let mac = Some([2, 0, 0, 0, 0, 0x99]);
            assert_eq!((neighbour.address, neighbour.mac, neighbour.ifindex), (router, mac, up0));
            assert_eq!(neighbour.state, Resolution::Reachable);
            assert!(host.neighbours().await.unwrap().contains(&neighbour));
            // A second probe of a known neighbour is no error.
            host.probe(up0, router).await.unwrap();

            crate::hosts::testing::ip_in(&name, &["link", "set", "up0", "down"]);
            next(
                &mut watch,
                "down",
                |event| matches!(event, HostEvent::Link { name, up: false, .. } if name == "up0"),
            )
            .await;
            assert_eq!(host.routes(&[up0]).await.unwrap().uplinks, []);

            crate::hosts::testing::ip_in(&name, &["link", "del", "up0"]);
            next(&mut watch, "gone", |event| matches!(event, HostEvent::LinkGone { .. })).await;
        });
    }

    #[test]
    fn a_probe_of_nobody_ends_in_failed_and_is_not_valid() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        lab.ip(&["link", "set", "up1", "up"]);
        lab.ip(&["link", "set", "up0", "up"]);
        lab.ip(&["addr", "add", "192.0.2.2/24", "dev", "up0"]);
        lab.run(|| async {
            let mut watch = Watch::open().unwrap();
            let host = Host::open().unwrap();
            let up0 = host.links().await.unwrap().get("up0").unwrap().ifindex;
            host.probe(up0, [192, 0, 2, 66].into()).await.unwrap();
            let search = async {
                loop {
                    if let Some(HostEvent::Neighbour { neighbour, .. }) = watch.next().await
                        && neighbour.state == Resolution::Failed
                    {
                        return neighbour;
                    }
                }
            };
            let neighbour = tokio::time::timeout(Duration::from_secs(8), search).await.unwrap();
            assert!(!neighbour.state.is_valid() && neighbour.mac.is_none());
        });
    }

    #[test]
    fn a_router_of_ipv6_is_resolved_by_its_link_local_address_and_its_routes_are_seen_through_the_watch() {
        if !needs_root() {
            return;
        }
        let (lab, world) = (Lab::new(), Lab::new());
        lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1", "netns", world.name()]);
        world.ip(&["link", "set", "up1", "address", "02:00:00:00:00:99", "up"]);
        world.ip(&["addr", "add", "fe80::1/64", "dev", "up1", "nodad"]);
        lab.ip(&["link", "set", "up0", "up"]);
        lab.ip(&["addr", "add", "fe80::2/64", "dev", "up0", "nodad"]);
        let name = lab.name().to_string();
        lab.run(move || async move {
            let mut watch = Watch::open().unwrap();
            let host = Host::open().unwrap();
            let up0 = host.links().await.unwrap().get("up0").unwrap().ifindex;
            crate::hosts::testing::ip_in(
                &name,
                &["-6", "route", "add", "default", "via", "fe80::1", "dev", "up0"],
            );
            let default = "::/0".parse().unwrap();
            next(&mut watch, "route", |event| *event == HostEvent::Route { prefix: default, gone: false })
                .await;
            let router: IpAddr = "fe80::1".parse().unwrap();
            host.probe(up0, router).await.unwrap();
            let event = next(&mut watch, "neighbour", |event| {
                matches!(event, HostEvent::Neighbour { neighbour, gone: false }
                    if neighbour.address == router && neighbour.mac.is_some())
            })
            .await;
            let HostEvent::Neighbour { neighbour, .. } = event else { unreachable!() };
            assert_eq!((neighbour.mac, neighbour.ifindex), (Some([2, 0, 0, 0, 0, 0x99]), up0));
            assert!(
                host.neighbours().await.unwrap().iter().any(|n| n.address == router && n.state.is_valid())
            );
        });
    }
}
