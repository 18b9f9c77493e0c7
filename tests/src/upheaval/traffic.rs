//! Traffic of one guest, on flows that live as long as it does: datagrams with sequence numbers at [`super::RATE`], of which the
//! server answers every [`super::ANSWERED`]th, a TCP connection whose every byte comes back, and pings. [`Traffic::settle`] lets
//! what is under way arrive and says what did not.
//!
//! What no gateway can do anything about is kept out: a sender is never further ahead of its receiver than a link's queue is
//! long, so that nothing is lost for want of a processor, and both ends go before everybody else who wants one.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBuf;

use super::connection::{echo_bytes, lost_segments, receive_bytes, send_bytes};
use super::datagrams::{receive_answers, receive_datagrams, send_datagrams, socket};
use crate::edge::Edge;
use crate::lab::{Namespace, eventually, ping, tcp_connect};

/// Bytes of the connection at either end: together with the datagrams less than the 256 places of a veth's ring.
const SEND_BUFFER: usize = 16 << 10;
/// For what is under way to arrive, retransmissions of TCP included.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a thread that waits for packets looks whether it is to end.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// Where the datagrams and the connection go.
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);
const UDP_PORT: u16 = 7001;
const TCP_PORT: u16 = 7002;

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
pub(super) struct Counts {
    pub datagrams_sent: AtomicU64,
    pub datagrams_arrived: AtomicU64,
    pub out_of_order: AtomicU64,
    pub answers_sent: AtomicU64,
    pub answers_arrived: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub bytes_returned: AtomicU64,
    pings_sent: AtomicU64,
    pings_answered: AtomicU64,
    pub busy_micros: AtomicU64,
    peers: Mutex<Vec<SocketAddr>>,
    /// Senders send nothing; one bit for each that has noticed.
    pub paused: AtomicBool,
    resting: [AtomicBool; 3],
    stopped: AtomicBool,
}

impl Counts {
    pub(super) fn saw(&self, peer: SocketAddr) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if !peers.contains(&peer) {
            peers.push(peer);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Is this sender to send now?
    pub(super) fn may_send(&self, sender: usize) -> bool {
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
