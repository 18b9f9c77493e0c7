//! From options to a report: section after section.

use std::time::Instant;

use anyhow::bail;

use super::document::{directory, last_report, plots};
use super::options::Options;
use super::report::{Measured, Report, load_average, machine, today};
use super::section::{Section, chosen};
use crate::lab::why_unavailable;
use crate::stop;

/// Runs the bench. Needs root; leaves nothing behind, also when it is interrupted: then the report has what was
/// measured until then and says so. A section that fails is named in the report, and the others are measured.
///
/// # Errors
///
/// No root, or a name in `only` that there is not.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    if let Some(reason) = why_unavailable() {
        bail!("{reason}");
    }
    let sections = chosen(&options.only)?;
    stop::listen(nix::sys::signal::SaFlags::empty())?;
    // For the estimate alone.
    let earlier = last_report(&directory())
        .ok()
        .flatten()
        .filter(|earlier| options.only.is_empty() && earlier.scale == options.scale.name())
        .unwrap_or_default();
    let mut report =
        Report { machine: machine(), scale: options.scale.name().to_owned(), ..Report::default() };
    for (number, section) in sections.iter().enumerate() {
        let mut own = options.clone();
        if own.only.iter().any(|name| name == section.name) {
            own.only.clear();
        }
        own.place = format!("[{}/{} {}] ", number + 1, sections.len(), section.name);
        own.tell(&format!("{}{}", section.title, left(&earlier, &sections[number..])));
        let (since, load) = (Instant::now(), load_average());
        let (before, series_before) = (report.figures.len(), report.series.len());
        let outcome = (section.measure)(&own, &mut report);
        let names = (section.figures)();
        let (asked_for, compared): (Vec<_>, Vec<_>) = report
            .figures
            .split_off(before)
            .into_iter()
            .partition(|figure| names.contains(&figure.name) && own.wants(&figure.name));
        report.figures.extend(asked_for);
        report.compared.extend(compared);
        report.name_section(section.name);
        report.sections.push(Measured {
            name: section.name.to_owned(),
            title: section.title.to_owned(),
            date: today(),
            seconds: since.elapsed().as_secs_f64(),
            plots: plots(&report.series[series_before..]),
            load_before: load,
            load_after: load_average(),
            error: outcome.as_ref().err().filter(|_| !stop::asked()).map(|error| format!("{error:#}")),
        });
        if stop::asked() {
            report.interrupted = true;
            break;
        }
        if let Err(error) = outcome {
            own.tell(&format!("failed: {error:#}"));
        }
    }
    Ok(report)
}

/// How long these sections take if it is as long as the last time.
fn left(earlier: &Report, sections: &[&Section]) -> String {
    let seconds = |section: &&Section| {
        let measured = earlier.sections.iter().find(|measured| measured.name == section.name)?;
        Some(measured.seconds)
    };
    let sum: Option<f64> = sections.iter().map(seconds).sum();
    sum.map_or_else(String::new, |seconds| {
        format!(" (all that is left took {:.0} min the last time)", seconds / 60.0)
    })
}
