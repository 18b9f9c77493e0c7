//! Whose SNAT ports are short, and towards where: what the health events are about.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use portcullis_common::policy::ALLOC_TCP;

use crate::daemon::InForce;
use crate::flows::allocations::{Allocations, WITH_PORTS};
use crate::flows::end;
use crate::flows::ports::{Holder, PortUse};

/// Which event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    High,
    Exhausted,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct About {
    pub kind: Kind,
    pub guest: String,
    /// One public address, or all the guest has.
    pub frontends: Vec<IpAddr>,
    /// Index of [`WITH_PORTS`].
    pub which: usize,
    /// TCP, but by the profile `rfc`: ports are short towards a destination only.
    pub destination: Option<SocketAddr>,
}

/// Ports found taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub about: About,
    pub taken: u32,
    pub of: u32,
}

impl About {
    /// The name Azure has for it.
    pub fn event(&self) -> &'static str {
        match self.kind {
            Kind::High => "HighSnatPortUsage",
            Kind::Exhausted => "SnatPortExhaustion",
        }
    }

    /// As Azure has it.
    pub fn severity(&self) -> &'static str {
        match self.kind {
            Kind::High => "Warning",
            Kind::Exhausted => "Critical",
        }
    }

    /// Its public addresses.
    pub fn frontend(&self) -> String {
        if self.frontends.is_empty() {
            // All it will have drains elsewhere still.
            return "no public address yet".to_owned();
        }
        let all: Vec<String> = self.frontends.iter().map(IpAddr::to_string).collect();
        all.join(", ")
    }

    /// `vm1/ipconfig1 on 203.0.113.10, tcp towards 198.51.100.7:443`
    pub fn who(&self) -> String {
        let towards =
            self.destination.map_or_else(String::new, |to| format!(" towards {}", end(to.ip(), to.port())));
        format!("{} on {}, {}{towards}", self.guest, self.frontend(), WITH_PORTS[self.which].2)
    }
}

/// Everything that is short right now.
pub fn findings(in_force: &InForce, allocations: &Allocations, used: &PortUse) -> Vec<Finding> {
    let mut found = Vec::new();
    let by_destination = !in_force.loaded.network.snat.tcp_port_per_socket;
    for guest in in_force.guests() {
        for (which, (protocol, ..)) in WITH_PORTS.iter().enumerate() {
            let protocol = if which == 2 && guest.address.is_ipv6() { 58 } else { *protocol };
            let mut of_guest: Vec<(IpAddr, u32)> = Vec::new();
            // Taken on all addresses together, by destination.
            let mut sums: HashMap<Option<SocketAddr>, u32> = HashMap::new();
            for (&(_, frontend, of), units) in allocations.of_endpoint(guest.number) {
                if of != which || units.ports() == 0 {
                    continue;
                }
                of_guest.push((frontend, units.ports()));
                let holder = Holder { hop: guest.endpoint.next_hop, frontend, protocol };
                let Some(taken) = used.of(holder) else { continue };
                let about = |destination| About {
                    kind: Kind::High,
                    guest: guest.name.to_owned(),
                    frontends: vec![frontend],
                    which,
                    destination,
                };
                let mut short = |destination, ports: u32| {
                    *sums.entry(destination).or_default() += ports;
                    if u64::from(ports) * 4 > u64::from(units.ports()) * 3 {
                        found.push(Finding { about: about(destination), taken: ports, of: units.ports() });
                    }
                };
                if which == ALLOC_TCP && by_destination {
                    for (&to, &ports) in &taken.destinations {
                        short(Some(to), ports);
                    }
                } else {
                    let ports = taken.ports.keys().filter(|&&port| units.may_claim(port)).count();
                    short(None, ports as u32);
                }
            }
            let all: u32 = of_guest.iter().map(|(_, ports)| ports).sum();
            let mut frontends: Vec<IpAddr> = of_guest.into_iter().map(|(address, _)| address).collect();
            frontends.sort_unstable();
            for (destination, taken) in sums.into_iter().filter(|(_, taken)| all > 0 && *taken >= all) {
                let about = About {
                    kind: Kind::Exhausted,
                    guest: guest.name.to_owned(),
                    frontends: frontends.clone(),
                    which,
                    destination,
                };
                found.push(Finding { about, taken, of: all });
            }
        }
    }
    found
}
