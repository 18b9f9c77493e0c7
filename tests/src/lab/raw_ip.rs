//! Real packets of protocols that have no sockets of their own.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::sys::socket::{SockaddrStorage, bind};

use super::namespace::Namespace;

/// A raw IP socket inside `namespace` that sends and receives packets of one protocol from and at an address of the
/// namespace, in the clothes of a UDP socket: ports are 0, and of IPv4 what is received begins with the IP header.
pub fn raw_socket(namespace: &Namespace, address: IpAddr, protocol: u8) -> io::Result<UdpSocket> {
    namespace.enter(|| {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // SAFETY: socket takes three integers.
        let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
        let socket = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, 0)))?;
        Ok(socket)
    })
}
