//! A backend with everything it has counted so far: each packet is checked against *all* counters and *all* rule
//! hits, so a packet that moves one too many is found at once.

use std::collections::BTreeMap;

use portcullis_common::Reason;
use portcullis_common::engine::Hook;

use crate::backend::{Action, At, Backend, Outcome};

pub struct Ledger<'a> {
    pub backend: &'a mut dyn Backend,
    counters: BTreeMap<Reason, u64>,
    rules: BTreeMap<String, u64>,
}

impl<'a> Ledger<'a> {
    /// Of a backend that has counted nothing yet.
    pub fn new(backend: &'a mut dyn Backend) -> Self {
        Self { backend, counters: BTreeMap::new(), rules: BTreeMap::new() }
    }

    /// Puts another policy in force. Hits of rules stay, as far as their names do.
    ///
    /// # Panics
    /// If it cannot be.
    pub fn change(&mut self, yaml: &str) {
        self.backend.change(yaml).unwrap_or_else(|e| panic!("{}: {e:#}", self.backend.name()));
    }

    /// Runs one packet and checks that it counted as `reason` and hit `rules`, once each, and nothing else.
    ///
    /// # Panics
    /// If not, with `name` and the backend's.
    pub fn run(&mut self, name: &str, at: At, frame: &[u8], reason: Reason, rules: &[&str]) -> Outcome {
        let who = format!("{name} on {}", self.backend.name());
        let mut outcome = self.backend.run(at, frame).unwrap_or_else(|e| panic!("{who}: {e:#}"));
        // XDP counts nothing that it hands up (ADR 0002).
        let mut handed_up = self.backend.hook() == Hook::Xdp
            && outcome.action == Action::Pass
            && matches!(at, At::Ingress(_));
        if handed_up && reason == Reason::FragmentOutOfOrder {
            // Nothing else than that the one before it may be on its way to TC.
            assert_eq!(outcome.frame, frame, "{who}: XDP touched what it hands up");
            outcome = self.backend.run_left_to_tc(at, frame).unwrap_or_else(|e| panic!("{who}: {e:#}"));
            handed_up = false;
        }
        if !handed_up && at != At::Guard || reason == Reason::Untranslated {
            *self.counters.entry(reason).or_default() += 1;
        }
        for rule in rules {
            *self.rules.entry((*rule).to_owned()).or_default() += 1;
        }
        assert_eq!(self.backend.counters().unwrap(), self.counters, "{who}: counters");
        assert_eq!(self.backend.rule_hits().unwrap(), self.rules, "{who}: rule hits");
        outcome
    }
}
