//! Eyes on a device: every frame that passes it, parsed, in order, to wait for and to judge.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ipnet::IpNet;

use super::frame::Frame;
use super::namespace::Namespace;
use super::packet_socket::{self, Purpose};
use super::server::Recorder;

/// The most bytes of frames one sniffer keeps: a bulk transfer passes gigabytes.
const KEPT_BYTES: usize = 256 << 20;

/// Records the frames of one device until dropped.
///
/// Where it looks matters. What XDP takes, a sniffer on the same device never sees; what a TC program drops
/// at ingress, it has seen already; what XDP redirects *out* of a device, it does not see there. So watch the
/// far end of a veth (the guest's, the internet's): that is the wire. With GRO or GSO a frame may be larger
/// than the MTU.
pub struct Sniffer {
    recorder: Recorder<Frame>,
    socket: Arc<OwnedFd>,
    kept: Arc<AtomicUsize>,
    overflowed: Arc<AtomicU64>,
    lost_in_kernel: AtomicU64,
}

impl Sniffer {
    /// Starts watching `device` inside `namespace`; every frame from now on is recorded.
    pub fn start(namespace: &Namespace, device: &str) -> anyhow::Result<Self> {
        Self::start_filtered(namespace, device, |_| true)
    }

    /// Like [`Sniffer::start`], keeping only the frames that `keep` accepts: for watching beside a bulk
    /// transfer.
    pub fn start_filtered(
        namespace: &Namespace,
        device: &str,
        keep: impl Fn(&Frame) -> bool + Send + 'static,
    ) -> anyhow::Result<Self> {
        let socket = Arc::new(packet_socket::open(namespace, device, Purpose::Receive)?);
        let overflowed = Arc::new(AtomicU64::new(0));
        let kept = Arc::new(AtomicUsize::new(0));
        let (overflow, total) = (Arc::clone(&overflowed), Arc::clone(&kept));
        let mut buffer = vec![0; 256 << 10];
        let recorder = Recorder::start("sniffer", Arc::clone(&socket), move |socket| {
            while let Some(received) = packet_socket::receive(socket, &mut buffer)? {
                let mut frame = Frame::parse(received.bytes);
                (frame.outgoing, frame.partial) = (received.outgoing, received.partial);
                frame.vlan = received.vlan.or(frame.vlan);
                if !keep(&frame) {
                    continue;
                }
                if total.load(Ordering::Relaxed) + frame.bytes.len() > KEPT_BYTES {
                    overflow.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                total.fetch_add(frame.bytes.len(), Ordering::Relaxed);
                return Ok(Some(frame));
            }
            Ok(None)
        })?;
        Ok(Sniffer { recorder, socket, kept, overflowed, lost_in_kernel: AtomicU64::new(0) })
    }

    /// All frames so far, including those the kernel has for us already.
    pub fn frames(&self) -> Vec<Frame> {
        self.recorder.snapshot()
    }

    /// Forgets the frames so far.
    pub fn clear(&self) {
        self.recorder.clear();
        self.kept.store(0, Ordering::Relaxed);
    }

    /// The first frame, past or to come, that `wanted` accepts; `None` if none did within `timeout`.
    pub fn wait_for(&self, timeout: Duration, wanted: impl FnMut(&Frame) -> bool) -> Option<Frame> {
        self.recorder.wait_for(timeout, wanted)
    }

    /// Frames so far whose IP source, or ARP sender, lies in one of `nets`: on an uplink, the leaks.
    pub fn private_sources(&self, nets: &[IpNet]) -> Vec<Frame> {
        let is_private = |address: IpAddr| nets.iter().any(|net| net.contains(&address));
        let mut frames = self.frames();
        frames.retain(|frame| {
            frame.ip.as_ref().is_some_and(|ip| is_private(ip.source))
                || frame.arp.is_some_and(|arp| is_private(arp.sender.into()))
        });
        frames
    }

    /// Frames so far with a wrong checksum, complete or partial. A device's own outgoing frames count too.
    pub fn bad_checksums(&self) -> Vec<Frame> {
        let mut frames = self.frames();
        frames.retain(|frame| !frame.checksums_ok());
        frames
    }

    /// Frames that passed and could not be recorded. Where a test asserts that something was *not* seen, this
    /// is 0.
    pub fn lost(&self) -> u64 {
        let now = packet_socket::lost(&self.socket).unwrap_or(0);
        let before = self.lost_in_kernel.fetch_add(now.into(), Ordering::Relaxed);
        before + u64::from(now) + self.overflowed.load(Ordering::Relaxed)
    }
}
