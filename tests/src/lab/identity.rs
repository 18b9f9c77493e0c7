//! Who owns what the lab makes: names that carry the process id, and the broom for runs that were killed.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};

use super::process::kill_inside;

/// Where iproute2 keeps the names of network namespaces, each a bind mount of the namespace.
pub(super) const NETNS_DIR: &str = "/run/netns";
/// Beginning of every namespace's name.
const NAMESPACE_PREFIX: &str = "pc-";
/// Where scratch directories live, and the beginning of their names.
const SCRATCH_ROOT: &str = "/run";
const SCRATCH_PREFIX: &str = "portcullis-lab-";

/// Number of the next lab of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);
/// The first lab of a process sweeps before it builds.
static SWEPT: Once = Once::new();

/// One lab: the process that owns it and its number in that process. Displays as `<pid>-<n>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LabId {
    pid: u32,
    number: u32,
}

impl LabId {
    /// A lab nobody else has. The first one of a process sweeps up after runs that were killed, including an
    /// earlier process that happened to have our id.
    pub fn fresh() -> Self {
        let pid = std::process::id();
        SWEPT.call_once(|| {
            if super::why_unavailable().is_none() {
                // Best effort: a leftover that cannot be removed must not keep today's tests from running.
                let _ = sweep(|owner| owner == pid || !is_alive(owner));
            }
        });
        LabId { pid, number: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Name of the lab's namespace `label`: `pc-<pid>-<n>-<label>`.
    pub fn namespace_name(&self, label: &str) -> String {
        format!("{NAMESPACE_PREFIX}{self}-{label}")
    }

    /// The lab's scratch directory: `/run/portcullis-lab-<pid>-<n>`.
    pub(super) fn scratch_path(&self) -> PathBuf {
        Path::new(SCRATCH_ROOT).join(format!("{SCRATCH_PREFIX}{self}"))
    }

    /// Reads `<pid>-<n>`, followed by nothing or by `-` and a label.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-');
        let pid = parts.next()?.parse().ok()?;
        let number = parts.next()?.parse().ok()?;
        Some(LabId { pid, number })
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pid, self.number)
    }
}

/// Removes what runs left whose process is dead: namespaces named `pc-<pid>-<n>-*` with the processes inside
/// them, and scratch directories `/run/portcullis-lab-<pid>-<n>` with the bpffs mounted there. Returns what
/// was removed.
///
/// A run whose process lives is never touched, nor is anything whose name is not of this form.
///
/// # Errors
/// If a directory cannot be listed; a leftover that cannot be removed is skipped.
pub fn sweep_stale() -> anyhow::Result<Vec<String>> {
    sweep(|pid| !is_alive(pid))
}

fn sweep(is_stale: impl Fn(u32) -> bool) -> anyhow::Result<Vec<String>> {
    let _serialised = machine_lock()?;
    let mut removed = Vec::new();
    for (name, path) in entries(NETNS_DIR, NAMESPACE_PREFIX)? {
        if LabId::parse(&name[NAMESPACE_PREFIX.len()..]).is_some_and(|lab| is_stale(lab.pid)) {
            remove_namespace(&path);
            removed.push(name);
        }
    }
    for (name, path) in entries(SCRATCH_ROOT, SCRATCH_PREFIX)? {
        if LabId::parse(&name[SCRATCH_PREFIX.len()..]).is_some_and(|lab| is_stale(lab.pid)) {
            remove_scratch(&path);
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Names and paths in `dir` that begin with `prefix`; none if `dir` does not exist.
fn entries(dir: &str, prefix: &str) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {dir}")),
    };
    let named = listing.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.starts_with(prefix).then(|| (name, entry.path()))
    });
    Ok(named.collect())
}

/// Kills what runs in the namespace at `path` and takes its name away; the kernel frees it with the last
/// user.
pub(super) fn remove_namespace(path: &Path) {
    kill_inside(path);
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// Unmounts whatever is mounted at `bpf` in a scratch directory and removes the directory.
pub(super) fn remove_scratch(path: &Path) {
    while umount2(&path.join("bpf"), MntFlags::MNT_DETACH).is_ok() {}
    let _ = fs::remove_dir_all(path);
}

/// Whether a process with this id exists, a zombie included: its parent has yet to learn of its end.
fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Taken while namespaces are made or swept: iproute2 makes `/run/netns` a shared mount on first use, and two
/// processes doing that at once end up with one mounted over the other.
pub(super) fn machine_lock() -> anyhow::Result<Flock<File>> {
    let path = Path::new(SCRATCH_ROOT).join("portcullis-lab.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_labs_are_read_back_and_other_names_are_not() {
        let lab = LabId { pid: 4711, number: 3 };
        let name = lab.namespace_name("guest-1");
        assert_eq!(name, "pc-4711-3-guest-1");
        assert_eq!(LabId::parse(&name["pc-".len()..]), Some(lab));
        assert_eq!(LabId::parse("vm1"), None);
        assert_eq!(LabId::parse("4711-x-gw"), None);
    }

    #[test]
    fn a_living_process_is_alive_and_a_reaped_one_is_not() {
        let mut child = std::process::Command::new("true").spawn().expect("true runs");
        let pid = child.id();
        child.wait().expect("true ends");
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(pid));
    }
}
