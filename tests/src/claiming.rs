//! One guest with a block of public ports and one destination: what tests of claims fight over.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use portcullis_common::FlowKey;

use crate::lab::{Craft, TcpFlags};

/// The guest's ip configuration.
pub const MEMBER: &str = "vm1/ipconfig1";
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
pub const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Port of the destination.
pub const SERVICE: u16 = 80;

/// The guest's ports under [`policy`] of 0: the tier of the smallest pools.
pub const PORTS: u16 = 1024;

/// The policy, with so many ports for the guest; 0 is by tier. Flows that are half open do not end while a busy machine lets
/// a thread wait.
pub fn policy(ports: u16) -> String {
    format!(
        "
virtualNetworks:
  - name: lab
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets: [{{ name: a, addressPrefix: 10.0.1.0/24 }}]
networkInterfaces:
  - {{ name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, ipConfigurations: [{{ subnet: a, privateIPAddress: {GUEST} }}] }}
publicIPAddresses: [{{ name: p, ipAddress: {FRONTEND}, announce: proxy }}]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{{ name: fe, publicIPAddress: p }}]
    backendAddressPools: [{{ name: pool, backendIPConfigurations: [vm1] }}]
    outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: {ports} }}]
uplinks: [{{ device: uplink }}]
timeouts: {{ tcpHalfOpenSeconds: 3600 }}
"
    )
}

/// Packets from the guest to the destination.
pub fn craft() -> Craft {
    Craft::new([2, 0, 0, 0, 0, 1], GUEST, [2, 0, 0, 0, 0xaa, 0], DESTINATION)
}

/// A segment of the guest's; what is no SYN stands behind it.
pub fn segment(source_port: u16, flags: TcpFlags) -> Vec<u8> {
    craft().tcp(source_port, SERVICE, flags, if flags.syn { 1 } else { 2 }, 0, b"")
}

/// The first of a flow.
pub fn syn(source_port: u16) -> Vec<u8> {
    segment(source_port, TcpFlags::SYN)
}

/// The source port of a frame of TCP or UDP over IPv4 without options: behind the translation the public one.
///
/// # Panics
/// If the frame is too short.
pub fn source_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[34], frame[35]])
}

/// By what the flow table finds the flow of [`syn`], in the network with this id.
pub fn inside_key(source_port: u16, network: u16) -> FlowKey {
    FlowKey {
        source: u32::from_ne_bytes(GUEST.octets()),
        destination: u32::from_ne_bytes(DESTINATION.octets()),
        source_port: source_port.to_be(),
        destination_port: SERVICE.to_be(),
        network,
        protocol: 6,
        kind: 0,
    }
}

/// Who holds which port right now, kept beside the datapath by any number of threads.
pub struct Holders {
    ports: Vec<AtomicU32>,
    claims: AtomicU64,
    refusals: AtomicU64,
    releases: AtomicU64,
}

impl Default for Holders {
    fn default() -> Self {
        Self {
            ports: (0..=u16::MAX).map(|_| AtomicU32::new(0)).collect(),
            claims: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
            releases: AtomicU64::new(0),
        }
    }
}

impl Holders {
    /// A claim succeeded.
    ///
    /// # Panics
    /// If somebody holds the port.
    pub fn claimed(&self, port: u16) {
        assert_eq!(self.ports[usize::from(port)].fetch_add(1, SeqCst), 0, "port {port} owned twice");
        self.claims.fetch_add(1, SeqCst);
    }

    /// A claim did not.
    pub fn refused(&self) {
        self.refusals.fetch_add(1, SeqCst);
    }

    /// Must be called before the port is given back.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn releasing(&self, port: u16) {
        assert_eq!(self.ports[usize::from(port)].fetch_sub(1, SeqCst), 1, "port {port} was not held");
        self.releases.fetch_add(1, SeqCst);
    }

    /// Claims, refusals and releases so far.
    pub fn counts(&self) -> [u64; 3] {
        [&self.claims, &self.refusals, &self.releases].map(|count| count.load(SeqCst))
    }

    /// Does nobody hold any port?
    pub fn none(&self) -> bool {
        self.ports.iter().all(|holders| holders.load(SeqCst) == 0)
    }
}

/// Keeps this thread on one CPU.
///
/// # Panics
/// If there is no such CPU.
pub fn pin_to(cpu: u16) {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu.into()).expect("so many CPUs can be");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).expect("the CPU is there");
}
