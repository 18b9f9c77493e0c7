//! Asking the kernel for its table of connections (NETLINK_NETFILTER, ctnetlink).

use std::io;

use anyhow::{Context as _, bail};
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::entry::Connection;

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `nlmsghdr`.
const HEADER: usize = 16;
/// `nfgenmsg`: family, version, resource.
const GENERIC: usize = 4;
/// What one answer of a dump may have; the kernel takes as much of it as it likes.
const BUFFER: usize = 128 << 10;

/// Calls `found` for every connection of TCP, UDP and ping over IPv4 that the kernel tracks in this thread's network namespace.
///
/// # Errors
/// If the kernel has no connection tracking, or does not let us ask.
pub fn for_each(mut found: impl FnMut(&Connection)) -> anyhow::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER).context("opening a netfilter netlink socket")?;
    socket.bind_auto().context("binding a netfilter netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0)).context("connecting a netfilter netlink socket")?;
    socket.send(&request(), 0).context("asking for the table of connections")?;
    let mut buffer: Vec<u8> = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        let length = socket.recv(&mut buffer, 0).context("reading the table of connections")?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                bail!("the kernel's answer is cut off")
            };
            let (kind, length) = (message.message_type(), (message.length() as usize).max(HEADER));
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    let error = io::Error::from_raw_os_error(code.saturating_neg());
                    return Err(error).context("the kernel does not tell its table of connections");
                }
                _ if kind == NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW => {
                    if let Some(connection) = message.payload().get(GENERIC..).and_then(Connection::parse) {
                        found(&connection);
                    }
                }
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// All of IPv4's.
fn request() -> [u8; HEADER + GENERIC] {
    let mut bytes = [0; HEADER + GENERIC];
    bytes[..4].copy_from_slice(&((HEADER + GENERIC) as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET).to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[HEADER] = libc::AF_INET as u8;
    bytes
}
