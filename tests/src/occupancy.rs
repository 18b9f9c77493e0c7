//! Claims out of a block of 1,024 ports towards one destination, by how much of it is taken: each succeeds, down to the last
//! port.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use portcullis_common::engine::Hook;

use crate::backend::{Backend as _, Gateway, KernelBackend};
use crate::claiming::{FRONTEND, MEMBER, PORTS, policy, source_port, syn};
use crate::release::release;

/// Source ports of what stays, and of what is claimed and given back.
pub const STAYS: u16 = 2000;
pub const GOES: u16 = 30_000;
/// Of the flow table: the block takes a quarter of it.
const BUCKETS: u32 = 1 << 10;

/// How long each of many took.
pub struct Filled {
    /// Claims, by how many ports were taken before each.
    pub claims: Vec<(u16, Vec<Duration>)>,
    /// The refusal for which all ports were tried.
    pub refused: Duration,
    /// Those after it.
    pub refused_again: Vec<Duration>,
    /// Packets of a live flow.
    pub live: Vec<Duration>,
}

/// Takes the block port by port. With each of `occupancies` (ascending) taken, `count` claims are made and given back, each
/// before the next; at the end, with all ports taken, as many are refused.
///
/// `send` runs a frame of the guest's and says under which port it left and how long it took; `give_back` frees the flow
/// with this source port.
///
/// # Errors
/// If a claim fails while a port is free, gets a port that is taken or not the guest's, or succeeds when none is left.
pub fn fill(
    gateway: &Gateway,
    occupancies: &[u16],
    count: u16,
    mut send: impl FnMut(&[u8]) -> (Option<u16>, Duration),
    mut give_back: impl FnMut(u16),
) -> anyhow::Result<Filled> {
    let mut taken = BTreeSet::new();
    let mut claims = Vec::new();
    for &occupancy in occupancies {
        take(&mut taken, occupancy, &mut send)?;
        let mut spans = Vec::new();
        for source in GOES..GOES + count {
            let (port, span) = send(&syn(source));
            let port = port.with_context(|| format!("refused with {occupancy} of {PORTS} taken"))?;
            ensure!(!taken.contains(&port), "{port} is taken");
            ensure!(gateway.owns(MEMBER, FRONTEND, port), "{port} is not the guest's");
            give_back(source);
            spans.push(span);
        }
        claims.push((occupancy, spans));
    }
    take(&mut taken, PORTS, &mut send)?;
    // What comes after the last of all is refused, quickly.
    let mut refuse = |source| -> anyhow::Result<Duration> {
        let (port, span) = send(&syn(source));
        ensure!(port.is_none(), "all are taken, and {port:?} was claimed");
        Ok(span)
    };
    let refused = refuse(GOES)?;
    let refused_again = (GOES..GOES + count).map(refuse).collect::<anyhow::Result<_>>()?;
    let mut live = Vec::new();
    for flow in 0..count.min(PORTS) {
        let (port, span) = send(&syn(STAYS + flow));
        ensure!(port.is_some_and(|port| taken.contains(&port)), "a live flow's packet left under {port:?}");
        live.push(span);
    }
    Ok(Filled { claims, refused, refused_again, live })
}

/// Takes ports until so many are taken.
fn take(
    taken: &mut BTreeSet<u16>,
    occupancy: u16,
    send: &mut impl FnMut(&[u8]) -> (Option<u16>, Duration),
) -> anyhow::Result<()> {
    for flow in taken.len() as u16..occupancy {
        let port =
            send(&syn(STAYS + flow)).0.with_context(|| format!("refused with {flow} of {PORTS} taken"))?;
        ensure!(taken.insert(port), "{port} twice");
    }
    Ok(())
}

/// [`fill`] in the kernel. Under XDP time is the kernel's own measure of the program alone; under TC the system call is in it,
/// about 1,300 ns.
pub fn fill_in_kernel(hook: Hook, occupancies: &[u16], count: u16) -> anyhow::Result<Filled> {
    KernelBackend::with_table(&policy(0), &["vm1", "uplink"], hook, BUCKETS, |backend| {
        let table = backend.datapath.flow_table()?;
        let devices = &backend.gateway.compiled.devices;
        let network = devices.iter().find(|device| device.kind == 1).context("a guest's device")?.network;
        let (name, ifindex) = (backend.name(), backend.ifindex("vm1")?);
        let datapath = &backend.datapath;
        let send = |frame: &[u8]| {
            let began = Instant::now();
            let (out, span, sent) = match hook {
                Hook::Xdp => {
                    let (out, span) = datapath.time_xdp(frame, ifindex, 1).expect("BPF_PROG_TEST_RUN");
                    (out, span, 4)
                }
                Hook::Tc => (datapath.run_tc(frame, ifindex).expect("BPF_PROG_TEST_RUN"), began.elapsed(), 7),
            };
            ((out.verdict == sent).then(|| source_port(&out.packet)), span)
        };
        fill(&backend.gateway, occupancies, count, send, |source| {
            let mut records = table.iter();
            let forward =
                records.find(|(_, r)| r.key.network == network && r.key.source_port == source.to_be());
            release(|i| table.slot(i), forward.expect("it was claimed").0, |r| table.guests().recycled(r));
        })
        .context(name)
    })
}
