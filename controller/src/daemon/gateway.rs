//! Start, change of policy, change of devices: what may change the kernel, in the order that keeps it closed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use super::drains::occupied;
use super::image::{attach_plan, policy_image};
use super::plan::{self, Plan};
use super::refusals::{names_xdp_on, refused_xdp, wants_auto};
use super::shared::{InForce, Order, Shared};
use super::state::{DYING, Saved, StateDir};
use super::world::{self, World};
use super::{Options, Preview, Refusal, preview};
use crate::compile::Ownership;
use crate::datapath::{self, AttachPlan, Attached, Datapath, Hook, LoadOptions};
use crate::flows::{ReaperCounts, reap};
use crate::hosts::{self, Host, Journal, Prepared};
use crate::observe::history::History;
use crate::observe::holdings::Holdings;
use crate::observe::time::{rfc3339, unix_seconds};
use crate::policy::Loaded;
use crate::probes::{Book, Probers, with_probers};

/// What putting a policy in force came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    pub file: String,
    pub generation: u32,
    pub applied_at: String,
    pub milliseconds: u64,
    /// Changes made on this host for it.
    pub changes: Vec<String>,
    pub warnings: Vec<String>,
    /// Findings in the file that are no errors, with carets.
    pub findings: String,
}

impl Applied {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = self.findings.clone();
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        for change in &self.changes {
            text += &format!("changed: {change}\n");
        }
        text +=
            &format!("{} is in force: generation {}, {} ms\n", self.file, self.generation, self.milliseconds);
        text
    }
}

/// The main task's own part of the daemon.
pub struct Gateway {
    pub shared: Arc<Shared>,
    pub world: World,
    probers: Probers,
    host: Host,
    journal: Journal,
    state: StateDir,
    pub(super) ownership: Ownership,
    /// Drivers that refused our XDP program, and how.
    refused: BTreeMap<String, String>,
    attached: BTreeSet<(u32, Hook)>,
    history: History,
}

impl Gateway {
    /// Puts the first policy in force and attaches. On an error nothing of it stays, unless an earlier daemon's
    /// datapath was adopted: that goes on.
    pub async fn start(
        options: Options,
        loaded: Loaded,
        state: StateDir,
        orders: mpsc::Sender<Order>,
    ) -> Result<Self, Refusal> {
        let host = Host::open()?;
        let mut journal = Journal::open(state.path())?;
        let saved = state.load()?;
        let loaded = Arc::new(loaded);
        let health = Arc::new(Book::open(state.path()));
        let mut probers = Probers::new(Arc::clone(&health));
        probers.prepare(&host, &loaded.network).await?;
        let view = plan::look(&host, &journal).await?.with_down(health.down());
        let plan = block_in_place(|| {
            plan::plan(view.clone(), &loaded, &saved.registry, &saved.ownership, 1, &BTreeMap::new())
        })?;
        let mut load = LoadOptions::for_flows(
            loaded.network.flow_table.max_flows,
            loaded.network.flow_table.max_flows_v6,
        );
        // The programs log every new flow at debug. Below that they are loaded without it, and it costs nothing.
        if log::max_level() >= log::LevelFilter::Debug {
            load.log_level = log::max_level();
        }
        let datapath = block_in_place(|| open(&options.pin_dir, &load))?;
        for note in datapath.notes() {
            log::warn!("{note}");
        }
        let adopted = datapath.adopted();
        let plan = if adopted {
            // Only now is it known which ports live flows stand on.
            block_in_place(|| {
                let tables = [&datapath.flow_table()?, &datapath.flow_table6()?];
                let view = occupied(view, &saved.ownership, tables);
                plan::plan(view, &loaded, &saved.registry, &saved.ownership, 1, &BTreeMap::new())
            })?
        } else {
            plan
        };
        let started = Self::first(datapath, &host, &mut journal, &state, &loaded, plan, &saved).await;
        let (datapath, plan, prepared, world, refused) = match started {
            Ok(started) => started,
            Err(refusal) => {
                if !adopted {
                    log::info!("the start failed: taking back what was done");
                    block_in_place(|| datapath::down(&options.pin_dir)).map(drop).unwrap_or_else(|error| {
                        log::warn!("{error:#}");
                    });
                    if let Err(error) = journal.undo_all(&host).await {
                        log::warn!("{error:#}");
                    }
                }
                return Err(refusal);
            }
        };
        let attached = attach_plan(&plan.choices).hooks();
        let ownership = plan.compiled.ownership.clone();
        let flows = [Arc::new(datapath.flow_table()?), Arc::new(datapath.flow_table6()?)];
        let reaper = Arc::new(ReaperCounts::default());
        // The mirror has added the world's next hops to the plan's ids.
        let registry = plan.registry.clone();
        let in_force =
            InForce::new(options.policy.clone(), loaded, plan, prepared.warnings, prepared.waiting);
        let tables = flows.clone();
        let shared =
            Arc::new(Shared::new(options, datapath, registry, in_force, flows, reaper, health, orders));
        reap(&tables, &shared.reaper, Arc::clone(&shared)).context("starting the reaper")?;
        let history = History::open(state.path());
        let mut gateway =
            Self { shared, world, probers, host, journal, state, ownership, refused, attached, history };
        gateway.note_history();
        gateway.follow_health().await;
        Ok(gateway)
    }

    /// Install, prepare, mirror, attach: tables are full before a program is attached (ADR 0003).
    async fn first(
        mut datapath: Datapath,
        host: &Host,
        journal: &mut Journal,
        state: &StateDir,
        loaded: &Loaded,
        mut plan: Plan,
        saved: &Saved,
    ) -> Result<(Datapath, Plan, Prepared, World, BTreeMap<String, String>), Refusal> {
        let mut refused = BTreeMap::new();
        let mut world = World::default();
        loop {
            let generation = datapath.generation().wrapping_add(1).max(1);
            plan::renumber(&mut plan.compiled, generation)?;
            // First of all on disk: the kernel must never know ids or owners that we have forgotten.
            state.save(&plan.registry, &plan.compiled.ownership)?;
            let installed = block_in_place(|| datapath.install(&policy_image(&plan)))?;
            for note in installed.notes {
                log::warn!("{note}");
            }
            // Before guests find a gateway here: a host that forwards would carry their packets on as they are.
            let wanted = attach_plan(&plan.choices);
            tell(&block_in_place(|| datapath.attach_tc(&wanted))?);
            let prepared =
                hosts::prepare(host, &loaded.network, &plan.links, &plan.choices, &plan.reserved(), journal)
                    .await?;
            let view = world::look(host, &plan.choices).await?;
            let Plan { registry, compiled, .. } = &mut plan;
            block_in_place(|| world.mirror(&view, &datapath, registry, &compiled.ownership, state))?;
            for (ifindex, router) in world.doubtful(&view) {
                let _ = host.probe(ifindex, router).await;
            }
            match block_in_place(|| datapath.attach(&wanted)) {
                Ok(done) => {
                    tell(&done);
                    block_in_place(|| commit(&mut datapath, done, &wanted))?;
                    stale(host, loaded, &plan, journal).await;
                    return Ok((datapath, plan, prepared, world, refused));
                }
                Err(error) => {
                    let Some(device) = refused_xdp(&error, &plan, loaded, &refused) else {
                        return Err(error.into());
                    };
                    log::warn!("{device} stays with TC: {error:#}");
                    refused.insert(device, format!("{:#}", error.root_cause()));
                    let view = plan::look(host, journal).await?;
                    plan = block_in_place(|| {
                        let tables = [&datapath.flow_table()?, &datapath.flow_table6()?];
                        let view = occupied(view, &saved.ownership, tables);
                        plan::plan(view, loaded, &saved.registry, &saved.ownership, generation, &refused)
                    })?;
                }
            }
        }
    }

    /// The policy in force says what is probed, and no other device of probes stays.
    async fn follow_health(&mut self) {
        let in_force = self.shared.in_force();
        let shared = Arc::clone(&self.shared);
        let publish = Arc::new(move || shared.publish_health());
        self.probers.follow(&self.host, &in_force.loaded.network, publish).await;
        // What changed while the policy was compiled.
        block_in_place(|| self.shared.publish_health());
    }

    /// Puts a policy in force. On an error the one before stays.
    pub async fn apply(&mut self, file: PathBuf, loaded: Arc<Loaded>) -> Result<Applied, Refusal> {
        let began = Instant::now();
        self.probers.prepare(&self.host, &loaded.network).await?;
        let down = self.shared.health.down();
        let view = plan::look(&self.host, &self.journal).await?.with_down(down);
        let mut retries = 0;
        let (plan, prepared) = loop {
            match self.attempt(view.clone(), &loaded).await {
                Ok(done) => break done,
                Err(refusal) => {
                    let before = self.refused.len();
                    if let Refusal::Failed(error) = &refusal
                        && let Some(device) = self.learn_refusal(error, &loaded)
                        && self.refused.len() > before
                        && retries < 64
                    {
                        retries += 1;
                        log::warn!("{device} stays with TC: {error:#}");
                        continue;
                    }
                    return Err(refusal);
                }
            }
        };
        let generation = plan.compiled.generation;
        let wanted = attach_plan(&plan.choices);
        self.attached = wanted.hooks();
        self.ownership = plan.compiled.ownership.clone();
        self.shared.set_registry(plan.registry.clone());
        let Prepared { made, mut warnings, waiting } = prepared;
        let findings = loaded.warnings.render(false);
        let in_force = InForce::new(file.clone(), loaded, plan, warnings.clone(), waiting);
        let applied_at = rfc3339(in_force.applied_at);
        self.shared.set_in_force(in_force);
        self.note_history();
        self.follow_health().await;
        // From here on the policy is in force; what fails now is tidying and is said, not undone.
        if let Err(error) = self.refresh_world().await {
            warnings.push(format!("routes to the world were not brought up to date: {error:#}"));
        }
        match block_in_place(|| self.shared.datapath_mut().detach_stale(&self.attached)) {
            Ok(removed) => removed.iter().for_each(|what| log::info!("detached {what}")),
            Err(error) => warnings.push(format!("devices that left the policy: {error:#}")),
        }
        let in_force = self.shared.in_force();
        let reserved = hosts::Ranges::new(in_force.compiled.reserved_ports.iter().copied());
        let (network, links) = (&in_force.loaded.network, &in_force.links);
        let undone = hosts::unprepare_stale(
            &self.host,
            network,
            links,
            &in_force.choices,
            &reserved,
            &mut self.journal,
        )
        .await;
        match undone {
            Ok(report) if !report.is_clean() => warnings.push(report.to_string()),
            Ok(_) => {}
            Err(error) => warnings.push(format!("{error:#}")),
        }
        Ok(Applied {
            file: file.display().to_string(),
            generation,
            applied_at,
            milliseconds: began.elapsed().as_millis() as u64,
            changes: made,
            warnings,
            findings,
        })
    }

    /// Writes down who has which ports and addresses from now on. A disk that is full is no reason to change nothing.
    fn note_history(&mut self) {
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
            let view = occupied(view, &self.ownership, self.shared.flow_tables());
            let live = view.facts.live.clone();
            let plan = plan::plan(view, loaded, &registry, &self.ownership, generation, &self.refused)?;
            Ok(preview::preview(file, &in_force, loaded, &plan, &live))
        })
    }

    async fn attempt(
        &mut self,
        view: plan::HostView,
        loaded: &Arc<Loaded>,
    ) -> Result<(Plan, Prepared), Refusal> {
        let generation = self.shared.datapath().generation().wrapping_add(1).max(1);
        let plan = {
            let registry = self.shared.registry().clone();
            block_in_place(|| {
                let view = occupied(view, &self.ownership, self.shared.flow_tables());
                plan::plan(view, loaded, &registry, &self.ownership, generation, &self.refused)
            })?
        };
        self.state.save(&plan.registry, &plan.compiled.ownership)?;
        // A new uplink is guarded before a new guest finds a gateway here, as at the first start.
        let guards = attach_plan(&plan.choices);
        tell(&block_in_place(|| self.shared.datapath_mut().attach_guards(&guards))?);
        let prepared = hosts::prepare(
            &self.host,
            &loaded.network,
            &plan.links,
            &plan.choices,
            &plan.reserved(),
            &mut self.journal,
        )
        .await;
        let outcome = match prepared {
            Ok(prepared) => block_in_place(|| self.switch(&plan)).map(|()| prepared),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(prepared) => Ok((plan, prepared)),
            Err(error) => {
                self.take_back().await;
                if let Err(error) = block_in_place(|| self.shared.datapath_mut().detach_stale(&self.attached))
                {
                    log::warn!("taking back the guards of new uplinks: {error:#}");
                }
                Err(error.into())
            }
        }
    }

    /// New devices get their programs, guards first, which leave them alone until the policy knows them; then the flip.
    fn switch(&self, plan: &Plan) -> anyhow::Result<()> {
        let mut datapath = self.shared.datapath_mut();
        let wanted = attach_plan(&plan.choices);
        let done =
            if wanted.hooks().is_subset(&self.attached) { None } else { Some(datapath.attach(&wanted)?) };
        match datapath.install(&policy_image(plan)) {
            Ok(installed) => {
                for note in installed.notes {
                    log::warn!("{note}");
                }
                if let Some(done) = done {
                    tell(&done);
                    datapath.commit(done)?;
                }
                Ok(())
            }
            Err(error) => {
                if let Some(done) = done {
                    datapath.undo(done);
                }
                Err(error)
            }
        }
    }

    /// After a failure: the host as the policy in force wants it, and its ownership on disk.
    async fn take_back(&mut self) {
        let in_force = self.shared.in_force();
        let reserved = hosts::Ranges::new(in_force.compiled.reserved_ports.iter().copied());
        let (network, links, choices) = (&in_force.loaded.network, &in_force.links, &in_force.choices);
        let undone =
            hosts::unprepare_stale(&self.host, network, links, choices, &reserved, &mut self.journal)
                .await
                .map(drop);
        let again =
            hosts::prepare(&self.host, network, links, choices, &reserved, &mut self.journal).await.map(drop);
        let saved = self.state.save(&self.shared.registry(), &self.ownership);
        for error in [undone, again, saved].into_iter().filter_map(Result::err) {
            log::warn!("going back to the policy in force: {error:#}");
        }
    }

    fn learn_refusal(&mut self, error: &anyhow::Error, loaded: &Loaded) -> Option<String> {
        let auto = |name: &str| wants_auto(loaded, name);
        let device =
            self.shared_devices(loaded).into_iter().find(|name| names_xdp_on(error, name) && auto(name))?;
        self.refused.insert(device.clone(), format!("{:#}", error.root_cause()));
        Some(device)
    }

    fn shared_devices(&self, loaded: &Loaded) -> Vec<String> {
        let uplinks = loaded.network.uplinks.iter().map(|uplink| uplink.device.clone());
        uplinks.chain(loaded.network.interfaces.iter().map(|interface| interface.device.clone())).collect()
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

/// Opens the datapath; waits for a killed daemon that still has the lock of its pins.
fn open(pins: &Path, load: &LoadOptions) -> anyhow::Result<Datapath> {
    let until = Instant::now() + DYING;
    loop {
        match Datapath::open(pins, load) {
            Err(error)
                if error.root_cause().downcast_ref() == Some(&Errno::EWOULDBLOCK)
                    && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Logs what was attached; what was there already is no news.
fn tell(done: &Attached) {
    for line in done.describe() {
        let level = if line.ends_with("already") { log::Level::Debug } else { log::Level::Info };
        log::log!(level, "{line}");
    }
}

fn commit(datapath: &mut Datapath, done: Attached, wanted: &AttachPlan) -> anyhow::Result<()> {
    for note in done.notes() {
        log::debug!("{note}");
    }
    datapath.commit(done)?;
    for what in datapath.detach_stale(&wanted.hooks())? {
        log::info!("detached {what}, of an earlier policy");
    }
    Ok(())
}

/// What an earlier daemon changed on the host and this policy does not want.
async fn stale(host: &Host, loaded: &Loaded, plan: &Plan, journal: &mut Journal) {
    let undone =
        hosts::unprepare_stale(host, &loaded.network, &plan.links, &plan.choices, &plan.reserved(), journal)
            .await;
    match undone {
        Ok(report) if report.is_empty() => {}
        Ok(report) => {
            log::info!("of an earlier policy: {}", report.to_string().trim_end().replace('\n', "; "))
        }
        Err(error) => log::warn!("{error:#}"),
    }
}
