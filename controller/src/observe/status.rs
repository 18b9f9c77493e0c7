//! `status`: what is in force, where it is attached, how it is doing.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use portcullis_common::Reason;
use portcullis_common::clock::passed;
use portcullis_common::layout::{
    HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, HOP_HOST, HOP_WORLD, HalfRecord,
    HalfRecord6, NextHop,
};
use portcullis_common::quota::share;
use serde::{Deserialize, Serialize};

use super::time::{rfc3339, seconds};
use crate::api::Failure;
use crate::compile::Registry;
use crate::daemon::{Before, InForce, Shared};
use crate::datapath::{FlowTable, GuestUse, GuestUses, HookState, ProgramInfo, address6, now_tick};
use crate::flows::{ReaperReport, address, live};
use crate::hosts::{DeviceChoice, DeviceRole, firewalls};

use super::balancing::{Balanced, balanced};
use super::drops::{Lost, losses};
use super::health::HealthEvent;

#[path = "status_text.rs"]
mod text;

/// How the gateway is doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub started_at: String,
    pub uptime_seconds: u64,
    pub policy_file: String,
    pub generation: u32,
    pub applied_at: String,
    /// Did this daemon take over a datapath that was running?
    pub adopted: bool,
    /// Flows that are older than the tables.
    #[serde(default)]
    pub older: Older,
    /// Why the last change did not come into force; `null` when all is well.
    pub last_error: Option<LastError>,
    pub devices: Vec<Device>,
    /// Devices the policy names that do not exist (yet).
    pub missing_devices: Vec<String>,
    pub next_hops: Vec<Hop>,
    pub routes: usize,
    /// The flow table of IPv4.
    pub flows: FlowUse,
    #[serde(rename = "flowsIPv6")]
    pub flows_v6: FlowUse,
    pub reaper: ReaperReport,
    /// Load balancing rules with their backends.
    pub balanced: Vec<Balanced>,
    /// What the kernel lost after a redirect by XDP in this network namespace, by its tracepoints.
    pub lost: Vec<Lost>,
    /// Other firewalls on this host, which forwarded packets bypass.
    pub firewalls: Vec<OtherFirewall>,
    pub warnings: Vec<String>,
    /// What is going wrong with guests' ports right now, the worst first.
    #[serde(default)]
    pub health_events: Vec<HealthEvent>,
    /// How often this daemon has looked for them.
    #[serde(default)]
    pub health_looks: u64,
    pub memory: Memory,
    /// The programs of this daemon's load.
    pub programs: Vec<Program>,
}

/// Flows that are older than the tables.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Older {
    #[serde(flatten)]
    pub before: Before,
    /// Connections adopted since the tables were made.
    pub adopted: u64,
    /// For how long connections are still adopted.
    pub grace_seconds: f64,
}

/// What went wrong last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastError {
    pub at: String,
    pub message: String,
    /// With carets, if it is about the policy file.
    pub details: Option<String>,
}

/// A device with programs of ours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    pub name: String,
    pub ifindex: u32,
    /// `guest` or `uplink`.
    pub role: String,
    /// What was chosen: `xdp` or `tc`.
    pub hook: String,
    pub why: String,
    pub warning: Option<String>,
    /// Do frames that XDP redirects into it arrive?
    pub xdp_redirect: bool,
    /// What the kernel says is attached.
    pub programs: Vec<Attachment>,
}

/// A program on a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// `xdp`, `ingress` or `egress`.
    pub hook: String,
    /// `link` or `netlink`.
    pub kind: String,
    pub program: String,
    pub program_id: u32,
    /// Runs since it was loaded; `null` while the kernel does not count (`sysctl kernel.bpf_stats_enabled`).
    pub run_count: Option<u64>,
    /// Every program at this hook in the order they run.
    pub chain: Vec<u32>,
}

/// A program of this load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Program {
    pub name: String,
    pub id: u32,
    pub verified_instructions: Option<u32>,
    pub run_count: u64,
    pub run_milliseconds: u64,
}

/// A next hop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    pub index: u16,
    /// `guest:vm1/ipconfig1`, `world:eth0/192.0.2.1`
    pub name: String,
    /// `guest`, `world` or `host`.
    pub kind: String,
    pub device: String,
    /// The guest's address, or the router's; 0.0.0.0 where every destination is its own next hop.
    pub address: IpAddr,
    /// `null` while it is not known.
    pub mac: Option<String>,
    pub resolved: bool,
    /// The policy says the hardware address.
    pub pinned: bool,
    /// XDP may redirect there.
    pub xdp: bool,
    /// Seconds for which XDP goes on trusting the hardware address; `null` is for ever, or not at all.
    pub fresh_seconds: Option<f64>,
    /// Guests only: what it holds of the flow table.
    #[serde(default)]
    pub flows: Option<GuestFlows>,
}

/// What a guest holds of the flow table (`flowTable.maxFlowsPerGuest`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestFlows {
    /// Dead ones that nobody has come by yet are among them.
    pub held: u32,
    pub most: u32,
    /// Of those opened from outside the latest, among which half-open ones are replaced.
    pub half_open: u32,
    pub most_half_open: u32,
    /// Packets that opened no flow because of it, since the tables were made.
    pub refused: u64,
    /// Half-open flows ended to make room for new ones, since then.
    pub replaced: u64,
}

/// A flow table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowUse {
    pub live: u64,
    /// Flows it was made for.
    pub capacity: u64,
    /// Live flows in a hundred of those.
    pub fill_percent: f64,
    /// Half-records there is room for.
    pub slots: u64,
}

/// Another firewall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherFirewall {
    pub name: String,
    pub evidence: String,
}

/// Bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// This process, the flow tables included once they have been read.
    pub resident_bytes: u64,
    /// The policy's tables in the kernel, about.
    pub policy_bytes: u64,
    /// Both tables.
    pub flow_table_bytes: u64,
}

/// Asks everybody.
pub fn status(shared: &Shared) -> Result<Status, Failure> {
    let in_force = shared.in_force();
    let registry = shared.registry().clone();
    let now = now_tick();
    let datapath = shared.datapath();
    let (hooks, programs, hops) = (datapath.hooks()?, datapath.program_info()?, datapath.next_hops()?);
    let older = Older {
        before: shared.before.clone(),
        adopted: datapath.reasons()?.get(Reason::Adopted as usize).map_or(0, |count| count.packets),
        grace_seconds: seconds(datapath.adopts_for()),
    };
    let (routes, lost, generation) = (datapath.routes()?.len(), datapath.lost()?, datapath.generation());
    drop(datapath);
    let [flows, flows_v6] = shared.flow_tables().map(|table| flow_use(table, now));
    let uses = shared.flow_tables()[0].guests();
    let trouble = shared.trouble();
    let (rules, blocked) = balanced(&in_force.loaded.network, &shared.health);
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_at: rfc3339(shared.started_at),
        uptime_seconds: shared.started.elapsed().as_secs(),
        policy_file: in_force.file.display().to_string(),
        generation,
        applied_at: rfc3339(in_force.applied_at),
        adopted: shared.adopted,
        older,
        last_error: trouble.map(|trouble| LastError {
            at: rfc3339(trouble.at),
            message: trouble.message,
            details: trouble.rendered,
        }),
        devices: in_force.choices.iter().map(|choice| device(choice, &hooks, &programs)).collect(),
        missing_devices: in_force.compiled.missing_devices.clone(),
        next_hops: hops
            .iter()
            .map(|(index, hop)| next_hop(&in_force, &registry, *index, hop, now, uses))
            .collect(),
        routes,
        reaper: shared.reaper.report(),
        balanced: rules,
        lost: losses(&lost, true),
        firewalls: firewalls(&in_force.links)
            .into_iter()
            .map(|found| OtherFirewall { name: found.name.to_owned(), evidence: found.evidence })
            .collect(),
        warnings: warnings(&in_force).into_iter().chain(blocked).chain(shared.host_warnings()).collect(),
        health_events: shared.health_log.events(),
        health_looks: shared.health_log.looks(),
        memory: Memory {
            resident_bytes: resident(),
            policy_bytes: in_force.compiled.memory_bytes as u64,
            flow_table_bytes: flows.slots * size_of::<HalfRecord>() as u64
                + flows_v6.slots * size_of::<HalfRecord6>() as u64,
        },
        programs: programs.into_iter().map(program).collect(),
        flows,
        flows_v6,
    })
}

fn flow_use(table: &FlowTable, now: u32) -> FlowUse {
    let (live, slots) = (live(table, now).count() as u64, u64::from(table.slots()));
    // A flow takes two half-records, and the table works well up to half full.
    let capacity = slots / 4;
    FlowUse { live, capacity, fill_percent: (live * 1000 / capacity.max(1)) as f64 / 10.0, slots }
}

fn device(choice: &DeviceChoice, hooks: &[HookState], programs: &[ProgramInfo]) -> Device {
    let counts: HashMap<u32, u64> = programs.iter().map(|program| (program.id, program.run_count)).collect();
    let ours = hooks.iter().filter(|state| state.ifindex == choice.ifindex && !state.dead);
    let attached = ours.map(|state| Attachment {
        hook: state.hook.label().to_owned(),
        kind: state.kind.to_owned(),
        program: state.program.clone(),
        program_id: state.program_id,
        run_count: counts.get(&state.program_id).copied().filter(|runs| *runs != 0),
        chain: state.chain.clone(),
    });
    Device {
        name: choice.name.clone(),
        ifindex: choice.ifindex,
        role: match choice.role {
            DeviceRole::Guest => "guest",
            DeviceRole::Uplink => "uplink",
        }
        .to_owned(),
        hook: choice.hook.to_string(),
        why: choice.why.clone(),
        warning: choice.warning.clone(),
        xdp_redirect: choice.xdp_redirect_ok,
        programs: attached.collect(),
    }
}

fn program(info: ProgramInfo) -> Program {
    Program {
        name: info.name,
        id: info.id,
        verified_instructions: info.verified_instructions,
        run_count: info.run_count,
        run_milliseconds: Duration::as_millis(&info.run_time) as u64,
    }
}

fn next_hop(
    in_force: &InForce,
    registry: &Registry,
    index: u16,
    hop: &NextHop,
    now: u32,
    uses: &GuestUses,
) -> Hop {
    let resolved = hop.flags & HOP_FLAG_RESOLVED != 0;
    let fresh = if passed(hop.fresh_until, now) { 0 } else { hop.fresh_until.wrapping_sub(now) };
    Hop {
        index,
        name: match hop.kind {
            HOP_HOST => "host".to_owned(),
            _ => registry.next_hop_key(index).unwrap_or("?").to_owned(),
        },
        kind: match hop.kind {
            HOP_HOST => "host",
            HOP_GUEST => "guest",
            HOP_WORLD => "world",
            _ => "none",
        }
        .to_owned(),
        device: if hop.ifindex == 0 { String::new() } else { in_force.device_name(hop.ifindex) },
        address: if hop.address6 == [0; 4] {
            IpAddr::V4(address(hop.address))
        } else {
            IpAddr::V6(address6(hop.address6))
        },
        mac: resolved.then(|| hop.mac.map(|byte| format!("{byte:02x}")).join(":")),
        resolved,
        pinned: hop.flags & HOP_FLAG_PINNED != 0,
        xdp: hop.flags & HOP_FLAG_XDP != 0,
        fresh_seconds: (resolved && hop.fresh_until != 0).then(|| seconds(fresh)),
        flows: (hop.kind == HOP_GUEST)
            .then(|| guest_flows(in_force, hop.address6 != [0; 4], uses.read(index))),
    }
}

/// What a guest holds beside what it may.
fn guest_flows(in_force: &InForce, v6: bool, used: GuestUse) -> GuestFlows {
    let table = &in_force.loaded.network.flow_table;
    let most = if v6 { table.max_flows_per_guest_v6 } else { table.max_flows_per_guest };
    GuestFlows {
        held: used.held,
        most,
        half_open: used.half_open,
        most_half_open: share(most),
        refused: used.refused,
        replaced: used.replaced,
    }
}

/// Everything the operator was told in the log and may have missed.
fn warnings(in_force: &InForce) -> Vec<String> {
    let mut warnings: Vec<String> = Vec::new();
    if !in_force.loaded.warnings.is_empty() {
        let (_, count) = in_force.loaded.warnings.counts();
        warnings.push(format!("{} has {count} warnings: see `portcullis check`", in_force.file.display()));
    }
    warnings.extend(in_force.choices.iter().filter_map(|choice| choice.warning.clone()));
    warnings.extend(in_force.warnings.iter().cloned());
    warnings.extend(in_force.waiting.iter().map(|device| format!("waiting for device {device}")));
    // Told apart by source address only, such guests reach each other without passing here (design §2).
    let mut guests: HashMap<&str, usize> = HashMap::new();
    for interface in &in_force.loaded.network.interfaces {
        *guests.entry(interface.device.as_str()).or_default() += 1;
    }
    let mut shared: Vec<_> = guests.into_iter().filter(|(_, guests)| *guests > 1).collect();
    shared.sort_unstable();
    warnings.extend(shared.into_iter().map(|(device, guests)| {
        format!("{guests} network interfaces share device {device}: they can reach and impersonate each other unseen")
    }));
    warnings
}

/// Resident memory of this process.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: asks a number of the C library.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages * u64::try_from(page).unwrap_or(4096)
}
