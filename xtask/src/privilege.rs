//! Who we are, and how to become root for what needs it: only the finished binaries run as root, never the compiler,
//! so nothing root-owned is left in `target/`.

use std::{ffi::OsStr, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, bail};

use crate::setup;

/// Whether the effective user is root.
pub fn is_root() -> bool {
    // "Uid: real effective saved filesystem"; asking /proc spares this crate a libc and an unsafe block.
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
    })
}

/// A command that runs this program as root, through `sudo -E` where we are somebody else.
pub fn as_root(program: &Path) -> anyhow::Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if !setup::on_path("sudo") {
        bail!("{} needs root: run this as root, or install sudo", program.display());
    }
    let mut command = Command::new("sudo");
    command.arg("-E").arg(program);
    Ok(command)
}

/// Becomes this program, as root. Returns only if that failed.
pub fn become_root_program<S: AsRef<OsStr>>(program: &Path, arguments: &[S]) -> anyhow::Result<()> {
    let mut command = as_root(program)?;
    command.args(arguments);
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}
