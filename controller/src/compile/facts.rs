//! What the compiler must know of this host. Gathered by `hosts`, passed in as data: `compile` asks no kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::ports::LiveUnits;

/// The host as it is while a policy is compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// All addresses of this host's devices, of both families.
    pub addresses: Vec<IpAddr>,
    /// Devices by name. One that is missing makes no error: a guest's tap may come up later, and then the policy is
    /// compiled again.
    pub devices: BTreeMap<String, DeviceFacts>,
    /// `net.ipv4.ip_local_port_range`, inclusive.
    pub ephemeral: (u16, u16),
    /// Unix seconds.
    pub now: u64,
    /// Where flows live; a unit on which none does can go to another member.
    pub live: LiveUnits,
    /// Backends taken out by their probes, `lb/probes/alive/vm1/ipconfig1`.
    pub down: BTreeSet<String>,
}

impl HostFacts {
    /// Without what changes all the time by itself: is compared with earlier facts to see if a policy comes to something
    /// else now.
    pub fn lasting(self) -> Self {
        Self { now: 0, live: LiveUnits::new(), down: BTreeSet::new(), ..self }
    }
}

impl Default for HostFacts {
    /// A host without devices and with the kernel's default port range.
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            devices: BTreeMap::new(),
            ephemeral: (32768, 60999),
            now: 0,
            live: LiveUnits::new(),
            down: BTreeSet::new(),
        }
    }
}

/// One device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceFacts {
    pub ifindex: u32,
    /// The device's own hardware address.
    pub mac: [u8; 6],
    /// The hardware address guests behind it know their gateway by: its bridge's if it is enslaved, else its own.
    /// All zero means "its own".
    pub gateway_mac: [u8; 6],
}

impl DeviceFacts {
    /// The address to answer ARP with, and to send to guests from.
    pub fn answers_with(&self) -> [u8; 6] {
        if self.gateway_mac == [0; 6] { self.mac } else { self.gateway_mac }
    }
}
