//! The lab: network namespaces, veth, tap and bridges of our own, real traffic in them, and eyes on the wire.
//!
//! A test builds a [`Topology`] (one gateway, some guests, one `internet`), starts what it tests in the
//! gateway's namespace ([`Daemon`]), sends real traffic ([`tcp_exchange`], [`udp_exchange`], [`ping`],
//! [`curl`], [`iperf3`], [`TcpHold`], [`TapGuest`], [`RawSender`]) and watches what arrives ([`Sniffer`], and
//! the peers that [`TcpEcho`] and [`UdpEcho`] saw).
//!
//! Three rules hold everywhere in here:
//!
//! * **Nothing of the machine's own is touched.** Devices are made inside namespaces that the lab made, and
//!   sysctls are set only there. Every name carries the process id, so labs of several runs stand side by
//!   side.
//! * **Nothing is left behind.** What a value made goes when the value is dropped, panic or not. A run that
//!   was killed could not do that: the next one's first lab, or [`sweep_stale`], removes what it left.
//! * **Nothing sleeps for luck.** What takes time is waited for with [`eventually`] and a deadline.
//!
//! All of it needs root (`CAP_NET_ADMIN`, `CAP_SYS_ADMIN`); [`why_unavailable`] says so to tests that would
//! rather skip than fail.

mod bpffs;
mod craft;
mod craft6;
mod crowd;
mod crowd_echo;
mod daemon;
mod forwarder;
mod frame;
mod http;
mod identity;
mod intercept;
mod iperf;
mod namespace;
mod packet_socket;
mod ping;
mod process;
mod raw_ip;
mod server;
mod sniffer;
mod tap;
mod tcp;
mod tcp_hold;
mod topology;
mod topology_spec;
mod udp;

#[cfg(test)]
mod tests;

pub use bpffs::{BpfFs, ScratchDir};
pub use craft::{Craft, Mac, TcpFlags};
pub use craft6::{ALL_NODES, Craft6, solicited_node};
pub use crowd::{Crowd, Word};
pub use crowd_echo::{CrowdEcho, Heard};
pub use daemon::{Daemon, DaemonSpec};
pub use forwarder::Forwarder;
pub use frame::{Arp, Checksum, Checksums, Frame, Ip, Transport};
pub use http::{CurlReply, HttpServer, curl};
pub use identity::{LabId, sweep_stale};
pub use intercept::Intercept;
pub use iperf::{IperfOptions, bits_per_second, iperf3};
pub use namespace::Namespace;
pub use packet_socket::RawSender;
pub use ping::{PingOutcome, ping, ping_sized};
pub use process::ProcessGuard;
pub use raw_ip::raw_socket;
pub use sniffer::Sniffer;
pub use tap::{TapFrame, TapGuest, VirtioNetHeader};
pub use tcp::{TcpEcho, TcpOutcome, tcp_connect, tcp_connect_from, tcp_exchange};
pub use tcp_hold::TcpHold;
pub use topology::{GuestEnd, Topology};
pub use topology_spec::{GuestSpec, Links, TopologySpec};
pub use udp::{UdpEcho, UdpOutcome, udp_exchange, udp_socket};

use std::time::{Duration, Instant};

/// How often [`eventually`] looks.
const POLL: Duration = Duration::from_millis(10);

/// Polls `condition` every 10 ms until it holds or `timeout` has passed; whether it held.
///
/// It looks at least once, and once more when the time is up, so a busy machine does not turn a truth into a
/// failure.
pub fn eventually(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    eventually_some(timeout, || condition().then_some(())).is_some()
}

/// Like [`eventually`], for conditions that come with a value.
pub fn eventually_some<T>(timeout: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let last = Instant::now() >= deadline;
        if let Some(value) = attempt() {
            return Some(value);
        }
        if last {
            return None;
        }
        std::thread::sleep(POLL.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// Why no lab can be built here, in a sentence for the log; `None` if it can.
///
/// Whether the tools are there is not asked: a missing `ethtool` on a test machine is a failure, not a reason
/// to skip.
pub fn why_unavailable() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("the lab needs root to make network namespaces; run the tests with sudo".to_owned());
    }
    None
}
