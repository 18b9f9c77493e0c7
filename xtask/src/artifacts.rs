//! Runs cargo and learns from its JSON messages what it built and where.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use serde_json::Value;
use xtask::workspace_root;

/// An executable that cargo built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    pub package: String,
    /// Where the package's manifest is; `cargo test` runs tests there.
    pub directory: PathBuf,
    /// "lib", "bin", "test".
    pub kind: String,
    pub target: String,
    pub executable: PathBuf,
    /// Whether it is a test harness rather than the program itself.
    pub is_test: bool,
}

/// The cargo that runs us, so that a `+toolchain` holds for everything underneath.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace_root());
    cargo
}

/// Runs cargo with these arguments, its progress and diagnostics on the terminal, and returns the executables.
pub fn build(arguments: &[&str]) -> anyhow::Result<Vec<Artifact>> {
    let mut child = cargo()
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut artifacts = Vec::new();
    let messages = child.stdout.take().context("cargo's messages")?;
    for line in BufReader::new(messages).lines() {
        artifacts.extend(artifact(&line?));
    }
    if !child.wait()?.success() {
        bail!("`cargo {}` failed", arguments.join(" "));
    }
    Ok(artifacts)
}

/// The executable a message announces, if it announces one.
fn artifact(message: &str) -> Option<Artifact> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message.get("reason")? != "compiler-artifact" {
        return None;
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let manifest = PathBuf::from(text(message.get("manifest_path")?)?);
    let directory = manifest.parent()?.to_path_buf();
    let target = message.get("target")?;
    Some(Artifact {
        package: package_name(message.get("package_id")?.as_str()?, &directory)?,
        directory,
        kind: text(target.get("kind")?.get(0)?)?,
        target: text(target.get("name")?)?,
        executable: PathBuf::from(text(message.get("executable")?)?),
        is_test: message.get("profile")?.get("test")?.as_bool()?,
    })
}

/// A package id ends in `#name@version`, or in `#version` alone where the directory bears the package's name.
fn package_name(id: &str, directory: &Path) -> Option<String> {
    let (_, fragment) = id.rsplit_once('#')?;
    match fragment.split_once('@') {
        Some((name, _)) => Some(name.to_owned()),
        None => Some(directory.file_name()?.to_string_lossy().into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_binary_is_recognised_in_cargos_messages() {
        let message = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/tests#portcullis-tests@0.1.0",
            "manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"lab"},
            "profile":{"test":true},"executable":"/w/target/release/deps/lab-1"}"#;
        let found = artifact(message).expect("an artifact");
        assert_eq!(
            (found.package.as_str(), found.target.as_str(), found.is_test),
            ("portcullis-tests", "lab", true)
        );
        assert_eq!(found.directory, Path::new("/w/tests"));
    }

    #[test]
    fn a_library_and_an_unrelated_message_are_no_executables() {
        let library = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/xtask#0.1.0",
            "manifest_path":"/w/xtask/Cargo.toml","target":{"kind":["lib"],"name":"xtask"},
            "profile":{"test":false},"executable":null}"#;
        assert_eq!(artifact(library), None);
        assert_eq!(artifact(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(artifact("Compiling something"), None);
    }

    #[test]
    fn a_package_in_a_directory_of_its_name_is_named_after_it() {
        assert_eq!(
            package_name("path+file:///w/xtask#0.1.0", Path::new("/w/xtask")).as_deref(),
            Some("xtask")
        );
    }
}
