//! The main task's own part of the daemon, and what it does when something around it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::task::block_in_place;

use super::drains::foreseen;
use super::plan;
use super::shared::Shared;
use super::state::StateDir;
use super::world::{self, World};
use super::{Preview, Refusal, preview};
use crate::compile::Ownership;
use crate::datapath::{Attached, Hook};
use crate::hosts::{self, Host, Journal};
use crate::observe::history::History;
use crate::observe::holdings::Holdings;
use crate::observe::time::unix_seconds;
use crate::policy::Loaded;
use crate::probes::{Probers, with_probers};

/// The main task's own part of the daemon.
pub struct Gateway {
    pub shared: Arc<Shared>,
    pub world: World,
    pub(super) probers: Probers,
    pub(super) host: Host,
    pub(super) journal: Journal,
    pub(super) state: StateDir,
    pub(super) ownership: Ownership,
    /// Drivers that refused our XDP program, and how.
    pub(super) refused: BTreeMap<String, String>,
    pub(super) attached: BTreeSet<(u32, Hook)>,
    pub(super) history: History,
}

impl Gateway {
    /// The policy in force says what is probed, and no other device of probes stays.
    pub(super) async fn follow_health(&mut self) {
        let in_force = self.shared.in_force();
        let shared = Arc::clone(&self.shared);
        let publish = Arc::new(move || shared.publish_health());
        self.probers.follow(&self.host, &in_force.loaded.network, publish).await;
        // What changed while the policy was compiled.
        block_in_place(|| self.shared.publish_health());
    }

    /// Writes down who has which ports and addresses from now on. A disk that is full is no reason to change nothing.
    pub(super) fn note_history(&mut self) {
        let now = unix_seconds(SystemTime::now());
        let held = Holdings::of(&self.shared.in_force(), now);
        if let Err(error) = block_in_place(|| self.history.note(held, now)) {
            log::warn!("the allocation history in {} is not written: {error}", self.state.path().display());
        }
    }

    /// What putting this policy in force would change. Nothing is written, loaded or sent.
    pub async fn preview(&self, file: &Path, loaded: &Loaded) -> Result<Preview, Refusal> {
        let view = plan::look(&self.host, &self.journal).await?;
        let in_force = self.shared.in_force();
        let registry = self.shared.registry().clone();
        let generation = self.shared.datapath().generation().wrapping_add(1).max(1);
        block_in_place(|| {
            let (view, cut) = foreseen(view, &self.ownership, self.shared.flow_tables());
            let live = view.facts.live.clone();
            let plan = plan::plan(view, loaded, &registry, &self.ownership, generation, &self.refused)?;
            Ok(Preview { flows_cut_now: cut, ..preview::preview(file, &in_force, loaded, &plan, &live) })
        })
    }

    /// The grace of the first start, when it is over or the policy wants none any more.
    pub fn look_after_grace(&self) {
        if self.shared.in_force().loaded.network.adoption.grace_seconds == 0 {
            self.shared.end_grace("the policy wants no grace");
        }
        self.shared.datapath().end_grace_if_over();
    }

    /// Mirrors routes and neighbours.
    pub async fn refresh_world(&mut self) -> anyhow::Result<()> {
        world::refresh(&mut self.world, &self.host, &self.shared, &self.ownership, &self.state).await
    }

    /// A device of ours went away: whatever comes in its place has no program, even if it gets the same index.
    pub fn device_gone(&mut self, ifindex: u32) -> bool {
        let before = self.attached.len();
        self.attached.retain(|(known, _)| *known != ifindex);
        self.attached.len() != before
    }

    /// Devices or addresses changed: puts the same policy in force again if it would come to something else now.
    /// Says whether it did.
    pub async fn devices_changed(&mut self, must: bool) -> Result<bool, Refusal> {
        let in_force = self.shared.in_force();
        let view = plan::look(&self.host, &self.journal).await?;
        let network = with_probers(&in_force.loaded.network);
        let facts = plan::relevant(view.facts.clone(), &network).lasting();
        let choices =
            hosts::choose_hooks_without(&network, &view.links, &self.refused).map_err(Refusal::Host)?;
        let gone =
            must && in_force.choices.iter().any(|c| !self.attached.iter().any(|(i, _)| *i == c.ifindex));
        if facts != in_force.facts || choices != in_force.choices || gone {
            self.apply(in_force.file.clone(), Arc::clone(&in_force.loaded)).await?;
            return Ok(true);
        }
        // Links come up: addresses and routes that had to wait can be had now.
        let reserved = hosts::Ranges::new(in_force.compiled.reserved_ports.iter().copied());
        let network = &in_force.loaded.network;
        let prepared =
            hosts::prepare(&self.host, network, &view.links, &choices, &reserved, &mut self.journal).await?;
        for change in prepared.made {
            log::info!("changed: {change}");
        }
        Ok(false)
    }
}

/// Logs what was attached; what was there already is no news.
pub(super) fn tell(done: &Attached) {
    for line in done.describe() {
        let level = if line.ends_with("already") { log::Level::Debug } else { log::Level::Info };
        log::log!(level, "{line}");
    }
}
