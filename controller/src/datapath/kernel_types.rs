//! Where the running kernel keeps a member of one of its structs, from its BTF (Documentation/bpf/btf.rst).
//!
//! Only as much as the tracepoint programs need: aya relocates no Rust program (aya.md A1), so the few offsets they
//! use are looked up here and given to them as constants.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, ensure};

/// What the loss counters must know to count for this network namespace alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Namespace {
    /// Inode number of the calling thread's network namespace.
    pub inode: u32,
    /// Offset of `nd_net` in `struct net_device`.
    pub device_net: u32,
    /// Offset of `ns.inum` in `struct net`.
    pub net_inode: u32,
}

impl Namespace {
    /// Of the calling thread.
    pub fn here() -> anyhow::Result<Self> {
        let inode =
            fs::metadata("/proc/thread-self/ns/net").context("asking for this network namespace")?.ino();
        let types = fs::read("/sys/kernel/btf/vmlinux").context("reading the kernel's BTF")?;
        let types = Types::new(&types)?;
        let of = |structure, member| {
            types
                .offset(structure, member)
                .with_context(|| format!("the kernel's BTF has no {structure}.{member}"))
        };
        Ok(Self {
            inode: u32::try_from(inode).context("the namespace's inode number")?,
            device_net: of("net_device", "nd_net")?,
            net_inode: of("net", "ns")? + of("ns_common", "inum")?,
        })
    }
}

/// The type section and the strings of a BTF blob in native byte order.
struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;

impl<'a> Types<'a> {
    fn new(blob: &'a [u8]) -> anyhow::Result<Self> {
        ensure!(
            word(blob, 0).map(|w| w as u16) == Some(MAGIC),
            "the kernel's BTF does not begin with its magic"
        );
        let header = |at| word(blob, at).context("the kernel's BTF is cut short");
        let start = header(4)? as usize;
        let part = |offset: u32, length: u32| {
            let from = start + offset as usize;
            blob.get(from..from + length as usize).context("the kernel's BTF is cut short")
        };
        Ok(Self { types: part(header(8)?, header(12)?)?, strings: part(header(16)?, header(20)?)? })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let rest = self.strings.get(name as usize..).unwrap_or_default();
        rest.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Byte offset of a direct member of a struct.
    fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let mut at = 0;
        while at < self.types.len() {
            let (name, info) = (word(self.types, at)?, word(self.types, at + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let bit_fields = info >> 31 != 0;
            at += 12;
            if kind == STRUCT && self.is_named(name, structure) {
                for m in (0..count).map(|i| at + i * 12) {
                    if self.is_named(word(self.types, m)?, member) {
                        let offset = word(self.types, m + 8)?;
                        return Some(if bit_fields { offset & 0xff_ffff } else { offset } / 8);
                    }
                }
            }
            at += match kind {
                1 | 14 | 17 => 4,              // INT, VAR, DECL_TAG
                3 => 12,                       // ARRAY
                4 | 5 | 15 | 19 => count * 12, // STRUCT, UNION, DATASEC, ENUM64
                6 | 13 => count * 8,           // ENUM, FUNC_PROTO
                _ => 0,
            };
        }
        None
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_whose_place_never_changes_are_found_there() {
        let Ok(blob) = fs::read("/sys/kernel/btf/vmlinux") else {
            eprintln!("skipped: this kernel has no BTF");
            return;
        };
        let types = Types::new(&blob).unwrap();
        assert_eq!(types.offset("list_head", "next"), Some(0));
        assert_eq!(types.offset("list_head", "prev"), Some(8));
        assert_eq!(types.offset("list_head", "none"), None);
        let here = Namespace::here().unwrap();
        assert!(here.inode > 1 && here.device_net > 0 && here.net_inode > 0, "{here:?}");
    }

    #[test]
    fn what_is_no_btf_is_refused() {
        assert!(Types::new(&[0; 64]).is_err());
        assert!(Types::new(&[]).is_err());
        let mut cut = vec![0; 24];
        cut[..2].copy_from_slice(&MAGIC.to_ne_bytes());
        cut[4..8].copy_from_slice(&24u32.to_ne_bytes());
        cut[12..16].copy_from_slice(&1000u32.to_ne_bytes());
        assert!(Types::new(&cut).is_err());
    }
}
