//! Where the time of a packet goes: each way through the XDP program by itself, with `BPF_PROG_TEST_RUN`, and how it grows
//! with live flows and with rules.
//!
//! Every packet is run once (a second run would find what the first one wrote into it); what a frame costs that is
//! given up at the first look is taken off. *Hot* is always the same packet, or new flows in the order of their numbers;
//! *random* packets are drawn from all flows, so that caches are cold.

mod packets;

use anyhow::{Context as _, ensure};
use portcullis::datapath::{FlowTable, LoadOptions};
use portcullis_common::engine::Hook;

use self::packets::Packets;
use super::figure::Figure;
use super::instructions::Instructions;
use super::options::Options;
use super::policy::{self, Groups};
use super::portcullis::{end_all, table_for};
use super::report::{Report, Series};
use super::rules::{Fate, MOST};
use super::section::Section;
use super::statistics::median;
use crate::backend::{Backend as _, KernelBackend};
use crate::stop;

pub(super) const SECTION: Section = Section {
    name: "stages",
    title: "What each way through the program costs, and how it grows",
    figures,
    measure,
};

/// Guests' and world's device.
const DEVICES: [&str; 2] = ["vm", "up"];
const DROP: u32 = 1;
const REDIRECT: u32 = 4;

/// Each is measured hot and random.
const WAYS: [&str; 5] = ["established", "from_uplink", "new_flow", "refused_syn", "denied"];

fn name(way: &str, random: bool) -> String {
    format!("stage_{way}_{}", if random { "random" } else { "hot" })
}

fn figures() -> Vec<String> {
    let of = |way: &str| {
        [false, true]
            .map(|random| [name(way, random), name(way, random) + "_instructions"])
            .into_iter()
            .flatten()
    };
    WAYS.into_iter().flat_map(of).collect()
}

/// What a packet costs, the mean of many.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    nanoseconds: f64,
    instructions: Option<f64>,
}

impl Cost {
    fn less(self, other: Cost) -> Cost {
        Cost {
            nanoseconds: self.nanoseconds - other.nanoseconds,
            instructions: self.instructions.zip(other.instructions).map(|(a, b)| a - b),
        }
    }
}

/// The programs with a policy, and packets for them.
struct Stage<'a> {
    backend: &'a KernelBackend,
    table: FlowTable,
    inside: u32,
    outside: u32,
    instructions: Option<Instructions>,
    packets: Packets,
}

impl<'a> Stage<'a> {
    fn new(backend: &'a KernelBackend) -> anyhow::Result<Self> {
        let [inside, outside] = DEVICES.map(|device| &backend.gateway.devices[device]);
        Ok(Self {
            backend,
            table: backend.datapath.flow_table()?,
            inside: inside.ifindex,
            outside: outside.ifindex,
            instructions: Instructions::count().ok(),
            packets: Packets { inside: inside.mac, outside: outside.mac },
        })
    }

    /// Runs each frame once, all of which have to have this verdict.
    fn cost(&self, frames: &[Vec<u8>], ifindex: u32, verdict: u32) -> anyhow::Result<Cost> {
        let so_far = || self.instructions.as_ref().map(Instructions::so_far).transpose();
        let (mut nanoseconds, before) = (0, so_far()?);
        for frame in frames {
            let (outcome, took) = self.backend.datapath.time_xdp(frame, ifindex, 1)?;
            ensure!(
                outcome.verdict == verdict,
                "verdict {} instead of {verdict}: {:?}",
                outcome.verdict,
                self.backend.counters()?
            );
            nanoseconds += took.as_nanos();
        }
        stop::check()?;
        let counted = so_far()?.zip(before).map(|(after, before)| (after - before) as f64);
        let count = frames.len() as f64;
        Ok(Cost { nanoseconds: nanoseconds as f64 / count, instructions: counted.map(|all| all / count) })
    }

    /// The same less what a frame costs that nobody looks at.
    fn net(&self, frames: &[Vec<u8>], ifindex: u32, verdict: u32) -> anyhow::Result<Cost> {
        let nothing = vec![self.packets.nothing(); frames.len().min(2000)];
        Ok(self.cost(frames, ifindex, verdict)?.less(self.cost(&nothing, self.inside, DROP)?))
    }

    /// Makes flows live by their first datagrams; returns what an answer to each of `these` looks like.
    fn open(&self, flows: u32, these: &[u32]) -> anyhow::Result<Vec<Vec<u8>>> {
        let send = |flow| -> anyhow::Result<Vec<u8>> {
            let (outcome, _) =
                self.backend.datapath.time_xdp(&self.packets.datagram(flow), self.inside, 1)?;
            ensure!(
                outcome.verdict == REDIRECT,
                "flow {flow}: verdict {}: {:?}",
                outcome.verdict,
                self.backend.counters()?
            );
            Ok(outcome.packet)
        };
        for flow in 0..flows {
            send(flow)?;
            if flow % 4096 == 0 {
                stop::check()?;
            }
        }
        these
            .iter()
            .map(|&flow| self.packets.answer(&send(flow)?).context("what came out is a datagram"))
            .collect()
    }

    /// Established flows and their answers, hot and random, with so many flows live.
    fn established(&self, live: u32, count: usize) -> anyhow::Result<[Cost; 4]> {
        let drawn = packets::drawn(live, count);
        let answers = self.open(live, &drawn)?;
        let frames: Vec<Vec<u8>> = drawn.iter().map(|&flow| self.packets.datagram(flow)).collect();
        Ok([
            self.net(&vec![frames[0].clone(); count], self.inside, REDIRECT)?,
            self.net(&frames, self.inside, REDIRECT)?,
            self.net(&vec![answers[0].clone(); count], self.outside, REDIRECT)?,
            self.net(&answers, self.outside, REDIRECT)?,
        ])
    }

    /// New flows, hot and random; none are left.
    fn new_flows(&self, count: usize) -> anyhow::Result<[Cost; 2]> {
        let mut costs = [Cost::default(); 2];
        for (cost, random) in costs.iter_mut().zip([false, true]) {
            *cost = self.net(&self.packets.syns(count, random), self.inside, REDIRECT)?;
            end_all(&self.table)?;
        }
        Ok(costs)
    }

    /// SYNs of a guest who has no port left towards where they go, hot and random; its flows are left.
    fn refused(&self, count: usize) -> anyhow::Result<[Cost; 2]> {
        let more = (0..=u16::MAX).find_map(|number| {
            match self.backend.datapath.time_xdp(&self.packets.crowded(number), self.inside, 1) {
                Ok((outcome, _)) if outcome.verdict == REDIRECT => None,
                Ok(_) => Some(Ok(number)),
                Err(error) => Some(Err(error)),
            }
        });
        let first = more.context("the guest's ports never end")??;
        let others: Vec<Vec<u8>> =
            (0..count).map(|i| self.packets.crowded(first.wrapping_add(i as u16 % 20_000))).collect();
        Ok([
            self.net(&vec![others[0].clone(); count], self.inside, DROP)?,
            self.net(&others, self.inside, DROP)?,
        ])
    }

    /// Denied datagrams, hot and random.
    fn denied(&self, count: usize) -> anyhow::Result<[Cost; 2]> {
        let frames: Vec<Vec<u8>> =
            packets::drawn(1 << 17, count).iter().map(|&flow| self.packets.datagram(flow)).collect();
        Ok([
            self.net(&vec![frames[0].clone(); count], self.inside, DROP)?,
            self.net(&frames, self.inside, DROP)?,
        ])
    }
}

/// Runs `work` with a policy and a flow table with room for so many flows.
fn with<T: Send>(
    groups: Groups,
    flows: u32,
    work: impl FnOnce(&mut KernelBackend) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let buckets = LoadOptions::for_flows(table_for(flows), 1024).flow_buckets;
    KernelBackend::with_table(&text(groups), &DEVICES, Hook::Xdp, buckets, work)
}

fn text(groups: Groups) -> String {
    let [inside, outside] = DEVICES;
    policy::text(inside, outside, super::portcullis::default_table(), groups)
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    if let Err(error) = Instructions::count() {
        report.note(format!(
            "Instructions per packet were not measured: perf_event_open of PERF_COUNT_HW_INSTRUCTIONS: {error}"
        ));
    }
    ways(options, report)?;
    // The series are wanted by whoever wants the section.
    if options.only.is_empty() {
        by_flows(options, report)?;
        by_rules(options, report)?;
    }
    Ok(())
}

/// Packets of a measurement.
fn count(options: &Options) -> usize {
    options.scale.pick(64, 2000, 20_000)
}

fn ways(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let count = count(options);
    let live = options.scale.pick(1 << 10, 1 << 16, 1 << 16);
    let mut samples: Vec<[Cost; 10]> = Vec::new();
    let denied = with(Groups { fate: Fate::Denied, ..Groups::THOUSAND }, live, |backend| {
        let stage = Stage::new(backend)?;
        (0..options.rounds).map(|_| stage.denied(count)).collect::<anyhow::Result<Vec<_>>>()
    })?;
    let measured = with(Groups::THOUSAND, live, |backend| {
        let stage = Stage::new(backend)?;
        // The first use of everything is not a measurement.
        stage.new_flows(count)?;
        options.each_round("each way", |round| {
            let [new_hot, new_random] = stage.new_flows(count)?;
            let [hot, random, uplink_hot, uplink_random] = stage.established(live, count)?;
            let [refused_hot, refused_random] = stage.refused(count)?;
            end_all(&stage.table)?;
            let [denied_hot, denied_random] = denied[round];
            samples.push([
                hot,
                random,
                uplink_hot,
                uplink_random,
                new_hot,
                new_random,
                refused_hot,
                refused_random,
                denied_hot,
                denied_random,
            ]);
            Ok(())
        })
    });
    let names = WAYS.into_iter().flat_map(|way| [name(way, false), name(way, true)]);
    for (i, name) in names.enumerate().filter(|_| !samples.is_empty()) {
        let nanoseconds: Vec<f64> = samples.iter().map(|costs| costs[i].nanoseconds).collect();
        let instructions: Vec<f64> = samples.iter().filter_map(|costs| costs[i].instructions).collect();
        report.figures.push(Figure::from_samples(name.as_str(), "ns", &nanoseconds));
        if !instructions.is_empty() {
            report.figures.push(Figure::from_samples(name + "_instructions", "instructions", &instructions));
        }
    }
    measured
}

fn by_flows(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let exponents: &[u32] = options.scale.pick(&[10, 11], &[10, 16], &[10, 12, 14, 16, 18, 20, 22]);
    let count = count(options);
    let mut points: [Vec<(f64, f64)>; 2] = Default::default();
    for &exponent in exponents {
        let live = 1 << exponent;
        let mut samples: [Vec<f64>; 2] = Default::default();
        with(Groups::THOUSAND, live, |backend| {
            let stage = Stage::new(backend)?;
            options.each_round(&format!("{live} live flows"), |_| {
                let [_, random, _, uplink_random] = stage.established(live, count)?;
                samples[0].push(random.nanoseconds);
                samples[1].push(uplink_random.nanoseconds);
                Ok(())
            })
        })?;
        for (points, samples) in points.iter_mut().zip(&samples) {
            points.push((f64::from(live), median(samples).unwrap_or_default()));
        }
    }
    let names = ["of an established flow", "the answer to it"];
    push_series(
        report,
        "growth-flows",
        "A packet of a random flow, by live flows",
        "live flows",
        &names,
        points.into(),
    );
    Ok(())
}

fn by_rules(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let steps: &[usize] = options.scale.pick(&[1, 20], &[1, 1000], &[1, 10, 100, 1000, MOST]);
    let count = count(options);
    let mut points: [Vec<(f64, f64)>; 4] = Default::default();
    for &rules in steps {
        let mut samples: [Vec<f64>; 4] = Default::default();
        with(Groups { rules, fate: Fate::Allowed }, 0, |backend| {
            options.each_round(&format!("{rules} rules"), |_| {
                backend.change(&text(Groups { rules, fate: Fate::Allowed }))?;
                let allowed = Stage::new(backend)?.new_flows(count)?;
                backend.change(&text(Groups { rules, fate: Fate::Denied }))?;
                let denied = Stage::new(backend)?.denied(count)?;
                let costs = allowed.into_iter().chain(denied);
                samples.iter_mut().zip(costs).for_each(|(samples, cost)| samples.push(cost.nanoseconds));
                Ok(())
            })
        })?;
        for (points, samples) in points.iter_mut().zip(&samples) {
            points.push((rules as f64, median(samples).unwrap_or_default()));
        }
    }
    let names = ["new flow, hot", "new flow, random", "denied, hot", "denied, random"];
    push_series(
        report,
        "growth-rules",
        "A packet that both groups judge, by their rules",
        "rules in each of both groups",
        &names,
        points.into(),
    );
    Ok(())
}

fn push_series(
    report: &mut Report,
    plot: &str,
    title: &str,
    x: &str,
    names: &[&str],
    points: Vec<Vec<(f64, f64)>>,
) {
    for (name, points) in names.iter().zip(points) {
        report.series.push(Series {
            plot: plot.to_owned(),
            title: title.to_owned(),
            name: (*name).to_owned(),
            x_label: x.to_owned(),
            unit: "ns".to_owned(),
            logarithmic: true,
            points,
        });
    }
}
