//! Datagrams with sequence numbers, many of them in one call: a call for each would be what the rate is spent on.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt};

use super::traffic::{Counts, POLL};
use crate::lab::Namespace;

/// Datagrams a second, if there is a processor for them.
pub const RATE: u64 = 60_000;
/// The server answers every so many.
pub const ANSWERED: u64 = 16;
/// Datagrams under way at most.
const WINDOW: u64 = 128;
/// At most so many at once when the sender comes late: the rest of what it has missed is not sent.
const BURST: usize = 32;
const LENGTH: usize = 64;

pub(super) fn socket(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = crate::lab::udp_socket(namespace, address)?;
    socket.set_read_timeout(Some(POLL))?;
    setsockopt(&socket, RcvBufForce, &(8 << 20)).context("the size of a socket's buffer")?;
    Ok(socket)
}

pub(super) fn send_datagrams(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    let mut headers = MultiHeaders::<()>::preallocate(BURST, None);
    let mut sequence = 0u64;
    let mut due = Instant::now();
    while !counts.is_stopped() {
        let open = sequence - counts.datagrams_arrived.load(SeqCst).min(sequence) < WINDOW;
        if !counts.may_send(0) || !open {
            let stopped = Instant::now();
            std::thread::yield_now();
            if counts.paused.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                counts.busy_micros.fetch_add(stopped.elapsed().as_micros() as u64, SeqCst);
            }
            due = Instant::now();
            continue;
        }
        let began = Instant::now();
        let late = began.saturating_duration_since(due).as_micros() as u64 * RATE / 1_000_000;
        let mut payloads = [[0u8; LENGTH]; BURST];
        let payloads = &mut payloads[..late.clamp(1, BURST as u64) as usize];
        for payload in &mut *payloads {
            payload[..8].copy_from_slice(&sequence.to_be_bytes());
            sequence += 1;
        }
        // Counted first, so that none seems to arrive before it is sent.
        counts.datagrams_sent.fetch_add(payloads.len() as u64, SeqCst);
        let mut sent = 0;
        while sent < payloads.len() {
            let slices: Vec<_> = payloads[sent..].iter().map(|payload| [IoSlice::new(payload)]).collect();
            let to = vec![None; slices.len()];
            sent += sendmmsg(socket.as_raw_fd(), &mut headers, &slices, to, [], MsgFlags::empty())?.count();
        }
        due = Instant::now();
        // Short of a microsecond's grain the loop is the clock.
        std::thread::sleep(Duration::from_micros(1_000_000 / RATE));
        counts.busy_micros.fetch_add(began.elapsed().as_micros() as u64, SeqCst);
    }
    Ok(())
}

pub(super) fn receive_datagrams(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    let (mut buffers, mut next) = ([[0u8; LENGTH]; 2 * BURST], 0u64);
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(buffers.len(), None);
    let mut known = None;
    while !counts.is_stopped() {
        let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
        let flags = MsgFlags::MSG_WAITFORONE;
        let received = match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None) {
            Ok(received) => received,
            Err(error) if is_timeout(&error.into()) => continue,
            Err(error) => return Err(error.into()),
        };
        for datagram in received {
            let (Some(peer), Some(payload)) = (datagram.address, datagram.iovs().next()) else { continue };
            let peer = SocketAddr::from((peer.ip(), peer.port()));
            if known != Some(peer) {
                counts.saw(peer);
                known = Some(peer);
            }
            let Some(sequence) = payload.first_chunk().copied().map(u64::from_be_bytes) else { continue };
            if sequence < next {
                counts.out_of_order.fetch_add(1, SeqCst);
            }
            next = next.max(sequence + 1);
            counts.datagrams_arrived.fetch_add(1, SeqCst);
            if sequence % ANSWERED == 0 {
                counts.answers_sent.fetch_add(1, SeqCst);
                socket.send_to(payload, peer)?;
            }
        }
    }
    Ok(())
}

pub(super) fn receive_answers(socket: &UdpSocket, counts: &Counts) -> io::Result<()> {
    let mut buffer = [0u8; 128];
    while !counts.is_stopped() {
        match socket.recv(&mut buffer) {
            Ok(_) => _ = counts.answers_arrived.fetch_add(1, SeqCst),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
