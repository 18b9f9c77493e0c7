//! A directory of the lab's own under /run, and a BPF filesystem in one.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};

use super::identity::{LabId, remove_scratch};

/// A directory `/run/portcullis-lab-<pid>-<n>`, for state, sockets and logs; removed when dropped.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
}

impl ScratchDir {
    /// Makes an empty one.
    pub fn create() -> anyhow::Result<Self> {
        let path = LabId::fresh().scratch_path();
        // Not `create_dir_all`: what is there already is not ours.
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("making {}", path.display()))?;
        Ok(ScratchDir { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file in it and returns its path.
    pub fn write(&self, name: &str, contents: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::write(&path, contents)?;
        Ok(path)
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        remove_scratch(&self.path);
    }
}

/// A BPF filesystem of the lab's own, at `bpf` in a [`ScratchDir`]; unmounted, with every pin in it, when
/// dropped.
///
/// It is mounted in this process's mount namespace and so seen by every process started from here, in
/// whatever network namespace, and by what `ip netns exec` starts. Pins last as long as this does, whoever
/// made them.
#[derive(Debug)]
pub struct BpfFs {
    path: PathBuf,
    // Unmounts, then removes.
    scratch: ScratchDir,
}

impl BpfFs {
    /// Mounts one.
    pub fn mount() -> anyhow::Result<Self> {
        let scratch = ScratchDir::create()?;
        let path = scratch.path().join("bpf");
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), &path, Some("bpf"), flags, Some("mode=0700"))
            .with_context(|| format!("mounting a bpffs on {}", path.display()))?;
        Ok(BpfFs { path, scratch })
    }

    /// Where it is mounted: what goes into `--pin-dir`, or above it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory around it, an ordinary one, for state, sockets and logs.
    pub fn scratch(&self) -> &ScratchDir {
        &self.scratch
    }

    /// Names in the filesystem's top directory, but for the two iterators that the kernel puts into every
    /// bpffs.
    pub fn pins(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.filter(|name| !matches!(name.as_deref(), Ok("maps.debug" | "progs.debug"))).collect()
    }
}

/// A file for a process's output, appended to, so that a restarted one does not take the first one's away.
pub(super) fn open_log(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}
