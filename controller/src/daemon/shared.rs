//! What the daemon's tasks share, and what answers are made of.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use portcullis_common::Reason;
use portcullis_common::layout::NextHop;
use portcullis_common::policy::Endpoint;
use tokio::sync::{mpsc, oneshot};

use super::{Applied, Before, Options, Preview};
use crate::api::Failure;
use crate::compile::lookup::Image;
use crate::compile::{Compiled, HostFacts, Registry, RuleInfo};
use crate::datapath::{Datapath, FlowTable};
use crate::flows::{ReapedDatapath, ReaperCounts};
use crate::hosts::{DeviceChoice, Links};
use crate::observe::events::EventLog;
use crate::observe::health::HealthLog;
use crate::policy::Loaded;
use crate::policy::network::Direction;
use crate::probes::Book;

/// A policy in force and what it came to on this host. Never changed, only replaced.
#[derive(Debug)]
pub struct InForce {
    /// Where it was read from.
    pub file: PathBuf,
    pub loaded: Arc<Loaded>,
    pub compiled: Compiled,
    /// What of this host it was compiled for.
    pub facts: HostFacts,
    pub links: Links,
    pub choices: Vec<DeviceChoice>,
    pub applied_at: SystemTime,
    /// What preparing the host could not do, and what the compiler found strange.
    pub warnings: Vec<String>,
    /// Devices that are awaited.
    pub waiting: Vec<String>,
    rules: HashMap<u32, usize>,
    /// Endpoint of each guest's next hop.
    hops: HashMap<u16, usize>,
    /// Interface and configuration in the policy of each endpoint.
    places: Vec<(usize, usize)>,
}

/// One address of one guest, as the tables number them.
#[derive(Debug, Clone)]
pub struct Guest<'a> {
    /// Number of its endpoint.
    pub number: usize,
    /// `vm1/ipconfig1`
    pub name: &'a str,
    /// `vm1`
    pub interface: &'a str,
    pub device: &'a str,
    /// Interface and configuration in the policy.
    pub place: (usize, usize),
    pub address: IpAddr,
    pub endpoint: Endpoint,
}

impl InForce {
    /// Puts together what is known of a policy that has come into force.
    pub fn new(
        file: PathBuf,
        loaded: Arc<Loaded>,
        plan: super::plan::Plan,
        warnings: Vec<String>,
        waiting: Vec<String>,
    ) -> Self {
        let super::plan::Plan { links, choices, facts, compiled, registry: _ } = plan;
        let rules = compiled.rules.iter().enumerate().map(|(i, rule)| (rule.id, i)).collect();
        let hops = compiled.guest_hops.iter().enumerate().map(|(i, hop)| (hop.index, i)).collect();
        let applied_at = SystemTime::now();
        // The compiler numbers the configurations in the policy's order; its names say the same once more.
        let interfaces = loaded.network.interfaces.iter().enumerate();
        let places = interfaces
            .flat_map(|(i, interface)| (0..interface.addresses.len()).map(move |c| (i, c)))
            .collect();
        let of_policy = compiled.warnings.iter().map(ToString::to_string);
        let warnings = warnings.into_iter().chain(of_policy).collect();
        Self {
            file,
            loaded,
            compiled,
            facts,
            links,
            choices,
            applied_at,
            warnings,
            waiting,
            rules,
            hops,
            places,
        }
    }

    /// The tables' image.
    pub fn image(&self) -> Image<'_> {
        Image { pages: &self.compiled.pages }
    }

    /// The rule with this id, if it is in force.
    pub fn rule(&self, id: u32) -> Option<&RuleInfo> {
        self.rules.get(&id).map(|&i| &self.compiled.rules[i])
    }

    /// The guest with this endpoint number.
    pub fn guest(&self, number: usize) -> Option<Guest<'_>> {
        let name = self.compiled.members.get(number)?;
        let place = *self.places.get(number)?;
        let interface = self.loaded.network.interfaces.get(place.0)?;
        let endpoint = self.image().endpoint(number as u32);
        let address = interface.addresses.get(place.1)?.address;
        Some(Guest {
            number,
            name,
            interface: &interface.name,
            device: &interface.device,
            place,
            address,
            endpoint,
        })
    }

    /// All guests, in the order of their numbers.
    pub fn guests(&self) -> impl Iterator<Item = Guest<'_>> {
        (0..self.compiled.members.len()).filter_map(|number| self.guest(number))
    }

    /// The guest behind a next hop.
    pub fn guest_of_hop(&self, hop: u16) -> Option<Guest<'_>> {
        self.guest(*self.hops.get(&hop)?)
    }

    /// Is there a guest of this name, `vm1` or `vm1/ipconfig1`?
    pub fn has_guest(&self, name: &str) -> bool {
        self.guests().any(|guest| guest.is_named(name))
    }

    /// The network's name by its id.
    pub fn network_name<'r>(&self, id: u16, registry: &'r Registry) -> &'r str {
        if id == 0 { "world" } else { registry.network_name(id).unwrap_or("?") }
    }

    /// The device with this index, by name.
    pub fn device_name(&self, ifindex: u32) -> String {
        let choice =
            self.choices.iter().find(|choice| choice.ifindex == ifindex).map(|choice| choice.name.clone());
        let link = || self.links.by_index(ifindex).map(|link| link.name.clone());
        choice.or_else(link).unwrap_or_else(|| format!("#{ifindex}"))
    }

    /// Who has this address: guests (by network), in the order of their numbers.
    pub fn guests_at(&self, address: IpAddr) -> impl Iterator<Item = Guest<'_>> {
        self.guests().filter(move |guest| guest.address == address)
    }
}

impl Guest<'_> {
    /// Is it called so, or the interface it belongs to?
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name || self.interface == name
    }
}

/// `web-nsg/Outbound/DenySmtp`; of a rule that has left the policy what the registry remembers; empty for none.
pub fn rule_text(in_force: &InForce, registry: &Registry, id: u32) -> String {
    match in_force.rule(id) {
        _ if id == 0 => String::new(),
        Some(rule) => format!("{}/{}/{}", rule.group, direction(rule.direction), short(&rule.name)),
        None => registry.rule_key(id).map_or_else(|| format!("rule {id}"), |key| format!("{key} (gone)")),
    }
}

/// The direction as the policy writes it.
pub fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "Inbound",
        Direction::Outbound => "Outbound",
    }
}

/// A rule's name without `securityRules/`.
pub fn short(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, name)| name)
}

/// What went wrong last.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// Is it about devices of this host? Then it ends when they are right again; else with the next policy.
    pub devices: bool,
    pub at: SystemTime,
    pub message: String,
    /// With carets, if it is about the policy.
    pub rendered: Option<String>,
}

/// Something only the main task may do.
#[derive(Debug)]
pub enum Order {
    /// Load a policy.
    Apply { file: PathBuf, done: oneshot::Sender<Result<Applied, Failure>> },
    /// Find out what loading a policy would change.
    Plan { file: PathBuf, done: oneshot::Sender<Result<Preview, Failure>> },
    /// End.
    Stop { done: oneshot::Sender<()> },
}

/// What all tasks have.
pub struct Shared {
    pub options: Options,
    pub started: Instant,
    pub started_at: SystemTime,
    /// Were there tables of an earlier daemon?
    pub adopted: bool,
    /// What became of flows that are older than the tables.
    pub before: Before,
    /// Written to while a policy is put in force; reading it is asking the kernel, which takes many at once.
    datapath: RwLock<Datapath>,
    registry: RwLock<Registry>,
    in_force: RwLock<Arc<InForce>>,
    trouble: Mutex<Option<Trouble>>,
    /// What of this host gets in the gateway's way, whatever the policy.
    host_warnings: Mutex<Vec<String>>,
    /// Of IPv4.
    pub flows: Arc<FlowTable>,
    pub flows6: Arc<FlowTable>,
    pub reaper: Arc<ReaperCounts>,
    pub health: Arc<Book>,
    pub events: EventLog,
    pub health_log: HealthLog,
    pub orders: mpsc::Sender<Order>,
}

impl ReapedDatapath for Arc<Shared> {
    fn next_hop(&self, index: u16) -> Option<NextHop> {
        self.datapath().next_hop(index).ok()
    }

    fn traffic(&self) -> (u64, u64) {
        // What cannot be read is no news.
        let reasons = self.datapath().reasons().unwrap_or_default();
        let new_flows = reasons.get(Reason::NewFlow as usize).map_or(0, |count| count.packets);
        (new_flows, reasons.iter().map(|count| count.packets).fold(0, u64::wrapping_add))
    }
}

impl Shared {
    /// Nothing behind these locks is written in parts, so a holder that panicked leaves nothing broken.
    pub fn new(
        options: Options,
        datapath: Datapath,
        registry: Registry,
        in_force: InForce,
        [flows, flows6]: [Arc<FlowTable>; 2],
        reaper: Arc<ReaperCounts>,
        health: Arc<Book>,
        orders: mpsc::Sender<Order>,
        before: Before,
    ) -> Self {
        Self {
            options,
            started: Instant::now(),
            started_at: SystemTime::now(),
            adopted: datapath.adopted(),
            before,
            datapath: RwLock::new(datapath),
            registry: RwLock::new(registry),
            in_force: RwLock::new(Arc::new(in_force)),
            trouble: Mutex::new(None),
            host_warnings: Mutex::new(Vec::new()),
            flows,
            flows6,
            reaper,
            health,
            events: EventLog::default(),
            health_log: HealthLog::default(),
            orders,
        }
    }

    /// The flow tables, of IPv4 and of IPv6.
    pub fn flow_tables(&self) -> [&FlowTable; 2] {
        [&self.flows, &self.flows6]
    }

    /// The datapath, to ask it something or to write a next hop.
    pub fn datapath(&self) -> RwLockReadGuard<'_, Datapath> {
        self.datapath.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The datapath, to change policy or hooks.
    pub fn datapath_mut(&self) -> RwLockWriteGuard<'_, Datapath> {
        self.datapath.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections older than the first start are not adopted any more: what has just been ended must not come back as one.
    pub fn end_grace(&self, why: &str) {
        let datapath = self.datapath();
        if datapath.adopts_for() != 0 {
            datapath.adopt_for(0);
            log::info!("connections older than the first start are not adopted any more: {why}");
        }
    }

    /// The ids.
    pub fn registry(&self) -> RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the ids.
    pub fn set_registry(&self, registry: Registry) {
        *self.registry.write().unwrap_or_else(PoisonError::into_inner) = registry;
    }

    /// The policy in force.
    pub fn in_force(&self) -> Arc<InForce> {
        Arc::clone(&self.in_force.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another policy is in force.
    pub fn set_in_force(&self, in_force: InForce) {
        *self.in_force.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(in_force);
    }

    /// Backends that are down get no new flows, in place: the policy stays the same generation. While another comes into
    /// force nothing is written; whoever puts it there calls this afterwards.
    pub fn publish_health(&self) {
        let mut datapath = self.datapath_mut();
        let compiled = &self.in_force().compiled;
        if datapath.generation() != compiled.generation {
            return;
        }
        if let Err(error) =
            datapath.write_pages(compiled.generation, &compiled.slot_pages(&self.health.down()))
        {
            log::error!("backends that are down still get new flows: {error:#}");
        }
    }

    /// What of this host gets in the gateway's way, as it was looked at last.
    pub fn host_warnings(&self) -> Vec<String> {
        self.host_warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers that, and logs what is new.
    pub fn set_host_warnings(&self, found: Vec<String>) {
        let mut known = self.host_warnings.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in found.iter().filter(|warning| !known.contains(warning)) {
            log::warn!("{warning}");
        }
        *known = found;
    }

    fn trouble_guard(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong since the last success.
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble_guard().clone()
    }

    /// Something went wrong, or (`None`) is right again.
    pub fn set_trouble(&self, trouble: Option<Trouble>) {
        *self.trouble_guard() = trouble;
    }

    /// The devices of this host are what the policy wants.
    pub fn devices_are_right(&self) {
        self.trouble_guard().take_if(|trouble| trouble.devices);
    }
}
