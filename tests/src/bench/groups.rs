//! What a packet costs that security groups decide about, by the number of their rules.
//!
//! One guest with a group on its interface and one on its subnet, both with 1, 1,000 or as many rules as there are
//! priorities; the whole public service tag file is in force each time (another guest's group names every tag).
//! The same packets in all cases, with the same fate: TCP is allowed and makes a flow, UDP is denied. Time is what
//! `BPF_PROG_TEST_RUN` reports for the XDP program, less what it reports for a packet that is given up at once.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::figure::Figure;
use super::options::Options;
use super::portcullis::end_all;
use super::report::Report;
use super::section::Section;
use crate::backend::{Backend as _, KernelBackend};
use crate::lab::{Craft, TcpFlags};
use crate::random::Random;
use crate::stop;
use anyhow::{Context as _, ensure};
use portcullis_common::engine::Hook;

/// Rules of each of the two groups.
const RULES: [usize; 3] = [1, 1000, 3997];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TAG_FILE: &str = "shared/data/servicetags/ServiceTags_Public_20251013.json";

pub(super) const SECTION: Section = Section {
    name: "groups",
    title: "What security groups cost, by the number of their rules",
    figures,
    measure,
};

/// What is measured of each case, in the order of [`measure_once`].
const WHAT: [&str; 4] = ["denied_hot", "denied_random", "new_flow_hot", "new_flow_random"];

fn name(what: &str, rules: usize) -> String {
    format!("group_{what}_{rules}_rules")
}

fn figures() -> Vec<String> {
    RULES.into_iter().flat_map(|rules| WHAT.map(|what| name(what, rules))).collect()
}

/// Measures all cases in turns.
fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let Some(tags) = Tags::read()? else {
        report.note(format!("{}: not measured: {TAG_FILE} is not here", SECTION.name));
        return Ok(());
    };
    let trace = Trace::random(&tags, options.scale.pick(50, 500, 20_000));
    let policies: Vec<String> = RULES.iter().map(|&rules| policy(&tags, rules)).collect();
    let mut samples: Vec<Vec<[f64; 4]>> = vec![Vec::new(); RULES.len()];
    let measured = KernelBackend::with(&policies[0], &["vm1", "vm9", "up"], Hook::Xdp, |backend| {
        // Warms up.
        measure_once(backend, &trace)?;
        options.each_round("groups", |_| {
            for (samples, policy) in samples.iter_mut().zip(&policies) {
                stop::check()?;
                backend.change(policy)?;
                samples.push(measure_once(backend, &trace)?);
            }
            Ok(())
        })
    });
    let of = |case: usize, what: usize| samples[case].iter().map(|s| s[what]).collect::<Vec<f64>>();
    for (case, rules) in RULES.into_iter().enumerate().filter(|&(case, _)| !samples[case].is_empty()) {
        for (i, what) in WHAT.into_iter().enumerate() {
            let figure = Figure::from_samples(name(what, rules), "ns", &of(case, i));
            report.figures.push(figure.ratio_to_limit_of("the same with one rule", &of(0, i)));
        }
    }
    measured
}

fn measure_once(backend: &KernelBackend, trace: &Trace) -> anyhow::Result<[f64; 4]> {
    let ifindex = backend.ifindex("vm1")?;
    let table = backend.datapath.flow_table()?;
    let dropped = |frame: &[u8], repeat| -> anyhow::Result<f64> {
        let (outcome, took) = backend.datapath.time_xdp(frame, ifindex, repeat)?;
        ensure!(outcome.verdict == 1, "a packet that should be denied got verdict {}", outcome.verdict);
        Ok(took.as_nanos() as f64)
    };
    let sent = |frame: &[u8]| -> anyhow::Result<f64> {
        let (outcome, took) = backend.datapath.time_xdp(frame, ifindex, 1)?;
        ensure!(
            outcome.verdict == 4,
            "a packet to {:?} that should make a flow got verdict {}: {:?}",
            &frame[30..38],
            outcome.verdict,
            backend.counters()?
        );
        Ok(took.as_nanos() as f64)
    };
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    // No IP at all from a guest: dropped by the first look at it.
    let mut nothing = trace.denied[0].clone();
    nothing[12..14].copy_from_slice(&[0x88, 0xcc]);
    let once = mean((0..2000).map(|_| dropped(&nothing, 1)).collect::<Result<_, _>>()?);
    let hot = dropped(&nothing, 100_000)?;
    let denied_hot = dropped(&trace.denied[0], 200_000)? - hot;
    let denied_random = mean(trace.denied.iter().map(|f| dropped(f, 1)).collect::<Result<_, _>>()?) - once;
    let new_hot = mean(trace.hot.iter().map(|f| sent(f)).collect::<Result<_, _>>()?) - once;
    end_all(&table)?;
    let new_random = mean(trace.allowed.iter().map(|f| sent(f)).collect::<Result<_, _>>()?) - once;
    end_all(&table)?;
    Ok([denied_hot, denied_random, new_hot, new_random])
}

/// The tags of the public file, with their IPv4 prefixes as (first address, length).
struct Tags {
    file: PathBuf,
    names: Vec<String>,
    prefixes: Vec<(u32, u8)>,
}

impl Tags {
    /// `None` where the file is not there.
    fn read() -> anyhow::Result<Option<Self>> {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(TAG_FILE);
        let Ok(file) = file.canonicalize() else { return Ok(None) };
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let values = json["values"].as_array().context("no tags in the file")?;
        let names = values.iter().filter_map(|v| v["name"].as_str()).map(str::to_owned).collect();
        let prefixes = values
            .iter()
            .filter_map(|v| v["properties"]["addressPrefixes"].as_array())
            .flatten()
            .filter_map(|p| p.as_str()?.parse::<ipnet::Ipv4Net>().ok())
            .map(|net| (u32::from(net.network()), net.prefix_len()))
            .collect();
        Ok(Some(Self { file, names, prefixes }))
    }
}

struct Trace {
    denied: Vec<Vec<u8>>,
    allowed: Vec<Vec<u8>>,
    hot: Vec<Vec<u8>>,
}

impl Trace {
    fn random(tags: &Tags, packets: usize) -> Self {
        let mut random = Random(7);
        let mut tuple = |_| {
            let (first, length) = tags.prefixes[random.below(tags.prefixes.len())];
            let span = u32::MAX.checked_shr(u32::from(length)).unwrap_or(0);
            let address = first | random.next() as u32 & span;
            (Ipv4Addr::from(address), 1024 + random.below(64_000) as u16, 1 + random.below(65_000) as u16)
        };
        let tuples: Vec<_> = (0..packets).map(&mut tuple).collect();
        let craft = |to| Craft::new(GUEST, [10, 0, 1, 4].into(), [2, 0, 0, 0, 0xaa, 0], to);
        let syn = |to, sport, dport| craft(to).tcp(sport, dport, TcpFlags::SYN, 1, 0, b"");
        let (hot, _, port) = tuples[0];
        Self {
            denied: tuples.iter().map(|&(to, sport, dport)| craft(to).udp(sport, dport, b"")).collect(),
            allowed: tuples.iter().map(|&(to, sport, dport)| syn(to, sport, dport)).collect(),
            hot: (0..packets.min(60_000)).map(|i| syn(hot, 1024 + i as u16, port)).collect(),
        }
    }
}

/// Rules about parts of the tags' space, all of which allow TCP and deny UDP; the last one is for everything.
fn rules(tags: &Tags, count: usize, seed: u64) -> String {
    let mut random = Random(seed);
    let mut text = String::new();
    for i in 0..count - 1 {
        let (first, length) = tags.prefixes[random.below(tags.prefixes.len())];
        let port = random.below(60_000) as u16;
        let (protocol, access) = if i % 2 == 0 { ("Tcp", "Allow") } else { ("Udp", "Deny") };
        let _ = writeln!(
            text,
            "      - {{ name: r{i}, priority: {}, direction: Outbound, access: {access}, protocol: {protocol}, \
             sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: {}/{length}, \
             destinationPortRange: {port}-{} }}",
            100 + i,
            Ipv4Addr::from(first),
            port + random.below(5000) as u16,
        );
    }
    let _ = writeln!(
        text,
        "      - {{ name: last, priority: 4096, direction: Outbound, access: Deny, protocol: Udp, \
         sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }}"
    );
    text
}

fn policy(tags: &Tags, count: usize) -> String {
    let mut all = String::new();
    for (i, name) in tags.names.iter().enumerate() {
        let _ = writeln!(
            all,
            "      - {{ name: t{i}, priority: {}, direction: Outbound, access: Allow, protocol: '*', \
             sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: {name}, destinationPortRange: '*' }}",
            100 + i
        );
    }
    format!(
        r"
limits: {{ securityRulesPerGroup: 7994 }}
serviceTags: {{ file: '{file}' }}
virtualNetworks:
  - name: bench
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets: [{{ name: a, addressPrefix: 10.0.1.0/24, networkSecurityGroup: subnet }}, {{ name: b, addressPrefix: 10.0.2.0/24 }}]
networkInterfaces:
  - name: vm1
    device: vm1
    macAddress: 02:00:00:00:00:01
    networkSecurityGroup: nic
    ipConfigurations: [{{ subnet: a, privateIPAddress: 10.0.1.4, publicIPAddress: pip }}]
  - name: vm9
    device: vm9
    networkSecurityGroup: every-tag
    ipConfigurations: [{{ subnet: b, privateIPAddress: 10.0.2.4 }}]
networkSecurityGroups:
  - name: nic
    securityRules:
{nic}
  - name: subnet
    securityRules:
{subnet}
  - name: every-tag
    securityRules:
{all}
publicIPAddresses: [{{ name: pip, ipAddress: 203.0.113.10, announce: proxy }}]
uplinks: [{{ device: up }}]
",
        file = tags.file.display(),
        nic = rules(tags, count, 1),
        subnet = rules(tags, count, 2),
    )
}
