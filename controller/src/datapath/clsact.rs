//! TC before Linux 6.6, where there is no tcx: a filter on the clsact qdisc, by netlink, replaced in place.
//!
//! A netlink filter belongs to the device, not to us: no link, no pin. So that `down` finds it, each is remembered by
//! an empty directory in our pins (bpffs takes directories but no files), and so is a qdisc that we added. The
//! kernels this is for were not at hand; the tests run it on a newer one by [`TcBackend::Clsact`].
//!
//! Unlike with tcx, the program that a replaced filter ran before cannot be had back, and several filters of the same
//! preference are run by handle, not by who came first.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context as _, bail};
use aya::Ebpf;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{Program, TcAttachType};
use aya::util::KernelVersion;

use super::attach::{Hook, TcBackend};
use super::{pins, qdisc};

/// First in the order of filters, and a handle nobody else is likely to use.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x9071);

/// One filter of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Filter {
    pub ifindex: u32,
    pub hook: Hook,
}

/// Does this kernel (or the test) want clsact?
pub(super) fn wanted(backend: TcBackend) -> bool {
    backend == TcBackend::Clsact
        || KernelVersion::current().is_ok_and(|kernel| kernel < KernelVersion::new(6, 6, 0))
}

impl Filter {
    /// Attaches `program`, in the place of an earlier load's if there is one; whether the filter is new.
    pub fn attach(&self, ebpf: &mut Ebpf, program: &str, directory: &Path) -> anyhow::Result<bool> {
        let name = device_name(self.ifindex)?;
        let Some(Program::SchedClassifier(classifier)) = ebpf.program_mut(program) else {
            bail!("the kernel object has no classifier {program}");
        };
        if self.marker(directory).exists() {
            let old = SchedClassifierLink::attached(&name, self.tc_type(), PRIORITY, HANDLE, None)
                .with_context(|| format!("finding {name}"))?;
            // On failure aya has forgotten the link and leaves the filter alone.
            if let Ok(id) = classifier.attach_to_link(old) {
                std::mem::forget(classifier.take_link(id)?);
                return Ok(false);
            }
        }
        self.add_qdisc(&name, directory)?;
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() };
        let id = classifier
            .attach_with_options(&name, self.tc_type(), TcAttachOptions::Netlink(options))
            .with_context(|| format!("RTM_NEWTFILTER on {name}"))?;
        // Dropping it would detach.
        std::mem::forget(classifier.take_link(id)?);
        mark(&self.marker(directory))?;
        Ok(true)
    }

    /// Takes the filter away, and with the last one the qdisc, if it is ours.
    pub fn detach(&self, directory: &Path) -> anyhow::Result<()> {
        // A device that is gone took both along.
        if let Ok(name) = device_name(self.ifindex) {
            let link = SchedClassifierLink::attached(&name, self.tc_type(), PRIORITY, HANDLE, None)
                .with_context(|| format!("finding {name}"))?;
            // Detaches; a filter that somebody else removed is no error.
            drop(link);
        }
        unmark(&self.marker(directory))?;
        let mark = directory.join(format!("{}-qdisc", self.ifindex));
        if mark.exists() && !filters(directory)?.iter().any(|other| other.ifindex == self.ifindex) {
            if device_name(self.ifindex).is_ok() {
                qdisc::remove_clsact(self.ifindex)?;
            }
            unmark(&mark)?;
        }
        Ok(())
    }

    fn add_qdisc(&self, name: &str, directory: &Path) -> anyhow::Result<()> {
        match qdisc_add_clsact(name) {
            Ok(()) => mark(&directory.join(format!("{}-qdisc", self.ifindex))),
            Err(TcError::AlreadyAttached) => Ok(()),
            // aya passes the kernel's EEXIST on as what it is, an I/O error inside a netlink error.
            Err(error) if io_kind(&error) == Some(io::ErrorKind::AlreadyExists) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("adding the clsact qdisc to {name}")),
        }
    }

    fn tc_type(&self) -> TcAttachType {
        match self.hook {
            Hook::Egress => TcAttachType::Egress,
            Hook::Ingress | Hook::Xdp => TcAttachType::Ingress,
        }
    }

    fn marker(&self, directory: &Path) -> std::path::PathBuf {
        directory.join(format!("{}-{}", self.ifindex, self.hook.label()))
    }
}

/// The filters remembered in `directory`.
pub(super) fn filters(directory: &Path) -> anyhow::Result<Vec<Filter>> {
    Ok(pins::links_in(directory)?.into_iter().map(|(ifindex, hook, _)| Filter { ifindex, hook }).collect())
}

/// Detaches the filters that `keep` does not want; what was removed.
pub(super) fn detach_stale(directory: &Path, keep: impl Fn(&Filter) -> bool) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for filter in filters(directory)? {
        if !keep(&filter) {
            filter.detach(directory)?;
            removed.push(format!("{} filter of device {}", filter.hook.label(), filter.ifindex));
        }
    }
    Ok(removed)
}

fn mark(path: &Path) -> anyhow::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("making {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn unmark(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn device_name(ifindex: u32) -> anyhow::Result<String> {
    let name = nix::net::if_::if_indextoname(ifindex).with_context(|| format!("name of device {ifindex}"))?;
    Ok(name.to_string_lossy().into_owned())
}

fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}
