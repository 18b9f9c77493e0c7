//! A gateway with guests in subnets of their own, each with a private and a public address, and questions to it in
//! terms of groups: who reaches whom, and by which rules.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use ipnet::Ipv6Net;

use crate::edge::{Edge, WithHook};
use crate::lab::{GuestSpec, Namespace, Topology, TopologySpec, ping, tcp_exchange};

/// How long what should happen may take.
pub const LIMIT: Duration = Duration::from_secs(5);
/// Less than the second after which a SYN is sent again: what is refused is refused once.
pub const SOON: Duration = Duration::from_millis(600);
/// A server of the world's.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// A socket's address.
pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    (address.into(), port).into()
}

/// The private address of guest `number` in `subnet`: 10.0.subnet.4 is the first's.
pub fn private(subnet: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, subnet, 3 + number)
}

/// Its private address of IPv6: fd00:1:0:subnet::4 is the first's.
pub fn private6(subnet: u8, number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, subnet.into(), 0, 0, 0, 3 + u16::from(number))
}

/// The instance-level address under which the world knows guest `number`.
pub fn public(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 20 + number)
}

/// Guests `vm1`, `vm2`, ... in these subnets of 10.0.0.0/16, each with a public address.
#[derive(Clone, Debug)]
pub struct Site {
    hook: WithHook,
    /// The guests' subnets, one after the other.
    subnets: Vec<u8>,
    /// Guests have IPv6 too, in fd00:1::/48.
    ipv6: bool,
    /// More fields of a subnet, by its number.
    pub subnet: BTreeMap<u8, String>,
    /// More fields of a guest's interface.
    pub nic: BTreeMap<u8, String>,
    /// More fields of its ip configurations.
    pub configuration: BTreeMap<u8, String>,
}

impl Site {
    /// Guests in these subnets, the first `vm1`.
    pub fn new(hook: WithHook, subnets: &[u8]) -> Self {
        let none = BTreeMap::new;
        let subnets = subnets.to_vec();
        Self { hook, subnets, ipv6: false, subnet: none(), nic: none(), configuration: none() }
    }

    /// The same with both families.
    pub fn with_ipv6(self) -> Self {
        Self { ipv6: true, ..self }
    }

    /// Number and subnet of each guest.
    pub fn guests(&self) -> impl Iterator<Item = (u8, u8)> {
        (1u8..).zip(self.subnets.iter().copied())
    }

    /// The policy; `rest` is the part of it that says what groups there are.
    pub fn yaml(&self, rest: &str) -> String {
        let hook = self.hook.word();
        let six = |text: String| if self.ipv6 { text } else { String::new() };
        let space = six(", 'fd00:1::/48'".to_owned());
        let mut yaml = format!(
            "virtualNetworks:\n  - name: vnet\n    addressSpace: {{ addressPrefixes: [10.0.0.0/16{space}] }}\n    subnets:\n"
        );
        let mut subnets = self.subnets.clone();
        subnets.dedup();
        let of = |more: &BTreeMap<u8, String>, key: u8| {
            more.get(&key).map(|more| format!(", {more}")).unwrap_or_default()
        };
        for subnet in subnets {
            let more = of(&self.subnet, subnet);
            let prefix = six(format!(", 'fd00:1:0:{subnet}::/64'"));
            yaml += &format!(
                "      - {{ name: Subnet{subnet}, addressPrefixes: [10.0.{subnet}.0/24{prefix}]{more} }}\n"
            );
        }
        yaml += "networkInterfaces:\n";
        for (number, subnet) in self.guests() {
            let more = of(&self.configuration, number);
            let (address, address6) = (private(subnet, number), private6(subnet, number));
            yaml += &format!(
                "  - name: vm{number}\n    device: pc-vm{number}\n    hook: {hook}\n    ipConfigurations:\n      \
                 - {{ subnet: Subnet{subnet}, privateIPAddress: {address}, publicIPAddress: pip{number}{more} }}\n"
            );
            yaml +=
                &six(format!("      - {{ subnet: Subnet{subnet}, privateIPAddress: '{address6}'{more} }}\n"));
            if let Some(nic) = self.nic.get(&number) {
                yaml += &format!("    {nic}\n");
            }
        }
        yaml += "publicIPAddresses:\n";
        for (number, _) in self.guests() {
            yaml += &format!("  - {{ name: pip{number}, ipAddress: {}, announce: proxy }}\n", public(number));
        }
        yaml + &format!("uplinks: [{{ device: pc-up, hook: {hook} }}]\n{rest}")
    }

    /// The lab with this policy in force, and every guest known to the gateway and to the world.
    pub fn start(&self, rest: &str) -> Edge {
        let mut spec = TopologySpec::clean_veth(0);
        spec.guests = self
            .guests()
            .map(|(number, subnet)| GuestSpec {
                address: private(subnet, number),
                gateway: Ipv4Addr::new(10, 0, subnet, 1),
                ipv6: self.ipv6.then(|| ipv6(subnet, number)),
                ..GuestSpec::numbered(number, "pc-vm")
            })
            .collect();
        let topology = Topology::build(&spec).unwrap();
        for (number, _) in self.guests() {
            // The world's clients are behind a router: XDP leaves what is on the uplink's own link to TC (ADR 0003).
            topology
                .internet()
                .ip(&format!("route add {}/32 dev eth0 src {SERVER}", public(number)))
                .unwrap();
        }
        let edge = Edge::start_in(topology, &self.yaml(rest)).unwrap();
        for (number, _) in self.guests() {
            let guest = edge.topology.guest(&format!("vm{number}")).clone();
            // ARP is not judged by groups; whether the ping is answered does not matter.
            ping(&guest, SERVER.into(), 1, SOON).unwrap();
            ping(edge.topology.internet(), public(number).into(), 1, Duration::from_millis(100)).unwrap();
        }
        edge
    }
}

/// A guest's address of IPv6 with its subnet's prefix, and its gateway.
fn ipv6(subnet: u8, number: u8) -> (Ipv6Net, Ipv6Addr) {
    let gateway = Ipv6Addr::new(0xfd00, 1, 0, subnet.into(), 0, 0, 0, 1);
    (Ipv6Net::new_assert(private6(subnet, number), 64), gateway)
}

/// Puts another policy in force.
///
/// # Panics
/// If it is refused.
pub fn apply(edge: &Edge, yaml: &str) {
    let before = edge.generation().unwrap();
    let (applied, said) = edge.apply(yaml).unwrap();
    assert!(applied, "{said}\n{yaml}");
    assert_eq!(edge.generation().unwrap(), before + 1);
}

/// Hits of every rule by `group direction name`.
pub fn hits(edge: &Edge) -> BTreeMap<String, u64> {
    let answer = edge.ask(&["rules"]).unwrap();
    let key = |rule: &serde_json::Value| {
        let text = |key: &str| rule[key].as_str().unwrap().to_owned();
        format!("{} {} {}", text("group"), text("direction"), text("name"))
    };
    answer["rules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rule| (key(rule), rule["hits"].as_u64().unwrap()))
        .collect()
}

/// Runs `work` and asserts that it moved the counters of these rules, each by one, and of no other.
///
/// # Panics
/// If not, with `what`.
pub fn rules_met<T>(edge: &Edge, what: &str, expected: &[&str], work: impl FnOnce() -> T) -> T {
    let before = hits(edge);
    let result = work();
    let moved: BTreeMap<String, u64> = hits(edge)
        .into_iter()
        .map(|(rule, now)| (rule.clone(), now - before.get(&rule).unwrap_or(&0)))
        .filter(|(_, by)| *by != 0)
        .collect();
    let expected: BTreeMap<String, u64> = expected.iter().map(|rule| ((*rule).to_owned(), 1)).collect();
    assert_eq!(moved, expected, "{what}");
    result
}

/// Opens a TCP connection and sends a word through it, or does not; and these rules are met, each once.
///
/// # Panics
/// If that is not so, or a connection that is denied is answered, with `what`.
pub fn connects(edge: &Edge, what: &str, from: &Namespace, to: SocketAddr, opens: bool, rules: &[&str]) {
    let outcome = rules_met(edge, what, rules, || {
        tcp_exchange(from, None, to, b"word", if opens { LIMIT } else { SOON })
    });
    match outcome {
        Ok(_) => assert!(opens, "{what}: opened"),
        Err(error) => {
            assert!(!opens, "{what}: {error}");
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{what}: denied is silent");
        }
    }
}

/// Does a connection to an echo server bring a byte back?
pub fn echoes(stream: &mut TcpStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    stream.write_all(b"?").is_ok() && matches!(stream.read(&mut [0; 1]), Ok(1))
}
