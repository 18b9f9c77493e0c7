//! An oracle for the NAT: what the RFCs (4787, 5382, 5508, 7857), issue 6 and `docs/policy.md` say becomes of each packet, in
//! plain maps, with nothing of the datapath's. It was written before its author read the engine, and shares no code with it.
//!
//! | file | what |
//! | --- | --- |
//! | `packet` | a packet as people speak of it |
//! | `wire` | the same as bytes, every checksum made anew |
//! | `tcp` | the state of a connection, RFC 7857 §2 |
//! | `gateway` | flows, ports, verdicts |
//! | `walk` | random sequences of packets that make sense often enough |

mod gateway;
mod packet;
mod tcp;
mod walk;
mod wire;

pub use gateway::{Expect, Gateway, Owned, Seen};
pub use packet::{Body, Device, Message, Packet, Piece, flag};
pub use walk::{Step, Walk};
pub use wire::{received, sent};

/// vm1 is behind a load balancer and leaves by eight ports, vm2 has no way out, vm3 has addresses of its own.
pub const POLICY: &str = r#"
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
      - { name: AllowWeb, priority: 110, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 80 }
      - { name: AllowPing, priority: 120, direction: Inbound, access: Allow, protocol: Icmp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*' }
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
      - { name: web, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: web6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: dns6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }
uplinks: [{ device: up }]
"#;

/// The devices of [`POLICY`], for `KernelBackend::with`.
pub const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];
