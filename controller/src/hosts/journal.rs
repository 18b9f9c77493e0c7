//! What was changed on this host, written down before it is done.
//!
//! One JSON file in the state directory. A change is in the file, and the file on the disk, *before* the kernel is
//! asked for it: whatever moment the controller is killed at, `portcullis down` finds every change that may have
//! been made. An entry whose change was never made, or is gone with its device, undoes to nothing (`undo`).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::namespace::Namespace;
use super::sysctl;

/// One change of the host, with what is needed to undo it.
///
/// Devices are told by ifindex, which the kernel does not give to another device while it can avoid it; the name
/// is for people, and may have changed since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum HostChange {
    AddressAdded {
        device: String,
        ifindex: u32,
        address: IpNet,
    },
    /// A route of the main table to what is on the device's link.
    RouteAdded {
        device: String,
        ifindex: u32,
        prefix: IpNet,
        source: Option<IpAddr>,
    },
    /// A permanent neighbour entry.
    NeighbourAdded {
        device: String,
        ifindex: u32,
        address: IpAddr,
        mac: [u8; 6],
    },
    Sysctl {
        /// Under /proc/sys.
        path: String,
        /// The value found when it was changed first.
        old: String,
        new: String,
        /// Our value before `new`: what is there when we were killed between writing this and setting `new`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<String>,
    },
    Offload {
        device: String,
        ifindex: u32,
        /// The kernel's name, such as `rx-lro`.
        feature: String,
        old: bool,
    },
    /// A clsact qdisc made for TC programs on kernels without tcx.
    ClsactAdded {
        device: String,
        ifindex: u32,
    },
}

impl HostChange {
    /// Two changes with the same key are about the same thing, and only the first one's old value counts.
    pub fn key(&self) -> String {
        match self {
            Self::AddressAdded { ifindex, address, .. } => format!("address {ifindex} {address}"),
            Self::RouteAdded { ifindex, prefix, .. } => format!("route {ifindex} {prefix}"),
            Self::NeighbourAdded { ifindex, address, .. } => format!("neighbour {ifindex} {address}"),
            Self::Sysctl { path, .. } => format!("sysctl {path}"),
            Self::Offload { ifindex, feature, .. } => format!("offload {ifindex} {feature}"),
            Self::ClsactAdded { ifindex, .. } => format!("clsact {ifindex}"),
        }
    }

    /// The device it belongs to; `None` for sysctls.
    pub fn ifindex(&self) -> Option<u32> {
        match self {
            Self::AddressAdded { ifindex, .. }
            | Self::RouteAdded { ifindex, .. }
            | Self::NeighbourAdded { ifindex, .. }
            | Self::Offload { ifindex, .. }
            | Self::ClsactAdded { ifindex, .. } => Some(*ifindex),
            Self::Sysctl { .. } => None,
        }
    }
}

impl fmt::Display for HostChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressAdded { device, address, .. } => write!(f, "address {address} on {device}"),
            Self::RouteAdded { device, prefix, .. } => write!(f, "route to {prefix} by {device}"),
            Self::NeighbourAdded { device, address, .. } => write!(f, "neighbour {address} on {device}"),
            Self::Sysctl { path, .. } => {
                write!(f, "sysctl {}", path.trim_start_matches("/proc/sys/").replace('/', "."))
            }
            Self::Offload { device, feature, .. } => write!(f, "offload {feature} of {device}"),
            Self::ClsactAdded { device, .. } => write!(f, "clsact qdisc on {device}"),
        }
    }
}

/// The file's contents.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    version: u32,
    namespace: Namespace,
    /// Oldest first.
    changes: Vec<HostChange>,
}

const VERSION: u32 = 1;

/// The changes made and not undone yet, backed by `journal.json`.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    namespace: Namespace,
    changes: Vec<HostChange>,
}

impl Journal {
    /// Opens (or starts) the journal in `state_directory`, which must exist, for the calling thread's namespace.
    ///
    /// Changes of an earlier boot, or of a namespace that no longer exists, are forgotten: they went with it.
    /// Errors: a file that cannot be read or is not a journal, or one that speaks of another living namespace.
    pub fn open(state_directory: &Path) -> Result<Self> {
        let path = state_directory.join("journal.json");
        let namespace = Namespace::current()?;
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Self { path, namespace, changes: Vec::new() });
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let contents: Contents = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is not a journal this version can read: undo what it lists by hand, then remove it",
                path.display()
            )
        })?;
        if contents.version != VERSION {
            bail!(
                "{} has version {}, this program writes {VERSION}: run the other version's `portcullis down` first",
                path.display(),
                contents.version
            );
        }
        let mut changes = contents.changes;
        if contents.namespace != namespace && !changes.is_empty() {
            if contents.namespace.is_alive(&namespace) {
                bail!(
                    "{} lists changes made in another network namespace (inode {}), which is still there: run \
                     `portcullis down` in it, or use another state directory here",
                    path.display(),
                    contents.namespace.inode
                );
            }
            log::info!(
                "{} lists {} changes made before a reboot or in a namespace that is gone: forgotten",
                path.display(),
                changes.len()
            );
            changes.clear();
        }
        Ok(Self { path, namespace, changes })
    }

    /// What is written down, oldest first.
    pub fn changes(&self) -> &[HostChange] {
        &self.changes
    }

    /// What is written down, by key.
    pub fn by_key(&self) -> HashMap<String, &HostChange> {
        self.changes.iter().map(|change| (change.key(), change)).collect()
    }

    /// Writes changes down; returns once they are on the disk. Call it *before* making them.
    ///
    /// A change already listed keeps the old value it has. For a sysctl, `old` is the value found now: if that is
    /// neither the original nor ours, someone else set it meanwhile and it becomes what is restored.
    pub fn record(&mut self, changes: impl IntoIterator<Item = HostChange>) -> Result<()> {
        let mut next = self.changes.clone();
        // A thousand guests are two thousand entries: not a search for each.
        let mut positions: HashMap<String, usize> =
            next.iter().enumerate().map(|(position, known)| (known.key(), position)).collect();
        for change in changes {
            match positions.entry(change.key()) {
                Entry::Occupied(known) => {
                    let known = &mut next[*known.get()];
                    *known = merged(known.clone(), change);
                }
                Entry::Vacant(free) => {
                    free.insert(next.len());
                    next.push(change);
                }
            }
        }
        self.replace(next)
    }

    /// Strikes changes out (they were undone, or are gone).
    pub fn forget(&mut self, keys: &[String]) -> Result<()> {
        let keys: HashSet<&String> = keys.iter().collect();
        self.replace(self.changes.iter().filter(|change| !keys.contains(&change.key())).cloned().collect())
    }

    fn replace(&mut self, changes: Vec<HostChange>) -> Result<()> {
        if changes == self.changes {
            return Ok(());
        }
        // In memory only what is on the disk: on an error the change must not be made.
        self.save(&changes).with_context(|| format!("cannot write {}", self.path.display()))?;
        self.changes = changes;
        Ok(())
    }

    /// Replaces the file whole: written beside it, forced out, renamed over it, the directory forced out.
    fn save(&self, changes: &[HostChange]) -> Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        if changes.is_empty() {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => return Ok(File::open(directory)?.sync_all()?),
            }
        }
        let contents =
            Contents { version: VERSION, namespace: self.namespace.clone(), changes: changes.to_vec() };
        let beside = self.path.with_extension("json.new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&serde_json::to_vec_pretty(&contents)?)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        Ok(File::open(directory)?.sync_all()?)
    }
}

/// The entry to keep when `change` is wished while `known` is listed under the same key.
fn merged(known: HostChange, change: HostChange) -> HostChange {
    match (known, change) {
        (
            HostChange::Sysctl { old, new: ours, before, .. },
            HostChange::Sysctl { path, old: found, new, .. },
        ) => {
            let is_ours = sysctl::same(&path, &found, &ours)
                || before.is_some_and(|before| sysctl::same(&path, &found, &before));
            if is_ours || sysctl::same(&path, &found, &old) {
                let before = is_ours.then_some(found).filter(|found| !sysctl::same(&path, found, &new));
                HostChange::Sysctl { path, old, new, before }
            } else {
                HostChange::Sysctl { path, old: found, new, before: None }
            }
        }
        (HostChange::RouteAdded { .. }, change) => change,
        (known, _) => known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::Scratch;

    fn address(text: &str) -> HostChange {
        HostChange::AddressAdded { device: "eth0".into(), ifindex: 7, address: text.parse().unwrap() }
    }

    fn ports(old: &str, new: &str) -> HostChange {
        HostChange::Sysctl {
            path: sysctl::RESERVED_PORTS.into(),
            old: old.into(),
            new: new.into(),
            before: None,
        }
    }

    #[test]
    fn a_journal_reads_back_what_was_recorded_and_leaves_no_file_when_empty() {
        let directory = Scratch::new();
        let mut journal = Journal::open(&directory.0).unwrap();
        let changes = vec![address("192.0.2.7/32"), ports("", "80")];
        journal.record(changes.clone()).unwrap();
        let mut again = Journal::open(&directory.0).unwrap();
        assert_eq!(again.changes(), changes);
        again.forget(&changes.iter().map(HostChange::key).collect::<Vec<_>>()).unwrap();
        assert!(!directory.0.join("journal.json").exists());
        assert!(Journal::open(&directory.0).unwrap().changes().is_empty());
    }

    #[test]
    fn changes_of_ipv6_stand_beside_those_of_ipv4_and_an_older_journal_still_reads() {
        let six = HostChange::RouteAdded {
            device: "g0".into(),
            ifindex: 3,
            prefix: "fd00:1::4/128".parse().unwrap(),
            source: Some("fd00:1::1".parse().unwrap()),
        };
        assert_eq!(
            (six.key().as_str(), six.to_string()),
            ("route 3 fd00:1::4/128", "route to fd00:1::4/128 by g0".into())
        );
        let json = serde_json::to_string(&six).unwrap();
        assert_eq!(serde_json::from_str::<HostChange>(&json).unwrap(), six);
        // As the versions before IPv6 wrote it.
        let old = r#"{"kind":"addressAdded","device":"eth0","ifindex":7,"address":"192.0.2.7/32"}"#;
        assert_eq!(serde_json::from_str::<HostChange>(old).unwrap(), address("192.0.2.7/32"));
    }

    #[test]
    fn the_same_wish_twice_is_journaled_once_with_the_first_old_value() {
        let directory = Scratch::new();
        let mut journal = Journal::open(&directory.0).unwrap();
        journal.record([address("192.0.2.7/32"), ports("22", "22,80")]).unwrap();
        journal.record([address("192.0.2.7/32"), ports("22,80", "22,80-81")]).unwrap();
        assert_eq!(journal.changes().len(), 2);
        let HostChange::Sysctl { old, new, before, .. } = &journal.changes()[1] else { panic!() };
        assert_eq!((old.as_str(), new.as_str(), before.as_deref()), ("22", "22,80-81", Some("22,80")));
    }

    #[test]
    fn a_value_someone_else_set_meanwhile_becomes_the_one_to_restore() {
        let directory = Scratch::new();
        let mut journal = Journal::open(&directory.0).unwrap();
        journal.record([ports("22", "22,80")]).unwrap();
        journal.record([ports("443", "80,443")]).unwrap();
        assert_eq!(journal.changes(), [ports("443", "80,443")]);
    }

    #[test]
    fn a_failed_write_leaves_the_journal_as_it_was() {
        let directory = Scratch::new();
        let mut journal = Journal::open(&directory.0).unwrap();
        std::fs::remove_dir_all(&directory.0).unwrap();
        assert!(journal.record([address("192.0.2.7/32")]).is_err());
        assert!(journal.changes().is_empty());
    }

    #[test]
    fn a_file_that_is_no_journal_is_an_error_and_not_an_empty_journal() {
        let directory = Scratch::new();
        std::fs::write(directory.0.join("journal.json"), "{\"changes\": [").unwrap();
        let error = format!("{:#}", Journal::open(&directory.0).unwrap_err());
        assert!(error.contains("undo what it lists by hand"), "{error}");
    }

    #[test]
    fn changes_of_an_earlier_boot_are_forgotten_and_those_of_a_living_namespace_are_not_ours() {
        let directory = Scratch::new();
        let mut journal = Journal::open(&directory.0).unwrap();
        journal.record([address("192.0.2.7/32")]).unwrap();
        let path = directory.0.join("journal.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let boot = journal.namespace.boot.clone();
        std::fs::write(&path, text.replace(&boot, "an-earlier-boot")).unwrap();
        assert!(Journal::open(&directory.0).unwrap().changes().is_empty());
        // The same inode with another cookie: that namespace is gone and its inode was given to this one.
        let cookie = format!("\"cookie\": {}", journal.namespace.cookie);
        std::fs::write(&path, text.replace(&cookie, "\"cookie\": 424242")).unwrap();
        assert!(Journal::open(&directory.0).unwrap().changes().is_empty());
    }
}
