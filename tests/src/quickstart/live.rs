//! The live view: what the daemon counts, every second, until Ctrl-C.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use portcullis::api::Request;
use portcullis::cli::table::Table;
use portcullis::flows::{Flow, FlowList, SnatUse};
use portcullis::observe::{Drops, RuleHits};

use super::screen::Screen;
use super::stand::Stand;
use super::traffic::Traffic;
use crate::stop;

const EVERY: Duration = Duration::from_secs(1);
/// How soon Ctrl-C is noticed.
const GLANCE: Duration = Duration::from_millis(50);
/// Of so many live flows, the busiest, those are shown that moved most.
const ASKED: usize = 2000;
/// Rows of each table, so that all four fit a window.
const FLOWS: usize = 5;
const REASONS: usize = 6;
const RULES: usize = 7;

/// What the daemon answered, all at about the same moment.
struct Answers {
    at: Instant,
    flows: FlowList,
    snat: SnatUse,
    drops: Drops,
    rules: RuleHits,
}

/// What a flow is known by.
type FlowKey<'a> = (&'a str, IpAddr, u16, IpAddr, u16);

/// Keeps the lab up and shows it until a signal asks to stop.
///
/// # Errors
/// If the daemon ends meanwhile.
pub(super) fn show(stand: &Stand) -> anyhow::Result<()> {
    let _traffic = Traffic::start(stand)?;
    let mut screen = Screen::open()?;
    let began = Instant::now();
    let mut before: Option<Answers> = None;
    while !stop::asked() {
        let answers = match Answers::ask(stand) {
            Ok(answers) => answers,
            // Ctrl-C is for every process of the terminal, the daemon too.
            Err(_) if stop::asked() => break,
            Err(error) => {
                return Err(error).with_context(|| format!("the daemon's log:\n{}", stand.daemon.log()));
            }
        };
        screen.draw(&view(stand, began.elapsed(), &answers, before.as_ref()))?;
        let next = answers.at + EVERY;
        before = Some(answers);
        while Instant::now() < next && !stop::asked() {
            std::thread::sleep(GLANCE);
        }
    }
    Ok(())
}

impl Answers {
    fn ask(stand: &Stand) -> anyhow::Result<Self> {
        Ok(Answers {
            at: Instant::now(),
            flows: stand.ask(&Request::Flows { guest: None, limit: Some(ASKED) })?,
            snat: stand.snat()?,
            drops: stand.drops()?,
            rules: stand.rules()?,
        })
    }

    /// Bytes by flow.
    fn flow_bytes(&self) -> BTreeMap<FlowKey<'_>, u64> {
        self.flows.flows.iter().map(|flow| (key(flow), flow.bytes_forward + flow.bytes_reverse)).collect()
    }

    fn reasons(&self) -> BTreeMap<String, u64> {
        self.drops.reasons.iter().map(|r| (r.reason.clone(), r.packets)).collect()
    }

    fn hits(&self) -> BTreeMap<String, u64> {
        self.rules.rules.iter().map(|r| (format!("{}/{}/{}", r.group, r.direction, r.name), r.hits)).collect()
    }
}

fn key(flow: &Flow) -> FlowKey<'_> {
    (&flow.protocol, flow.source, flow.source_port, flow.destination, flow.destination_port)
}

fn view(stand: &Stand, up: Duration, now: &Answers, before: Option<&Answers>) -> String {
    let elapsed = before.map_or(EVERY, |before| now.at - before.at);
    let mut text = format!("up {} s, Ctrl-C ends it and removes everything\n", up.as_secs());
    let spec = stand.daemon.spec();
    let _ = writeln!(text, "ask it:    {} --socket {} flows", spec.binary.display(), spec.socket.display());
    let _ =
        writeln!(text, "be vm1:    ip netns exec {} ping 198.51.100.1", stand.topology.guest("vm1").name());
    let _ = writeln!(text, "change it: {}", spec.policy.display());

    let _ = writeln!(text, "\nFLOWS: {} live, the busiest of this second", now.flows.total);
    let mut flows = Table::new(&["PROTO", "FROM", "TO", "ARRIVES FROM", "STATE", "BYTES>", "DECIDED BY"]);
    let earlier = before.map(Answers::flow_bytes).unwrap_or_default();
    let mut moved: Vec<(&Flow, u64, u64)> = now
        .flows
        .flows
        .iter()
        .map(|flow| {
            let bytes = flow.bytes_forward + flow.bytes_reverse;
            (flow, bytes, bytes.saturating_sub(earlier.get(&key(flow)).copied().unwrap_or(0)))
        })
        .collect();
    moved.sort_by_key(|(_, bytes, moved)| std::cmp::Reverse((*moved, *bytes)));
    for (flow, bytes, _) in moved.into_iter().take(FLOWS) {
        let name = |guest: &str, address| {
            if guest.is_empty() { format!("{address}") } else { short(guest).to_owned() }
        };
        flows.row([
            flow.protocol.clone(),
            format!("{}:{}", name(&flow.from_guest, flow.source), flow.source_port),
            format!("{}:{}", flow.destination, flow.destination_port),
            format!("{}:{}", flow.translated_source, flow.translated_source_port),
            flow.state.clone(),
            bytes.to_string(),
            flow.rule.clone(),
        ]);
    }
    text += &flows.render("none");

    text += "\nSNAT PORTS IN USE\n";
    let mut snat = Table::new(&["GUEST", "UNDER", "OWNED>", "TCP>", "UDP>", "PING>"]);
    for guest in now.snat.guests.iter().filter(|guest| !guest.ports.is_empty()) {
        let under: Vec<String> = guest.addresses.iter().map(ToString::to_string).collect();
        let used = ["tcp", "udp", "icmp"].map(|protocol| guest.used(protocol).to_string());
        let [tcp, udp, icmp] = used;
        snat.row([
            short(&guest.guest).to_owned(),
            under.join(","),
            guest.allocated().to_string(),
            tcp,
            udp,
            icmp,
        ]);
    }
    text += &snat.render("none");

    text += "\nREASONS\n";
    text += &top("REASON", "PACKETS>", &now.reasons(), before.map(Answers::reasons), elapsed, REASONS);
    text += "\nRULES HIT\n";
    text += &top("RULE", "HITS>", &now.hits(), before.map(Answers::hits), elapsed, RULES);
    text
}

/// The largest counters with their rates.
fn top(
    what: &'static str,
    unit: &'static str,
    now: &BTreeMap<String, u64>,
    before: Option<BTreeMap<String, u64>>,
    elapsed: Duration,
    most: usize,
) -> String {
    let mut largest: Vec<(&String, u64)> =
        now.iter().map(|(name, count)| (name, *count)).filter(|(_, n)| *n > 0).collect();
    largest.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mut table = Table::new(&[unit, "A SECOND>", what]);
    for (name, count) in largest.into_iter().take(most) {
        let rate = before.as_ref().map(|before| rate(count, before.get(name).copied().unwrap_or(0), elapsed));
        table.row([
            count.to_string(),
            rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}")),
            name.clone(),
        ]);
    }
    table.render("none")
}

fn rate(now: u64, before: u64, elapsed: Duration) -> f64 {
    now.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(0.001)
}

/// `vm1/primary` is `vm1`: each guest here has one address.
fn short(guest: &str) -> &str {
    guest.split_once('/').map_or(guest, |(guest, _)| guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_counters_come_first_with_their_rates() {
        let counts = |counts: &[(&str, u64)]| {
            counts.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect::<BTreeMap<_, _>>()
        };
        let now = counts(&[("a", 5), ("b", 40), ("c", 0), ("d", 4)]);
        let text = top("WHAT", "N>", &now, Some(counts(&[("b", 20)])), Duration::from_secs(2), 2);
        assert_eq!(text, " N  A SECOND  WHAT\n40      10.0  b\n 5       2.5  a\n");
    }
}
