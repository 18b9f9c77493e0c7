//! What came out: a table for people, JSON for programs.

use std::fmt::{self, Write as _};
use std::fs;

use serde::Serialize;

use super::run::load_average;

/// One figure of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    pub name: String,
    /// Median of the rounds.
    pub value: f64,
    pub unit: &'static str,
    /// How many rounds.
    pub rounds: usize,
    /// From the smallest to the largest, as a share of the median.
    pub spread: f64,
    /// Share of the time that the gateway's thread was running.
    pub busy: Option<f64>,
    /// Median of each round's share of the bare XDP redirect of the same round.
    pub ratio_to_limit: Option<f64>,
    /// The same for nftables.
    pub ratio_to_nftables: Option<f64>,
    /// Nanoseconds that a packet takes longer than under the bare XDP redirect of the same round.
    pub extra_ns: Option<f64>,
    /// The least that is accepted, as `ratio_to_limit`; none yet.
    pub must: Option<f64>,
    /// What is aimed at, as `ratio_to_limit`: the C prototypes of design §5.
    pub goal: Option<f64>,
    /// Each round.
    pub samples: Vec<f64>,
    /// False for what was only measured to compare with.
    #[serde(skip)]
    pub asked_for: bool,
}

/// What a candidate did with packets whose checksums were added up.
#[derive(Debug, Clone, Serialize)]
pub struct Verified {
    pub figure: String,
    pub live_flows: u32,
    pub sent: u32,
    pub seen: u64,
    pub translated: u64,
}

/// All of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub figures: Vec<Figure>,
    pub verified: Vec<Verified>,
    /// What was not measured, and why.
    pub notes: Vec<String>,
    pub machine: Vec<(String, String)>,
}

impl Report {
    /// The figures that were asked for, as JSON.
    pub fn json(&self) -> anyhow::Result<String> {
        let mut asked_for = self.clone();
        asked_for.figures.retain(|figure| figure.asked_for);
        Ok(serde_json::to_string_pretty(&asked_for)?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, is) in &self.machine {
            writeln!(f, "{what}: {is}")?;
        }
        let line = |f: &mut fmt::Formatter<'_>, cells: [String; 8]| {
            let [name, value, spread, of_bare, extra, of_nftables, goal, busy] = cells;
            writeln!(
                f,
                "{name:<24} {value:>11} {spread:>7} {of_bare:>8} {extra:>10} {of_nftables:>12} {goal:>6} {busy:>6}"
            )
        };
        let titles = ["figure", "median", "spread", "of bare", "over bare", "of nftables", "goal", "busy"];
        writeln!(f)?;
        line(f, titles.map(str::to_owned))?;
        let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
        for figure in &self.figures {
            let share = |ratio: Option<f64>| or_dash(ratio.map(|ratio| format!("{ratio:.2}")));
            let percent = |share: Option<f64>| or_dash(share.map(|share| format!("{:.0} %", share * 100.0)));
            let value = match figure.unit {
                "Mpps" => format!("{:.3} Mpps", figure.value),
                unit => format!("{:.0} {unit}", figure.value),
            };
            let cells = [
                figure.name.clone(),
                value,
                percent(Some(figure.spread)),
                share(figure.ratio_to_limit),
                or_dash(figure.extra_ns.map(|ns| format!("{ns:.0} ns"))),
                share(figure.ratio_to_nftables),
                share(figure.goal),
                percent(figure.busy),
            ];
            line(f, cells)?;
        }
        for note in &self.notes {
            writeln!(f, "\n{note}")?;
        }
        Ok(())
    }
}

/// What the numbers depend on besides the code.
pub(super) fn machine() -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let processors = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let mut mitigations = String::new();
    for name in ["spectre_v2", "spec_rstack_overflow", "retbleed", "mds"] {
        let state = read(&format!("/sys/devices/system/cpu/vulnerabilities/{name}"));
        if !state.is_empty() && state != "Not affected" {
            let separator = if mitigations.is_empty() { "" } else { "; " };
            let _ = write!(mitigations, "{separator}{name}: {state}");
        }
    }
    [
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("processor", format!("{processors} x {}", model.trim_start_matches([' ', '\t', ':']))),
        ("mitigations", mitigations),
        ("load average before", load_average()),
    ]
    .map(|(what, is)| (what.to_owned(), is))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_what_was_asked_for_and_the_table_what_was_measured() {
        let figure = |name: &str, asked_for| Figure {
            name: name.to_owned(),
            value: 1.25,
            unit: "Mpps",
            rounds: 1,
            spread: 0.0,
            busy: None,
            ratio_to_limit: Some(0.5),
            ratio_to_nftables: None,
            extra_ns: None,
            must: None,
            goal: None,
            samples: vec![1.25],
            asked_for,
        };
        let figures = vec![figure("established_1k", true), figure("nft_1k", false)];
        let report = Report { figures, ..Report::default() };
        let json: serde_json::Value =
            serde_json::from_str(&report.json().expect("serialises")).expect("is JSON");
        assert_eq!(json["figures"].as_array().map(Vec::len), Some(1));
        assert_eq!(json["figures"][0]["ratio_to_limit"], 0.5);
        assert!(report.to_string().contains("nft_1k"));
    }
}
