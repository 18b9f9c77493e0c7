//! What the daemon keeps on disk: the ids that flows refer to and who owns which ports. And its lock.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::compile::ports::{AddressUnits, Owner};
use crate::compile::{Ownership, Registry};

/// The file's contents.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    version: u32,
    pub registry: Registry,
    pub ownership: Ownership,
}

const VERSION: u32 = 2;

/// What every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Version 1: units were owned for TCP and UDP together, of IPv4 addresses.
#[derive(Deserialize)]
struct Saved1 {
    registry: Registry,
    ownership: BTreeMap<Ipv4Addr, BTreeMap<u16, String>>,
}

impl From<Saved1> for Saved {
    fn from(Saved1 { registry, ownership }: Saved1) -> Self {
        let units = |units: BTreeMap<u16, String>| {
            let owner = |(unit, member)| (unit, Owner { member, draining_until: None });
            let tcp: BTreeMap<u16, Owner> = units.into_iter().map(owner).collect();
            AddressUnits { udp: tcp.clone(), tcp }
        };
        let frontends = ownership.into_iter().map(|(address, of)| (address.into(), units(of))).collect();
        Self { version: VERSION, registry, ownership: Ownership { frontends, ..Ownership::default() } }
    }
}

/// Name of the file in the state directory.
pub const FILE: &str = "state.json";
/// The lock's; it holds the daemon's process id.
pub const LOCK: &str = "lock";

/// A killed process has its locks until the kernel is done with it.
pub const DYING: Duration = Duration::from_secs(3);

/// The state directory, locked: one daemon at a time, and none while `down` works.
#[derive(Debug)]
pub struct StateDir {
    directory: PathBuf,
    lock: Flock<File>,
}

impl StateDir {
    /// Makes and locks the directory, and writes this process' id into the lock.
    ///
    /// # Errors
    /// Above all if another daemon has it.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("making {}", directory.display()))?;
        let path = directory.join(LOCK);
        let until = Instant::now() + DYING;
        let mut locked = try_lock(&path)?;
        while locked.is_none() && holder(&path).is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            locked = try_lock(&path)?;
        }
        let Some(mut lock) = locked else {
            let holder = holder(&path).map_or_else(String::new, |pid| format!(" (process {pid})"));
            bail!(
                "{} is locked by another portcullis{holder}: stop it with `portcullis down`, or use another \
                 --state-dir, --pin-dir and --socket",
                directory.display()
            );
        };
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(Self { directory: directory.to_owned(), lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// What the last daemon left; nothing at the first start.
    pub fn load(&self) -> anyhow::Result<Saved> {
        let path = self.directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Saved::default()),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let damaged = || {
            format!(
                "{} is damaged; it says who owns which ports. Restore it, or run `portcullis down --forget`: then ports \
                 are handed out anew and live flows end",
                path.display()
            )
        };
        let Versioned { version } = serde_json::from_slice(&text).with_context(damaged)?;
        let saved = match version {
            1 => serde_json::from_slice::<Saved1>(&text).map(Saved::from),
            VERSION => serde_json::from_slice(&text),
            other => bail!("{} has version {other}, this program writes {VERSION}", path.display()),
        };
        saved.with_context(damaged)
    }

    /// Writes it whole: beside the old one, forced out, renamed over it, the directory forced out.
    pub fn save(&self, registry: &Registry, ownership: &Ownership) -> anyhow::Result<()> {
        let saved = Saved { version: VERSION, registry: registry.clone(), ownership: ownership.clone() };
        let path = self.directory.join(FILE);
        let write = || -> io::Result<()> {
            let beside = self.directory.join("state.json.new");
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(&serde_json::to_vec(&saved)?)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Removes the lock, and the directory if nothing is left in it.
    pub fn remove(self) -> anyhow::Result<()> {
        let path = self.directory.join(LOCK);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        // Something of ours (port ownership) or of somebody else's may be there.
        let _ = fs::remove_dir(&self.directory);
        drop(self.lock);
        Ok(())
    }
}

/// Locks the file at `path`, making it; `None` if somebody has it locked.
pub fn try_lock(path: &Path) -> anyhow::Result<Option<Flock<File>>> {
    let context = || format!("locking {}", path.display());
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .with_context(context)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(error).with_context(context),
        };
        // `down` removes the file: a lock on one that has no name any more keeps nobody out.
        let inode = lock.metadata().with_context(context)?.ino();
        if fs::metadata(path).is_ok_and(|now| now.ino() == inode) {
            return Ok(Some(lock));
        }
    }
}

/// The process that holds the lock, by what it wrote there and only if it has the file open.
pub fn holder(path: &Path) -> Option<i32> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    let lock = file.metadata().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    let pid: i32 = text.trim().parse().ok().filter(|pid| *pid > 1)?;
    let same = |entry: fs::DirEntry| {
        fs::metadata(entry.path()).is_ok_and(|open| (open.dev(), open.ino()) == (lock.dev(), lock.ino()))
    };
    fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten().any(same).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pcd-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_second_daemon_is_refused_and_told_who_has_the_directory() {
        let scratch = Scratch::new("lock");
        let first = StateDir::open(&scratch.0).unwrap();
        let error = StateDir::open(&scratch.0).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("portcullis down"), "{error}");
        first.remove().unwrap();
        assert!(!scratch.0.exists());
        StateDir::open(&scratch.0).unwrap();
    }

    #[test]
    fn state_is_read_back_as_it_was_saved_and_a_damaged_file_is_an_error() {
        let scratch = Scratch::new("state");
        let state = StateDir::open(&scratch.0).unwrap();
        assert_eq!(state.load().unwrap().ownership, Ownership::default());
        let mut registry = Registry::default();
        registry.next_hop("world:up/192.0.2.1").unwrap();
        let mut ownership = Ownership::default();
        let owner = |until| Owner { member: "vm1/a".into(), draining_until: until };
        let units = ownership.frontends.entry([192, 0, 2, 7].into()).or_default();
        units.tcp.extend([(128, owner(None)), (129, owner(Some(1_800_000_000)))]);
        ownership
            .nat
            .entry("loadBalancers/lb/inboundNatRules/ssh".into())
            .or_default()
            .insert(22, "vm1/a".into());
        ownership.chosen.insert("loadBalancers/lb/outboundRules/out".into(), [192, 0, 2, 7].into());
        state.save(&registry, &ownership).unwrap();
        let read = state.load().unwrap();
        assert_eq!((read.registry, read.ownership), (registry, ownership));
        fs::write(scratch.0.join(FILE), "{").unwrap();
        assert!(format!("{:#}", state.load().unwrap_err()).contains("--forget"));
    }

    #[test]
    fn a_file_of_version_1_gives_every_owner_its_units_for_tcp_and_for_udp() {
        let scratch = Scratch::new("version1");
        let state = StateDir::open(&scratch.0).unwrap();
        let mut registry = Registry::default();
        registry.next_hop("guest:vm1/a").unwrap();
        let old = serde_json::json!({
            "version": 1,
            "registry": registry,
            "ownership": { "192.0.2.7": { "128": "vm1/a", "129": "vm2/a" } },
        });
        fs::write(scratch.0.join(FILE), old.to_string()).unwrap();
        let read = state.load().unwrap();
        assert_eq!(read.registry, registry);
        let owners = |protocol| {
            let units = read.ownership.iter().filter(move |unit| unit.1 == protocol);
            units.map(|(address, _, unit, owner)| (address, unit, owner.clone())).collect::<Vec<_>>()
        };
        let owner = |member: &str| Owner { member: member.into(), draining_until: None };
        let address = std::net::IpAddr::from([192, 0, 2, 7]);
        assert_eq!(owners(6), [(address, 128, owner("vm1/a")), (address, 129, owner("vm2/a"))]);
        assert_eq!(owners(17), owners(6));
        state.save(&read.registry, &read.ownership).unwrap();
        assert_eq!(state.load().unwrap(), read);
        fs::write(scratch.0.join(FILE), r#"{"version":3}"#).unwrap();
        assert!(format!("{:#}", state.load().unwrap_err()).contains("version 3"));
    }

    #[test]
    fn a_process_that_does_not_have_the_lock_open_is_not_its_holder() {
        let scratch = Scratch::new("holder");
        fs::create_dir_all(&scratch.0).unwrap();
        let path = scratch.0.join(LOCK);
        fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(holder(&path), None);
        fs::write(&path, "rubbish").unwrap();
        assert_eq!(holder(&path), None);
    }
}
