//! `cargo xtask test --kernel 6.1`: the end-to-end suite under another kernel, in a virtual machine that sees this machine's
//! files read-only and is gone afterwards.

mod ground;
mod initramfs;
mod machine;
mod selection;
mod series;
mod transcript;

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use ground::Ground;
use machine::Machine;
use series::Series;
use transcript::{Part, Transcript};

use crate::{
    suites::{self, Suite},
    tally::{Reader, Results, Tally},
};

/// A suite with the arguments it gets there.
struct Planned {
    suite: Suite,
    arguments: Vec<String>,
    /// Tests that this kernel cannot run.
    skipped: u64,
}

/// Runs the end-to-end suite under this kernel, or of all suites that need root the tests whose names contain `name`; or only
/// lists them.
///
/// # Errors
/// If the kernel is not known or cannot be had, or a test failed.
pub fn test(kernel: &str, name: Option<&str>, list: bool) -> anyhow::Result<()> {
    let series = Series::find(kernel)?;
    let (plan, target) = plan(series, name)?;
    if list {
        for planned in &plan {
            println!("{}", planned.suite.label());
            planned.suite.list(&planned.arguments)?.iter().for_each(|test| println!("    {test}"));
        }
        return Ok(());
    }
    let kernels = target.join("kernels");
    let _only_one = only_one(&kernels)?;
    let ground = Ground::prepare(&kernels, series)?;
    let script = ground.directory.join("guest.sh");
    fs::write(&script, guest_script(&ground, &plan)?)
        .with_context(|| format!("writing {}", script.display()))?;
    let initramfs = ground.directory.join("initramfs");
    let archive = initramfs::build(&ground, &script)?;
    fs::write(&initramfs, archive).with_context(|| format!("writing {}", initramfs.display()))?;

    let started = Instant::now();
    println!("booting {} in QEMU", ground.release);
    let (total, failures) = run(Machine::start(&ground, &initramfs)?, &plan)?;
    println!("\nLinux {}, {} s", ground.release, started.elapsed().as_secs());
    suites::conclude(&total, &failures)
}

/// One run at a time: they share what is fetched, the console's file and the script.
fn only_one(kernels: &Path) -> anyhow::Result<fs::File> {
    fs::create_dir_all(kernels).with_context(|| format!("making {}", kernels.display()))?;
    let path = kernels.join("lock");
    let file = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another run with --kernel is under way: wait for its end")
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking {}", path.display()))
        }
    }
}

/// What is to be run, and the target directory.
fn plan(series: &Series, name: Option<&str>) -> anyhow::Result<(Vec<Planned>, PathBuf)> {
    let built = suites::built()?;
    let target = built.iter().find_map(Suite::target_directory).context("cargo built no test")?;
    let mut plan = Vec::new();
    for suite in built {
        let Some((package, target)) = suite.needs_root() else { continue };
        let (place, mut arguments): (usize, Vec<String>) = match (name, selection::wanted(package, target)) {
            (Some(name), _) => (0, vec![name.to_owned()]),
            (None, Some((place, names))) => (place, names.iter().map(|name| (*name).to_owned()).collect()),
            (None, None) => continue,
        };
        let tests = suite.list(&arguments)?;
        let mut skipped = 0;
        for skip in selection::skipped(series.version()) {
            let count = tests.iter().filter(|test| test.contains(skip.test)).count();
            if count > 0 {
                println!("skipped: {} (Linux {}: {})", skip.test, series.name, skip.why);
                arguments.extend(["--skip".to_owned(), skip.test.to_owned()]);
                skipped += count as u64;
            }
        }
        if !tests.is_empty() {
            plan.push((place, Planned { suite, arguments, skipped }));
        }
    }
    plan.sort_by_key(|(place, _)| *place);
    let plan: Vec<Planned> = plan.into_iter().map(|(_, planned)| planned).collect();
    ensure!(!plan.is_empty(), "no test that needs a kernel has such a name");
    Ok((plan, target))
}

/// The script that runs the suites, in the virtual machine.
fn guest_script(ground: &Ground, plan: &[Planned]) -> anyhow::Result<String> {
    let path = |path: &Path| -> anyhow::Result<String> {
        Ok(quoted(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?))
    };
    let mut script =
        format!("modules={} busybox={}\nsuites() {{\n", path(&ground.modules)?, path(&ground.busybox)?);
    for (number, planned) in plan.iter().enumerate() {
        let (directory, executable) = planned.suite.places().context("a suite without an executable")?;
        write!(
            script,
            "    suite {number} {} {} --test-threads=1 --color=never",
            path(directory)?,
            path(executable)?
        )?;
        planned.arguments.iter().for_each(|argument| script += &format!(" {}", quoted(argument)));
        script += "\n";
    }
    script += "}\n";
    Ok(script + include_str!("guest.sh"))
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Reads what the machine says until it has ended; the total and the failed tests.
fn run(mut machine: Machine, plan: &[Planned]) -> anyhow::Result<(Tally, Vec<String>)> {
    let mut transcript = Transcript::default();
    let mut total = Tally { skipped: plan.iter().map(|planned| planned.skipped).sum(), ..Tally::default() };
    let mut failures = Vec::new();
    let mut under_way: Option<(&Planned, Reader, Vec<u8>)> = None;
    let mut done = false;
    while let Some(piece) = machine.read()? {
        for part in transcript.read(&piece) {
            match part {
                Part::Kernel(release) => println!("Linux {release} runs"),
                Part::Begin(number) => {
                    let planned =
                        plan.get(number).context("the virtual machine runs a suite that nobody asked for")?;
                    println!("\n=== {}", planned.suite.label());
                    under_way = Some((planned, Reader::new(Results::Last), Vec::new()));
                }
                Part::Output(bytes) => {
                    let mut terminal = std::io::stdout().lock();
                    terminal.write_all(&bytes)?;
                    terminal.flush()?;
                    if let Some((_, reader, line)) = &mut under_way {
                        reader.bytes(&bytes, line);
                    }
                }
                Part::End(_, status) => {
                    let (planned, reader, line) = under_way.take().context("the end of no suite")?;
                    let outcome =
                        suites::judge(reader, &String::from_utf8_lossy(&line), shell_status(status));
                    total += &outcome.tally;
                    let label = planned.suite.label();
                    failures
                        .extend(outcome.failures.into_iter().map(|failure| format!("{label}: {failure}")));
                }
                Part::Done => done = true,
            }
        }
        if done {
            break;
        }
    }
    if !done {
        let doing = under_way.map(|(planned, _, line)| {
            format!(" in {} ({})", planned.suite.label(), String::from_utf8_lossy(&line).trim())
        });
        bail!("the virtual machine ended{}\n{}", doing.unwrap_or_default(), machine.last_words());
    }
    Ok((total, failures))
}

/// The exit status that a shell told as one number.
fn shell_status(status: i32) -> std::process::ExitStatus {
    use std::os::unix::process::ExitStatusExt as _;
    std::process::ExitStatus::from_raw(if status > 128 { status - 128 } else { status << 8 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_the_shell_are_quoted() {
        assert_eq!(quoted("a b$c"), "'a b$c'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn a_signal_is_told_from_an_exit_code() {
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(shell_status(139).signal(), Some(11));
        assert_eq!(shell_status(101).code(), Some(101));
        assert!(shell_status(0).success());
    }
}
