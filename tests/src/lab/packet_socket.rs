//! AF_PACKET sockets: raw frames in and out of one device of a namespace.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::Context as _;

use super::namespace::Namespace;

/// Receive buffer of a sniffer, bytes: a burst must not outrun a thread on a busy machine.
const RECEIVE_BUFFER: libc::c_int = 32 << 20;

/// What a socket is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// See every frame of the device, both directions.
    Receive,
    /// Only send: bound to no protocol, so that nothing piles up.
    Send,
}

/// Opens a raw packet socket on `device` inside `namespace`. It is non-blocking for receiving.
pub(super) fn open(namespace: &Namespace, device: &str, purpose: Purpose) -> anyhow::Result<OwnedFd> {
    let ifindex = namespace.ifindex(device)?;
    namespace
        .enter(|| open_here(ifindex, purpose))
        .with_context(|| format!("packet socket on {device} in {}", namespace.name()))
}

fn open_here(ifindex: u32, purpose: Purpose) -> io::Result<OwnedFd> {
    let flags = match purpose {
        Purpose::Receive => libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        Purpose::Send => libc::SOCK_RAW | libc::SOCK_CLOEXEC,
    };
    // Protocol 0 until bound: with ETH_P_ALL here, frames of every other device would come in before the
    // bind. SAFETY: socket takes three integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut protocol = 0;
    if purpose == Purpose::Receive {
        protocol = (libc::ETH_P_ALL as u16).to_be();
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
    }
    // SAFETY: sockaddr_ll is plain data; all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = ifindex as i32;
    // SAFETY: the address is ours and lives through the call, and its length is passed with it.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

fn set_option(socket: &OwnedFd, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which lives through the call and whose size is passed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A frame as a packet socket hands it over.
pub(super) struct Received {
    pub bytes: Vec<u8>,
    pub outgoing: bool,
    pub partial: bool,
    /// Tag that the kernel took out of the frame.
    pub vlan: Option<u16>,
}

/// Reads one frame; `None` if there is none now. `buffer` is room for the largest.
pub(super) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<Received>> {
    // Aligned as cmsghdr is, with room for one tpacket_auxdata and more.
    let mut control = [0u64; 16];
    // SAFETY: sockaddr_ll is plain data; all zeroes is a valid value.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data; all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: every pointer in the message is to a local or to `buffer`, all alive, with its true length.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(None),
            // The device went down or away; what was queued is still read.
            Some(libc::ENETDOWN) => Ok(None),
            _ => Err(error),
        };
    }
    let mut received = Received {
        bytes: buffer[..length as usize].to_vec(),
        outgoing: from.sll_pkttype == libc::PACKET_OUTGOING,
        partial: false,
        vlan: None,
    };
    // SAFETY: recvmsg filled in the control buffer and its length; CMSG_FIRSTHDR and CMSG_NXTHDR stay within
    // them.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: not null, so it points to a whole cmsghdr in the control buffer, which is aligned for it.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if level == libc::SOL_PACKET && kind == libc::PACKET_AUXDATA {
            // SAFETY: a message of this type carries one tpacket_auxdata; it is read without asking for
            // alignment.
            let aux: libc::tpacket_auxdata =
                unsafe { std::ptr::read_unaligned(libc::CMSG_DATA(header).cast()) };
            received.partial = aux.tp_status & libc::TP_STATUS_CSUMNOTREADY != 0;
            received.vlan =
                (aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(aux.tp_vlan_tci & 0xfff);
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(Some(received))
}

/// How many frames the socket had no room for since this was last asked.
pub(super) fn lost(socket: &OwnedFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as u32;
    // SAFETY: the kernel writes at most `length` bytes to the statistics, which are ours and that long.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics.tp_drops) }
}

/// Sends crafted frames out of a device, as whatever owns the device would: on the guest's end of a veth, the
/// gateway receives them from the guest.
#[derive(Debug)]
pub struct RawSender {
    socket: OwnedFd,
}

impl RawSender {
    /// Opens a sender on `device` inside `namespace`.
    pub fn open(namespace: &Namespace, device: &str) -> anyhow::Result<Self> {
        Ok(RawSender { socket: open(namespace, device, Purpose::Send)? })
    }

    /// Sends one frame, Ethernet header included, exactly as it is.
    ///
    /// # Errors
    /// `EMSGSIZE` if it is longer than the device's MTU allows, `ENETDOWN` if the device is down.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `frame.len()` bytes from `frame`.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        match usize::try_from(sent) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(sent) if sent == frame.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}
