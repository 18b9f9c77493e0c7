//! Taking the datapath away: off the devices, out of the pins. Reads nothing but the pins, so it also works when the
//! controller's build has changed, half of it is missing, or nothing is there.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::Context as _;

use super::attach::{self, Hook};
use super::clsact;
use super::pins::{self, Pins, TRACEPOINT};

/// Detaches every program, in the order XDP, ingress, egress (guards last), and removes every pin, of all layout
/// versions. To be called in the network namespace of the devices (only kernels without tcx care). Returns what was
/// removed, one line each; nothing if nothing was there.
///
/// # Errors
/// At the first thing that cannot be removed; calling it again goes on from there.
pub fn down(pins: &Path) -> anyhow::Result<Vec<String>> {
    if !pins.exists() || !pins::is_bpffs(pins)? {
        return Ok(Vec::new());
    }
    let mut removed = Vec::new();
    for version in Pins::new(pins).versions()? {
        removed.extend(remove_version(&version)?);
    }
    match fs::remove_dir(pins) {
        // Somebody else's pins beside ours, or the root of the mount.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY)) => {}
        other => other.with_context(|| format!("removing {}", pins.display()))?,
    }
    Ok(removed)
}

/// Takes away what this layout has pinned, unless something runs on it, and leaves other layouts alone: for a start that
/// failed beside a datapath that goes on. Returns what was removed.
///
/// # Errors
/// As [`down`].
pub fn abandon(pins: &Path) -> anyhow::Result<Vec<String>> {
    let all = Pins::new(pins);
    if !pins.exists() || !pins::is_bpffs(pins)? || !all.links()?.is_empty() {
        return Ok(Vec::new());
    }
    let versions = all.versions()?;
    if versions.len() == 1 {
        return down(pins);
    }
    remove_version(&versions[0])
}

/// Does a controller work with these pins at the moment? [`down`] does not ask: it is also for the controller that hangs.
pub fn in_use(pins: &Path) -> bool {
    pins.exists() && Pins::new(pins).lock().is_err()
}

/// [`down`] for one layout version.
pub(super) fn remove_version(version: &Path) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    let links = version.join("links");
    let devices = pins::links_in(&links)?;
    for hook in Hook::ALL {
        for (ifindex, _, pin) in devices.iter().filter(|(_, h, _)| *h == hook) {
            attach::detach(pin)?;
            removed.push(format!("{} of device {ifindex}", hook.label()));
        }
    }
    removed.extend(clsact::detach_stale(&version.join("clsact"), |_| false)?);
    for name in pins::names(&links)? {
        attach::detach(&links.join(&name))?;
        removed.push(name.replacen(TRACEPOINT, "tracepoint ", 1));
    }
    let maps = version.join("maps");
    for name in pins::names(&maps)? {
        pins::unpin(&maps.join(&name))?;
        removed.push(format!("table {name}"));
    }
    for name in pins::names(version)?.iter().filter(|name| name.starts_with("stages-")) {
        pins::unpin(&version.join(name))?;
        removed.push(format!("program array {name}"));
    }
    for directory in [&links, &version.join("clsact"), &maps, &version.to_owned()] {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", directory.display()));
            }
            _ => {}
        }
    }
    Ok(removed)
}
