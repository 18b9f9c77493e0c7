//! `cargo xtask`: how a person builds, runs, tests and benches Portcullis.

mod artifacts;
mod ci;
mod kernels;
mod launch;
mod privilege;
mod setup;
mod suites;
mod tally;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

/// Builds, runs, tests and benches Portcullis.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find what building and testing needs, or install it
    Setup {
        /// Only show the commands
        #[arg(long)]
        dry_run: bool,
    },
    /// Build and start: a demonstration in network namespaces, or with arguments `portcullis run` on this host
    Run {
        /// Show the demonstration once and clean up, instead of leaving it running
        #[arg(long, conflicts_with = "arguments")]
        once: bool,
        /// Arguments for `portcullis run`, such as `--policy my.yaml`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run every test, or those whose names contain NAME
    Test {
        name: Option<String>,
        /// List the tests instead of running them
        #[arg(long)]
        list: bool,
        /// Run the end-to-end suite under another kernel, 6.1 or 6.12, in a virtual machine
        #[arg(long, value_name = "VERSION")]
        kernel: Option<String>,
    },
    /// Measure throughput and latency
    Bench {
        /// Arguments for `portcullis-lab bench`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run everything at once for a while, in network namespaces, and account for every flow and port
    Soak {
        /// Arguments for `portcullis-lab soak`, such as `--minutes 60`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Everything CI checks: formatting, lints, tests
    Ci,
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> anyhow::Result<()> {
    match task {
        Task::Setup { dry_run } => setup::setup(dry_run),
        Task::Run { once, arguments } => launch::run(once, arguments),
        Task::Test { name, list, kernel: Some(kernel) } => kernels::test(&kernel, name.as_deref(), list),
        Task::Test { name, list, kernel: None } => suites::test(name.as_deref(), list),
        Task::Bench { arguments } => launch::lab("bench", arguments),
        Task::Soak { arguments } => launch::lab("soak", arguments),
        Task::Ci => ci::ci(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Task, clap::Error> {
        Arguments::try_parse_from(line.split(' ')).map(|arguments| arguments.task)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_two_dashes_goes_to_portcullis_untouched() {
        let Ok(Task::Run { once, arguments }) = parse("xtask run -- --policy my.yaml --once") else {
            panic!("it parses as run")
        };
        assert!(!once);
        assert_eq!(arguments, ["--policy", "my.yaml", "--once"]);
    }

    #[test]
    fn once_is_for_the_demonstration_only() {
        assert!(parse("xtask run --once").is_ok());
        assert!(parse("xtask run --once -- --policy my.yaml").is_err());
    }

    #[test]
    fn options_of_the_bench_need_no_two_dashes() {
        let Ok(Task::Bench { arguments }) = parse("xtask bench --flows 1000 nat") else {
            panic!("it parses as bench")
        };
        assert_eq!(arguments, ["--flows", "1000", "nat"]);
    }

    #[test]
    fn options_of_the_soak_need_no_two_dashes() {
        let Ok(Task::Soak { arguments }) = parse("xtask soak --minutes 5") else {
            panic!("it parses as soak")
        };
        assert_eq!(arguments, ["--minutes", "5"]);
    }

    #[test]
    fn a_kernel_that_is_not_offered_is_refused_before_anything_is_built() {
        let task = parse("xtask test --kernel 5.10").expect("it parses");
        let error = perform(task).expect_err("not offered").to_string();
        assert!(error.contains("6.1 or 6.12"), "{error}");
    }

    #[test]
    fn a_kernel_goes_with_a_name_and_with_listing() {
        let Ok(Task::Test { name, list, kernel }) = parse("xtask test --kernel 6.12 packet --list") else {
            panic!("it parses as test")
        };
        assert_eq!((name.as_deref(), list, kernel.as_deref()), (Some("packet"), true, Some("6.12")));
    }
}
