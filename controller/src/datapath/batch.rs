//! Many elements in one call: BPF_MAP_UPDATE_BATCH and BPF_MAP_LOOKUP_BATCH (Linux 5.6; LPM tries 5.13), which aya
//! 0.14 lacks. Half a million elements of 32 bytes took 186 ms instead of 376 in, 131 instead of 726 out.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::Context as _;
use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd};

use super::sys;
use super::table::{Table, possible_cpus, split_cpus};

/// Elements asked for at once. It must hold the fullest bucket of a hash, which it does by far.
const CHUNK: usize = 4096;
/// Elements of a per-CPU map at once: there, one is many.
const CPU_CHUNK: usize = 512;

impl Table {
    /// Sets `keys[i]` to `values[i]`, replacing what was there.
    ///
    /// # Errors
    /// The kernel stops at the first element it refuses (E2BIG: the map is full); the ones before it are in.
    pub fn update_batch<K: Pod, V: Pod>(&self, keys: &[K], values: &[V]) -> anyhow::Result<()> {
        self.check::<K, V>(1);
        assert!(!self.is_per_cpu(), "{} is per CPU", self.name);
        assert_eq!(keys.len(), values.len(), "keys and values of {}", self.name);
        // SAFETY: sizes and counts checked.
        unsafe { self.update_raw(keys.as_ptr().cast(), values.as_ptr().cast(), keys.len()) }
    }

    /// Every element of the map.
    pub fn entries<K: Pod, V: Pod>(&self) -> anyhow::Result<Vec<(K, V)>> {
        self.check::<K, V>(1);
        assert!(!self.is_per_cpu(), "{} is per CPU", self.name);
        let mut values = vec![MaybeUninit::<V>::uninit(); CHUNK];
        let at = values.as_mut_ptr();
        // SAFETY: sizes checked; `values` holds CHUNK values, and the kernel has written the ones asked for.
        unsafe { self.stream(CHUNK, at.cast(), |i| at.add(i).read().assume_init()) }
    }

    /// Every element of a per-CPU map, with the values of all possible CPUs.
    pub fn entries_per_cpu<K: Pod, V: Pod>(&self) -> anyhow::Result<Vec<(K, Vec<V>)>> {
        self.check::<K, V>(1);
        assert!(self.is_per_cpu(), "{} is not per CPU", self.name);
        let words = self.words_per_element()?;
        let mut values = vec![0u64; words * CPU_CHUNK];
        let at = values.as_mut_ptr();
        // SAFETY: sizes checked; `values` holds CPU_CHUNK elements of `words` words, all initialised.
        unsafe {
            self.stream(CPU_CHUNK, at.cast(), |i| {
                split_cpus(std::slice::from_raw_parts(at.add(i * words), words))
            })
        }
    }

    /// Reads the map chunk by chunk; `value` makes the i-th value of what lies in the buffer at `values`.
    ///
    /// # Safety
    /// `K` has the size of the map's keys; `values` has room for `chunk` of its values and stays valid.
    unsafe fn stream<K: Pod, T>(
        &self,
        chunk: usize,
        values: *mut u8,
        value: impl Fn(usize) -> T,
    ) -> anyhow::Result<Vec<(K, T)>> {
        let mut keys = vec![MaybeUninit::<K>::uninit(); chunk];
        let mut all = Vec::new();
        // Opaque to us: a key (LPM: of at most 260 bytes) or a bucket's number.
        let mut cursor = [0u64; 64];
        let mut first = true;
        loop {
            let mut attr = self.batch(chunk);
            // SAFETY: batch commands use this member of the union.
            let batch = unsafe { &mut attr.batch };
            batch.in_batch = if first { 0 } else { cursor.as_ptr() as u64 };
            batch.out_batch = cursor.as_mut_ptr() as u64;
            batch.keys = keys.as_mut_ptr() as u64;
            batch.values = values as u64;
            let last = match sys::bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
                Ok(_) => false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                Err(error) => return Err(error).with_context(|| self.what("BPF_MAP_LOOKUP_BATCH")),
            };
            // SAFETY: the kernel leaves the number of elements it wrote in this member.
            let count = unsafe { attr.batch.count } as usize;
            // SAFETY: the kernel wrote that many keys.
            all.extend((0..count).map(|i| (unsafe { keys[i].assume_init() }, value(i))));
            first = false;
            if last {
                return Ok(all);
            }
        }
    }

    fn batch(&self, count: usize) -> bpf_attr {
        let mut attr = sys::zeroed();
        // SAFETY: batch commands use this member of the union.
        let batch = unsafe { &mut attr.batch };
        batch.map_fd = self.as_fd().as_raw_fd() as u32;
        batch.count = count as u32;
        attr
    }

    /// # Safety
    /// `keys` and `values` point to `count` of the map's keys and values.
    unsafe fn update_raw(&self, keys: *const u8, values: *const u8, count: usize) -> anyhow::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let mut attr = self.batch(count);
        attr.batch.keys = keys as u64;
        attr.batch.values = values as u64;
        sys::bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr).map(drop).with_context(|| {
            // SAFETY: the kernel leaves the number it managed in this member.
            let done = unsafe { attr.batch.count };
            format!("{} ({done} of {count} elements done)", self.what("BPF_MAP_UPDATE_BATCH"))
        })
    }

    /// Eight-byte words of one element's values on all CPUs.
    fn words_per_element(&self) -> anyhow::Result<usize> {
        Ok((self.shape.value as usize).div_ceil(8) * possible_cpus()?)
    }
}
