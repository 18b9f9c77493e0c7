//! `portcullis-lab bench`.

use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};

use super::groups;
use super::plan::Options;
use super::run;

/// Measure packet rates: bare XDP redirect, nftables masquerade, Portcullis
#[derive(Debug, Args)]
pub struct Arguments {
    /// One short round: shows that it works, and little more
    #[arg(long)]
    quick: bool,
    /// Only this figure, such as `established_64k`, with what it is compared with; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Also a minimal NAT over a kernel hash and over records: which flow table is faster
    #[arg(long, conflicts_with = "only")]
    tables: bool,
    /// Instead of packet rates: what a decision of security groups costs, by the number of rules
    #[arg(long, conflicts_with_all = ["only", "tables"])]
    groups: bool,
    /// Rounds in which every candidate is measured once
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each measurement counts
    #[arg(long)]
    seconds: Option<f64>,
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
        options.tables = self.tables;
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

/// Runs it and prints the report.
pub fn execute(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.groups {
        let (rounds, packets) =
            if arguments.quick { (1, 500) } else { (arguments.rounds.unwrap_or(5), 20_000) };
        return groups::execute(rounds, packets, matches!(arguments.output, Output::Json));
    }
    let report = run::run(arguments.options()?)?;
    match arguments.output {
        Output::Table => print!("{report}"),
        Output::Json => println!("{}", report.json()?),
    }
    Ok(())
}
