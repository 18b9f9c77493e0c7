//! The devices of health probes: veth pairs from this namespace into that of the probes ([`crate::probes`]).

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::{Context, Result, bail};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netlink::{explained, is_absent};
use super::{Host, LinkKind, sysctl};
use crate::compile::PLATFORM_ADDRESS;
use crate::probes::PROBER_MAC;

/// Hardware address of this host's end of every pair: what the prober sends to.
const HOST_MAC: [u8; 6] = [0x02, 0x70, 0x63, 0x70, 0x72, 0x02];

/// The prober's router. Nobody has this address; its hardware address is told, not asked for, so that backends are no
/// neighbours (of which a machine may have 1,024).
const ROUTER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

impl Host {
    /// Makes a pair called `device` at both ends, one here, up, the other in `namespace`.
    pub async fn make_prober(&self, device: &str, namespace: BorrowedFd<'_>) -> Result<()> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(device)
            .address(PROBER_MAC.to_vec())
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(device, device)
            .address(HOST_MAC.to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.handle().link().add(pair).execute().await.map_err(explained)?;
        without_ipv6(device);
        self.set_up(device).await
    }

    /// Removes this host's end of a pair, if it is there, and the other with it. Somebody else's device of that name is
    /// an error.
    pub async fn remove_prober(&self, device: &str) -> Result<()> {
        let links = self.links().await?;
        let Some(link) = links.get(device) else { return Ok(()) };
        if link.kind != LinkKind::Veth || link.mac != HOST_MAC {
            bail!("there is a device {device} already that is not ours: rename it");
        }
        match self.handle().link().del(link.ifindex).execute().await {
            Err(error) if !is_absent(&error) => Err(explained(error)).context(format!("removing {device}")),
            _ => Ok(()),
        }
    }

    /// In the probes' namespace: gives the pair's other end address, router and route. Run on a thread in there.
    pub async fn equip_prober(&self, device: &str) -> Result<()> {
        without_ipv6(device);
        // Answers come back by the device they were asked on, whatever the routes of another say (RFC 3704). The new
        // namespace may have copied a strict setting.
        for of in ["all", device] {
            sysctl::write(&format!("/proc/sys/net/ipv4/conf/{of}/rp_filter"), "0")?;
        }
        self.set_up(device).await?;
        let links = self.links().await?;
        let ifindex = links.get(device).context("it did not arrive in the probes' namespace")?.ifindex;
        let address = IpAddr::V4(PLATFORM_ADDRESS);
        self.handle().address().add(ifindex, address, 32).execute().await.map_err(explained)?;
        self.handle()
            .neighbours()
            .add(ifindex, IpAddr::V4(ROUTER))
            .link_layer_address(&HOST_MAC)
            .state(NeighbourState::Permanent)
            .execute()
            .await
            .map_err(explained)?;
        // One default route for each device; a socket bound to it takes its own.
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(ifindex)
            .gateway(ROUTER)
            .onlink()
            .pref_source(PLATFORM_ADDRESS)
            .priority(ifindex)
            .build();
        self.handle().route().add(route).execute().await.map_err(explained)
    }

    async fn set_up(&self, device: &str) -> Result<()> {
        let up = LinkMessageBuilder::<LinkUnspec>::new().name(device).up().build();
        self.handle().link().set(up).execute().await.map_err(explained)
    }
}

/// The device has nothing to say of IPv6: no router solicitations, no multicast listeners. Fails where there is no IPv6.
fn without_ipv6(device: &str) {
    let _ = sysctl::write(&format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1");
}
