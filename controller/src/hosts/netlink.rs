//! One rtnetlink connection, and errors that say what was being done.

use anyhow::{Context, Result};
use rtnetlink::Handle;
use tokio::task::JoinHandle;

/// A connection to the network namespace of the thread that opened it.
///
/// Its socket is served by a task of the current tokio runtime, which ends with this value.
pub struct Host {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Host {
    /// Opens the connection. Must run inside a tokio runtime; the calling thread's network namespace is the one
    /// that all later calls see, whatever thread makes them.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .context("cannot open a netlink socket to read this host's devices")?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The errno of a netlink answer, positive; `None` when the request never got an answer.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

/// What the kernel says when the thing to be removed, or its device, is not there.
pub(super) fn is_absent(error: &rtnetlink::Error) -> bool {
    matches!(
        errno(error),
        Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::ENXIO | libc::EADDRNOTAVAIL)
    )
}

/// What the kernel says when the thing to be added is there already.
pub(super) fn is_present(error: &rtnetlink::Error) -> bool {
    errno(error) == Some(libc::EEXIST)
}

/// A netlink answer as an error a person can act on.
pub(super) fn explained(error: rtnetlink::Error) -> anyhow::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            let io = message.to_io();
            match message.raw_code().abs() {
                libc::EPERM => {
                    anyhow::Error::new(io).context("not allowed: run as root or with CAP_NET_ADMIN")
                }
                _ => anyhow::Error::new(io),
            }
        }
        other => anyhow::Error::new(other),
    }
}
