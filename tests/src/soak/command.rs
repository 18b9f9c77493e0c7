//! `portcullis-lab soak`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::account::{self, Left};
use super::churn::{Churn, Exchanged};
use super::events::Event;
use super::stand::{SERVER, TCP_PORT, UDP_PORT, Variant, policy, topology};
use crate::edge::{Edge, WithHook};
use crate::lab::{TcpEcho, UdpEcho, sweep_stale};
use crate::random::Random;
use crate::stop;
use crate::upheaval::{Tally, Traffic};

/// What a shell gives for a program that SIGINT ended.
const INTERRUPTED: u8 = 130;
/// Datagrams of vm1 that have to arrive after each event before the next one.
const BETWEEN: u64 = 2_000;

/// Run everything at once: traffic, new flows, kills, restarts, upgrades, changes of policy, links that flap
#[derive(Debug, Args)]
pub struct Arguments {
    /// How long; what the tables need to empty comes on top, about five minutes
    #[arg(long, value_name = "N", default_value_t = 10)]
    minutes: u64,
    /// Which hook the policy asks for
    #[arg(long, value_enum, default_value_t = Hook::Tc)]
    hook: Hook,
    /// Repeat the events of an earlier run; its report says the seed
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Hook {
    Xdp,
    Tc,
}

/// What became of it. Printed as JSON.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    seed: u64,
    hook: &'static str,
    seconds: u64,
    events: BTreeMap<String, u64>,
    traffic: Option<Sent>,
    exchanged: Exchanged,
    left: Option<Left>,
    interrupted: bool,
    /// What is wrong; empty if nothing.
    faults: Vec<String>,
}

/// The traffic of vm1.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Sent {
    datagrams_sent: u64,
    datagrams_lost: u64,
    datagrams_out_of_order: u64,
    datagrams_per_second: u64,
    answers_lost: u64,
    bytes_sent: u64,
    segments_lost: u64,
    pings_sent: u64,
    pings_lost: u64,
    /// Public addresses and ports of its two flows.
    peers: Vec<String>,
}

impl From<&Tally> for Sent {
    fn from(tally: &Tally) -> Self {
        Sent {
            datagrams_sent: tally.datagrams_sent,
            datagrams_lost: tally.datagrams_sent.saturating_sub(tally.datagrams_arrived),
            datagrams_out_of_order: tally.out_of_order,
            datagrams_per_second: tally.datagrams_per_second,
            answers_lost: tally.answers_sent.saturating_sub(tally.answers_arrived),
            bytes_sent: tally.bytes_sent,
            segments_lost: tally.segments_lost,
            pings_sent: tally.pings_sent,
            pings_lost: tally.pings_sent.saturating_sub(tally.pings_answered),
            peers: tally.peers.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Runs it: progress on standard error, the report as JSON on standard output. The code is 1 if something was lost or is left,
/// and 130 if somebody interrupted; either way nothing of the lab stays.
///
/// # Errors
/// If the lab cannot be made.
pub fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    ensure!((1..=10_080).contains(&arguments.minutes), "--minutes is 1 to 10,080, which is a week");
    stop::listen(nix::sys::signal::SaFlags::SA_RESTART)?;
    for left in sweep_stale()? {
        eprintln!("soak: removed {left}, left by a run that was killed");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let mut report = Report {
        seed: arguments.seed.unwrap_or(now) | 1,
        hook: with(arguments.hook).word(),
        ..Report::default()
    };
    if let Err(error) = soak(arguments, &mut report) {
        report.faults.push(format!("{error:#}"));
    }
    report.interrupted = stop::asked();
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(match (report.interrupted, report.faults.is_empty()) {
        (true, _) => ExitCode::from(INTERRUPTED),
        (false, false) => ExitCode::FAILURE,
        (false, true) => ExitCode::SUCCESS,
    })
}

fn with(hook: Hook) -> WithHook {
    match hook {
        Hook::Xdp => WithHook::Xdp,
        Hook::Tc => WithHook::Tc,
    }
}

fn soak(arguments: &Arguments, report: &mut Report) -> anyhow::Result<()> {
    let (hook, length) = (with(arguments.hook), Duration::from_secs(60 * arguments.minutes));
    let (spec, mut variant) = (topology(), Variant::default());
    let mut random = Random(report.seed);
    eprintln!("soak: {} minutes under {}, seed {}", arguments.minutes, hook.word(), report.seed);
    let mut edge = Edge::start(&spec, &policy(&spec, hook, variant))?;
    let _tcp = TcpEcho::start(edge.topology.internet(), (SERVER, TCP_PORT).into())?;
    let _udp = UdpEcho::start(edge.topology.internet(), (SERVER, UDP_PORT).into())?;
    let traffic = Traffic::start(&edge, "vm1")?;
    let churn = Churn::start(edge.topology.guest("vm2"));
    let began = Instant::now();
    let mut told = began;
    while began.elapsed() < length && !stop::asked() {
        let event = Event::random(&mut random);
        event.happen(&mut edge, hook, &mut variant, &mut random)?;
        *report.events.entry(format!("{event:?}")).or_default() += 1;
        traffic.go_on(BETWEEN)?;
        let tally = traffic.settle()?;
        report.traffic = Some(Sent::from(&tally));
        report.exchanged = churn.exchanged();
        report.seconds = began.elapsed().as_secs();
        if let Err(error) = tally.check() {
            // Once is enough: from here on the sums would repeat it.
            report.faults.push(format!("after {event:?}: {error}; {:?}", edge.reasons()?));
            break;
        }
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            progress(report, began, length);
        }
    }
    drop((traffic, churn));
    if report.exchanged.failed > 0 {
        report.faults.push(format!("exchanges of vm2 failed: {:?}", report.exchanged.failures));
    }
    if stop::asked() {
        return Ok(());
    }
    eprintln!("soak: the traffic has ended; waiting for the tables to empty");
    let left = account::wait(&edge, |left| {
        eprintln!(
            "soak: {} s: {} flows, {} ports used, {} held",
            left.after_seconds, left.flows, left.used, left.holding
        );
    })?;
    if !left.is_clean() {
        report.faults.push(format!("this is left in the tables: {left:?}"));
    }
    for wrong in ["internal", "table_full", "untranslated", "snat_exhausted"] {
        if let Some(packets) = left.drops.get(wrong) {
            report.faults.push(format!("{packets} packets were dropped as {wrong}"));
        }
    }
    report.left = Some(left);
    Ok(())
}

fn progress(report: &Report, began: Instant, length: Duration) {
    let clock = |time: u64| format!("{}:{:02}", time / 60, time % 60);
    let sent = report.traffic.clone().unwrap_or_default();
    eprintln!(
        "soak: {} of {}: {} events, {} datagrams ({} lost), {} MB both ways, {} pings, {} connections and {} datagrams of vm2 ({} failed)",
        clock(began.elapsed().as_secs()),
        clock(length.as_secs()),
        report.events.values().sum::<u64>(),
        sent.datagrams_sent,
        sent.datagrams_lost,
        sent.bytes_sent / 1_000_000,
        sent.pings_sent,
        report.exchanged.connections,
        report.exchanged.datagrams,
        report.exchanged.failed,
    );
}
