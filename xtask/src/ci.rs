//! `cargo xtask ci`: exactly what CI runs, so that a push holds no surprise.

use anyhow::{Context as _, bail};

use crate::{artifacts, setup, suites};

pub fn ci() -> anyhow::Result<()> {
    check(&["fmt", "--all", "--check"], "`cargo fmt --all` puts it right")?;
    // clippy compiles, and the build scripts build the eBPF objects.
    setup::ensure(false)?;
    check(
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        "each lint above says what to do",
    )?;
    suites::test(None, false)
}

fn check(arguments: &[&str], advice: &str) -> anyhow::Result<()> {
    println!("$ cargo {}", arguments.join(" "));
    let status = artifacts::cargo().args(arguments).status().context("cannot run cargo")?;
    if !status.success() {
        bail!(
            "`cargo {}` failed: {advice} (is it installed at all? `rustup component add rustfmt clippy`)",
            arguments.join(" ")
        );
    }
    Ok(())
}
