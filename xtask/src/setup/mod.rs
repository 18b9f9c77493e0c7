//! `cargo xtask setup`: finds what building and testing Portcullis needs, or installs it, showing each command first.

mod observe;
mod plan;

use std::{
    collections::BTreeSet,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
pub use observe::on_path;
pub use plan::CommandLine;
use plan::{Next, Step};
use xtask::toolchain::{self, Places, RUSTC_VARIABLE};

/// Long enough for a slow line or a slow processor, short enough to notice that nothing happens any more.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// The attempt with rustup has an alternative, so it must not keep anyone waiting.
const RUSTUP_PATIENCE: Duration = Duration::from_secs(5 * 60);

/// The subcommand.
pub fn setup(dry_run: bool) -> anyhow::Result<()> {
    if dry_run { show_plan() } else { ensure(true) }
}

/// Installs what is missing. Says nothing about a machine that is ready unless asked to, and takes well under a second
/// there.
pub fn ensure(say_ready: bool) -> anyhow::Result<()> {
    refuse_unfit_wish()?;
    let mut failed = BTreeSet::new();
    let mut apt_updated = false;
    let mut taken: Option<Step> = None;
    loop {
        let machine = observe::this_machine(&failed, apt_updated);
        let step = match machine.next() {
            Next::Ready => break,
            Next::ByHand(wanted) => bail!("{}", by_hand(&wanted)),
            Next::Take(step) => step,
        };
        if taken.as_ref() == Some(&step) {
            // It claimed success and changed nothing; asking again would never end.
            eprintln!("{step:?} changed nothing, looking for another way");
            failed.insert(step);
            continue;
        }
        let command = step.command(machine.privilege);
        println!("$ {command}");
        let patience = if step == Step::RustupNightly { RUSTUP_PATIENCE } else { PATIENCE };
        match run(&command, patience) {
            Ok(()) => apt_updated |= step == Step::RefreshApt,
            Err(error) => {
                eprintln!("{error:#}");
                failed.insert(step.clone());
                // Stale lists are better than none, and a failed refresh must not hide what they do hold.
                apt_updated |= step == Step::RefreshApt;
            }
        }
        taken = Some(step);
    }
    if say_ready {
        // With prebuilt objects there may be no toolchain, and need not be.
        match toolchain::find() {
            Ok(found) => println!("ready: {}, {}", found.compiler, found.linker),
            Err(_) => println!("ready: the eBPF objects are prebuilt"),
        }
    }
    Ok(())
}

/// A compiler the user insists on stands in the way of any other, so installing one would not help.
fn refuse_unfit_wish() -> anyhow::Result<()> {
    let places = Places::of_this_machine();
    if places.explicit.is_some()
        && let Some(refusal) = places.compilers().1.first()
    {
        bail!("{RUSTC_VARIABLE} names a compiler that cannot build the eBPF programs: {refusal}");
    }
    Ok(())
}

fn show_plan() -> anyhow::Result<()> {
    refuse_unfit_wish()?;
    let machine = observe::this_machine(&BTreeSet::new(), false);
    let (steps, wanted) = machine.whole_plan();
    for step in &steps {
        println!("$ {}", step.command(machine.privilege));
        if *step == Step::RustupNightly && machine.apt.is_some() {
            println!("  (or, should rustup not be able to download:)");
            println!("$ {}", Step::DebianCompiler.command(machine.privilege));
        }
    }
    if !wanted.is_empty() {
        bail!("{}", by_hand(&wanted));
    }
    if steps.is_empty() {
        println!("nothing to install");
    }
    Ok(())
}

fn by_hand(wanted: &[String]) -> String {
    let list: String = wanted.iter().map(|item| format!("\n  - {item}")).collect();
    format!("this needs installing by hand, and then `cargo xtask setup` again:{list}")
}

/// Runs a command that was shown, and stops it when it takes longer than anyone should wait.
pub fn run(command: &CommandLine, patience: Duration) -> anyhow::Result<()> {
    let (program, arguments) = command.words.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .envs(command.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let started = Instant::now();
    let status: ExitStatus = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            bail!("{program} was stopped after {} s", patience.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        bail!("{program} failed ({status})");
    }
    Ok(())
}
