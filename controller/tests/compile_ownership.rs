//! Ports as state: who keeps, gives up, drains and waits when pools change (`reference/azure.md` §2.6).

mod compile_support;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use compile_support::*;
use portcullis::compile::ports::{
    Allocated, Ground, LiveUnits, Move, MoveKind, Owner, Ownership, Pool, TCP, UDP, UnitSet, allocate,
    entitlement, moves,
};
use portcullis::compile::{Registry, compile};
use portcullis::policy::network::{Allocation, TransportProtocol};

const DRAIN: u32 = 3600;

fn front(number: u8) -> IpAddr {
    Ipv4Addr::new(203, 0, 113, 100 + number).into()
}

fn pool(name: &str, members: impl IntoIterator<Item = usize>, fronts: std::ops::Range<u8>) -> Pool {
    Pool {
        place: format!("loadBalancers/lb/outboundRules/{name}"),
        protocol: TransportProtocol::All,
        frontends: fronts.map(front).collect(),
        members: members.into_iter().map(|i| format!("{name}{i}/ipconfig1")).collect(),
        allocated_outbound_ports: 0,
        allocation: Allocation::Min1024,
    }
}

fn ground<'a>(pools: &'a [Pool], live: &'a LiveUnits, now: u64) -> Ground<'a> {
    let whole = || [UnitSet::whole_address(), UnitSet::whole_address()];
    Ground {
        addresses: (0..5).map(|number| (front(number), whole())).collect(),
        exists: pools.iter().flat_map(|pool| &pool.members).map(String::as_str).collect(),
        live,
        now,
        drain_seconds: DRAIN,
    }
}

fn step(before: &Ownership, pools: &[Pool], live: &LiveUnits, now: u64) -> Ownership {
    allocate(before.clone(), pools, &ground(pools, live, now)).unwrap().ownership
}

fn start(pools: &[Pool]) -> Ownership {
    step(&Ownership::default(), pools, &LiveUnits::new(), 0)
}

fn in_use(ownership: &Ownership, member: &str, protocol: u8) -> BTreeSet<u16> {
    ownership.units_of(member, protocol).into_iter().map(|(_, unit)| unit).collect()
}

fn drains(ownership: &Ownership, member: &str, protocol: u8) -> BTreeSet<u16> {
    let of = ownership.iter().filter(|(_, p, _, owner)| *p == protocol && owner.member == member);
    of.filter(|unit| unit.3.draining_until.is_some()).map(|unit| unit.2).collect()
}

#[test]
fn the_51st_member_halves_everybody_and_units_with_flows_drain_those_with_the_fewest_first() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let held: Vec<u16> = in_use(&fifty, "vm0/ipconfig1", TCP).into_iter().collect();
    assert_eq!(held.len() * 8, 1024);
    // vm0: 100 units with TCP flows, the first with most; the last 28 have none. UDP idle.
    let flows = held[..100].iter().enumerate().map(|(i, &unit)| ((front(0), TCP, unit), 100 - i as u32));
    let live: LiveUnits = flows.collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 10_000);
    assert_eq!(in_use(&more, "vm0/ipconfig1", TCP), held[..64].iter().copied().collect());
    assert_eq!(drains(&more, "vm0/ipconfig1", TCP), held[64..100].iter().copied().collect());
    let owner = &more.frontends[&front(0)].tcp[&held[64]];
    assert_eq!(owner.draining_until, Some(10_000 + u64::from(DRAIN)));
    assert_eq!(
        in_use(&more, "vm0/ipconfig1", UDP),
        held[..64].iter().copied().collect(),
        "ties: the highest go"
    );
    assert!(drains(&more, "vm0/ipconfig1", UDP).is_empty(), "without a flow they are free at once");
    for i in 0..51 {
        for protocol in [TCP, UDP] {
            assert_eq!(in_use(&more, &format!("vm{i}/ipconfig1"), protocol).len() * 8, 512, "vm{i}");
        }
    }
    let newcomer = in_use(&more, "vm50/ipconfig1", TCP);
    assert!(
        newcomer.iter().all(|unit| !fifty.frontends[&front(0)].tcp.contains_key(unit)),
        "nobody's before"
    );

    // Whatever lives on decides, not the order of units.
    let live: LiveUnits = held[64..].iter().map(|&unit| ((front(0), UDP, unit), 1)).collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 10_000);
    assert_eq!(in_use(&more, "vm0/ipconfig1", UDP), held[64..].iter().copied().collect());
    assert!(drains(&more, "vm0/ipconfig1", UDP).is_empty());
}

#[test]
fn a_smaller_pool_gets_more_ports_and_loses_none_and_takes_back_what_drains() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let live: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let more = step(&fifty, &[pool("vm", 0..51, 0..1)], &live, 0);
    assert_eq!(drains(&more, "vm7/ipconfig1", TCP).len(), 64);
    let back = step(&more, &[pool("vm", 0..50, 0..1)], &live, 60);
    for i in 0..50 {
        let name = format!("vm{i}/ipconfig1");
        for protocol in [TCP, UDP] {
            assert_eq!(in_use(&back, &name, protocol), in_use(&fifty, &name, protocol), "{name}");
        }
    }
    assert_eq!(back.draining().count(), 0);
}

#[test]
fn a_unit_drains_until_its_last_flow_or_the_grace_is_over_and_is_nobody_elses_before() {
    let pools = [pool("vm", 0..51, 0..1)];
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let all: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let draining = step(&fifty, &pools, &all, 0);
    let lost: Vec<u16> = drains(&draining, "vm0/ipconfig1", TCP).into_iter().collect();
    let mut live = all.clone();
    live.remove(&(front(0), TCP, lost[0]));
    let later = step(&draining, &pools, &live, 100);
    assert!(!later.frontends[&front(0)].tcp.contains_key(&lost[0]), "its flow has ended");
    assert_eq!(later.frontends[&front(0)].tcp[&lost[1]], draining.frontends[&front(0)].tcp[&lost[1]]);
    let end = u64::from(DRAIN);
    assert_eq!(step(&later, &pools, &live, end - 1), later);
    let over = step(&later, &pools, &live, end);
    assert_eq!(over.draining().count(), 0);
    // Who leaves the pool but not the policy drains too; who leaves both has no flows to speak of.
    let left = pool("vm", 1..50, 0..1);
    let mut known = ground(std::slice::from_ref(&left), &all, 0);
    known.exists.insert("vm0/ipconfig1");
    let switched = allocate(fifty.clone(), std::slice::from_ref(&left), &known).unwrap().ownership;
    assert_eq!(drains(&switched, "vm0/ipconfig1", TCP).len(), 128);
    assert!(in_use(&switched, "vm0/ipconfig1", TCP).is_empty());
    let gone = step(&fifty, std::slice::from_ref(&left), &all, 0);
    assert!(drains(&gone, "vm0/ipconfig1", TCP).is_empty());
}

#[test]
fn newcomers_share_what_is_free_while_units_drain_and_get_the_rest_as_drains_end() {
    let fifty = start(&[pool("vm", 0..50, 0..1)]);
    let live: LiveUnits = fifty.iter().map(|(address, p, unit, _)| ((address, p, unit), 1)).collect();
    let hundred = [pool("vm", 0..100, 0..1)];
    let Allocated { ownership: tight, pools } =
        allocate(fifty.clone(), &hundred, &ground(&hundred, &live, 0)).unwrap();
    assert_eq!(pools[0].1, 512, "entitled");
    // 1,600 units are free: 32 for each of the fifty.
    for i in 50..100 {
        assert_eq!(in_use(&tight, &format!("vm{i}/ipconfig1"), TCP).len(), 32, "vm{i}");
    }
    assert_eq!(tight.draining().count(), 2 * 50 * 64);
    // The drains of ten old members end: 640 units, of which everybody gets its part.
    let mut fewer = live.clone();
    fewer.retain(|&(address, p, unit), _| {
        let owner = &tight.frontends[&address].of(p)[&unit];
        let number: usize = owner.member["vm".len()..].split('/').next().unwrap().parse().unwrap();
        number >= 10 || owner.draining_until.is_none()
    });
    let better = step(&tight, &hundred, &fewer, 60);
    for i in 50..100 {
        let units = in_use(&better, &format!("vm{i}/ipconfig1"), TCP).len();
        assert!(units == 44 || units == 45, "vm{i}: {units}");
    }
    let done = step(&better, &hundred, &LiveUnits::new(), 120);
    assert!((0..100).all(|i| in_use(&done, &format!("vm{i}/ipconfig1"), UDP).len() == 64));
    assert_eq!(done.draining().count(), 0);
    // What cannot fit even then is Azure's error, as before.
    let manual = |ports| Pool { allocated_outbound_ports: ports, ..pool("vm", 0..100, 0..1) };
    assert!(allocate(tight.clone(), &[manual(640)], &ground(&hundred, &live, 0)).is_ok());
    let errors = allocate(tight, &[manual(648)], &ground(&hundred, &live, 0)).unwrap_err();
    assert_eq!(errors[0].code, Some(portcullis::compile::ports::EXCEEDS_AVAILABLE));
}

#[test]
fn several_frontends_give_min1024_multiply_or_one_that_is_drawn_and_kept() {
    let of = |allocation| Pool { allocation, ..pool("vm", 0..60, 0..3) };
    let ports = |ownership: &Ownership, number: u8| {
        let units = ownership.units_of("vm3/ipconfig1", TCP);
        units.iter().filter(|unit| unit.0 == front(number)).count() * 8
    };
    let multiply = start(&[of(Allocation::Multiply)]);
    assert_eq!([0, 1, 2].map(|number| ports(&multiply, number)), [512; 3], "the tier on each");
    let least = start(&[of(Allocation::Min1024)]);
    assert_eq!((0..3).map(|number| ports(&least, number)).sum::<usize>(), 1024);

    let basic = of(Allocation::Basic);
    let chosen = |ownership: &Ownership| ownership.chosen[&basic.place];
    let drawn: HashSet<IpAddr> = (0..64)
        .map(|now| {
            let pools = [basic.clone()];
            let first = step(&Ownership::default(), &pools, &LiveUnits::new(), now);
            assert_eq!(first.units_of("vm3/ipconfig1", UDP).len() * 8, 512);
            assert!(first.units_of("vm3/ipconfig1", UDP).iter().all(|unit| unit.0 == chosen(&first)));
            let again = step(&first, &pools, &LiveUnits::new(), now + 1);
            assert_eq!(again, first, "for good");
            chosen(&first)
        })
        .collect();
    assert_eq!(drawn.len(), 3, "any of them");
    // It is drawn anew only when it leaves the pool.
    let first = start(&[basic.clone()]);
    let others = basic.frontends.iter().copied().filter(|address| *address != chosen(&first)).collect();
    let second = step(&first, &[Pool { frontends: others, ..basic.clone() }], &LiveUnits::new(), 7);
    assert_ne!(chosen(&second), chosen(&first));
    assert!(start(&[of(Allocation::Min1024)]).chosen.is_empty());
}

#[test]
fn tcp_and_udp_are_counted_apart_and_may_belong_to_different_pools() {
    let with = |name: &str, protocol, ports| Pool {
        protocol,
        allocated_outbound_ports: ports,
        ..pool(name, 0..2, 0..1)
    };
    let pools = [with("a", TransportProtocol::Tcp, 32_000), with("b", TransportProtocol::Udp, 32_000)];
    let ownership = start(&pools);
    assert_eq!(in_use(&ownership, "a1/ipconfig1", TCP).len(), 4000);
    assert_eq!(in_use(&ownership, "b1/ipconfig1", UDP).len(), 4000);
    assert!(in_use(&ownership, "a1/ipconfig1", UDP).is_empty());
    // All asks for as much of either, and UDP has nothing left.
    let both = [pools[1].clone(), with("c", TransportProtocol::All, 8)];
    assert!(allocate(Ownership::default(), &both, &ground(&both, &LiveUnits::new(), 0)).is_err());
}

#[test]
fn what_moves_is_told_unit_by_unit_with_the_flows_on_it() {
    let small = |members| Pool { allocated_outbound_ports: 16, ..pool("vm", members, 0..1) };
    let before = start(&[small(0..2)]);
    let halved = [Pool { allocated_outbound_ports: 8, ..pool("vm", 0..3, 0..1) }];
    let live: LiveUnits = [((front(0), TCP, 129), 5), ((front(0), TCP, 128), 9)].into();
    let after = step(&before, &halved, &live, 0);
    let told = |protocol, unit, member: &str, what| Move {
        address: front(0),
        protocol,
        unit,
        member: format!("{member}/ipconfig1"),
        what,
    };
    use MoveKind::{Drains, Frees, Gains};
    let expected = [
        told(TCP, 129, "vm0", Drains { flows: 5 }),
        told(TCP, 131, "vm1", Frees),
        told(TCP, 132, "vm2", Gains),
        told(UDP, 129, "vm0", Frees),
        told(UDP, 131, "vm1", Frees),
        told(UDP, 132, "vm2", Gains),
    ];
    assert_eq!(moves(&before, &after, &live), expected);
    let back = step(&after, &[small(0..2)], &live, 1);
    assert!(moves(&after, &back, &live).contains(&told(TCP, 129, "vm0", Gains)), "taken back");
    assert!(moves(&before, &before, &live).is_empty());
}

#[test]
fn a_compiled_policy_says_what_a_guest_has_what_it_is_owed_and_what_drains() {
    let mut net = network(50);
    let first = fresh(&net);
    let live: LiveUnits = first.ownership.iter().map(|(a, p, unit, _)| ((a, p, unit), 1)).collect();
    net = network(100);
    let mut facts = facts(&net);
    (facts.live, facts.now) = (live, 1_800_000_000);
    let second = compile(&net, &facts, &mut Registry::default(), &first.ownership, 2).unwrap();
    let of = |number: usize| {
        let of = second.outbound[number].allocations[0].as_ref().unwrap();
        (of.ports, of.entitled, of.draining)
    };
    assert_eq!((of(0), of(99)), ((512, 512, 512), (256, 512, 0)));
    let until = second.ownership.draining().map(|unit| unit.3).collect::<BTreeSet<_>>();
    assert_eq!(until, [1_800_003_600].into());
    // The drain is remembered by the disk.
    let text = serde_json::to_string(&second.ownership).unwrap();
    assert_eq!(serde_json::from_str::<Ownership>(&text).unwrap(), second.ownership);
    println!("{} bytes of JSON for {} units", text.len(), second.ownership.iter().count());
}

#[test]
fn a_thousand_members_get_their_ports_quickly() {
    let pools = [pool("vm", 0..1000, 0..1)];
    let began = Instant::now();
    let first = start(&pools);
    let from_nothing = began.elapsed();
    let began = Instant::now();
    let second = step(&first, &[pool("vm", 0..999, 0..1)], &LiveUnits::new(), 0);
    println!("1,000 members from nothing {from_nothing:?}, one leaves {:?}", began.elapsed());
    assert_eq!(second.iter().count(), 2 * 999 * 4);
    assert!(from_nothing < Duration::from_millis(250), "{from_nothing:?}");
}

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
    now: u64,
    /// Numbers of the members of each pool, whether it grows, and how many it loses or gains at a time.
    members: Vec<(Vec<usize>, bool, usize)>,
    next: usize,
    /// Guests that are in no pool, but in the policy.
    idle: Vec<String>,
    live: LiveUnits,
}

impl World {
    fn new(random: Random) -> Self {
        let members = [(40..50, 1), (40..60, 1), (790..800, 3), (45..50, 12)];
        let mut numbers = 10_000..;
        let members: Vec<_> = members
            .into_iter()
            .map(|(range, pace)| (numbers.by_ref().take(range.len()).collect(), true, pace))
            .collect();
        let next = numbers.start;
        Self { random, now: 0, members, next, idle: Vec::new(), live: LiveUnits::new() }
    }

    fn pools(&self) -> Vec<Pool> {
        let of = |number: usize| self.members[number].0.iter().copied();
        vec![
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
        ]
    }

    /// Joins and leaves.
    fn churn(&mut self) {
        let bounds = [(30, 230), (10, 100), (780, 830), (40, 110)];
        let names = ["a", "b", "c", "d"];
        let which = *self.random.pick(&[0, 0, 0, 0, 1, 2, 3, 3]);
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
        let busy = self.random.chance(50);
        for _ in 0..if busy { 400 } else { 40 } {
            let (unit, (_, draining)) = units[self.random.below(units.len())];
            if draining.is_none() {
                *self.live.entry(unit).or_default() += 1 + self.random.below(5) as u32;
            }
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
    for (random, steps) in [(Random::new(4), 10_000), (Random::from_clock(), 300)] {
        let mut world = World::new(random);
        let mut names = Names::default();
        let pools = world.pools();
        let mut now = start(&pools);
        let mut before = names.snapshot(&now);
        let (mut owed, mut drained, mut tiers) = (0, 0, BTreeMap::new());
        let began = Instant::now();
        let mut working = Duration::ZERO;
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
            *tiers.entry(entitlement(&pools[0]).unwrap()).or_insert(0) += 1;
            // Flows of guests that are gone do not trouble whoever has their units now.
            let owners: HashMap<_, _> =
                if number % 10 == 0 { after.iter().copied().collect() } else { HashMap::new() };
            if number % 10 == 0 {
                world.live.retain(|unit, _| owners.contains_key(unit));
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
            "{steps} steps in {:?} ({working:?} in the allocator): {owed} times somebody waited, {} units drained at a \
             time on average, steps at each tier {tiers:?}",
            began.elapsed(),
            drained / steps
        );
        if steps == 10_000 {
            assert!(owed > 0 && drained > 0 && tiers.len() >= 4, "{owed} {drained} {tiers:?}");
        }
    }
}
