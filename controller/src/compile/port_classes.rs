//! Global port classes: two ports are of the same class if no list of port ranges in the policy tells them apart.

use std::collections::HashMap;

use super::addresses::mark;
use super::ports::merge;

/// The list that is every port has no number.
pub(super) const ANY_PORT: u32 = u32::MAX;

/// The distinct lists of port ranges of a policy, by number.
#[derive(Default)]
pub(super) struct PortLists {
    pub lists: Vec<Vec<(u16, u16)>>,
    by_content: HashMap<Vec<(u16, u16)>, u32>,
}

impl PortLists {
    /// The number of a list; equal lists have the same, "any" is [`ANY_PORT`].
    pub fn intern(&mut self, ranges: &[(u16, u16)]) -> u32 {
        if ranges == [(0, 65535)] {
            return ANY_PORT;
        }
        if let Some(&number) = self.by_content.get(ranges) {
            return number;
        }
        let merged = merge(ranges.to_vec());
        if merged != ranges {
            return self.intern(&merged);
        }
        let number = self.lists.len() as u32;
        self.lists.push(merged.clone());
        self.by_content.insert(merged, number);
        number
    }
}

/// The classes of all ports.
pub(super) struct PortClasses {
    /// Class of each port.
    pub of_port: Vec<u16>,
    /// The lowest port of each class; classes are numbered so that this ascends.
    pub lowest: Vec<u16>,
}

impl PortClasses {
    pub fn build(lists: &PortLists) -> Self {
        // What changes in the signature on the way from one port to the next.
        let mut change = vec![0u128; 65537];
        for (number, list) in lists.lists.iter().enumerate() {
            for &(first, last) in list {
                change[usize::from(first)] ^= mark(number as u32);
                change[usize::from(last) + 1] ^= mark(number as u32);
            }
        }
        let mut by_signature = HashMap::new();
        let mut lowest = Vec::new();
        let mut signature = 0;
        let mut class = 0;
        let of_port = (0..=u16::MAX)
            .map(|port| {
                let change = change[usize::from(port)];
                if port == 0 || change != 0 {
                    signature ^= change;
                    class = *by_signature.entry(signature).or_insert_with(|| {
                        lowest.push(port);
                        (lowest.len() - 1) as u16
                    });
                }
                class
            })
            .collect();
        Self { of_port, lowest }
    }
}
