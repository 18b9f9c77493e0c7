//! One step: send, look what arrived, ask who decided, compare.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use portcullis::explain::Question;
use serde::Serialize;

use super::plan::{Arrives, Decided, FRONTEND, Party, Protocol, Step};
use super::stand::{Counters, Stand};
use crate::lab::{
    Craft, Frame, Ip, RawSender, Sniffer, TcpEcho, Transport, UdpEcho, eventually_some, ping, tcp_exchange,
    udp_exchange,
};

/// For what has to arrive.
const LIMIT: Duration = Duration::from_secs(5);
/// For what has not to: less than a second, after which TCP tries again.
const SOON: Duration = Duration::from_millis(600);
/// For counters.
const COUNTED: Duration = Duration::from_secs(2);
/// Far end of every veth.
const DEVICE: &str = "eth0";
const PAYLOAD: &[u8] = b"portcullis quickstart";
const PINGS: u32 = 3;

/// What became of a step.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Outcome {
    pub what: &'static str,
    pub from: &'static str,
    pub protocol: Protocol,
    pub source: Ipv4Addr,
    /// 0 for ping, whose identifier the kernel chooses.
    pub source_port: u16,
    pub destination: Ipv4Addr,
    pub destination_port: u16,
    /// Whether it claims another's address.
    pub spoofed: bool,
    pub expected: Expected,
    /// Who the server saw; `null` if nothing arrived.
    pub arrived: Option<Seen>,
    /// Did the sender get its answer?
    pub answered: bool,
    /// The rule that decided, or the reason, as the daemon says.
    pub decided_by: String,
    /// By how much that rule's hits, or that reason's packets, grew.
    pub counted: u64,
    /// What the packet was counted under.
    pub reason: String,
    /// What is not as the policy says; empty if all is.
    pub problems: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Expected {
    pub arrives: String,
    pub decided_by: &'static str,
    pub reason: &'static str,
}

/// The sender as the server saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Seen {
    pub address: Ipv4Addr,
    /// The identifier, for ping.
    pub port: u16,
}

/// What was seen of a step from outside.
struct Observed {
    arrived: Vec<Seen>,
    /// What the sender says: why it got no answer.
    answer: Result<(), String>,
}

/// What the daemon said beforehand.
struct Promise {
    rule: String,
    reason: String,
    new_source: Option<IpAddr>,
}

/// Does it.
///
/// # Errors
/// If it could not be tried. What went otherwise than expected is in the outcome.
pub(super) fn step(stand: &Stand, step: &Step) -> anyhow::Result<Outcome> {
    let spoofed = step.source != stand.source_of(step.from);
    let promise = if spoofed { None } else { Some(ask_first(stand, step)?) };
    let before = stand.counters()?;
    let observed = send(stand, step, spoofed)?;
    let mut problems = Vec::new();
    let counters = counted(stand, step, &before)?;

    let (decided_by, reason) = match &promise {
        Some(Promise { rule, reason, .. }) if rule.is_empty() => (reason.clone(), reason.clone()),
        Some(Promise { rule, reason, .. }) => (rule.clone(), reason.clone()),
        None => {
            // `explain` answers for honest guests only; what the packet was dropped for stands in the counters.
            let reason = dropped_for(&before, &counters).unwrap_or_else(|| "nothing".to_owned());
            (reason.clone(), reason)
        }
    };
    let expected = step.expect;
    if decided_by != expected.decided.name() {
        problems.push(format!("{decided_by} decided, the policy says {}", expected.decided.name()));
    }
    if reason != expected.reason() {
        problems.push(format!("the reason is {reason}, not {}", expected.reason()));
    }
    // The counter of the one that is said to have decided, so that a wrong answer does not pass for a right one.
    let is_reason = decided_by == reason;
    let counted = if is_reason {
        counters.reason_since(&before, &decided_by)
    } else {
        counters.rule_since(&before, &decided_by)
    };
    if counted == 0 {
        problems.push(format!("the counter of {decided_by} did not move"));
    }
    if !is_reason && counters.reason_since(&before, &reason) == 0 {
        problems.push(format!("the counter of {reason} did not move"));
    }
    judge_arrival(stand, step, &observed, promise.as_ref(), &mut problems)?;

    Ok(Outcome {
        what: step.what,
        from: step.from.name(),
        protocol: step.protocol,
        source: step.source,
        source_port: step.source_port,
        destination: step.to.0,
        destination_port: step.to.1,
        spoofed,
        expected: Expected {
            arrives: expected.arrives.to_string(),
            decided_by: expected.decided.name(),
            reason: expected.reason(),
        },
        arrived: observed.arrived.first().copied(),
        answered: observed.answer.is_ok(),
        decided_by,
        counted,
        reason,
        problems,
    })
}

fn ask_first(stand: &Stand, step: &Step) -> anyhow::Result<Promise> {
    let (address, port) = step.to;
    let ping = step.protocol == Protocol::Icmp;
    let said = stand.explain(Question {
        from: match step.from {
            Party::Guest(name) => name.to_owned(),
            Party::Internet => step.source.to_string(),
        },
        to: if ping { address.to_string() } else { format!("{address}:{port}") },
        protocol: step.protocol.into(),
        from_port: (!ping).then_some(step.source_port),
        ..Question::default()
    })?;
    let new_source = said.translation.map(|translation| translation.new_source);
    Ok(Promise { rule: said.rule, reason: said.reason, new_source })
}

/// The counters, as soon as those that have to move have; else after a while.
fn counted(stand: &Stand, step: &Step, before: &Counters) -> anyhow::Result<Counters> {
    let mut read = stand.counters()?;
    let expected = step.expect;
    eventually_some(COUNTED, || {
        let rule = match expected.decided {
            Decided::Rule(rule) => read.rule_since(before, rule) > 0,
            Decided::Reason(_) => true,
        };
        if rule && read.reason_since(before, expected.reason()) > 0 {
            return Some(());
        }
        if let Ok(now) = stand.counters() {
            read = now;
        }
        None
    });
    Ok(read)
}

/// The reason of a drop that was counted since `before`.
fn dropped_for(before: &Counters, now: &Counters) -> Option<String> {
    let is_drop = |label: &str| {
        portcullis_common::Reason::ALL.iter().any(|reason| reason.label() == label && reason.is_drop())
    };
    now.reasons.keys().find(|reason| is_drop(reason) && now.reason_since(before, reason) > 0).cloned()
}

fn judge_arrival(
    stand: &Stand,
    step: &Step,
    observed: &Observed,
    promise: Option<&Promise>,
    problems: &mut Vec<String>,
) -> anyhow::Result<()> {
    let Observed { arrived, answer } = observed;
    let Some(seen) = arrived.first() else {
        if step.expect.arrives != Arrives::Not {
            problems.push(format!("nothing arrived, the policy says from {}", step.expect.arrives));
        }
        if answer.is_ok() {
            problems.push("an answer came from somebody else".to_owned());
        }
        return Ok(());
    };
    if arrived.len() > 1 {
        problems.push(format!("it arrived {} times", arrived.len()));
    }
    match step.expect.arrives {
        Arrives::Not => problems.push("it arrived, the policy says it does not".to_owned()),
        Arrives::KeepingPort(address) => {
            if *seen != (Seen { address, port: step.source_port }) {
                problems.push(format!("not from {address}:{}", step.source_port));
            }
        }
        Arrives::WithPortOf(guest) => {
            if seen.address != FRONTEND {
                problems.push(format!("not from {FRONTEND}"));
            }
            if !stand.owns(guest, seen.address, seen.port)? {
                problems.push(format!("{guest} does not own port {}", seen.port));
            }
        }
    }
    if let Err(why) = answer
        && step.expect.arrives != Arrives::Not
    {
        problems.push(format!("the answer did not come back: {why}"));
    }
    if let Some(promised) = promise.and_then(|promise| promise.new_source)
        && promised != IpAddr::V4(seen.address)
    {
        problems.push(format!("explain promised {promised}"));
    }
    Ok(())
}

fn send(stand: &Stand, step: &Step, spoofed: bool) -> anyhow::Result<Observed> {
    let sender = stand.namespace(step.from);
    let (server, local) = step.server;
    let eyes = Sniffer::start(stand.namespace(server), DEVICE)?;
    let began = Instant::now();
    let to = SocketAddr::from(step.to);
    let listen = SocketAddr::from((local, step.to.1));
    let limit = if step.expect.arrives == Arrives::Not { SOON } else { LIMIT };
    let port = Some(step.source_port);
    let text = |error: std::io::Error| error.to_string();
    let observed = match step.protocol {
        Protocol::Tcp => {
            let echo = TcpEcho::start(stand.namespace(server), listen)?;
            let answer = tcp_exchange(sender, port, to, PAYLOAD, limit).map(drop).map_err(text);
            Observed { arrived: echo.peers().into_iter().filter_map(seen).collect(), answer }
        }
        Protocol::Udp => {
            let echo = UdpEcho::start(stand.namespace(server), listen)?;
            let answer = if spoofed {
                lie(stand, step)?;
                Err("it cannot come".to_owned())
            } else {
                udp_exchange(sender, port, to, PAYLOAD, limit).map(drop).map_err(text)
            };
            if spoofed {
                std::thread::sleep(SOON);
            }
            Observed { arrived: echo.peers().into_iter().filter_map(seen).collect(), answer }
        }
        Protocol::Icmp => {
            let pinged = ping(sender, step.to.0.into(), PINGS, limit)?;
            let answered = pinged.received == pinged.sent && pinged.duplicates == 0;
            let answer = if answered { Ok(()) } else { Err(format!("{pinged:?}")) };
            let mut arrived: Vec<Seen> = eyes
                .frames()
                .iter()
                .filter(|frame| frame.at >= began)
                .filter_map(|frame| echo_request(frame, local))
                .collect();
            arrived.dedup();
            Observed { arrived, answer }
        }
    };
    Ok(with_unaccepted(observed, &eyes, step, listen))
}

/// Adds a sender whose packet came as far as the server's device and no connection became of.
fn with_unaccepted(mut observed: Observed, eyes: &Sniffer, step: &Step, listen: SocketAddr) -> Observed {
    if observed.arrived.is_empty() && step.protocol != Protocol::Icmp {
        let frames = eyes.frames();
        let mut came = frames.iter().filter(|frame| !frame.outgoing && frame.destination() == Some(listen));
        observed.arrived.extend(came.find_map(|frame| frame.source().and_then(seen)));
    }
    observed
}

/// Sends a datagram with the step's source address, which is not the sender's.
fn lie(stand: &Stand, step: &Step) -> anyhow::Result<()> {
    let spec = stand.topology.guest_spec(step.from.name());
    let raw = RawSender::open(stand.namespace(step.from), DEVICE)?;
    let frame = Craft::new(spec.mac, step.source, spec.gateway_mac, step.to.0);
    raw.send(&frame.udp(step.source_port, step.to.1, PAYLOAD)).context("sending the spoofed datagram")
}

fn seen(peer: SocketAddr) -> Option<Seen> {
    match peer.ip() {
        IpAddr::V4(address) => Some(Seen { address, port: peer.port() }),
        IpAddr::V6(_) => None,
    }
}

/// The sender of an echo request to `local`.
fn echo_request(frame: &Frame, local: Ipv4Addr) -> Option<Seen> {
    let Ip { source, destination, transport, .. } = frame.ip.as_ref()?;
    match (source, transport) {
        (IpAddr::V4(address), Transport::Icmp { kind: 8, id, .. })
            if !frame.outgoing && *destination == IpAddr::V4(local) =>
        {
            Some(Seen { address: *address, port: *id })
        }
        _ => None,
    }
}

impl Stand {
    /// The address this one really has.
    fn source_of(&self, party: Party) -> Ipv4Addr {
        match party {
            Party::Guest(name) => self.topology.guest_spec(name).address,
            Party::Internet => self.topology.spec().internet_address.addr(),
        }
    }
}
