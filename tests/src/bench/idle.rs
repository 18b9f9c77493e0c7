//! The controller when there is nothing to do.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use aya::maps::{Array, MapData};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use portcullis::datapath::now_tick;
use portcullis_common::clock::ticks;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, LIVE};
use portcullis_common::layout::{ABI, BUCKET_SLOTS, Bucket, FlowKey, HalfRecord, KIND_FLOW};

use super::figure::{Better, By, Figure};
use super::options::Options;
use super::report::Report;
use super::section::Section;
use crate::edge::{Edge, LabPolicy, WithHook, binary};
use crate::lab::TopologySpec;
use crate::stop;

pub(super) const SECTION: Section = Section { name: "idle", title: "The idle controller", figures, measure };

const MEMORY: &str = "idle_anon_mib";
const EMPTY: &str = "idle_cpu_percent";
const FULL: &str = "idle_cpu_percent_1m";
const FULL_MEMORY: &str = "idle_anon_mib_1m";

fn figures() -> Vec<String> {
    [MEMORY, EMPTY, FULL_MEMORY, FULL].map(str::to_owned).into()
}

/// What flows of a default policy have, seconds: longer than is measured.
const IDLE: u32 = 240;
const MIB: f64 = 1024.0 * 1024.0;

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    if let Err(error) = binary() {
        report.note(format!("{MEMORY} and {EMPTY} were not measured: {error:#}"));
        return Ok(());
    }
    let second = Duration::from_secs(1);
    let (settle, window) =
        options.scale.pick((second / 5, second / 2), (2 * second, 5 * second), (20 * second, 60 * second));
    for (flows, memory, cpu) in
        [(0, MEMORY, EMPTY), (options.scale.pick(1 << 12, 1 << 20, 1 << 20), FULL_MEMORY, FULL)]
    {
        if !options.wants(memory) && !options.wants(cpu) {
            continue;
        }
        options.tell(&format!("{:.0} s with {flows} idle flows", (settle + window).as_secs_f64()));
        let spec = TopologySpec::clean_veth(2);
        let mut lab = LabPolicy::new(WithHook::Xdp);
        if flows > 0 {
            lab.extra = format!("flowTable: {{ maxFlows: {flows}, maxFlowsPerGuest: {flows} }}\n");
        }
        let mut edge = Edge::start(&spec, &lab.yaml(&spec))?;
        if flows > 0 {
            fill(&edge, flows)?;
            // That one has no reason to look into its table, for which no packet came. The next one does when it begins.
            edge.daemon.terminate()?;
            edge.restart()?;
        }
        rest(settle)?;
        let process = edge.daemon.pid().context("the daemon does not run")?;
        let (began, before) = (Instant::now(), processor_time(process)?);
        rest(window)?;
        let (took, spent) = (began.elapsed(), processor_time(process)? - before);
        let anonymous = anonymous(process)?;
        let live = edge.ask(&["status"])?["reaper"]["ipv4"]["live"].as_u64();
        ensure!(
            flows == 0 || live == Some(u64::from(flows) * 2),
            "the daemon's reaper knows of {live:?} half-records of {flows} flows"
        );
        let memory = Figure::once(memory, "MiB", anonymous as f64 / MIB);
        report.figures.push(memory.must(By::Value, Better::Less, 64.0, 64.0));
        let share = spent.as_secs_f64() / took.as_secs_f64() * 100.0;
        report.figures.push(Figure::once(cpu, "%", share).must(By::Value, Better::Less, 1.0, 0.2));
    }
    report.note(format!(
        "{MEMORY}, {EMPTY}: the daemon's anonymous memory (RssAnon) and its share of one processor with two guests, the default \
         flow table and no traffic; with _1m, a table for a million flows that is full of live ones."
    ));
    Ok(())
}

/// Sleeps, unless somebody asks to stop.
fn rest(time: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        stop::check()?;
        thread::sleep(Duration::from_millis(100).min(until.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// Writes flows into the daemon's table behind its back: half of each bucket. Nobody will look for them.
fn fill(edge: &Edge, flows: u32) -> anyhow::Result<()> {
    let pin = edge.daemon.spec().pin_dir.join(format!("v{ABI}/maps/FLOWS"));
    let map = aya::maps::Map::from_map_data(
        MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?,
    )?;
    let mut map: Array<MapData, Bucket> = map.try_into()?;
    let deadline = now_tick().wrapping_add(ticks(IDLE));
    let used = BUCKET_SLOTS as u32 / 2;
    for bucket in 0..flows * 2 / used {
        let mut slots = [HalfRecord::default(); BUCKET_SLOTS];
        for (place, slot) in (0u32..).zip(&mut slots[..used as usize]) {
            let flag = if place % 2 == 0 { FLAG_FORWARD } else { 0 };
            let key = FlowKey {
                source: bucket,
                destination: place,
                kind: KIND_FLOW,
                protocol: 17,
                ..FlowKey::default()
            };
            let peer = bucket * BUCKET_SLOTS as u32 + (place ^ 1);
            *slot = HalfRecord {
                key,
                ctl: Ctl::new(1, LIVE, 0, 0, flag).0,
                peer,
                deadline,
                ..HalfRecord::default()
            };
        }
        map.set(bucket, Bucket { slots }, 0).context("writing a bucket of flows")?;
    }
    Ok(())
}

/// What a process has used of the processors, in its own code and in the kernel, by threads that have ended too.
fn processor_time(process: u32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(process.try_into()?)).context("the daemon's clock")?;
    Ok(clock_gettime(clock).context("reading the daemon's clock")?.into())
}

/// Its anonymous memory, bytes: the flow table is the kernel's and does not count.
fn anonymous(process: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no RssAnon in the status of process {process}"))? * 1024)
}
