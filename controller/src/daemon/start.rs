//! The first policy of a daemon: what may change the kernel, in the order that keeps it closed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use super::drains::occupied;
use super::gateway::{Gateway, tell};
use super::image::{attach_plan, policy_image};
use super::older::{self, Before};
use super::plan::{self, Plan};
use super::refusals::refused_xdp;
use super::shared::{InForce, Order, Shared};
use super::state::{DYING, Saved, StateDir};
use super::world::{self, World};
use super::{Options, Refusal};
use crate::conntrack::Takeover;
use crate::datapath::{self, AttachPlan, Attached, Datapath, LoadOptions};
use crate::flows::{ReaperCounts, reap};
use crate::hosts::{self, Host, Journal, Prepared};
use crate::observe::history::History;
use crate::policy::Loaded;
use crate::probes::{Book, Probers};

/// What a start has come to.
struct Started {
    datapath: Datapath,
    plan: Plan,
    prepared: Prepared,
    world: World,
    refused: BTreeMap<String, String>,
    before: Before,
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
        if let Err(error) = probers.enter() {
            // A policy without probes does without; one with them says so.
            log::debug!("no namespace for health probes: {error:#}");
        }
        probers.prepare(&host, &loaded.network).await?;
        let view = plan::look(&host, &journal).await?.with_down(health.down());
        let plan = block_in_place(|| {
            plan::plan(view.clone(), &loaded, &saved.registry, &saved.ownership, 1, &BTreeMap::new())
        })?;
        let mut load = LoadOptions::for_flows(
            loaded.network.flow_table.max_flows,
            loaded.network.flow_table.max_flows_v6,
        );
        load.reset = options.reset;
        // The programs log every new flow at debug. Below that they are loaded without it, and it costs nothing.
        if log::max_level() >= log::LevelFilter::Debug {
            load.log_level = log::max_level();
        }
        let datapath = block_in_place(|| open(&options.pin_dir, &load))?;
        for note in datapath.notes() {
            log::warn!("{note}");
        }
        let (adopted, migrating) = (datapath.adopted(), datapath.is_migrating());
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
        let Started { datapath, plan, prepared, world, refused, before } = match started {
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
                } else if migrating {
                    log::info!("the upgrade failed: what ran before runs on");
                    block_in_place(|| datapath::abandon(&options.pin_dir)).map(drop).unwrap_or_else(
                        |error| {
                            log::warn!("{error:#}");
                        },
                    );
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
        let shared = Arc::new(Shared::new(
            options, datapath, registry, in_force, flows, reaper, health, orders, before,
        ));
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
    ) -> Result<Started, Refusal> {
        let mut refused = BTreeMap::new();
        let mut world = World::default();
        let grace = loaded.network.adoption.grace_seconds;
        let mut takeover = None;
        loop {
            let generation = datapath.generation().wrapping_add(1).max(1);
            plan::renumber(&mut plan.compiled, generation)?;
            // First of all on disk: the kernel must never know ids or owners that we have forgotten.
            state.save(&plan.registry, &plan.compiled.ownership)?;
            let installed = block_in_place(|| datapath.install(&policy_image(&plan)))?;
            for note in installed.notes {
                log::warn!("{note}");
            }
            if !datapath.adopted() && grace != 0 && takeover.is_none() {
                // Before any program of ours: the flow is there when its next packet is.
                let view = world::look(host, &plan.choices).await?;
                let Plan { registry, compiled, .. } = &mut plan;
                block_in_place(|| world.mirror(&view, &datapath, registry, &compiled.ownership, state))?;
                older::know_guests(host, &datapath, &plan).await?;
                let mut first = block_in_place(|| Takeover::new(&datapath, &plan.compiled))?;
                older::look(&mut first);
                takeover = Some(first);
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
                    let mut before = Before::default();
                    if let Some(mut takeover) = takeover {
                        older::look(&mut takeover);
                        log::info!("{}", takeover.taken());
                        before.taken_over = Some(takeover.taken().clone());
                        datapath.adopt_for(grace);
                        log::info!("connections that need no translation of ports are adopted for {grace} s");
                    }
                    before.migrated = block_in_place(|| datapath.finish_migration())?;
                    if let Some(migrated) = before.migrated {
                        log::info!("{migrated}");
                    }
                    block_in_place(|| commit(&mut datapath, done, &wanted))?;
                    stale(host, loaded, &plan, journal).await;
                    return Ok(Started { datapath, plan, prepared, world, refused, before });
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
