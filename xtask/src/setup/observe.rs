//! What this machine has, for the plan.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use xtask::{ebpf, toolchain::Places};

use super::plan::{Apt, Machine, Privilege, Step, TOOLS};
use crate::privilege;

/// Looks at everything the plan depends on. What costs time (asking rustup and apt) is left out where the machine is
/// ready, so that `run` and `test` can afford to call this every time.
pub fn this_machine(failed: &BTreeSet<Step>, apt_updated: bool) -> Machine {
    let places = Places::of_this_machine();
    let mut machine = Machine {
        privilege: if privilege::is_root() {
            Privilege::Root
        } else if on_path("sudo") {
            Privilege::Sudo
        } else {
            Privilege::None
        },
        builds_ebpf: has_prebuilt_objects() || places.find().is_ok(),
        compilers: Vec::new(),
        rustup: false,
        llvm: BTreeSet::new(),
        apt: None,
        missing_tools: TOOLS.iter().map(|(tool, _)| *tool).filter(|tool| !on_path(tool)).collect(),
        failed: failed.clone(),
    };
    if machine.builds_ebpf && machine.missing_tools.is_empty() {
        return machine;
    }
    machine.compilers = places.compilers().0.iter().map(|compiler| compiler.llvm).collect();
    machine.rustup = on_path("rustup") && succeeds("rustup", &["default"]);
    machine.llvm = installed_llvm();
    machine.apt = on_path("apt-get").then(|| apt(apt_updated));
    machine
}

/// With both objects prebuilt no compiler for BPF is needed at all.
fn has_prebuilt_objects() -> bool {
    ["portcullis-ebpf", "portcullis-tests-ebpf"]
        .iter()
        .all(|package| env::var_os(ebpf::prebuilt_variable(package)).is_some_and(|value| !value.is_empty()))
}

/// Whether this program is installed. The sbin directories count even where an ordinary user's PATH lacks them,
/// because what needs these tools runs as root.
pub fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|directory| directory.join(program).is_file())
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Versions with development files where Debian, Ubuntu and apt.llvm.org put them.
fn installed_llvm() -> BTreeSet<u32> {
    let directories = Path::new("/usr/lib").read_dir().into_iter().flatten().flatten();
    directories
        .filter(|entry| {
            let prefix = entry.path();
            prefix.join("bin/llvm-config").exists() && prefix.join("include/llvm-c").exists()
        })
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("llvm-")?.parse().ok())
        .collect()
}

fn apt(updated: bool) -> Apt {
    let names = |pattern: &str| {
        let output = Command::new("apt-cache").args(["search", "--names-only", pattern]).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    let llvm = names("^llvm-[0-9]+-dev$")
        .lines()
        .filter_map(|line| line.strip_prefix("llvm-")?.split_once("-dev")?.0.parse().ok())
        .collect();
    // The compiler's presence is told by the part that Debian's older releases and Ubuntu lack.
    Apt { updated, compiler: !names("^libstd-rust-web-dev-bpf$").is_empty(), llvm }
}
