//! A policy as large as they come: from its text to its being in force, beside packets of live flows.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use portcullis::policy;
use portcullis_common::engine::Hook;

use super::figure::{Better, By, Figure};
use super::options::Options;
use super::report::Report;
use super::section::Section;
use crate::backend::KernelBackend;
use crate::lab::{Craft, Mac};
use crate::random::Random;

pub(super) const SECTION: Section =
    Section { name: "flip", title: "A change to a large policy", figures, measure };

const WHOLE: &str = "policy_flip_s";
const PARSED: &str = "policy_flip_parsed_s";
const COMPILED: &str = "policy_flip_compiled_s";
const INSTALLED: &str = "policy_flip_installed_s";

fn figures() -> Vec<String> {
    [WHOLE, PARSED, COMPILED, INSTALLED].map(str::to_owned).into()
}

const TAG_FILE: &str = "shared/data/servicetags/ServiceTags_Public_20251013.json";
const VM1: Mac = [2, 0, 0, 0, 0, 1];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
/// Live flows whose packets come meanwhile.
const LIVE: u16 = 100;
/// Between two of their packets: a rate that a processor has time for beside the compiler.
const APART: Duration = Duration::from_micros(50);

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(TAG_FILE);
    let Ok(file) = file.canonicalize() else {
        report.note(format!("{WHOLE} was not measured: {TAG_FILE}, Azure's published service tags, is not beside the repository"));
        return Ok(());
    };
    let file = file.to_str().context("the tag file's path is not text")?;
    let (groups, rules) = options.scale.pick((10, 50), (200, 1000), (200, 1000));
    let small = head(file, 0);
    let tags = policy::parse("bench", &small).map_err(|errors| anyhow!("{errors}"))?.network.tags;
    let tags: Vec<&str> = tags.iter().map(|tag| tag.name.as_str()).collect();
    // Two, so that a change changes every rule's table.
    let texts = [1, 2].map(|seed| text(file, &tags, groups, rules, seed));
    KernelBackend::with(&small, &["vm1", "vm2", "up"], Hook::Xdp, |backend| {
        let mut took: [Vec<f64>; 4] = Default::default();
        options.each_round("changes beside traffic", |round| {
            let parts = change(backend, &texts[round % 2])?;
            for (all, part) in took.iter_mut().zip(parts) {
                all.push(part);
            }
            Ok(())
        })?;
        let [parsed, compiled, installed, whole] = &took;
        let figure = Figure::from_samples(WHOLE, "s", whole);
        report.figures.push(figure.must(By::Value, Better::Less, 2.0, 0.5));
        for (name, samples) in [(PARSED, parsed), (COMPILED, compiled), (INSTALLED, installed)] {
            report.figures.push(Figure::from_samples(name, "s", samples));
        }
        report.note(format!(
            "{WHOLE}: from the text of a policy ({:.0} MB of YAML: {groups} different groups of {rules} rules on {} interfaces, \
             with all {} service tags, whose file is read each time) to its being in force: read and checked, compiled, \
             installed and flipped. Every packet of {LIVE} live flows meanwhile was forwarded; one processor has the traffic.",
            texts[0].len() as f64 / 1e6,
            groups / 2,
            tags.len(),
        ));
        Ok(())
    })
}

/// Puts the policy in force beside packets of live flows, none of which may be lost; seconds of the parts and of all.
fn change(backend: &mut KernelBackend, text: &str) -> anyhow::Result<[f64; 4]> {
    let ifindex = backend.ifindex("vm1")?;
    let tester = backend.datapath.tester()?;
    let enough = AtomicBool::new(false);
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    thread::scope(|scope| {
        let traffic = scope.spawn(|| -> anyhow::Result<u64> {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let craft = Craft::new(VM1, [10, 0, 1, 4].into(), GATEWAY, [10, 0, 2, 4].into());
            let mut sent = 0;
            while !enough.load(Ordering::Relaxed) || sent < u64::from(LIVE) {
                let frame = craft.udp(1000 + (sent % u64::from(LIVE)) as u16, 53, b"");
                let verdict = tester.run(Hook::Xdp, &frame, ifindex)?.verdict;
                ensure!(verdict == 4, "packet {sent} of a live flow got verdict {verdict}");
                sent += 1;
                thread::sleep(APART);
            }
            Ok(sent)
        });
        let changed = timed(backend, text);
        enough.store(true, Ordering::Relaxed);
        let sent = traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(sent >= u64::from(LIVE), "only {sent} packets came meanwhile");
        changed
    })
}

fn timed(backend: &mut KernelBackend, text: &str) -> anyhow::Result<[f64; 4]> {
    let began = Instant::now();
    let loaded = policy::parse("bench", text).map_err(|errors| anyhow!("the bench's policy: {errors}"))?;
    let parsed = began.elapsed();
    backend.gateway.compile_next(&loaded.network)?;
    let image = backend.gateway.image();
    let compiled = began.elapsed();
    let flipped = backend.datapath.install(&image)?;
    let whole = began.elapsed();
    ensure!(backend.datapath.generation() == flipped.generation, "another generation is in force");
    Ok([parsed, compiled - parsed, whole - compiled, whole].map(|part| part.as_secs_f64()))
}

/// Two guests without groups, and room for more.
fn head(file: &str, subnets: usize) -> String {
    let mut text = format!(
        "serviceTags: {{ file: '{file}' }}
virtualNetworks:
  - name: lab
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets:
      - {{ name: a, addressPrefix: 10.0.1.0/24 }}
      - {{ name: b, addressPrefix: 10.0.2.0/24 }}
"
    );
    for i in 0..subnets {
        let prefix = format!("10.0.{}.0/24", 100 + i);
        let _ = writeln!(
            text,
            "      - {{ name: s{i}, addressPrefix: {prefix}, networkSecurityGroup: group{i} }}"
        );
    }
    text += "uplinks: [{ device: up }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, ipConfigurations: [{ subnet: a, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: 02:00:00:00:00:02, ipConfigurations: [{ subnet: b, privateIPAddress: 10.0.2.4 }] }
";
    for i in 0..subnets {
        let _ = writeln!(
            text,
            "  - {{ name: guest{i}, device: vm1, macAddress: 02:00:00:00:01:{i:02x}, networkSecurityGroup: group{}, \
             ipConfigurations: [{{ subnet: s{i}, privateIPAddress: 10.0.{}.4 }}] }}",
            subnets + i,
            100 + i,
        );
    }
    text
}

/// Groups of as many rules each, no two alike, which name all tags between them; half of them on subnets, half on
/// interfaces.
fn text(file: &str, tags: &[&str], groups: usize, rules: usize, seed: u64) -> String {
    let mut random = Random(seed);
    let mut text = head(file, groups / 2) + "networkSecurityGroups:\n";
    let mut next = 0;
    for group in 0..groups {
        let _ = writeln!(text, "  - name: group{group}\n    securityRules:");
        for n in 0..rules {
            next += 1;
            let remote = match random.below(10) {
                0 => "'*'".to_owned(),
                1 => "Internet".to_owned(),
                2 => format!("{}/28", Ipv4Addr::from(0x1400_0000 | random.next() as u32 & 0xff_fff0)),
                _ => tags[next % tags.len()].to_owned(),
            };
            let local = match random.below(4) {
                0 => "'*'".to_owned(),
                1 => "VirtualNetwork".to_owned(),
                _ => format!("{}/30", Ipv4Addr::from(0x0a00_0000 | random.next() as u32 & 0xfffc)),
            };
            let (direction, source, destination) =
                if n % 2 == 0 { ("Inbound", remote, local) } else { ("Outbound", local, remote) };
            let port = random.below(2000) * 20;
            let _ = writeln!(
                text,
                "      - {{ name: r{n}, priority: {}, direction: {direction}, access: {}, protocol: {}, \
                 sourceAddressPrefix: {source}, sourcePortRange: '*', destinationAddressPrefix: {destination}, \
                 destinationPortRange: {port}-{} }}",
                100 + n,
                ["Allow", "Deny"][random.below(2)],
                ["Tcp", "Udp", "'*'"][random.below(3)],
                port + random.below(3) * 15,
            );
        }
    }
    text
}
