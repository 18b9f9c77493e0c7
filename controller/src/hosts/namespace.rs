//! Which network namespace, of which boot, a journal speaks about.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::{Deserialize, Serialize};

/// Identity of a network namespace. Nothing that the journal undoes outlives either part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Namespace {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// SO_NETNS_COOKIE: never given twice in one boot, unlike the inode. 0 before kernel 5.14.
    pub cookie: u64,
    /// Inode of `/proc/…/ns/net`, by which a living namespace can be found.
    pub inode: u64,
}

impl Namespace {
    /// The calling thread's.
    pub fn current() -> Result<Self> {
        const BOOT: &str = "/proc/sys/kernel/random/boot_id";
        const NET: &str = "/proc/thread-self/ns/net";
        let boot =
            fs::read_to_string(BOOT).with_context(|| format!("cannot read {BOOT}"))?.trim().to_string();
        let inode = fs::metadata(NET).with_context(|| format!("cannot read {NET}"))?.ino();
        Ok(Self { boot, cookie: cookie()?, inode })
    }

    /// Whether the namespace can still be found: in this boot, named under /run/netns or used by a process.
    pub fn is_alive(&self, current: &Self) -> bool {
        if self.boot != current.boot {
            return false;
        }
        if self.inode == current.inode {
            // Two living namespaces never share an inode, so the other one is gone unless it is this one.
            return self.cookie == current.cookie;
        }
        let holds = |directory: &str, rest: &str| {
            let mut paths = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| match rest {
                "" => entry.path(),
                _ => entry.path().join(rest),
            });
            paths.any(|path| fs::metadata(path).is_ok_and(|found| found.ino() == self.inode))
        };
        holds("/run/netns", "") || holds("/proc", "ns/net")
    }
}

fn cookie() -> Result<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .context("cannot open a socket to identify the network namespace")?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes at most `length` bytes, the size of `cookie`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &mut length,
        )
    };
    // Kernels before 5.14 do not know the option: the inode alone has to do.
    Ok(if result == 0 { cookie } else { 0 })
}
