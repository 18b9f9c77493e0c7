//! `portcullis-lab`: what `cargo xtask` runs as root, in namespaces of its own.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portcullis_tests::{bench, quickstart, soak};

/// The lab of Portcullis; `cargo xtask` builds and runs it.
#[derive(Debug, Parser)]
#[command(name = "portcullis-lab")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Arguments),
    Quickstart(quickstart::Arguments),
    Soak(soak::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Bench(arguments) => bench::execute(&arguments),
        Command::Quickstart(arguments) => quickstart::execute(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Soak(arguments) => soak::execute(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
