//! A virtual machine on a tap device: the test plays the guest and speaks virtio-net, partial checksums
//! included.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::craft::{Craft, Mac, TcpFlags};
use super::frame::Frame;
use super::namespace::Namespace;
use super::server::Recorder;

/// Length of `struct virtio_net_hdr`, the tap's default.
const HEADER_LEN: usize = 10;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum from `csum_start` on is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// Offloads a QEMU guest's driver negotiates, from linux/if_tun.h: it takes partial checksums and large TCP
/// segments.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;
/// How often an unanswered ARP request is repeated.
const ARP_INTERVAL: Duration = Duration::from_millis(200);

/// `struct virtio_net_hdr`, in front of every frame on a tap with `IFF_VNET_HDR`; host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioNetHeader {
    /// Bit 0: the checksum is partial. Bit 1: it has been verified.
    pub flags: u8,
    /// 0: an ordinary frame; 1: TCP over IPv4, to be cut into segments.
    pub gso_type: u8,
    /// Length of all headers of a large segment, bytes.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where in the frame the checksummed part begins.
    pub csum_start: u16,
    /// Where, from there, the checksum is.
    pub csum_offset: u16,
}

impl VirtioNetHeader {
    /// A frame whose checksum is to be filled in on the way, as from a guest with checksum offload.
    pub fn partial(csum_start: u16, csum_offset: u16) -> Self {
        VirtioNetHeader { flags: NEEDS_CSUM, csum_start, csum_offset, ..Default::default() }
    }

    fn write(self) -> [u8; HEADER_LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn read(bytes: [u8; HEADER_LEN]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        VirtioNetHeader {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }
}

/// A frame the guest received; [`Frame::partial`] is set where the header says so.
#[derive(Clone, Debug)]
pub struct TapFrame {
    /// What came in front of it.
    pub header: VirtioNetHeader,
    /// The frame itself.
    pub frame: Frame,
}

/// A guest on a tap device. It answers ARP requests for its address unless told otherwise; everything else it
/// does is what the test makes it do. The device goes when this is dropped.
pub struct TapGuest {
    device: String,
    mac: Mac,
    address: Ipv4Addr,
    tap: Arc<File>,
    answers_arp: Arc<AtomicBool>,
    recorder: Recorder<TapFrame>,
    // The device must not vanish under the thread that reads it; dropped last.
    _namespace: Namespace,
}

impl TapGuest {
    /// Makes the tap device `device` inside `namespace` (down, no bridge) with the offloads of a QEMU guest
    /// and plays the guest `mac`, `address` on it.
    pub fn open(namespace: &Namespace, device: &str, mac: Mac, address: Ipv4Addr) -> anyhow::Result<Self> {
        let tap = namespace.enter(|| open_tap(device));
        let tap = tap.with_context(|| format!("making tap device {device} in {}", namespace.name()))?;
        let tap = Arc::new(tap);
        let answers_arp = Arc::new(AtomicBool::new(true));
        let (file, answers) = (Arc::clone(&tap), Arc::clone(&answers_arp));
        // A large segment, its headers and the virtio header.
        let mut buffer = vec![0; 70_000];
        let polled = Arc::new(OwnedFd::from(tap.try_clone()?));
        let recorder = Recorder::start("tap", polled, move |_| {
            let received = receive(&file, &mut buffer)?;
            if let Some(TapFrame { frame: Frame { arp: Some(arp), .. }, .. }) = &received
                && (arp.operation, arp.target) == (1, address)
                && answers.load(Ordering::Relaxed)
            {
                let reply = Craft::arp_reply(mac, address, arp.sender_mac, arp.sender);
                // Lost when the device is down, as an answer on a dead link is.
                let _ = send(&file, VirtioNetHeader::default(), &reply);
            }
            Ok(received)
        })?;
        Ok(TapGuest {
            device: device.to_owned(),
            mac,
            address,
            tap,
            answers_arp,
            recorder,
            _namespace: namespace.clone(),
        })
    }

    /// The tap device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The guest's hardware address (the device has another).
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// The guest's address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Whether it answers ARP requests for its address from now on.
    pub fn answer_arp(&self, answer: bool) {
        self.answers_arp.store(answer, Ordering::Relaxed);
    }

    /// Frames from this guest to `destination` by way of `next_hop`.
    pub fn craft(&self, next_hop: Mac, destination: Ipv4Addr) -> Craft {
        Craft::new(self.mac, self.address, next_hop, destination)
    }

    /// Sends a frame exactly as it is, with the header given.
    pub fn send_with(&self, header: VirtioNetHeader, frame: &[u8]) -> io::Result<()> {
        send(&self.tap, header, frame)
    }

    /// Sends a frame as it is, its checksums complete.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.send_with(VirtioNetHeader::default(), frame)
    }

    /// Sends a TCP or UDP frame with its checksum turned into a partial one, as a guest's driver does.
    ///
    /// # Errors
    /// `InvalidInput` for a frame without such a checksum.
    pub fn send_partial(&self, mut frame: Vec<u8>) -> io::Result<()> {
        let (start, offset) = Craft::make_partial(&mut frame).ok_or(io::ErrorKind::InvalidInput)?;
        self.send_with(VirtioNetHeader::partial(start, offset), &frame)
    }

    /// Sends a UDP datagram, checksum partial.
    pub fn send_udp(
        &self,
        next_hop: Mac,
        source_port: u16,
        destination: SocketAddrV4,
        payload: &[u8],
    ) -> io::Result<()> {
        let craft = self.craft(next_hop, *destination.ip());
        self.send_partial(craft.udp(source_port, destination.port(), payload))
    }

    /// Sends a TCP SYN, checksum partial.
    pub fn send_syn(
        &self,
        next_hop: Mac,
        source_port: u16,
        destination: SocketAddrV4,
        sequence: u32,
    ) -> io::Result<()> {
        let craft = self.craft(next_hop, *destination.ip());
        self.send_partial(craft.tcp(source_port, destination.port(), TcpFlags::SYN, sequence, 0, &[]))
    }

    /// Sends an ICMP echo request (complete: virtio has no partial checksum for ICMP).
    pub fn send_echo_request(
        &self,
        next_hop: Mac,
        destination: Ipv4Addr,
        id: u16,
        sequence: u16,
    ) -> io::Result<()> {
        self.send(&self.craft(next_hop, destination).echo_request(id, sequence, b"portcullis lab"))
    }

    /// Broadcasts an ARP request for `target`.
    pub fn send_arp_request(&self, target: Ipv4Addr) -> io::Result<()> {
        self.send(&Craft::arp_request(self.mac, self.address, target))
    }

    /// Asks for the hardware address of `target` until someone answers; `None` if nobody did within
    /// `timeout`.
    pub fn resolve(&self, target: Ipv4Addr, timeout: Duration) -> Option<Mac> {
        let start = Instant::now();
        loop {
            self.send_arp_request(target).ok()?;
            let left = timeout.saturating_sub(start.elapsed());
            let answer = self.wait_for(ARP_INTERVAL.min(left), |received| {
                received.frame.arp.is_some_and(|arp| arp.operation == 2 && arp.sender == target)
                    && received.frame.at >= start
            });
            if let Some(arp) = answer.and_then(|received| received.frame.arp) {
                return Some(arp.sender_mac);
            }
            if start.elapsed() >= timeout {
                return None;
            }
        }
    }

    /// Every frame received so far, ARP included.
    pub fn received(&self) -> Vec<TapFrame> {
        self.recorder.snapshot()
    }

    /// Forgets the frames received so far.
    pub fn clear(&self) {
        self.recorder.clear();
    }

    /// The first frame received, past or to come, that `wanted` accepts; `None` if none did within `timeout`.
    pub fn wait_for(&self, timeout: Duration, wanted: impl FnMut(&TapFrame) -> bool) -> Option<TapFrame> {
        self.recorder.wait_for(timeout, wanted)
    }
}

/// Makes a tap device in the calling thread's namespace and opens its only queue.
fn open_tap(device: &str) -> anyhow::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("opening /dev/net/tun")?;
    // SAFETY: ifreq is plain data; all zeroes is an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(device.len() < request.ifr_name.len(), "device name {device} is longer than 15 bytes");
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which is ours and alive.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error()).context("TUNSETIFF");
    }
    let offloads = libc::c_ulong::from(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads) } < 0 {
        return Err(io::Error::last_os_error()).context("TUNSETOFFLOAD");
    }
    Ok(file)
}

fn send(mut tap: &File, header: VirtioNetHeader, frame: &[u8]) -> io::Result<()> {
    // One write is one frame.
    let mut packet = header.write().to_vec();
    packet.extend_from_slice(frame);
    let written = tap.write(&packet)?;
    if written == packet.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn receive(mut tap: &File, buffer: &mut [u8]) -> io::Result<Option<TapFrame>> {
    let length = match tap.read(buffer) {
        Ok(length) => length,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let Some((header, bytes)) = buffer[..length].split_first_chunk::<HEADER_LEN>() else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let header = VirtioNetHeader::read(*header);
    let mut frame = Frame::parse(bytes.to_vec());
    frame.partial = header.flags & NEEDS_CSUM != 0;
    Ok(Some(TapFrame { header, frame }))
}
