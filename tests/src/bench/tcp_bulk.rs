//! One bulk TCP stream from a guest on a veth as a container runtime leaves it: offloads on, the far ends untouched.
//!
//! The gateway's work on a segment of 64 KiB is one packet's work, and is done in the sender's call; so the stream is made as
//! cheap as can be besides: pages are sent from a file in memory and thrown away by the receiver, and neither copies a byte.
//! Congestion control is reno, see [`super::road`].

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::figure::{Better, By, Figure};
use super::napi;
use super::options::Options;
use super::report::{Report, Verified};
use super::road::{Gate, Links, Road, RoadSpec, SERVERS};
use super::section::Section;
use super::turns::{column, in_turns};
use crate::stop;

pub(super) const SECTION: Section = Section {
    name: "tcp_bulk",
    title: "One bulk TCP stream from a veth with its offloads",
    figures,
    measure,
};

const GATES: [Gate; 3] = [Gate::Forwarding, Gate::Nftables, Gate::Tc];
const PORT: u16 = 5201;
/// What one call sends or takes, bytes.
const PIECE: usize = 1 << 20;
/// How long either end waits for the other before the stream has failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Behind TCP's slow start.
const LEAST_RAMP: Duration = Duration::from_millis(20);

/// Where the two ends run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Sender and receiver on a processor each; what the sender's calls cause is on the sender's, acknowledgements often on
    /// the receiver's.
    Two,
    /// Everything on the first: the sum of all work, without any waiting for another processor.
    One,
}

const PLACEMENTS: [Placement; 2] = [Placement::Two, Placement::One];

fn figures() -> Vec<String> {
    PLACEMENTS.map(|placement| name(Gate::Tc, placement)).into()
}

fn name(gate: Gate, placement: Placement) -> String {
    let stem = match gate {
        Gate::Wire => "wire_tcp_bulk",
        Gate::Forwarding => "forwarding_tcp_bulk",
        Gate::Nftables => "nft_tcp_bulk",
        Gate::Xdp => "tcp_bulk_xdp",
        Gate::Tc => "tcp_bulk_tc",
    };
    match placement {
        Placement::Two => stem.to_owned(),
        Placement::One => format!("{stem}_one_core"),
    }
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let mut roads = Vec::new();
    for gate in GATES {
        options.tell(&format!("building the namespaces for {}", gate.title()));
        let road = Road::build(&RoadSpec {
            gate,
            links: Links::Container,
            guests: 1,
            ports: 0,
            max_flows: 4096,
            extra: String::new(),
        })?;
        report.verified.push(inspect(&road).with_context(|| gate.title())?);
        roads.push(road);
    }
    let (rounds, outcome) = in_turns(options, "bulk TCP", &mut roads, |road| {
        let mut rates = [0.0; 2];
        for (rate, placement) in rates.iter_mut().zip(PLACEMENTS) {
            let stream = stream(road, placement, options.ramp.max(LEAST_RAMP), options.turn() / 2);
            let stream = stream.with_context(|| road.gate.title())?;
            *rate = stream.bytes as f64 * 8.0 / stream.seconds / 1e9;
        }
        Ok(rates)
    });
    if rounds.iter().all(|rounds| !rounds.is_empty()) {
        for (value, placement) in PLACEMENTS.into_iter().enumerate() {
            let [forwarding, nftables] = [0, 1].map(|gate: usize| column(&rounds[gate], value));
            for (gate, rounds) in GATES.into_iter().zip(&rounds) {
                let mut figure =
                    Figure::from_samples(name(gate, placement), "Gbit/s", &column(rounds, value))
                        .ratio_to_limit_of("the kernel's forwarding without rules", &forwarding)
                        .ratio_to_nftables_of(&nftables);
                if gate == Gate::Tc {
                    figure = figure.must(By::RatioToNftables, Better::More, 1.0, 1.2);
                }
                report.figures.push(figure);
            }
        }
    }
    outcome
}

/// A stream that arrives whole, under the address it should, in segments larger than the wire's.
fn inspect(road: &Road) -> anyhow::Result<Verified> {
    let before = road.forwarded()?;
    let stream = stream(road, Placement::Two, LEAST_RAMP, LEAST_RAMP)?;
    let packets = road.forwarded()? - before;
    let each = stream.all_bytes / packets.max(1);
    ensure!(each > 1500, "{packets} packets for {} bytes: the offloads are off", stream.all_bytes);
    Ok(Verified {
        section: String::new(),
        figure: name(road.gate, Placement::Two),
        live_flows: 1,
        sent: packets as u32,
        seen: packets,
        translated: if road.gate == Gate::Forwarding { 0 } else { packets },
    })
}

/// What the receiver got.
struct Stream {
    /// While it was measured.
    bytes: u64,
    seconds: f64,
    all_bytes: u64,
}

/// Tells the sender, however the receiver ends: it must not wait for one that has failed.
struct Tell<'a>(&'a AtomicBool);

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Sends from the first guest to the server.
fn stream(road: &Road, placement: Placement, ramp: Duration, window: Duration) -> anyhow::Result<Stream> {
    let (sending, other) = napi::processors();
    let receiving = if placement == Placement::Two { other } else { sending };
    let destination = SocketAddr::from((SERVERS[0], PORT));
    let listener = road.server.enter(|| TcpListener::bind(destination)).context("listening")?;
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let _told = Tell(&enough);
            napi::pin_this_thread(receiving)?;
            receive(road, &listener, &enough, ramp, window)
        });
        let sent = road.client.enter(|| {
            napi::pin_this_thread(sending)?;
            send(destination, &enough)
        });
        let received = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        stop::check()?;
        sent.context("sending")?;
        received.context("receiving")
    })
}

fn receive(
    road: &Road,
    listener: &TcpListener,
    enough: &AtomicBool,
    ramp: Duration,
    window: Duration,
) -> anyhow::Result<Stream> {
    listener.set_nonblocking(true)?;
    let begin = Instant::now();
    let (stream, peer) = loop {
        match listener.accept() {
            Ok(accepted) => break accepted,
            Err(error) if error.kind() == ErrorKind::WouldBlock && begin.elapsed() < PATIENCE => {
                stop::check()?;
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("nobody connected"),
        }
    };
    let wanted = road.gate.seen_as(Road::guest(0));
    ensure!(peer.ip() == wanted, "the stream comes from {peer} instead of {wanted}");
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut all_bytes = 0;
    let mut until = |end: Instant| -> anyhow::Result<u64> {
        let mut bytes = 0;
        while Instant::now() < end {
            stop::check()?;
            match discard(&stream)? {
                0 => anyhow::bail!("the stream ended after {} bytes", all_bytes + bytes),
                some => bytes += some,
            }
        }
        all_bytes += bytes;
        Ok(bytes)
    };
    until(Instant::now() + ramp)?;
    let begin = Instant::now();
    let bytes = until(begin + window)?;
    let seconds = begin.elapsed().as_secs_f64();
    // Before the socket is closed, whereupon sending fails.
    enough.store(true, Relaxed);
    Ok(Stream { bytes, seconds, all_bytes })
}

/// Takes what is there, and copies nothing.
fn discard(stream: &TcpStream) -> io::Result<u64> {
    // SAFETY: with MSG_TRUNC TCP writes nothing to the buffer, tcp(7).
    let taken = unsafe { libc::recv(stream.as_raw_fd(), ptr::null_mut(), PIECE, libc::MSG_TRUNC) };
    u64::try_from(taken).map_err(|_| io::Error::last_os_error())
}

fn send(destination: SocketAddr, enough: &AtomicBool) -> anyhow::Result<()> {
    let pages: OwnedFd = memfd_create(c"bench-bulk", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&pages, PIECE as i64)?;
    let stream = TcpStream::connect_timeout(&destination, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    while !enough.load(Relaxed) {
        let mut offset = 0;
        // SAFETY: both descriptors are open, and the kernel advances one offset, which is ours.
        let sent = unsafe { libc::sendfile(stream.as_raw_fd(), pages.as_raw_fd(), &raw mut offset, PIECE) };
        // The receiver ends it.
        if sent < 0 && !enough.load(Relaxed) {
            return Err(io::Error::last_os_error()).context("sendfile");
        }
    }
    Ok(())
}
