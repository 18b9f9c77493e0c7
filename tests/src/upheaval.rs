//! What a gateway has to go through without losing a packet: killed, started again, upgraded, given another policy.
//!
//! [`Traffic`] runs through a gateway for as long as it lives, on flows that live as long: datagrams with sequence numbers at
//! [`RATE`], of which the server answers every [`ANSWERED`]th, a TCP connection whose every byte comes back, and pings.
//! [`Upheaval::strike`] does one thing to the daemon at a random instant. [`Traffic::settle`] lets what is under way arrive
//! and says what did not.
//!
//! What no gateway can do anything about is kept out: a sender is never further ahead of its receiver than a link's queue is
//! long, so that nothing is lost for want of a processor, and both ends go before everybody else who wants one.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, SndBuf};

use crate::edge::Edge;
use crate::lab::{Namespace, eventually, ping, tcp_connect};
use crate::random::Random;

/// Datagrams a second, if there is a processor for them.
pub const RATE: u64 = 60_000;
/// The server answers every so many.
pub const ANSWERED: u64 = 16;
/// Datagrams under way at most, and bytes of the connection at either end: together less than the 256 places of a veth's ring.
const WINDOW: u64 = 128;
const SEND_BUFFER: usize = 16 << 10;
/// Bytes written to the connection every millisecond.
const CHUNK: usize = 4096;
/// For what is under way to arrive, retransmissions of TCP included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the datagrams and the connection go.
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);
const UDP_PORT: u16 = 7001;
const TCP_PORT: u16 = 7002;

/// One thing that happens to a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upheaval {
    /// SIGKILL; a new one some time later.
    Kill,
    /// SIGTERM; a new one at once.
    Restart,
    /// SIGTERM; another build with the same layout.
    Upgrade,
    /// `apply` of another policy.
    Change,
    /// SIGKILL, and again in the middle of the next start.
    KilledStart,
}

impl Upheaval {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Kill, Self::Restart, Self::Upgrade, Self::Change, Self::KilledStart];

    /// Does it to the daemon at an instant drawn from `random`, and returns once a daemon answers again and `policy`, which
    /// should differ from the one in force for [`Upheaval::Change`], is in force if it was that.
    ///
    /// # Errors
    /// If the daemon does not come back, or refuses the policy.
    pub fn strike(self, edge: &mut Edge, policy: &str, random: &mut Random) -> anyhow::Result<()> {
        let mut at_random = |within_ms: usize| {
            // The instant itself, not a wait for something.
            std::thread::sleep(Duration::from_micros(
                1000 * random.below(within_ms) as u64 + random.below(1000) as u64,
            ));
        };
        at_random(300);
        match self {
            Self::Kill => {
                edge.daemon.kill();
                at_random(300);
                edge.restart()
            }
            Self::Restart => {
                edge.daemon.terminate()?;
                edge.restart()
            }
            Self::Upgrade => {
                let before = edge.daemon.spec().binary.clone();
                edge.daemon.spec_mut().binary = another_build(edge)?;
                edge.daemon.terminate()?;
                edge.restart().with_context(|| format!("an upgrade from {}", before.display()))
            }
            Self::Change => {
                let generation = edge.generation()?;
                let (applied, said) = edge.apply(policy)?;
                ensure!(applied, "the policy was refused: {said}");
                let now = edge.generation()?;
                ensure!(now > generation, "generation {generation} is still in force: {said}");
                Ok(())
            }
            Self::KilledStart => {
                edge.daemon.kill();
                edge.daemon.start()?;
                at_random(2500);
                edge.daemon.kill();
                edge.restart()
            }
        }
    }
}

/// The same program in a file of its own that differs: what an upgrade with the same layout is to the datapath, which looks at
/// layouts and shapes and never at builds (`controller/src/datapath/pins.rs`).
fn another_build(edge: &Edge) -> anyhow::Result<PathBuf> {
    let mut program = std::fs::read(&edge.daemon.spec().binary)?;
    // Behind all that the loader looks at.
    program.extend_from_slice(b"another build");
    let place = edge.bpffs.scratch().path().join(format!("portcullis-{}", program.len()));
    std::fs::write(&place, program)?;
    std::fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(place)
}

/// What has passed since the traffic began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub datagrams_sent: u64,
    pub datagrams_arrived: u64,
    /// Arrived a second time, or after a later one.
    pub out_of_order: u64,
    pub answers_sent: u64,
    pub answers_arrived: u64,
    pub bytes_sent: u64,
    pub bytes_returned: u64,
    /// Segments that either end of the connection sent again and the other had not got (what it had, it reports: RFC 2883).
    pub segments_lost: u64,
    pub pings_sent: u64,
    pub pings_answered: u64,
    /// Under which addresses and ports the server has seen the datagrams, and the connection.
    pub peers: Vec<SocketAddr>,
    /// Over the whole time, pauses not counted.
    pub datagrams_per_second: u64,
}

impl Tally {
    /// What is wrong with it, if anything is.
    ///
    /// # Errors
    /// If a packet was lost, doubled or out of order, or a flow has changed its address or port.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.datagrams_sent == self.datagrams_arrived
                && self.answers_sent == self.answers_arrived
                && self.bytes_sent == self.bytes_returned
                && self.pings_sent == self.pings_answered
                && self.segments_lost == 0
                && self.out_of_order == 0,
            "packets were lost: {self:?}"
        );
        ensure!(self.peers.len() == 2, "a flow has another address or port: {self:?}");
        ensure!(
            self.datagrams_sent > 0 && self.answers_sent > 0 && self.pings_sent > 0,
            "no traffic: {self:?}"
        );
        Ok(())
    }
}

/// The sum of what threads have counted.
#[derive(Default)]
struct Counts {
    datagrams_sent: AtomicU64,
    datagrams_arrived: AtomicU64,
    out_of_order: AtomicU64,
    answers_sent: AtomicU64,
    answers_arrived: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_returned: AtomicU64,
    pings_sent: AtomicU64,
    pings_answered: AtomicU64,
    busy_micros: AtomicU64,
    peers: Mutex<Vec<SocketAddr>>,
    /// Senders send nothing; one bit for each that has noticed.
    paused: AtomicBool,
    resting: [AtomicBool; 3],
    stopped: AtomicBool,
}

impl Counts {
    fn saw(&self, peer: SocketAddr) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if !peers.contains(&peer) {
            peers.push(peer);
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Is this sender to send now?
    fn may_send(&self, sender: usize) -> bool {
        let paused = self.paused.load(SeqCst);
        self.resting[sender].store(paused, SeqCst);
        !paused
    }
}

/// Traffic of one guest through a gateway, until this is dropped.
pub struct Traffic {
    counts: Arc<Counts>,
    client: TcpStream,
    server: TcpStream,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Starts it, from `guest` to the edge's internet, and returns once all of it runs.
    pub fn start(edge: &Edge, guest: &str) -> anyhow::Result<Self> {
        let (inside, outside) = (edge.topology.guest(guest), edge.topology.internet());
        let counts = Arc::new(Counts::default());
        let to_udp = SocketAddr::from((SERVER, UDP_PORT));
        let receiver = socket(outside, to_udp)?;
        let sender = socket(inside, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        sender.connect(to_udp)?;
        let listener = outside.enter(|| TcpListener::bind((SERVER, TCP_PORT)))?;
        let client = tcp_connect(inside, None, (SERVER, TCP_PORT).into(), PATIENCE)?;
        let (server, peer) = listener.accept()?;
        counts.saw(peer);
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            setsockopt(stream, SndBuf, &SEND_BUFFER).context("the size of a socket's buffer")?;
            stream.set_read_timeout(Some(POLL))?;
        }
        let mut traffic = Self { counts, client, server, threads: Vec::new() };
        let answers = sender.try_clone()?;
        traffic.run("datagrams", move |counts| send_datagrams(&sender, counts));
        traffic.run("arrivals", move |counts| receive_datagrams(&receiver, counts));
        traffic.run("answers", move |counts| receive_answers(&answers, counts));
        let (writer, reader, echo) =
            (traffic.client.try_clone()?, traffic.client.try_clone()?, traffic.server.try_clone()?);
        traffic.run("bytes", move |counts| send_bytes(&writer, counts));
        traffic.run("returned", move |counts| receive_bytes(&reader, counts));
        traffic.run("echo", move |counts| echo_bytes(&echo, counts));
        let inside = inside.clone();
        traffic.run("pings", move |counts| send_pings(&inside, counts));
        let began = |count: &AtomicU64, enough| count.load(SeqCst) >= enough;
        let counts = &traffic.counts;
        ensure!(
            eventually(PATIENCE, || began(&counts.datagrams_arrived, 1000)
                && began(&counts.answers_arrived, 10)
                && began(&counts.bytes_returned, 1)
                && began(&counts.pings_answered, 1)),
            "the traffic did not begin: {:?}",
            traffic.tally()?
        );
        Ok(traffic)
    }

    fn run(&mut self, name: &str, work: impl FnOnce(&Counts) -> io::Result<()> + Send + 'static) {
        let counts = Arc::clone(&self.counts);
        let what = name.to_owned();
        let thread = std::thread::Builder::new().name(format!("traffic-{name}")).spawn(move || {
            // SAFETY: plain arguments; 0 is the calling thread. A refusal costs speed and nothing else.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
            if let Err(error) = work(&counts)
                && !counts.is_stopped()
            {
                panic!("{what}: {error}");
            }
        });
        self.threads.extend(thread);
    }

    /// Waits until so many more datagrams have arrived: whatever is waited for happens under traffic.
    pub fn go_on(&self, datagrams: u64) -> anyhow::Result<()> {
        let until = self.counts.datagrams_arrived.load(SeqCst) + datagrams;
        let arrived = eventually(PATIENCE, || self.counts.datagrams_arrived.load(SeqCst) >= until);
        ensure!(arrived, "the datagrams have stopped arriving: {:?}", self.tally()?);
        Ok(())
    }

    /// Stops sending for a moment, waits for what is under way, and says what has passed so far. Then all goes on.
    pub fn settle(&self) -> anyhow::Result<Tally> {
        let counts = &self.counts;
        counts.paused.store(true, SeqCst);
        ensure!(
            eventually(PATIENCE, || counts.resting.iter().all(|resting| resting.load(SeqCst))),
            "a sender does not pause: {:?}",
            self.tally()?
        );
        let whole = || -> bool { self.tally().is_ok_and(|tally| tally.check().is_ok()) };
        // Given up after long: then the tally says what is missing.
        eventually(Duration::from_secs(8), whole);
        let tally = self.tally()?;
        counts.paused.store(false, SeqCst);
        Ok(tally)
    }

    fn tally(&self) -> anyhow::Result<Tally> {
        let counts = &self.counts;
        let of = |count: &AtomicU64| count.load(SeqCst);
        let busy = of(&counts.busy_micros).max(1);
        Ok(Tally {
            datagrams_sent: of(&counts.datagrams_sent),
            datagrams_arrived: of(&counts.datagrams_arrived),
            out_of_order: of(&counts.out_of_order),
            answers_sent: of(&counts.answers_sent),
            answers_arrived: of(&counts.answers_arrived),
            bytes_sent: of(&counts.bytes_sent),
            bytes_returned: of(&counts.bytes_returned),
            segments_lost: lost_segments(&self.client)? + lost_segments(&self.server)?,
            pings_sent: of(&counts.pings_sent),
            pings_answered: of(&counts.pings_answered),
            peers: counts.peers.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            datagrams_per_second: of(&counts.datagrams_sent) * 1_000_000 / busy,
        })
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.counts.stopped.store(true, SeqCst);
        for stream in [&self.client, &self.server] {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("a thread of the traffic panicked; its message is above");
            }
        }
    }
}

/// How often a thread that waits for packets looks whether it is to end.
const POLL: Duration = Duration::from_millis(50);

fn socket(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = crate::lab::udp_socket(namespace, address)?;
    socket.set_read_timeout(Some(POLL))?;
    setsockopt(&socket, RcvBufForce, &(8 << 20)).context("the size of a socket's buffer")?;
    Ok(socket)
}

fn send_datagrams(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    // At most so many at once when it comes late: the rest of what it has missed is not sent.
    const BURST: u64 = 32;
    let mut sequence = 0u64;
    let mut due = Instant::now();
    while !counts.is_stopped() {
        let open = sequence - counts.datagrams_arrived.load(SeqCst).min(sequence) < WINDOW;
        if !counts.may_send(0) || !open {
            let stopped = Instant::now();
            std::thread::yield_now();
            if counts.paused.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                counts.busy_micros.fetch_add(stopped.elapsed().as_micros() as u64, SeqCst);
            }
            due = Instant::now();
            continue;
        }
        let began = Instant::now();
        let late = began.saturating_duration_since(due).as_micros() as u64 * RATE / 1_000_000;
        for _ in 0..late.clamp(1, BURST) {
            let mut payload = [0u8; 64];
            payload[..8].copy_from_slice(&sequence.to_be_bytes());
            // Counted first, so that it never seems to arrive before it is sent.
            counts.datagrams_sent.fetch_add(1, SeqCst);
            sequence += 1;
            socket.send(&payload)?;
        }
        due = Instant::now();
        // Short of a microsecond's grain the loop is the clock.
        std::thread::sleep(Duration::from_micros(1_000_000 / RATE));
        counts.busy_micros.fetch_add(began.elapsed().as_micros() as u64, SeqCst);
    }
    Ok(())
}

fn receive_datagrams(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    let (mut buffer, mut next) = ([0u8; 128], 0u64);
    let mut known = None;
    while !counts.is_stopped() {
        let (length, peer) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => return Err(error),
        };
        if known != Some(peer) {
            counts.saw(peer);
            known = Some(peer);
        }
        let Some(sequence) = buffer[..length].first_chunk().copied().map(u64::from_be_bytes) else {
            continue;
        };
        if sequence < next {
            counts.out_of_order.fetch_add(1, SeqCst);
        }
        next = next.max(sequence + 1);
        counts.datagrams_arrived.fetch_add(1, SeqCst);
        if sequence % ANSWERED == 0 {
            counts.answers_sent.fetch_add(1, SeqCst);
            socket.send_to(&buffer[..length], peer)?;
        }
    }
    Ok(())
}

fn receive_answers(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    let mut buffer = [0u8; 128];
    while !counts.is_stopped() {
        match socket.recv(&mut buffer) {
            Ok(_) => _ = counts.answers_arrived.fetch_add(1, SeqCst),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The byte at a place of the stream.
fn byte_at(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn send_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let mut place = 0;
    while !counts.is_stopped() {
        if counts.may_send(1) {
            let chunk: Vec<u8> = (place..place + CHUNK as u64).map(byte_at).collect();
            place += CHUNK as u64;
            counts.bytes_sent.store(place, SeqCst);
            stream.write_all(&chunk)?;
        }
        // The rate of the sender, which waits for nothing.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn receive_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let (mut buffer, mut place) = (vec![0; 1 << 16], 0u64);
    while !counts.is_stopped() {
        match stream.read(&mut buffer) {
            Ok(length) => {
                let right = buffer[..length].iter().zip(place..).all(|(byte, place)| *byte == byte_at(place));
                if !right {
                    return Err(io::Error::new(ErrorKind::InvalidData, "other bytes than were sent"));
                }
                place += length as u64;
                counts.bytes_returned.store(place, SeqCst);
                if length == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn echo_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    while !counts.is_stopped() {
        match stream.read(&mut buffer) {
            Ok(length) => stream.write_all(&buffer[..length])?,
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One ping after the other, each a flow of its own.
fn send_pings(guest: &Namespace, counts: &Counts) -> io::Result<()> {
    while !counts.is_stopped() {
        if counts.may_send(2) {
            let outcome =
                ping(guest, SERVER.into(), 25, Duration::from_secs(10)).map_err(io::Error::other)?;
            counts.pings_sent.fetch_add(outcome.sent.into(), SeqCst);
            counts.pings_answered.fetch_add(outcome.received.into(), SeqCst);
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Segments that were sent again because they had not arrived: all that were sent again, less those of which the other end says
/// that it had them (`tcpi_total_retrans`, `tcpi_dsack_dups` of linux/tcp.h; the structure only grows).
fn lost_segments(stream: &TcpStream) -> anyhow::Result<u64> {
    const TOTAL_RETRANS: usize = 100;
    const DSACK_DUPS: usize = 216;
    let mut info = [0u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the option writes at most `length` bytes, the size of `info`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "TCP_INFO: {}", io::Error::last_os_error());
    ensure!(length as usize >= DSACK_DUPS + 4, "this kernel's TCP_INFO has {length} bytes");
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    Ok(u64::from(word(TOTAL_RETRANS).saturating_sub(word(DSACK_DUPS))))
}
