//! What it costs to look after the flow table: processor time of a sweep, and what the datapath notices of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use portcullis::datapath::{Datapath, FlowTable, LoadOptions, now_tick};
use portcullis_common::clock::ticks;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, LIVE};
use portcullis_common::layout::{FlowKey, HalfRecord, KIND_FLOW};

use super::figure::{Better, By, Figure};
use super::options::Options;
use super::policy::Groups;
use super::portcullis::Portcullis;
use super::report::Report;
use super::section::Section;
use super::statistics::paired_ratio;
use crate::lab::BpfFs;
use crate::random::Random;
use crate::stop;

pub(super) const SECTION: Section =
    Section { name: "reaper", title: "Sweeping a million live flows", figures, measure };

const SWEEP: &str = "reaper_ms_per_million";
const ONE_WAY: &str = "reaper_one_way_ms_per_million";
const FREEING: &str = "reaper_freeing_ms_per_million";
const FORWARDED: &str = "reaper_forwarded_ms_per_million";
const RATE: &str = "reaper_swept_mpps";

fn figures() -> Vec<String> {
    [SWEEP, ONE_WAY, FREEING, FORWARDED, RATE].map(str::to_owned).into()
}

const MILLION: f64 = 1e6;
/// Sweeps of which a round's value is the mean.
const SWEEPS: u32 = 5;
/// Longer than anything is measured.
const IDLE: u32 = 3600;

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let flows = options.scale.pick(1 << 14, 1 << 20, 1 << 20);
    if [SWEEP, ONE_WAY, FREEING].iter().any(|name| options.wants(name)) {
        written(flows, options, report)?;
    }
    if [FORWARDED, RATE].iter().any(|name| options.wants(name)) {
        forwarded(flows, options, report)?;
    }
    Ok(())
}

/// Sweeps over a table that is filled from here.
fn written(flows: u32, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let pins = BpfFs::mount()?;
    let datapath = Datapath::open(&pins.path().join("portcullis"), &LoadOptions::for_flows(flows, 1024))?;
    let table = datapath.flow_table()?;
    let (mut both, mut one, mut freeing) = (Vec::new(), Vec::new(), Vec::new());
    options.each_round("sweeps", |_| {
        let now = now_tick();
        let (alive, silent) = (now.wrapping_add(ticks(IDLE)), now.wrapping_sub(ticks(IDLE)));
        let places = fill(&table, flows, alive, alive);
        both.push(per_million(flows, || sweeps(&table, flows * 2))?);
        fill_at(&table, &places, alive, silent);
        one.push(per_million(flows, || sweeps(&table, flows * 2))?);
        fill_at(&table, &places, silent, silent);
        freeing.push(per_million(flows, || {
            let swept = table.sweep(now_tick(), |_, _| {});
            ensure!(swept.freed == flows * 2, "a sweep over {flows} dead flows: {swept:?}");
            Ok(1)
        })?);
        Ok(())
    })?;
    let figure = |name, samples: &[f64]| {
        Figure::from_samples(name, "ms", samples).must(By::Value, Better::Less, 200.0, 50.0)
    };
    report.figures.push(figure(SWEEP, &both));
    report.figures.push(Figure::from_samples(ONE_WAY, "ms", &one));
    report.figures.push(Figure::from_samples(FREEING, "ms", &freeing));
    report.note(format!(
        "{SWEEP}: processor time (the thread's own clock) of a sweep over {flows} live flows, per million, in a table of {} \
         slots; of {ONE_WAY} only one direction has had packets lately, so that every other half-record's peer is looked at \
         too; of {FREEING} all are dead and freed.",
        table.slots(),
    ));
    Ok(())
}

/// Sweeps beside the datapath that made the flows and forwards their packets.
fn forwarded(flows: u32, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let groups = Groups::THOUSAND;
    let mut portcullis = Portcullis::build(super::portcullis::table_for(flows), groups, true)?;
    options.tell(&format!("opening {flows} flows"));
    portcullis.open_flows(flows, flows - flows / 10_000)?;
    let (mut cost, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    options.each_round("packets with and without sweeps", |_| {
        let (mut swept, mut quiet, mut took) = (0.0, 0.0, Vec::new());
        for _ in 0..options.turns {
            quiet += portcullis.rig.measure(flows, options.ramp, options.turn())?.packets_per_second;
            let (sample, sweeps) = while_sweeping(&mut portcullis, |portcullis| {
                portcullis.rig.measure(flows, options.ramp, options.turn())
            })?;
            swept += sample.packets_per_second;
            took.push(sweeps);
        }
        let turns = options.turns as f64 * MILLION;
        with.push(swept / turns);
        without.push(quiet / turns);
        cost.push(took.iter().sum::<f64>() / took.len() as f64 * MILLION / f64::from(flows));
        Ok(())
    })?;
    report.figures.push(Figure::from_samples(FORWARDED, "ms", &cost));
    let rate = Figure::from_samples(RATE, "Mpps", &with);
    report.figures.push(rate.ratio_to_limit_of("the same without sweeps", &without));
    if let Some(ratio) = paired_ratio(&with, &without) {
        report.note(format!(
            "{RATE}: {flows} flows visited at random while a thread sweeps their table without any pause: {:.1} % of the \
             packets without. The daemon's reaper works for at most 2 % of one processor's time where little dies.",
            ratio * 100.0,
        ));
    }
    Ok(())
}

/// Runs `work` while another thread sweeps again and again; and the mean processor time of these sweeps, milliseconds.
fn while_sweeping<T>(
    portcullis: &mut Portcullis,
    work: impl FnOnce(&mut Portcullis) -> anyhow::Result<T>,
) -> anyhow::Result<(T, f64)> {
    let table = portcullis.map_table()?;
    let (enough, sweeps, nanoseconds) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !enough.load(Ordering::Relaxed) && !stop::asked() {
                let began = processor_time();
                table.sweep(now_tick(), |_, _| {});
                nanoseconds.fetch_add((processor_time() - began).as_nanos() as u64, Ordering::Relaxed);
                sweeps.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = work(portcullis);
        enough.store(true, Ordering::Relaxed);
        done
    });
    let (sweeps, nanoseconds) = (sweeps.into_inner(), nanoseconds.into_inner());
    ensure!(sweeps > 0, "no sweep came to its end");
    Ok((done?, nanoseconds as f64 / 1e6 / sweeps as f64))
}

fn sweeps(table: &FlowTable, live: u32) -> anyhow::Result<u32> {
    for _ in 0..SWEEPS {
        let swept = table.sweep(now_tick(), |_, _| {});
        ensure!((swept.live, swept.freed) == (live, 0), "a sweep over {live} live halves: {swept:?}");
    }
    stop::check()?;
    Ok(SWEEPS)
}

/// Milliseconds of this thread's processor time for each of as many sweeps as `work` says it made.
fn per_million(flows: u32, work: impl FnOnce() -> anyhow::Result<u32>) -> anyhow::Result<f64> {
    let began = processor_time();
    let sweeps = work()?;
    let took = (processor_time() - began).as_secs_f64() * 1e3 / f64::from(sweeps);
    Ok(took * MILLION / f64::from(flows))
}

/// Of the calling thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it only writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Puts flows into slots drawn at random, as the datapath's hash would; both slots of each.
fn fill(table: &FlowTable, flows: u32, forward: u32, reverse: u32) -> Vec<(u32, u32)> {
    let mut slots: Vec<u32> = (0..table.slots()).collect();
    let mut random = Random(11);
    for i in 0..flows as usize * 2 {
        let other = i + random.below(slots.len() - i);
        slots.swap(i, other);
    }
    let places: Vec<(u32, u32)> =
        slots[..flows as usize * 2].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    fill_at(table, &places, forward, reverse);
    places
}

fn fill_at(table: &FlowTable, places: &[(u32, u32)], forward: u32, reverse: u32) {
    for (number, &(first, second)) in (0u32..).zip(places) {
        for (slot, peer, flag, deadline) in
            [(first, second, FLAG_FORWARD, forward), (second, first, 0, reverse)]
        {
            let key = FlowKey {
                source: number,
                destination: slot,
                kind: KIND_FLOW,
                protocol: 17,
                ..FlowKey::default()
            };
            let ctl = Ctl::new(1, LIVE, 0, 0, flag).0;
            // SAFETY: in bounds, and no program is attached that would use this table.
            unsafe { *table.slot(slot) = HalfRecord { key, ctl, peer, deadline, ..HalfRecord::default() } };
        }
    }
}
