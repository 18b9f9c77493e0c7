//! What the results of probes come to, and where that is kept.
//!
//! Who is down stays on disk. A daemon that starts again would otherwise send new flows to dead backends until their
//! probes have failed anew, for `threshold` times the interval; who has come back meanwhile is found out as fast. A file
//! that is lost or damaged costs no more than that, so it is not forced to the disk, and read with no complaint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{Failure, Target};

/// Name of the file in the state directory.
pub const FILE: &str = "health.json";

/// How a backend is doing under one probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Until its probe has failed `threshold` times it is.
    pub up: bool,
    /// Unix seconds.
    pub since: u64,
    /// Of a backend that is down what its last probe came to.
    pub why: Option<Failure>,
    /// Results in a row that speak against `up`.
    #[serde(skip)]
    against: u32,
}

impl Health {
    fn new(now: u64) -> Self {
        Self { up: true, since: now, why: None, against: 0 }
    }

    /// Takes a result into account; did the state change?
    fn note(&mut self, result: Result<(), Failure>, threshold: u32, now: u64) -> bool {
        let up = result.is_ok();
        if up == self.up {
            self.against = 0;
            if !up {
                self.why = result.err();
            }
            return false;
        }
        self.against += 1;
        if self.against < threshold {
            return false;
        }
        *self = Self { up, since: now, why: result.err(), against: 0 };
        true
    }
}

/// The health of all backends, by the names of their targets.
#[derive(Debug)]
pub struct Book {
    path: PathBuf,
    all: Mutex<BTreeMap<String, Health>>,
}

impl Book {
    /// Opens it in the state directory: who was down is.
    pub fn open(state_directory: &Path) -> Self {
        let path = state_directory.join(FILE);
        let kept = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path, all: Mutex::new(kept.unwrap_or_default()) }
    }

    /// A holder that panicked leaves nothing broken: an entry is written whole.
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Health>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all backends but these, and takes in those that are new: up.
    pub fn keep<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let now = now();
        let names: BTreeSet<&str> = names.collect();
        let mut all = self.all();
        all.retain(|name, _| names.contains(name.as_str()));
        for name in names {
            all.entry(name.to_owned()).or_insert_with(|| Health::new(now));
        }
    }

    /// Takes a result into account; the new state if it changed. A backend that is not kept any more is not noted.
    pub fn note(&self, target: &Target, result: Result<(), Failure>) -> Option<Health> {
        let mut all = self.all();
        let health = all.get_mut(&target.name)?;
        health.note(result, target.threshold, now()).then(|| health.clone())
    }

    /// How this backend is doing; `None` if it is not probed.
    pub fn of(&self, name: &str) -> Option<Health> {
        self.all().get(name).cloned()
    }

    /// The backends that get no new flows.
    pub fn down(&self) -> BTreeSet<String> {
        self.all().iter().filter(|(_, health)| !health.up).map(|(name, _)| name.clone()).collect()
    }

    /// Writes down who is down.
    pub fn save(&self) -> std::io::Result<()> {
        let all = self.all();
        let down: BTreeMap<&String, &Health> = all.iter().filter(|(_, health)| !health.up).collect();
        if down.is_empty() {
            return match std::fs::remove_file(&self.path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let beside = self.path.with_extension("json.new");
        std::fs::write(&beside, serde_json::to_vec(&down)?)?;
        std::fs::rename(&beside, &self.path)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hosts::testing::Scratch;
    use crate::policy::network::ProbeProtocol;

    fn target(name: &str) -> Target {
        Target {
            name: name.into(),
            device: "pcprobe1".into(),
            address: "10.0.0.4:80".parse().unwrap(),
            protocol: ProbeProtocol::Tcp,
            interval: Duration::from_secs(5),
            threshold: 2,
        }
    }

    #[test]
    fn only_results_in_a_row_change_the_state_and_a_backend_begins_up() {
        let mut health = Health::new(1);
        let mut at = 1;
        let mut note = |result: Result<(), Failure>| {
            at += 1;
            let changed = health.note(result, 3, at);
            (health.up, changed, health.since)
        };
        let bad = || Err(Failure::NoAnswer);
        assert_eq!([note(bad()), note(bad()), note(Ok(()))], [(true, false, 1); 3]);
        assert_eq!([note(bad()), note(bad())], [(true, false, 1); 2]);
        assert_eq!(note(Err(Failure::Refused)), (false, true, 7));
        assert_eq!([note(Ok(())), note(Ok(())), note(bad())], [(false, false, 7); 3]);
        assert_eq!([note(Ok(())), note(Ok(()))], [(false, false, 7); 2]);
        assert_eq!(note(Ok(())), (true, true, 13));
    }

    #[test]
    fn a_backend_that_is_down_says_what_its_last_probe_came_to() {
        let mut health = Health::new(1);
        assert!(health.note(Err(Failure::Refused), 1, 2));
        assert_eq!(health.why, Some(Failure::Refused));
        assert!(!health.note(Err(Failure::Http(503)), 1, 3));
        assert_eq!((health.why.clone(), health.since), (Some(Failure::Http(503)), 2));
        assert!(health.note(Ok(()), 1, 4));
        assert_eq!(health.why, None);
    }

    #[test]
    fn who_is_down_is_so_after_a_restart_and_who_left_the_policy_is_forgotten() {
        let directory = Scratch::new();
        let (one, two) = (target("lb/probes/alive/vm1/ip"), target("lb/probes/alive/vm2/ip"));
        let book = Book::open(&directory.0);
        book.keep([one.name.as_str(), two.name.as_str()].into_iter());
        assert_eq!(book.note(&one, Err(Failure::NoAnswer)), None);
        assert!(book.note(&one, Err(Failure::NoAnswer)).is_some_and(|health| !health.up));
        assert_eq!(book.note(&target("lb/probes/alive/vm9/ip"), Err(Failure::NoAnswer)), None);
        book.save().unwrap();

        let again = Book::open(&directory.0);
        assert_eq!(again.down(), BTreeSet::from([one.name.clone()]));
        again.keep([one.name.as_str(), two.name.as_str()].into_iter());
        assert_eq!(again.of(&one.name).unwrap().why, Some(Failure::NoAnswer));
        assert!(again.of(&two.name).unwrap().up);
        again.keep([two.name.as_str()].into_iter());
        assert!(again.down().is_empty() && again.of(&one.name).is_none());
        again.save().unwrap();
        assert!(!directory.0.join(FILE).exists(), "nobody is down");

        std::fs::write(directory.0.join(FILE), b"{ nonsense").unwrap();
        assert!(Book::open(&directory.0).down().is_empty());
    }
}
