//! `whois`: who has, or had, a public port. Answered from the history on disk alone, so without the daemon just as well.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::history::replay;
use super::holdings::{Held, Holdings, Thing};
use super::time::{parse, unix, unix_seconds};
use crate::api::Failure;
use crate::cli::table::Table;
use crate::daemon::InForce;

/// Who has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Whois {
    /// `203.0.113.5:23456`
    pub port: String,
    /// The moment, RFC 3339.
    pub at: String,
    /// One for each protocol that was asked for.
    pub answers: Vec<WhoisAnswer>,
    /// What makes the answers doubtful.
    pub notes: Vec<String>,
}

/// For one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WhoisAnswer {
    pub protocol: String,
    /// `snat`, `listener`, `instance`, `nobody`; `unknown` before the history begins.
    pub kind: String,
    /// `vm1/ipconfig1`; `null` if it is nobody's, or a listener with several backends.
    pub guest: Option<String>,
    /// The listener's rule.
    pub rule: Option<String>,
    /// Was the port being given back? Only flows from before were on it then.
    pub draining: bool,
    /// Since when it is (was) so, RFC 3339.
    pub since: Option<String>,
    /// For people.
    pub text: String,
}

/// Reads `203.0.113.5:23456`, `[2001:db8::5]:23456`, with `/tcp` or `/udp` behind it or without.
pub fn end_and_protocol(text: &str) -> Result<(SocketAddr, Option<String>), Failure> {
    let (end, protocol) = match text.rsplit_once('/') {
        Some((end, protocol)) => (end, Some(protocol.to_ascii_lowercase())),
        None => (text, None),
    };
    let protocol_fits = protocol.as_deref().is_none_or(|p| matches!(p, "tcp" | "udp"));
    match end.parse() {
        Ok(end) if protocol_fits => Ok((end, protocol)),
        _ => Err(Failure::input(format!(
            "`{}` is no public port: 203.0.113.5:23456 or [2001:db8::5]:23456 is expected, perhaps with /tcp or /udp \
             behind it",
            text.chars().take(80).collect::<String>()
        ))),
    }
}

/// Asks the history in this state directory. `at` as [`parse`] takes it; now, if it is left out.
pub fn whois(directory: &Path, port: &str, at: Option<&str>) -> Result<Whois, Failure> {
    let (asked, protocol) = end_and_protocol(port)?;
    let now = unix_seconds(std::time::SystemTime::now());
    let moment = match at {
        None => now,
        Some(text) => parse(text, now).ok_or_else(|| {
            let text: String = text.chars().take(80).collect();
            Failure::input(format!("`{text}` is no time: 2026-11-22T05:33:50Z, `2h ago` or -2h is expected"))
        })?,
    };
    let known = replay(directory, at.map(|_| moment)).map_err(|error| {
        Failure::failed(&anyhow::Error::new(error).context(format!(
            "reading the allocation history in {} (root may, and --state-dir names another)",
            directory.display()
        )))
    })?;
    let mut notes = Vec::new();
    if known.torn > 0 {
        notes.push(format!("{} lines of the history are torn (a crash) and were skipped", known.torn));
    }
    let before = match known.begins {
        None => {
            notes.push(format!("there is no allocation history in {}", directory.display()));
            true
        }
        Some(begins) if moment < begins => {
            notes.push(format!("the history begins at {}; who had it before is not known", unix(begins)));
            true
        }
        Some(_) => false,
    };
    let protocols = ["tcp", "udp"].into_iter().filter(|name| protocol.as_deref().is_none_or(|p| p == *name));
    let answers = protocols.map(|name| answer(&known.holdings, asked, name, before)).collect();
    Ok(Whois { port: asked.to_string(), at: unix(moment), answers, notes })
}

fn answer(holdings: &Holdings, asked: SocketAddr, protocol: &str, before: bool) -> WhoisAnswer {
    let number = if protocol == "tcp" { 6 } else { 17 };
    let found = holdings.who(asked.ip(), number, asked.port()).filter(|_| !before);
    let (kind, text) = match found {
        Some((thing, held)) => words(thing, held),
        None if before => ("unknown", "not known".to_owned()),
        None if holdings.knows(asked.ip()) => ("nobody", "nobody: no guest owns this port".to_owned()),
        None => ("nobody", format!("nobody: {} is no public address of guests", asked.ip())),
    };
    let held = found.map(|(_, held)| held);
    let filled = |text: &String| (!text.is_empty()).then(|| text.clone());
    WhoisAnswer {
        protocol: protocol.to_owned(),
        kind: kind.to_owned(),
        guest: held.and_then(|held| filled(&held.member)),
        rule: held.and_then(|held| filled(&held.rule)),
        draining: held.is_some_and(|held| held.draining),
        since: held.map(|held| unix(held.since)),
        text,
    }
}

fn words(thing: Thing, held: &Held) -> (&'static str, String) {
    let member = &held.member;
    match thing {
        Thing::Instance(_) => ("instance", format!("{member}, whose instance-level public IP it is")),
        Thing::Listener(..) if member.is_empty() => {
            ("listener", format!("{}, which several guests answer: see `flows --guest`", held.rule))
        }
        Thing::Listener(..) => ("listener", format!("{member}, by {}", held.rule)),
        Thing::Unit(..) if held.draining => {
            ("snat", format!("{member}, draining: only flows from before are on it"))
        }
        Thing::Unit(..) => ("snat", format!("{member}, whose SNAT port it is")),
    }
}

/// What a port is that no guest owns for SNAT, under the policy in force.
pub fn not_snat(in_force: &InForce, asked: SocketAddr, protocol: &str, is_frontend: bool) -> String {
    let number = if protocol == "tcp" { 6 } else { 17 };
    let found = Holdings::of(in_force, 0);
    let is_ours = |address: IpAddr| {
        in_force.loaded.network.public_addresses.iter().any(|public| public.address == address)
    };
    match found.who(asked.ip(), number, asked.port()) {
        Some((thing, held)) => words(thing, held).1,
        None if is_frontend => "nobody: no guest owns this port".to_owned(),
        None if is_ours(asked.ip()) => "nobody: guests leave by no port of this address".to_owned(),
        None => format!("nobody: {} is no public address of the policy in force", asked.ip()),
    }
}

impl Whois {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["PORT", "PROTO", "AT", "SINCE", "WHO"]);
        for answer in &self.answers {
            table.row([
                self.port.clone(),
                answer.protocol.clone(),
                self.at.clone(),
                answer.since.clone().unwrap_or_default(),
                answer.text.clone(),
            ]);
        }
        let notes: String = self.notes.iter().map(|note| format!("note: {note}\n")).collect();
        table.render("no protocol was asked for") + &notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_read_with_its_protocol_and_nothing_else_is() {
        let read = |text: &str| end_and_protocol(text).map(|(end, p)| (end.to_string(), p));
        assert_eq!(read("203.0.113.5:23456").unwrap(), ("203.0.113.5:23456".into(), None));
        assert_eq!(read("[2001:db8::5]:9/UDP").unwrap(), ("[2001:db8::5]:9".into(), Some("udp".into())));
        for wrong in ["203.0.113.5", "203.0.113.5:70000", "203.0.113.5:1/icmp", "", "/tcp"] {
            assert!(read(wrong).unwrap_err().message.contains("is no public port"), "{wrong}");
        }
    }

    #[test]
    fn without_a_history_nothing_is_claimed() {
        let nowhere = std::env::temp_dir().join(format!("pcd-no-history-{}", std::process::id()));
        let said = whois(&nowhere, "203.0.113.5:1024", Some("2h ago")).unwrap();
        assert_eq!(said.answers.len(), 2);
        assert!(said.answers.iter().all(|answer| answer.kind == "unknown"));
        assert!(said.text().contains("there is no allocation history"), "{}", said.text());
        assert!(
            whois(&nowhere, "203.0.113.5:1024", Some("yesterday")).unwrap_err().message.contains("no time")
        );
    }
}
