//! Every packet denied by the last rule of the second group, with as many rules as a group can have and with one.
//!
//! What Portcullis is compared with is nftables with the second list only, half of what Portcullis goes through; nftables
//! with both is measured too.

use anyhow::{Context as _, ensure};

use super::figure::{Better, By, Figure};
use super::gateway::Gateway;
use super::netfilter::{Lists, Netfilter, Tool};
use super::options::Options;
use super::policy::Groups;
use super::portcullis::{Portcullis, default_table};
use super::report::Report;
use super::rig::Sample;
use super::rules::{Fate, MOST};
use super::section::Section;
use super::statistics::{median, paired_extra_ns};
use crate::stop;

pub(super) const SECTION: Section =
    Section { name: "deny", title: "Packets that the last of many rules denies", figures, measure };

const NAMES: [&str; 7] = [
    "deny_1_rule",
    "deny_4000_rules",
    "tc_deny_1_rule",
    "tc_deny_4000_rules",
    "nft_deny_1_rule",
    "nft_deny_4000_rules",
    "nft_deny_both_4000_rules",
];

fn figures() -> Vec<String> {
    NAMES.map(str::to_owned).into()
}

/// Different packets that are sent; there is no flow that they could belong to.
const PACKETS: u32 = 1 << 16;

fn build(name: &str) -> anyhow::Result<Gateway> {
    let rules = if name.contains("4000") { MOST } else { 1 };
    let groups = Groups { rules, fate: Fate::Denied };
    Ok(if name.starts_with("nft") {
        let lists = if name.contains("both") { Lists::Both(groups) } else { Lists::Second(groups) };
        Gateway::Netfilter(Box::new(Netfilter::build(Tool::Nft, lists)?))
    } else {
        let xdp = !name.starts_with("tc");
        Gateway::Portcullis(Box::new(Portcullis::build(default_table(), groups, xdp)?))
    })
}

/// Packets that are denied a second; all that are received are, and none arrives.
fn denied(gateway: &mut Gateway, options: &Options) -> anyhow::Result<Sample> {
    let (judged, received) = (gateway.judged()?, gateway.rig().received()?.1);
    let sample = gateway.rig().measure_received(PACKETS, options.ramp, options.turn())?;
    let (judged, received) = (gateway.judged()? - judged, gateway.rig().received()?.1 - received);
    ensure!(sample.packets_per_second > 0.0, "no packet was received");
    ensure!(judged == received, "of {received} packets {judged} were judged by the rules");
    let seen = sample.seen;
    ensure!(seen.packets + seen.translated == 0, "a denied packet arrived: {seen:?}");
    Ok(sample)
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    options.tell("building the namespaces and loading the programs");
    let mut gateways = Vec::new();
    for name in NAMES {
        stop::check()?;
        gateways.push((name, build(name).context(name)?));
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); NAMES.len()];
    let rounds = options.each_round("denied packets", |_| {
        let turns = options.turns.max(1);
        let mut sums = [Sample::default(); NAMES.len()];
        for turn in 0..turns {
            for place in 0..gateways.len() {
                stop::check()?;
                let at = (turn + place) % gateways.len();
                let (name, gateway) = &mut gateways[at];
                let sample = denied(gateway, options).context(*name)?;
                sums[at].packets_per_second += sample.packets_per_second / turns as f64;
                sums[at].busy += sample.busy / turns as f64;
            }
        }
        samples.iter_mut().zip(sums).for_each(|(samples, sample)| samples.push(sample));
        Ok(())
    });
    let rates = |wanted: &str| -> Vec<f64> {
        let at = NAMES.iter().position(|name| *name == wanted);
        let rounds = at.map(|at| samples[at].as_slice()).unwrap_or_default();
        rounds.iter().map(|sample| sample.packets_per_second / 1e6).collect()
    };
    for (name, samples) in NAMES.into_iter().zip(&samples).filter(|(_, samples)| !samples.is_empty()) {
        let mut figure = Figure::from_samples(name, "Mpps", &rates(name));
        figure.busy = median(&samples.iter().map(|sample| sample.busy).collect::<Vec<_>>());
        if name.contains("4000") {
            let one_rule = rates(&name.replace("both_", "").replace("4000_rules", "1_rule"));
            figure.extra_ns = paired_extra_ns(&figure.samples, &one_rule);
            figure = figure
                .ratio_to_limit_of("the same with one rule", &one_rule)
                .ratio_to_nftables_of(&rates("nft_deny_4000_rules"));
        }
        if name == "deny_4000_rules" {
            figure = figure.must(By::RatioToLimit, Better::More, 0.9, 1.0).goal(By::RatioToNftables, 100.0);
        }
        report.figures.push(figure);
    }
    rounds
}
