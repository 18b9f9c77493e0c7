//! Sets of addresses of both families, as sorted ranges: what tags, prefixes and application groups come to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Inclusive, first <= last.
pub type Range = (u128, u128);

/// An IP version. A packet has one, and so has each half of an [`AddressSet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The highest address, as a number.
    pub fn last(self) -> u128 {
        match self {
            Family::V4 => u128::from(u32::MAX),
            Family::V6 => u128::MAX,
        }
    }

    /// The address with this number.
    pub fn address(self, number: u128) -> IpAddr {
        match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::from(number as u32)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(number)),
        }
    }

    fn bits(self) -> u32 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

/// An address as a number within its family.
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn range(net: &IpNet) -> Range {
    (number(net.network()), number(net.broadcast()))
}

/// Addresses. The ranges of a family are sorted, do not overlap and do not touch, so equal sets are equal values.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct AddressSet {
    v4: Vec<Range>,
    v6: Vec<Range>,
}

impl AddressSet {
    /// Every address of both families.
    pub fn everything() -> Self {
        Self { v4: vec![(0, Family::V4.last())], v6: vec![(0, Family::V6.last())] }
    }

    /// One address.
    pub fn single(address: IpAddr) -> Self {
        Self::from_prefixes([&IpNet::from(address)])
    }

    /// What these prefixes cover together.
    pub fn from_prefixes<'n>(nets: impl IntoIterator<Item = &'n IpNet>) -> Self {
        let mut set = Self::default();
        for net in nets {
            match net {
                IpNet::V4(_) => set.v4.push(range(net)),
                IpNet::V6(_) => set.v6.push(range(net)),
            }
        }
        Self { v4: merge(set.v4), v6: merge(set.v6) }
    }

    /// The ranges of a family.
    pub fn ranges(&self, family: Family) -> &[Range] {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The addresses of one family.
    pub fn only(&self, family: Family) -> Self {
        match family {
            Family::V4 => Self { v4: self.v4.clone(), v6: Vec::new() },
            Family::V6 => Self { v4: Vec::new(), v6: self.v6.clone() },
        }
    }

    /// What is in any of them.
    pub fn union<'s>(sets: impl IntoIterator<Item = &'s AddressSet>) -> Self {
        let mut all = Self::default();
        for set in sets {
            all.v4.extend(&set.v4);
            all.v6.extend(&set.v6);
        }
        Self { v4: merge(all.v4), v6: merge(all.v6) }
    }

    /// What is in this one and not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        Self { v4: subtract(&self.v4, &other.v4), v6: subtract(&self.v6, &other.v6) }
    }

    /// What is in both.
    pub fn common(&self, other: &Self) -> Self {
        self.without(&self.without(other))
    }

    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// Is every address of `other` in here? True of an empty one.
    pub fn covers(&self, other: &Self) -> bool {
        other.without(self).is_empty()
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let ranges = self.ranges(Family::of(address));
        let number = number(address);
        let behind = ranges.partition_point(|range| range.0 <= number);
        behind > 0 && number <= ranges[behind - 1].1
    }

    /// How many addresses of a family, as a share of the whole family from 0 to 1.
    pub fn share(&self, family: Family) -> f64 {
        let sizes = self.ranges(family).iter().map(|range| (range.1 - range.0) as f64 + 1.0);
        sizes.sum::<f64>() / (family.last() as f64 + 1.0)
    }

    /// The fewest prefixes that make it up, IPv4 first, in order.
    pub fn prefixes(&self) -> Vec<IpNet> {
        let mut nets = Vec::new();
        for family in Family::BOTH {
            for &range in self.ranges(family) {
                cover(family, range, &mut nets);
            }
        }
        nets
    }
}

/// Sorts ranges and joins those that overlap or touch.
fn merge(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1 || first - before.1 == 1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn subtract(from: &[Range], holes: &[Range]) -> Vec<Range> {
    let mut left = Vec::with_capacity(from.len());
    for &(mut first, last) in from {
        let behind = holes.partition_point(|hole| hole.1 < first);
        let mut open = true;
        for &(hole_first, hole_last) in &holes[behind..] {
            if hole_first > last {
                break;
            }
            if first < hole_first {
                left.push((first, hole_first - 1));
            }
            if hole_last >= last {
                open = false;
                break;
            }
            first = hole_last + 1;
        }
        if open {
            left.push((first, last));
        }
    }
    left
}

/// Appends the fewest prefixes that make up one range.
fn cover(family: Family, (mut first, last): Range, nets: &mut Vec<IpNet>) {
    loop {
        let aligned = first.trailing_zeros().min(family.bits());
        // Addresses that are left, less one: `last - first + 1` does not fit for the whole of IPv6.
        let left = last - first;
        let fits = if left == u128::MAX { 128 } else { (left + 1).ilog2() };
        let bits = aligned.min(fits);
        let length = (family.bits() - bits) as u8;
        let net = match family.address(first) {
            // A length of at most 32 or 128 is never refused.
            IpAddr::V4(address) => Ipv4Net::new(address, length).map(IpNet::V4),
            IpAddr::V6(address) => Ipv6Net::new(address, length).map(IpNet::V6),
        };
        nets.extend(net);
        let size_less_one = if bits == 128 { u128::MAX } else { (1 << bits) - 1 };
        if last - first == size_less_one {
            return;
        }
        first += size_less_one + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(list: &[&str]) -> AddressSet {
        AddressSet::from_prefixes(&list.iter().map(|n| n.parse().unwrap()).collect::<Vec<IpNet>>())
    }

    #[test]
    fn prefixes_become_ranges_and_the_fewest_prefixes_again() {
        let both = set(&["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16", "::/1", "8000::/1", "0.0.0.0/32"]);
        let text: Vec<String> = both.prefixes().iter().map(ToString::to_string).collect();
        assert_eq!(text, ["0.0.0.0/32", "10.0.0.0/8", "::/0"]);
        assert_eq!(AddressSet::everything().prefixes().len(), 2);
    }

    #[test]
    fn what_is_taken_away_is_gone_and_nothing_else() {
        let left =
            set(&["10.0.0.0/8", "fd00::/8"]).without(&set(&["10.0.0.0/16", "10.255.255.255/32", "::/0"]));
        assert!(!left.contains("10.0.255.255".parse().unwrap()));
        assert!(
            left.contains("10.1.0.0".parse().unwrap()) && left.contains("10.255.255.254".parse().unwrap())
        );
        assert!(
            !left.contains("10.255.255.255".parse().unwrap()) && !left.contains("fd00::1".parse().unwrap())
        );
        assert!(set(&["10.0.0.0/8"]).covers(&left) && !left.covers(&set(&["10.0.0.0/8"])));
        assert_eq!(set(&["10.0.0.0/8"]).common(&set(&["10.2.0.0/16", "11.0.0.0/8"])), set(&["10.2.0.0/16"]));
        let all = AddressSet::everything();
        assert!(all.without(&all).is_empty() && all.covers(&AddressSet::default()));
    }

    #[test]
    fn an_ipv4_address_is_in_no_ipv6_prefix() {
        assert!(!set(&["::/0"]).contains("1.2.3.4".parse().unwrap()));
        assert!(!set(&["0.0.0.0/0"]).contains("::ffff:1.2.3.4".parse().unwrap()));
    }
}
