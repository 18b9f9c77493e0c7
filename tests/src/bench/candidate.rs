//! The candidates, each in its own namespaces, all there at once: an idle one costs nothing.

use anyhow::{Context as _, ensure};

use super::layout::{Bare, Seen};
use super::nftables;
use super::options::Options;
use super::plan::{Kind, Size};
use super::portcullis::Portcullis;
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

pub(super) struct Candidates {
    bare: Rig,
    nftables: Rig,
    portcullis: Portcullis,
    /// Made anew for each size.
    hash: Option<Filled>,
    records: Option<Filled>,
}

impl Candidates {
    pub fn build(options: &Options) -> anyhow::Result<Self> {
        let largest = Size::Large.flows(options.scale);
        Ok(Self {
            bare: bare()?,
            nftables: nftables::build()?,
            portcullis: Portcullis::build(largest)?,
            hash: None,
            records: None,
        })
    }

    /// Why a candidate cannot have so many flows here.
    pub fn limit(&self, kind: Kind, size: Size, options: &Options) -> Option<String> {
        (kind == Kind::Nftables).then(|| nftables::limit(size.flows(options.scale))).flatten()
    }

    /// Makes a candidate know the flows, and looks at what it does to their packets.
    pub fn open(&mut self, kind: Kind, size: Size, options: &Options) -> anyhow::Result<Verified> {
        let flows = size.flows(options.scale);
        let tolerated = if kind == Kind::TableRecords { TOLERATED_IN_RECORDS } else { TOLERATED };
        let enough = flows - flows / tolerated;
        match kind {
            Kind::Bare => {}
            Kind::Nftables if nftables::known(&self.nftables)? >= enough => {}
            Kind::Nftables => self.nftables.open_flows(flows, enough, nftables::known)?,
            Kind::Xdp | Kind::Tc => {
                self.portcullis.hook(kind == Kind::Xdp)?;
                self.portcullis.open_flows(flows, enough)?;
            }
            Kind::TableHash => {
                self.hash = None;
                self.hash = Some(Filled::hash(flows)?);
            }
            Kind::TableRecords => {
                self.records = None;
                self.records = Some(Filled::records(flows)?);
            }
        }
        let live = match kind {
            Kind::Bare => flows,
            Kind::Nftables => nftables::known(&self.nftables)?,
            Kind::Xdp | Kind::Tc => self.portcullis.known(),
            Kind::TableHash | Kind::TableRecords => self.table(kind)?.known,
        };
        ensure!((enough..=flows).contains(&live), "{live} flows are live instead of {flows}");
        let sent = flows.min(INSPECTED);
        let seen = match kind {
            Kind::Xdp | Kind::Tc => self.portcullis.inspect(sent)?,
            _ => self.rig(kind)?.inspect(sent)?,
        };
        check(kind, sent, flows - live, seen)?;
        let Seen { packets, translated, .. } = seen;
        Ok(Verified { figure: kind.figure(size), live_flows: live, sent, seen: packets, translated })
    }

    /// One measurement; the flows are open.
    pub fn measure(&mut self, kind: Kind, size: Size, options: &Options) -> anyhow::Result<Sample> {
        let sample = self.rig(kind)?.measure(size.flows(options.scale), options.ramp, options.turn())?;
        let Seen { packets, translated, .. } = sample.seen;
        let wanted = if kind == Kind::Bare { 0 } else { packets };
        ensure!(packets > 0, "no packet arrived");
        ensure!(translated == wanted, "{translated} of {packets} packets were translated");
        Ok(sample)
    }

    /// Nanoseconds in a candidate's program for each packet while it is under load.
    pub fn program_time(&mut self, kind: Kind, size: Size, options: &Options) -> anyhow::Result<f64> {
        // For as long as the descriptor is open.
        let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime).context("BPF_ENABLE_STATS")?;
        let before = self.statistics(kind)?;
        self.measure(kind, size, options)?;
        let after = self.statistics(kind)?;
        ensure!(after.0 > before.0, "the program did not run");
        Ok((after.1 - before.1).as_nanos() as f64 / (after.0 - before.0) as f64)
    }

    fn statistics(&self, kind: Kind) -> anyhow::Result<(u64, std::time::Duration)> {
        match kind {
            Kind::Bare => self.bare.programs.bare_statistics(),
            Kind::Xdp => self.portcullis.statistics("pc_xdp"),
            Kind::Tc => self.portcullis.statistics("pc_tc"),
            _ => anyhow::bail!("there is no time of a program for {}", kind.title()),
        }
    }

    /// The candidate's namespaces, with its programs on their hooks.
    fn rig(&mut self, kind: Kind) -> anyhow::Result<&mut Rig> {
        match kind {
            Kind::Bare => Ok(&mut self.bare),
            Kind::Nftables => Ok(&mut self.nftables),
            Kind::Xdp | Kind::Tc => {
                self.portcullis.hook(kind == Kind::Xdp)?;
                Ok(&mut self.portcullis.rig)
            }
            Kind::TableHash | Kind::TableRecords => Ok(&mut self.table(kind)?.rig),
        }
    }

    fn table(&mut self, kind: Kind) -> anyhow::Result<&mut Filled> {
        let filled = if kind == Kind::TableHash { &mut self.hash } else { &mut self.records };
        filled.as_mut().context("its flows were not opened")
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

/// Everything arrives but what belongs to a flow that was refused; what should be translated is, with right
/// checksums; what should not be touched is not.
fn check(kind: Kind, sent: u32, refused: u32, seen: Seen) -> anyhow::Result<()> {
    let (sent, refused) = (u64::from(sent), u64::from(refused));
    ensure!(
        (sent.saturating_sub(refused)..=sent).contains(&seen.packets),
        "{} of {sent} packets arrived: {seen:?}",
        seen.packets
    );
    let wanted = if kind == Kind::Bare { 0 } else { seen.packets };
    ensure!(seen.translated == wanted, "{} of {sent} packets were translated: {seen:?}", seen.translated);
    ensure!(seen.sound == wanted, "{} of {sent} packets arrived sound: {seen:?}", seen.sound);
    Ok(())
}
