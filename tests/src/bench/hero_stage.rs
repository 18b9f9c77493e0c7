//! Where the hero run takes place: the bench's namespaces with Portcullis in the gateway, its reaper, and two policies.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use portcullis::compile::{HostFacts, Ownership, Registry, compile};
use portcullis::datapath::{Datapath, FlowTable};
use portcullis::flows::{ReapedDatapath, ReaperCounts, reap};
use portcullis_common::Reason;
use portcullis_common::clock::ticks;
use portcullis_common::layout::{NextHop, Settings};

use super::policy::{self, Groups};
use super::portcullis::{Portcullis, facts_of, image};
use super::rig::Rig;
use super::rules::Fate;
use crate::lab::{BpfFs, Namespace};

/// Seconds that any flow may be idle. A policy has four minutes at least for flows with a port by an outbound rule, as Azure
/// has; so this is put into what the compiler makes of it.
pub(super) const IDLE: u32 = 5;

/// Rules of each group in the two policies.
const RULES: [usize; 2] = [20, 30];

/// The datapath, for the reaper and whoever changes the policy.
#[derive(Clone)]
struct Shared(Arc<RwLock<Datapath>>);

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Datapath> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReapedDatapath for Shared {
    fn next_hop(&self, index: u16) -> Option<NextHop> {
        self.read().next_hop(index).ok()
    }

    fn traffic(&self) -> (u64, u64) {
        let reasons = self.read().reasons().unwrap_or_default();
        let new_flows = reasons.get(Reason::NewFlow as usize).map_or(0, |count| count.packets);
        (new_flows, reasons.iter().map(|count| count.packets).sum())
    }
}

/// Packets that the devices around the gateway had no room for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Losses {
    /// On the way to it.
    before: u64,
    /// On the way from it.
    behind: u64,
}

impl Losses {
    /// What was lost since `earlier`.
    pub fn since(&self, earlier: &Losses) -> Losses {
        Losses { before: self.before - earlier.before, behind: self.behind - earlier.behind }
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Losses { before, behind } = self;
        write!(
            f,
            "The client's device had no room for {before} packets, the gateway's towards the server for {behind}"
        )
    }
}

/// The place, with the first policy in force and the reaper at work.
pub(super) struct Stage {
    pub rig: Rig,
    pub policies: Policies,
    pub client_ifindex: u32,
    /// Where the touching of flows and the numbers of connections go on.
    pub first_touch: u32,
    pub first_open: u32,
    /// Of IPv4 and of IPv6.
    pub tables: [Arc<FlowTable>; 2],
    pub reaper: Arc<ReaperCounts>,
    datapath: Shared,
    // The pins go last.
    _pins: BpfFs,
}

impl Stage {
    /// Builds it with a flow table for `max_flows` flows.
    pub fn build(max_flows: u32) -> anyhow::Result<Self> {
        let groups = RULES.map(|rules| Groups { rules, fate: Fate::Allowed });
        let (rig, datapath, pins) = Portcullis::build(max_flows, groups[0], true)?.into_parts();
        let tables = [Arc::new(datapath.flow_table()?), Arc::new(datapath.flow_table6()?)];
        let datapath = Shared(Arc::new(RwLock::new(datapath)));
        let policies = Policies::new(&rig, datapath.clone(), groups, max_flows)?;
        policies.flip()?;
        let reaper = Arc::new(ReaperCounts::default());
        reap(&tables, &reaper, datapath.clone()).context("starting the reaper")?;
        let (client, device) = rig.client();
        Ok(Self {
            client_ifindex: client.ifindex(device)?,
            rig,
            policies,
            first_touch: 0,
            first_open: 0,
            tables,
            reaper,
            datapath,
            _pins: pins,
        })
    }

    /// Packets by reason so far, in the order of [`Reason::ALL`].
    pub fn reasons(&self) -> anyhow::Result<Vec<u64>> {
        let reasons = self.datapath.read().reasons()?;
        Ok(Reason::ALL.iter().map(|reason| reasons[*reason as usize].packets).collect())
    }

    /// What the devices lost so far.
    pub fn losses(&self) -> anyhow::Result<Losses> {
        let (client, device) = self.rig.client();
        Ok(Losses {
            before: refused(client, device)?,
            behind: refused(&self.rig.gateway, &self.rig.outside.device)?,
        })
    }
}

impl Drop for Stage {
    /// The reaper has the datapath, and with it the hooks, for as long as it works.
    fn drop(&mut self) {
        self.reaper.stop();
        let patience = Instant::now() + Duration::from_secs(5);
        // Here, in the policies, and with the reaper.
        while Arc::strong_count(&self.datapath.0) > 2 && Instant::now() < patience {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Frames that a veth's other end had no room for.
fn refused(namespace: &Namespace, device: &str) -> anyhow::Result<u64> {
    let text = namespace.run(&["ethtool", "-S", device])?;
    let counts = text.lines().filter_map(|line| {
        let (name, count) = line.trim().split_once(": ")?;
        if name.ends_with("xdp_xmit_errors") { count.parse::<u64>().ok() } else { None }
    });
    Ok(counts.sum())
}

/// Two policies that take turns.
pub(super) struct Policies {
    texts: [String; 2],
    facts: HostFacts,
    known: RwLock<Known>,
    datapath: Shared,
}

/// What outlives a policy.
struct Known {
    registry: Registry,
    ownership: Ownership,
}

impl Policies {
    fn new(rig: &Rig, datapath: Shared, groups: [Groups; 2], max_flows: u32) -> anyhow::Result<Self> {
        let texts =
            groups.map(|groups| policy::text(&rig.inside.device, &rig.outside.device, max_flows, groups));
        let ports = [&rig.inside, &rig.outside];
        let facts = HostFacts {
            devices: ports.map(|port| (port.device.clone(), facts_of(port))).into(),
            ..HostFacts::default()
        };
        let known = Known { registry: Registry::default(), ownership: Ownership::default() };
        Ok(Self { texts, facts, known: RwLock::new(known), datapath })
    }

    /// From the text of the next policy to its being in force; how long that took.
    pub fn flip(&self) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let generation = self.datapath.read().generation() + 1;
        let loaded = portcullis::policy::parse("the hero run's policy", &self.texts[generation as usize % 2])
            .map_err(|problems| anyhow!("the hero run's policy: {problems}"))?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let Known { registry, ownership } = &mut *known;
        let mut compiled = compile(&loaded.network, &self.facts, registry, ownership, generation)
            .map_err(|errors| anyhow!("compiling the hero run's policy: {errors:?}"))?;
        *ownership = compiled.ownership.clone();
        soon_idle(&mut compiled.settings);
        let mut datapath = self.datapath.0.write().unwrap_or_else(PoisonError::into_inner);
        datapath.install(&image(compiled))?;
        Ok(began.elapsed())
    }

    /// Puts the other policy in force again and again, so far apart, until it is `enough`; how long each took.
    pub fn alternate(&self, apart: Duration, enough: &AtomicBool) -> anyhow::Result<Vec<Duration>> {
        let mut flips = Vec::new();
        let mut next = Instant::now() + apart;
        while !enough.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
            if Instant::now() >= next {
                flips.push(self.flip()?);
                next += apart;
            }
        }
        Ok(flips)
    }
}

/// Everybody is idle after the same short time.
fn soon_idle(settings: &mut Settings) {
    settings.idle = [ticks(IDLE); 16];
    settings.tcp_half_open = ticks(IDLE);
}
