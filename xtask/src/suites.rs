//! `cargo xtask test`: every test of the workspace, whatever package it is in, and one total.

use std::{
    ffi::OsStr,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{
    artifacts::{self, Artifact},
    launch::build_binaries,
    privilege, setup,
    tally::{Reader, Results, Tally, listed_tests},
};

/// Packages whose tests load programs and create network namespaces.
const NEED_ROOT: [&str; 2] = ["portcullis", "portcullis-tests"];

/// The package whose tests share the machine's network namespaces and its two processors' worth of packet rate: one
/// at a time.
const ONE_AT_A_TIME: &str = "portcullis-tests";

/// One thing to run that prints a libtest result.
#[derive(Debug)]
pub enum Suite {
    Binary(Artifact),
    /// The examples in the documentation of all libraries; only cargo can run them.
    Documentation,
}

/// What came of one suite.
#[derive(Debug, Default)]
pub struct Outcome {
    pub tally: Tally,
    pub failures: Vec<String>,
}

/// Builds and runs the tests whose names contain `name`, all without one, or only lists them.
pub fn test(name: Option<&str>, list: bool) -> anyhow::Result<()> {
    let mut suites = built()?;
    suites.push(Suite::Documentation);

    if list {
        return show(&suites, name);
    }
    if name.is_some() {
        let mut chosen = Vec::new();
        for suite in suites {
            if !suite.list(name.as_slice())?.is_empty() {
                chosen.push(suite);
            }
        }
        suites = chosen;
    }
    if let (Some(name), true) = (name, suites.is_empty()) {
        bail!("no test has a name containing \"{name}\"; `cargo xtask test --list` shows them all");
    }

    let mut total = Tally::default();
    let mut failures = Vec::new();
    for suite in &suites {
        println!("\n=== {}", suite.label());
        let outcome = suite.run(name)?;
        total += &outcome.tally;
        failures.extend(outcome.failures.into_iter().map(|failure| format!("{}: {failure}", suite.label())));
    }
    conclude(&total, &failures)
}

/// Builds everything that tests need, and returns every test binary in the order in which they are run.
pub fn built() -> anyhow::Result<Vec<Suite>> {
    setup::ensure(false)?;
    // The end-to-end tests run the real binaries, which `cargo test` builds only for a package's own tests.
    build_binaries()?;
    let built = artifacts::build(&["test", "--release", "--workspace", "--no-run"])?;
    let mut suites: Vec<Suite> =
        built.into_iter().filter(|artifact| artifact.is_test).map(Suite::Binary).collect();
    suites.sort_by_key(Suite::order);
    Ok(suites)
}

/// Says how it went: the failed tests by name, and the counts.
///
/// # Errors
/// If a test failed.
pub fn conclude(total: &Tally, failures: &[String]) -> anyhow::Result<()> {
    if !failures.is_empty() {
        println!("\nfailed:");
        failures.iter().for_each(|failure| println!("    {failure}"));
    }
    println!("\n{total}");
    if total.failed > 0 {
        bail!("some tests failed");
    }
    Ok(())
}

fn show(suites: &[Suite], name: Option<&str>) -> anyhow::Result<()> {
    let mut count = 0;
    for suite in suites {
        let tests = suite.list(name.as_slice())?;
        if tests.is_empty() {
            continue;
        }
        println!("{}", suite.label());
        tests.iter().for_each(|test| println!("    {test}"));
        count += tests.len();
    }
    match (count, name) {
        (0, Some(name)) => bail!("no test has a name containing \"{name}\""),
        _ => println!("{count} tests"),
    }
    Ok(())
}

impl Suite {
    /// Fast and local first: whoever breaks the checksum wants to know before the lab has started.
    fn order(&self) -> (bool, String) {
        match self {
            Self::Binary(artifact) => (artifact.package == ONE_AT_A_TIME, self.label()),
            Self::Documentation => (true, String::new()),
        }
    }

    pub fn label(&self) -> String {
        match self {
            Self::Binary(artifact) if artifact.kind == "lib" => format!("{} (lib)", artifact.package),
            Self::Binary(artifact) => format!("{} ({} {})", artifact.package, artifact.kind, artifact.target),
            Self::Documentation => "documentation".to_owned(),
        }
    }

    /// Its package and target, if its tests load programs and make namespaces.
    pub fn needs_root(&self) -> Option<(&str, &str)> {
        match self {
            Self::Binary(artifact) if NEED_ROOT.contains(&artifact.package.as_str()) => {
                Some((&artifact.package, &artifact.target))
            }
            _ => None,
        }
    }

    /// Where it runs, and its executable.
    pub fn places(&self) -> Option<(&Path, &Path)> {
        match self {
            Self::Binary(artifact) => Some((&artifact.directory, &artifact.executable)),
            Self::Documentation => None,
        }
    }

    /// Cargo's target directory, of which the executable is in `PROFILE/deps`.
    pub fn target_directory(&self) -> Option<PathBuf> {
        Some(self.places()?.1.ancestors().nth(3)?.to_path_buf())
    }

    fn command(&self, elevated: bool) -> anyhow::Result<Command> {
        Ok(match self {
            Self::Binary(artifact) => {
                let needs_root = elevated && NEED_ROOT.contains(&artifact.package.as_str());
                let mut command = if needs_root {
                    privilege::as_root(&artifact.executable)?
                } else {
                    Command::new(&artifact.executable)
                };
                // What `cargo test` provides.
                command.current_dir(&artifact.directory).env("CARGO_MANIFEST_DIR", &artifact.directory);
                if artifact.package == ONE_AT_A_TIME {
                    command.arg("--test-threads=1");
                }
                command
            }
            Self::Documentation => {
                let mut command = artifacts::cargo();
                command.args([
                    "test",
                    "--quiet",
                    "--release",
                    "--workspace",
                    "--doc",
                    "--no-fail-fast",
                    "--",
                ]);
                command
            }
        })
    }

    /// The names of its tests that contain one of `names`, or of all of them.
    pub fn list<S: AsRef<OsStr>>(&self, names: &[S]) -> anyhow::Result<Vec<String>> {
        let output = self
            .command(false)?
            .args(["--list", "--format", "terse"])
            .args(names)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot list the tests of {}", self.label()))?;
        if !output.status.success() {
            bail!("{} does not list its tests ({})", self.label(), output.status);
        }
        Ok(listed_tests(&String::from_utf8_lossy(&output.stdout)))
    }

    fn run(&self, name: Option<&str>) -> anyhow::Result<Outcome> {
        let mut command = self.command(true)?;
        command.args(name).stdin(Stdio::null()).stdout(Stdio::piped());
        let results = match self {
            Self::Binary(_) => Results::Last,
            Self::Documentation => Results::All,
        };
        let mut child = command.spawn().with_context(|| format!("cannot run {}", self.label()))?;
        let mut output = child.stdout.take().context("the suite's output")?;
        let mut reader = Reader::new(results);
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let read = output.read(&mut chunk)?;
            let (Some(bytes), true) = (chunk.get(..read), read > 0) else { break };
            // By chunks, not by lines: with one thread libtest prints a test's name when it starts and "ok" when it
            // ends, and the name of the one that hangs is the interesting one.
            let mut terminal = std::io::stdout().lock();
            terminal.write_all(bytes)?;
            terminal.flush()?;
            reader.bytes(bytes, &mut line);
        }
        Ok(judge(reader, &String::from_utf8_lossy(&line), child.wait()?))
    }
}

/// A suite passes only if it says so and exits accordingly: one that dies half-way, or leaves early with success,
/// counts as a failure. The last, unfinished line names the test that was running, where they run one at a time.
pub fn judge(reader: Reader, unfinished: &str, status: ExitStatus) -> Outcome {
    let (tally, mut failures) = reader.finish();
    let died = match &tally {
        None => Some(match unfinished.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
            Some((test, _)) => format!("{test} ended the whole run without a result ({status})"),
            None => format!("ended without a result ({status})"),
        }),
        Some(tally) if !status.success() && tally.failed == 0 => Some(format!("ended badly ({status})")),
        Some(_) => None,
    };
    let mut tally = tally.unwrap_or_default();
    if let Some(died) = died {
        tally.failed += 1;
        failures.push(died);
    }
    Outcome { tally, failures }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn reader(line: &str) -> Reader {
        let mut reader = Reader::new(Results::Last);
        reader.line(line);
        reader
    }

    const GOOD: &str =
        "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";

    #[test]
    fn a_binary_killed_by_a_signal_counts_as_a_failure_and_says_so() {
        let outcome = judge(reader(""), "test a::b ... ", ExitStatus::from_raw(11));
        assert_eq!(outcome.tally, Tally { passed: 0, failed: 1, skipped: 0 });
        let [failure] = &*outcome.failures else { panic!("{outcome:?}") };
        assert!(failure.contains("a::b") && failure.contains("signal: 11"), "{failure}");
    }

    #[test]
    fn a_binary_that_exits_with_success_before_its_result_counts_as_a_failure() {
        assert_eq!(judge(reader("test a ... "), "", ExitStatus::from_raw(0)).tally.failed, 1);
    }

    #[test]
    fn a_binary_whose_tests_pass_but_which_exits_with_an_error_counts_as_a_failure() {
        let outcome = judge(reader(GOOD), "", ExitStatus::from_raw(1 << 8));
        assert_eq!(outcome.tally, Tally { passed: 2, failed: 1, skipped: 0 });
    }

    #[test]
    fn a_good_result_and_a_good_exit_are_a_pass() {
        let outcome = judge(reader(GOOD), "", ExitStatus::from_raw(0));
        assert_eq!(outcome.tally, Tally { passed: 2, failed: 0, skipped: 0 });
        assert!(outcome.failures.is_empty());
    }
}
