//! What came out: a table for people, JSON for programs.

use std::fmt::{self, Write as _};
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::figure::{Figure, Met};

/// What a candidate did with packets whose checksums were added up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verified {
    #[serde(default)]
    pub section: String,
    pub figure: String,
    pub live_flows: u32,
    pub sent: u32,
    pub seen: u64,
    pub translated: u64,
}

/// How something grows: one line of a plot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Series {
    /// The file of the plot without `.svg`; series of one plot are drawn into it together.
    pub plot: String,
    /// The plot's heading; that of the first series counts, as its labels do.
    pub title: String,
    /// What this line is.
    pub name: String,
    /// What grows, such as `live flows`.
    pub x_label: String,
    /// Of the values: `ns a packet`.
    pub unit: String,
    /// Whether each step of the horizontal axis is ten times the one before.
    pub logarithmic: bool,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// A sentence for the reader: what was not measured, and why.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Note {
    /// The section it is about.
    pub section: String,
    pub text: String,
}

/// One section of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Measured {
    pub name: String,
    pub title: String,
    /// When, as `2026-11-22`.
    pub date: String,
    /// How long it took.
    pub seconds: f64,
    /// The names of the plots it gave.
    #[serde(default)]
    pub plots: Vec<String>,
    pub load_before: String,
    pub load_after: String,
    /// Why it is not complete.
    pub error: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// `smoke`, `quick` or `full`: only the last one measures.
    pub scale: String,
    /// Somebody ended it before it was complete.
    pub interrupted: bool,
    /// What was asked for.
    pub figures: Vec<Figure>,
    /// Figures that were only measured to compare with.
    pub compared: Vec<Figure>,
    pub series: Vec<Series>,
    pub verified: Vec<Verified>,
    /// What was not measured, and why.
    pub notes: Vec<Note>,
    pub sections: Vec<Measured>,
    pub machine: Vec<(String, String)>,
}

impl Report {
    /// As JSON.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// The figure of this name, also one that was only measured to compare with.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().chain(&self.compared).find(|figure| figure.name == name)
    }

    /// What kept sections from being complete.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.sections.iter().filter_map(|s| Some((s.name.as_str(), s.error.as_deref()?)))
    }

    /// Says of everything that nobody has said it of which section it is from.
    pub(super) fn name_section(&mut self, name: &str) {
        let figures = self.figures.iter_mut().chain(&mut self.compared).map(|figure| &mut figure.section);
        let notes = self.notes.iter_mut().map(|note| &mut note.section);
        let verified = self.verified.iter_mut().map(|verified| &mut verified.section);
        for section in figures.chain(notes).chain(verified).filter(|section| section.is_empty()) {
            *section = name.to_owned();
        }
    }

    /// This report, and of an earlier one the sections that this one has not measured: of a whole run when one section was
    /// measured again.
    #[must_use]
    pub(super) fn over(mut self, mut earlier: Report) -> Report {
        let new = |section: &String| self.sections.iter().any(|measured| measured.name == *section);
        earlier.figures.retain(|figure| !new(&figure.section));
        earlier.compared.retain(|figure| !new(&figure.section));
        let again =
            self.sections.iter().chain(earlier.sections.iter().filter(|measured| new(&measured.name)));
        let plots: Vec<String> = again.flat_map(|measured| measured.plots.clone()).collect();
        earlier.series.retain(|series| !plots.contains(&series.plot));
        earlier.notes.retain(|note| !new(&note.section));
        earlier.verified.retain(|verified| !new(&verified.section));
        earlier.sections.retain(|measured| !new(&measured.name));
        earlier.figures.append(&mut self.figures);
        earlier.compared.append(&mut self.compared);
        earlier.series.append(&mut self.series);
        earlier.notes.append(&mut self.notes);
        earlier.verified.append(&mut self.verified);
        earlier.sections.append(&mut self.sections);
        Report { machine: self.machine, scale: self.scale, interrupted: self.interrupted, ..earlier }
    }

    /// Adds a sentence for the reader: what was not measured, and why.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(Note { section: String::new(), text: note.into() });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, is) in &self.machine {
            writeln!(f, "{what}: {is}")?;
        }
        for section in &self.sections {
            let figures = || self.figures.iter().chain(&self.compared).filter(|x| x.section == section.name);
            writeln!(f, "\n{} ({:.0} s)", section.title, section.seconds)?;
            if figures().next().is_some() {
                line(f, TITLES.map(str::to_owned))?;
            }
            for figure in figures() {
                line(f, cells(figure))?;
            }
            if let Some(error) = &section.error {
                writeln!(f, "FAILED: {error}")?;
            }
        }
        for note in &self.notes {
            writeln!(f, "\n{}", note.text)?;
        }
        if self.interrupted {
            writeln!(f, "\nINTERRUPTED: this is what was measured until then, and no more.")?;
        }
        Ok(())
    }
}

/// Of the table that [`cells`] fills.
pub(super) const TITLES: [&str; 10] =
    ["figure", "median", "spread", "of limit", "over limit", "of nftables", "must", "goal", "met", "busy"];

fn line(f: &mut fmt::Formatter<'_>, cells: [String; 10]) -> fmt::Result {
    let [name, value, spread, of_limit, extra, of_nftables, must, goal, met, busy] = cells;
    writeln!(
        f,
        "{name:<28} {value:>14} {spread:>7} {of_limit:>8} {extra:>10} {of_nftables:>11} {must:>6} {goal:>6} {met:>6} {busy:>6}"
    )
}

/// A figure as a line of a table.
pub(super) fn cells(figure: &Figure) -> [String; 10] {
    let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
    let share = |ratio: Option<f64>| or_dash(ratio.map(short));
    let percent = |share: Option<f64>| or_dash(share.map(|share| format!("{:.0} %", share * 100.0)));
    [
        figure.name.clone(),
        value(figure),
        percent(Some(figure.spread)),
        share(figure.ratio_to_limit),
        or_dash(figure.extra_ns.map(|ns| format!("{ns:.0} ns"))),
        share(figure.ratio_to_nftables),
        share(figure.must),
        share(figure.goal),
        or_dash(figure.met.map(|met| met_word(met).to_owned())),
        percent(figure.busy),
    ]
}

/// The value with its unit.
pub(super) fn value(figure: &Figure) -> String {
    let digits = match figure.value.abs() {
        0.0 => 0,
        v if v < 1.0 => 4,
        v if v < 100.0 => 3,
        v if v < 1000.0 => 1,
        _ => 0,
    };
    format!("{:.digits$} {}", figure.value, figure.unit)
}

/// `goal`, `must` or `MISSED`.
pub(super) fn met_word(met: Met) -> &'static str {
    match met {
        Met::Goal => "goal",
        Met::Must => "must",
        Met::Missed => "MISSED",
    }
}

/// A ratio or a limit in few characters.
pub(super) fn short(number: f64) -> String {
    if number >= 10.0 { format!("{number:.0}") } else { format!("{number:.2}") }
}

/// What the numbers depend on besides the code.
pub(super) fn machine() -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let processors = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let virtual_machine =
        cpuinfo.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor"));
    let mut mitigations = String::new();
    for name in ["spectre_v2", "spec_rstack_overflow", "retbleed", "mds"] {
        let state = read(&format!("/sys/devices/system/cpu/vulnerabilities/{name}"));
        if !state.is_empty() && state != "Not affected" {
            let separator = if mitigations.is_empty() { "" } else { "; " };
            let _ = write!(mitigations, "{separator}{name}: {state}");
        }
    }
    let kind = if virtual_machine { " (virtual machine)" } else { "" };
    [
        ("date", today()),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("processor", format!("{processors} x {}{kind}", model.trim_start_matches([' ', '\t', ':']))),
        ("shared cache", read("/sys/devices/system/cpu/cpu0/cache/index3/size")),
        ("mitigations", mitigations),
    ]
    .map(|(what, is)| (what.to_owned(), is))
    .into()
}

/// How many want to run, over one, five and fifteen minutes.
pub(super) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The day in UTC, as `2026-11-22`.
pub(super) fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (year, month, day) = date(seconds / 86_400);
    format!("{year}-{month:02}-{day:02}")
}

/// Year, month and day of a number of days after 1 January 1970 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms", `civil_from_days`).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year + u64::from(month <= 2), month, of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_report_says_so_to_people_and_to_programs() {
        let mut report = Report { interrupted: true, ..Report::default() };
        report.figures.push(Figure::once("established_1k", "Mpps", 1.25));
        let json: serde_json::Value =
            serde_json::from_str(&report.json().expect("serialises")).expect("is JSON");
        assert_eq!(json["figures"].as_array().map(Vec::len), Some(1));
        assert_eq!(json["interrupted"], true);
        assert!(report.to_string().contains("INTERRUPTED"));
    }

    #[test]
    fn a_section_measured_again_takes_the_place_of_what_it_was() {
        let with = |sections: &[&str], value: f64| {
            let mut report = Report::default();
            for &name in sections {
                report.sections.push(Measured { name: name.to_owned(), ..Measured::default() });
                report.figures.push(Figure::once(format!("of_{name}"), "ns", value));
                report.note(format!("{name} {value}"));
                report.name_section(name);
            }
            report
        };
        let both = with(&["b"], 2.0).over(with(&["a", "b"], 1.0));
        let figures: Vec<_> = both.figures.iter().map(|f| (f.name.as_str(), f.value)).collect();
        assert_eq!(figures, [("of_a", 1.0), ("of_b", 2.0)]);
        let notes: Vec<_> = both.notes.iter().map(|note| note.text.as_str()).collect();
        assert_eq!(notes, ["a 1", "b 2"]);
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(
            [0, 59, 11_016, 20_779].map(date),
            [(1970, 1, 1), (1970, 3, 1), (2000, 2, 29), (2026, 11, 22)]
        );
    }
}
