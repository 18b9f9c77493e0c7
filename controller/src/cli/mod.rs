//! The command line: what may be asked, who answers, and what the exit code means.
//!
//! `run`, `down`, `check`, `import` and `schema` work by themselves; `whois` does so where no daemon answers; `effective`, `verify`, `diagnose`, `lint` and `tags` do
//! so on a policy file (`--policy`); everything else is a question to the daemon's socket. Exit codes: 0 done, 1 failed (or
//! `lint` found something, or `explain --live` a disagreement), 2 bad input (usage, policy, names), 3 denied (`verify`,
//! `diagnose`) or changes (`plan`); `import` has two of its own.

mod answers;
mod arguments;
mod check;
mod import;
mod logger;
mod output;
mod remote;
pub mod table;

use std::process::ExitCode;

use clap::Parser;

pub use arguments::{
    Arguments, Command, ExplainArguments, FlowsCommand, ImportArguments, OutputFormat, RunArguments,
    SnatArguments, SnatBy,
};

use crate::daemon;

/// Done.
pub const DONE: u8 = 0;
/// It did not work.
pub const FAILED: u8 = 1;
/// What was given cannot be used: the command line, a policy, a name.
pub const BAD_INPUT: u8 = 2;
/// The question was answered, and the answer is Deny.
pub const DENIED: u8 = 3;
/// `plan`: answered, and applying the file would change something.
pub const CHANGES: u8 = 3;
/// `import`: a policy was made, but something was not carried over; nothing more is allowed than was.
pub const NOT_CARRIED_OVER: u8 = 3;
/// `import`: a policy was made, but something that denied was not carried over: it may allow more than Azure did.
pub const WIDER: u8 = 4;

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
                metrics: run.metrics,
                reset: run.reset,
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
        Command::Import(arguments) => import::import(&arguments, output),
        Command::Schema => {
            output::out(&crate::policy::json_schema());
            DONE
        }
        Command::Effective(arguments) => answers::effective(&socket, output, &arguments),
        Command::Verify(arguments) => answers::verify(&socket, output, &arguments),
        Command::Diagnose(arguments) => answers::diagnose(&socket, output, &arguments),
        Command::Lint(arguments) => answers::lint(&socket, output, &arguments),
        Command::Tags(arguments) => answers::tags(&socket, output, &arguments),
        Command::Whois { port, at, state_dir } => {
            remote::whois(&socket, output, &port, at.as_deref(), &state_dir)
        }
        other => remote::ask(&socket, output, other),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    fn example(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name)
    }

    #[test]
    fn the_socket_and_the_output_may_stand_before_or_behind_the_command() {
        for line in
            ["portcullis --socket /a --output json status", "portcullis status --output json --socket /a"]
        {
            let arguments = parse(line).unwrap();
            assert_eq!((arguments.socket.as_path(), arguments.output), (Path::new("/a"), OutputFormat::Json));
            assert!(matches!(arguments.command, Command::Status));
        }
    }

    #[test]
    fn wrong_usage_is_told_on_standard_error_and_help_is_not() {
        for line in [
            "portcullis",
            "portcullis nonsense",
            "portcullis run",
            "portcullis check",
            "portcullis flows --limit x",
            "portcullis flows --limit 5 flush",
            "portcullis flows kill vm1",
            "portcullis snat --by size",
            "portcullis snat --port 203.0.113.5:1024 --guest vm1",
            "portcullis whois",
            "portcullis run --policy p --metrics localhost",
        ] {
            assert!(parse(line).unwrap_err().use_stderr(), "{line}");
        }
        assert!(!parse("portcullis --help").unwrap_err().use_stderr());
        assert!(!parse("portcullis --version").unwrap_err().use_stderr());
    }

    #[test]
    fn a_policy_in_order_is_exit_code_0_and_one_with_errors_2() {
        assert_eq!(check::check(&[example("quickstart.yaml")], OutputFormat::Json), DONE);
        let nowhere = PathBuf::from("/nonexistent/policy.yaml");
        assert_eq!(check::check(&[example("minimal.yaml"), nowhere.clone()], OutputFormat::Table), BAD_INPUT);
        let state = std::env::temp_dir().join(format!("pcd-cli-{}", std::process::id()));
        let run = RunArguments {
            policy: nowhere,
            state_dir: state.clone(),
            pin_dir: state.clone(),
            metrics: None,
            reset: false,
            log_level: log::LevelFilter::Off,
        };
        let command = Command::Run(run);
        assert_eq!(
            dispatch(Arguments { socket: state.clone(), output: OutputFormat::Table, command }),
            BAD_INPUT
        );
        assert!(!state.exists(), "a policy with errors touches nothing");
    }

    #[test]
    fn asking_where_no_daemon_is_is_exit_code_1() {
        let socket = PathBuf::from("/nonexistent/control.sock");
        let command = Command::Status;
        assert_eq!(dispatch(Arguments { socket, output: OutputFormat::Table, command }), FAILED);
    }
}
