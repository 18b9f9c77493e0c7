//! Ending idle TCP connections aloud (`enableTcpReset`, `reference/azure.md` §2.3): when a flow with that flag ends by its
//! idle timeout while established, both sides are told by a RST, so that neither waits for a peer that cannot be reached.
//!
//! A RST counts only with exactly the sequence number its receiver expects next (RFC 5961 §3.2), which is the last
//! acknowledgement number that the receiver sent: the datapath keeps it in the half-record. The frame goes out of the
//! device of the flow's recorded next hop, with its hardware addresses; a side without (the host itself, a router that is
//! not resolved) is not told. Nor is anybody told of flows that ended while no daemon looked.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use portcullis_common::MARK;
use portcullis_common::clock::{passed, ticks};
use portcullis_common::flow::{Ctl, FLAG_RESET, LIVE};
use portcullis_common::layout::{HOP_FLAG_RESOLVED, HOP_GUEST, HOP_WORLD, HalfRecord, NextHop};
use portcullis_common::packet::headers::{ACK, RST, TCP};
use portcullis_common::tcp_state::{State, state};

use crate::datapath::FlowTable;

/// RSTs per second, at most: a policy that ends a hundred thousand flows at once is not to flood anybody.
const RATE: f64 = 10_000.0;
/// A flow that ended longer ago (seconds) was not looked after: its port may have another user by now.
const FRESH: u32 = 30;
/// Length of an Ethernet header, of an IPv4 header, of an IPv6 header, of a TCP header; bytes.
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP_BYTES: usize = 20;

/// What one side of an idle flow is told, in its own terms: the source is its peer as it knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Index of the next hop towards it.
    pub next_hop: u16,
}

/// What both sides are to be told of a flow that the reaper has just freed one half of, `record` from slot `index`.
/// Nothing unless it was established, wanted it, and ended by idling a moment ago. The other half is freed later and
/// says nothing, its peer being gone.
pub fn resets(table: &FlowTable, index: u32, record: &HalfRecord, now: u32) -> Option<[Reset; 2]> {
    let ctl = Ctl(record.ctl);
    if ctl.phase() != LIVE
        || ctl.flags() & FLAG_RESET == 0
        || record.key.protocol != TCP
        || state(ctl.tcp()) != State::Established
        || record.peer >= table.slots()
    {
        return None;
    }
    let peer = table.read(record.peer)?;
    let other = Ctl(peer.ctl);
    if other.phase() != LIVE
        || other.generation() != ctl.generation()
        || state(other.tcp()) != State::Established
    {
        return None;
    }
    // The later of both deadlines is when it ended.
    let long_ago = |half: &HalfRecord| passed(half.deadline.wrapping_add(ticks(FRESH)), now);
    if long_ago(record) && long_ago(&peer) {
        return None;
    }
    let (near, far) = (addresses(table, index, record)?, addresses(table, record.peer, &peer)?);
    Some([to_sender(record, near, &peer), to_sender(&peer, far, record)])
}

/// Source and destination of a half, as its packets have them before translation.
fn addresses(table: &FlowTable, index: u32, half: &HalfRecord) -> Option<[IpAddr; 2]> {
    if table.is_v6() {
        let [source, destination, ..] = table.addresses6(index, half)?;
        return Some([source.into(), destination.into()]);
    }
    Some([half.key.source, half.key.destination].map(|word| Ipv4Addr::from(word.to_ne_bytes()).into()))
}

/// The RST to whoever sends the packets of `half`; the other half's packets go there.
fn to_sender(half: &HalfRecord, [own, peer]: [IpAddr; 2], other: &HalfRecord) -> Reset {
    Reset {
        source: (peer, u16::from_be(half.key.destination_port)),
        destination: (own, u16::from_be(half.key.source_port)),
        sequence: u32::from_be(half.ack),
        acknowledgement: u32::from_be(other.ack),
        next_hop: other.next_hop(),
    }
}

impl Reset {
    /// The whole Ethernet frame; `None` for a hop that has no hardware address, or addresses of two families.
    pub fn frame(&self, hop: &NextHop) -> Option<Vec<u8>> {
        if !matches!(hop.kind, HOP_GUEST | HOP_WORLD) || hop.flags & HOP_FLAG_RESOLVED == 0 {
            return None;
        }
        let mut frame = Vec::with_capacity(ETHERNET + IPV6 + TCP_BYTES);
        frame.extend_from_slice(&hop.mac);
        frame.extend_from_slice(&hop.source_mac);
        let length = TCP_BYTES as u16;
        let pseudo = match (self.source.0, self.destination.0) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend_from_slice(&[0x08, 0x00]);
                let mut header = [0u8; IPV4];
                header[0] = 0x45;
                header[2..4].copy_from_slice(&(IPV4 as u16 + length).to_be_bytes());
                // Not to be fragmented, so its identification says nothing (RFC 6864 §4.1).
                header[6] = 0x40;
                header[8] = 64;
                header[9] = TCP;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let sum = checksum(add(0, &header));
                header[10..12].copy_from_slice(&sum);
                frame.extend_from_slice(&header);
                add(0, &header[12..])
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend_from_slice(&[0x86, 0xdd]);
                let mut header = [0u8; IPV6];
                header[0] = 0x60;
                header[4..6].copy_from_slice(&length.to_be_bytes());
                header[6] = TCP;
                header[7] = 64;
                header[8..24].copy_from_slice(&source.octets());
                header[24..40].copy_from_slice(&destination.octets());
                frame.extend_from_slice(&header);
                add(0, &header[8..])
            }
            _ => return None,
        };
        let mut header = [0u8; TCP_BYTES];
        header[0..2].copy_from_slice(&self.source.1.to_be_bytes());
        header[2..4].copy_from_slice(&self.destination.1.to_be_bytes());
        header[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        header[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
        header[12] = (TCP_BYTES as u8 / 4) << 4;
        header[13] = RST | ACK;
        let sum = checksum(add(pseudo + u32::from(TCP) + u32::from(length), &header));
        header[16..18].copy_from_slice(&sum);
        frame.extend_from_slice(&header);
        Some(frame)
    }
}

/// Adds 16-bit words (RFC 1071); an even number of bytes, too few to overflow.
fn add(sum: u32, bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).fold(sum, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])))
}

fn checksum(mut sum: u32) -> [u8; 2] {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Sends RSTs, not too many.
pub struct Sender {
    socket: OwnedFd,
    /// RSTs that may be sent now.
    budget: f64,
    filled: Instant,
    sent: u64,
    /// Over the rate, or refused by the kernel.
    withheld: u64,
}

impl Sender {
    /// Opens the socket, in the calling thread's network namespace.
    pub fn open() -> anyhow::Result<Self> {
        // Protocol 0: it receives nothing.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .context("a packet socket for RSTs to idle connections")?;
        // Our own program at the egress of a guest's device takes it for the host's otherwise, and drops it.
        setsockopt(&socket, sockopt::Mark, &MARK).context("SO_MARK on the socket for RSTs")?;
        Ok(Self { socket, budget: RATE, filled: Instant::now(), sent: 0, withheld: 0 })
    }

    /// RSTs sent, and RSTs that should have been, since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.sent, self.withheld)
    }

    /// Sends one; a hop that cannot be sent by is passed over.
    pub fn send(&mut self, reset: &Reset, hop: &NextHop) {
        let Some(frame) = reset.frame(hop) else { return };
        let now = Instant::now();
        self.budget = (self.budget + (now - self.filled).as_secs_f64() * RATE).min(RATE);
        self.filled = now;
        if self.budget < 1.0 || self.transmit(&frame, hop.ifindex).is_err() {
            self.withheld += 1;
            return;
        }
        self.budget -= 1.0;
        self.sent += 1;
    }

    fn transmit(&self, frame: &[u8], ifindex: u32) -> io::Result<()> {
        // SAFETY: plain integers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = u16::from_ne_bytes([frame[12], frame[13]]);
        address.sll_ifindex = ifindex as i32;
        // SAFETY: `frame` and `address` are readable for the lengths given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
#[path = "reset_tests.rs"]
mod tests;
