//! What the daemon may do: four capabilities, from before its first packet to its end.
//!
//! Capabilities belong to a thread, and a thread gets those of the one that starts it. So they are given up before any other
//! thread is there, and what a start needs beyond the four is done by one helper that has kept them, and is gone once
//! the policy is in force:
//!
//! ```text
//! mount of the bpf filesystem, if nobody has        CAP_SYS_ADMIN
//! programs and tables of an earlier daemon, by id   CAP_SYS_ADMIN (kernel/bpf/syscall.c, bpf_map_get_fd_by_id)
//! a network namespace for health probes             CAP_SYS_ADMIN (unshare(2))
//! giving up the bounding set                        CAP_SETPCAP
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, ensure};
use caps::{CapSet, Capability, CapsHashSet};

/// What the daemon keeps: programs and tables; devices, hooks, netlink; programs at tracepoints; raw packets.
pub const KEPT: [Capability; 4] =
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON, Capability::CAP_NET_RAW];

/// What a start needs beside them; the unit in `packaging/` has to grant both lists.
pub const FOR_A_START: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP];

type Work = Box<dyn FnOnce() + Send>;

/// To the helper, while there is one.
static HELPER: Mutex<Option<Sender<Work>>> = Mutex::new(None);

/// The thread that has kept all capabilities. Dropped, it ends, and nobody in this process has more than [`KEPT`].
#[derive(Debug)]
pub struct Helper(Option<JoinHandle<()>>);

impl Drop for Helper {
    fn drop(&mut self) {
        drop(helper().take());
        if let Some(thread) = self.0.take() {
            // What it was asked to do has told whoever asked.
            let _ = thread.join();
        }
    }
}

fn helper() -> MutexGuard<'static, Option<Sender<Work>>> {
    HELPER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives up all capabilities but [`KEPT`] for the calling thread and those it will start, and every way to get them back.
///
/// # Errors
/// If the process lacks one of [`KEPT`], or the kernel (before 5.8) does not know one. It goes on with what it has if the
/// *bounding set* cannot be changed, for want of CAP_SETPCAP: nothing this process does can add to it.
pub fn give_up() -> anyhow::Result<Helper> {
    let has = caps::read(None, CapSet::Permitted).context("reading this process' capabilities")?;
    for needed in KEPT {
        ensure!(
            has.contains(&needed),
            "{needed} is missing: the gateway needs it to load programs and change devices; run it as root, in a \
             container with --cap-add, under systemd with CapabilityBoundingSet"
        );
    }
    // Before the helper starts, so that it holds for it too: no set-user-id program gives anything back (prctl(2)).
    // SAFETY: plain arguments.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    ensure!(set == 0, "PR_SET_NO_NEW_PRIVS: {}", std::io::Error::last_os_error());
    let (orders, work) = channel::<Work>();
    let thread = std::thread::Builder::new()
        .name("privileged".to_owned())
        .spawn(move || work.into_iter().for_each(|work| work()))
        .context("starting the thread that keeps its privileges for the start")?;
    *helper() = Some(orders);
    let helper = Helper(Some(thread));
    give_up_here().context("giving up capabilities")?;
    Ok(helper)
}

/// Gives them up for the calling thread alone, as [`give_up`] does; for threads that the helper has started.
///
/// # Errors
/// If the kernel refuses.
pub fn give_up_here() -> anyhow::Result<()> {
    let has = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|kept| has.contains(kept)).collect();
    if has.contains(&Capability::CAP_SETPCAP) {
        // While this thread may: it takes CAP_SETPCAP, and with the bounding set goes what exec(2) would give to root.
        for capability in caps::read(None, CapSet::Bounding)? {
            if !KEPT.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}

/// Does something with all capabilities while the start lasts; afterwards, and in a process that has given nothing up,
/// with those of the calling thread.
pub fn privileged<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let Some(orders) = helper().clone() else { return work() };
    let (answer, answered) = channel();
    let job = move || {
        // Who waits is to hear of a panic, and the helper to live on.
        let _ = answer.send(catch_unwind(AssertUnwindSafe(work)));
    };
    if let Err(unsent) = orders.send(Box::new(job)) {
        // It ended a moment ago.
        unsent.0();
    }
    match answered.recv() {
        Ok(Ok(done)) => done,
        Ok(Err(panic)) => resume_unwind(panic),
        Err(_) => unreachable!("every job answers before it ends"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own: what it gives up, the test's other threads keep.
    #[test]
    fn what_is_given_up_is_gone_from_every_set_and_the_helper_has_it_until_it_ends() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let sets = || {
            [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient, CapSet::Bounding]
                .map(|set| caps::read(None, set).unwrap())
        };
        let kept = CapsHashSet::from(KEPT);
        let none = CapsHashSet::new();
        let only = [kept.clone(), kept.clone(), none.clone(), none, kept];
        std::thread::spawn(move || {
            let before = sets();
            assert!(before[0].contains(&Capability::CAP_SYS_ADMIN), "the test has it to begin with");
            let helper = give_up().unwrap();
            assert_eq!(sets(), only);
            std::thread::spawn({
                let only = only.clone();
                move || assert_eq!(sets(), only, "threads started from now on")
            })
            .join()
            .unwrap();
            assert_eq!(privileged(sets), before, "the helper");
            let panicked = catch_unwind(|| privileged(|| panic!("expected")));
            assert!(panicked.is_err());
            assert_eq!(privileged(sets), before, "it outlives what it is asked");
            drop(helper);
            assert_eq!(privileged(sets), only, "done here, with what is left");
            // SAFETY: plain arguments.
            assert_eq!(unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) }, 1);
        })
        .join()
        .unwrap();
    }
}
