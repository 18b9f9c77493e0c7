//! Which SNAT ports are taken, by whom and towards where: one look over both flow tables, which every answer about ports
//! is made of (`snat`, health events, metrics, `explain`).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use portcullis_common::flow::{Ctl, FLAG_FORWARD, FLAG_MAPPED, FLAG_SNAT};
use portcullis_common::layout::{HalfRecord, KIND_FLOW, KIND_MAPPING, WORLD};
use portcullis_common::tcp_state::{self, State};

use super::list::address;
use crate::datapath::{FlowTable, now_tick};

/// Whose ports: a guest's (by its next hop), on one public address, for one protocol (IANA number).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder {
    pub hop: u16,
    pub frontend: IpAddr,
    pub protocol: u8,
}

/// Flows on one public port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnPort {
    pub live: u32,
    /// TCP: closed or reset, and held back until nothing of them can be under way any more.
    pub ended: u32,
}

/// Everything one holder has taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Taken ports. One without flows is a UDP socket's or a ping's that has gone quiet.
    pub ports: HashMap<u16, OnPort>,
    /// Ports taken towards each destination, those held back among them: they are what a new flow there cannot have. A
    /// ping has no destination port.
    pub destinations: HashMap<SocketAddr, u32>,
}

/// All holders.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortUse {
    holders: HashMap<Holder, Taken>,
    /// Live flows of IPv4 and of IPv6, translated or not.
    flows: [u64; 2],
}

/// What a half-record says about a public port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    /// The half of a flow under that port that the world sees.
    Flow { hop: u16, ended: bool },
    /// The port is an inside socket's, whatever flows it has.
    Socket { hop: u16 },
}

fn says(record: &HalfRecord) -> Option<Says> {
    let ctl = Ctl(record.ctl);
    // Of a guest's flows the answers' half, of those that strangers opened over a mapping the strangers'.
    let (out, opens) = (ctl.flags() & FLAG_SNAT != 0, ctl.flags() & FLAG_FORWARD != 0);
    let claims = out != opens && (out || ctl.flags() & FLAG_MAPPED != 0);
    if !claims || record.key.network != WORLD {
        return None;
    }
    if record.key.kind == KIND_MAPPING {
        return Some(Says::Socket { hop: record.ingress() });
    }
    let tcp = record.key.protocol == 6;
    let ended = tcp && matches!(tcp_state::state(ctl.tcp()), State::Closed | State::Reset);
    // Either goes to the guest.
    Some(Says::Flow { hop: record.next_hop(), ended })
}

/// Is it the half of the side that opened a flow?
fn opens(record: &HalfRecord) -> bool {
    record.key.kind == KIND_FLOW && Ctl(record.ctl).flags() & FLAG_FORWARD != 0
}

impl PortUse {
    /// Looks now.
    pub fn look(tables: [&FlowTable; 2]) -> Self {
        let mut found = Self::default();
        let now = now_tick();
        for (table, flows) in tables.into_iter().zip(0..) {
            for (slot, record) in table.iter() {
                if opens(&record) {
                    found.flows[flows] += u64::from(table.is_alive(&record, now));
                }
                if let Some(says) = says(&record)
                    && table.is_alive(&record, now)
                    && let Some([remote, public]) = outside(table, slot, &record)
                {
                    found.note(says, record.key.protocol, remote, public);
                }
            }
        }
        found
    }

    fn note(&mut self, says: Says, protocol: u8, remote: SocketAddr, public: SocketAddr) {
        let (Says::Flow { hop, .. } | Says::Socket { hop }) = says;
        let taken = self.holders.entry(Holder { hop, frontend: public.ip(), protocol }).or_default();
        let port = taken.ports.entry(public.port()).or_default();
        if let Says::Flow { ended, .. } = says {
            *(if ended { &mut port.ended } else { &mut port.live }) += 1;
            // No two flows have the same port and the same destination.
            *taken.destinations.entry(remote).or_default() += 1;
        }
    }

    /// What this holder has taken.
    pub fn of(&self, holder: Holder) -> Option<&Taken> {
        self.holders.get(&holder)
    }

    /// Live flows of IPv4 and of IPv6.
    pub fn flows(&self) -> [u64; 2] {
        self.flows
    }

    /// All holders.
    pub fn holders(&self) -> impl Iterator<Item = (&Holder, &Taken)> {
        self.holders.iter()
    }
}

impl Taken {
    /// The destination towards which most ports are taken.
    pub fn busiest(&self) -> Option<(SocketAddr, u32)> {
        // By address, too, so that the answer does not change from one look to the next.
        self.destinations.iter().map(|(to, n)| (*to, *n)).max_by_key(|&(to, n)| (n, std::cmp::Reverse(to)))
    }
}

/// The two ends of a record seen in the world: who it comes from, and the public address and port.
fn outside(table: &FlowTable, slot: u32, record: &HalfRecord) -> Option<[SocketAddr; 2]> {
    let key = &record.key;
    let [source, destination] = if table.is_v6() {
        let [source, destination, ..] = table.addresses6(slot, record)?;
        [source, destination].map(IpAddr::V6)
    } else {
        [key.source, key.destination].map(|a| IpAddr::V4(address(a)))
    };
    let at = |address: IpAddr, port: u16| SocketAddr::new(address, u16::from_be(port));
    let [remote, public] = outside_ports(record);
    Some([at(source, remote), at(destination, public)])
}

/// Ports of a record seen in the world: who it comes from, and the public one. A ping has one identifier, which stands where
/// whoever asks has his port.
pub(super) fn outside_ports(record: &HalfRecord) -> [u16; 2] {
    let (source, destination) = (record.key.source_port, record.key.destination_port);
    let asks = matches!(record.key.protocol, 1 | 58) && opens(record);
    if asks { [destination, source] } else { [source, destination] }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use portcullis_common::flow::LIVE;
    use portcullis_common::layout::{FlowKey, hops};

    /// A look that found these TCP flows of one guest: destination, public port, has it ended?
    pub(crate) fn found(
        hop: u16,
        frontend: &str,
        protocol: u8,
        flows: &[(&str, u16, bool)],
        quiet: &[u16],
    ) -> PortUse {
        let mut used = PortUse::default();
        let public = |port| SocketAddr::new(frontend.parse().unwrap(), port);
        let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
        for &(remote, port, ended) in flows {
            used.note(Says::Flow { hop, ended }, protocol, remote.parse().unwrap(), public(port));
        }
        for &port in quiet {
            used.note(Says::Socket { hop }, protocol, nobody, public(port));
        }
        used
    }

    #[test]
    fn what_the_world_sees_of_a_flow_and_the_outer_mapping_tell_of_a_port() {
        let record = |protocol, kind, network, flags| HalfRecord {
            key: FlowKey { protocol, kind, network, ..FlowKey::default() },
            ctl: Ctl::new(1, LIVE, 0, 0, flags).0,
            hops: hops(7, 8),
            ..HalfRecord::default()
        };
        assert_eq!(says(&record(6, KIND_FLOW, WORLD, FLAG_SNAT)), Some(Says::Flow { hop: 7, ended: false }));
        assert_eq!(says(&record(17, KIND_MAPPING, WORLD, FLAG_SNAT)), Some(Says::Socket { hop: 8 }));
        assert_eq!(says(&record(6, KIND_FLOW, 1, FLAG_SNAT | FLAG_FORWARD)), None);
        assert_eq!(says(&record(17, KIND_MAPPING, 1, FLAG_SNAT | FLAG_FORWARD)), None);
        assert_eq!(says(&record(6, KIND_FLOW, WORLD, 0)), None, "an instance-level address needs no port");
        let stranger = record(6, KIND_FLOW, WORLD, FLAG_MAPPED | FLAG_FORWARD);
        assert_eq!(says(&stranger), Some(Says::Flow { hop: 7, ended: false }));
        assert_eq!(says(&record(6, KIND_FLOW, WORLD, FLAG_FORWARD)), None, "a listener's is no SNAT port");
        assert_eq!(says(&record(6, KIND_FLOW, 1, FLAG_MAPPED)), None, "what answers the stranger");
        let ended = HalfRecord {
            ctl: Ctl::new(1, LIVE, tcp_state::RESET, 0, FLAG_SNAT).0,
            ..record(6, KIND_FLOW, WORLD, FLAG_SNAT)
        };
        assert_eq!(says(&ended), Some(Says::Flow { hop: 7, ended: true }));
    }

    #[test]
    fn the_identifier_of_a_strangers_ping_is_the_public_port() {
        let record = |protocol, flags| HalfRecord {
            key: FlowKey { protocol, source_port: 9, destination_port: 7, ..FlowKey::default() },
            ctl: Ctl::new(1, LIVE, 0, 0, flags).0,
            ..HalfRecord::default()
        };
        assert_eq!(outside_ports(&record(1, FLAG_MAPPED | FLAG_FORWARD)), [7, 9]);
        assert_eq!(outside_ports(&record(1, FLAG_MAPPED | FLAG_SNAT)), [9, 7], "what answers a guest's");
        assert_eq!(outside_ports(&record(17, FLAG_MAPPED | FLAG_FORWARD)), [9, 7]);
    }

    #[test]
    fn ports_are_counted_once_and_destinations_by_the_ports_taken_towards_them() {
        let flows = [
            ("198.51.100.1:443", 1024, false),
            ("198.51.100.2:443", 1024, false),
            ("198.51.100.1:443", 1025, true),
        ];
        let used = found(7, "203.0.113.10", 6, &flows, &[]);
        let holder = Holder { hop: 7, frontend: "203.0.113.10".parse().unwrap(), protocol: 6 };
        let taken = used.of(holder).unwrap();
        assert_eq!(taken.ports.len(), 2);
        assert_eq!(taken.ports[&1024], OnPort { live: 2, ended: 0 });
        assert_eq!(taken.ports[&1025], OnPort { live: 0, ended: 1 });
        assert_eq!(taken.busiest(), Some(("198.51.100.1:443".parse().unwrap(), 2)), "held back is taken");
        assert_eq!(used.of(Holder { hop: 8, ..holder }), None);
    }

    #[test]
    fn a_quiet_sockets_port_is_taken_without_a_flow() {
        let used = found(7, "203.0.113.10", 17, &[("198.51.100.1:53", 2048, false)], &[2048, 2049]);
        let holder = Holder { hop: 7, frontend: "203.0.113.10".parse().unwrap(), protocol: 17 };
        let taken = used.of(holder).unwrap();
        assert_eq!(taken.ports[&2049], OnPort::default());
        assert_eq!(taken.ports[&2048].live, 1);
        assert_eq!(taken.destinations.len(), 1);
    }
}
