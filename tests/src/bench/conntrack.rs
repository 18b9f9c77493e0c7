//! Forgetting all connections of a namespace, which `conntrack -F` does where it is installed.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, ensure};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE` (linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h): of no
/// connection in particular, so of all.
const DELETE: u16 = 1 << 8 | 2;

/// Deletes all connections of the network namespace that the calling thread is in, and returns when they are gone.
pub(super) fn flush() -> anyhow::Result<()> {
    // SAFETY: plain arguments.
    let socket = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
    };
    ensure!(socket >= 0, "a netfilter socket: {}", io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // nlmsghdr, and nfgenmsg: AF_INET, version 0, resource 0.
    let mut request = Vec::with_capacity(20);
    request.extend(20u32.to_ne_bytes());
    request.extend(DELETE.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_INET as u8, 0, 0, 0]);
    // SAFETY: as many bytes as there are.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    ensure!(sent == request.len() as isize, "asking conntrack to forget: {}", io::Error::last_os_error());
    let mut answer = [0u8; 128];
    // SAFETY: as many bytes as there is room for.
    let received = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    ensure!(received >= 20, "conntrack's answer: {}", io::Error::last_os_error());
    let error = answer[16..20].try_into().map(i32::from_ne_bytes).context("four bytes")?;
    ensure!(error == 0, "conntrack does not forget: {}", io::Error::from_raw_os_error(-error));
    Ok(())
}
