//! Hearing who asks for a proxied IPv6 address.
//!
//! A neighbour solicitation goes to the solicited-node multicast group of the address (RFC 4291 §2.7.1). A network card
//! hands up, and a switch that listens to MLD passes on, only groups that somebody on this host has joined; for an address
//! that no device of this host has nobody has. So the daemon joins, by sockets it holds: the kernel takes the groups
//! back when it ends. From then on routers that know us still confirm us, by unicast; who does not know us yet finds
//! nobody, except on devices that filter nothing (veth, tap, promiscuous ones).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv6Addr, UdpSocket};

use anyhow::Context as _;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Groups to one socket: what it may remember is limited (net.core.optmem_max, 20 KiB on old kernels).
const PER_SOCKET: usize = 64;

/// The groups we are in. Dropping it leaves them.
#[derive(Debug, Default)]
pub struct Solicited {
    sockets: Vec<UdpSocket>,
    /// By device, with the number of its socket; `None`: it was refused, and that was said.
    groups: BTreeMap<(u32, Ipv6Addr), Option<usize>>,
}

impl Solicited {
    /// Joins the groups of `addresses` on every device, and leaves all others. Says once of each what could not be had.
    /// Run on a thread in the namespace of the devices.
    pub fn listen(&mut self, addresses: &[Ipv6Addr], devices: &[u32]) -> Vec<anyhow::Error> {
        let groups = || addresses.iter().map(|address| solicited_node(*address));
        let wanted: BTreeSet<(u32, Ipv6Addr)> =
            devices.iter().flat_map(|device| groups().map(|group| (*device, group))).collect();
        let stale: Vec<_> = self.groups.keys().filter(|key| !wanted.contains(key)).copied().collect();
        for (device, group) in stale {
            if let Some(Some(socket)) = self.groups.remove(&(device, group)) {
                // Gone with its device: just as well.
                let _ = self.sockets[socket].leave_multicast_v6(&group, device);
            }
        }
        let mut refused = Vec::new();
        for key @ (device, group) in wanted {
            if matches!(self.groups.get(&key), Some(Some(_))) {
                continue;
            }
            let outcome = self.join(device, group);
            let news = self.groups.insert(key, outcome.as_ref().ok().copied()).is_none();
            if let (Err(error), true) = (outcome, news) {
                refused.push(error.context(format!(
                    "who asks device {device} for a proxied IPv6 address ({group}) may not be heard"
                )));
            }
        }
        refused
    }

    fn join(&mut self, device: u32, group: Ipv6Addr) -> anyhow::Result<usize> {
        let used = |socket: usize| self.groups.values().filter(|at| **at == Some(socket)).count();
        let free = (0..self.sockets.len()).find(|socket| used(*socket) < PER_SOCKET);
        let socket = match free {
            Some(socket) => socket,
            None => {
                // Bound to no port, it receives nothing.
                self.sockets.push(unbound().context("a socket for multicast groups")?);
                self.sockets.len() - 1
            }
        };
        self.sockets[socket].join_multicast_v6(&group, device).context("IPV6_JOIN_GROUP")?;
        Ok(socket)
    }
}

fn unbound() -> io::Result<UdpSocket> {
    Ok(socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?.into())
}

/// ff02::1:ff00:0/104 with the last 24 bits of the address.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn the_group_of_an_address_has_its_last_three_bytes() {
        let address = "2001:db8::12:3456:789a".parse().unwrap();
        assert_eq!(solicited_node(address).to_string(), "ff02::1:ff56:789a");
    }

    #[test]
    fn groups_of_proxied_addresses_are_joined_on_the_uplink_and_left_with_the_policy() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        lab.ip(&["link", "set", "up1", "up"]);
        lab.ip(&["link", "set", "up0", "up"]);
        lab.run(|| async {
            // Of the thread: its namespace is not the process's.
            let joined = || {
                let all = std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap();
                all.lines()
                    .filter(|line| line.contains("up0") && line.contains("ff0200000000000000000001ff00"))
                    .count()
            };
            let up0 = crate::hosts::Host::open().unwrap().links().await.unwrap().get("up0").unwrap().ifindex;
            let addresses: Vec<Ipv6Addr> =
                (0..200u16).map(|i| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0x1100, i)).collect();
            let mut solicited = Solicited::default();
            let refused = solicited.listen(&addresses, &[up0]);
            assert_eq!((refused.len(), joined()), (0, 200), "{refused:?}");
            assert_eq!((solicited.listen(&addresses, &[up0]).len(), joined()), (0, 200));
            solicited.listen(&addresses[..3], &[up0]);
            assert_eq!(joined(), 3);
            assert_eq!(solicited.listen(&addresses[..3], &[up0, 9999]).len(), 3, "no such device");
            assert_eq!(solicited.listen(&addresses[..3], &[up0, 9999]).len(), 0, "said once");
            drop(solicited);
            assert_eq!(joined(), 0, "a daemon that ends leaves the groups");
        });
    }
}
