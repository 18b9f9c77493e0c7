//! A gateway between guests and the internet, each in a namespace of its own.
//!
//! ```text
//!   vm1 eth0 ---- pc-vm1 .---------.
//!   vm2 eth0 ---- pc-vm2 | gateway | pc-up ---- eth0 internet (203.0.113.100, 198.51.100.1 ...)
//!   (taps:   pc-tap1, 2, '---------'
//!     on bridge pc-br0)
//! ```

use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;

use super::craft::Mac;
use super::identity::LabId;
use super::namespace::Namespace;
use super::sniffer::Sniffer;
use super::tap::TapGuest;
use super::topology_spec::{GuestSpec, Links, TopologySpec};

/// The far end of every veth: the guest's device and the internet's.
const FAR_DEVICE: &str = "eth0";

/// Where a guest lives.
pub enum GuestEnd {
    /// A namespace with its device `eth0`.
    Namespace(Namespace),
    /// A tap the test plays the guest on.
    Tap(TapGuest),
}

/// A built topology; everything goes when it is dropped.
///
/// The gateway forwards nothing by itself: `ip_forward` is 0, and guests find nobody who answers ARP for
/// their gateway. That is for the datapath under test.
pub struct Topology {
    // Taps go before the namespace they are in.
    guests: Vec<(GuestSpec, GuestEnd)>,
    gateway: Namespace,
    internet: Namespace,
    spec: TopologySpec,
}

impl Topology {
    /// Builds it.
    ///
    /// # Errors
    /// Without root, if the specification contradicts itself, or if `ip` or `ethtool` fails; what was built
    /// by then is gone.
    pub fn build(spec: &TopologySpec) -> anyhow::Result<Self> {
        spec.check()?;
        let lab = LabId::fresh();
        let mut topology = Topology {
            guests: Vec::new(),
            gateway: Namespace::create_in(&lab, "gw")?,
            internet: Namespace::create_in(&lab, "internet")?,
            spec: spec.clone(),
        };
        if spec.guests.iter().any(|guest| guest.ipv6.is_some()) {
            // Before there are devices, which take the default with them.
            enable_ipv6(&topology.gateway)?;
        }
        topology.attach_internet().context("attaching the internet")?;
        if spec.links == Links::BridgedTaps {
            let bridge = &spec.bridge_device;
            // Without a forwarding delay its ports forward at once.
            topology
                .gateway
                .ip(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0"))?;
            topology.gateway.ip(&format!("link set {bridge} up"))?;
        }
        for guest in &spec.guests {
            let end = match spec.links {
                Links::BridgedTaps => GuestEnd::Tap(topology.attach_tap(guest)?),
                Links::CleanVeth | Links::ContainerVeth => {
                    let namespace = Namespace::create_in(&lab, &guest.name)?;
                    topology
                        .attach_guest(guest, &namespace)
                        .with_context(|| format!("guest {}", guest.name))?;
                    GuestEnd::Namespace(namespace)
                }
            };
            topology.guests.push((guest.clone(), end));
        }
        Ok(topology)
    }

    /// What it was built from.
    pub fn spec(&self) -> &TopologySpec {
        &self.spec
    }

    /// Takes a guest's link away, at both ends, as the end of a container or a machine does.
    ///
    /// # Errors
    /// If it is not there.
    pub fn unplug(&self, guest: &str) -> anyhow::Result<()> {
        self.gateway.ip(&format!("link del {}", self.guest_spec(guest).device)).map(drop)
    }

    /// Makes it again, with all that the guest had on it.
    ///
    /// # Errors
    /// If it is there.
    pub fn plug(&self, guest: &str) -> anyhow::Result<()> {
        self.attach_guest(self.guest_spec(guest), self.guest(guest))
    }

    /// The namespace of the gateway: where the datapath under test is attached.
    pub fn gateway(&self) -> &Namespace {
        &self.gateway
    }

    /// The namespace of the internet, its device `eth0`.
    pub fn internet(&self) -> &Namespace {
        &self.internet
    }

    /// The internet's address on the link, with a port: where servers listen.
    pub fn internet_socket(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.spec.internet_address.addr()), port)
    }

    /// The namespace of a guest, its device `eth0`.
    ///
    /// # Panics
    /// If there is no such guest or it is on a tap.
    pub fn guest(&self, name: &str) -> &Namespace {
        match self.find(name) {
            (_, GuestEnd::Namespace(namespace)) => namespace,
            _ => panic!("guest {name} is on a tap and has no namespace"),
        }
    }

    /// The tap of a guest.
    ///
    /// # Panics
    /// If there is no such guest or it is not on a tap.
    pub fn tap(&self, name: &str) -> &TapGuest {
        match self.find(name) {
            (_, GuestEnd::Tap(tap)) => tap,
            _ => panic!("guest {name} is not on a tap"),
        }
    }

    /// What a guest was built from.
    ///
    /// # Panics
    /// If there is no such guest.
    pub fn guest_spec(&self, name: &str) -> &GuestSpec {
        &self.find(name).0
    }

    /// All guests, in the order of the specification.
    pub fn guests(&self) -> &[(GuestSpec, GuestEnd)] {
        &self.guests
    }

    /// Starts watching the internet's end of the uplink: the wire.
    pub fn sniff_internet(&self) -> anyhow::Result<Sniffer> {
        Sniffer::start(&self.internet, FAR_DEVICE)
    }

    /// Starts watching a guest's end of its veth.
    ///
    /// # Panics
    /// As [`Topology::guest`]; a tap guest has [`TapGuest::received`].
    pub fn sniff_guest(&self, name: &str) -> anyhow::Result<Sniffer> {
        Sniffer::start(self.guest(name), FAR_DEVICE)
    }

    fn find(&self, name: &str) -> &(GuestSpec, GuestEnd) {
        let found = self.guests.iter().find(|(spec, _)| spec.name == name);
        found.unwrap_or_else(|| panic!("the topology has no guest {name}"))
    }

    fn attach_internet(&self) -> anyhow::Result<()> {
        let TopologySpec { uplink_device: uplink, uplink_address, internet_address, .. } = &self.spec;
        self.add_veth(uplink, TopologySpec::UPLINK_MAC, &self.internet, TopologySpec::INTERNET_MAC)?;
        self.gateway.ip(&format!("address add {uplink_address} dev {uplink}"))?;
        self.internet.ip(&format!("address add {internet_address} dev {FAR_DEVICE}"))?;
        for extra in &self.spec.internet_extra {
            self.internet.ip(&format!("address add {extra}/32 dev lo"))?;
        }
        self.gateway.ip(&format!("route add default via {}", internet_address.addr()))?;
        Ok(())
    }

    fn attach_guest(&self, guest: &GuestSpec, namespace: &Namespace) -> anyhow::Result<()> {
        if guest.ipv6.is_some() {
            enable_ipv6(namespace)?;
        }
        self.add_veth(&guest.device, guest.gateway_mac, namespace, guest.mac)?;
        if let Some((address, gateway)) = guest.ipv6 {
            // Usable at once, without the second of duplicate address detection.
            namespace.ip(&format!("address add {address} dev {FAR_DEVICE} nodad"))?;
            namespace.ip(&format!("-6 route add default via {gateway} dev {FAR_DEVICE}"))?;
        }
        namespace.ip(&format!("address add {}/{} dev {FAR_DEVICE}", guest.address, guest.prefix_len))?;
        for extra in &guest.extra_addresses {
            namespace.ip(&format!("address add {extra} dev {FAR_DEVICE}"))?;
        }
        namespace.ip(&format!("route add default via {} dev {FAR_DEVICE} onlink", guest.gateway))?;
        Ok(())
    }

    fn attach_tap(&self, guest: &GuestSpec) -> anyhow::Result<TapGuest> {
        let tap = TapGuest::open(&self.gateway, &guest.device, guest.mac, guest.address)?;
        let (device, bridge, mac) = (&guest.device, &self.spec.bridge_device, mac_text(guest.gateway_mac));
        self.gateway.ip(&format!("link set {device} address {mac} master {bridge} up"))?;
        Ok(tap)
    }

    /// Makes a veth from `device` in the gateway to `eth0` in `far`, made where it belongs so that no name of
    /// ours ever shows among the machine's devices, and brings both ends up.
    fn add_veth(&self, device: &str, mac: Mac, far: &Namespace, far_mac: Mac) -> anyhow::Result<()> {
        let (mac, far_mac, far_name) = (mac_text(mac), mac_text(far_mac), far.name());
        self.gateway.ip(&format!(
            "link add {device} address {mac} type veth peer name {FAR_DEVICE} address {far_mac} netns {far_name}"
        ))?;
        if self.spec.links == Links::CleanVeth {
            // GRO gives a veth NAPI. Not on the gateway's ends: merged segments there would not be the real
            // ones.
            let off = ["tx", "off", "tso", "off", "gso", "off"];
            self.gateway.run(&[&["ethtool", "-K", device], &off[..]].concat())?;
            far.run(&[&["ethtool", "-K", FAR_DEVICE], &off[..], &["gro", "on"]].concat())?;
        }
        self.gateway.ip(&format!("link set {device} up"))?;
        far.ip(&format!("link set {FAR_DEVICE} up"))?;
        Ok(())
    }
}

fn enable_ipv6(namespace: &Namespace) -> anyhow::Result<()> {
    for scope in ["all", "default"] {
        namespace.set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0")?;
    }
    Ok(())
}

/// `02:50:43:00:00:01`
fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
