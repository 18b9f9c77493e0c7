//! `examples/loadbalancer.yaml` is read back field by field, and with every other word.

mod policy_support;

use policy_support::balanced::*;
use portcullis::policy;
use portcullis::policy::network::{
    Allocation, Announce, BackendPool, DefaultOutbound, Distribution, Filtering, Frontend, FrontendUse,
    InboundNatRule, LoadBalancer, LoadBalancingRule, NatTarget, Network, OutboundRule, Probe, ProbeProtocol,
    PublicAddress, Refusal, Snat, Timeouts, TransportProtocol,
};

#[test]
fn the_example_is_read_back_field_by_field() {
    let network = accepted(&[]);
    let public = |name: &str, address: &str, announce| PublicAddress {
        name: name.to_owned(),
        address: address.parse().unwrap(),
        announce,
    };
    let expected = [
        public("pip-web", "203.0.113.10", Announce::Proxy),
        public("pip-web6", "2001:db8:ffff::10", Announce::Proxy),
        public("pip-mail", "203.0.113.20", Announce::Proxy),
        public("pip-default", "203.0.113.30", Announce::Proxy),
        public("pp-out/203.0.113.32", "203.0.113.32", Announce::Routed),
        public("pp-out/203.0.113.33", "203.0.113.33", Announce::Routed),
        public("pp-out/203.0.113.34", "203.0.113.34", Announce::Routed),
        public("pp-out/203.0.113.35", "203.0.113.35", Announce::Routed),
    ];
    assert_eq!(network.public_addresses, expected);
    let frontend = |name: &str, public_addresses: &[usize]| Frontend {
        name: name.to_owned(),
        public_addresses: public_addresses.to_vec(),
    };
    let balancer = LoadBalancer {
        name: "lb".to_owned(),
        frontends: vec![
            frontend("fe-web", &[0]),
            frontend("fe-web6", &[1]),
            frontend("fe-out", &[4, 5, 6, 7]),
        ],
        pools: vec![BackendPool { name: "web".to_owned(), members: vec![(0, 0), (0, 1), (1, 0)] }],
        outbound_rules: vec![OutboundRule {
            name: "out".to_owned(),
            frontends: vec![2],
            pool: 0,
            protocol: TransportProtocol::All,
            allocated_outbound_ports: 0,
            idle_timeout_seconds: Some(240),
            tcp_reset: true,
        }],
        rules: vec![
            LoadBalancingRule {
                name: "http".to_owned(),
                frontend: 0,
                pool: 0,
                protocol: TransportProtocol::Tcp,
                frontend_port: 80,
                backend_port: 8080,
                distribution: Distribution::SourceIp,
                idle_timeout_seconds: Some(900),
                tcp_reset: true,
                floating_ip: false,
                disable_outbound_snat: true,
                probe: Some(0),
            },
            LoadBalancingRule {
                name: "http6".to_owned(),
                frontend: 1,
                pool: 0,
                protocol: TransportProtocol::Tcp,
                frontend_port: 80,
                backend_port: 8080,
                distribution: Distribution::Default,
                idle_timeout_seconds: None,
                tcp_reset: false,
                floating_ip: false,
                disable_outbound_snat: false,
                probe: Some(1),
            },
        ],
        nat_rules: vec![
            InboundNatRule {
                name: "ssh".to_owned(),
                frontend: 0,
                protocol: TransportProtocol::Tcp,
                backend_port: 22,
                idle_timeout_seconds: None,
                tcp_reset: false,
                floating_ip: false,
                target: NatTarget::Range { first: 2210, last: 2219, pool: 0 },
            },
            InboundNatRule {
                name: "ssh-web1".to_owned(),
                frontend: 0,
                protocol: TransportProtocol::Tcp,
                backend_port: 22,
                idle_timeout_seconds: None,
                tcp_reset: false,
                floating_ip: false,
                target: NatTarget::Single { frontend_port: 2201, member: (0, 0) },
            },
        ],
        probes: vec![
            Probe {
                name: "alive".to_owned(),
                protocol: ProbeProtocol::Http { path: "/health".to_owned() },
                port: 8080,
                interval_seconds: 5,
                threshold: 2,
            },
            Probe {
                name: "listening".to_owned(),
                protocol: ProbeProtocol::Tcp,
                port: 8080,
                interval_seconds: 5,
                threshold: 1,
            },
        ],
        allocation: Allocation::Min1024,
        frontend_use: FrontendUse::Sequential,
    };
    assert_eq!(network.load_balancers, [balancer]);
    assert_eq!(network.interfaces[2].addresses[0].public_address, Some(2));
    let default = DefaultOutbound { public_addresses: vec![3], idle_timeout_seconds: Some(240) };
    assert_eq!(network.default_outbound, Some(default));
    let access: Vec<bool> = network.subnets.iter().map(|subnet| subnet.default_outbound).collect();
    assert_eq!(access, [false, false, true]);
    let snat = Snat { refusal: Refusal::Icmp, ..Snat::default() };
    assert_eq!(network.snat, snat);
    assert_eq!(network.timeouts, Timeouts::default());
}

#[test]
fn every_other_word_and_default_is_read_too() {
    let network = accepted(&[
        ("snatAllocation: min1024", "snatAllocation: Multiply"),
        ("frontendUse: sequential", "frontendUse: spread"),
        ("loadDistribution: SourceIP #", "loadDistribution: SourceIPProtocol #"),
        ("frontendPort: 80\n        backendPort: 8080\n", "frontendPort: 8080\n"),
        ("enableTcpReset: true\n", "enableFloatingIP: true\n"),
        (
            SINGLE,
            &format!("{SINGLE}, idleTimeoutInMinutes: 30, enableTcpReset: true, enableFloatingIP: true"),
        ),
        ("probeThreshold: 2", "numberOfProbes: 3"),
        (DEFAULT, "defaultOutbound: { publicIPAddress: pip-default }\n"),
        ("drainMinutes: 60", "drainMinutes: 0"),
        ("onExhaustion: icmp", "onExhaustion: Reset"),
    ]);
    let balancer = &network.load_balancers[0];
    assert_eq!((balancer.allocation, balancer.frontend_use), (Allocation::Multiply, FrontendUse::Spread));
    let http = &balancer.rules[0];
    assert_eq!((http.frontend_port, http.backend_port), (8080, 8080));
    assert_eq!(
        (http.distribution, http.floating_ip, http.tcp_reset),
        (Distribution::SourceIpProtocol, true, false)
    );
    let ssh = &balancer.nat_rules[1];
    assert_eq!((ssh.idle_timeout_seconds, ssh.tcp_reset, ssh.floating_ip), (Some(1800), true, true));
    assert_eq!(balancer.probes[0].threshold, 3);
    assert_eq!(network.default_outbound.unwrap().idle_timeout_seconds, None);
    assert_eq!((network.snat.refusal, network.snat.drain_seconds), (Refusal::Reset, 0));
    let network = accepted(&[
        ("snatAllocation: min1024", "snatAllocation: basic"),
        ("snat:\n  profile: azure\n  onExhaustion: icmp\n  drainMinutes: 60\n", ""),
    ]);
    assert_eq!((network.load_balancers[0].allocation, network.snat), (Allocation::Basic, Snat::default()));
}

#[test]
fn the_profile_rfc_maps_by_socket_filters_by_groups_tells_every_refusal_and_has_the_rfcs_timers() {
    let network = plain("snat: { profile: rfc }\n").unwrap();
    let expected = Snat {
        refusal: Refusal::Icmp,
        drain_seconds: 3600,
        udp_hold_seconds: 0,
        tcp_port_per_socket: true,
        filtering: Filtering::EndpointIndependent,
        tell_every_refusal: true,
    };
    assert_eq!(network.snat, expected);
    let timeouts = Timeouts {
        tcp_established: 7440,
        tcp_half_open: 240,
        tcp_fin: 240,
        tcp_reset: 240,
        tcp_transitory: 240,
        udp: 300,
        icmp: 60,
        other: 240,
    };
    assert_eq!(network.timeouts, timeouts);
    let words = "snat: { profile: rfc, filtering: addressAndPort, onExhaustion: silent }\ntimeouts: { tcpFinSeconds: 20, udpSeconds: 120 }\n";
    let network = plain(words).unwrap();
    assert_eq!(
        network.snat,
        Snat { refusal: Refusal::Silent, filtering: Filtering::AddressAndPort, ..expected }
    );
    assert_eq!(network.timeouts, Timeouts { tcp_fin: 20, udp: 120, ..timeouts });
    // By azure everything is as it was; filtering alone may be asked for.
    let network = plain("snat: { filtering: endpointIndependent }\n").unwrap();
    assert_eq!(network.snat, Snat { filtering: Filtering::EndpointIndependent, ..Snat::default() });
}

#[test]
fn the_profile_rfc_allows_no_timer_that_the_rfcs_forbid() {
    for (rest, about) in [
        ("timeouts: { tcpEstablishedSeconds: 7439 }", "no `tcpEstablishedSeconds` below 7440"),
        ("timeouts: { udpSeconds: 119 }", "no `udpSeconds` below 120"),
        ("timeouts: { icmpSeconds: 59 }", "no `icmpSeconds` below 60"),
        (
            "loadBalancers: [{ name: lb, frontendIPConfigurations: [{ name: fe, publicIPAddress: pip }], backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }], outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, idleTimeoutInMinutes: 120 }] }]",
            "`idleTimeoutInMinutes` of loadBalancers/lb/outboundRules/out for less",
        ),
        ("defaultOutbound: { publicIPAddress: pip, idleTimeoutInMinutes: 4 }", "of defaultOutbound for less"),
    ] {
        let said = plain(&format!("snat: {{ profile: rfc }}\n{rest}\n")).unwrap_err();
        assert!(said.contains(about), "{rest}: {said}");
        plain(&format!("snat: {{ profile: azure }}\n{rest}\n")).unwrap();
    }
}

/// One guest, one public address, and the rest.
fn plain(rest: &str) -> Result<Network, String> {
    let yaml = format!(
        "virtualNetworks: [{{ name: lab, addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}, subnets: [{{ name: web, addressPrefix: 10.0.1.0/24 }}] }}]
networkInterfaces: [{{ name: vm1, device: vm1, ipConfigurations: [{{ subnet: web, privateIPAddress: 10.0.1.4 }}] }}]
publicIPAddresses: [{{ name: pip, ipAddress: 203.0.113.10, announce: proxy }}]
uplinks: [{{ device: up }}]
{rest}"
    );
    let loaded = policy::parse("policy.yaml", &yaml).map_err(|found| found.to_string())?;
    Ok(loaded.network)
}

#[test]
fn the_profile_of_the_nat_gateway_changes_what_timeouts_default_to() {
    let network = accepted(&[("profile: azure", "profile: natgateway")]);
    let expected = Timeouts { tcp_fin: 65, tcp_reset: 16, tcp_half_open: 30, ..Timeouts::default() };
    assert_eq!((network.timeouts, network.snat.udp_hold_seconds), (expected, 65));
    let network = accepted(&[
        ("profile: azure", "profile: natgateway"),
        ("uplinks:", "timeouts: { tcpFinSeconds: 240, udpSeconds: 30 }\nuplinks:"),
    ]);
    assert_eq!(network.timeouts, Timeouts { tcp_fin: 240, udp: 30, ..expected });
    refused(
        &[("profile: azure", "profile: nat")],
        "nat",
        "`profile` cannot be `nat`",
        "use one of: `azure`, `natgateway`",
    );
    refused(
        &[("onExhaustion: icmp", "onExhaustion: drop")],
        "drop",
        "`onExhaustion` cannot be `drop`",
        "use one of: `silent`, `icmp`, `reset`",
    );
    refused(
        &[("drainMinutes: 60", "drainMinutes: 1441")],
        "1441",
        "`drainMinutes` is 1441, outside 0..=1440",
        "from 0 to 1440",
    );
}

#[test]
fn inbound_nat_pools_are_answered_with_what_to_write() {
    refused(
        &[(NAT, &format!("    inboundNatPools: []\n{NAT}"))],
        "inboundNatPools",
        "write an inbound NAT rule with `frontendPortRangeStart`",
        "remove it",
    );
    refused(
        &[("{ name: mail, addressPrefix", "{ natGateway: gw, name: mail, addressPrefix")],
        "natGateway",
        "NAT gateways are not available yet",
        "remove it",
    );
}

#[test]
fn the_parts_of_a_load_balancer_have_places() {
    let loaded = policy::parse("policy.yaml", GOOD).unwrap();
    for path in [
        "publicIPPrefixes/pp-out",
        "publicIPAddresses/pp-out/203.0.113.34",
        "loadBalancers/lb/probes/alive",
        "loadBalancers/lb/loadBalancingRules/http",
        "loadBalancers/lb/inboundNatRules/ssh-web1",
    ] {
        assert!(loaded.places.contains_key(path), "{path}");
    }
}
