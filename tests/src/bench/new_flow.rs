//! Every packet the first of its flow: through both groups, a claim, and both halves of a record.
//!
//! A burst of so many flows as fill half of the table, as fast as they come out at the other end; then all are
//! forgotten. nftables does the same with lists as long and a conntrack table as large.

use anyhow::{Context as _, ensure};

use super::figure::{Better, By, Figure};
use super::gateway::Gateway;
use super::netfilter::{self, Lists, Netfilter, Tool};
use super::options::Options;
use super::policy::Groups;
use super::portcullis::{Portcullis, default_table};
use super::report::Report;
use super::rig::Sample;
use super::section::Section;
use super::statistics::median;
use crate::stop;

pub(super) const SECTION: Section =
    Section { name: "new_flows", title: "Packets that are the first of their flow", figures, measure };

/// Flows of a burst that may be missing, one in so many: [`super::candidate`] says why.
const TOLERATED: u64 = 1000;

/// SYNs claim a port towards their destination; datagrams share their socket's, which the first of them claims.
const PROTOCOLS: [(&str, bool); 2] = [("", true), ("_udp", false)];

fn figures() -> Vec<String> {
    let of = |who: &'static str| PROTOCOLS.map(|(protocol, _)| format!("{who}{protocol}"));
    ["new_flow", "tc_new_flow", "nft_new_flow"].into_iter().flat_map(of).collect()
}

/// New flows a second; the gateway knows none before and after.
fn burst(gateway: &mut Gateway, flows: u32, syns: bool) -> anyhow::Result<Sample> {
    gateway.rig().send_syns(syns);
    let sample = gateway.rig().burst(flows)?;
    let known = u64::from(gateway.known()?);
    let enough = u64::from(flows) - u64::from(flows) / TOLERATED;
    ensure!(
        known >= enough && sample.seen.translated >= enough,
        "of a burst of {flows} flows {known} were known and {} packets arrived translated; counted: {}",
        sample.seen.translated,
        gateway.counts()
    );
    ensure!(sample.packets_per_second.is_finite(), "the burst took no time");
    gateway.flush()?;
    Ok(sample)
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let table = default_table();
    let flows = options.scale.pick(2048, table / 2, table / 2);
    let groups = Groups::THOUSAND;
    options.tell("building the namespaces and loading the programs");
    let mut gateways = vec![
        ("new_flow", Gateway::Portcullis(Box::new(Portcullis::build(table, groups, true)?))),
        ("tc_new_flow", Gateway::Portcullis(Box::new(Portcullis::build(table, groups, false)?))),
    ];
    match netfilter::limit(Tool::Nft, flows) {
        Some(why) => report.note(format!("nft_new_flow was not measured: {why}")),
        None => {
            let built = Netfilter::build(Tool::Nft, Lists::Both(groups))?;
            gateways.push(("nft_new_flow", Gateway::Netfilter(Box::new(built))));
        }
    }
    for (protocol, syns) in PROTOCOLS {
        let name = |who: &str| format!("{who}{protocol}");
        if !gateways.iter().any(|(who, _)| options.wants(&name(who))) {
            continue;
        }
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); gateways.len()];
        let rounds = options.each_round(
            &format!("bursts of {flows} {}", if syns { "SYNs" } else { "datagrams" }),
            |_| {
                for ((who, gateway), samples) in gateways.iter_mut().zip(&mut samples) {
                    stop::check()?;
                    samples.push(burst(gateway, flows, syns).with_context(|| name(who))?);
                }
                Ok(())
            },
        );
        // An interrupted round is not one.
        let whole = samples.last().map_or(0, Vec::len);
        let rates: Vec<Vec<f64>> = samples
            .iter()
            .map(|samples| samples.iter().take(whole).map(|sample| sample.packets_per_second / 1e6).collect())
            .collect();
        let of = |wanted: &str| {
            let at = gateways.iter().position(|(who, _)| *who == wanted);
            at.map(|at| rates[at].clone()).unwrap_or_default()
        };
        let nftables = of("nft_new_flow");
        for (((who, _), rates), samples) in gateways.iter().zip(&rates).zip(&samples).filter(|_| whole > 0) {
            let mut figure = Figure::from_samples(name(who), "Mpps", rates).ratio_to_nftables_of(&nftables);
            figure.busy = median(&samples.iter().map(|sample| sample.busy).collect::<Vec<_>>());
            if *who == "new_flow" {
                figure = figure.must(By::RatioToNftables, Better::More, 2.5, 4.0);
            }
            report.figures.push(figure);
        }
        rounds?;
    }
    Ok(())
}
