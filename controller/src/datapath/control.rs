//! The control word of the datapath, shared with the kernel through memory: generation, hash seeds, settings.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use portcullis_common::layout::{Control, Settings};

use super::table::Table;

/// A map of the kernel in our memory (`BPF_F_MMAPABLE`), read and written by both.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to no thread; whoever dereferences it says how it shares with the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a whole array.
    pub fn new(table: &Table) -> anyhow::Result<Self> {
        // Elements of an mmapable array stand at multiples of 8 bytes, the whole is rounded up to pages.
        let stride = (table.shape.value as usize).next_multiple_of(8);
        let length = stride * table.shape.max_entries as usize;
        Self::of(length, libc::MAP_SHARED, table.as_fd().as_raw_fd())
            .with_context(|| format!("mmap of {} ({length} bytes)", table.name))
    }

    /// Memory of nobody's, all zero, in the place of an array's.
    pub fn detached(length: usize) -> anyhow::Result<Self> {
        Self::of(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
            .with_context(|| format!("mmap of {length} bytes"))
    }

    fn of(length: usize, flags: i32, fd: RawFd) -> anyhow::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let start = NonNull::new(start.cast()).context("mmap gave the null page")?;
        Ok(Self { start, length })
    }

    /// The first byte; page-aligned, valid for the mapping's life.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length, and nothing borrowed from it outlives the value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The one element of CONTROL.
#[derive(Debug)]
pub(super) struct ControlWord(Mapping);

impl ControlWord {
    pub fn new(table: &Table) -> anyhow::Result<Self> {
        table.check::<u32, Control>(1);
        Ok(Self(Mapping::new(table)?))
    }

    fn at(&self) -> *mut Control {
        self.0.as_ptr().cast()
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: aligned, valid for the mapping's life, and only accessed atomically by either side.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.at()).generation) }
    }

    /// The generation in force; 0 before the first.
    pub fn generation(&self) -> u32 {
        self.word().load(Ordering::Acquire)
    }

    /// Puts a generation in force. Everything written before is seen by whoever reads the new number.
    pub fn flip(&self, generation: u32) {
        self.word().store(generation, Ordering::SeqCst);
    }

    /// A copy of the whole.
    pub fn read(&self) -> Control {
        // SAFETY: valid for the mapping's life; only this room writes it, apart from nobody.
        unsafe { self.at().read_volatile() }
    }

    /// Sets the settings of one parity, which must not be the one in force.
    pub fn write_settings(&self, parity: usize, settings: &Settings) {
        let current = self.generation();
        assert!(current == 0 || parity as u32 != current & 1, "settings in force are not rewritten");
        // SAFETY: in bounds (parity is 0 or 1, or the index panics), and no program reads the idle parity.
        unsafe { (&raw mut (*self.at()).settings[parity]).write_volatile(*settings) };
    }

    /// Says what was before these tables: [`Control::start`].
    pub fn set_start(&self, start: u32) {
        // SAFETY: aligned, valid for the mapping's life, and only accessed as a whole word by either side.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.at()).start) }.store(start, Ordering::SeqCst);
    }

    /// Prepares the control word for flow tables of this many buckets, drawing the secrets of their hash unless there
    /// are some: without the old ones the flows in the tables could not be found again.
    pub fn adopt(&self, buckets: u32, buckets6: u32) -> anyhow::Result<()> {
        if self.read().seed == [0, 0] {
            let mut seed = [0u64; 2];
            let length = size_of_val(&seed);
            // SAFETY: `seed` has `length` writable bytes.
            let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), length, 0) };
            if got != length as isize {
                return Err(io::Error::last_os_error()).context("getrandom for the flow table's hash");
            }
            // SAFETY: in bounds; no program of ours is attached before the secrets are drawn.
            unsafe { (&raw mut (*self.at()).seed).write_volatile(seed) };
        }
        // SAFETY: in bounds; on adoption the same numbers are written again.
        unsafe {
            (&raw mut (*self.at()).bucket_mask).write_volatile(buckets - 1);
            (&raw mut (*self.at()).bucket_mask6).write_volatile(buckets6 - 1);
        }
        Ok(())
    }
}
