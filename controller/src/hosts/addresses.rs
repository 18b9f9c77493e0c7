//! The host's own addresses, of both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::AddressMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
};

use super::Host;
use super::netlink::explained;

/// One address of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostAddress {
    pub ifindex: u32,
    /// The local address itself with its prefix length, not the prefix: `192.0.2.7/24`.
    pub address: IpNet,
}

impl Host {
    /// All addresses of this namespace, link-local ones among them. Names of devices: `Links::by_index`.
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

    /// Adds an address: `shy` is not chosen as a source by the host for packets of its own to elsewhere. Errors as the
    /// kernel's, `EEXIST` among them.
    ///
    /// Of IPv4 that is link scope. One of IPv6 has its scope by itself and is deprecated instead (RFC 6724 §5, rule 3). It
    /// skips duplicate address detection: nobody but this host has a gateway's address, the datapath answers for it
    /// (`engine::nd`), and a tentative address could not be a route's source; a public address is needed at once.
    pub(super) async fn add_address(
        &self,
        ifindex: u32,
        address: IpNet,
        shy: bool,
    ) -> Result<(), rtnetlink::Error> {
        let mut request = self.handle().address().add(ifindex, address.addr(), address.prefix_len());
        let message = request.message_mut();
        match address {
            IpNet::V4(_) if shy => message.header.scope = AddressScope::Link,
            IpNet::V4(_) => {}
            IpNet::V6(_) => {
                if shy {
                    let mut lifetimes = CacheInfo::default();
                    (lifetimes.ifa_valid, lifetimes.ifa_preferred) = (u32::MAX, 0);
                    message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
                }
                message.header.flags |= AddressHeaderFlags::Nodad;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        request.execute().await
    }

    /// Removes exactly this address from exactly this device.
    pub(super) async fn remove_address(&self, ifindex: u32, address: IpNet) -> Result<(), rtnetlink::Error> {
        let length = address.prefix_len();
        let message = match address.addr() {
            IpAddr::V4(address) => {
                AddressMessageBuilder::<Ipv4Addr>::new().index(ifindex).address(address, length).build()
            }
            IpAddr::V6(address) => {
                AddressMessageBuilder::<Ipv6Addr>::new().index(ifindex).address(address, length).build()
            }
        };
        self.handle().address().del(message).execute().await
    }
}

pub(super) fn address_of(message: &AddressMessage) -> Option<HostAddress> {
    let v4 = match message.header.family {
        AddressFamily::Inet => true,
        AddressFamily::Inet6 => false,
        _ => return None,
    };
    // On a point-to-point device IFA_ADDRESS is the other end; IFA_LOCAL is ours.
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    let address = find(true).or_else(|| find(false)).filter(|address| address.is_ipv4() == v4)?;
    Some(HostAddress {
        ifindex: message.header.index,
        address: IpNet::new(address, message.header.prefix_len).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;
    use crate::hosts::testing::{Lab, ip_in, needs_root};
    use crate::hosts::{HostEvent, Watch};

    #[test]
    fn addresses_of_both_families_are_known_and_a_new_one_is_seen_through_the_watch() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        lab.ip(&["addr", "add", "192.0.2.7/24", "dev", "up0"]);
        let name = lab.name().to_string();
        lab.run(move || async move {
            let mut watch = Watch::open().unwrap();
            ip_in(&name, &["addr", "add", "2001:db8::7/64", "dev", "up0", "nodad"]);
            let host = Host::open().unwrap();
            let ifindex = host.links().await.unwrap().get("up0").unwrap().ifindex;
            let six = HostAddress { ifindex, address: "2001:db8::7/64".parse().unwrap() };
            let seen = async {
                while watch.next().await != Some(HostEvent::Address { address: six, gone: false }) {}
            };
            tokio::time::timeout(std::time::Duration::from_secs(3), seen).await.expect("an event of IPv6");
            let known = host.addresses().await.unwrap();
            let four = HostAddress { ifindex, address: "192.0.2.7/24".parse().unwrap() };
            assert!(known.contains(&four) && known.contains(&six), "{known:?}");
        });
    }
}
