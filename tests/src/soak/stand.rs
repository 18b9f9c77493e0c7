//! The lab of the soak and its policies.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::edge::{LabPolicy, WithHook};
use crate::lab::TopologySpec;

/// Where vm2's exchanges and vm3's datagrams go.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Ports of the server: an echo of TCP, one of UDP.
pub const TCP_PORT: u16 = 9000;
pub const UDP_PORT: u16 = 9001;
/// The public address of vm3, whose flows end by the policy's own timers and not by those of the outbound rule.
const OWN: &str = "203.0.113.20";

/// Short where a policy can say so: what a rule of a load balancer times takes its four minutes all the same.
const TIMEOUTS: &str = "timeouts: { tcpHalfOpenSeconds: 5, tcpFinSeconds: 5, tcpResetSeconds: 2, udpSeconds: 5, icmpSeconds: 5 }\n";

const GROUP: &str = "networkSecurityGroups:\n  - name: web\n    securityRules:\n      - { name: Deny81, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 81 }\n";

/// What differs from one policy to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Variant {
    /// A group stands at the subnet. It denies what nobody here asks for.
    pub group: bool,
    /// vm4 has left the pool.
    pub without_vm4: bool,
}

/// vm1 to vm4 and the world.
pub fn topology() -> TopologySpec {
    TopologySpec::clean_veth(4)
}

/// The policy.
pub fn policy(spec: &TopologySpec, hook: WithHook, variant: Variant) -> String {
    let mut instances = BTreeMap::from([("vm3", OWN)]);
    if variant.without_vm4 {
        // Another way out, so that it is no member.
        instances.insert("vm4", "203.0.113.21");
    }
    let mut policy = LabPolicy { instances, ports: 1024, ..LabPolicy::new(hook) };
    policy.extra = TIMEOUTS.to_owned();
    if variant.group {
        policy.subnet_group = Some("web");
        policy.extra.push_str(GROUP);
    }
    policy.yaml(spec)
}
