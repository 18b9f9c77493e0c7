//! The command line: what may be asked, who answers, and what the exit code means.
//!
//! `run`, `down`, `check` and `schema` work by themselves; everything else is a question to the daemon's socket. Exit
//! codes: 0 done, 1 failed, 2 bad input (usage, policy, names).

mod arguments;
mod check;
mod logger;
mod output;
mod remote;
pub mod table;

use std::process::ExitCode;

use clap::Parser;

pub use arguments::{Arguments, Command, ExplainArguments, OutputFormat, RunArguments};

use crate::daemon;

/// Done.
pub const DONE: u8 = 0;
/// It did not work.
pub const FAILED: u8 = 1;
/// What was given cannot be used: the command line, a policy, a name.
pub const BAD_INPUT: u8 = 2;

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are "errors" too, on standard output and with code 0. A closed pipe is no panic.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { BAD_INPUT } else { DONE });
        }
    };
    ExitCode::from(dispatch(arguments))
}

fn dispatch(arguments: Arguments) -> u8 {
    let Arguments { socket, output, command } = arguments;
    match command {
        Command::Run(run) => {
            logger::init(run.log_level);
            daemon::run(daemon::Options {
                policy: run.policy,
                state_dir: run.state_dir,
                pin_dir: run.pin_dir,
                socket,
            })
        }
        Command::Down { state_dir, pin_dir, forget } => {
            logger::init(log::LevelFilter::Warn);
            let places = daemon::Places { state_dir, pin_dir, socket };
            match daemon::down(&places, forget) {
                Ok(report) => {
                    let code = if report.failed.is_empty() { DONE } else { FAILED };
                    output::answer(output, &report, daemon::DownReport::text);
                    code
                }
                Err(error) => output::fail(&error),
            }
        }
        Command::Check { files } => check::check(&files, output),
        Command::Schema => {
            output::out(&crate::policy::json_schema());
            DONE
        }
        other => remote::ask(&socket, output, other),
    }
}
