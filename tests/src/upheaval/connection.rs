//! A connection whose every byte comes back.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::ensure;

use super::datagrams::is_timeout;
use super::traffic::Counts;

/// Bytes written to the connection every millisecond.
const CHUNK: usize = 4096;

/// The byte at a place of the stream.
fn byte_at(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

pub(super) fn send_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let mut place = 0;
    while !counts.is_stopped() {
        if counts.may_send(1) {
            let chunk: Vec<u8> = (place..place + CHUNK as u64).map(byte_at).collect();
            place += CHUNK as u64;
            counts.bytes_sent.store(place, SeqCst);
            stream.write_all(&chunk)?;
        }
        // The rate of the sender, which waits for nothing.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

pub(super) fn receive_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let (mut buffer, mut place) = (vec![0; 1 << 16], 0u64);
    while !counts.is_stopped() {
        match stream.read(&mut buffer) {
            Ok(length) => {
                let right = buffer[..length].iter().zip(place..).all(|(byte, place)| *byte == byte_at(place));
                if !right {
                    return Err(io::Error::new(ErrorKind::InvalidData, "other bytes than were sent"));
                }
                place += length as u64;
                counts.bytes_returned.store(place, SeqCst);
                if length == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn echo_bytes(mut stream: &TcpStream, counts: &Counts) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    while !counts.is_stopped() {
        match stream.read(&mut buffer) {
            Ok(length) => stream.write_all(&buffer[..length])?,
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Segments that were sent again because they had not arrived: all that were sent again, less those of which the other end says
/// that it had them (`tcpi_total_retrans`, `tcpi_dsack_dups` of linux/tcp.h; the structure only grows).
pub(super) fn lost_segments(stream: &TcpStream) -> anyhow::Result<u64> {
    const TOTAL_RETRANS: usize = 100;
    const DSACK_DUPS: usize = 216;
    let mut info = [0u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the option writes at most `length` bytes, the size of `info`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "TCP_INFO: {}", io::Error::last_os_error());
    ensure!(length as usize >= DSACK_DUPS + 4, "this kernel's TCP_INFO has {length} bytes");
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    Ok(u64::from(word(TOTAL_RETRANS).saturating_sub(word(DSACK_DUPS))))
}
