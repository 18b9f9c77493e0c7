//! The hero run, after that of DASH: many live flows that are touched just often enough, as many new connections on top
//! as go without loss, and another policy every second.
//!
//! Live flows are UDP of 1,024 sockets. A new connection is a SYN with a port of its own; nobody answers, and it is as
//! idle as anybody after the same five seconds. The client's processor has the generator, the controller (policy, compiler,
//! installation) and the reaper; the other one forwards. The generator keeps to the clock, and makes up for what is late
//! with no more under way than half of a veth's ring holds: so a gateway that is too slow makes it late, not lossy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use portcullis_common::Reason;

use super::figure::Figure;
use super::hero_end::{End, watch};
use super::hero_stage::{Losses, Stage};
use super::layout::{Hero, HeroSent, SECOND_NS, Seen};
use super::napi;
use super::options::Options;
use super::report::Report;
use super::rig::{DESTINATION, difference, network_order};
use super::section::Section;
use crate::stop;

pub(super) const SECTION: Section = Section { name: "hero", title: "The hero run", figures, measure };

fn figures() -> Vec<String> {
    ["hero_cps", "hero_flip_ms", "hero_gone_s", "hero_free_s", "hero_swept_s"].map(str::to_owned).into()
}

/// Every flow is touched once in this time.
const ROUND: Duration = Duration::from_secs(4);
/// Connections keep their numbers apart for longer than any of them lives, and below the last port.
const OPEN_MASK: u32 = (1 << 25) - 1;
/// More than any gateway takes.
const NO_LIMIT: u64 = 5_000_000;
/// So much longer than it should a generator may take at most before it is stopped.
const PATIENCE: Duration = Duration::from_secs(10);
/// Packets under way have arrived after this.
const SETTLED: Duration = Duration::from_millis(100);
/// Another policy this often.
const FLIP: Duration = Duration::from_secs(1);
/// Attempts to open all live flows without a loss.
const OPENINGS: usize = 4;
/// Attempts to hold a rate, each with less.
const ATTEMPTS: usize = 4;

/// How large it is.
struct Plan {
    live: u32,
    /// What the flow table is made for.
    max_flows: u32,
    /// How fast the live flows are opened, packets a second.
    opening: u64,
    probe: Duration,
    probes: usize,
    /// The rate to hold if there are no probes.
    rate: u64,
    hold: Duration,
    /// A generator that ends later by more than this share of the time has not kept its rate.
    late: f64,
}

impl Plan {
    fn of(options: &Options) -> Self {
        let scale = options.scale;
        let second = Duration::from_secs(1);
        Self {
            live: scale.pick(2_000, 250_000, 250_000),
            max_flows: scale.pick(1 << 15, 1 << 21, 1 << 21),
            opening: scale.pick(8_000, 250_000, 250_000),
            probe: scale.pick(second, 3 * second, 7 * second),
            probes: scale.pick(0, 2, 6),
            rate: 1_000,
            hold: scale.pick(second, 10 * second, 60 * second),
            // Whether it works does not depend on who else is at work.
            late: scale.pick(f64::INFINITY, 0.01, 0.01),
        }
    }

    fn touches(&self) -> u64 {
        u64::from(self.live) * 1000 / ROUND.as_millis() as u64
    }
}

/// What was sent in some time and what became of it.
pub(super) struct Phase {
    sent: HeroSent,
    seen: Seen,
    took: Duration,
    /// When the last packet was sent.
    ended: Instant,
    /// Packets by reason, those of none left out.
    counted: Vec<(Reason, u64)>,
    losses: Losses,
    flips: Vec<Duration>,
}

impl Phase {
    fn lost(&self) -> i64 {
        (self.sent.touched + self.sent.opened) as i64 - self.seen.packets as i64
    }

    fn counted(&self, reason: Reason) -> u64 {
        self.counted.iter().find(|(one, _)| *one == reason).map_or(0, |(_, count)| *count)
    }

    /// Why this was no run without loss; nothing if it was. `exactly`: no touched flow may have been opened again.
    fn fault(&self, length: Duration, most_late: f64, exactly: bool) -> Option<String> {
        let (HeroSent { touched, opened, .. }, seen) = (self.sent, self.seen);
        let datagrams = seen.packets - seen.connections;
        let late = self.took.as_secs_f64() / length.as_secs_f64() - 1.0;
        let (new, old) = (self.counted(Reason::NewFlow), self.counted(Reason::Forwarded));
        if (datagrams, seen.connections) != (touched, opened) {
            let counted: Vec<String> =
                self.counted.iter().map(|(reason, count)| format!("{count} {}", reason.label())).collect();
            return Some(format!(
                "of {touched} datagrams {datagrams} arrived and of {opened} SYNs {}; {}; the datapath counted {}",
                seen.connections,
                self.losses,
                counted.join(", ")
            ));
        }
        if seen.translated != seen.packets {
            return Some(format!("{} of {} packets were translated", seen.translated, seen.packets));
        }
        if exactly && (new, old) != (opened, touched) {
            return Some(format!(
                "{opened} SYNs opened {new} flows, {touched} datagrams met {old} live ones"
            ));
        }
        (late > most_late).then(|| format!("it took {:.1} % longer than it should have", late * 100.0))
    }
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    // What this starts stays on the generator's processor; the bench's other sections begin from everywhere.
    let measured = thread::scope(|scope| {
        let run = scope.spawn(|| {
            napi::keep_this_thread(napi::processors().0)?;
            run(options)
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let Held { rate, phase, end, most } = measured;
    let milliseconds: Vec<f64> = phase.flips.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    let longest = milliseconds.iter().copied().fold(0.0, f64::max);
    report.figures.push(Figure::once("hero_cps", "/s", rate as f64));
    report.figures.push(Figure::from_samples("hero_flip_ms", "ms", &milliseconds));
    report.figures.push(Figure::once("hero_gone_s", "s", end.gone.as_secs_f64()));
    report.figures.push(Figure::once("hero_free_s", "s", end.free.as_secs_f64()));
    report.figures.push(Figure::once("hero_swept_s", "s", end.swept.as_secs_f64()));
    let most = most.map(|most| format!(" The most it took in any short run was {most:.0} a second."));
    report.note(format!(
        "hero run: {rate} connections a second for {:.0} s: {} SYNs and {} datagrams sent, as many arrived translated, each \
         SYN as a flow of its own with its own port and each datagram as one of a live flow. {} policies came into force \
         meanwhile, within {longest:.0} ms at most. {}.{} After the last deadline: for the datapath every flow was gone in \
         {:.2} s, every port free in {:.2} s (a socket's mapping outlives its flows by an eighth of their time), and the \
         reaper had freed every slot in {:.2} s.",
        phase.took.as_secs_f64(),
        phase.sent.opened,
        phase.sent.touched,
        phase.flips.len(),
        phase.losses,
        most.unwrap_or_default(),
        end.gone.as_secs_f64(),
        end.free.as_secs_f64(),
        end.swept.as_secs_f64(),
    ));
    Ok(())
}

/// A rate that held.
struct Held {
    rate: u64,
    phase: Phase,
    end: End,
    /// Connections a second when nothing but the gateway was in the way.
    most: Option<f64>,
}

fn run(options: &Options) -> anyhow::Result<Held> {
    let plan = Plan::of(options);
    let mut stage = Stage::build(plan.max_flows)?;
    let (mut rate, mut most) = (plan.rate, None);
    if plan.probes > 0 {
        open(&mut stage, &plan)?;
        let free = phase(&mut stage, &plan, plan.touches(), NO_LIMIT, plan.probe)?;
        let taken = free.sent.opened as f64 / free.took.as_secs_f64();
        options.tell(&format!("at most {taken:.0} connections a second, {} lost", free.lost()));
        most = Some(taken);
        rate = search(options, &mut stage, &plan, taken as u64)?;
    }
    for _ in 0..ATTEMPTS {
        options.tell(&format!("holding {rate} connections a second for {:?}", plan.hold));
        open(&mut stage, &plan)?;
        let phase = phase(&mut stage, &plan, plan.touches(), rate, plan.hold)?;
        let Some(fault) = phase.fault(plan.hold, plan.late, true) else {
            options.tell("held; waiting for the end of all flows");
            let end = watch(&stage, phase.ended)?;
            return Ok(Held { rate, phase, end, most });
        };
        options.tell(&format!("{rate} a second did not hold: {fault}"));
        rate -= rate / 10;
    }
    bail!("no rate held, down to {rate} connections a second")
}

/// The highest rate that short runs hold.
fn search(options: &Options, stage: &mut Stage, plan: &Plan, most: u64) -> anyhow::Result<u64> {
    let (mut low, mut high) = (most / 2, most);
    for _ in 0..plan.probes {
        let rate = (low + high).div_ceil(2);
        open(stage, plan)?;
        match phase(stage, plan, plan.touches(), rate, plan.probe)?.fault(plan.probe, plan.late, false) {
            None => low = rate,
            Some(fault) => {
                options.tell(&format!("{rate} a second: {fault}"));
                high = rate;
            }
        }
    }
    // A short run knows nothing of the long one's worst second.
    Ok(low - low / 20)
}

/// Sends the first packet of each live flow, or its next. The port of a flow that has died just now is nobody's for a fifth of a
/// second; where that leaves too few, they are all sent again.
fn open(stage: &mut Stage, plan: &Plan) -> anyhow::Result<()> {
    let length = Duration::from_secs_f64(f64::from(plan.live) / plan.opening as f64);
    let mut fault = None;
    for _ in 0..OPENINGS {
        stage.first_touch = 0;
        let opened = phase(stage, plan, plan.opening, 0, length)?;
        stage.first_touch = 0;
        if opened.lost() == 0 {
            return Ok(());
        }
        fault = opened.fault(length, plan.late, false);
    }
    bail!("opening the live flows: {fault:?}")
}

/// Sends at these rates for this long, while the policy changes every second.
fn phase(
    stage: &mut Stage,
    plan: &Plan,
    touches: u64,
    opens: u64,
    length: Duration,
) -> anyhow::Result<Phase> {
    stop::check()?;
    let length_ns = length.as_nanos() as u64;
    let due = |rate: u64| length_ns * rate / SECOND_NS;
    let start = Instant::now() + Duration::from_millis(20);
    let told = Hero {
        ifindex: stage.client_ifindex,
        destination: network_order(DESTINATION),
        gateway_mac: stage.rig.inside.mac,
        live: plan.live,
        first_touch: stage.first_touch,
        first_open: stage.first_open,
        open_mask: OPEN_MASK,
        begin_ns: monotonic() + 20_000_000,
        length_ns,
        touches,
        opens,
        ..Hero::default()
    };
    stage.rig.programs.tell_hero(&told)?;
    let (reasons, losses, before) = (stage.reasons()?, stage.losses()?, stage.rig.programs.seen()?);
    let enough = AtomicBool::new(false);
    let (rig, policies) = (&stage.rig, &stage.policies);
    let (ended, flips) = rig.while_hero_sends(|| {
        thread::scope(|scope| {
            let controller = scope.spawn(|| policies.alternate(FLIP, &enough));
            let sent_all = || -> anyhow::Result<Instant> {
                loop {
                    thread::sleep(Duration::from_millis(2));
                    stop::check()?;
                    let sent = rig.programs.hero_sent()?;
                    // Who asks for more than there can be is done when the time is over.
                    let over =
                        start.elapsed() > if opens == NO_LIMIT { length } else { length * 2 + PATIENCE };
                    if over || (sent.touched >= due(touches) && sent.opened >= due(opens)) {
                        return Ok(Instant::now());
                    }
                }
            };
            let ended = sent_all();
            enough.store(true, Ordering::SeqCst);
            let flips = controller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok((ended?, flips?))
        })
    })?;
    thread::sleep(SETTLED);
    let sent = stage.rig.programs.hero_sent()?;
    stage.first_touch = ((u64::from(stage.first_touch) + sent.touched) % u64::from(plan.live)) as u32;
    stage.first_open = stage.first_open.wrapping_add(sent.opened as u32);
    let counted = stage.reasons()?.into_iter().zip(reasons).map(|(after, before)| after - before);
    let counted = Reason::ALL.iter().copied().zip(counted).filter(|(_, count)| *count > 0).collect();
    Ok(Phase {
        sent,
        seen: difference(before, stage.rig.programs.seen()?),
        took: ended.saturating_duration_since(start),
        ended: Instant::now(),
        counted,
        losses: stage.losses()?.since(&losses),
        flips,
    })
}

/// The clock of the programs, nanoseconds.
fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it only writes to `now`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * SECOND_NS + now.tv_nsec as u64
}
