//! Hooks: which program runs on which device, and how it gets there without losing a packet.
//!
//! A hook is a link pinned under the device's index. A link that is there already gets our program in its place
//! (BPF_LINK_UPDATE): one packet runs the old one, the next the new one. Guards go first and are taken away last, so
//! that there is no moment at which an uplink forwards unguarded.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use aya_obj::generated::{BPF_F_BEFORE, XDP_FLAGS_DRV_MODE, bpf_attach_type};

use super::clsact;
use super::load::{Datapath, program_fd};
use super::object::{STAGED, TRACEPOINTS};
use super::pins;
use super::sys;

/// Where in the life of a packet a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Before the kernel makes a packet of what the driver received.
    Xdp,
    /// TC, arriving.
    Ingress,
    /// TC, leaving.
    Egress,
}

impl Hook {
    /// All of them, in the order in which they are taken away.
    pub const ALL: [Hook; 3] = [Hook::Xdp, Hook::Ingress, Hook::Egress];

    /// The word in pins and messages.
    pub const fn label(self) -> &'static str {
        match self {
            Hook::Xdp => "xdp",
            Hook::Ingress => "ingress",
            Hook::Egress => "egress",
        }
    }

    /// The hook with this label.
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.label() == label)
    }

    pub(super) fn attach_type(self) -> bpf_attach_type {
        match self {
            Hook::Xdp => bpf_attach_type::BPF_XDP,
            Hook::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
            Hook::Egress => bpf_attach_type::BPF_TCX_EGRESS,
        }
    }
}

/// What a device is to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Guests are behind it.
    Guest,
    /// The world is behind it.
    Uplink,
}

impl Role {
    /// Name of the program that a device of this role has at `hook`.
    pub const fn program(self, hook: Hook) -> &'static str {
        match (hook, self) {
            (Hook::Xdp, _) => "pc_xdp",
            (Hook::Ingress, _) => "pc_tc",
            (Hook::Egress, Role::Guest) => "pc_host",
            (Hook::Egress, Role::Uplink) => "pc_guard",
        }
    }
}

/// A device to attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachDevice {
    pub ifindex: u32,
    /// For messages, and for kernels without tcx.
    pub name: String,
    pub role: Role,
    /// Run XDP (in the driver) before TC.
    pub xdp: bool,
}

impl AttachDevice {
    fn hooks(&self) -> impl Iterator<Item = Hook> {
        // Guards and host programs before what lets packets in, XDP last.
        [Hook::Egress, Hook::Ingress, Hook::Xdp].into_iter().filter(|&hook| hook != Hook::Xdp || self.xdp)
    }
}

/// How TC programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TcBackend {
    /// tcx from Linux 6.6, clsact before.
    #[default]
    Auto,
    /// A netlink filter on the clsact qdisc even where there is tcx; for tests of that path.
    Clsact,
}

/// Every device the gateway works on.
#[derive(Debug, Clone, Default)]
pub struct AttachPlan {
    pub devices: Vec<AttachDevice>,
    pub tc: TcBackend,
}

impl AttachPlan {
    /// The hooks the plan wants, for [`Datapath::detach_stale`].
    pub fn hooks(&self) -> BTreeSet<(u32, Hook)> {
        self.devices.iter().flat_map(|device| device.hooks().map(|hook| (device.ifindex, hook))).collect()
    }
}

/// What [`Datapath::attach`] did, so that it can be undone.
#[derive(Debug, Default)]
#[must_use = "commit or undo it"]
pub struct Attached {
    steps: Vec<Step>,
    notes: Vec<String>,
}

#[derive(Debug)]
enum Step {
    /// A link that was not there.
    Created { pin: PathBuf, what: String },
    /// A link that runs this load's program already.
    Kept { what: String },
    /// A link that ran another program, and may have been pinned elsewhere.
    Replaced { link: OwnedFd, previous: OwnedFd, pin: PathBuf, from: PathBuf, what: String },
    /// A filter of clsact; `previous` is not known there, the kernel does not say.
    Clsact { filter: clsact::Filter, created: bool, what: String },
}

impl Attached {
    /// One line for each hook: what was done where.
    pub fn describe(&self) -> Vec<String> {
        let line = |step: &Step| match step {
            Step::Created { what, .. } => format!("{what}: attached"),
            Step::Kept { what } => format!("{what}: attached already"),
            Step::Replaced { what, .. } => format!("{what}: program replaced"),
            Step::Clsact { what, created: true, .. } => format!("{what}: attached by netlink"),
            Step::Clsact { what, created: false, .. } => format!("{what}: filter replaced by netlink"),
        };
        self.steps.iter().map(line).collect()
    }

    /// What the operator should know, such as a counter that could not be attached.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

impl Datapath {
    /// Attaches this load's programs to every device of the plan: guards of uplinks first of all, then TC, then XDP.
    /// Whole or not at all: after an error everything is as it was.
    ///
    /// Call [`Datapath::commit`] when the start has succeeded, [`Datapath::undo`] when something else failed.
    pub fn attach(&mut self, plan: &AttachPlan) -> anyhow::Result<Attached> {
        let mut done = Attached::default();
        match self.attach_all(plan, &mut done) {
            Ok(()) => {
                self.stages_in_use = true;
                Ok(done)
            }
            Err(error) => {
                self.undo(done);
                Err(error)
            }
        }
    }

    /// Attaches the guards of the plan's uplinks where there are none, and nothing else; [`Datapath::attach`] finds them
    /// there. For a change of policy, before the host is prepared for new guests.
    ///
    /// # Errors
    /// As [`Datapath::attach`].
    pub fn attach_guards(&mut self, plan: &AttachPlan) -> anyhow::Result<Attached> {
        self.attach_missing(plan, |device, hook| device.role == Role::Uplink && hook == Hook::Egress)
    }

    /// The same for everything but XDP, guards first. For a first start, before the host is prepared: with a gateway
    /// address on a guest's device, a host that forwards would carry the guest's packets to the world as they are, and
    /// to other guests past their groups. XDP has to wait for the offloads that preparing turns off.
    ///
    /// # Errors
    /// As [`Datapath::attach`].
    pub fn attach_tc(&mut self, plan: &AttachPlan) -> anyhow::Result<Attached> {
        self.attach_missing(plan, |_, hook| hook != Hook::Xdp)
    }

    fn attach_missing(
        &mut self,
        plan: &AttachPlan,
        wanted: impl Fn(&AttachDevice, Hook) -> bool,
    ) -> anyhow::Result<Attached> {
        let mut done = Attached::default();
        for (device, hook) in in_order(plan).into_iter().filter(|(device, hook)| wanted(device, *hook)) {
            // One that is there, of an earlier load, is as good until everything changes at once.
            match self.has_link(device.ifindex, hook).and_then(|there| {
                if there { Ok(None) } else { self.attach_one(device, hook, plan.tc).map(Some) }
            }) {
                Ok(step) => done.steps.extend(step),
                Err(error) => {
                    self.undo(done);
                    return Err(error);
                }
            }
        }
        self.stages_in_use |= !done.steps.is_empty();
        Ok(done)
    }

    fn has_link(&self, ifindex: u32, hook: Hook) -> anyhow::Result<bool> {
        let Some(pin) = self.pins.find_link(ifindex, hook)? else { return Ok(false) };
        let link = sys::open_pin(&pin).with_context(|| format!("BPF_OBJ_GET {}", pin.display()))?;
        let Some(link) = link else { return Ok(false) };
        let state =
            sys::link_info(link.as_fd()).with_context(|| format!("asking about {}", pin.display()))?;
        // Else the device it was on is gone, and another has its index.
        Ok(state.ifindex == ifindex)
    }

    fn attach_one(&mut self, device: &AttachDevice, hook: Hook, tc: TcBackend) -> anyhow::Result<Step> {
        let what = format!("{} on {} ({})", device.role.program(hook), device.name, hook.label());
        let step = if hook != Hook::Xdp && clsact::wanted(tc) {
            self.attach_clsact(device, hook, what.clone())
        } else {
            self.attach_link(device, hook, what.clone())
        };
        step.with_context(|| format!("attaching {what}"))
    }

    fn attach_all(&mut self, plan: &AttachPlan, done: &mut Attached) -> anyhow::Result<()> {
        let mut seen = BTreeSet::new();
        for device in &plan.devices {
            ensure!(seen.insert(device.ifindex), "device {} is in the plan twice", device.name);
        }
        for (device, hook) in in_order(plan) {
            done.steps.push(self.attach_one(device, hook, plan.tc)?);
        }
        self.attach_tracepoints(done);
        Ok(())
    }

    fn attach_link(&self, device: &AttachDevice, hook: Hook, what: String) -> anyhow::Result<Step> {
        let program = program_fd(&self.ebpf, device.role.program(hook))?.as_fd();
        let pin = self.pins.link(device.ifindex, hook);
        if let Some(from) = self.pins.find_link(device.ifindex, hook)?
            && let Some(link) =
                sys::open_pin(&from).with_context(|| format!("BPF_OBJ_GET {}", from.display()))?
        {
            let state =
                sys::link_info(link.as_fd()).with_context(|| format!("asking about {}", from.display()))?;
            if state.ifindex == device.ifindex {
                let ours = sys::program_info(program).context("BPF_OBJ_GET_INFO_BY_FD of the program")?.id;
                if state.program == ours && from == pin {
                    return Ok(Step::Kept { what });
                }
                let previous = sys::program_by_id(state.program)
                    .with_context(|| format!("BPF_PROG_GET_FD_BY_ID {}", state.program))?;
                sys::link_update(link.as_fd(), program)
                    .with_context(|| format!("BPF_LINK_UPDATE {}", from.display()))?;
                if from != pin {
                    let moved = fs::rename(&from, &pin)
                        .with_context(|| format!("renaming {} to {}", from.display(), pin.display()));
                    if let Err(error) = moved {
                        let _ = sys::link_update(link.as_fd(), previous.as_fd());
                        return Err(error);
                    }
                }
                return Ok(Step::Replaced { link, previous, pin, from, what });
            }
            // The device it was on is gone, and the kernel has detached it; what has the index now is another.
            pins::unpin(&from)?;
        }
        let flags = match hook {
            Hook::Xdp => XDP_FLAGS_DRV_MODE,
            // Before whoever is there: a program that ends the chain would hide the guard.
            Hook::Ingress | Hook::Egress => BPF_F_BEFORE,
        };
        let link = sys::link_create(program, device.ifindex, hook.attach_type(), flags)
            .map_err(|error| explain_refusal(error, device, hook))?;
        sys::pin(link.as_fd(), &pin).with_context(|| format!("BPF_OBJ_PIN {}", pin.display()))?;
        Ok(Step::Created { pin, what })
    }

    fn attach_clsact(&mut self, device: &AttachDevice, hook: Hook, what: String) -> anyhow::Result<Step> {
        let directory = self.pins.clsact_dir();
        let filter = clsact::Filter { ifindex: device.ifindex, hook };
        let created = filter.attach(&mut self.ebpf, device.role.program(hook), &directory)?;
        Ok(Step::Clsact { filter, created, what })
    }

    /// The counters of lost redirects are not worth failing a start for.
    fn attach_tracepoints(&self, done: &mut Attached) {
        for (tracepoint, program) in TRACEPOINTS {
            let pin = self.pins.tracepoint(tracepoint);
            let was_there = pin.exists();
            match self.attach_tracepoint(tracepoint, program, &pin) {
                Ok(()) if was_there => {}
                Ok(()) => done.steps.push(Step::Created { pin, what: format!("{program} at {tracepoint}") }),
                Err(error) => {
                    let note = format!("redirects lost at {tracepoint} are not counted: {error:#}");
                    log::warn!("{note}");
                    done.notes.push(note);
                }
            }
        }
    }

    /// A raw tracepoint's link cannot change its program: the new one is put beside the old one, which then goes.
    fn attach_tracepoint(&self, tracepoint: &str, program: &str, pin: &Path) -> anyhow::Result<()> {
        let program = program_fd(&self.ebpf, program)?.as_fd();
        let link = sys::raw_tracepoint(program, tracepoint)
            .with_context(|| format!("BPF_RAW_TRACEPOINT_OPEN {tracepoint}"))?;
        pins::unpin(pin)?;
        sys::pin(link.as_fd(), pin).with_context(|| format!("BPF_OBJ_PIN {}", pin.display()))
    }

    /// Takes back what [`Datapath::attach`] did, last first: guards go last.
    pub fn undo(&mut self, done: Attached) {
        self.stages_in_use = done
            .steps
            .iter()
            .any(|step| matches!(step, Step::Kept { .. } | Step::Clsact { created: false, .. }));
        for step in done.steps.into_iter().rev() {
            let undone = match &step {
                Step::Created { pin, .. } => detach(pin),
                Step::Kept { .. } => Ok(()),
                Step::Replaced { link, previous, pin, from, .. } => {
                    sys::link_update(link.as_fd(), previous.as_fd())
                        .context("BPF_LINK_UPDATE")
                        .and_then(|()| if from == pin { Ok(()) } else { Ok(fs::rename(pin, from)?) })
                }
                Step::Clsact { filter, created: true, .. } => filter.detach(&self.pins.clsact_dir()),
                // It runs the new program now; the old one cannot be had back from netlink.
                Step::Clsact { created: false, .. } => Ok(()),
            };
            if let Err(error) = undone {
                log::warn!("undoing {step:?}: {error:#}");
            }
        }
    }

    /// The start has succeeded: removes the program arrays of earlier loads, whose programs no link runs any more,
    /// and what other layout versions left.
    pub fn commit(&mut self, done: Attached) -> anyhow::Result<()> {
        drop(done);
        // A packet that met the program before may be on its way to one of its stages.
        self.wait_for_running_programs()?;
        for number in self.pins.stage_numbers()? {
            if number != self.stage_number {
                for (hook, _) in STAGED {
                    pins::unpin(&self.pins.stages(number, hook))?;
                }
            }
        }
        for version in self.pins.versions()?.into_iter().skip(1) {
            let removed = super::down::remove_version(&version)?;
            log::info!("removed {} of another layout: {removed:?}", version.display());
        }
        Ok(())
    }

    /// Detaches what is not in `keep` ([`AttachPlan::hooks`]): hooks of devices that left the policy or the machine.
    /// XDP first, guards last. Returns what was removed.
    pub fn detach_stale(&mut self, keep: &BTreeSet<(u32, Hook)>) -> anyhow::Result<Vec<String>> {
        let mut links = self.pins.links()?;
        links.sort_by_key(|(ifindex, hook, _)| (*hook, *ifindex));
        let mut removed = Vec::new();
        for (ifindex, hook, pin) in links {
            if !keep.contains(&(ifindex, hook)) {
                detach(&pin)?;
                removed.push(format!("{} of device {ifindex}", hook.label()));
            }
        }
        removed.extend(clsact::detach_stale(&self.pins.clsact_dir(), |filter| {
            keep.contains(&(filter.ifindex, filter.hook))
        })?);
        Ok(removed)
    }
}

/// Every hook of the plan, guards of uplinks first of all. Then TC of the uplinks before that of guests: with the kernel's NAT
/// still at work (a first start), answers to what it sent find the flow that was taken over; the other way round they would
/// leave it for a guest whose host program knows nothing of them. XDP last.
fn in_order(plan: &AttachPlan) -> Vec<(&AttachDevice, Hook)> {
    let guards = plan.devices.iter().filter(|d| d.role == Role::Uplink).map(|d| (d, Hook::Egress));
    let others = plan
        .devices
        .iter()
        .flat_map(|d| d.hooks().map(move |hook| (d, hook)))
        .filter(|(d, hook)| (d.role, *hook) != (Role::Uplink, Hook::Egress));
    let mut others: Vec<_> = others.collect();
    others.sort_by_key(|(device, hook)| (*hook == Hook::Xdp, device.role == Role::Guest));
    guards.chain(others).collect()
}

/// Detaches and unpins a link, whoever else holds it open.
pub(super) fn detach(pin: &Path) -> anyhow::Result<()> {
    if let Some(link) = sys::open_pin(pin).with_context(|| format!("BPF_OBJ_GET {}", pin.display()))? {
        match sys::link_detach(link.as_fd()) {
            // Tracepoints know no detaching by force (EOPNOTSUPP): they end with their last descriptor or pin.
            // A device that is gone took its attachment along (ENOLINK).
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOLINK)) => {
                return Err(error).with_context(|| format!("BPF_LINK_DETACH {}", pin.display()));
            }
            _ => {}
        }
    }
    pins::unpin(pin).map(drop)
}

fn explain_refusal(error: std::io::Error, device: &AttachDevice, hook: Hook) -> anyhow::Error {
    let name = &device.name;
    let hint = match (hook, error.raw_os_error()) {
        (_, Some(libc::ENODEV)) => format!("there is no device {} any more", device.ifindex),
        (Hook::Xdp, Some(libc::EBUSY | libc::EEXIST)) => {
            format!("another XDP program runs on {name}; see `bpftool net`, or set `hook: tc` for the device")
        }
        (Hook::Xdp, Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE | libc::E2BIG)) => {
            format!(
                "the driver of {name} does not take XDP as it is set up (MTU, LRO, queues); set `hook: tc`"
            )
        }
        _ => return anyhow::Error::new(error).context(format!("BPF_LINK_CREATE on {name}")),
    };
    anyhow::Error::new(error).context(format!("BPF_LINK_CREATE on {name}: {hint}"))
}
