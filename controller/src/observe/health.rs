//! Health events under Azure's names: `HighSnatPortUsage` and `SnatPortExhaustion`, with guest, frontend, destination and
//! since when (`reference/azure.md` §2.8, §8 complaint 1). Found by a look at the flow tables every 15 s, and at once when
//! the datapath tells of a refused flow; told in the log, in `status` and as metrics.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use portcullis_common::Reason;
use portcullis_common::layout::Event;
use portcullis_common::policy::{ALLOC_TCP, alloc_of};
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

use super::shortage::{About, Finding, Kind, findings};
use super::time::{span, unix, unix_seconds};
use crate::daemon::{InForce, Shared};
use crate::datapath::{FlowTable, address6};
use crate::flows::allocations::{Allocations, WITH_PORTS};
use crate::flows::ports::PortUse;
use crate::flows::{address, end};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(15);
/// An event that lasts is told again after this many seconds, as Azure detects it again.
const AGAIN: u64 = 300;
/// Seconds after the last refused flow until an exhaustion is over.
const QUIET: u64 = 45;
/// Events that stand at once, and refused flows that are told apart.
const MOST: usize = 4096;

/// One that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    since: u64,
    /// When it was seen last, and told last.
    seen: u64,
    told: u64,
    detected: u32,
    taken: u32,
    of: u32,
    /// When a flow was refused last; 0 is never.
    refused: u64,
}

/// A health event, to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthEvent {
    /// `HighSnatPortUsage` or `SnatPortExhaustion`.
    pub event: String,
    /// `Warning` or `Critical`.
    pub severity: String,
    /// `vm1/ipconfig1`
    pub guest: String,
    /// The public address; several, separated by commas, if none of them has a port left.
    pub frontend: String,
    pub protocol: String,
    /// TCP: the destination towards which ports are short.
    pub destination: Option<String>,
    pub ports_taken: u32,
    pub ports_allocated: u32,
    /// RFC 3339.
    pub since: String,
    pub last_detected: String,
    /// How often it was found, at most once in five minutes.
    pub detected: u32,
    /// For people.
    pub text: String,
}

/// The events that stand.
#[derive(Debug, Default)]
pub struct HealthLog(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    standing: BTreeMap<About, Standing>,
    /// Refused flows whose guest has been found already.
    refusals: HashMap<Refused, About>,
    looks: u64,
}

/// What tells refused flows apart: network, source, protocol, destination and port.
type Refused = (u16, IpAddr, u8, SocketAddr);

impl State {
    /// Takes in what a look found; what is to be logged.
    fn look(&mut self, findings: Vec<Finding>, now: u64) -> Vec<String> {
        self.looks += 1;
        let mut lines = Vec::new();
        for found in findings {
            lines.extend(self.detect(found, now, false));
        }
        self.standing.retain(|about, standing| {
            let refused = standing.refused != 0 && now.saturating_sub(standing.refused) < QUIET;
            if standing.seen == now || refused {
                return true;
            }
            let lasted = span(Duration::from_secs(now.saturating_sub(standing.since)));
            lines.push(format!("{} ended after {lasted}: {}", about.event(), about.who()));
            false
        });
        let standing = &self.standing;
        self.refusals.retain(|_, about| standing.contains_key(about));
        // An event that lasts only by its refusals is told again, too.
        for (about, standing) in &mut self.standing {
            if now.saturating_sub(standing.told) >= AGAIN {
                (standing.told, standing.detected) = (now, standing.detected + 1);
                lines.push(standing.line(about, "still "));
            }
        }
        lines
    }

    /// One was found, or (`refused`) felt; what is to be logged.
    fn detect(&mut self, found: Finding, now: u64, refused: bool) -> Option<String> {
        let Finding { about, taken, of } = found;
        let refusal = if refused { now } else { 0 };
        if let Some(standing) = self.standing.get_mut(&about) {
            (standing.taken, standing.of) = (taken, of);
            standing.refused = standing.refused.max(refusal);
            if !refused {
                standing.seen = now;
            }
            return None;
        }
        if self.standing.len() == MOST {
            return None;
        }
        let seen = now;
        let standing = Standing { since: now, seen, told: now, detected: 1, taken, of, refused: refusal };
        let line = standing.line(&about, "");
        self.standing.insert(about, standing);
        Some(line)
    }
}

impl Standing {
    fn line(&self, about: &About, still: &str) -> String {
        let what = match about.kind {
            Kind::Exhausted if self.refused != 0 => "new flows are refused for want of a port",
            Kind::Exhausted => "every port is taken",
            Kind::High => "more than three quarters of the ports are taken",
        };
        format!(
            "{} ({}): {}: {still}{what} ({} of {}), since {}",
            about.event(),
            about.severity(),
            about.who(),
            self.taken,
            self.of,
            unix(self.since)
        )
    }
}

impl HealthLog {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The events that stand, the worst first.
    pub fn events(&self) -> Vec<HealthEvent> {
        let state = self.state();
        let told = state.standing.iter().rev().map(|(about, standing)| HealthEvent {
            event: about.event().to_owned(),
            severity: about.severity().to_owned(),
            guest: about.guest.clone(),
            frontend: about.frontend(),
            protocol: WITH_PORTS[about.which].2.to_owned(),
            destination: about.destination.map(|to| end(to.ip(), to.port())),
            ports_taken: standing.taken,
            ports_allocated: standing.of,
            since: unix(standing.since),
            last_detected: unix(standing.seen.max(standing.refused)),
            detected: standing.detected,
            text: standing.line(about, ""),
        });
        told.collect()
    }

    /// How often the flow tables have been looked at.
    pub fn looks(&self) -> u64 {
        self.state().looks
    }

    /// Looks at the flow tables.
    pub fn look(&self, shared: &Shared) {
        let now = unix_seconds(SystemTime::now());
        let lines = self.look_at(&shared.in_force(), shared.flow_tables(), now);
        lines.iter().for_each(|line| log::warn!("{line}"));
    }

    /// Looks at these tables at `now`, in Unix seconds; what is to be logged.
    fn look_at(&self, in_force: &InForce, tables: [&FlowTable; 2], now: u64) -> Vec<String> {
        let allocations = Allocations::of(in_force);
        let findings = if allocations.is_empty() {
            Vec::new()
        } else {
            findings(in_force, &allocations, &PortUse::look(tables))
        };
        self.state().look(findings, now)
    }

    /// Takes note of a flow that was refused.
    pub fn note(&self, event: &Event, shared: &Shared) {
        if let Some(line) = self.felt(event, || shared.in_force(), unix_seconds(SystemTime::now())) {
            log::warn!("{line}");
        }
    }

    /// Takes note of a flow that was refused at `now`, in Unix seconds; what is to be logged.
    fn felt(&self, event: &Event, in_force: impl FnOnce() -> Arc<InForce>, now: u64) -> Option<String> {
        let reason = Reason::from_index(u32::from(event.reason));
        if !matches!(reason, Some(Reason::SnatExhausted | Reason::SnatRefused)) {
            return None;
        }
        let which = alloc_of(event.protocol)?;
        let [source, destination] = if event.v6 == 0 {
            [event.source, event.destination].map(|a| IpAddr::V4(address(a)))
        } else {
            [event.source6, event.destination6].map(|a| IpAddr::V6(address6(a)))
        };
        // Of UDP and pings every destination is short of the same ports.
        let (to, port) = if which == ALLOC_TCP { (destination, event.destination_port) } else { (source, 0) };
        let towards = SocketAddr::new(to, u16::from_be(port));
        let key = (event.network, source, event.protocol, towards);
        let mut state = self.state();
        if let Some(about) = state.refusals.get(&key).cloned() {
            if let Some(standing) = state.standing.get_mut(&about) {
                standing.refused = now;
            }
            return None;
        }
        let in_force = in_force();
        let mut guests = in_force.guests_at(source);
        let guest = guests.find(|guest| guest.endpoint.network == event.network)?;
        let units = in_force.image().units(&guest.endpoint, which);
        let mut frontends: Vec<IpAddr> = Vec::new();
        for (frontend, _) in &units {
            let address = crate::flows::allocations::public(&in_force.image().frontend(*frontend));
            if !frontends.contains(&address) {
                frontends.push(address);
            }
        }
        // As a look finds them.
        frontends.sort_unstable();
        let about = About {
            kind: Kind::Exhausted,
            guest: guest.name.to_owned(),
            frontends,
            which,
            destination: (which == ALLOC_TCP).then_some(towards),
        };
        let of = guest.endpoint.alloc[which].ports;
        let line = state.detect(Finding { about: about.clone(), taken: of, of }, now, true);
        if state.refusals.len() < MOST {
            state.refusals.insert(key, about);
        }
        line
    }
}

/// Looks every 15 seconds until the daemon ends.
pub async fn watch(shared: Arc<Shared>) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let shared = Arc::clone(&shared);
        // Reading a million flows takes tens of milliseconds.
        let looked = tokio::task::spawn_blocking(move || shared.health_log.look(&shared)).await;
        if let Err(error) = looked {
            return log::error!("health events are not looked for any more: {error}");
        }
    }
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
