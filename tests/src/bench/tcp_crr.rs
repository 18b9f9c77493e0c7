//! TCP connect-request-close cycles by real sockets: 64 guests, 256 server sockets, ports held back as a NAT gateway does, and
//! every port accounted for at the end.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::cycles::Cycles;
use super::figure::{Better, By, Figure};
use super::options::Options;
use super::report::{Report, Verified};
use super::road::{Gate, Links, Road, RoadSpec};
use super::section::Section;
use super::statistics::median;
use super::turns::{column, in_turns};
use crate::lab::eventually_some;

pub(super) const SECTION: Section =
    Section { name: "tcp_crr", title: "TCP connect-request-close cycles", figures, measure };

const GATES: [Gate; 5] = [Gate::Forwarding, Gate::Nftables, Gate::Xdp, Gate::Tc, Gate::Wire];
const GUESTS: u16 = 64;
const SERVERS: u16 = 256;
/// Of each guest: nearly all there are.
const PORTS: u32 = 1000;
/// Cycles under way: enough that the gateway is never without a packet, few enough that no queue is ever full.
const AT_ONCE: usize = 64;
/// For the look at each candidate before: each guest to a few servers.
const INSPECTED: u64 = 512;
/// More than a second ever had.
const PER_SECOND: f64 = 50_000.0;
/// What the machine lets conntrack hold, for each namespace. The bench does not change the machine.
const CONNTRACK_LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Seconds a closed flow's port is held back with `natgateway`.
const HOLD: u32 = 65;

fn figures() -> Vec<String> {
    let of = |gate: Gate| [name(gate).to_owned(), cost(gate)];
    [Gate::Xdp, Gate::Tc].into_iter().flat_map(of).collect()
}

const fn name(gate: Gate) -> &'static str {
    match gate {
        Gate::Wire => "wire_tcp_crr",
        Gate::Forwarding => "forwarding_tcp_crr",
        Gate::Nftables => "nft_tcp_crr",
        Gate::Xdp => "tcp_crr",
        Gate::Tc => "tcp_crr_tc",
    }
}

/// Name of what the gateway alone costs.
fn cost(gate: Gate) -> String {
    format!("{}_gateway_us", name(gate))
}

struct Candidate {
    // The sockets before their namespaces.
    cycles: Cycles,
    road: Road,
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let hold = options.scale.pick(2, 2, HOLD);
    // What was closed stays in every table for the hold-down, all rounds of it.
    let limit: u32 = fs::read_to_string(CONNTRACK_LIMIT)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(u32::MAX)
        .min(1 << 21);
    let seconds = f64::from(limit) * 0.8 / PER_SECOND / options.rounds as f64;
    let window = options.window.min(Duration::from_secs_f64(seconds));
    if window < options.window {
        report.note(format!(
            "tcp_crr was measured for {window:.1?} a round: more closed connections than conntrack holds \
             (nf_conntrack_max is {limit}) would be refused by nftables"
        ));
    }
    let options = &Options { window, ..options.clone() };
    let mut candidates = Vec::new();
    for gate in GATES {
        options.tell(&format!("building the namespaces for {}", gate.title()));
        candidates.push(Candidate::build(gate, hold, limit).with_context(|| gate.title())?);
        let candidate = candidates.last_mut().context("it was just pushed")?;
        report.verified.push(candidate.inspect().with_context(|| gate.title())?);
    }
    let (rounds, outcome) = in_turns(options, "TCP cycles", &mut candidates, |candidate| {
        let Candidate { cycles, road } = candidate;
        let measured = cycles.measure(road, AT_ONCE, options.ramp, options.turn());
        let measured = measured.with_context(|| road.gate.title())?;
        // Of the gateway's processor, for each cycle.
        let microseconds = measured.busy / measured.cycles_per_second * 1e6;
        Ok([measured.cycles_per_second, measured.busy, microseconds])
    });
    if rounds.iter().all(|rounds| !rounds.is_empty()) {
        push(&rounds, report);
    }
    outcome?;
    for candidate in candidates.iter().filter(|candidate| candidate.road.gate.is_portcullis()) {
        let gate = candidate.road.gate;
        options.tell(&format!("{}: until every port is free again", gate.title()));
        let account =
            candidate.account(Duration::from_secs(u64::from(hold) + 30)).with_context(|| gate.title())?;
        report.note(format!("{}: {account}", name(gate)));
    }
    Ok(())
}

fn push(rounds: &[Vec<[f64; 3]>], report: &mut Report) {
    let (forwarding, nftables) = (column(&rounds[0], 0), column(&rounds[1], 0));
    for (gate, rounds) in GATES.into_iter().zip(rounds) {
        let mut figure = Figure::from_samples(name(gate), "cycles/s", &column(rounds, 0))
            .ratio_to_limit_of("the kernel's forwarding without rules", &forwarding)
            .ratio_to_nftables_of(&nftables);
        if gate == Gate::Xdp {
            figure = figure.must(By::RatioToNftables, Better::More, 1.0, 1.3);
        }
        figure.busy = median(&column(rounds, 1));
        report.figures.push(figure);
    }
    // What that processor does for the sockets is nearly the same whoever forwards, and is all there is on the wire alone.
    // Nearly: on the wire it sleeps and is woken more often, so that what is left for the gateway is a lower bound.
    let wire = column(&rounds[4], 2);
    let own = |rounds: &[[f64; 3]]| -> Vec<f64> {
        column(rounds, 2).iter().zip(&wire).map(|(all, wire)| all - wire).collect()
    };
    let (forwarding, nftables) = (own(&rounds[0]), own(&rounds[1]));
    for (gate, rounds) in GATES.into_iter().zip(rounds).filter(|(gate, _)| *gate != Gate::Wire) {
        report.figures.push(
            Figure::from_samples(cost(gate), "µs", &own(rounds))
                .ratio_to_limit_of("the kernel's forwarding without rules", &forwarding)
                .ratio_to_nftables_of(&nftables),
        );
    }
}

impl Candidate {
    fn build(gate: Gate, hold: u32, flows: u32) -> anyhow::Result<Self> {
        let road = Road::build(&RoadSpec {
            gate,
            links: Links::Polled,
            guests: GUESTS,
            ports: PORTS,
            max_flows: flows.next_power_of_two(),
            extra: format!("snat: {{ profile: natgateway }}\ntimeouts: {{ tcpFinSeconds: {hold} }}\n"),
        })?;
        Ok(Self { cycles: Cycles::listen(&road, SERVERS)?, road })
    }

    /// Some cycles, all of which end well; under the hook that was asked for.
    fn inspect(&mut self) -> anyhow::Result<Verified> {
        let Self { cycles, road } = self;
        let runs = |road: &Road| if road.gate.is_portcullis() { road.runs() } else { Ok([0; 2]) };
        // For as long as the descriptor is open.
        let statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime).context("BPF_ENABLE_STATS")?;
        let before = runs(road)?;
        cycles.run(road, AT_ONCE, INSPECTED)?;
        let after = runs(road)?;
        drop(statistics);
        let [xdp, tc] = [after[0] - before[0], after[1] - before[1]];
        let right = match road.gate {
            // XDP leaves the router's ARP, and nothing else, to TC.
            Gate::Xdp => xdp > INSPECTED && tc < INSPECTED / 8,
            Gate::Tc => xdp == 0 && tc > INSPECTED,
            Gate::Wire | Gate::Forwarding | Gate::Nftables => true,
        };
        ensure!(right, "pc_xdp ran {xdp} times and pc_tc {tc} times for {INSPECTED} cycles");
        let count = cycles.count();
        ensure!(count.done == INSPECTED, "{INSPECTED} cycles were begun: {count:?}");
        ensure!(count.strangers == 0, "not all came under the address they should: {count:?}");
        Ok(Verified {
            section: String::new(),
            figure: name(road.gate).to_owned(),
            live_flows: INSPECTED as u32,
            sent: INSPECTED as u32,
            seen: count.done,
            translated: if matches!(road.gate, Gate::Wire | Gate::Forwarding) { 0 } else { count.done },
        })
    }

    /// Every cycle claimed a port and every port is free again, within `patience`.
    fn account(&self, patience: Duration) -> anyhow::Result<String> {
        let count = self.cycles.count();
        ensure!(
            (count.failed, count.slow, count.strangers) == (0, 0, 0),
            "not every cycle ended as it should: {count:?}"
        );
        let reasons = self.road.reasons()?;
        let of =
            |name: &str| reasons.iter().find(|(reason, _)| reason == name).map_or(0, |(_, packets)| *packets);
        let claims = of("new_flow");
        ensure!(claims == count.done, "{claims} ports were claimed in {} cycles: {reasons:?}", count.done);
        let since = Instant::now();
        let taken = |road: &Road| -> anyhow::Result<u64> { taken(&road.ask(&["snat"])?) };
        let most = taken(&self.road)?;
        let none = eventually_some(patience, || match (crate::stop::check(), taken(&self.road)) {
            (Ok(()), Ok(0)) => Some(Ok(())),
            (Ok(()), Ok(_)) => None,
            (Err(error), _) | (_, Err(error)) => Some(Err(error)),
        });
        match none {
            Some(freed) => freed?,
            None => anyhow::bail!("{} ports were not given back within {patience:?}", taken(&self.road)?),
        }
        Ok(format!(
            "{claims} cycles, closed by FIN from both sides, claimed {claims} times one of {} ports; {most} of those were \
             held back when the last one ended, and {:.0} s later none was",
            u32::from(GUESTS) * PORTS,
            since.elapsed().as_secs_f64()
        ))
    }
}

/// TCP ports with a flow or held back, of all guests.
fn taken(snat: &Value) -> anyhow::Result<u64> {
    let guests = snat["guests"].as_array().context("snat has guests")?;
    ensure!(guests.len() == usize::from(GUESTS), "snat has {} guests", guests.len());
    let rows = guests.iter().filter_map(|guest| guest["ports"].as_array()).flatten();
    rows.filter(|row| row["protocol"] == "tcp")
        .map(|row| Some(row["used"].as_u64()? + row["holding"].as_u64()?))
        .sum::<Option<u64>>()
        .context("snat tells used and held ports")
}
