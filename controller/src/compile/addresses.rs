//! Global address classes: one longest-prefix match per address and packet, however many groups are asked.
//!
//! Every distinct list of prefixes that a rule's side is made of is one *set*. Two addresses, of whatever family, are
//! of the same class if the same sets cover them. The walk visits all prefixes sorted by address and length, so that a
//! prefix stands right before everything inside it, with the enclosing ones on a stack; a class's signature is the XOR
//! of a 128-bit pseudo-random number for each covering set, which entering and leaving a prefix updates in time
//! proportional to the sets that name it. (Listing the covering sets would be quadratic: 10.0.0.0/8 may be in ten
//! thousand lists with ten thousand prefixes inside.)

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::prefix::{Place, Prefix, normalise};
use super::ruleset::hash;
use super::workers::in_parallel;

/// The distinct lists of a policy, by number.
#[derive(Default)]
pub(super) struct Lists {
    lists: Vec<List>,
    by_hash: HashMap<u64, u32>,
}

struct List {
    prefixes: Vec<Prefix>,
    /// Another list with the same hash.
    next: Option<u32>,
    /// Many rulesets name it.
    shared: bool,
}

impl Lists {
    /// The number of a list; equal lists have the same.
    pub fn intern(&mut self, prefixes: Vec<Prefix>) -> u32 {
        let prefixes = normalise(prefixes);
        let hash = hash(prefixes.iter().flat_map(Prefix::words), prefixes.len() as u64);
        let first = self.by_hash.get(&hash).copied();
        let mut candidate = first;
        while let Some(number) = candidate {
            let list = &self.lists[number as usize];
            if list.prefixes == prefixes {
                return number;
            }
            candidate = list.next;
        }
        let number = self.lists.len() as u32;
        self.lists.push(List { prefixes, next: first, shared: false });
        self.by_hash.insert(hash, number);
        number
    }

    /// The number of a list that many rulesets name: a tag or an application group.
    pub fn intern_shared(&mut self, prefixes: Vec<Prefix>) -> u32 {
        let number = self.intern(prefixes);
        self.lists[number as usize].shared = true;
        number
    }
}

/// Classes of shared lists that are written down, over all lists, about; 32 MB.
const WRITTEN_DOWN: usize = 8 << 20;

/// The classes of all addresses of both families. Class 0 is covered by no list.
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
    /// The classes of shared lists, each once; empty for the others.
    list_classes: Vec<Vec<u32>>,
}

impl AddressClasses {
    pub fn build(lists: &Lists) -> Self {
        let lists = &lists.lists;
        let mut pairs: Vec<(Prefix, u32)> = Vec::with_capacity(lists.iter().map(|l| l.prefixes.len()).sum());
        for (number, list) in lists.iter().enumerate() {
            pairs.extend(list.prefixes.iter().map(|&p| (p, number as u32)));
        }
        // Stable sorting makes use of lists being sorted already.
        pairs.sort();

        let mut classes = Self {
            prefixes: Vec::new(),
            count: 1,
            node_class: Vec::new(),
            node_end: Vec::new(),
            list_nodes: lists.iter().map(|l| Vec::with_capacity(l.prefixes.len())).collect(),
            list_classes: vec![Vec::new(); lists.len()],
        };
        let mut by_signature: HashMap<u128, u32> = HashMap::from([(0, 0)]);
        // (end, node, signature before it was entered)
        let mut stack: Vec<(Place, u32, u128)> = Vec::new();
        let mut signature = 0u128;
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            let p = group[0].0;
            let node = classes.node_class.len() as u32;
            while let Some(&(end, closed, before)) = stack.last()
                && end < p.start()
            {
                classes.node_end[closed as usize] = node;
                signature = before;
                stack.pop();
            }
            let enclosing = stack.last().map_or(0, |&(_, node, _)| classes.node_class[node as usize]);
            stack.push((p.end(), node, signature));
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
        classes.write_down(lists);
        classes
    }

    /// Notes the classes of shared lists: most tags have many more prefixes than classes, and hundreds of rulesets
    /// ask for them. (Measured with the public tag file: 52,000 prefixes, 6,000 classes.)
    fn write_down(&mut self, lists: &[List]) {
        let shared: Vec<usize> = (0..lists.len()).filter(|&list| lists[list].shared).collect();
        let total = AtomicUsize::new(0);
        let written = in_parallel(&shared, Vec::new, |&list, seen: &mut Vec<u32>| {
            let mut classes = Vec::new();
            if total.load(Relaxed) > WRITTEN_DOWN {
                return classes;
            }
            seen.resize(self.count, u32::MAX);
            self.walk(list as u32, |class| {
                if seen[class as usize] != list as u32 {
                    seen[class as usize] = list as u32;
                    classes.push(class);
                }
            });
            classes.sort_unstable();
            total.fetch_add(classes.len(), Relaxed);
            classes
        });
        for (list, classes) in shared.into_iter().zip(written) {
            self.list_classes[list] = classes;
        }
    }

    /// Calls `visit` for every class that a list covers; for some more than once.
    #[inline]
    pub fn covered(&self, list: u32, mut visit: impl FnMut(u32)) {
        match &*self.list_classes[list as usize] {
            [] => self.walk(list, visit),
            classes => classes.iter().for_each(|&class| visit(class)),
        }
    }

    #[inline]
    fn walk(&self, list: u32, mut visit: impl FnMut(u32)) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn list(nets: &[&str]) -> Vec<Prefix> {
        nets.iter().map(|n| Prefix::from(&n.parse().unwrap())).collect()
    }

    #[test]
    fn a_prefix_inside_another_of_the_same_list_adds_no_class() {
        let mut lists = Lists::default();
        lists.intern(list(&["10.0.0.0/8", "10.1.0.0/16"]));
        lists.intern(list(&["10.1.2.0/24", "10.9.0.0/16"]));
        let classes = AddressClasses::build(&lists);
        assert_eq!(classes.count, 3, "none; the first list; both");
        assert_eq!(classes.prefixes.len(), 3);
    }

    #[test]
    fn addresses_of_both_families_that_the_same_lists_name_share_a_class() {
        let mut lists = Lists::default();
        let shared = lists.intern_shared(list(&["20.0.0.0/8", "20.1.0.0/16", "2001:db8::/32"]));
        let own = lists.intern(list(&["::/0"]));
        assert_eq!(lists.intern(list(&["2001:db8::/32", "20.0.0.0/8"])), shared);
        let classes = AddressClasses::build(&lists);
        assert_eq!(classes.count, 4, "none; the shared list; ::/0; both");
        let mut of_shared = Vec::new();
        classes.covered(shared, |class| of_shared.push(class));
        assert_eq!(of_shared.len(), 2);
        let mut of_own = Vec::new();
        classes.covered(own, |class| of_own.push(class));
        assert_eq!(of_own.len(), 2);
        assert_eq!(of_own.iter().filter(|class| of_shared.contains(class)).count(), 1);
    }
}
