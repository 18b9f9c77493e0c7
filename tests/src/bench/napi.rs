//! Who does the work on which processor: the gateway's NAPI as a thread on the last, the generator on the first.

use std::fs;
use std::io;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::lab::{Namespace, eventually_some};

/// The kernel thread that polls a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct NapiThread(Pid);

impl NapiThread {
    /// Makes the device's NAPI a thread and finds it. The device's name must be the only one on the machine: threads
    /// are told apart by it.
    pub fn start(gateway: &Namespace, device: &str) -> anyhow::Result<Self> {
        // Sysfs shows the devices of the namespace it was mounted in; `ip netns exec` mounts one for its child.
        let line = format!("echo 1 > /sys/class/net/{device}/threaded");
        let output = Command::new("ip")
            .args(["netns", "exec", gateway.name(), "sh", "-c", &line])
            .output()
            .context("ip netns exec")?;
        ensure!(
            output.status.success(),
            "making the NAPI of {device} a thread: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let prefix = format!("napi/{device}-");
        let found = eventually_some(Duration::from_secs(2), || find_thread(&prefix));
        Ok(Self(found.with_context(|| format!("there is no thread {prefix}*"))?))
    }

    /// On this processor only, before everybody else there.
    pub fn pin(self, processor: usize) -> anyhow::Result<()> {
        pin(self.0, processor)?;
        prefer(self.0)
    }

    /// The same before everybody else on the machine, as [`pin_this_thread`].
    pub fn pin_first(self, processor: usize) -> anyhow::Result<()> {
        pin(self.0, processor)?;
        first_in_first_out(self.0)
    }

    /// Time it has been running, by the scheduler.
    pub fn run_time(self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/schedstat", self.0);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let nanoseconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
        Ok(Duration::from_nanos(nanoseconds.with_context(|| format!("{path}: {text}"))?))
    }
}

fn find_thread(prefix: &str) -> Option<Pid> {
    let processes = fs::read_dir("/proc").ok()?;
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter(|number| {
            fs::read_to_string(format!("/proc/{number}/comm")).is_ok_and(|comm| comm.starts_with(prefix))
        })
        .map(Pid::from_raw)
        .next()
}

/// The processors of this machine that the bench uses: the generator's and the gateway's. With only one they are the
/// same.
pub(super) fn processors() -> (usize, usize) {
    let online = std::thread::available_parallelism().map_or(1, usize::from);
    (0, online - 1)
}

/// The calling thread, and those it starts, on this processor only.
pub(super) fn keep_this_thread(processor: usize) -> anyhow::Result<()> {
    pin(Pid::from_raw(0), processor)
}

/// The calling thread on this processor only, before everybody else there. By a real-time class: with autogroups a
/// nice value only counts among the threads of one terminal.
pub(super) fn pin_this_thread(processor: usize) -> anyhow::Result<()> {
    pin(Pid::from_raw(0), processor)?;
    first_in_first_out(Pid::from_raw(0))
}

fn first_in_first_out(thread: Pid) -> anyhow::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters live for the call; 0 is the calling thread.
    let result =
        unsafe { libc::sched_setscheduler(thread.as_raw(), libc::SCHED_FIFO, &raw const parameters) };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("sched_setscheduler of thread {thread}"));
    }
    Ok(())
}

fn pin(thread: Pid, processor: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor).with_context(|| format!("processor {processor}"))?;
    sched_setaffinity(thread, &set)
        .with_context(|| format!("pinning thread {thread} to processor {processor}"))
}

/// The best nice value, so that the machine's other work slows the bench as little as can be.
fn prefer(thread: Pid) -> anyhow::Result<()> {
    // SAFETY: plain arguments; a thread's id is as good as a process's here.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.as_raw() as libc::id_t, -20) };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("setpriority of thread {thread}"));
    }
    Ok(())
}
