//! One map of ours: a descriptor with the shape that was checked when it was opened.
//!
//! aya's typed maps hide the descriptor that batches need and cannot be had for a map that is only pinned, so this
//! room reads and writes by its own hand. Sizes are asserted on every call: the kernel copies as many bytes as *its*
//! map says, whatever the type on this side.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::Context as _;
use aya::Pod;
use aya_obj::generated::{bpf_cmd, bpf_map_type};

use super::sys::{self, Shape};

/// An open map.
#[derive(Debug)]
pub(super) struct Table {
    pub name: String,
    pub shape: Shape,
    fd: OwnedFd,
}

impl AsFd for Table {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Table {
    /// Takes a descriptor and asks the kernel for its shape.
    pub fn from_fd(name: &str, fd: OwnedFd) -> anyhow::Result<Self> {
        let (_, shape) =
            sys::map_info(fd.as_fd()).with_context(|| format!("BPF_OBJ_GET_INFO_BY_FD of {name}"))?;
        Ok(Self { name: name.to_owned(), shape, fd })
    }

    /// Makes a map of this shape, unpinned: it lives until the table and everything in the kernel that uses it go.
    pub fn create(name: &str, shape: &Shape) -> anyhow::Result<Self> {
        let fd =
            sys::map_create(name, shape).with_context(|| format!("BPF_MAP_CREATE of {name} ({shape:?})"))?;
        Ok(Self { name: name.to_owned(), shape: *shape, fd })
    }

    /// The value of `key`; `None` if it is not there.
    pub fn lookup<K: Pod, V: Pod>(&self, key: &K) -> anyhow::Result<Option<V>> {
        self.check::<K, V>(1);
        let mut value = MaybeUninit::<V>::uninit();
        // SAFETY: sizes checked against the kernel's shape above.
        let answer = unsafe { self.element(bpf_cmd::BPF_MAP_LOOKUP_ELEM, key, value.as_mut_ptr().cast(), 0) };
        // SAFETY: on success the kernel wrote all of it, and any bits are a valid `V: Pod`.
        self.or_absent(answer.map(|()| unsafe { value.assume_init() }), "BPF_MAP_LOOKUP_ELEM")
    }

    /// The values of `key`, one for each possible CPU.
    pub fn lookup_per_cpu<K: Pod, V: Pod>(&self, key: &K) -> anyhow::Result<Option<Vec<V>>> {
        self.check::<K, V>(1);
        assert!(self.is_per_cpu(), "{} is not per CPU", self.name);
        let mut values = vec![0u64; possible_cpus()? * mem::size_of::<V>().div_ceil(8)];
        // SAFETY: the key's size is checked; the kernel writes the value, rounded up to 8 bytes, for each possible CPU.
        let answer =
            unsafe { self.element(bpf_cmd::BPF_MAP_LOOKUP_ELEM, key, values.as_mut_ptr().cast(), 0) };
        self.or_absent(answer.map(|()| split_cpus(&values)), "BPF_MAP_LOOKUP_ELEM")
    }

    /// Sets `key` to `value`.
    pub fn update<K: Pod, V: Pod>(&self, key: &K, value: &V, flags: u64) -> anyhow::Result<()> {
        self.check::<K, V>(1);
        assert!(!self.is_per_cpu(), "{} is per CPU", self.name);
        // SAFETY: sizes checked against the kernel's shape above; the kernel only reads the value.
        unsafe {
            self.element(bpf_cmd::BPF_MAP_UPDATE_ELEM, key, (&raw const *value).cast_mut().cast(), flags)
        }
        .with_context(|| self.what("BPF_MAP_UPDATE_ELEM"))
    }

    /// Removes `key`; whether it was there.
    pub fn delete<K: Pod>(&self, key: &K) -> anyhow::Result<bool> {
        assert_eq!(mem::size_of::<K>() as u32, self.shape.key, "key of {}", self.name);
        // SAFETY: the key's size is checked; the command has no value.
        let answer = unsafe { self.element(bpf_cmd::BPF_MAP_DELETE_ELEM, key, std::ptr::null_mut(), 0) };
        Ok(self.or_absent(answer, "BPF_MAP_DELETE_ELEM")?.is_some())
    }

    /// # Safety
    /// As [`sys::element`]: `value` has the size the command expects of this map.
    unsafe fn element<K: Pod>(&self, cmd: bpf_cmd, key: &K, value: *mut u8, flags: u64) -> io::Result<()> {
        // SAFETY: the key is `K`'s bytes and its size was checked by the caller, who vouches for the value.
        unsafe { sys::element(cmd, self.as_fd(), (&raw const *key).cast(), value, flags) }
    }

    fn or_absent<T>(&self, answer: io::Result<T>, call: &str) -> anyhow::Result<Option<T>> {
        match answer {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error).with_context(|| self.what(call)),
        }
    }

    /// Every possible CPU has its own value.
    pub fn is_per_cpu(&self) -> bool {
        [
            bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY,
            bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH,
            bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH,
        ]
        .iter()
        .any(|&kind| kind as u32 == self.shape.kind)
    }

    /// Panics unless keys and `cpus` values of these types are what the kernel will copy.
    pub fn check<K, V>(&self, cpus: usize) {
        assert_eq!(mem::size_of::<K>() as u32, self.shape.key, "key of {}", self.name);
        assert_eq!(mem::size_of::<V>(), self.shape.value as usize * cpus, "value of {}", self.name);
    }

    /// `call MAP`, for error messages.
    pub fn what(&self, call: &str) -> String {
        format!("{call} {}", self.name)
    }
}

/// One CPU's value after another, each rounded up to 8 bytes: as the kernel hands them out.
pub(super) fn split_cpus<V: Pod>(words: &[u64]) -> Vec<V> {
    // SAFETY: each chunk holds at least the bytes of a `V`, any bits are valid for a Pod, and the read is unaligned.
    words
        .chunks_exact(mem::size_of::<V>().div_ceil(8))
        .map(|chunk| unsafe { chunk.as_ptr().cast::<V>().read_unaligned() })
        .collect()
}

/// The number of CPUs this machine may ever have; what per-CPU maps are sized by.
pub(super) fn possible_cpus() -> anyhow::Result<usize> {
    aya::util::nr_cpus().map_err(|(path, error)| anyhow::Error::new(error).context(format!("reading {path}")))
}
