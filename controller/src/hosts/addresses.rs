//! The host's own IPv4 addresses.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::AddressMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};

use super::Host;
use super::netlink::explained;

/// One address of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostAddress {
    pub ifindex: u32,
    /// The local address itself with its prefix length, not the prefix: `192.0.2.7/24`.
    pub address: Ipv4Net,
}

impl Host {
    /// All IPv4 addresses of this namespace. Names of devices: `Links::by_index`.
    pub async fn addresses(&self) -> Result<Vec<HostAddress>> {
        let messages: Vec<AddressMessage> = self
            .handle()
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(explained)
            .context("cannot list this host's addresses")?;
        Ok(messages.iter().filter_map(address_of).collect())
    }

    /// Adds an address of link or universe scope. Errors as the kernel's, `EEXIST` among them.
    pub(super) async fn add_address(
        &self,
        ifindex: u32,
        address: Ipv4Net,
        link_scope: bool,
    ) -> Result<(), rtnetlink::Error> {
        let mut request =
            self.handle().address().add(ifindex, IpAddr::V4(address.addr()), address.prefix_len());
        if link_scope {
            request.message_mut().header.scope = AddressScope::Link;
        }
        request.execute().await
    }

    /// Removes exactly this address from exactly this device.
    pub(super) async fn remove_address(
        &self,
        ifindex: u32,
        address: Ipv4Net,
    ) -> Result<(), rtnetlink::Error> {
        let message = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(ifindex)
            .address(address.addr(), address.prefix_len())
            .build();
        self.handle().address().del(message).execute().await
    }
}

pub(super) fn address_of(message: &AddressMessage) -> Option<HostAddress> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    // On a point-to-point device IFA_ADDRESS is the other end; IFA_LOCAL is ours.
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) if local => Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) if !local => Some(*address),
            _ => None,
        })
    };
    let address = find(true).or_else(|| find(false))?;
    Some(HostAddress {
        ifindex: message.header.index,
        address: Ipv4Net::new(address, message.header.prefix_len).ok()?,
    })
}
