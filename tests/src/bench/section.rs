//! What the bench consists of: sections, each of which gives some figures.

use anyhow::bail;

use super::{Options, Report};
use super::{deny, established, flip, groups, hero, idle, memory, new_flow, reaper, stages, table};

/// A part of the bench that is measured by itself, in namespaces of its own.
pub(super) struct Section {
    /// What `--only` takes for all of its figures.
    pub name: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// The names of the figures it can give.
    pub figures: fn() -> Vec<String>,
    /// Measures, and puts into the report what it has as soon as it has it. What is not asked for
    /// ([`Options::wants`]) need not be measured. Ends soon, with an error, once somebody has asked to stop
    /// (`stop::check`, [`Options::each_round`]), and leaves nothing behind however it ends.
    pub measure: fn(&Options, &mut Report) -> anyhow::Result<()>,
}

/// All sections, in the order they are measured.
pub(super) const SECTIONS: &[Section] = &[
    // One line for each.
    established::SECTION,
    new_flow::SECTION,
    deny::SECTION,
    stages::SECTION,
    table::SECTION,
    groups::SECTION,
    memory::SECTION,
    reaper::SECTION,
    flip::SECTION,
    idle::SECTION,
    hero::SECTION,
];

/// The figures that a reader is promised, in the order of the table of `docs/performance.md`.
pub const REQUIRED: [&str; 14] = [
    "established_1k",
    "established_64k",
    "established_1m",
    "tc_established_64k",
    "new_flow",
    "deny_4000_rules",
    "tcp_crr",
    "tcp_bulk_tc",
    "latency_p99",
    "bytes_per_flow_v4",
    "reaper_ms_per_million",
    "policy_flip_s",
    "idle_anon_mib",
    "hero_cps",
];

/// The sections that give something of `only`; all of them if it is empty.
///
/// # Errors
///
/// A name that is neither a section's nor a figure's; the error says which there are.
pub(super) fn chosen(only: &[String]) -> anyhow::Result<Vec<&'static Section>> {
    let knows =
        |section: &Section, name: &String| section.name == *name || (section.figures)().contains(name);
    if let Some(unknown) = only.iter().find(|name| !SECTIONS.iter().any(|section| knows(section, name))) {
        bail!("there is neither a figure nor a section {unknown}; `--list` shows them all");
    }
    Ok(SECTIONS
        .iter()
        .filter(|section| only.is_empty() || only.iter().any(|name| knows(section, name)))
        .collect())
}

/// The names of all figures that there can be.
pub fn figures() -> Vec<String> {
    SECTIONS.iter().flat_map(|section| (section.figures)()).collect()
}

/// What `--list` prints: each section, and below it its figures.
pub(super) fn list() -> String {
    let mut text = String::new();
    for section in SECTIONS {
        text += &format!("{:<16} {}\n", section.name, section.title);
        for figure in (section.figures)() {
            text += &format!("  {figure}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn names(only: &[&str]) -> Vec<&'static str> {
        let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
        chosen(&only).expect("all are known").iter().map(|section| section.name).collect()
    }

    #[test]
    fn a_figure_or_a_section_runs_only_the_sections_that_give_it() {
        assert_eq!(names(&["established_64k"]), ["established"]);
        assert_eq!(names(&["tables"]), ["tables"]);
        assert_eq!(names(&[]).len(), SECTIONS.len());
        let error = chosen(&["nat".to_owned()]).err().expect("there is none").to_string();
        assert!(error.contains("nat") && error.contains("--list"), "{error}");
    }

    #[test]
    fn no_name_stands_for_two_figures_or_for_a_figure_and_another_section() {
        let mut seen = HashSet::new();
        for section in SECTIONS {
            assert!(seen.insert(section.name.to_owned()), "{}", section.name);
            for figure in (section.figures)() {
                assert!(figure == section.name || seen.insert(figure.clone()), "{figure}");
            }
        }
    }
}
