//! What happens when: signals, the policy file, devices, routes, questions that change something.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use futures::StreamExt as _;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::apply::Applied;
use super::gateway::Gateway;
use super::policy_file::{Stamp, TagFile, Watched};
use super::shared::{Order, Trouble};
use super::state::StateDir;
use super::{Options, Refusal, answers};
use crate::api::server;
use crate::hosts::{HostEvent, Watch};
use crate::observe::scrape;
use crate::policy::network::OnRuleChange;
use crate::policy::{self, Loaded};
use crate::privileges::Helper;

/// How long to wait for more of the same before reacting to a change on the host.
const QUIET: Duration = Duration::from_millis(100);
/// ... but no longer than this.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the policy file is looked at; a change has to stand still for one look.
const LOOK: Duration = Duration::from_millis(400);
/// How often routers are confirmed, three times within the time XDP trusts them.
const CONFIRM: Duration = Duration::from_secs(20);
/// How often ports that drain are looked at.
const DRAINS: Duration = Duration::from_secs(10);

/// What has changed on the host and was not acted on yet.
#[derive(Debug, Default)]
struct Pending {
    since: Option<Instant>,
    latest: Option<Instant>,
    /// Devices or addresses.
    devices: bool,
    /// A device of ours went away.
    gone: bool,
}

impl Pending {
    fn note(&mut self, devices: bool) {
        let now = Instant::now();
        self.since.get_or_insert(now);
        self.latest = Some(now);
        self.devices |= devices;
    }

    fn due(&self) -> Option<Instant> {
        Some((self.latest? + QUIET).min(self.since? + PATIENCE))
    }
}

/// Starts everything and lives until a signal or `down`.
pub async fn live(
    options: Options,
    loaded: Loaded,
    stamp: Option<Stamp>,
    state: StateDir,
    helper: Helper,
) -> Result<(), Refusal> {
    // Before the first look at the host, or a change in between would be missed.
    let mut watch = Watch::open()?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    let (orders, mut commands) = mpsc::channel(8);
    let (socket, mut file) = (options.socket.clone(), options.policy.clone());
    let door = match &options.metrics {
        Some(place) => Some(scrape::Door::open(place).await?),
        None => None,
    };
    let mut gateway = Gateway::start(options, loaded, state, orders).await?;
    // What is left of the start, whoever gets hold of this process from now on has four capabilities.
    block_in_place(|| drop(helper));
    let shared = Arc::clone(&gateway.shared);
    match shared.datapath().events() {
        Ok(events) => _ = tokio::spawn(crate::observe::events::follow(events, Arc::clone(&shared))),
        Err(error) => log::warn!("drops will not be shown one by one: {error:#}"),
    }
    let health = tokio::spawn(crate::observe::health::watch(Arc::clone(&shared)));
    let metrics = door.map(|door| tokio::spawn(scrape::serve(door, Arc::clone(&shared))));
    if log::log_enabled!(log::Level::Debug) {
        match shared.datapath_mut().kernel_log() {
            Ok(Some(lines)) => _ = tokio::spawn(lines.run()),
            Ok(None) => {}
            Err(error) => log::warn!("the programs' own log is not shown: {error:#}"),
        }
    }
    let listener = server::bind(&socket)?;
    let server = tokio::spawn(server::serve(listener, Arc::new(answers::Answers(Arc::clone(&shared)))));
    announce_ready(&gateway);
    tell_supervisor();

    let mut watched = Watched::new(stamp);
    let mut tags = TagFile::default();
    let mut looks = interval(LOOK);
    let mut confirmations = interval(CONFIRM);
    let mut drains = interval(DRAINS);
    drains.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    confirmations.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pending = Pending::default();
    let mut watching = true;
    loop {
        let due = pending.due();
        tokio::select! {
            _ = terminate.recv() => { log::info!("SIGTERM"); break }
            _ = interrupt.recv() => { log::info!("SIGINT"); break }
            _ = hangup.recv() => {
                log::info!("SIGHUP: reading {} again", file.display());
                watched = Watched::new(Stamp::of(&file));
                reload(&mut gateway, file.clone()).await;
            }
            order = commands.recv() => match order {
                Some(Order::Apply { file: other, done }) => {
                    let stamp = Stamp::of(&other);
                    let outcome = load_and_apply(&mut gateway, other.clone()).await;
                    if outcome.is_ok() {
                        if other != file {
                            log::info!("{} is watched from now on, until the next start", other.display());
                        }
                        file = other;
                        watched = Watched::new(stamp);
                    }
                    // Whoever asked may have gone.
                    let _ = done.send(outcome.map_err(|refusal| refusal.failure()));
                }
                Some(Order::Plan { file, done }) => {
                    let outcome = match policy::load(&file) {
                        Ok(loaded) => gateway.preview(&file, &loaded).await,
                        Err(found) => Err(Refusal::Policy(found)),
                    };
                    let _ = done.send(outcome.map_err(|refusal| refusal.failure()));
                }
                Some(Order::Stop { done }) => {
                    log::info!("told to stop");
                    let _ = done.send(());
                    // The answer is on its way out.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    break;
                }
                None => break,
            },
            event = watch.next(), if watching => match event {
                Some(event) => note(&mut pending, &mut gateway, &event),
                None => {
                    watching = false;
                    log::error!("the kernel tells of no more changes of devices and routes; looking every 20 s instead");
                }
            },
            _ = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                let Pending { devices, gone, .. } = std::mem::take(&mut pending);
                host_changed(&mut gateway, devices, gone).await;
            }
            _ = looks.tick() => {
                let tag_file = gateway.shared.in_force().loaded.network.tag_file.clone();
                if watched.look(Stamp::of(&file)) {
                    log::info!("{} has changed", file.display());
                    reload(&mut gateway, file.clone()).await;
                } else if tags.look(tag_file.as_deref()) {
                    log::info!("the tag file has changed");
                    reload(&mut gateway, file.clone()).await;
                }
            }
            _ = drains.tick() => {
                drains_over(&mut gateway).await;
                gateway.look_after_grace();
            }
            _ = confirmations.tick() => host_changed(&mut gateway, !watching, false).await,
        }
    }
    server.abort();
    health.abort();
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    shared.reaper.stop();
    // Nobody is to find a socket that does not answer.
    let _ = std::fs::remove_file(&socket);
    if let Some(scrape::Place::Unix(path)) = &shared.options.metrics {
        let _ = std::fs::remove_file(path);
    }
    log::info!(
        "stopped; the datapath keeps running with generation {}: `portcullis run` takes it over, `portcullis down` \
         removes it",
        shared.datapath().generation()
    );
    Ok(())
}

fn announce_ready(gateway: &Gateway) {
    let in_force = gateway.shared.in_force();
    for choice in &in_force.choices {
        log::info!("{}: {} ({})", choice.name, choice.hook, choice.why);
        if let Some(warning) = &choice.warning {
            log::warn!("{}: {warning}", choice.name);
        }
    }
    for warning in &in_force.warnings {
        log::warn!("{warning}");
    }
    for device in &in_force.compiled.missing_devices {
        log::warn!("device {device} does not exist yet: its guests are served as soon as it does");
    }
    log::info!(
        "ready: {} is in force as generation {}{}",
        in_force.file.display(),
        in_force.compiled.generation,
        if gateway.shared.adopted { ", over the flows of the datapath that was running" } else { "" }
    );
}

/// Tells systemd, if that has started us, that what waits for the gateway may go on: the policy is in force.
fn tell_supervisor() {
    if let Err(error) = sd_notify::notify(false, &[NotifyState::Ready]) {
        log::warn!("the service manager was not told that the gateway is ready: {error}");
    }
}

/// What an event of the host means for us.
fn note(pending: &mut Pending, gateway: &mut Gateway, event: &HostEvent) {
    match event {
        HostEvent::LinkGone { ifindex, .. } => {
            pending.gone |= gateway.device_gone(*ifindex);
            pending.note(true);
        }
        HostEvent::Link { .. } | HostEvent::Address { .. } | HostEvent::Lost => pending.note(true),
        HostEvent::Route { .. } | HostEvent::Rule => pending.note(false),
        // Guests come and go; only routers matter here.
        HostEvent::Neighbour { neighbour, .. } if gateway.world.uses(neighbour) => pending.note(false),
        HostEvent::Neighbour { .. } => {}
    }
}

async fn host_changed(gateway: &mut Gateway, devices: bool, gone: bool) {
    if devices {
        let outcome = gateway.devices_changed(gone).await;
        if outcome.is_ok() {
            gateway.shared.devices_are_right();
        }
        match outcome {
            Ok(true) => {
                let generation = gateway.shared.in_force().compiled.generation;
                log::info!("devices or addresses of this host changed: generation {generation} is in force");
            }
            Ok(false) => {}
            Err(refusal) => {
                log::error!(
                    "devices of this host changed and the policy could not follow: {}",
                    refusal.message()
                );
                trouble(gateway, &refusal, true);
            }
        }
    }
    if let Err(error) = gateway.refresh_world().await {
        log::error!("routes to the world were not brought up to date: {error:#}");
    }
}

async fn drains_over(gateway: &mut Gateway) {
    match gateway.look_after_drains().await {
        Ok(true) => {
            let generation = gateway.shared.in_force().compiled.generation;
            gateway.shared.devices_are_right();
            log::info!("ports that drained are free: generation {generation} is in force");
        }
        Ok(false) => {}
        Err(refusal) => {
            log::error!("ports that drained could not be handed out again: {}", refusal.message());
            trouble(gateway, &refusal, true);
        }
    }
}

async fn load_and_apply(gateway: &mut Gateway, file: PathBuf) -> Result<Applied, Refusal> {
    let outcome = match policy::load(&file) {
        Ok(loaded) => {
            if loaded.network.on_rule_change == OnRuleChange::Reevaluate {
                gateway.shared.end_grace("changed rules end flows");
            }
            gateway.apply(file.clone(), Arc::new(loaded)).await
        }
        Err(found) => Err(Refusal::Policy(found)),
    };
    match &outcome {
        Ok(applied) => {
            for warning in &applied.warnings {
                log::warn!("{warning}");
            }
            log::info!(
                "{} is in force: generation {}, {} ms",
                applied.file,
                applied.generation,
                applied.milliseconds
            );
            gateway.shared.set_trouble(None);
        }
        Err(refusal) => {
            if let Some(rendered) = refusal.rendered() {
                log::error!("{}", rendered.trim_end());
            }
            log::error!("{}; the policy before stays in force", refusal.message());
            trouble(gateway, refusal, false);
        }
    }
    outcome
}

async fn reload(gateway: &mut Gateway, file: PathBuf) {
    // Said in the log and in `status`.
    let _ = load_and_apply(gateway, file).await;
}

fn trouble(gateway: &Gateway, refusal: &Refusal, devices: bool) {
    let trouble =
        Trouble { devices, at: SystemTime::now(), message: refusal.message(), rendered: refusal.rendered() };
    gateway.shared.set_trouble(Some(trouble));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_changes_is_acted_on_once_and_not_put_off_for_ever() {
        let mut pending = Pending::default();
        assert_eq!(pending.due(), None);
        pending.note(false);
        let first = pending.since.unwrap();
        assert!(!pending.devices);
        pending.note(true);
        assert!(pending.devices);
        pending.latest = Some(first + Duration::from_secs(3));
        assert_eq!(pending.due(), Some(first + PATIENCE));
    }
}
