//! `portcullis-lab bench`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};

use super::document;
use super::options::Options;
use super::run;
use super::section;

/// What a shell gives for a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// Measure Portcullis beside the limit and beside nftables
#[derive(Debug, Args)]
pub struct Arguments {
    /// One short round: shows that it works, and little more
    #[arg(long)]
    quick: bool,
    /// Only this figure or section, such as `established_64k` or `established`, with what it is compared with; may be
    /// repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Print the names of the sections and their figures, and measure nothing
    #[arg(long)]
    list: bool,
    /// Rounds in which every candidate is measured once
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each measurement of a packet rate counts
    #[arg(long)]
    seconds: Option<f64>,
    /// Write docs/performance.md with its plots, as a complete run does anyway; with --only, the rest of it stays as it is
    #[arg(long, conflicts_with = "list")]
    write: bool,
    /// Do not write docs/performance.md, not even after a complete run
    #[arg(long, conflicts_with_all = ["write", "render"])]
    no_write: bool,
    /// Measure nothing, and write docs/performance.md anew from its template and docs/performance/report.json
    #[arg(long, conflicts_with_all = ["quick", "only", "list", "rounds", "seconds", "write"])]
    render: bool,
    /// What standard output gets
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

impl Arguments {
    fn options(&self) -> anyhow::Result<Options> {
        let mut options = if self.quick { Options::quick() } else { Options::default() };
        options.only.clone_from(&self.only);
        if let Some(rounds) = self.rounds {
            ensure!(rounds > 0, "--rounds 0 measures nothing");
            options.rounds = rounds;
        }
        if let Some(seconds) = self.seconds {
            ensure!(seconds > 0.0 && seconds < 3600.0, "--seconds {seconds} is not between 0 and 3600");
            options.window = Duration::from_secs_f64(seconds);
        }
        Ok(options)
    }
}

/// Runs it and prints the report, also that of a run which was interrupted (then the code is 130) or in which a section
/// failed (1).
pub fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if arguments.list {
        print!("{}", section::list());
        return Ok(ExitCode::SUCCESS);
    }
    let docs = document::directory();
    if arguments.render {
        let report = document::last_report(&docs)?
            .context("there is no report yet; `cargo xtask bench` writes one")?;
        document::write(&report, &docs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = run::run(&arguments.options()?)?;
    match arguments.output {
        Output::Table => print!("{report}"),
        Output::Json => println!("{}", report.json()?),
    }
    let whole = !arguments.quick && arguments.only.is_empty();
    if !report.interrupted && (arguments.write || (whole && !arguments.no_write)) {
        let earlier =
            document::last_report(&docs)?.filter(|_| !arguments.only.is_empty()).unwrap_or_default();
        document::write(&report.clone().over(earlier), &docs)?;
        eprintln!("bench: wrote {}/performance.md", docs.display());
    }
    for (section, error) in report.failures() {
        eprintln!("error: section {section} failed: {error}");
    }
    Ok(match (report.interrupted, report.failures().next()) {
        (true, _) => ExitCode::from(INTERRUPTED),
        (false, Some(_)) => ExitCode::FAILURE,
        (false, None) => ExitCode::SUCCESS,
    })
}
