//! The candidates, each in its own namespaces, all there at once: an idle one costs nothing.

use std::collections::HashMap;

use anyhow::{Context as _, ensure};

use super::layout::{Bare, Seen};
use super::netfilter::{self, Lists, Netfilter, Tool};
use super::options::Options;
use super::plan::{Kind, Size};
use super::policy::Groups;
use super::portcullis::{Portcullis, table_for};
use super::report::Verified;
use super::rig::{Rig, Sample, UPLINK};
use super::table::Filled;

/// Packets whose checksums are added up before a candidate is measured.
const INSPECTED: u32 = 4096;
/// One flow in so many may be missing: a hash table whose two buckets for a key are full refuses it, however empty the
/// rest is.
const TOLERATED: u32 = 10_000;
/// The same for the bench's own records, whose table is as full as the datapath's is ever meant to be.
const TOLERATED_IN_RECORDS: u32 = 500;

enum Candidate {
    /// With nothing that knows flows.
    Plain(Rig),
    Netfilter(Netfilter),
    Portcullis(Box<Portcullis>),
    Table(Filled),
}

/// Those that are measured with one number of flows.
pub(super) struct Candidates {
    size: Size,
    made: HashMap<Kind, Candidate>,
}

impl Candidates {
    pub fn new(size: Size) -> Self {
        Self { size, made: HashMap::new() }
    }

    /// Why a candidate cannot have so many flows here.
    pub fn limit(kind: Kind, size: Size, options: &Options) -> Option<String> {
        let flows = size.flows(options.scale);
        match kind {
            Kind::Nftables => netfilter::limit(Tool::Nft, flows),
            Kind::Iptables => netfilter::limit(Tool::Iptables, flows),
            _ => None,
        }
    }

    /// Builds a candidate, makes it know the flows, and looks at what it does to their packets.
    pub fn open(&mut self, kind: Kind, options: &Options) -> anyhow::Result<Verified> {
        let flows = self.size.flows(options.scale);
        let tolerated = if kind == Kind::TableRecords { TOLERATED_IN_RECORDS } else { TOLERATED };
        let enough = flows - flows / tolerated;
        let groups = Groups::THOUSAND;
        let portcullis = |room: u32, xdp| -> anyhow::Result<Candidate> {
            let mut built = Portcullis::build(table_for(room), groups, xdp)?;
            built.open_flows(flows, enough)?;
            Ok(Candidate::Portcullis(Box::new(built)))
        };
        let netfilter = |tool| -> anyhow::Result<Candidate> {
            let mut built = Netfilter::build(tool, Lists::Both(groups))?;
            built.open_flows(flows, enough)?;
            Ok(Candidate::Netfilter(built))
        };
        let mut made = match kind {
            Kind::Bare => Candidate::Plain(bare()?),
            Kind::Forward => Candidate::Plain(forward()?),
            Kind::Nftables => netfilter(Tool::Nft)?,
            Kind::Iptables => netfilter(Tool::Iptables)?,
            Kind::Xdp => portcullis(flows, true)?,
            Kind::XdpRoomy => portcullis(Size::Large.flows(options.scale), true)?,
            Kind::Tc => portcullis(flows, false)?,
            Kind::TableHash => Candidate::Table(Filled::hash(flows)?),
            Kind::TableRecords => Candidate::Table(Filled::records(flows)?),
        };
        let live = match &made {
            Candidate::Plain(_) => flows,
            Candidate::Netfilter(made) => made.known()?,
            Candidate::Portcullis(made) => made.known(),
            Candidate::Table(made) => made.known,
        };
        ensure!((enough..=flows).contains(&live), "{live} flows are live instead of {flows}");
        let sent = flows.min(INSPECTED);
        let seen = match &mut made {
            Candidate::Plain(rig) => rig.inspect(sent)?,
            Candidate::Netfilter(made) => made.rig.inspect(sent)?,
            Candidate::Portcullis(made) => made.inspect(sent)?,
            Candidate::Table(made) => made.rig.inspect(sent)?,
        };
        check(kind, sent, flows - live, seen)?;
        self.made.insert(kind, made);
        let Seen { packets, translated, .. } = seen;
        Ok(Verified {
            section: String::new(),
            figure: kind.figure(self.size),
            live_flows: live,
            sent,
            seen: packets,
            translated,
        })
    }

    /// One measurement; the flows are open.
    pub fn measure(&mut self, kind: Kind, options: &Options) -> anyhow::Result<Sample> {
        let flows = self.size.flows(options.scale);
        let rig = match self.made.get_mut(&kind).context("its flows were not opened")? {
            Candidate::Plain(rig) => rig,
            Candidate::Netfilter(made) => &mut made.rig,
            Candidate::Portcullis(made) => &mut made.rig,
            Candidate::Table(made) => &mut made.rig,
        };
        let sample = rig.measure(flows, options.ramp, options.turn())?;
        let Seen { packets, translated, .. } = sample.seen;
        let wanted = if kind.translates() { packets } else { 0 };
        ensure!(packets > 0, "no packet arrived");
        ensure!(translated == wanted, "{translated} of {packets} packets were translated");
        Ok(sample)
    }

    /// Nanoseconds in a candidate's program for each packet while it is under load.
    pub fn program_time(&mut self, kind: Kind, options: &Options) -> anyhow::Result<f64> {
        // For as long as the descriptor is open.
        let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime).context("BPF_ENABLE_STATS")?;
        let before = self.statistics(kind)?;
        self.measure(kind, options)?;
        let after = self.statistics(kind)?;
        ensure!(after.0 > before.0, "the program did not run");
        Ok((after.1 - before.1).as_nanos() as f64 / (after.0 - before.0) as f64)
    }

    fn statistics(&self, kind: Kind) -> anyhow::Result<(u64, std::time::Duration)> {
        match self.made.get(&kind) {
            Some(Candidate::Plain(rig)) if kind == Kind::Bare => rig.programs.bare_statistics(),
            Some(Candidate::Portcullis(made)) => {
                made.statistics(if kind == Kind::Tc { "pc_tc" } else { "pc_xdp" })
            }
            _ => anyhow::bail!("there is no time of a program for {}", kind.title()),
        }
    }
}

fn bare() -> anyhow::Result<Rig> {
    let mut rig = Rig::build("the bare redirect", UPLINK)?;
    let told =
        Bare { ifindex: rig.outside.ifindex, destination_mac: rig.server.mac, source_mac: rig.outside.mac };
    rig.programs.tell_bare(&told)?;
    rig.programs.attach("pcb_bare", &rig.gateway, rig.inside.ifindex)?;
    Ok(rig)
}

/// The kernel forwards, and nobody filters or translates.
fn forward() -> anyhow::Result<Rig> {
    let rig = Rig::build("the kernel's forwarding", UPLINK)?;
    rig.gateway.set_sysctl("net.ipv4.ip_forward", "1")?;
    Ok(rig)
}

/// Everything arrives but what belongs to a flow that was refused; what should be translated is, with right
/// checksums; what should not be touched is not.
fn check(kind: Kind, sent: u32, refused: u32, seen: Seen) -> anyhow::Result<()> {
    let (sent, refused) = (u64::from(sent), u64::from(refused));
    ensure!(
        (sent.saturating_sub(refused)..=sent).contains(&seen.packets),
        "{} of {sent} packets arrived: {seen:?}",
        seen.packets
    );
    let translated = if kind.translates() { seen.packets } else { 0 };
    ensure!(seen.translated == translated, "{} of {sent} packets were translated: {seen:?}", seen.translated);
    let sound = if kind == Kind::Bare { 0 } else { seen.packets };
    ensure!(seen.sound == sound, "{} of {sent} packets arrived sound: {seen:?}", seen.sound);
    Ok(())
}
