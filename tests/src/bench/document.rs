//! `docs/performance.md`: what people wrote (`docs/performance.template.md`) with what was measured.
//!
//! A line of the template that is `<!-- bench: WHAT -->` is replaced:
//!
//! | WHAT | by |
//! | --- | --- |
//! | `machine` | what it was measured on |
//! | `required` | the promised figures with what has to be reached, what is aimed at, what was reached |
//! | `section NAME` | all figures of a section, its notes, and its plots that the template does not place itself |
//! | `sections` | the same for every section that the template does not place itself |
//! | `plot NAME` | a plot |

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::figure::{By, Figure};
use super::plot;
use super::report::{Report, Series, TITLES, cells, met_word, short, value};
use super::section::REQUIRED;

const TEMPLATE: &str = "performance.template.md";
const DOCUMENT: &str = "performance.md";
/// Beside the document, for what it was made from and for its plots.
const DIRECTORY: &str = "performance";
const REPORT: &str = "report.json";
const ORIGIN: &str = "<!-- Made by `cargo xtask bench` from performance.template.md and performance/report.json: write there. -->\n\n";

/// The documents of the source tree that this program was built from.
pub(super) fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// The report that the documents were last made from, if there is one.
///
/// # Errors
///
/// It is there and cannot be read.
pub(super) fn last_report(docs: &Path) -> anyhow::Result<Option<Report>> {
    let path = docs.join(DIRECTORY).join(REPORT);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    serde_json::from_str(&text).map(Some).with_context(|| path.display().to_string())
}

/// Writes the document, its plots and the report. What `sudo` runs belongs to who asked for it.
pub(super) fn write(report: &Report, docs: &Path) -> anyhow::Result<()> {
    let path = docs.join(TEMPLATE);
    let template = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let document = render(&template, report)?;
    let directory = docs.join(DIRECTORY);
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    own(&directory)?;
    let save = |path: PathBuf, text: &str| -> anyhow::Result<()> {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        own(&path)
    };
    for name in plots(&report.series) {
        let series: Vec<&Series> = report.series.iter().filter(|series| series.plot == name).collect();
        save(directory.join(format!("{name}.svg")), &plot::svg(&series)?)?;
    }
    save(directory.join(REPORT), &(report.json()? + "\n"))?;
    save(docs.join(DOCUMENT), &document)
}

/// Gives a file to the person behind `sudo`.
fn own(path: &Path) -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    match (number("SUDO_UID"), number("SUDO_GID")) {
        (Some(user), Some(group)) => std::os::unix::fs::chown(path, Some(user), Some(group))
            .with_context(|| format!("giving {} to user {user}", path.display())),
        _ => Ok(()),
    }
}

/// The template with every mark replaced.
///
/// # Errors
///
/// A mark that is none of those above.
fn render(template: &str, report: &Report) -> anyhow::Result<String> {
    let marks: Vec<&str> = template.lines().filter_map(mark).collect();
    let mut text = ORIGIN.to_owned();
    for line in template.lines() {
        let Some(what) = mark(line) else {
            text += line;
            text.push('\n');
            continue;
        };
        match what.split_once(' ').unwrap_or((what, "")) {
            ("machine", "") => machine(&mut text, report),
            ("required", "") => required(&mut text, report),
            ("section", name) => section(&mut text, report, name, &marks),
            ("sections", "") => {
                let placed =
                    |name: &str| marks.iter().any(|mark| mark.strip_prefix("section ") == Some(name));
                for measured in report.sections.iter().filter(|measured| !placed(&measured.name)) {
                    let _ = writeln!(text, "### {}\n", measured.title);
                    section(&mut text, report, &measured.name, &marks);
                    text.push('\n');
                }
            }
            ("plot", name) => picture(&mut text, report, name),
            _ => bail!("{TEMPLATE}: `{line}`: the bench has nothing of this name"),
        }
    }
    Ok(text)
}

/// What a line asks for.
fn mark(line: &str) -> Option<&str> {
    line.trim().strip_prefix("<!-- bench: ")?.strip_suffix(" -->").map(str::trim)
}

fn machine(text: &mut String, report: &Report) {
    if report.interrupted || report.scale != "full" {
        *text += "**This was not a complete run**, only one that shows how the document comes about.\n\n";
    }
    *text += "| | |\n| --- | --- |\n";
    for (what, is) in &report.machine {
        let _ = writeln!(text, "| {what} | {is} |");
    }
}

fn required(text: &mut String, report: &Report) {
    *text +=
        "| figure | measured | compared | must | goal | reached |\n| --- | --- | --- | --- | --- | --- |\n";
    for name in REQUIRED {
        let Some(figure) = report.figure(name) else {
            let _ = writeln!(text, "| `{name}` | not measured | | | | |");
            continue;
        };
        let wanted = |by: Option<By>, number: Option<f64>| match (by, number) {
            (Some(by), Some(number)) => compared(figure, by, number),
            _ => String::new(),
        };
        let mut beside: Vec<String> = [By::RatioToLimit, By::RatioToNftables]
            .into_iter()
            .filter_map(|by| Some(compared(figure, by, figure.number(by)?)))
            .collect();
        if let (Some(limit), Some(first)) =
            (&figure.limit, beside.first_mut().filter(|_| figure.ratio_to_limit.is_some()))
        {
            *first = first.replace("the limit", limit);
        }
        let _ = writeln!(
            text,
            "| `{name}` | {} | {} | {} | {} | {} |",
            value(figure),
            beside.join(", "),
            wanted(figure.by, figure.must),
            wanted(figure.goal_by, figure.goal),
            figure.met.map(met_word).unwrap_or("-"),
        );
    }
}

/// A number with what it is a share of.
fn compared(figure: &Figure, by: By, number: f64) -> String {
    match by {
        By::Value => format!("{} {}", short(number), figure.unit),
        By::RatioToLimit => format!("{} of the limit", short(number)),
        By::RatioToNftables => format!("{} × nftables", short(number)),
    }
}

fn section(text: &mut String, report: &Report, name: &str, marks: &[&str]) {
    let Some(measured) = report.sections.iter().find(|measured| measured.name == name) else {
        *text += "Not measured yet.\n";
        return;
    };
    let _ = writeln!(
        text,
        "{}, {:.0} s, load average {} before and {} after.\n",
        measured.date, measured.seconds, measured.load_before, measured.load_after
    );
    if let Some(error) = &measured.error {
        let _ = writeln!(text, "**Not complete**: {error}\n");
    }
    let figures: Vec<&Figure> =
        report.figures.iter().chain(&report.compared).filter(|figure| figure.section == name).collect();
    if !figures.is_empty() {
        let rows: Vec<[String; 10]> = figures.iter().map(|figure| cells(figure)).collect();
        // A column that says nothing about any of them is left out.
        let told: Vec<usize> = (0..TITLES.len()).filter(|&i| rows.iter().any(|row| row[i] != "-")).collect();
        let line =
            |row: &[String; 10]| told.iter().map(|&i| format!("| {} ", row[i])).collect::<String>() + "|\n";
        *text += &line(&TITLES.map(str::to_owned));
        *text += &("| --- ".repeat(told.len()) + "|\n");
        for row in &rows {
            *text += &line(row);
        }
    }
    for note in report.notes.iter().filter(|note| note.section == name) {
        let _ = writeln!(text, "\n{}", note.text);
    }
    let placed = |plot: &str| marks.iter().any(|mark| mark.strip_prefix("plot ") == Some(plot));
    for plot in measured.plots.iter().filter(|plot| !placed(plot)) {
        text.push('\n');
        picture(text, report, plot);
    }
}

fn picture(text: &mut String, report: &Report, name: &str) {
    match report.series.iter().find(|series| series.plot == name) {
        Some(series) => {
            let _ = writeln!(text, "![{}]({DIRECTORY}/{name}.svg)", series.title);
        }
        None => *text += "Not measured yet.\n",
    }
}

/// The names of all plots, in the order of their first series.
pub(super) fn plots(series: &[Series]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for series in series {
        if !names.contains(&series.plot) {
            names.push(series.plot.clone());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figure::Better;

    fn report() -> Report {
        let mut report = Report { scale: "full".to_owned(), ..Report::default() };
        let mut figure = Figure::once("established_1k", "Mpps", 3.2)
            .must(By::RatioToLimit, Better::More, 0.65, 0.8)
            .ratio_to_limit_of("the bare XDP redirect", &[4.0]);
        figure.section = "established".to_owned();
        report.figures.push(figure);
        report.sections.push(crate::bench::report::Measured {
            name: "established".to_owned(),
            title: "Established flows".to_owned(),
            date: "2026-11-22".to_owned(),
            ..Default::default()
        });
        report
    }

    #[test]
    fn what_people_wrote_stays_and_every_mark_becomes_what_was_measured() {
        let template =
            "# Performance\n\nWords.\n\n<!-- bench: required -->\n\n<!-- bench: sections -->\nThe end.\n";
        let text = render(template, &report()).expect("all marks are known");
        let row = "| `established_1k` | 3.200 Mpps | 0.80 of the bare XDP redirect | 0.65 of the limit | 0.80 of the limit | goal |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| `hero_cps` | not measured |"), "{text}");
        assert!(text.contains("### Established flows"), "{text}");
        assert!(
            text.contains("Words.\n") && text.ends_with("The end.\n") && !text.contains("bench:"),
            "{text}"
        );
    }

    #[test]
    fn a_section_that_the_template_places_is_not_repeated_and_an_unknown_mark_is_refused() {
        let text = render("<!-- bench: section established -->\n<!-- bench: sections -->\n", &report())
            .expect("known");
        assert!(!text.contains("### Established flows"), "{text}");
        assert_eq!(text.matches("3.200 Mpps").count(), 1);
        assert!(render("<!-- bench: tables -->\n", &report()).is_err());
    }

    #[test]
    fn the_template_of_the_repository_can_be_filled_in() {
        let template = fs::read_to_string(directory().join(TEMPLATE)).expect("it is there");
        render(&template, &report()).expect("all its marks are known");
    }
}
