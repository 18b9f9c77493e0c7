//! Processes of the lab: run with a time limit, kept with a guard, killed by pidfd so that a recycled id is
//! safe.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

/// What a finished command said.
#[derive(Debug)]
pub(super) struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `command` to its end and collects what it said; kills it and fails when `limit` passes.
///
/// Output goes to memory files rather than pipes: neither a full pipe nor a grandchild that keeps one open
/// can hang the test.
pub(super) fn run_limited(command: &mut Command, limit: Duration) -> anyhow::Result<Finished> {
    let what = describe(command);
    let (mut stdout, mut stderr) = (memory_file()?, memory_file()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()
        .with_context(|| format!("starting `{what}` (is {} installed?)", command.get_program().display()))?;
    let status = wait_limited(&mut child, limit)?;
    if status.is_none() {
        // Ours and not reaped yet, so the id is still its own.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (stdout, stderr) = (contents(&mut stdout)?, contents(&mut stderr)?);
    let Some(status) = status else {
        bail!("`{what}` did not end within {limit:?}\nstdout: {stdout}\nstderr: {stderr}");
    };
    Ok(Finished { status, stdout, stderr })
}

/// The command line, for messages.
pub(super) fn describe(command: &Command) -> String {
    let mut line = command.get_program().display().to_string();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.display().to_string());
    }
    line
}

/// Waits for `child` to end; `None` if it still runs after `limit`.
fn wait_limited(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    let pidfd = open_pidfd(child.id())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a poll that returns a moment early would spin.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return child.try_wait(),
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return child.try_wait(),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn memory_file() -> anyhow::Result<File> {
    Ok(File::from(memfd_create(c"lab-output", MFdFlags::MFD_CLOEXEC).context("memfd_create")?))
}

fn contents(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A file descriptor that means this process and no later one with the same id.
fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor (close-on-exec) and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Kills every process whose network namespace is the one at `namespace` (this process excepted) and waits a
/// moment for them to be gone.
///
/// The namespace is one the lab made, so whatever is in it was started by the lab. A process id may be
/// recycled between the look and the signal: the descriptor is opened first and the look repeated through it.
pub(super) fn kill_inside(namespace: &Path) {
    let Ok(wanted) = std::fs::metadata(namespace).map(|m| (m.dev(), m.ino())) else { return };
    let is_inside = |pid: u32| {
        std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| (m.dev(), m.ino()) == wanted)
    };
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let mut killed = Vec::new();
    for pid in processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() || !is_inside(pid) {
            continue;
        }
        if let Ok(pidfd) = open_pidfd(pid)
            && is_inside(pid)
            && send_signal(&pidfd, Signal::SIGKILL).is_ok()
        {
            killed.push(pidfd);
        }
    }
    for pidfd in killed {
        // Readable once it has ended, reaped or not. SIGKILL takes no second; the limit is for one stuck in
        // the kernel.
        let _ = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], 1000u16);
    }
}

fn send_signal(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: pidfd_send_signal reads no memory when its info pointer is null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A running process of the lab; killed and reaped when dropped.
#[derive(Debug)]
pub struct ProcessGuard {
    child: Child,
    what: String,
}

impl ProcessGuard {
    pub(super) fn spawn(command: &mut Command) -> anyhow::Result<Self> {
        let what = describe(command);
        let child = command.spawn().with_context(|| {
            format!("starting `{what}` (is {} installed?)", command.get_program().display())
        })?;
        Ok(ProcessGuard { child, what })
    }

    /// Its process id. It stays this process's own until the guard has seen it end.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for it to end.
    ///
    /// # Errors
    /// If it still runs after `limit`; it is left running.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        wait_limited(&mut self.child, limit)?
            .with_context(|| format!("`{}` did not end within {limit:?}", self.what))
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        send_signal(&open_pidfd(self.child.id())?, signal)
    }

    /// Kills it (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        self.kill();
    }
}
