//! `cargo xtask run`, `cargo xtask bench` and `cargo xtask soak`: builds the release binaries and becomes one of them.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Context as _;

use crate::{artifacts, privilege, setup};

/// The binaries of the workspace that people run.
#[derive(Debug)]
pub struct Binaries {
    pub portcullis: PathBuf,
    pub lab: PathBuf,
}

/// Builds them in release mode: the datapath's numbers and the loader's speed are only meaningful there.
pub fn build_binaries() -> anyhow::Result<Binaries> {
    // The whole workspace although two packages would do: with the same selection as the tests the same features are
    // unified, so that neither builds anything (the eBPF objects least of all) a second time.
    let built = artifacts::build(&["build", "--release", "--workspace", "--bins"])?;
    let find = |name: &str| {
        built
            .iter()
            .find(|artifact| artifact.target == name && artifact.kind == "bin")
            .map(|artifact| artifact.executable.clone())
            .with_context(|| format!("cargo built no binary called {name}"))
    };
    Ok(Binaries { portcullis: find("portcullis")?, lab: find("portcullis-lab")? })
}

/// Without arguments a demonstration in namespaces of its own; with them `portcullis run` on this host.
pub fn run(once: bool, arguments: Vec<OsString>) -> anyhow::Result<()> {
    setup::ensure(false)?;
    let binaries = build_binaries()?;
    if arguments.is_empty() {
        let mut words = vec!["quickstart"];
        words.extend(once.then_some("--once"));
        privilege::become_root_program(&binaries.lab, &words)
    } else {
        let words: Vec<OsString> = [OsString::from("run")].into_iter().chain(arguments).collect();
        privilege::become_root_program(&binaries.portcullis, &words)
    }
}

/// `portcullis-lab` with this command.
pub fn lab(command: &str, arguments: Vec<OsString>) -> anyhow::Result<()> {
    setup::ensure(false)?;
    let binaries = build_binaries()?;
    let words: Vec<OsString> = [OsString::from(command)].into_iter().chain(arguments).collect();
    privilege::become_root_program(&binaries.lab, &words)
}
