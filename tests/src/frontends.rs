//! A gateway whose guests call a world of both families and serve it by load balancers, frontends and addresses of their own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::Ipv6Net;

use crate::edge::{Edge, WithHook};
use crate::lab::{GuestSpec, Links, Namespace, Topology, TopologySpec, eventually, ping};
use crate::site::{LIMIT, SERVER, SOON, private, private6};

/// The address that load balancers of the tests have.
pub const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The same of IPv6.
pub const FRONTEND6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x10);
/// A server of the world's, by IPv6.
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// How many clients there are in the world: 198.51.100.1 and on.
pub const CLIENTS: u8 = 60;

/// Guests `vm1`, `vm2`, ... on devices `pc-vm1`, ..., each with ip configurations `v4` and perhaps `v6`, in subnets of
/// 10.0.0.0/16 and fd00:1::/48. What else there is, frontends and groups, the test writes itself.
#[derive(Clone, Debug)]
pub struct Frontends {
    hook: WithHook,
    /// The guests' subnets, one after the other.
    subnets: Vec<u8>,
    /// How they are attached.
    pub links: Links,
    ipv6: bool,
    /// [`FRONTEND`] is the host's own address, and it has no other.
    pub one_address: bool,
    /// More fields of a subnet, by its number.
    pub subnet: BTreeMap<u8, String>,
    /// More fields of a guest's ip configuration of IPv4.
    pub configuration: BTreeMap<u8, String>,
    /// The same of IPv6.
    pub configuration6: BTreeMap<u8, String>,
}

impl Frontends {
    /// Guests in these subnets, the first `vm1`.
    pub fn new(hook: WithHook, subnets: &[u8]) -> Self {
        Self {
            hook,
            subnets: subnets.to_vec(),
            links: Links::CleanVeth,
            ipv6: false,
            one_address: false,
            subnet: BTreeMap::new(),
            configuration: BTreeMap::new(),
            configuration6: BTreeMap::new(),
        }
    }

    /// The same with both families.
    pub fn with_ipv6(self) -> Self {
        Self { ipv6: true, ..self }
    }

    /// Number and subnet of each guest.
    fn guests(&self) -> impl Iterator<Item = (u8, u8)> {
        (1u8..).zip(self.subnets.iter().copied())
    }

    /// The policy; `rest` says what public addresses, load balancers and groups there are.
    pub fn yaml(&self, rest: &str) -> String {
        let hook = self.hook.word();
        let six = |text: String| if self.ipv6 { text } else { String::new() };
        let of = |more: &BTreeMap<u8, String>, key: u8| {
            more.get(&key).map(|more| format!(", {more}")).unwrap_or_default()
        };
        let space = six(", 'fd00:1::/48'".to_owned());
        let mut yaml = format!(
            "virtualNetworks:\n  - name: vnet\n    addressSpace: {{ addressPrefixes: [10.0.0.0/16{space}] }}\n    subnets:\n"
        );
        let mut subnets = self.subnets.clone();
        subnets.dedup();
        for subnet in subnets {
            let (prefix, more) = (six(format!(", 'fd00:1:0:{subnet}::/64'")), of(&self.subnet, subnet));
            yaml += &format!(
                "      - {{ name: Subnet{subnet}, addressPrefixes: [10.0.{subnet}.0/24{prefix}]{more} }}\n"
            );
        }
        yaml += "networkInterfaces:\n";
        for (number, subnet) in self.guests() {
            let (address, address6) = (private(subnet, number), private6(subnet, number));
            let (more, more6) = (of(&self.configuration, number), of(&self.configuration6, number));
            yaml += &format!(
                "  - name: vm{number}\n    device: pc-vm{number}\n    hook: {hook}\n    ipConfigurations:\n      \
                 - {{ name: v4, subnet: Subnet{subnet}, privateIPAddress: {address}{more} }}\n"
            );
            yaml += &six(format!(
                "      - {{ name: v6, subnet: Subnet{subnet}, privateIPAddress: '{address6}'{more6} }}\n"
            ));
        }
        yaml + &format!("uplinks: [{{ device: pc-up, hook: {hook} }}]\n{rest}")
    }

    /// The lab with this policy in force: every guest is known to the gateway, and so is the way to the world.
    ///
    /// # Panics
    /// If it does not come about.
    pub fn start(&self, rest: &str) -> Edge {
        let mut spec = TopologySpec::clean_veth(0);
        if self.one_address {
            spec = spec.one_public_address();
        }
        spec.links = self.links;
        spec.internet_extra = (1..=CLIENTS).map(|last| Ipv4Addr::new(198, 51, 100, last)).collect();
        spec.guests = self
            .guests()
            .map(|(number, subnet)| GuestSpec {
                address: private(subnet, number),
                gateway: Ipv4Addr::new(10, 0, subnet, 1),
                ipv6: self.ipv6.then(|| {
                    let gateway = Ipv6Addr::new(0xfd00, 1, 0, subnet.into(), 0, 0, 0, 1);
                    (Ipv6Net::new_assert(private6(subnet, number), 64), gateway)
                }),
                ..GuestSpec::numbered(number, "pc-vm")
            })
            .collect();
        let topology = Topology::build(&spec).unwrap();
        // The world is behind a router: XDP leaves what is on the uplink's own link to TC (ADR 0003).
        topology.internet().ip(&format!("route add 203.0.113.0/26 dev eth0 src {SERVER}")).unwrap();
        if self.ipv6 {
            give_ipv6(topology.gateway(), topology.internet());
        }
        let edge = Edge::start_in(topology, &self.yaml(rest)).unwrap();
        for (number, _) in self.guests() {
            let guest = edge.topology.guest(&format!("vm{number}"));
            // ARP and neighbour discovery are not judged; whether the ping is answered does not matter.
            ping(guest, SERVER.into(), 1, Duration::from_millis(200)).unwrap();
            if self.ipv6 {
                ping(guest, SERVER6.into(), 1, Duration::from_millis(200)).unwrap();
            }
        }
        edge
    }
}

/// Both ends of the uplink speak IPv6, and behind the router is [`SERVER6`].
fn give_ipv6(gateway: &Namespace, internet: &Namespace) {
    for scope in ["all", "default"] {
        internet.set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0").unwrap();
    }
    gateway.ip("address add 2001:db8:ffff::1/64 dev pc-up nodad").unwrap();
    gateway.ip("-6 route add default via 2001:db8:ffff::100 dev pc-up").unwrap();
    internet.ip("address add 2001:db8:ffff::100/64 dev eth0 nodad").unwrap();
    internet.ip(&format!("address add {SERVER6}/128 dev lo nodad")).unwrap();
    internet.ip(&format!("-6 route add 2001:db8:ffff::/122 dev eth0 src {SERVER6}")).unwrap();
    let router: IpAddr = "2001:db8:ffff::100".parse().expect("a literal");
    assert!(eventually(LIMIT, || ping(gateway, router, 1, SOON).is_ok_and(|reply| reply.received == 1)));
}
