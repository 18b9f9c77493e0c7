//! Ids that live flows and counters refer to, by name: next hops, rules, virtual networks, idle classes.
//!
//! A flow keeps the number of its next hop and of the rule that allowed it for as long as it lives, so a number may
//! not change its meaning when a policy does. A name that leaves the policy keeps its number; numbers are only
//! reused when none is left, those of the longest gone name first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use portcullis_common::layout::{IDLE_RULES, NEXT_HOP_HOST, NEXT_HOP_LOOP};
use serde::{Deserialize, Serialize};

/// Rule ids there are; the tables of rule counters need no more than this many elements.
pub const RULE_IDS: u32 = 1 << 20;

/// Idle classes for the timeouts of rules.
pub const IDLE_CLASSES: u32 = 16 - IDLE_RULES as u32;

/// All numbers of one kind are taken by names that are in the policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exhausted {
    /// What the numbers stand for, in plural.
    pub what: &'static str,
    /// How many there are.
    pub limit: u32,
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is room for {} {} and all are in use", self.limit, self.what)
    }
}

impl std::error::Error for Exhausted {}

/// The ids of this gateway; the caller keeps it on disk as JSON beside the policy in force.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// Counts compilations: the clock that "longest gone" is measured with.
    clock: u64,
    next_hops: Ids,
    rules: Ids,
    networks: Ids,
    /// Names are seconds in decimal.
    idle: Ids,
}

impl Registry {
    /// The index of a next hop, `guest:vm1/ipconfig1` or `world:eth0/203.0.113.100`; a new one if the key is new.
    pub fn next_hop(&mut self, key: &str) -> Result<u16, Exhausted> {
        let space = Space {
            what: "next hops",
            first: u32::from(NEXT_HOP_HOST) + 1,
            last: u32::from(NEXT_HOP_LOOP) - 1,
        };
        self.next_hops.take(key, &space, None).map(|id| id as u16)
    }

    /// A next hop is not in use any more; its index may go to another when none is left.
    ///
    /// `compile` does this by itself for guests; next hops of the world are the caller's.
    pub fn release_next_hop(&mut self, key: &str) {
        let clock = self.clock;
        self.next_hops.release(key, clock);
    }

    /// The ids of all rules of a policy by their keys ([`super::rules::key`]), at least 1. All others are gone.
    pub fn rules<'k>(&mut self, keys: impl Iterator<Item = &'k str>) -> Result<Vec<u32>, Exhausted> {
        let space = Space { what: "security rules", first: 1, last: RULE_IDS - 1 };
        self.rules.take_all(keys, &space, self.clock)
    }

    /// The id of a virtual network; a new name gets `wanted` if that number is free.
    pub fn network(&mut self, name: &str, wanted: u16) -> Result<u16, Exhausted> {
        let space = Space { what: "virtual networks", first: 1, last: 65535 };
        self.networks.take(name, &space, Some(u32::from(wanted))).map(|id| id as u16)
    }

    /// The idle class of a rule's timeout.
    pub fn idle_class(&mut self, seconds: u32) -> Result<u8, Exhausted> {
        let first = u32::from(IDLE_RULES);
        let space = Space { what: "different idle timeouts", first, last: first + IDLE_CLASSES - 1 };
        self.idle.take(&seconds.to_string(), &space, None).map(|id| id as u8)
    }

    /// Every idle class with its seconds, those no rule asks for any more included: flows may still have them.
    pub fn idle_classes(&self) -> impl Iterator<Item = (u8, u32)> + '_ {
        self.idle.by_id.iter().filter_map(|(&id, name)| Some((id as u8, name.parse().ok()?)))
    }

    /// The key of a next hop, for display.
    pub fn next_hop_key(&self, index: u16) -> Option<&str> {
        self.next_hops.name(u32::from(index))
    }

    /// Every next hop that is in use: index and key.
    pub fn next_hops(&self) -> impl Iterator<Item = (u16, &str)> {
        self.next_hops
            .by_name
            .iter()
            .filter(|(_, e)| e.gone.is_none())
            .map(|(name, e)| (e.id as u16, &**name))
    }

    /// The key of a rule, for display.
    pub fn rule_key(&self, id: u32) -> Option<&str> {
        self.rules.name(id)
    }

    /// The name of a virtual network, for display.
    pub fn network_name(&self, id: u16) -> Option<&str> {
        self.networks.name(u32::from(id))
    }

    /// A new compilation begins, in which these names are in use and all others gone; [`Self::rules`] does the same for
    /// rules.
    ///
    /// Must precede the first request for an id, or a name that is still wanted could lose its number to a new one.
    pub(super) fn begin(&mut self, wanted: &Wanted) {
        self.clock += 1;
        let clock = self.clock;
        self.next_hops.keep(clock, |name| !name.starts_with("guest:") || wanted.next_hops.contains(name));
        self.networks.keep(clock, |name| wanted.networks.contains(name));
        self.idle.keep(clock, |name| wanted.idle.contains(name));
    }
}

/// The names a policy uses.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub next_hops: HashSet<String>,
    pub networks: HashSet<String>,
    pub idle: HashSet<String>,
}

/// The numbers of one kind, `first..=last`.
struct Space {
    what: &'static str,
    first: u32,
    last: u32,
}

/// A name's number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Entry {
    id: u32,
    /// The compilation since which the name is not in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone: Option<u64>,
}

/// Names and numbers of one kind. On disk only the first map; the others follow from it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, Entry>", into = "BTreeMap<String, Entry>")]
struct Ids {
    by_name: HashMap<Arc<str>, Entry>,
    by_id: BTreeMap<u32, Arc<str>>,
    /// (since when, number), so that the longest gone is first.
    gone: BTreeSet<(u64, u32)>,
}

impl Ids {
    fn name(&self, id: u32) -> Option<&str> {
        self.by_id.get(&id).map(|name| &**name)
    }

    fn take(&mut self, name: &str, space: &Space, wanted: Option<u32>) -> Result<u32, Exhausted> {
        if let Some(entry) = self.by_name.get_mut(name) {
            if let Some(since) = entry.gone.take() {
                self.gone.remove(&(since, entry.id));
            }
            return Ok(entry.id);
        }
        let id = wanted
            .filter(|id| (space.first..=space.last).contains(id) && !self.by_id.contains_key(id))
            .or_else(|| self.unused(space))
            .or_else(|| self.evict())
            .ok_or(Exhausted { what: space.what, limit: space.last - space.first + 1 })?;
        let name: Arc<str> = name.into();
        self.by_id.insert(id, name.clone());
        self.by_name.insert(name, Entry { id, gone: None });
        Ok(id)
    }

    /// The numbers of these names; all others are gone, before any number is given to a new name.
    fn take_all<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
        space: &Space,
        clock: u64,
    ) -> Result<Vec<u32>, Exhausted> {
        let mut numbers = Vec::new();
        let mut new = Vec::new();
        let mut used = vec![false; self.by_id.last_key_value().map_or(0, |(&id, _)| id as usize + 1)];
        for name in names {
            match self.by_name.get_mut(name) {
                Some(entry) => {
                    if let Some(since) = entry.gone.take() {
                        self.gone.remove(&(since, entry.id));
                    }
                    used[entry.id as usize] = true;
                    numbers.push(entry.id);
                }
                None => {
                    new.push((numbers.len(), name));
                    numbers.push(0);
                }
            }
        }
        let unused = self.by_id.iter().filter(|&(&id, _)| !used[id as usize]);
        let unused: Vec<Arc<str>> = unused.map(|(_, name)| name.clone()).collect();
        for name in unused {
            self.release(&name, clock);
        }
        for (position, name) in new {
            numbers[position] = self.take(name, space, None)?;
        }
        Ok(numbers)
    }

    /// A number that never stood for anything.
    fn unused(&self, space: &Space) -> Option<u32> {
        let next = self.by_id.last_key_value().map_or(space.first, |(&id, _)| id + 1);
        if next <= space.last {
            return Some(next);
        }
        if self.by_id.len() > (space.last - space.first) as usize {
            return None;
        }
        (space.first..=space.last).find(|id| !self.by_id.contains_key(id))
    }

    /// Takes the number of the longest gone name.
    fn evict(&mut self) -> Option<u32> {
        let (_, id) = self.gone.pop_first()?;
        if let Some(name) = self.by_id.remove(&id) {
            self.by_name.remove(&name);
        }
        Some(id)
    }

    fn release(&mut self, name: &str, clock: u64) {
        if let Some(entry) = self.by_name.get_mut(name)
            && entry.gone.is_none()
        {
            entry.gone = Some(clock);
            self.gone.insert((clock, entry.id));
        }
    }

    /// Marks those as gone that are not in use, and those that are as not gone.
    fn keep(&mut self, clock: u64, in_use: impl Fn(&str) -> bool) {
        for (name, entry) in &mut self.by_name {
            match (in_use(name), entry.gone) {
                (false, None) => {
                    entry.gone = Some(clock);
                    self.gone.insert((clock, entry.id));
                }
                // A next hop of the world that was released stays so: only its owner knows.
                (true, Some(since)) if !name.starts_with("world:") => {
                    entry.gone = None;
                    self.gone.remove(&(since, entry.id));
                }
                _ => {}
            }
        }
    }
}

impl From<BTreeMap<String, Entry>> for Ids {
    fn from(stored: BTreeMap<String, Entry>) -> Self {
        let mut ids = Self::default();
        for (name, entry) in stored {
            let name: Arc<str> = name.into();
            if let Some(since) = entry.gone {
                ids.gone.insert((since, entry.id));
            }
            ids.by_id.insert(entry.id, name.clone());
            ids.by_name.insert(name, entry);
        }
        ids
    }
}

impl From<Ids> for BTreeMap<String, Entry> {
    fn from(ids: Ids) -> Self {
        ids.by_name.into_iter().map(|(name, entry)| (name.to_string(), entry)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted_hops(names: &[&str]) -> Wanted {
        Wanted { next_hops: names.iter().map(|n| n.to_string()).collect(), ..Wanted::default() }
    }

    #[test]
    fn a_name_keeps_its_number_while_it_is_gone() {
        let mut registry = Registry::default();
        let first = registry.next_hop("guest:a/1").unwrap();
        assert_eq!(first, 2, "0 is none and 1 the host");
        registry.begin(&wanted_hops(&["guest:b/1"]));
        assert_eq!(registry.next_hop("guest:b/1").unwrap(), 3);
        assert_eq!(registry.next_hop("guest:a/1").unwrap(), 2);
        assert_eq!(registry.next_hop_key(3), Some("guest:b/1"));
    }

    #[test]
    fn a_full_space_reuses_the_longest_gone_and_never_one_in_use() {
        let mut registry = Registry::default();
        registry.next_hop("world:eth0/203.0.113.1").unwrap();
        for i in 0..4092 {
            registry.next_hop(&format!("guest:{i}")).unwrap();
        }
        assert!(registry.next_hop("guest:one-too-many").is_err());
        let (seven, nine) = (registry.next_hop("guest:7").unwrap(), registry.next_hop("guest:9").unwrap());
        let without = |gone: &[usize]| Wanted {
            next_hops: (0..4092).filter(|i| !gone.contains(i)).map(|i| format!("guest:{i}")).collect(),
            ..Wanted::default()
        };
        registry.begin(&without(&[9]));
        registry.begin(&without(&[7, 9]));
        assert_eq!(registry.next_hop("guest:new").unwrap(), nine);
        assert_eq!(registry.next_hop("guest:newer").unwrap(), seven);
        assert!(registry.next_hop("guest:newest").is_err());
        assert_eq!(registry.next_hop("world:eth0/203.0.113.1").unwrap(), 2);
    }

    #[test]
    fn rules_keep_their_numbers_and_those_of_the_longest_gone_are_reused_last() {
        let mut registry = Registry::default();
        let mut rules = |keys: &[&str]| {
            registry.begin(&Wanted::default());
            registry.rules(keys.iter().copied()).unwrap()
        };
        assert_eq!(rules(&["a", "b", "c"]), [1, 2, 3]);
        assert_eq!(rules(&["d", "b"]), [4, 2]);
        assert_eq!(rules(&["c", "c", "a"]), [3, 3, 1], "they come back");
        let space = Space { what: "rules", first: 1, last: 4 };
        assert_eq!(
            registry.rules.take_all(["e", "b"].into_iter(), &space, 9).unwrap(),
            [4, 2],
            "d is gone longest"
        );
        assert!(registry.rules.take_all(["e", "b", "f", "g", "h"].into_iter(), &space, 10).is_err());
    }

    #[test]
    fn what_is_written_as_json_is_read_back_the_same() {
        let mut registry = Registry::default();
        registry.next_hop("guest:a/1").unwrap();
        assert_eq!(registry.rules(["web/Inbound/securityRules/AllowSsh"].into_iter()).unwrap(), [1]);
        registry.network("vnet", 7).unwrap();
        registry.idle_class(240).unwrap();
        registry.begin(&Wanted::default());
        let text = serde_json::to_string(&registry).unwrap();
        assert_eq!(serde_json::from_str::<Registry>(&text).unwrap(), registry);
        assert_eq!(registry.network_name(7), Some("vnet"));
        assert_eq!(registry.idle_classes().collect::<Vec<_>>(), [(4, 240)]);
    }
}
