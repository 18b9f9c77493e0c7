//! Prefixes of both families, and the lists of them that service tags stand for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// 168.63.129.16, from where Azure probes and serves DHCP and DNS.
pub const PLATFORM_ADDRESS: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

/// 169.254.169.254, where Azure serves instance metadata.
pub const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// What is not the Internet wherever one stands. The documentation prefixes are not in here on purpose: they serve
/// as the world in every lab, and policies of tutorials name them.
const NOT_INTERNET: [(Ipv4Addr, u8); 10] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    (PLATFORM_ADDRESS, 32),
];

/// A prefix without bits behind its length. The order puts IPv4 first and a prefix right before all inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Prefix {
    v6: bool,
    /// The first address as a number, for IPv4 below 2^32.
    first: u128,
    len: u8,
}

/// An address of either family in the order of [`Prefix`].
pub(super) type Place = (bool, u128);

impl Prefix {
    /// The family's default route.
    pub fn everything(v6: bool) -> Self {
        Self { v6, first: 0, len: 0 }
    }

    pub fn host(address: impl Into<IpAddr>) -> Self {
        Self::from(&IpNet::from(address.into()))
    }

    pub fn is_v6(&self) -> bool {
        self.v6
    }

    pub fn start(&self) -> Place {
        (self.v6, self.first)
    }

    /// The last address inside.
    pub fn end(&self) -> Place {
        let bits = if self.v6 { 128 } else { 32 };
        let inside = u128::MAX.checked_shr(128 - bits + u32::from(self.len)).unwrap_or(0);
        (self.v6, self.first | inside)
    }

    /// Length and address as the IPv4 tables have them; `None` for IPv6.
    pub fn parts4(&self) -> Option<(u8, [u8; 4])> {
        (!self.v6).then(|| (self.len, (self.first as u32).to_be_bytes()))
    }

    /// Length and address as the IPv6 tables have them; `None` for IPv4.
    pub fn parts6(&self) -> Option<(u8, [u8; 16])> {
        self.v6.then(|| (self.len, self.first.to_be_bytes()))
    }

    /// As it is written.
    pub fn net(&self) -> Option<IpNet> {
        let address = if self.v6 {
            IpAddr::V6(Ipv6Addr::from(self.first))
        } else {
            IpAddr::V4(Ipv4Addr::from(self.first as u32))
        };
        IpNet::new(address, self.len).ok()
    }

    /// The number a hash is made from.
    pub fn words(&self) -> [u64; 3] {
        [(self.first >> 64) as u64, self.first as u64, u64::from(self.len) << 1 | u64::from(self.v6)]
    }
}

impl From<&IpNet> for Prefix {
    fn from(net: &IpNet) -> Self {
        match net {
            IpNet::V4(net) => {
                Self { v6: false, first: u32::from(net.network()).into(), len: net.prefix_len() }
            }
            IpNet::V6(net) => Self { v6: true, first: net.network().into(), len: net.prefix_len() },
        }
    }
}

/// What `Internet` means where these spaces are inside: public and outside of them (`reference/azure.md` §1.4). Of
/// IPv6 that is 2000::/3, the only part given out.
pub(super) fn internet<'a>(inside: impl Iterator<Item = &'a IpNet> + Clone) -> Vec<Prefix> {
    let special = NOT_INTERNET.iter().map(|&(address, len)| (u32::from(address).into(), len));
    let special = special.map(|(first, len)| Prefix { v6: false, first, len });
    let mut prefixes = Vec::new();
    for (whole, special) in [
        (Prefix::everything(false), special.collect()),
        (Prefix { v6: true, first: 0x2000 << 112, len: 3 }, Vec::new()),
    ] {
        let own = inside.clone().map(Prefix::from).filter(|p| p.v6 == whole.v6);
        let mut holes: Vec<Prefix> = special.into_iter().chain(own).collect();
        holes.sort_unstable();
        let (mut at, end) = (whole.first, whole.end().1);
        for hole in holes {
            if at < hole.first {
                cover(whole.v6, at, (hole.first - 1).min(end), &mut prefixes);
            }
            at = at.max(hole.end().1.saturating_add(1));
        }
        cover(whole.v6, at, end, &mut prefixes);
    }
    prefixes
}

/// Appends the fewest prefixes that make up `first..=last`; none if that is empty. Not for all of IPv6.
fn cover(v6: bool, first: u128, last: u128, out: &mut Vec<Prefix>) {
    let bits = if v6 { 128 } else { 32 };
    let mut at = first;
    while at <= last {
        let size = at.trailing_zeros().min((last - at + 1).ilog2()).min(bits);
        out.push(Prefix { v6, first: at, len: (bits - size) as u8 });
        at += 1 << size;
    }
}

/// Sorts, and drops what another prefix of the list covers: after this a list is on the walk's stack at most once.
pub(super) fn normalise(mut list: Vec<Prefix>) -> Vec<Prefix> {
    list.sort_unstable();
    let mut end = None;
    list.retain(|p| {
        let inside = end.is_some_and(|end| p.end() <= end);
        if !inside {
            end = Some(p.end());
        }
        !inside
    });
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|n| n.parse().unwrap()).collect()
    }

    fn covers(list: &[Prefix], address: &str) -> bool {
        let place = Prefix::host(address.parse::<IpAddr>().unwrap()).start();
        list.iter().any(|p| p.start() <= place && place <= p.end())
    }

    #[test]
    fn the_internet_is_what_is_public_and_outside_the_virtual_network() {
        let own = nets(&["10.1.0.0/16", "20.0.0.0/24", "fd00::/8", "2001:db8:1::/48"]);
        let internet = internet(own.iter());
        for inside in [
            "1.1.1.1",
            "203.0.113.9",
            "198.51.100.1",
            "20.0.1.0",
            "168.63.129.17",
            "223.255.255.255",
            "2000::",
            "2001:db8:2::1",
            "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        ] {
            assert!(covers(&internet, inside), "{inside}");
        }
        for outside in [
            "0.1.2.3",
            "10.9.9.9",
            "20.0.0.7",
            "100.64.0.1",
            "127.0.0.1",
            "168.63.129.16",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::ffff:1.1.1.1",
            "1fff:ffff::",
            "2001:db8:1::",
            "2001:db8:1:ffff:ffff:ffff:ffff:ffff",
            "4000::",
            "fd00::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!covers(&internet, outside), "{outside}");
        }
        let total: u128 = internet.iter().filter(|p| !p.v6).map(|p| p.end().1 - p.first + 1).sum();
        let holes = [8, 8, 10, 8, 16, 12, 16, 4, 4, 32, 24].iter().map(|l| 1u128 << (32 - l)).sum::<u128>();
        assert_eq!(total, (1 << 32) - holes, "nothing twice, nothing missing");
        let total: u128 = internet.iter().filter(|p| p.v6).map(|p| p.end().1 - p.first + 1).sum();
        assert_eq!(total, (1 << 125) - (1 << 80));
    }

    #[test]
    fn a_space_that_is_all_of_the_internet_leaves_nothing_of_it() {
        assert!(internet(nets(&["0.0.0.0/0", "::/0"]).iter()).is_empty());
        assert!(internet(nets(&["0.0.0.0/0", "2000::/2"]).iter()).is_empty());
    }

    #[test]
    fn a_list_keeps_only_what_nothing_else_in_it_covers() {
        let list = nets(&["10.1.0.0/16", "fd00::1/128", "10.0.0.0/8", "::/0", "10.0.0.0/8", "11.0.0.0/8"]);
        let list = normalise(list.iter().map(Prefix::from).collect());
        let left: Vec<String> = list.iter().map(|p| p.net().unwrap().to_string()).collect();
        assert_eq!(left, ["10.0.0.0/8", "11.0.0.0/8", "::/0"]);
        assert_eq!(Prefix::everything(true).end(), (true, u128::MAX));
        assert_eq!(Prefix::everything(false).end(), (false, u32::MAX.into()));
    }
}
