//! Ten thousand joins and leaves: what may happen to a member's ports, and what may not.

mod compile_support;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use compile_support::Random;
use compile_support::pools::*;
use portcullis::compile::ports::{LiveUnits, Owner, Ownership, Pool, TCP, UDP, allocate, entitlement};
use portcullis::policy::network::{Allocation, TransportProtocol};

/// Owned units as (address and protocol, unit) -> (member, drains until), members as numbers.
type Snapshot = Vec<((IpAddr, u8, u16), (u32, Option<u64>))>;

/// Numbers for names; neighbours mostly have one owner.
#[derive(Default)]
struct Names {
    numbers: HashMap<String, u32>,
    last: (String, u32),
}

impl Names {
    fn number(&mut self, name: &str) -> u32 {
        if self.last.0 != name {
            let next = self.numbers.len() as u32;
            let number = *self.numbers.entry(name.to_owned()).or_insert(next);
            self.last = (name.to_owned(), number);
        }
        self.last.1
    }

    fn snapshot(&mut self, ownership: &Ownership) -> Snapshot {
        let mut all: Snapshot = ownership
            .iter()
            .map(|(address, p, unit, Owner { member, draining_until })| {
                ((address, p, unit), (self.number(member), *draining_until))
            })
            .collect();
        all.sort_unstable_by_key(|entry| entry.0);
        all
    }
}

/// Pools that come and go, and flows that live on their units.
struct World {
    random: Random,
    /// Letters of the pools there are.
    which: &'static str,
    now: u64,
    /// Numbers of the members of each pool, whether it grows, and how many it loses or gains at a time.
    members: Vec<(Vec<usize>, bool, usize)>,
    next: usize,
    /// Guests that are in no pool, but in the policy.
    idle: Vec<String>,
    live: LiveUnits,
}

impl World {
    fn new(random: Random, which: &'static str) -> Self {
        let members = [(45, 1), (50, 1), (390, 3), (48, 12)];
        let mut numbers = 10_000..;
        let members: Vec<_> = members
            .into_iter()
            .map(|(count, pace)| (numbers.by_ref().take(count).collect(), true, pace))
            .collect();
        let next = numbers.start;
        Self { random, which, now: 0, members, next, idle: Vec::new(), live: LiveUnits::new() }
    }

    fn pools(&self) -> Vec<Pool> {
        let of = |number: usize| self.members[number].0.iter().copied();
        let all = [
            // Crosses four tiers; shares its address with the next.
            pool("a", of(0), 0..1),
            Pool { allocated_outbound_ports: 64, protocol: TransportProtocol::Tcp, ..pool("b", of(1), 0..2) },
            Pool {
                allocation: Allocation::Multiply,
                protocol: TransportProtocol::Tcp,
                ..pool("c", of(2), 2..4)
            },
            // Grows and shrinks fast while nearly all units have flows, so that newcomers have to wait.
            Pool { protocol: TransportProtocol::Udp, ..pool("d", of(3), 4..5) },
        ];
        let is_here = |pool: &Pool| self.which.contains(&pool.place[pool.place.len() - 1..]);
        all.into_iter().filter(is_here).collect()
    }

    /// Joins and leaves.
    fn churn(&mut self) {
        let bounds = [(30, 230), (10, 100), (380, 420), (40, 110)];
        let names = ["a", "b", "c", "d"];
        let here: Vec<usize> = (0..4).filter(|&i| self.which.contains(names[i])).collect();
        let which = *self.random.pick(&here);
        let (members, growing, pace) = &mut self.members[which];
        let (least, most) = bounds[which];
        *growing = if members.len() > most { false } else { *growing || members.len() < least };
        for _ in 0..=self.random.below(*pace) {
            // Mostly in one direction, so that tiers are crossed both ways.
            if self.random.chance(if *growing { 80 } else { 20 }) {
                members.insert(self.random.below(members.len() + 1), self.next);
                self.next += 1;
            } else {
                let left = members.remove(self.random.below(members.len()));
                if self.random.chance(30) {
                    self.idle.push(format!("{}{left}/ipconfig1", names[which]));
                }
            }
        }
        if self.idle.len() > 20 {
            self.idle.remove(0);
        }
    }

    /// Flows begin on units in use and end anywhere; those on drains that are over are ended, as the daemon does.
    fn flows(&mut self, units: &Snapshot) {
        self.now += self.random.below(200) as u64;
        for _ in 0..self.random.below(100) {
            let (unit, (_, draining)) = units[self.random.below(units.len())];
            if draining.is_none() {
                *self.live.entry(unit).or_default() += 1 + self.random.below(5) as u32;
            }
        }
        // Now and then there are flows everywhere on the last pool's address.
        if self.random.chance(5) {
            let everywhere = units.iter().filter(|(unit, of)| unit.0 == front(4) && of.1.is_none());
            self.live.extend(everywhere.map(|(unit, _)| (*unit, 1)));
        }
        if self.random.chance(10) {
            let part = 1 + self.random.below(8);
            let random = &mut self.random;
            self.live.retain(|_, _| random.below(8) > part);
        }
        for (unit, (_, draining)) in units {
            if draining.is_some_and(|until| until <= self.now) {
                self.live.remove(unit);
            }
        }
    }
}

/// Flows on the units that somebody loses, by (member, protocol, address).
type Lost = HashMap<(u32, u8, IpAddr), Vec<u32>>;

/// What a change of pools may do and must do; how many pools are owed ports.
fn check(world: &World, pools: &[Pool], names: &mut Names, before: &Snapshot, after: &Snapshot) -> u32 {
    let live = |unit: &(IpAddr, u8, u16)| world.live.get(unit).copied().unwrap_or(0);
    let exists: HashSet<u32> = pools
        .iter()
        .flat_map(|pool| &pool.members)
        .chain(&world.idle)
        .map(|name| names.number(name))
        .collect();
    let mut lost = Lost::new();
    let mut then = before.iter().peekable();
    let mut last_unit = None;
    for (unit, (owner, draining)) in after {
        assert_ne!(last_unit.replace(*unit), Some(*unit), "one owner");
        if let Some(until) = draining {
            assert!(live(unit) > 0 && *until > world.now, "drains for a reason");
        }
        while let Some(old) = then.next_if(|old| old.0 < *unit) {
            gone(world, &exists, old, &mut lost);
        }
        let Some(old) = then.next_if(|entry| entry.0 == *unit) else {
            assert!(draining.is_none(), "nobody begins with draining");
            continue;
        };
        if old.1.0 != *owner {
            gone(world, &exists, old, &mut lost);
            assert!(draining.is_none());
            continue;
        }
        match (old.1.1, *draining) {
            (None, Some(until)) => {
                assert_eq!(until, world.now + u64::from(DRAIN));
                lost.entry((*owner, unit.1, unit.0)).or_default().push(live(unit));
            }
            (Some(old), Some(now)) => assert_eq!(old, now, "the grace does not move"),
            (None | Some(_), None) => {}
        }
    }
    then.for_each(|old| gone(world, &exists, old, &mut lost));

    // Units in use by member, protocol and address; flows on those of who lost some.
    let mut count: HashMap<(u32, u8, IpAddr), usize> = HashMap::new();
    let mut kept: HashMap<(u32, u8, IpAddr), u32> = HashMap::new();
    let of = |entry: &(_, (u32, Option<u64>))| (entry.1.0, entry.1.1.is_some());
    for run in after.chunk_by(|a, b| (a.0.0, a.0.1) == (b.0.0, b.0.1) && of(a) == of(b)) {
        let ((address, protocol, _), (owner, draining)) = run[0];
        assert!(exists.contains(&owner), "only guests own units");
        if draining.is_some() {
            continue;
        }
        let key = (owner, protocol, address);
        *count.entry(key).or_default() += run.len();
        if !lost.is_empty() {
            let fewest = run.iter().map(|entry| live(&entry.0)).min().unwrap();
            kept.entry(key).and_modify(|least| *least = fewest.min(*least)).or_insert(fewest);
        }
    }
    let mut owed = 0;
    for pool in pools {
        let units = entitlement(pool).unwrap() as usize / 8;
        // The rights of a member: so many units on these addresses together.
        let rights: Vec<(&[IpAddr], usize)> = match pool.allocation {
            Allocation::Multiply => {
                pool.frontends.chunks(1).map(|address| (address, units / pool.frontends.len())).collect()
            }
            _ => vec![(&pool.frontends[..], units)],
        };
        for protocol in [TCP, UDP] {
            let wants = match pool.protocol {
                TransportProtocol::Tcp => protocol == TCP,
                TransportProtocol::Udp => protocol == UDP,
                TransportProtocol::All => true,
            };
            for (addresses, target) in rights.iter().filter(|_| wants) {
                let mut short = 0;
                for name in &pool.members {
                    let number = names.number(name);
                    let keys = || addresses.iter().map(|&address| (number, protocol, address));
                    let has: usize = keys().filter_map(|key| count.remove(&key)).sum();
                    assert!(has <= *target, "{name} has {has} units of {target}");
                    short += target - has;
                    let lost: Vec<u32> = keys().filter_map(|key| lost.remove(&key)).flatten().collect();
                    if let Some(most) = lost.iter().max() {
                        assert_eq!(has, *target, "{name} gives up no more than it must");
                        let fewest = keys().filter_map(|key| kept.get(&key)).min().unwrap();
                        assert!(most <= fewest, "{name} gives up those with the fewest flows");
                    }
                }
                if short > 0 {
                    owed += 1;
                    let taken: HashSet<_> = after.iter().map(|entry| entry.0).collect();
                    let all = addresses.iter().flat_map(|a| (128..8128).map(move |u| (*a, protocol, u)));
                    let free = all.filter(|unit| !taken.contains(unit)).count();
                    assert_eq!(free, 0, "{} is owed {short} units while {free} are free", pool.place);
                }
            }
        }
    }
    assert!(count.is_empty(), "units in use belong to members: {count:?}");
    owed
}

/// A unit its owner does not have any more.
fn gone(
    world: &World,
    exists: &HashSet<u32>,
    (unit, (owner, draining)): &((IpAddr, u8, u16), (u32, Option<u64>)),
    lost: &mut Lost,
) {
    let flows = world.live.get(unit).copied().unwrap_or(0);
    match draining {
        _ if !exists.contains(owner) => {}
        Some(until) => assert!(flows == 0 || *until <= world.now, "a drain ended with {flows} flows"),
        None => {
            assert_eq!(flows, 0, "a unit with flows was taken");
            lost.entry((*owner, unit.1, unit.0)).or_default().push(0);
        }
    }
}

#[test]
fn ten_thousand_joins_and_leaves_move_nobodys_units_except_by_halving() {
    let (mut all, mut waits, mut crossed) = (0, 0, BTreeSet::new());
    let began = Instant::now();
    let mut working = Duration::ZERO;
    let runs =
        [(4, "ab", 3000), (5, "ab", 2000), (6, "d", 2000), (7, "bd", 2000), (8, "cd", 500), (9, "abcd", 500)];
    let runs = runs.map(|(seed, pools, steps)| (Random::new(seed), pools, steps));
    for (random, which, steps) in runs.into_iter().chain([(Random::from_clock(), "abcd", 200)]) {
        let mut world = World::new(random, which);
        let mut names = Names::default();
        let pools = world.pools();
        let mut now = start(&pools);
        let mut before = names.snapshot(&now);
        let (mut owed, mut drained) = (0, 0);
        for number in 0..steps {
            world.churn();
            world.flows(&before);
            let pools = world.pools();
            let mut ground = ground(&pools, &world.live, world.now);
            ground.exists.extend(world.idle.iter().map(String::as_str));
            let clock = Instant::now();
            now = allocate(now, &pools, &ground).unwrap().ownership;
            working += clock.elapsed();
            let after = names.snapshot(&now);
            owed += check(&world, &pools, &mut names, &before, &after);
            drained += now.draining().count();
            crossed.extend(pools.iter().map(|pool| (pool.place.clone(), entitlement(pool).unwrap())));
            // Flows of guests that are gone do not trouble whoever has their units now.
            if number % 10 == 0 {
                let owned: HashSet<_> = after.iter().map(|entry| entry.0).collect();
                world.live.retain(|unit, _| owned.contains(unit));
            }
            if number % 100 == 0 {
                let text = serde_json::to_string(&now).unwrap();
                let read: Ownership = serde_json::from_str(&text).unwrap();
                assert_eq!(read, now);
                now = read;
            }
            before = after;
        }
        println!(
            "pools {which}, {steps} steps: {owed} times somebody waited, {} units drained on average",
            drained / steps
        );
        (all, waits) = (all + steps, waits + owed);
    }
    println!("{all} steps in {:?}, {working:?} of it in the allocator; tiers {crossed:?}", began.elapsed());
    assert!(all >= 10_000 && waits > 0 && crossed.len() >= 9, "{waits} {crossed:?}");
}
