//! Units of one address, and which of them SNAT may use.

use std::ops::Range;

use portcullis_common::policy::{ADDRESS_UNITS, UNIT_PORTS};

/// Units of a frontend that no host shares: ports 1024..=65023, Azure's 64,000.
const WHOLE: Range<u16> = 128..8128;

const WORDS: usize = ADDRESS_UNITS as usize / 64;

/// A set of units (port / 8) of one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitSet([u64; WORDS]);

impl Default for UnitSet {
    fn default() -> Self {
        Self([0; WORDS])
    }
}

impl UnitSet {
    /// Units SNAT may use of an address that the host does not have, or has and reserved its ports of.
    pub fn whole_address() -> Self {
        WHOLE.collect()
    }

    /// Units SNAT may use of an address the host uses too: those wholly outside its ephemeral range, above 1023.
    pub fn beside_host(ephemeral: (u16, u16)) -> Self {
        let unit = UNIT_PORTS as u16;
        // The last unit that ends below the range, exclusive; and the first that begins above it.
        let below = WHOLE.start..(ephemeral.0 / unit).max(WHOLE.start);
        let above = (u32::from(ephemeral.1) + 1).div_ceil(UNIT_PORTS) as u16;
        let above = above.max(WHOLE.start)..ADDRESS_UNITS as u16;
        below.chain(above).collect()
    }

    /// Takes the units of these ports out, `first..=last`.
    pub fn remove_ports(&mut self, first: u16, last: u16) {
        for unit in first / UNIT_PORTS as u16..=last / UNIT_PORTS as u16 {
            self.remove(unit);
        }
    }

    /// # Panics
    /// If there is no such unit.
    pub fn insert(&mut self, unit: u16) {
        self.0[usize::from(unit) / 64] |= 1 << (unit % 64);
    }

    /// # Panics
    /// If there is no such unit.
    pub fn remove(&mut self, unit: u16) {
        self.0[usize::from(unit) / 64] &= !(1 << (unit % 64));
    }

    pub fn contains(&self, unit: u16) -> bool {
        self.0.get(usize::from(unit) / 64).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    /// Those that are in the other too.
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// Those that are not in the other.
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(i, &word)| {
            let bits =
                std::iter::successors(Some(word), |word| Some(word & (word - 1)).filter(|word| *word != 0));
            bits.map(move |word| (i * 64) as u16 + word.trailing_zeros() as u16)
        })
    }
}

impl FromIterator<u16> for UnitSet {
    fn from_iter<I: IntoIterator<Item = u16>>(units: I) -> Self {
        let mut set = Self::default();
        units.into_iter().for_each(|unit| set.insert(unit));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_the_host_uses_too_has_36_280_ports_beside_the_hosts() {
        let units: Vec<u16> = UnitSet::beside_host((32768, 60999)).iter().collect();
        assert_eq!(units.len() * 8, 36_280);
        let outside = |u: &u16| (u * 8..=u * 8 + 7).all(|p| p >= 1024 && !(32768..=60999).contains(&p));
        assert!(units.iter().all(outside));
        assert_eq!((units[0], units[units.len() - 1]), (128, 8191));
        // A range that is not a multiple of 8 takes the whole units at its ends with it.
        let units = UnitSet::beside_host((32769, 60998));
        assert!(!units.contains(4096) && !units.contains(7624) && units.contains(7625));
        assert!(UnitSet::beside_host((1024, 65535)).is_empty());
    }

    #[test]
    fn two_listeners_in_one_block_of_eight_cost_one_unit() {
        let mut units = UnitSet::whole_address();
        assert_eq!(units.len() * 8, 64_000);
        units.remove_ports(8080, 8080);
        units.remove_ports(8087, 8087);
        assert_eq!(units.len(), 7999);
        units.remove_ports(80, 443);
        assert_eq!(units.len(), 7999, "SNAT never had those");
        units.remove_ports(2204, 2216);
        assert_eq!((units.len(), units.contains(274), units.contains(278)), (7996, true, true));
    }
}
