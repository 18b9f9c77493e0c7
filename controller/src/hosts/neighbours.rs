//! The kernel's neighbours: the hardware addresses behind next hops.

use std::net::IpAddr;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::Host;
use super::netlink::{explained, is_absent};

/// What the kernel knows about a neighbour (NUD_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    Incomplete,
    Reachable,
    Stale,
    Delay,
    Probe,
    Failed,
    NoArp,
    Permanent,
    Unknown,
}

impl Resolution {
    /// Confirmed within the reachable time, or needs no confirmation (the kernel's NUD_CONNECTED).
    pub fn is_fresh(self) -> bool {
        matches!(self, Self::Reachable | Self::Permanent | Self::NoArp)
    }

    /// The hardware address may be used (NUD_VALID); unless it is fresh, `Host::probe` should be called.
    pub fn is_valid(self) -> bool {
        self.is_fresh() || matches!(self, Self::Stale | Self::Delay | Self::Probe)
    }
}

/// One neighbour entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    /// Absent while unresolved.
    pub mac: Option<[u8; 6]>,
    pub state: Resolution,
}

impl Host {
    /// All neighbours of this namespace, of both families.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>> {
        let messages: Vec<NeighbourMessage> = self
            .handle()
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(explained)
            .context("cannot list this host's neighbours")?;
        Ok(messages.iter().filter_map(neighbour_of).collect())
    }

    /// Makes the kernel resolve a neighbour, or confirm one it knows, as if a packet had been sent to it.
    ///
    /// Returns at once; the answer comes through `watch`. A stale entry is asked again after the kernel's
    /// `delay_first_probe_time` (5 s), during which it stays valid. Error: the device is gone or down.
    pub async fn probe(&self, ifindex: u32, address: IpAddr) -> Result<()> {
        self.handle()
            .neighbours()
            .add(ifindex, address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace()
            .execute()
            .await
            .map_err(explained)
            .with_context(|| format!("cannot ask for the neighbour {address} on device {ifindex}"))
    }

    /// Removes a permanent entry that still has the given hardware address; false when there is no such entry.
    pub(super) async fn remove_neighbour(&self, ifindex: u32, address: IpAddr, mac: [u8; 6]) -> Result<bool> {
        let known = self.neighbours().await?;
        let ours = Neighbour { ifindex, address, mac: Some(mac), state: Resolution::Permanent };
        if !known.contains(&ours) {
            return Ok(false);
        }
        let mut message = NeighbourMessage::default();
        let (family, destination) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        message.header.family = family;
        message.header.ifindex = ifindex;
        message.attributes.push(NeighbourAttribute::Destination(destination));
        match self.handle().neighbours().del(message).execute().await {
            Ok(()) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(explained(error)),
        }
    }
}

/// `None` for other families; the neighbour multicast group also carries the bridges' forwarding tables.
pub(super) fn neighbour_of(message: &NeighbourMessage) -> Option<Neighbour> {
    if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => {
                address = Some(IpAddr::V4(*value))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                address = Some(IpAddr::V6(*value))
            }
            NeighbourAttribute::LinkLayerAddress(value) => mac = value.as_slice().try_into().ok(),
            _ => {}
        }
    }
    let state = match message.header.state {
        NeighbourState::Incomplete => Resolution::Incomplete,
        NeighbourState::Reachable => Resolution::Reachable,
        NeighbourState::Stale => Resolution::Stale,
        NeighbourState::Delay => Resolution::Delay,
        NeighbourState::Probe => Resolution::Probe,
        NeighbourState::Failed => Resolution::Failed,
        NeighbourState::Noarp => Resolution::NoArp,
        NeighbourState::Permanent => Resolution::Permanent,
        _ => Resolution::Unknown,
    };
    Some(Neighbour { ifindex: message.header.ifindex, address: address?, mac, state })
}
