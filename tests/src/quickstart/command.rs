//! `portcullis-lab quickstart`.

use std::io::{IsTerminal as _, Write as _, stdout};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

use super::report::Report;
use super::stand::{Stand, say};
use super::{live, plan, run};
use crate::lab::sweep_stale;
use crate::stop;

/// The policy, with its place in the repository. Built in, so that it does not matter where this is started.
const POLICY: (&str, &str) = ("examples/quickstart.yaml", include_str!("../../../examples/quickstart.yaml"));

/// Show the example policy at work: guests, traffic, who decided what
#[derive(Debug, Args)]
pub struct Arguments {
    /// End after the table, also on a terminal
    #[arg(long)]
    once: bool,
    /// Another policy in place of examples/quickstart.yaml; what is expected stays
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// What standard output gets; with json it ends after it
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

/// Runs it, prints what became of every step and, on a terminal, stays up until Ctrl-C.
///
/// # Errors
/// Also if something went otherwise than the policy says; the report is printed by then.
pub fn execute(arguments: &Arguments) -> anyhow::Result<()> {
    stop::listen(nix::sys::signal::SaFlags::SA_RESTART)?;
    let (name, policy) = match &arguments.policy {
        None => (POLICY.0.to_owned(), POLICY.1.to_owned()),
        Some(file) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            (file.display().to_string(), text)
        }
    };
    for left in sweep_stale()? {
        say(&format!("removed {left}, left by a run that was killed"));
    }
    let stand = Stand::build(&policy, &name)?;
    let report = show(&stand, name)?;
    let mut out = stdout();
    match arguments.output {
        Output::Table => write!(out, "{report}")?,
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
    }
    out.flush()?;
    if !arguments.once && arguments.output == Output::Table && out.is_terminal() {
        live::show(&stand)?;
        say("\nremoving the lab");
    }
    drop(stand);
    let wrong = report.wrong();
    if wrong > 0 {
        bail!("{wrong} of {} checks went otherwise than the policy says", report.checks());
    }
    Ok(())
}

fn show(stand: &Stand, policy: String) -> anyhow::Result<Report> {
    let wire = stand.topology.sniff_internet()?;
    let steps = plan::steps();
    say(&format!("sending: {} steps", steps.len()));
    let mut outcomes = Vec::new();
    for step in &steps {
        stop::check()?;
        outcomes.push(run::step(stand, step).with_context(|| format!("the step `{}`", step.what))?);
    }
    // A child that Ctrl-C ended too may have looked like a lost packet.
    stop::check()?;
    Report::new(stand, policy, outcomes, &wire)
}
