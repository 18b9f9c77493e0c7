//! A LAN port with many guests behind it, told apart by their addresses: one device, one namespace that has all of
//! their addresses, and no neighbour of the host's for any of them (the kernel's limit of 1,024 is for the machine).

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::edge::{Edge, WithHook};
use crate::lab::{Craft, Namespace, RawSender, Topology, TopologySpec, eventually, ping};

/// A server of the world's, one routed hop away.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The public address all guests share.
pub const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The namespace, and the end of its name.
const NAME: &str = "lan";

/// Guests `g0`, `g1`, ... behind one device, in one pool behind [`FRONTEND`].
#[derive(Clone, Debug)]
pub struct Lan {
    hook: WithHook,
    guests: u16,
    /// `allocatedOutboundPorts`; 0: by the size of the pool.
    pub ports: u32,
    /// More of the policy, as `timeouts: ...`.
    pub extra: String,
}

impl Lan {
    /// At most 2,000 guests.
    pub fn new(hook: WithHook, guests: u16) -> Self {
        assert!(guests <= 2000, "the subnet has room for 2,000 guests");
        Lan { hook, guests, ports: 0, extra: String::new() }
    }

    /// The address of a guest, counted from 0.
    pub fn address(guest: u16) -> Ipv4Addr {
        // The first three of a subnet are not for guests.
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 4).to_bits() + u32::from(guest))
    }

    /// The namespace the guests are in.
    pub fn inside(edge: &Edge) -> &Namespace {
        edge.topology.guest(NAME)
    }

    /// The policy.
    pub fn yaml(&self) -> String {
        let hook = self.hook.word();
        let mut yaml = String::from(
            "virtualNetworks: [{ name: lan, addressSpace: { addressPrefixes: [10.0.0.0/16] }, \
             subnets: [{ name: guests, addressPrefix: 10.0.0.0/21 }] }]\nnetworkInterfaces:\n",
        );
        for guest in 0..self.guests {
            let _ = writeln!(
                yaml,
                "  - {{ name: g{guest}, device: pc-lan, hook: {hook}, ipConfigurations: [{{ subnet: guests, \
                 privateIPAddress: {} }}] }}",
                Self::address(guest)
            );
        }
        let members: Vec<String> = (0..self.guests).map(|guest| format!("g{guest}")).collect();
        let _ = write!(
            yaml,
            "publicIPAddresses: [{{ name: pip, ipAddress: {FRONTEND}, announce: proxy }}]\n\
             loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip }}]\n    \
             backendAddressPools: [{{ name: pool, backendIPConfigurations: [{}] }}]\n    \
             outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, \
             protocol: All, allocatedOutboundPorts: {} }}]\nuplinks: [{{ device: pc-up, hook: {hook} }}]\n{}",
            members.join(", "),
            self.ports,
            self.extra
        );
        yaml
    }

    /// The lab with the policy in force; every guest has announced itself and the way to [`SERVER`] is known.
    ///
    /// # Panics
    /// If it does not come about.
    pub fn start(&self) -> Edge {
        let mut spec = TopologySpec::clean_veth(1);
        let port = &mut spec.guests[0];
        (port.name, port.device, port.prefix_len) = (NAME.to_owned(), "pc-lan".to_owned(), 21);
        let (mac, gateway) = (port.mac, port.gateway);
        let topology = Topology::build(&spec).unwrap();
        let inside = topology.guest(NAME);
        let mut addresses = String::from("ip -batch - <<end\n");
        for guest in 1..self.guests {
            let _ = writeln!(addresses, "address add {}/21 dev eth0", Self::address(guest));
        }
        inside.run(&["sh", "-c", &(addresses + "end")]).unwrap();
        let edge = Edge::start_in(topology, &self.yaml()).unwrap();
        let inside = Self::inside(&edge);
        // The kernel asks for its gateway once, from one of its addresses; a machine for each guest would ask for its
        // own.
        let sender = RawSender::open(inside, "eth0").unwrap();
        for guest in 0..self.guests {
            sender.send(&Craft::arp_request(mac, Self::address(guest), gateway)).unwrap();
            if guest % 64 == 63 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let known = eventually(Duration::from_secs(5), || {
            ping(inside, SERVER.into(), 1, Duration::from_millis(500)).is_ok_and(|reply| reply.received == 1)
        });
        assert!(known, "the first guest reaches the world");
        edge
    }

    /// TCP ports in use now and ports owned, by guest, as `snat` tells.
    ///
    /// # Panics
    /// If it does not tell.
    pub fn tcp_ports(edge: &Edge) -> Vec<PortUse> {
        let answer = edge.ask(&["snat"]).unwrap();
        let number = |value: &serde_json::Value| value.as_u64().unwrap();
        let tcp = |row: &serde_json::Value, what: &str| {
            let rows = row["ports"].as_array().unwrap().iter().filter(|ports| ports["protocol"] == "tcp");
            rows.map(|ports| number(&ports[what])).sum::<u64>()
        };
        let guests = answer["guests"].as_array().unwrap().iter().map(|row| PortUse {
            guest: row["guest"]
                .as_str()
                .unwrap()
                .trim_start_matches('g')
                .split('/')
                .next()
                .unwrap()
                .parse()
                .unwrap(),
            used: tcp(row, "used") + tcp(row, "holding"),
            free: tcp(row, "free"),
            exhausted: number(&row["exhaustedSampled"]),
            ranges: row["ranges"]
                .as_array()
                .unwrap()
                .iter()
                .map(|range| (number(&range["first"]) as u16, number(&range["last"]) as u16))
                .collect(),
        });
        guests.collect()
    }
}

/// What `snat` says about a guest of a [`Lan`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortUse {
    pub guest: u16,
    /// TCP ports with a flow that lives, or has ended and is held back.
    pub used: u64,
    pub free: u64,
    /// Sampled refusals.
    pub exhausted: u64,
    /// The ports it owns, inclusive.
    pub ranges: Vec<(u16, u16)>,
}

impl PortUse {
    /// Is the port the guest's?
    pub fn owns(&self, port: u16) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }
}
