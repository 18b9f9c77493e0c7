//! How long a UDP datagram takes there and back while the gateway is half busy.
//!
//! One thread on the first processor sends the background and the pings, answers them and never sleeps; the gateway is on
//! the last processor, and so is what the kernel does until a datagram is in its socket. So no scheduler stands between what
//! is measured but the one of the gateway's polling threads.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::figure::{Better, By, Figure};
use super::napi;
use super::options::Options;
use super::report::{Report, Verified};
use super::road::{Gate, Links, NOBODY, Road, RoadSpec, SERVERS};
use super::section::Section;
use super::statistics::median;
use super::turns::{column, in_turns};
use crate::random::Random;
use crate::stop;

pub(super) const SECTION: Section =
    Section { name: "latency", title: "Latency of UDP there and back at half load", figures, measure };

const GATES: [Gate; 4] = [Gate::Forwarding, Gate::Nftables, Gate::Xdp, Gate::Tc];
const GUESTS: u16 = 64;
/// Ports that each guest's background goes to: 1,024 flows in all.
const PORTS: u16 = 16;
const FIRST_PORT: u16 = 9000;
const ECHO_PORT: u16 = 7;
/// Bytes of a datagram: with its headers the smallest frame there is.
const PAYLOAD: usize = 18;
/// A ping without an answer for so long is lost.
const LOST: Duration = Duration::from_millis(5);
/// Between an answer and the next ping at most, so that pings and background do not run in step.
const PAUSE_NANOSECONDS: usize = 30_000;
/// Background that is late is made up for in bursts of no more than this many.
const BURST: u32 = 4;
/// Share of lost pings above which a way is broken, and not only slow.
const BROKEN: f64 = 0.2;

fn figures() -> Vec<String> {
    let of = |gate: Gate| [50, 99].map(|percent| name(gate, percent));
    [Gate::Xdp, Gate::Tc].into_iter().flat_map(of).collect()
}

fn name(gate: Gate, percent: u32) -> String {
    match gate {
        Gate::Wire => format!("wire_latency_p{percent}"),
        Gate::Forwarding => format!("forwarding_latency_p{percent}"),
        Gate::Nftables => format!("nft_latency_p{percent}"),
        Gate::Xdp => format!("latency_p{percent}"),
        Gate::Tc => format!("latency_p{percent}_tc"),
    }
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let mut ends = Vec::new();
    for gate in GATES {
        options.tell(&format!("building the namespaces for {}", gate.title()));
        ends.push(Ends::build(gate).with_context(|| gate.title())?);
        let last = ends.last_mut().context("it was just pushed")?;
        report.verified.push(last.inspect().with_context(|| gate.title())?);
    }
    let nftables =
        ends.iter_mut().find(|ends| ends.road.gate == Gate::Nftables).context("nftables is there")?;
    let most = nftables.most(options.scale.pick(20, 100, 300)).context("the most that nftables forwards")?;
    let rate = most / 2.0;
    options.tell(&format!("background: {:.0} packets a second, half of what nftables forwards", rate));
    report.note(format!(
        "latency: beside the pings {:.0} packets a second of 1,024 flows, half of the {:.0} that nftables forwarded on \
         the same way",
        rate, most
    ));
    let mut lost = [0; GATES.len()];
    let (rounds, outcome) = in_turns(options, "latency", &mut ends, |ends| {
        let heard = ends.ping(rate, options.ramp, options.turn()).with_context(|| ends.road.gate.title())?;
        let at = GATES.iter().position(|&gate| gate == ends.road.gate).context("it is one of them")?;
        lost[at] += heard.lost;
        Ok([heard.percentile(0.5), heard.percentile(0.99), heard.busy])
    });
    for (gate, lost) in GATES.into_iter().zip(lost).filter(|(_, lost)| *lost > 0) {
        report
            .note(format!("latency: {lost} pings were lost by {}, and count as {LOST:?} each", gate.title()));
    }
    if rounds.iter().all(|rounds| !rounds.is_empty()) {
        for (value, percent) in [50, 99].into_iter().enumerate() {
            let [forwarding, nftables] = [0, 1].map(|gate: usize| column(&rounds[gate], value));
            for (gate, rounds) in GATES.into_iter().zip(&rounds) {
                let mut figure = Figure::from_samples(name(gate, percent), "µs", &column(rounds, value))
                    .ratio_to_limit_of("the kernel's forwarding without rules", &forwarding)
                    .ratio_to_nftables_of(&nftables);
                if gate.is_portcullis() {
                    figure = figure.must(By::RatioToNftables, Better::Less, 1.0, 0.95);
                }
                figure.busy = median(&column(rounds, 2));
                report.figures.push(figure);
            }
        }
    }
    outcome
}

/// The sockets, before the namespaces they are in.
struct Ends {
    /// Of all guests, for what nobody answers.
    background: Vec<UdpSocket>,
    pings: UdpSocket,
    echo: UdpSocket,
    road: Road,
    /// Background packets so far.
    sent: u32,
}

/// Round trips in microseconds, ascending.
struct Heard {
    spans: Vec<f64>,
    /// Pings that were given up; each is among the round trips.
    lost: u64,
    /// Share of the time that the gateway's threads were running.
    busy: f64,
}

impl Heard {
    fn percentile(&self, share: f64) -> f64 {
        let at = (self.spans.len() as f64 * share) as usize;
        self.spans.get(at.min(self.spans.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

impl Ends {
    fn build(gate: Gate) -> anyhow::Result<Self> {
        let road = Road::build(&RoadSpec {
            gate,
            links: Links::Polled,
            guests: GUESTS,
            ports: 0,
            max_flows: 16_384,
            extra: String::new(),
        })?;
        let bind = |address: Ipv4Addr, port| -> anyhow::Result<UdpSocket> {
            let socket = UdpSocket::bind(SocketAddrV4::new(address, port))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let guests = road.guests();
        let (background, pings) = road.client.enter(|| -> anyhow::Result<_> {
            let background =
                guests.iter().map(|&guest| bind(guest, 0)).collect::<anyhow::Result<Vec<_>>>()?;
            let pings = bind(guests[0], 0)?;
            pings.connect(SocketAddrV4::new(SERVERS[0], ECHO_PORT))?;
            Ok((background, pings))
        })?;
        let echo = road.server.enter(|| bind(SERVERS[0], ECHO_PORT))?;
        Ok(Self { background, pings, echo, road, sent: 0 })
    }

    /// Pings one by one, without background: all are answered, and the server sees them under the right address.
    fn inspect(&mut self) -> anyhow::Result<Verified> {
        const PINGS: u32 = 64;
        let wanted = self.road.gate.seen_as(Road::guest(0));
        for number in 0..PINGS {
            let mut payload = [0; PAYLOAD];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            self.pings.send(&payload)?;
            let deadline = Instant::now() + Duration::from_secs(2);
            let (heard, peer) = receive(&self.echo, deadline)?.context("a ping did not arrive")?;
            ensure!(peer.ip() == wanted, "a ping comes from {peer} instead of {wanted}");
            self.echo.send_to(&heard, peer)?;
            let (heard, _) = receive(&self.pings, deadline)?.context("an answer did not arrive")?;
            ensure!(heard == payload, "the answer is not what was sent");
        }
        Ok(Verified {
            section: String::new(),
            figure: name(self.road.gate, 99),
            live_flows: 1,
            sent: PINGS,
            seen: PINGS.into(),
            translated: if self.road.gate == Gate::Forwarding { 0 } else { PINGS.into() },
        })
    }

    /// Packets a second that leave the gateway when more come than it can take.
    fn most(&mut self, milliseconds: u64) -> anyhow::Result<f64> {
        let (background, sent) = (&self.background, &mut self.sent);
        let road = &self.road;
        road.client.enter(|| {
            napi::pin_this_thread(napi::processors().0)?;
            let mut flood = |span: Duration| -> anyhow::Result<()> {
                let begin = Instant::now();
                while begin.elapsed() < span {
                    stop::check()?;
                    for _ in 0..64 {
                        next(background, sent);
                    }
                }
                Ok(())
            };
            // Each flow's first packets are not what is measured.
            flood(Duration::from_millis(20))?;
            let (before, begin) = (road.forwarded()?, Instant::now());
            flood(Duration::from_millis(milliseconds))?;
            let (seconds, after) = (begin.elapsed().as_secs_f64(), road.forwarded()?);
            Ok((after - before) as f64 / seconds)
        })
    }

    fn ping(&mut self, rate: f64, ramp: Duration, window: Duration) -> anyhow::Result<Heard> {
        let Self { background, pings, echo, road, sent } = self;
        road.client.enter(|| {
            napi::pin_this_thread(napi::processors().0)?;
            let gap = Duration::from_secs_f64(1.0 / rate);
            let mut random = Random(0x9e37_79b9_7f4a_7c15);
            let (mut spans, mut lost) = (Vec::new(), 0u64);
            let (mut number, mut asked): (u64, Option<Instant>) = (0, None);
            let (begin, busy) = (Instant::now(), road.gateway_time()?);
            let (mut due, mut next_ping) = (begin, begin);
            loop {
                let now = Instant::now();
                if now >= begin + ramp + window {
                    break;
                }
                stop::check()?;
                for _ in 0..BURST {
                    if due > now {
                        break;
                    }
                    next(background, sent);
                    due += gap;
                }
                // What could not be sent in time, while this thread did not run, is not sent at once.
                due = due.max(now.checked_sub(gap * BURST).unwrap_or(now));
                let mut buffer = [0; PAYLOAD];
                if let Ok((length, peer)) = echo.recv_from(&mut buffer) {
                    let _ = echo.send_to(&buffer[..length], peer);
                }
                match asked {
                    None if now >= next_ping => {
                        number += 1;
                        buffer[..8].copy_from_slice(&number.to_be_bytes());
                        asked = Some(Instant::now());
                        pings.send(&buffer)?;
                    }
                    None => {}
                    Some(since) => match pings.recv(&mut buffer) {
                        Ok(_) if buffer[..8] == number.to_be_bytes() => {
                            let span = since.elapsed();
                            if since >= begin + ramp {
                                spans.push(span.as_secs_f64() * 1e6);
                            }
                            asked = None;
                            next_ping = now + Duration::from_nanos(random.below(PAUSE_NANOSECONDS) as u64);
                        }
                        // One that was given up for lost.
                        Ok(_) => {}
                        Err(_) if now.saturating_duration_since(since) > LOST => {
                            lost += 1;
                            spans.push(LOST.as_secs_f64() * 1e6);
                            asked = None;
                        }
                        Err(_) => {}
                    },
                }
            }
            let busy = (road.gateway_time()? - busy).as_secs_f64() / begin.elapsed().as_secs_f64();
            let pings = spans.len();
            ensure!(
                pings > 0 && lost as f64 <= 1.0 + pings as f64 * BROKEN,
                "{lost} of {pings} pings are lost"
            );
            spans.sort_by(f64::total_cmp);
            Ok(Heard { spans, lost, busy })
        })
    }
}

/// The next background packet. If there is no room for it, it is lost.
fn next(background: &[UdpSocket], sent: &mut u32) {
    let guests = background.len() as u32;
    let port = FIRST_PORT + (*sent / guests % u32::from(PORTS)) as u16;
    let _ = background[(*sent % guests) as usize].send_to(&[0; PAYLOAD], SocketAddrV4::new(NOBODY, port));
    *sent = sent.wrapping_add(1);
}

/// A datagram, if one comes until then.
fn receive(socket: &UdpSocket, deadline: Instant) -> anyhow::Result<Option<(Vec<u8>, std::net::SocketAddr)>> {
    let mut buffer = [0; PAYLOAD + 1];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, peer)) => return Ok(Some((buffer[..length].to_vec(), peer))),
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if Instant::now() >= deadline => return Ok(None),
            Err(_) => stop::check()?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_round_trips() {
        let heard = Heard { spans: (0..1000).map(f64::from).collect(), lost: 0, busy: 0.0 };
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|share| heard.percentile(share)), [0.0, 500.0, 990.0, 999.0]);
        assert_eq!(Heard { spans: Vec::new(), lost: 0, busy: 0.0 }.percentile(0.5), 0.0);
    }
}
