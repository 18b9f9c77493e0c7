//! ICMP errors of both families for the packet tables, with what each must look like on the other side: made anew from the packet
//! that is quoted there, so that every byte and every checksum can be compared.

use std::net::{IpAddr, SocketAddr};

use portcullis_common::Reason;
use portcullis_common::engine::Hook;
use portcullis_common::packet::checksum;

use crate::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC};
use crate::lab::{Craft, Craft6, Mac, TcpFlags};
use crate::ledger::Ledger;

/// vm1 and vm2 leave by port and are behind a load balancer, vm3 has addresses of its own; both families.
pub const POLICY: &str = r#"
# frames for other stations are told apart
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16, 'fd00:1::/48'] }
    subnets:
      - { name: web, addressPrefixes: [10.0.1.0/24, 'fd00:1:0:1::/64'] }
      - { name: own, addressPrefixes: [10.0.2.0/24, 'fd00:1:0:2::/64'], networkSecurityGroup: own }
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ name: v4, subnet: web, privateIPAddress: 10.0.1.4 }, { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::4' }] }
  - { name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{ name: v4, subnet: web, privateIPAddress: 10.0.1.5 }, { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::5' }] }
  - { name: vm3, device: vm3, macAddress: '02:00:00:00:00:03', ipConfigurations: [{ name: v4, subnet: own, privateIPAddress: 10.0.2.4, publicIPAddress: pip3 }, { name: v6, subnet: own, privateIPAddress: 'fd00:1:0:2::4', publicIPAddress: pip36 }] }
networkSecurityGroups:
  - name: own
    securityRules:
      - { name: AllowDns, priority: 100, direction: Inbound, access: Allow, protocol: Udp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 53 }
      - { name: AllowIcmp, priority: 110, direction: Inbound, access: Allow, protocol: Icmp, sourceAddressPrefix: 198.51.100.7, destinationAddressPrefix: '*' }
      - { name: AllowIcmp6, priority: 120, direction: Inbound, access: Allow, protocol: Icmp, sourceAddressPrefix: '2001:db8:7::7', destinationAddressPrefix: '*' }
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.20, announce: proxy }
  - { name: pip36, ipAddress: '2001:db8:ffff::20', announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm1/v6] }]
    loadBalancingRules:
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: dns6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 64 }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 64 }
uplinks: [{ device: up }]
"#;

const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];

/// A device's name and the hardware addresses at its two ends: outside and the gateway's.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    pub device: &'static str,
    pub mac: Mac,
    pub gateway: Mac,
}

/// Guest `number` of the policy.
pub fn guest(number: u8) -> Side {
    let device = DEVICES[usize::from(number) - 1];
    Side { device, mac: [2, 0, 0, 0, 0, number], gateway: [2, 0, 0, 0, 0xaa, number - 1] }
}

/// The router on the uplink.
pub const WORLD: Side = Side { device: "up", mac: ROUTER_MAC, gateway: [2, 0, 0, 0, 0xaa, 3] };

/// The addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    pub vm1: IpAddr,
    pub vm2: IpAddr,
    pub vm3: IpAddr,
    /// Of the load balancer, under which vm1 leaves.
    pub frontend: IpAddr,
    /// Of vm3.
    pub own: IpAddr,
    pub server: IpAddr,
    /// On the way there.
    pub router: IpAddr,
}

impl Family {
    /// IPv4 and IPv6.
    pub fn both() -> [Family; 2] {
        let read = |[vm1, vm2, vm3, frontend, own, server, router]: [&str; 7]| {
            let [vm1, vm2, vm3, frontend, own, server, router] =
                [vm1, vm2, vm3, frontend, own, server, router].map(|a| a.parse().expect("a literal"));
            Family { vm1, vm2, vm3, frontend, own, server, router }
        };
        let four =
            ["10.0.1.4", "10.0.1.5", "10.0.2.4", "203.0.113.10", "203.0.113.20", "198.51.100.7", "192.0.2.1"];
        let six = [
            "fd00:1:0:1::4",
            "fd00:1:0:1::5",
            "fd00:1:0:2::4",
            "2001:db8:ffff::10",
            "2001:db8:ffff::20",
            "2001:db8:7::7",
            "2001:db8:1::1",
        ];
        [read(four), read(six)]
    }

    pub fn v6(&self) -> bool {
        self.vm1.is_ipv6()
    }

    /// Type and code by what the error says.
    pub fn kind(&self, error: Error) -> (u8, u8, [u8; 4]) {
        match (error, self.v6()) {
            (Error::PortUnreachable, false) => (3, 3, [0; 4]),
            (Error::PortUnreachable, true) => (1, 4, [0; 4]),
            (Error::TooBig, false) => (3, 4, [0, 0, 5, 120]),
            (Error::TooBig, true) => (2, 0, [0, 0, 5, 120]),
            (Error::TimeExceeded, false) => (11, 0, [0; 4]),
            (Error::TimeExceeded, true) => (3, 0, [0; 4]),
            (Error::ParameterProblem, false) => (12, 0, [1, 0, 0, 0]),
            (Error::ParameterProblem, true) => (4, 1, [0, 0, 0, 6]),
        }
    }

    /// Length of the IP header without options.
    pub fn header(&self) -> usize {
        if self.v6() { 40 } else { 20 }
    }
}

/// What an error says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    PortUnreachable,
    /// With a next-hop MTU of 1,400.
    TooBig,
    TimeExceeded,
    ParameterProblem,
}

/// What is sent in the tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    Udp,
    /// A SYN.
    Tcp,
    /// A request; its identifier is the source's port.
    Echo,
    /// ICMP of any type, with these four bytes before the payload.
    Icmp(u8, [u8; 4]),
}

/// A packet to the gateway on one side; 64 is its TTL.
pub fn packet(side: Side, what: What, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    made(side.mac, side.gateway, 64, what, from, to)
}

/// The same as the gateway sends it, by which the TTL is one less.
pub fn sent(side: Side, what: What, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    made(side.gateway, side.mac, 63, what, from, to)
}

fn made(from_mac: Mac, to_mac: Mac, ttl: u8, what: What, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let craft = Craft { ttl, ..Craft::new(from_mac, a, to_mac, b) };
            match what {
                What::Udp => craft.udp(from.port(), to.port(), b"question"),
                What::Tcp => craft.tcp(from.port(), to.port(), TcpFlags::SYN, 7, 0, b""),
                What::Echo => craft.echo_request(from.port(), 1, b"echo"),
                What::Icmp(kind, rest) => craft.icmp(kind, 0, rest, b"0123456789ab"),
            }
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let craft = Craft6 { hop_limit: ttl, ..Craft6::new(from_mac, a, to_mac, b) };
            match what {
                What::Udp => craft.udp(from.port(), to.port(), b"question"),
                What::Tcp => craft.tcp(from.port(), to.port(), TcpFlags::SYN, 7),
                What::Echo => craft.echo_request(from.port(), 1),
                What::Icmp(kind, rest) => craft.icmp(kind, 0, rest, b"0123456789ab"),
            }
        }
        _ => panic!("two families"),
    }
}

/// An error to the gateway on one side, about what begins with `quote`.
pub fn error(side: Side, from: IpAddr, to: IpAddr, message: (u8, u8, [u8; 4]), quote: &[u8]) -> Vec<u8> {
    message_of(side.mac, side.gateway, 64, from, to, message, quote)
}

/// The same as the gateway sends it on.
pub fn error_sent(side: Side, from: IpAddr, to: IpAddr, message: (u8, u8, [u8; 4]), quote: &[u8]) -> Vec<u8> {
    message_of(side.gateway, side.mac, 63, from, to, message, quote)
}

fn message_of(
    from_mac: Mac,
    to_mac: Mac,
    ttl: u8,
    from: IpAddr,
    to: IpAddr,
    (kind, code, rest): (u8, u8, [u8; 4]),
    quote: &[u8],
) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            Craft { ttl, ..Craft::new(from_mac, a, to_mac, b) }.icmp(kind, code, rest, quote)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            Craft6 { hop_limit: ttl, ..Craft6::new(from_mac, a, to_mac, b) }.icmp(kind, code, rest, quote)
        }
        _ => panic!("two families"),
    }
}

/// Makes the header checksum of the IPv4 packet at `at` in a frame right.
pub fn fix_header(frame: &mut [u8], at: usize) {
    let length = usize::from(frame[at] & 15) * 4;
    frame[at + 10..at + 12].fill(0);
    let sum = checksum::of(&frame[at..at + length]).to_ne_bytes();
    frame[at + 10..at + 12].copy_from_slice(&sum);
}

/// The packets of a table, with what is asserted of each.
pub struct Table<'a>(pub Ledger<'a>);

impl Table<'_> {
    pub fn xdp(&self) -> bool {
        self.0.backend.hook() == Hook::Xdp
    }

    /// Arrives on `side` and is sent on as exactly `expected`.
    ///
    /// # Panics
    /// If not, or if any other counter moves than `reason` and those of `rules`.
    pub fn sends(
        &mut self,
        name: &str,
        side: Side,
        frame: &[u8],
        expected: &[u8],
        (reason, rules): (Reason, &[&str]),
    ) {
        let out = self.out(name, side, frame, (reason, rules));
        let who = format!("{name} on {}", self.0.backend.name());
        assert!(out == expected, "{who}:\n{out:02x?} is not\n{expected:02x?}");
    }

    /// Arrives on `side` and is sent on as what is returned.
    ///
    /// # Panics
    /// As [`Table::sends`].
    pub fn out(
        &mut self,
        name: &str,
        side: Side,
        frame: &[u8],
        (reason, rules): (Reason, &[&str]),
    ) -> Vec<u8> {
        let outcome = self.0.run(name, At::Ingress(side.device), frame, reason, rules);
        assert_eq!(outcome.action, Action::Send, "{name} on {}", self.0.backend.name());
        outcome.frame
    }

    /// Arrives on `side` and ends here, or is left to the kernel untouched.
    ///
    /// # Panics
    /// As [`Table::sends`].
    pub fn ends(&mut self, name: &str, side: Side, frame: &[u8], action: Action, reason: Reason) {
        let outcome = self.0.run(name, At::Ingress(side.device), frame, reason, &[]);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, action, "{who}");
        assert!(action == Action::Drop || outcome.frame == frame, "{who}: touched");
    }

    pub fn drops(&mut self, name: &str, side: Side, frame: &[u8], reason: Reason) {
        self.ends(name, side, frame, Action::Drop, reason);
    }
}

/// Runs the table on the host engine, under XDP and under TC, each with tables of its own.
///
/// # Panics
/// If it does on one of them.
pub fn everywhere(test: impl Fn(&mut Table<'_>) + Sync) {
    everywhere_under(POLICY, test);
}

/// The same under another policy with the same devices.
///
/// # Panics
/// As [`everywhere`].
pub fn everywhere_under(policy: &str, test: impl Fn(&mut Table<'_>) + Sync) {
    let run = |backend: &mut dyn Backend| test(&mut Table(Ledger::new(backend)));
    run(&mut HostBackend::new(policy).expect("the policy is right"));
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(policy, &DEVICES, hook, |backend| {
            run(backend);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{hook:?}: {e:#}"));
    }
}
