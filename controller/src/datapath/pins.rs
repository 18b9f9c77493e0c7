//! Where the datapath lives while nobody holds it: names in a bpf filesystem.
//!
//! ```text
//! <pins>/v1/maps/<NAME>              tables, adopted by the next controller
//! <pins>/v1/links/<ifindex>-<hook>   attachments; removing the name detaches
//! <pins>/v1/links/tracepoint-<name>
//! <pins>/v1/stages-<n>-<xdp|tc>      program arrays of the n-th load
//! <pins>/v1/clsact/<ifindex>-<what>  directories that remember netlink attachments (before Linux 6.6)
//! ```
//!
//! Links are named by interface index: bpffs refuses dots in names and VLAN devices have them, and an index says
//! which device was meant when a name has been given to another since.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use portcullis_common::layout::ABI;

use super::attach::Hook;
use super::object::describe_shape;
use super::sys::{self, Shape};
use super::table::Table;
use crate::privileges::privileged;

/// Where pins go unless the operator says otherwise.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/portcullis";

/// Where distributions mount the bpf filesystem.
const BPFFS: &str = "/sys/fs/bpf";
/// BPF_FS_MAGIC of linux/magic.h.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// The names of one installation and layout version.
#[derive(Debug, Clone)]
pub(super) struct Pins {
    root: PathBuf,
    version: PathBuf,
}

impl Pins {
    /// The names below `root`; touches nothing.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), version: root.join(format!("v{ABI}")) }
    }

    /// Makes the directories, and mounts the bpf filesystem where it belongs if nobody has.
    pub fn prepare(&self) -> anyhow::Result<()> {
        if !is_bpffs(&existing_ancestor(&self.root))? {
            ensure!(
                self.root.starts_with(BPFFS) && Path::new(BPFFS).is_dir(),
                "{} is not in a bpf filesystem, where pinned programs and tables have to be; \
                 mount one (mount -t bpf bpf DIRECTORY) or use {DEFAULT_PINS}",
                self.root.display()
            );
            privileged(|| {
                mount(
                    Some("bpf"),
                    BPFFS,
                    Some("bpf"),
                    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                    Some("mode=700"),
                )
            })
            .with_context(|| format!("mounting the bpf filesystem at {BPFFS}"))?;
            log::info!("mounted the bpf filesystem at {BPFFS}");
        }
        for directory in [self.maps_dir(), self.links_dir(), self.clsact_dir()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .with_context(|| format!("making {}", directory.display()))?;
        }
        Ok(())
    }

    /// Held for as long as a controller works with these pins; two would undo each other's generations.
    pub fn lock(&self) -> anyhow::Result<Flock<File>> {
        let file = File::open(&self.root).with_context(|| format!("opening {}", self.root.display()))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).with_context(|| {
            format!(
                "{} is in use by another portcullis; stop it first (or use other pins)",
                self.root.display()
            )
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn maps_dir(&self) -> PathBuf {
        self.version.join("maps")
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.maps_dir().join(name)
    }

    pub fn links_dir(&self) -> PathBuf {
        self.version.join("links")
    }

    pub fn link(&self, ifindex: u32, hook: Hook) -> PathBuf {
        self.links_dir().join(link_name(ifindex, hook))
    }

    pub fn tracepoint(&self, name: &str) -> PathBuf {
        self.links_dir().join(format!("{TRACEPOINT}{name}"))
    }

    pub fn clsact_dir(&self) -> PathBuf {
        self.version.join("clsact")
    }

    /// Pin of the program array for `hook` of the `number`th load.
    pub fn stages(&self, number: u32, hook: &str) -> PathBuf {
        self.version.join(format!("stages-{number}-{hook}"))
    }

    /// Numbers of the loads whose program arrays are pinned, ascending.
    pub fn stage_numbers(&self) -> anyhow::Result<Vec<u32>> {
        let number = |name: &str| name.strip_prefix("stages-")?.split_once('-')?.0.parse::<u32>().ok();
        let mut numbers: Vec<u32> = names(&self.version)?.iter().filter_map(|name| number(name)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// The device links that are pinned.
    pub fn links(&self) -> anyhow::Result<Vec<(u32, Hook, PathBuf)>> {
        links_in(&self.links_dir())
    }

    /// Directories of all layout versions, this one's first.
    pub fn versions(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut versions = vec![self.version.clone()];
        for name in names(&self.root)? {
            let is_version = name.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok());
            let path = self.root.join(&name);
            if is_version && path != self.version {
                versions.push(path);
            }
        }
        Ok(versions)
    }

    /// Pin of the link of this hook, of this layout version or of another one.
    pub fn find_link(&self, ifindex: u32, hook: Hook) -> anyhow::Result<Option<PathBuf>> {
        let name = link_name(ifindex, hook);
        Ok(self.versions()?.into_iter().map(|v| v.join("links").join(&name)).find(|path| path.exists()))
    }
}

/// Beginning of the pins of tracepoint links.
pub(super) const TRACEPOINT: &str = "tracepoint-";

fn link_name(ifindex: u32, hook: Hook) -> String {
    format!("{ifindex}-{}", hook.label())
}

/// `(ifindex, hook, path)` of every device link pinned in `directory`.
pub(super) fn links_in(directory: &Path) -> anyhow::Result<Vec<(u32, Hook, PathBuf)>> {
    let parse = |name: &str| {
        let (ifindex, hook) = name.split_once('-')?;
        Some((ifindex.parse().ok()?, Hook::from_label(hook)?, directory.join(name)))
    };
    Ok(names(directory)?.iter().filter_map(|name| parse(name)).collect())
}

/// Names in a directory, sorted; none if it does not exist.
pub(super) fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {}", directory.display())),
    };
    let mut names: Vec<String> =
        listing.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    Ok(names)
}

/// Removes a pin; whether it was there.
pub(super) fn unpin(path: &Path) -> anyhow::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

/// Opens the map pinned at `path`, if any, after comparing its shape with what this build expects: bpf(2) would hand
/// out a map of any shape and copy by *its* sizes.
pub(super) fn open_checked(
    name: &str,
    path: &Path,
    want: &Shape,
    any_size: bool,
) -> anyhow::Result<Option<Table>> {
    let Some(fd) = sys::open_pin(path).with_context(|| format!("BPF_OBJ_GET {}", path.display()))? else {
        return Ok(None);
    };
    let table = Table::from_fd(name, fd)?;
    let mut have = table.shape;
    if any_size {
        have.max_entries = want.max_entries;
    }
    if have != *want {
        bail!(
            "{}: the pinned table is {}, this build expects {}; it was left by another build: \
             `portcullis down` removes it, and with it every live flow",
            path.display(),
            describe_shape(&table.shape),
            describe_shape(want)
        );
    }
    Ok(Some(table))
}

/// Is `path` in a bpf filesystem?
pub(super) fn is_bpffs(path: &Path) -> anyhow::Result<bool> {
    let filesystem = statfs(path).with_context(|| format!("statfs {}", path.display()))?;
    Ok(filesystem.filesystem_type() == BPF_FS_MAGIC)
}

fn existing_ancestor(path: &Path) -> PathBuf {
    path.ancestors().find(|p| p.exists()).map_or_else(|| PathBuf::from("/"), Path::to_owned)
}
