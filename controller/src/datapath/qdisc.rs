//! Taking a clsact qdisc away again (RTM_DELQDISC), which aya can only add. Only for kernels before 6.6.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::Context as _;

/// TC_H_CLSACT of linux/pkt_sched.h, and the handle its qdisc always has.
const PARENT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;

/// struct tcmsg of linux/rtnetlink.h.
#[repr(C)]
#[derive(Default)]
struct TcMessage {
    family: u8,
    pad1: u8,
    pad2: u16,
    ifindex: i32,
    handle: u32,
    parent: u32,
    info: u32,
}

#[repr(C)]
struct Request {
    header: libc::nlmsghdr,
    body: TcMessage,
}

#[repr(C)]
struct Answer {
    header: libc::nlmsghdr,
    error: libc::nlmsgerr,
}

/// Removes the clsact qdisc of a device of this network namespace, and every filter on it. None there is no error.
pub(super) fn remove_clsact(ifindex: u32) -> anyhow::Result<()> {
    match request(ifindex) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
            Ok(())
        }
        other => other.with_context(|| format!("RTM_DELQDISC clsact of device {ifindex}")),
    }
}

fn request(ifindex: u32) -> io::Result<()> {
    // SAFETY: socket(2) takes integers only.
    let fd =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let request = Request {
        header: libc::nlmsghdr {
            nlmsg_len: mem::size_of::<Request>() as u32,
            nlmsg_type: libc::RTM_DELQDISC,
            nlmsg_flags: (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
            nlmsg_seq: 1,
            nlmsg_pid: 0,
        },
        body: TcMessage { ifindex: ifindex as i32, handle: HANDLE, parent: PARENT, ..TcMessage::default() },
    };
    // SAFETY: the kernel reads the request, whose length is given.
    let sent =
        unsafe { libc::send(socket.as_raw_fd(), (&raw const request).cast(), mem::size_of::<Request>(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain integers.
    let mut answer: Answer = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes at most the length given; what is longer it cuts off.
    let got =
        unsafe { libc::recv(socket.as_raw_fd(), (&raw mut answer).cast(), mem::size_of::<Answer>(), 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    match answer.error.error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
