//! Who has which public port, address and listener at one moment, and the lines of the allocation history that lead from one
//! moment to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use portcullis_common::policy::UNIT_PORTS;
use serde::{Deserialize, Serialize};

use super::time::{parse, unix};
use crate::daemon::InForce;
use crate::flows::allocations::port_ranges;

/// What somebody can have. The protocol is 6 or 17.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// Eight SNAT ports.
    Unit(IpAddr, u8, u16),
    /// A port where a rule listens.
    Listener(IpAddr, u8, u16),
    /// An address of one's own.
    Instance(IpAddr),
}

/// Who has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// `vm1/ipconfig1`; of a listener with many backends empty.
    pub member: String,
    /// The listener's rule, `loadBalancers/lb/inboundNatRules/ssh1`.
    pub rule: String,
    pub draining: bool,
    /// Unix seconds.
    pub since: u64,
}

/// Everything that is held at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holdings(pub(super) BTreeMap<Thing, Held>);

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Line {
    /// RFC 3339.
    pub time: String,
    what: What,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<Kind>,
    /// `tcp` or `udp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<Protocol>,
    /// Inclusive ranges: whole units, or a listener's port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<(u16, u16)>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    member: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    rule: String,
    /// Since when it is so, if that is not the line's own time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum What {
    /// Nothing that was said before counts; what is so follows.
    Begins,
    Gained,
    Draining,
    Freed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Kind {
    Snat,
    Listener,
    Instance,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        }
    }

    fn of(number: u8) -> Self {
        if number == 6 { Protocol::Tcp } else { Protocol::Udp }
    }
}

impl Holdings {
    /// What the policy in force says.
    pub fn of(in_force: &InForce, now: u64) -> Self {
        let mut all = BTreeMap::new();
        let held = |member: &str, rule: &str, draining| Held {
            member: member.to_owned(),
            rule: rule.to_owned(),
            draining,
            since: now,
        };
        for (address, protocol, unit, owner) in in_force.compiled.ownership.iter() {
            let draining = owner.draining_until.is_some();
            all.insert(Thing::Unit(address, protocol, unit), held(&owner.member, "", draining));
        }
        let outbound = in_force.compiled.outbound.iter().zip(&in_force.compiled.members);
        for (address, member) in outbound.filter_map(|(of, member)| Some((of.instance?, member))) {
            all.insert(Thing::Instance(address), held(member, "", false));
        }
        for listener in &in_force.compiled.listeners {
            // Of several backends each flow has its own.
            let member = match listener.candidates.as_slice() {
                [(only, _)] => only,
                _ => "",
            };
            let thing = Thing::Listener(listener.frontend, listener.protocol, listener.port);
            all.insert(thing, held(member, &listener.place, false));
        }
        Self(all)
    }

    /// Who has this port of this address.
    pub fn who(&self, address: IpAddr, protocol: u8, port: u16) -> Option<(Thing, &Held)> {
        let things = [
            Thing::Listener(address, protocol, port),
            Thing::Unit(address, protocol, port / UNIT_PORTS as u16),
            Thing::Instance(address),
        ];
        things.into_iter().find_map(|thing| Some((thing, self.0.get(&thing)?)))
    }

    /// Does it know anything about this address?
    pub fn knows(&self, address: IpAddr) -> bool {
        let of = |thing: &Thing| match thing {
            Thing::Unit(a, ..) | Thing::Listener(a, ..) | Thing::Instance(a) => *a,
        };
        self.0.keys().any(|thing| of(thing) == address)
    }

    /// The lines that lead from here to `next`.
    pub(super) fn changes(&self, next: &Self, time: u64) -> Vec<Line> {
        let same = |a: &Held, b: &Held| (&a.member, &a.rule, a.draining) == (&b.member, &b.rule, b.draining);
        let mut changed: Grouped = BTreeMap::new();
        for (thing, held) in &self.0 {
            if next.0.get(thing).is_none_or(|now| now.member != held.member || now.rule != held.rule) {
                group(&mut changed, What::Freed, thing, held, time);
            }
        }
        for (thing, held) in &next.0 {
            if self.0.get(thing).is_none_or(|before| !same(before, held)) {
                let what = if held.draining { What::Draining } else { What::Gained };
                group(&mut changed, what, thing, held, time);
            }
        }
        lines(changed, time)
    }

    /// Everything, as a file begins.
    pub(super) fn beginning(&self, time: u64) -> Vec<Line> {
        let mut all: Grouped = BTreeMap::new();
        for (thing, held) in &self.0 {
            let what = if held.draining { What::Draining } else { What::Gained };
            group(&mut all, what, thing, held, held.since);
        }
        let mut begins = vec![Line::new(time, What::Begins)];
        begins.extend(lines(all, time));
        begins
    }

    /// What is known after this line.
    pub(super) fn apply(&mut self, line: &Line, time: u64) {
        if line.what == What::Begins {
            self.0.clear();
            return;
        }
        let since = line.since.as_deref().and_then(|since| parse(since, time)).unwrap_or(time);
        let held = Held {
            member: line.member.clone(),
            rule: line.rule.clone(),
            draining: line.what == What::Draining,
            since,
        };
        for thing in line.things() {
            match line.what {
                What::Freed => _ = self.0.remove(&thing),
                _ => _ = self.0.insert(thing, held.clone()),
            }
        }
    }

    /// The same facts with the times at which they became so.
    pub(super) fn with_times_of(mut self, before: &Self) -> Self {
        for (thing, held) in &mut self.0 {
            if let Some(old) = before.0.get(thing)
                && (&old.member, &old.rule, old.draining) == (&held.member, &held.rule, held.draining)
            {
                held.since = old.since;
            }
        }
        self
    }
}

/// Lines under way: what, since when, who, and the units or ports of each address.
type Grouped = BTreeMap<(What, u64, String, String, Kind, IpAddr, Option<Protocol>), BTreeSet<u16>>;

fn group(into: &mut Grouped, what: What, thing: &Thing, held: &Held, since: u64) {
    let (kind, address, protocol, number) = match *thing {
        Thing::Unit(address, protocol, unit) => (Kind::Snat, address, Some(protocol), unit),
        Thing::Listener(address, protocol, port) => (Kind::Listener, address, Some(protocol), port),
        Thing::Instance(address) => (Kind::Instance, address, None, 0),
    };
    let protocol = protocol.map(Protocol::of);
    let key = (what, since, held.member.clone(), held.rule.clone(), kind, address, protocol);
    into.entry(key).or_default().insert(number);
}

fn lines(grouped: Grouped, time: u64) -> Vec<Line> {
    let mut lines: Vec<Line> = grouped
        .into_iter()
        .map(|((what, since, member, rule, kind, address, protocol), numbers)| Line {
            address: Some(address),
            kind: Some(kind),
            protocol,
            ports: match kind {
                Kind::Snat => port_ranges(numbers),
                Kind::Listener => numbers.into_iter().map(|port| (port, port)).collect(),
                Kind::Instance => Vec::new(),
            },
            member,
            rule,
            since: (since != time).then(|| unix(since)),
            ..Line::new(time, what)
        })
        .collect();
    // What is freed is freed before somebody else gains it.
    lines.sort_by_key(|line| line.what != What::Freed);
    lines
}

impl Line {
    fn new(time: u64, what: What) -> Self {
        Self {
            time: unix(time),
            what,
            address: None,
            kind: None,
            protocol: None,
            ports: Vec::new(),
            member: String::new(),
            rule: String::new(),
            since: None,
        }
    }

    fn things(&self) -> Vec<Thing> {
        let Some(address) = self.address else { return Vec::new() };
        match (self.kind, self.protocol) {
            (Some(Kind::Instance), _) => vec![Thing::Instance(address)],
            (Some(Kind::Listener), Some(protocol)) => {
                let ports = self.ports.iter().map(|&(port, _)| port);
                ports.map(|port| Thing::Listener(address, protocol.number(), port)).collect()
            }
            (Some(Kind::Snat), Some(protocol)) => {
                let unit = |port: u16| port / UNIT_PORTS as u16;
                let units = self.ports.iter().flat_map(|&(first, last)| unit(first)..=unit(last));
                units.map(|unit| Thing::Unit(address, protocol.number(), unit)).collect()
            }
            _ => Vec::new(),
        }
    }
}
