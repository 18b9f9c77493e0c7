//! The allocation history: who had which public port, address or listener, and when. It outlives the daemon, so that an
//! abuse report about last night can be answered (`whois --at`).
//!
//! Two files of JSON lines in the state directory, [`CURRENT`] and the one before it. A line is a change; the first lines of
//! a file say everything that was so when it was begun, so that either file can be read without the other. A line that a
//! crash tore is skipped and told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use portcullis_common::policy::UNIT_PORTS;
use serde::{Deserialize, Serialize};

use super::time::{parse, unix};
use crate::daemon::InForce;
use crate::flows::allocations::port_ranges;

/// The file that is written to.
pub const CURRENT: &str = "history.jsonl";
/// The one before it.
pub const BEFORE: &str = "history.1.jsonl";
const BEGUN: &str = "history.jsonl.new";
/// All there may be.
pub const FILES: [&str; 3] = [CURRENT, BEFORE, BEGUN];

/// Bytes of a file; a larger one is put aside. One that begins with more than half of this may grow to twice its beginning.
const LARGEST: u64 = 4 << 20;
/// Bytes of a line that are read; ours are below 64 KiB.
const LONGEST_LINE: u64 = 1 << 20;

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
pub struct Holdings(BTreeMap<Thing, Held>);

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    /// RFC 3339.
    time: String,
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
    fn changes(&self, next: &Self, time: u64) -> Vec<Line> {
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
    fn beginning(&self, time: u64) -> Vec<Line> {
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
    fn apply(&mut self, line: &Line, time: u64) {
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
    fn with_times_of(mut self, before: &Self) -> Self {
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

/// What was read of a history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    pub holdings: Holdings,
    /// Time of the first line; `None`: there is no history.
    pub begins: Option<u64>,
    /// Lines that could not be read.
    pub torn: usize,
}

/// Reads what was so at a moment (`None`: now) from the files in this directory.
///
/// # Errors
/// If a file that is there cannot be read.
pub fn replay(directory: &Path, at: Option<u64>) -> io::Result<Replayed> {
    let mut known = Replayed::default();
    for name in [BEFORE, CURRENT] {
        let file = match File::open(directory.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if !read(file, at, &mut known)? {
            break;
        }
    }
    Ok(known)
}

/// Reads one file; `false` once a line is later than `at`.
fn read(file: impl io::Read, at: Option<u64>, known: &mut Replayed) -> io::Result<bool> {
    let mut reader = BufReader::new(file);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes)? == 0 {
            return Ok(true);
        }
        if bytes == b"\n" {
            continue;
        }
        let line = serde_json::from_slice::<Line>(&bytes).ok();
        let Some((line, time)) = line.and_then(|line| parse(&line.time, 0).map(|time| (line, time))) else {
            known.torn += 1;
            continue;
        };
        known.begins.get_or_insert(time);
        if at.is_some_and(|at| time > at) {
            return Ok(false);
        }
        known.holdings.apply(&line, time);
    }
}

/// The history under the daemon's hand.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    /// What the files say.
    held: Holdings,
    largest: u64,
}

impl History {
    /// Reads what the last daemon has written. One that cannot be read is begun anew, and said so.
    pub fn open(directory: &Path) -> Self {
        let held = match replay(directory, None) {
            Ok(known) => {
                if known.torn > 0 {
                    log::warn!("{} lines of the allocation history cannot be read", known.torn);
                }
                known.holdings
            }
            Err(error) => {
                log::warn!("the allocation history in {}: {error}", directory.display());
                Holdings::default()
            }
        };
        Self { directory: directory.to_owned(), held, largest: LARGEST }
    }

    /// Writes what has changed; how many lines. On an error the next call tries again.
    pub fn note(&mut self, next: Holdings, time: u64) -> io::Result<usize> {
        let next = next.with_times_of(&self.held);
        let path = self.directory.join(CURRENT);
        let size = match fs::metadata(&path) {
            Ok(found) => Some(found.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let changes = self.held.changes(&next, time);
        if size.is_some() && changes.is_empty() {
            return Ok(0);
        }
        let text = text(&changes)?;
        match size {
            Some(size) if size + text.len() as u64 <= self.largest => self.append(&path, &text)?,
            _ => self.begin(&path, &next, time)?,
        }
        self.held = next;
        Ok(changes.len())
    }

    fn append(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).mode(0o600).open(path)?;
        // Behind a line that a crash tore.
        let whole = ends_in_newline(path)?;
        let mut bytes = if whole { Vec::new() } else { b"\n".to_vec() };
        bytes.extend(text);
        file.write_all(&bytes)?;
        file.sync_data()
    }

    /// Puts the file aside and begins another. At no moment is there neither.
    fn begin(&mut self, path: &Path, next: &Holdings, time: u64) -> io::Result<()> {
        let text = text(&next.beginning(time))?;
        let begun = self.directory.join(BEGUN);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&begun)?;
        file.write_all(&text)?;
        file.sync_all()?;
        match fs::rename(path, self.directory.join(BEFORE)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => fs::rename(&begun, path)?,
        }
        self.largest = LARGEST.max(2 * text.len() as u64);
        File::open(&self.directory)?.sync_all()
    }
}

fn text(lines: &[Line]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    Ok(text)
}

fn ends_in_newline(path: &Path) -> io::Result<bool> {
    use std::io::Seek as _;
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut last = [b'\n'];
    if size > 0 {
        file.seek(io::SeekFrom::Start(size - 1))?;
        file.read_exact(&mut last)?;
    }
    Ok(last == *b"\n")
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
