//! What is probed: a pure function of the policy.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddrV4};
use std::time::Duration;

use super::interface::probers;
use crate::policy::network::{LoadBalancer, Network, Probe, ProbeProtocol};

/// One backend under one probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `lb/probes/alive/vm1/ipconfig1`: what the compiler knows it by when it is down.
    pub name: String,
    /// The device it is reached by: networks may overlap.
    pub device: String,
    pub address: SocketAddrV4,
    pub protocol: ProbeProtocol,
    pub interval: Duration,
    /// So many results in a row change its state; at least 1.
    pub threshold: u32,
}

/// `lb/probes/alive/vm1/ipconfig1`
pub fn down_name(balancer: &str, probe: &str, member: &str) -> String {
    format!("{balancer}/probes/{probe}/{member}")
}

/// Members, (interface, configuration), of the pools of rules with a probe, once for each such rule. IPv6 members are not
/// probed: Azure does it from a link-local address, which the datapath does not forward.
pub(super) fn probed_members(
    network: &Network,
) -> impl Iterator<Item = ((usize, usize), &LoadBalancer, &Probe)> + '_ {
    let rules = network.load_balancers.iter().flat_map(|balancer| {
        let rules = balancer.rules.iter();
        rules.filter_map(move |rule| Some((balancer, rule, &balancer.probes[rule.probe?])))
    });
    rules.flat_map(move |(balancer, rule, probe)| {
        let frontend = balancer.frontends[rule.frontend].public_addresses.first();
        let v4 = frontend.is_some_and(|public| network.public_addresses[*public].address.is_ipv4());
        let members = balancer.pools[rule.pool].members.iter().copied();
        members
            .filter(move |(i, c)| v4 && network.interfaces[*i].addresses[*c].address.is_ipv4())
            .map(move |member| (member, balancer, probe))
    })
}

/// Everything a policy wants probed, by name; what several rules ask for is asked once.
pub fn targets(network: &Network) -> Vec<Target> {
    let devices: HashMap<usize, String> =
        probers(network).into_iter().map(|prober| (prober.network, prober.device)).collect();
    let mut targets: BTreeMap<String, Target> = BTreeMap::new();
    for ((i, c), balancer, probe) in probed_members(network) {
        let interface = &network.interfaces[i];
        let configuration = &interface.addresses[c];
        let IpAddr::V4(address) = configuration.address else { continue };
        let Some(device) = devices.get(&network.subnets[configuration.subnet].network) else { continue };
        let member = format!("{}/{}", interface.name, configuration.name);
        let name = down_name(&balancer.name, &probe.name, &member);
        let target = Target {
            name: name.clone(),
            device: device.clone(),
            address: SocketAddrV4::new(address, probe.port),
            protocol: probe.protocol.clone(),
            interval: Duration::from_secs(probe.interval_seconds.max(1).into()),
            threshold: probe.threshold.max(1),
        };
        targets.insert(name, target);
    }
    targets.into_values().collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::policy::network::{
        Announce, BackendPool, Distribution, Frontend, Hook, Interface, IpConfiguration, LoadBalancingRule,
        PublicAddress, Subnet, TransportProtocol, VirtualNetwork,
    };

    /// Three virtual networks of the same addresses, in each a guest 10.0.0.4; those of the first and the third are
    /// backends of one balancer with two rules, of which one has a probe.
    pub fn balanced() -> Network {
        let names = ["first", "second", "third"];
        let mut network = Network::default();
        for (number, name) in names.into_iter().enumerate() {
            network.virtual_networks.push(VirtualNetwork {
                name: name.into(),
                id: number as u16 + 1,
                address_space: vec!["10.0.0.0/16".parse().unwrap()],
                peers: Vec::new(),
            });
            network.subnets.push(Subnet {
                name: "subnet".into(),
                network: number,
                prefixes: vec!["10.0.0.0/24".parse().unwrap()],
                gateways: vec!["10.0.0.1".parse().unwrap()],
                group: None,
                route_table: None,
                default_outbound: false,
            });
            network.interfaces.push(Interface {
                name: format!("vm-{name}"),
                device: format!("tap-{name}"),
                mac: None,
                hook: Hook::Auto,
                group: None,
                addresses: vec![IpConfiguration {
                    name: "ip".into(),
                    address: "10.0.0.4".parse().unwrap(),
                    subnet: number,
                    public_address: None,
                    application_groups: Vec::new(),
                }],
            });
        }
        network.public_addresses.push(PublicAddress {
            name: "pip".into(),
            address: "203.0.113.10".parse().unwrap(),
            announce: Announce::Proxy,
        });
        let rule = |name: &str, port, probe| LoadBalancingRule {
            name: name.into(),
            frontend: 0,
            pool: 0,
            protocol: TransportProtocol::Tcp,
            frontend_port: port,
            backend_port: 8080,
            distribution: Distribution::Default,
            idle_timeout_seconds: None,
            tcp_reset: false,
            floating_ip: false,
            disable_outbound_snat: true,
            probe,
        };
        network.load_balancers.push(LoadBalancer {
            name: "lb".into(),
            frontends: vec![Frontend { name: "fe".into(), public_addresses: vec![0] }],
            pools: vec![BackendPool { name: "pool".into(), members: vec![(0, 0), (2, 0)] }],
            outbound_rules: Vec::new(),
            rules: vec![rule("http", 80, Some(0)), rule("https", 443, Some(0)), rule("plain", 81, None)],
            nat_rules: Vec::new(),
            probes: vec![Probe {
                name: "alive".into(),
                protocol: ProbeProtocol::Http { path: "/health".into() },
                port: 8080,
                interval_seconds: 5,
                threshold: 2,
            }],
            allocation: Default::default(),
            frontend_use: Default::default(),
        });
        network
    }

    #[test]
    fn a_backend_is_probed_once_whatever_the_number_of_rules_that_ask_and_by_its_own_networks_device() {
        let targets = targets(&balanced());
        let name = |target: &Target| (target.name.clone(), target.device.clone(), target.address.to_string());
        assert_eq!(
            targets.iter().map(name).collect::<Vec<_>>(),
            [
                ("lb/probes/alive/vm-first/ip".into(), "pcprobe1".into(), "10.0.0.4:8080".into()),
                ("lb/probes/alive/vm-third/ip".into(), "pcprobe2".into(), "10.0.0.4:8080".into()),
            ]
        );
        assert_eq!((targets[0].interval, targets[0].threshold), (Duration::from_secs(5), 2));
        assert_eq!(targets[0].protocol, ProbeProtocol::Http { path: "/health".into() });
    }

    #[test]
    fn members_of_ipv6_and_rules_of_ipv6_frontends_are_not_probed() {
        let mut network = balanced();
        network.interfaces[0].addresses[0].address = "fd00::4".parse().unwrap();
        assert_eq!(targets(&network).len(), 1);
        network.public_addresses[0].address = "2001:db8::10".parse().unwrap();
        assert_eq!((targets(&network).len(), probers(&network).len()), (0, 0));
    }
}
