//! From options to a report: every size, every round, every candidate.

use anyhow::{Context as _, bail};

use super::candidate::Candidates;
use super::plan::{Kind, Options, Size, program_time_figure};
use super::report::{Figure, Report, machine};
use super::rig::Sample;
use super::statistics::{median, paired_extra_ns, paired_ratio, spread};
use crate::lab::why_unavailable;
use crate::stop;

/// Runs the bench. Needs root; leaves nothing behind, also when it is interrupted.
pub fn run(mut options: Options) -> anyhow::Result<Report> {
    if let Some(reason) = why_unavailable() {
        bail!("{reason}");
    }
    options.narrow()?;
    stop::listen(nix::sys::signal::SaFlags::empty())?;
    let options = &options;
    let mut report = Report { machine: machine(), ..Report::default() };
    tell(options, "building the namespaces and loading the programs");
    let mut candidates = Candidates::build(options)?;
    for &size in &options.sizes {
        measure_size(&mut candidates, size, options, &mut report)
            .with_context(|| format!("with {} flows", size.label()))?;
    }
    report.machine.push(("load average after".to_owned(), load_average()));
    Ok(report)
}

fn measure_size(
    candidates: &mut Candidates,
    size: Size,
    options: &Options,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut kinds = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|&kind| options.wants(kind, size)) {
        if let Some(why) = candidates.limit(kind, size) {
            tell(options, &format!("{}: not measured: {why}", kind.figure(size)));
            report.notes.push(format!("{} was not measured: {why}", kind.figure(size)));
            continue;
        }
        tell(options, &format!("{}: opening {} flows", kind.figure(size), size.flows()));
        let verified = candidates.open(kind, size).with_context(|| kind.title())?;
        if verified.live_flows < size.flows() {
            let missing = size.flows() - verified.live_flows;
            report.notes.push(format!(
                "{}: {missing} of {} flows were refused",
                kind.figure(size),
                size.flows()
            ));
        }
        report.verified.push(verified);
        kinds.push(kind);
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); kinds.len()];
    for round in 0..options.rounds {
        for (kind, (samples, sample)) in
            kinds.iter().zip(samples.iter_mut().zip(measure_round(candidates, &kinds, size, options)?))
        {
            tell(
                options,
                &format!(
                    "{}: round {} of {}: {:.3} Mpps, gateway's thread {:.0} % busy",
                    kind.figure(size),
                    round + 1,
                    options.rounds,
                    sample.packets_per_second / 1e6,
                    sample.busy * 100.0
                ),
            );
            samples.push(sample);
        }
    }
    figures(&kinds, &samples, size, options, report);
    if options.program_time {
        program_time(candidates, &kinds, size, options, report)?;
    }
    Ok(())
}

/// One round: the candidates in turns, and for each the mean of its turns.
fn measure_round(
    candidates: &mut Candidates,
    kinds: &[Kind],
    size: Size,
    options: &Options,
) -> anyhow::Result<Vec<Sample>> {
    let mut sums = vec![Sample::default(); kinds.len()];
    let turns = options.turns.max(1);
    for turn in 0..turns {
        // Every turn begins with another one, so that nobody always comes after the same neighbour.
        for place in 0..kinds.len() {
            let at = (turn + place) % kinds.len();
            let sample = candidates.measure(kinds[at], size, options).with_context(|| kinds[at].title())?;
            sums[at].packets_per_second += sample.packets_per_second / turns as f64;
            sums[at].busy += sample.busy / turns as f64;
        }
    }
    Ok(sums)
}

fn figures(kinds: &[Kind], samples: &[Vec<Sample>], size: Size, options: &Options, report: &mut Report) {
    let rates = |kind: Kind| -> Option<Vec<f64>> {
        let at = kinds.iter().position(|&k| k == kind)?;
        Some(samples[at].iter().map(|sample| sample.packets_per_second / 1e6).collect())
    };
    let (bare, nftables) = (rates(Kind::Bare), rates(Kind::Nftables));
    for (&kind, samples) in kinds.iter().zip(samples) {
        let Some(rates) = rates(kind) else { continue };
        let name = kind.figure(size);
        let ratio = |to: &Option<Vec<f64>>| to.as_ref().and_then(|to| paired_ratio(&rates, to));
        report.figures.push(Figure {
            value: median(&rates).unwrap_or_default(),
            unit: "Mpps",
            rounds: rates.len(),
            spread: spread(&rates),
            busy: median(&samples.iter().map(|sample| sample.busy).collect::<Vec<_>>()),
            ratio_to_limit: ratio(&bare),
            ratio_to_nftables: ratio(&nftables),
            extra_ns: bare
                .as_ref()
                .filter(|_| kind != Kind::Bare)
                .and_then(|bare| paired_extra_ns(&rates, bare)),
            must: None,
            goal: kind.goal(size),
            asked_for: options.reports(&name),
            samples: rates,
            name,
        });
    }
}

fn program_time(
    candidates: &mut Candidates,
    kinds: &[Kind],
    size: Size,
    options: &Options,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut bare = None;
    for kind in [Kind::Bare, Kind::Xdp].into_iter().filter(|kind| kinds.contains(kind)) {
        let name = program_time_figure(kind, size);
        let samples = (0..options.rounds.min(3))
            .map(|_| candidates.program_time(kind, size, options))
            .collect::<anyhow::Result<Vec<f64>>>()?;
        let value = median(&samples).unwrap_or_default();
        tell(options, &format!("{name}: {value:.1} ns"));
        if kind == Kind::Bare {
            bare = Some(value);
        }
        report.figures.push(Figure {
            value,
            unit: "ns",
            rounds: samples.len(),
            spread: spread(&samples),
            busy: None,
            ratio_to_limit: None,
            ratio_to_nftables: None,
            extra_ns: bare.filter(|_| kind != Kind::Bare).map(|bare| value - bare),
            must: None,
            goal: None,
            asked_for: options.reports(&name),
            samples,
            name,
        });
    }
    Ok(())
}

pub(super) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

fn tell(options: &Options, line: &str) {
    // Not worth a word if somebody has asked to stop.
    if options.progress && !stop::asked() {
        eprintln!("bench: {line}");
    }
}
