//! How many instructions the kernel executes for this thread, where the processor counts them.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// `PERF_TYPE_HARDWARE`, `PERF_COUNT_HW_INSTRUCTIONS` and the size of the first version of `perf_event_attr`
/// (linux/perf_event.h).
const HARDWARE: u32 = 0;
const INSTRUCTIONS: u64 = 1;
const SIZE: u32 = 64;
/// Only the kernel's: bit 4 of the attribute's flags.
const EXCLUDE_USER: u64 = 1 << 4;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;

/// `struct perf_event_attr` as it was first.
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample: [u64; 3],
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attributes>() == SIZE as usize);

/// A counter of the thread that opened it.
pub(super) struct Instructions(OwnedFd);

impl Instructions {
    /// Begins to count.
    ///
    /// # Errors
    ///
    /// Many virtual machines have no such counter: ENOENT or EOPNOTSUPP.
    pub fn count() -> io::Result<Self> {
        let attributes = Attributes {
            kind: HARDWARE,
            size: SIZE,
            config: INSTRUCTIONS,
            sample: [0; 3],
            flags: EXCLUDE_USER,
            wakeup: 0,
            breakpoint: 0,
            config1: 0,
        };
        // SAFETY: the attributes live for the call and have the size they say; this thread, any processor, no group.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, CLOSE_ON_EXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Counted so far.
    pub fn so_far(&self) -> io::Result<u64> {
        let mut value = [0u8; 8];
        // SAFETY: as many bytes as there is room for.
        let read = unsafe { libc::read(self.0.as_raw_fd(), value.as_mut_ptr().cast(), value.len()) };
        if read != 8 {
            return Err(io::Error::last_os_error());
        }
        Ok(u64::from_ne_bytes(value))
    }
}
