//! The generator's thread: one system call that sends until a signal ends it.
//!
//! One, because every call tears its page pool down and waits for the kernel's readers meanwhile: with many short
//! calls the gateway is idle half of the time and the bench measures that.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::napi;
use super::programs::{Programs, Sending};
use crate::lab::Namespace;
use crate::stop;

/// Ends the call; the handler does nothing.
const END: Signal = Signal::SIGUSR1;
/// More than anybody waits for.
const FRAMES: u32 = 1 << 31;

extern "C" fn nothing(_: libc::c_int) {}

/// Runs `work` while the generator sends from `client`.
pub(super) fn while_sending<T: Send>(
    programs: &Programs,
    client: &Namespace,
    sending: Sending,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(END, &action) }.context("handling SIGUSR1")?;
    let enough = AtomicBool::new(false);
    let thread_id = AtomicI32::new(0);
    thread::scope(|scope| {
        let sender = scope.spawn(|| client.enter(|| send(programs, sending, &enough, &thread_id)));
        // Caught, or a panic would wait for a sender that nobody ends.
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let ended_early = sender.is_finished();
        enough.store(true, Ordering::SeqCst);
        while !sender.is_finished() {
            // Again and again: the first may come before the system call has begun.
            let to = thread_id.load(Ordering::SeqCst);
            if to != 0 {
                // SAFETY: plain arguments; the thread is ours and not joined yet, so its id is its own.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), to, END as i32) };
            }
            thread::sleep(Duration::from_millis(1));
        }
        let sent = sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let worked = worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        stop::check()?;
        sent?;
        ensure!(!ended_early, "the generator ended before it was told to");
        worked
    })
}

fn send(
    programs: &Programs,
    sending: Sending,
    enough: &AtomicBool,
    thread_id: &AtomicI32,
) -> anyhow::Result<()> {
    match sending {
        Sending::Flows => napi::pin_this_thread(napi::processors().0)?,
        // The controller works on the same processor.
        Sending::Hero => napi::keep_this_thread(napi::processors().0)?,
    }
    // SAFETY: no arguments.
    thread_id.store(unsafe { libc::gettid() }, Ordering::SeqCst);
    while !enough.load(Ordering::SeqCst) && !stop::asked() {
        let sent = programs.generate(sending, FRAMES);
        if !enough.load(Ordering::SeqCst) && !stop::asked() {
            sent?;
        }
    }
    Ok(())
}
