//! The bpf(2) calls of a process, all its threads together, each let through or made to fail by whoever watches.
//!
//! By seccomp(2)'s user notification: the process is stopped in the call, and the watcher says what becomes of it. So nothing of
//! the program under test knows, and nothing in it has to.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(answer, b'!', 1, libc::seccomp_notif_resp);

/// Decides over the calls of the processes that are started with it. Clones are handles to the same.
#[derive(Debug, Clone, Default)]
pub struct Intercept(Arc<State>);

#[derive(Debug, Default)]
struct State {
    calls: AtomicU64,
    /// The call that fails, counted down.
    countdown: Mutex<Option<u64>>,
}

impl Intercept {
    /// The `n`th call from now (counting from 1) fails with EIO, once.
    pub fn fail_nth(&self, n: u64) {
        *self.countdown() = Some(n);
    }

    /// Ends the plan; whether the failure has struck.
    pub fn struck(&self) -> bool {
        self.countdown().take().is_none()
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(SeqCst)
    }

    fn countdown(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        self.0.countdown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fails(&self) -> bool {
        self.0.calls.fetch_add(1, SeqCst);
        let mut countdown = self.countdown();
        match *countdown {
            None => false,
            Some(1) => {
                *countdown = None;
                true
            }
            Some(n) => {
                *countdown = Some(n - 1);
                false
            }
        }
    }

    /// Has the command's process stop in every bpf(2), and decides over them until it ends.
    pub(super) fn watch(&self, command: &mut Command) -> anyhow::Result<()> {
        let (mut here, mut there) = UnixStream::pair()?;
        let intercept = self.clone();
        std::thread::Builder::new()
            .name("lab-intercept".to_owned())
            .spawn(move || match take_listener(&mut here) {
                Ok(listener) => {
                    if let Err(error) = decide(&listener, &intercept) {
                        panic!("deciding over bpf(2): {error}");
                    }
                }
                // It was not started; whoever wanted that knows.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(error) => panic!("the descriptor of seccomp's notifications: {error}"),
            })
            .context("starting the thread that decides")?;
        // SAFETY: between fork and exec the closure makes system calls and touches memory of its own.
        unsafe {
            command.pre_exec(move || {
                let listener = listen_for_bpf()?;
                let mut told = [0; 8];
                told[..4].copy_from_slice(&libc::getpid().to_ne_bytes());
                told[4..].copy_from_slice(&listener.as_raw_fd().to_ne_bytes());
                there.write_all(&told)?;
                // It is closed with exec(2): not before it has been taken.
                there.read_exact(&mut [0])
            })
        };
        Ok(())
    }
}

/// Takes the descriptor out of the process that is about to become the program.
fn take_listener(here: &mut UnixStream) -> io::Result<OwnedFd> {
    let mut told = [0; 8];
    here.read_exact(&mut told)?;
    let word = |at: usize| i32::from_ne_bytes([told[at], told[at + 1], told[at + 2], told[at + 3]]);
    let made = |fd: libc::c_long| {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for us and nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    };
    // SAFETY: plain arguments.
    let process = made(unsafe { libc::syscall(libc::SYS_pidfd_open, word(0), 0) })?;
    // SAFETY: plain arguments; the descriptor is open for the whole call.
    let listener = made(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), word(4), 0) })?;
    here.write_all(b"!")?;
    Ok(listener)
}

/// Tells of every bpf(2) of this process and its children from now on.
fn listen_for_bpf() -> io::Result<OwnedFd> {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, equal, end) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    // struct seccomp_data begins with the call's number; the lab's programs have one architecture.
    let mut filter = [
        step(load, 0, 0, 0),
        step(equal, 0, 1, libc::SYS_bpf as u32),
        step(end, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(end, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call is over.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor (close-on-exec) and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn decide(listener: &OwnedFd, intercept: &Intercept) -> io::Result<()> {
    loop {
        let mut wanted = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wanted, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => _ = other?,
        }
        let events = wanted[0].revents().unwrap_or(PollFlags::empty());
        if !events.contains(PollFlags::POLLIN) {
            // The last process under the filter has ended.
            return Ok(());
        }
        // SAFETY: plain integers; the kernel wants it zeroed.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is a listener and the structure the one the command fills.
        match unsafe { receive(listener.as_raw_fd(), &raw mut call) } {
            // Killed in the call.
            Err(Errno::ENOENT | Errno::EINTR) => continue,
            other => _ = other?,
        }
        let fails = intercept.fails();
        let mut verdict = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: if fails { -libc::EIO } else { 0 },
            flags: if fails { 0 } else { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 },
        };
        // SAFETY: as above.
        match unsafe { answer(listener.as_raw_fd(), &raw mut verdict) } {
            Err(Errno::ENOENT) => {}
            other => _ = other?,
        }
    }
}
