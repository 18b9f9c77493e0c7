//! Compare-and-exchange and exchange on shared table words, in the kernel and on the host.
//!
//! `core::sync::atomic` has neither on the bpf target (`atomic_cas: false`), hence the two instructions of cpu v3 by
//! hand. Both are sequentially consistent: the kernel's `BPF_CMPXCHG` and `BPF_XCHG` are full barriers on every JIT.

/// Replaces `*word` with `new` if it is `old`; returns what it was before.
///
/// # Safety
/// `word` points to an aligned `u64` that lives as long as the call and is only ever written atomically.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let seen: u64;
        // SAFETY: the caller vouches for `word`; cmpxchg_64 compares with and returns in r0.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64({word} + 0, r0, {new})",
                word = in(reg) word, new = in(reg) new, inlateout("r0") old => seen, options(nostack)
            );
        }
        seen
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        step();
        // SAFETY: the caller vouches for `word`.
        let atomic = unsafe { AtomicU64::from_ptr(word) };
        match atomic.compare_exchange(old, new, SeqCst, SeqCst) {
            Ok(seen) | Err(seen) => seen,
        }
    }
}

/// Stores `new` in `*word` and returns what it was before; a full barrier.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn exchange(word: *mut u64, new: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = new;
        // SAFETY: the caller vouches for `word`.
        unsafe {
            core::arch::asm!(
                "{value} = xchg_64({word} + 0, {value})",
                word = in(reg) word, value = inout(reg) value, options(nostack)
            );
        }
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        step();
        // SAFETY: the caller vouches for `word`.
        unsafe { AtomicU64::from_ptr(word) }.swap(new, SeqCst)
    }
}

/// Adds `value` to `*word`, wrapping, and returns what it was before.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn add(word: *mut u64, value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // SAFETY: the caller vouches for `word`; a fetching add is a full barrier, as the two above.
        unsafe {
            core::arch::asm!(
                "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
                word = in(reg) word, value = inout(reg) value, options(nostack)
            );
        }
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        step();
        // SAFETY: the caller vouches for `word`.
        unsafe { AtomicU64::from_ptr(word) }.fetch_add(value, SeqCst)
    }
}

/// Reads `*word` once.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn load(word: *const u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: the caller vouches for `word`; an aligned 64-bit load is one instruction.
        unsafe { core::ptr::read_volatile(word) }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        step();
        // SAFETY: the caller vouches for `word`.
        unsafe { AtomicU64::from_ptr(word.cast_mut()) }.load(SeqCst)
    }
}

/// Stands before every access to a shared record: here another processor may come between. Nothing but in this crate's own
/// tests, which let it happen in every order they can (`flow_interleavings`).
#[inline(always)]
pub(crate) fn step() {
    #[cfg(test)]
    crate::flow_interleavings::step();
}
