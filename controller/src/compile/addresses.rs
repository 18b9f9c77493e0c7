//! Global address classes: one longest-prefix match per address and packet, however many groups are asked.
//!
//! Every distinct list of prefixes that a rule's side is made of is one *set*. Two addresses are of the same class if
//! the same sets cover them. The walk visits all prefixes sorted by address and length, so that a prefix stands right
//! before everything inside it, with the enclosing ones on a stack; a class's signature is the XOR of a 128-bit
//! pseudo-random number for each covering set, which entering and leaving a prefix updates in time proportional to
//! the sets that name it. (Listing the covering sets would be quadratic: 10.0.0.0/8 may be in ten thousand lists with
//! ten thousand prefixes inside.)

use std::collections::HashMap;
use std::net::Ipv4Addr;

use ipnet::IpNet;

/// `address << 8 | length`, address in host order: sorts enclosing prefixes before those inside.
pub(super) type Prefix = u64;

/// 168.63.129.16, from where Azure probes and serves DHCP and DNS.
pub const PLATFORM_ADDRESS: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

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

pub(super) fn prefix(address: Ipv4Addr, len: u8) -> Prefix {
    u64::from(u32::from(address)) << 8 | u64::from(len)
}

fn first(prefix: Prefix) -> u64 {
    prefix >> 8
}

fn last(prefix: Prefix) -> u64 {
    first(prefix) + (1u64 << (32 - len(prefix))) - 1
}

fn len(prefix: Prefix) -> u8 {
    prefix as u8
}

/// The IPv4 prefix of a term; IPv6 covers no IPv4 packet.
pub(super) fn v4(net: &IpNet) -> Option<Prefix> {
    match net {
        IpNet::V4(net) => Some(prefix(net.network(), net.prefix_len())),
        IpNet::V6(_) => None,
    }
}

/// What `VirtualNetwork` means in a network with this address space.
pub(super) fn virtual_network(space: &[IpNet]) -> Vec<Prefix> {
    space.iter().filter_map(v4).chain([prefix(PLATFORM_ADDRESS, 32)]).collect()
}

/// What `Internet` means in a network with this address space: public and outside of it.
pub(super) fn internet(space: &[IpNet]) -> Vec<Prefix> {
    let special = NOT_INTERNET.iter().map(|&(address, len)| prefix(address, len));
    let mut holes: Vec<(u64, u64)> =
        special.chain(space.iter().filter_map(v4)).map(|p| (first(p), last(p))).collect();
    holes.sort_unstable();
    let mut prefixes = Vec::new();
    let mut at = 0;
    for (first, last) in holes.into_iter().chain([(1 << 32, 1 << 32)]) {
        if at < first {
            cover(at, first - 1, &mut prefixes);
        }
        at = at.max(last + 1);
    }
    prefixes
}

/// Appends the fewest prefixes that make up `first..=last`.
fn cover(first: u64, last: u64, out: &mut Vec<Prefix>) {
    let mut at = first;
    while at <= last {
        let aligned = if at == 0 { 32 } else { at.trailing_zeros().min(32) };
        let fits = (last - at + 1).ilog2();
        let bits = aligned.min(fits);
        out.push(at << 8 | u64::from(32 - bits));
        at += 1 << bits;
    }
}

/// Sorts, and drops what another prefix of the list covers: after this a list is on the walk's stack at most once.
pub(super) fn normalise(mut list: Vec<Prefix>) -> Vec<Prefix> {
    list.sort_unstable();
    let mut end = None;
    list.retain(|&p| {
        let inside = end.is_some_and(|end| last(p) <= end);
        if !inside {
            end = Some(last(p));
        }
        !inside
    });
    list
}

/// The distinct lists of a policy, by number.
#[derive(Default)]
pub(super) struct Lists {
    lists: Vec<Vec<Prefix>>,
    by_content: HashMap<Vec<Prefix>, u32>,
}

impl Lists {
    /// The number of a list; equal lists have the same.
    pub fn intern(&mut self, list: Vec<Prefix>) -> u32 {
        let list = normalise(list);
        if let Some(&number) = self.by_content.get(&list) {
            return number;
        }
        let number = self.lists.len() as u32;
        self.lists.push(list.clone());
        self.by_content.insert(list, number);
        number
    }
}

/// The classes of all IPv4 addresses. Class 0 is covered by no list.
pub(super) struct AddressClasses {
    /// Prefix and class for the longest-prefix match; a miss is class 0.
    pub prefixes: Vec<(Prefix, u32)>,
    /// Number of classes, class 0 included.
    pub count: usize,
    /// Class of each distinct prefix, in sorted order.
    node_class: Vec<u32>,
    /// Behind the last prefix inside it, as an index into `node_class`.
    node_end: Vec<u32>,
    /// The prefixes of each list, as indices into `node_class`.
    list_nodes: Vec<Vec<u32>>,
}

impl AddressClasses {
    pub fn build(lists: &Lists) -> Self {
        let lists = &lists.lists;
        let mut pairs: Vec<(Prefix, u32)> = Vec::with_capacity(lists.iter().map(Vec::len).sum());
        for (number, list) in lists.iter().enumerate() {
            pairs.extend(list.iter().map(|&p| (p, number as u32)));
        }
        pairs.sort_unstable();

        let mut classes = Self {
            prefixes: Vec::new(),
            count: 1,
            node_class: Vec::new(),
            node_end: Vec::new(),
            list_nodes: vec![Vec::new(); lists.len()],
        };
        let mut by_signature: HashMap<u128, u32> = HashMap::from([(0, 0)]);
        // (end, node, signature before it was entered)
        let mut stack: Vec<(u64, u32, u128)> = Vec::new();
        let mut signature = 0u128;
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            let p = group[0].0;
            let node = classes.node_class.len() as u32;
            while let Some(&(end, closed, before)) = stack.last()
                && end < first(p)
            {
                classes.node_end[closed as usize] = node;
                signature = before;
                stack.pop();
            }
            let enclosing = stack.last().map_or(0, |&(_, node, _)| classes.node_class[node as usize]);
            stack.push((last(p), node, signature));
            for &(_, list) in group {
                signature ^= mark(list);
                classes.list_nodes[list as usize].push(node);
            }
            let fresh = by_signature.len() as u32;
            let class = *by_signature.entry(signature).or_insert(fresh);
            classes.node_class.push(class);
            classes.node_end.push(0);
            if class != enclosing {
                classes.prefixes.push((p, class));
            }
        }
        let nodes = classes.node_class.len() as u32;
        for (_, node, _) in stack {
            classes.node_end[node as usize] = nodes;
        }
        classes.count = by_signature.len();
        // By length and address: what `lookup` searches.
        classes.prefixes.sort_unstable_by_key(|&(p, _)| (len(p), first(p)));
        classes
    }

    /// Calls `visit` for every class that a list covers; for some more than once.
    #[inline]
    pub fn covered(&self, list: u32, mut visit: impl FnMut(u32)) {
        for &node in &self.list_nodes[list as usize] {
            for &class in &self.node_class[node as usize..self.node_end[node as usize] as usize] {
                visit(class);
            }
        }
    }
}

/// The 128 bits that stand for a set in a signature.
pub(super) fn mark(set: u32) -> u128 {
    let half = |seed: u64| {
        let mut z = seed.wrapping_add(u64::from(set)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    u128::from(half(0x1234_5678_9abc)) << 64 | u128::from(half(0x5851_f42d_4c95_7f2d))
}

/// A prefix as its parts.
pub(super) fn parts(prefix: Prefix) -> (u8, [u8; 4]) {
    (len(prefix), (first(prefix) as u32).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|n| n.parse().unwrap()).collect()
    }

    fn covers(list: &[Prefix], address: [u8; 4]) -> bool {
        let address = u64::from(u32::from_be_bytes(address));
        list.iter().any(|&p| first(p) <= address && address <= last(p))
    }

    #[test]
    fn the_internet_is_what_is_public_and_outside_the_virtual_network() {
        let internet = internet(&nets(&["10.1.0.0/16", "20.0.0.0/24", "fd00::/8"]));
        for inside in [
            [1, 1, 1, 1],
            [203, 0, 113, 9],
            [198, 51, 100, 1],
            [20, 0, 1, 0],
            [168, 63, 129, 17],
            [223, 255, 255, 255],
        ] {
            assert!(covers(&internet, inside), "{inside:?}");
        }
        for outside in [
            [0, 1, 2, 3],
            [10, 9, 9, 9],
            [20, 0, 0, 7],
            [100, 64, 0, 1],
            [127, 0, 0, 1],
            [168, 63, 129, 16],
            [169, 254, 169, 254],
            [172, 31, 255, 255],
            [192, 168, 0, 1],
            [224, 0, 0, 1],
            [255, 255, 255, 255],
        ] {
            assert!(!covers(&internet, outside), "{outside:?}");
        }
        let total: u64 = internet.iter().map(|&p| last(p) - first(p) + 1).sum();
        let holes = [8, 8, 10, 8, 16, 12, 16, 4, 4, 32, 24].iter().map(|l| 1u64 << (32 - l)).sum::<u64>();
        assert_eq!(total, (1 << 32) - holes, "nothing twice, nothing missing");
    }

    #[test]
    fn a_prefix_inside_another_of_the_same_list_adds_no_class() {
        let mut lists = Lists::default();
        lists.intern(nets(&["10.0.0.0/8", "10.1.0.0/16"]).iter().filter_map(v4).collect());
        lists.intern(nets(&["10.1.2.0/24", "10.9.0.0/16"]).iter().filter_map(v4).collect());
        let classes = AddressClasses::build(&lists);
        assert_eq!(classes.count, 3, "none; the first list; both");
        assert_eq!(classes.prefixes.len(), 3);
    }
}
