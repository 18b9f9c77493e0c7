//! Packets of flows that exist: what forwarding costs, by who forwards and by how many flows there are.

use anyhow::Context as _;

use super::candidate::Candidates;
use super::figure::{Better, By, Figure};
use super::options::Options;
use super::plan::{Kind, Size, program_time_figure};
use super::report::{Report, Series};
use super::rig::Sample;
use super::section::Section;
use super::statistics::{median, paired_extra_ns};
use crate::stop;

pub(super) const SECTION: Section =
    Section { name: "established", title: "Packets of established flows", figures, measure };

const KINDS: [Kind; 7] =
    [Kind::Bare, Kind::Forward, Kind::Nftables, Kind::Iptables, Kind::Xdp, Kind::XdpRoomy, Kind::Tc];

/// Those with a program whose time can be told, the least of them first.
const TIMED: [Kind; 3] = [Kind::Bare, Kind::Xdp, Kind::Tc];

/// A table that is made for the flows is the default one or, for a million of them, as large as the roomy one.
fn sensible(kind: Kind, size: Size) -> bool {
    (kind, size) != (Kind::XdpRoomy, Size::Large)
}

fn figures() -> Vec<String> {
    let of = |size: Size| {
        let rates =
            KINDS.into_iter().filter(move |&kind| sensible(kind, size)).map(move |kind| kind.figure(size));
        rates.chain(TIMED.map(|kind| program_time_figure(kind, size)))
    };
    Size::ALL.into_iter().flat_map(of).collect()
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let measured = measure_kinds(&KINDS, options, report);
    for kind in KINDS {
        let rate = |size: Size| {
            let figure = report.figure(&kind.figure(size))?;
            Some((f64::from(size.flows(options.scale)), figure.value))
        };
        let points: Vec<(f64, f64)> = Size::ALL.into_iter().filter_map(rate).collect();
        if points.len() > 1 {
            report.series.push(Series {
                plot: "established".to_owned(),
                title: "Packets a second of established flows".to_owned(),
                name: kind.title().to_owned(),
                x_label: "live flows".to_owned(),
                unit: "Mpps".to_owned(),
                logarithmic: true,
                points,
            });
        }
    }
    measured
}

/// Measures these candidates with every number of flows.
pub(super) fn measure_kinds(kinds: &[Kind], options: &Options, report: &mut Report) -> anyhow::Result<()> {
    // What is only compared with does not make a size worth measuring.
    let asked_for = |size: Size| {
        let mut names = kinds.iter().flat_map(|&kind| [kind.figure(size), program_time_figure(kind, size)]);
        names.any(|name| options.wants(&name))
    };
    let wanted: Vec<Size> = Size::ALL.into_iter().filter(|&size| asked_for(size)).collect();
    for size in wanted {
        measure_size(kinds, size, options, report).with_context(|| format!("with {} flows", size.label()))?;
    }
    Ok(())
}

fn measure_size(all: &[Kind], size: Size, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let flows = size.flows(options.scale);
    let mut candidates = Candidates::new(size);
    let mut kinds = Vec::new();
    for &kind in all.iter().filter(|&&kind| sensible(kind, size) && is_needed(kind, size, options)) {
        if let Some(why) = Candidates::limit(kind, size, options) {
            options.tell(&format!("{}: not measured: {why}", kind.figure(size)));
            report.note(format!("{} was not measured: {why}", kind.figure(size)));
            continue;
        }
        stop::check()?;
        options.tell(&format!("{}: opening {flows} flows", kind.figure(size)));
        let verified = match candidates.open(kind, options).with_context(|| kind.title()) {
            Ok(verified) => verified,
            // There are kernels without it, and installations for another kernel.
            Err(error) if kind == Kind::Iptables && !stop::asked() => {
                report.note(format!("{} was not measured: {error:#}", kind.figure(size)));
                continue;
            }
            Err(error) => return Err(error),
        };
        if verified.live_flows < flows {
            let missing = flows - verified.live_flows;
            report.note(format!("{}: {missing} of {flows} flows were refused", kind.figure(size)));
        }
        report.verified.push(verified);
        kinds.push(kind);
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); kinds.len()];
    let rounds = options.each_round(&format!("{} flows", size.label()), |_| {
        let measured = measure_round(&mut candidates, &kinds, options)?;
        samples.iter_mut().zip(measured).for_each(|(samples, sample)| samples.push(sample));
        Ok(())
    });
    // Also those of the rounds before somebody interrupted it.
    if samples.iter().all(|rounds| !rounds.is_empty()) {
        push(&kinds, &samples, size, report);
    }
    rounds?;
    program_time(&mut candidates, &kinds, size, options, report)
}

/// The bare redirect and nftables always are: the others are given as shares of them.
fn is_needed(kind: Kind, size: Size, options: &Options) -> bool {
    matches!(kind, Kind::Bare | Kind::Nftables)
        || options.wants(&kind.figure(size))
        || options.wants(&program_time_figure(kind, size))
}

/// One round: the candidates in turns, and for each the mean of its turns.
fn measure_round(
    candidates: &mut Candidates,
    kinds: &[Kind],
    options: &Options,
) -> anyhow::Result<Vec<Sample>> {
    let mut sums = vec![Sample::default(); kinds.len()];
    let turns = options.turns.max(1);
    for turn in 0..turns {
        // Every turn begins with another one, so that nobody always comes after the same neighbour.
        for place in 0..kinds.len() {
            let at = (turn + place) % kinds.len();
            let sample = candidates.measure(kinds[at], options).with_context(|| kinds[at].title())?;
            sums[at].packets_per_second += sample.packets_per_second / turns as f64;
            sums[at].busy += sample.busy / turns as f64;
        }
    }
    Ok(sums)
}

fn push(kinds: &[Kind], samples: &[Vec<Sample>], size: Size, report: &mut Report) {
    let rates = |kind: Kind| -> Vec<f64> {
        let at = kinds.iter().position(|&k| k == kind);
        at.map(|at| samples[at].iter().map(|sample| sample.packets_per_second / 1e6).collect())
            .unwrap_or_default()
    };
    let (bare, nftables) = (rates(Kind::Bare), rates(Kind::Nftables));
    for (&kind, samples) in kinds.iter().zip(samples) {
        let rates = rates(kind);
        let mut figure = Figure::from_samples(kind.figure(size), "Mpps", &rates)
            .ratio_to_limit_of("the bare XDP redirect", &bare)
            .ratio_to_nftables_of(&nftables);
        if let Some((must, goal)) = kind.shares(size) {
            figure = figure.must(By::RatioToLimit, Better::More, must, goal);
        }
        if (kind, size) == (Kind::Tc, Size::Middle) {
            figure = figure.must(By::RatioToNftables, Better::More, 1.5, 2.0);
        }
        figure.busy = median(&samples.iter().map(|sample| sample.busy).collect::<Vec<_>>());
        figure.extra_ns = if kind == Kind::Bare { None } else { paired_extra_ns(&rates, &bare) };
        report.figures.push(figure);
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
    for kind in TIMED.into_iter().filter(|kind| kinds.contains(kind)) {
        stop::check()?;
        let samples = (0..options.rounds.min(3))
            .map(|_| candidates.program_time(kind, options))
            .collect::<anyhow::Result<Vec<f64>>>()?;
        let mut figure = Figure::from_samples(program_time_figure(kind, size), "ns", &samples);
        match bare {
            Some(bare) => figure.extra_ns = Some(figure.value - bare),
            None => bare = Some(figure.value),
        }
        report.figures.push(figure);
    }
    Ok(())
}
