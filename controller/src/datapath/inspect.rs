//! What the kernel says of itself: which programs are loaded, what they cost, and what runs on which device.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use aya::programs::Program;

use super::attach::Hook;
use super::clsact;
use super::load::{Datapath, program_fd};
use super::sys;

/// A program of this load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    pub name: String,
    pub id: u32,
    /// Instructions the verifier walked; the measure of how close a program is to being refused.
    pub verified_instructions: Option<u32>,
    /// Runs and time in them, while statistics are on ([`Datapath::enable_stats`]). Stages run as tail calls and are
    /// counted with the program that was entered.
    pub run_count: u64,
    pub run_time: Duration,
}

/// A hook of ours and what the kernel runs there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookState {
    pub ifindex: u32,
    pub hook: Hook,
    /// `link`, or `netlink` for a filter of clsact.
    pub kind: &'static str,
    /// Program of our link, as the kernel names it (15 bytes); empty for netlink, where it is not asked, and for one of
    /// another load once CAP_SYS_ADMIN is given up.
    pub program: String,
    pub program_id: u32,
    /// The device is gone, and the link with it.
    pub dead: bool,
    /// Every program at this hook in the order they run, ours among them; other people's too.
    pub chain: Vec<u32>,
}

impl Datapath {
    /// The programs of this load, by name. While an attached link still runs an earlier load's they are not in use.
    pub fn program_info(&self) -> anyhow::Result<Vec<ProgramInfo>> {
        let mut programs = Vec::new();
        for (name, program) in self.ebpf.programs() {
            let info = match program {
                Program::Xdp(program) => program.info(),
                Program::SchedClassifier(program) => program.info(),
                Program::RawTracePoint(program) => program.info(),
                _ => continue,
            };
            let info = info.with_context(|| format!("BPF_OBJ_GET_INFO_BY_FD of program {name}"))?;
            programs.push(ProgramInfo {
                name: name.to_owned(),
                id: info.id(),
                verified_instructions: info.verified_instruction_count(),
                run_count: info.run_count(),
                run_time: info.run_time(),
            });
        }
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(programs)
    }

    /// What is attached, read from the kernel: our links and, for tcx, everything else in the same chain. To be called
    /// in the network namespace of the devices.
    pub fn hooks(&self) -> anyhow::Result<Vec<HookState>> {
        let mut hooks = Vec::new();
        let ours = self.program_names()?;
        for (ifindex, hook, pin) in self.pins.links()? {
            let Some(link) = sys::open_pin(&pin).with_context(|| format!("BPF_OBJ_GET {}", pin.display()))?
            else {
                continue;
            };
            let state =
                sys::link_info(link.as_fd()).with_context(|| format!("asking about {}", pin.display()))?;
            let dead = state.ifindex != ifindex;
            let chain = match hook {
                _ if dead => Vec::new(),
                Hook::Xdp => vec![state.program],
                Hook::Ingress | Hook::Egress => sys::tcx_programs(ifindex, hook.attach_type())
                    .with_context(|| format!("BPF_PROG_QUERY {} of device {ifindex}", hook.label()))?,
            };
            hooks.push(HookState {
                ifindex,
                hook,
                kind: "link",
                program: match ours.get(&state.program) {
                    Some(name) => name.clone(),
                    None => name_of(state.program)?,
                },
                program_id: state.program,
                dead,
                chain,
            });
        }
        for filter in clsact::filters(&self.pins.clsact_dir())? {
            hooks.push(HookState {
                ifindex: filter.ifindex,
                hook: filter.hook,
                kind: "netlink",
                program: String::new(),
                program_id: 0,
                dead: nix::net::if_::if_indextoname(filter.ifindex).is_err(),
                chain: Vec::new(),
            });
        }
        hooks.sort_by_key(|state| (state.ifindex, state.hook));
        Ok(hooks)
    }

    /// This load's programs as the kernel names them, by number.
    fn program_names(&self) -> anyhow::Result<HashMap<u32, String>> {
        let mut names = HashMap::new();
        for (name, _) in self.ebpf.programs() {
            let ours = sys::program_info(program_fd(&self.ebpf, name)?.as_fd())
                .with_context(|| format!("BPF_OBJ_GET_INFO_BY_FD of program {name}"))?;
            names.insert(ours.id, ours.name);
        }
        Ok(names)
    }

    /// Makes the kernel count runs and time of every program on the machine for as long as the descriptor is open;
    /// costs two clock readings per packet.
    pub fn enable_stats(&self) -> anyhow::Result<OwnedFd> {
        aya::sys::enable_stats(aya::sys::Stats::RunTime).context("BPF_ENABLE_STATS")
    }
}

/// What the kernel calls a program of somebody else's, or of an earlier load.
fn name_of(id: u32) -> anyhow::Result<String> {
    match sys::program_by_id(id) {
        Ok(program) => Ok(sys::program_info(program.as_fd())
            .with_context(|| format!("BPF_OBJ_GET_INFO_BY_FD of program {id}"))?
            .name),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("BPF_PROG_GET_FD_BY_ID {id}")),
    }
}
