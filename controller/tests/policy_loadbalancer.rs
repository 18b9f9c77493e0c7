//! Load balancers and ways out: every part is read, and every check says where and what to do.

mod policy_support;

use portcullis::policy::network::{
    Allocation, Announce, BackendPool, DefaultOutbound, Distribution, Frontend, FrontendUse, InboundNatRule,
    LoadBalancer, LoadBalancingRule, NatTarget, Network, OutboundRule, Probe, ProbeProtocol, PublicAddress,
    Refusal, Snat, Timeouts, TransportProtocol,
};
use portcullis::policy::{self, Diagnostics, allocation};

use policy_support::{one_error, one_warning};

const GOOD: &str = include_str!("../../examples/loadbalancer.yaml");

type Changes<'a> = &'a [(&'a str, &'a str)];

fn changed(changes: Changes<'_>) -> String {
    let mut text = GOOD.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "the example has no {from:?}");
        text = text.replacen(from, to, 1);
    }
    text
}

fn accepted(changes: Changes<'_>) -> Network {
    let loaded = policy::parse("policy.yaml", &changed(changes)).unwrap_or_else(|found| panic!("{found}"));
    assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
    loaded.network
}

/// Exactly one error: where its caret stands, what it says and what to do.
fn refused(changes: Changes<'_>, at: &str, message: &str, help: &str) {
    let text = changed(changes);
    let findings = policy::parse("policy.yaml", &text).map(|_| ()).expect_err("the policy is wrong");
    one_error(&findings, &text, at, message, help);
}

/// In order, but for exactly one warning.
fn warned(changes: Changes<'_>, at: &str, message: &str, help: &str) {
    let text = changed(changes);
    let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|found| panic!("{found}"));
    one_warning(&loaded.warnings, &text, at, message, help);
}

/// All messages, for policies with several findings.
fn messages(findings: &Diagnostics) -> Vec<String> {
    findings.entries().iter().map(|entry| entry.message.clone()).collect()
}

const RULES: &str = "    loadBalancingRules:\n";
const NAT: &str = "    inboundNatRules:\n";
const OUT: &str = "    outboundRules:\n";
const POOLS: &str = "    backendAddressPools:\n";
const SSH: &str = "frontendPortRangeStart: 2210, frontendPortRangeEnd: 2219";
const SINGLE: &str = "frontendPort: 2201, backendPort: 22, backendIPConfiguration: web1/v4";
const ALIVE: &str =
    "protocol: Http, port: 8080, requestPath: /health, intervalInSeconds: 5, probeThreshold: 2";
const DISABLED: &str = "        disableOutboundSnat: true\n";
const DEFAULT: &str = "defaultOutbound:\n  publicIPAddress: pip-default\n  idleTimeoutInMinutes: 4\n";
const ACCESS: &str = ", defaultOutboundAccess: true";

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
    let snat = Snat { refusal: Refusal::Icmp, drain_seconds: 3600, udp_hold_seconds: 0 };
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
fn a_frontends_port_has_one_rule_for_each_protocol() {
    let rule = |name: &str, more: &str| {
        format!(
            "{RULES}      - {{ name: {name}, frontendIPConfiguration: fe-web, backendAddressPool: web, disableOutboundSnat: true, {more} }}\n"
        )
    };
    accepted(&[(RULES, &rule("udp", "protocol: Udp, frontendPort: 80"))]);
    accepted(&[(RULES, &rule("https", "protocol: Tcp, frontendPort: 443"))]);
    refused(
        &[(RULES, &rule("again", "protocol: Tcp, frontendPort: 80"))],
        "80",
        "Tcp port 80 of frontend `fe-web` has two rules",
        "choose another port, or another frontend",
    );
    // Ranges count whole, and a NAT rule for All is one for Tcp.
    refused(
        &[(RULES, &rule("in-range", "protocol: Tcp, frontendPort: 2215"))],
        "2210",
        "Tcp port 2215 of frontend `fe-web` has two rules",
        "another port",
    );
    refused(
        &[(
            NAT,
            &format!(
                "{NAT}      - {{ name: both, frontendIPConfiguration: fe-web, protocol: All, frontendPortRangeStart: 2190, frontendPortRangeEnd: 2202, backendPort: 7, backendAddressPool: web }}\n"
            ),
        )],
        "2201",
        "Tcp port 2201 of frontend `fe-web` has two rules",
        "another port",
    );
    refused(
        &[(SINGLE, &SINGLE.replace("2201", "80"))],
        "80,",
        "Tcp port 80 of frontend `fe-web` has two rules",
        "another port",
    );
    let twice = format!(
        "{NAT}      - {{ name: a, frontendIPConfiguration: fe-web6, protocol: All, frontendPort: 9, backendPort: 9, backendIPConfiguration: web1/v6 }}\n      - {{ name: b, frontendIPConfiguration: fe-web6, protocol: All, frontendPort: 9, backendPort: 9, backendIPConfiguration: web1/v6 }}\n"
    );
    refused(
        &[(NAT, &twice)],
        "9, backendPort: 9",
        "Tcp and Udp port 9 of frontend `fe-web6` has two rules",
        "another",
    );
}

#[test]
fn ha_ports_are_refused_with_the_reason_and_ports_are_1_to_65535() {
    let ha = [(
        "protocol: Tcp\n        frontendPort: 80\n        backendPort: 8080",
        "protocol: All\n        frontendPort: 0\n        backendPort: 0",
    )];
    refused(
        &ha,
        "All",
        "load balancing rule `http` is for all protocols and ports (HA ports)",
        "only internal load balancers have HA ports, which there are none of",
    );
    for (from, to, field) in [
        ("frontendPort: 80\n", "frontendPort: 0\n", "frontendPort"),
        ("backendPort: 8080\n", "backendPort: 65536\n", "backendPort"),
        (SSH, "frontendPortRangeStart: 0, frontendPortRangeEnd: 9", "frontendPortRangeStart"),
        ("frontendPort: 2201, backendPort: 22", "frontendPort: 2201, backendPort: 0", "backendPort"),
    ] {
        let text = changed(&[(from, to)]);
        let findings = policy::parse("policy.yaml", &text).map(|_| ()).expect_err("the policy is wrong");
        let found = messages(&findings);
        assert!(found.len() == 1 && found[0].starts_with(&format!("`{field}` is ")), "{findings}");
        assert!(found[0].ends_with("outside 1..=65535"), "{findings}");
    }
}

#[test]
fn a_frontend_of_an_outbound_rule_needs_load_balancing_rules_without_snat() {
    let out = "frontendIPConfigurations: [fe-out]";
    accepted(&[(out, "frontendIPConfigurations: [fe-out, fe-web]")]);
    refused(
        &[(out, "frontendIPConfigurations: [fe-out, fe-web]"), (DISABLED, "")],
        "http",
        "LoadBalancingRuleMustDisableSNATSinceSameFrontendIPConfigurationIsReferencedByOutboundRule: load balancing rule \
         `http` gives out ports of frontend `fe-web`",
        "add `disableOutboundSnat: true` to `http`, or give the outbound rule another frontend",
    );
    // On a frontend of its own the outbound rule simply comes first.
    accepted(&[(DISABLED, "")]);
}

#[test]
fn a_pool_without_a_way_out_is_warned_about() {
    let start = GOOD.find(OUT).unwrap();
    let end = GOOD.find("# Whoever has neither").unwrap();
    let without = [
        (&GOOD[start..end], ""),
        ("      - { name: fe-out, publicIPPrefix: pp-out } # prefixes are for outbound rules only\n", ""),
        ("publicIPPrefixes:\n  - { name: pp-out, ipPrefix: 203.0.113.32/30, announce: routed }\n", ""),
    ];
    // web2 has no IPv6; web1 leaves by IPv6 only.
    warned(
        &without,
        "http",
        "members of pool `web` have no way out: `disableOutboundSnat` and no outbound rule",
        "add an outbound rule for the pool, or remove `disableOutboundSnat`",
    );
    let mut given = without.to_vec();
    given.push((DISABLED, ""));
    accepted(&given);
    warned(
        &[(POOLS, &format!("{POOLS}      - {{ name: idle, backendIPConfigurations: [mail] }}\n"))],
        "idle",
        "no rule links backend pool `idle` to a frontend",
        "its members leave by `defaultOutbound` where their subnet allows it",
    );
    // A pool for inbound NAT alone is meant.
    let nat = format!(
        "{NAT}      - {{ name: pop, frontendIPConfiguration: fe-web, protocol: Tcp, frontendPortRangeStart: 110, frontendPortRangeEnd: 110, backendPort: 110, backendAddressPool: idle }}\n"
    );
    accepted(&[
        (POOLS, &format!("{POOLS}      - {{ name: idle, backendIPConfigurations: [mail] }}\n")),
        (NAT, &nat),
    ]);
}

#[test]
fn a_pool_may_have_a_rule_for_each_protocol_and_family() {
    let out = "name: out, frontendIPConfigurations: [fe-out], backendAddressPool: web, protocol: All";
    let tcp = out.replace("All", "Tcp");
    let with = |more: &str| format!("{OUT}      - {{ {more} }}\n");
    let udp = "name: udp, frontendIPConfigurations: [fe-out], backendAddressPool: web, protocol: Udp";
    let network = accepted(&[(OUT, &with(udp)), (out, &tcp)]);
    let claims = allocation::claims(&network.load_balancers[0], &network.public_addresses);
    let seen: Vec<_> =
        claims.iter().map(|claim| (claim.v6, claim.protocol, claim.frontends.clone())).collect();
    assert_eq!(
        seen,
        [
            (false, TransportProtocol::Udp, vec![2]),
            (false, TransportProtocol::Tcp, vec![2]),
            (true, TransportProtocol::Tcp, vec![1])
        ]
    );
    refused(
        &[(OUT, &with(udp))],
        "web, protocol: All",
        "two outbound rules give pool `web` ports for one protocol",
        "join the rules, or let one be Tcp and the other Udp",
    );
    let v6 = "name: six, frontendIPConfigurations: [fe-web6], backendAddressPool: web, protocol: All";
    let disabled = ("probe: listening }", "probe: listening, disableOutboundSnat: true }");
    accepted(&[(OUT, &with(v6)), disabled]);
    refused(
        &[("frontendIPConfigurations: [fe-out]", "frontendIPConfigurations: [fe-out, fe-web6]"), disabled],
        "fe-web6",
        "an outbound rule has frontends of both families",
        "write two rules, one for each family",
    );
    warned(
        &[("[web1/v4, web1/v6, web2]", "[web1/v4, web2]")],
        "web, protocol: Tcp",
        "pool `web` has no IPv6 member for this rule",
        "its frontend is IPv6: add members such as `vm1/NAME`",
    );
}

#[test]
fn a_members_ports_of_one_protocol_come_from_one_pool() {
    let second = format!("{POOLS}      - {{ name: second, backendIPConfigurations: [web2] }}\n");
    let rule = |protocol: &str, more: &str| {
        format!(
            "{RULES}      - {{ name: two, frontendIPConfiguration: fe-web, backendAddressPool: second, protocol: {protocol}, frontendPort: 443{more} }}\n"
        )
    };
    accepted(&[(POOLS, &second), (RULES, &rule("Tcp", ", disableOutboundSnat: true"))]);
    refused(
        &[(POOLS, &second), (RULES, &rule("Tcp", ""))],
        "web2",
        "`web2/v4` has outbound ports from two pools: `lb/web` and `lb/second`",
        "or add `disableOutboundSnat: true` to the load balancing rules of one",
    );
    // One pool for Tcp, another for Udp.
    let tcp = ("backendAddressPool: web, protocol: All", "backendAddressPool: web, protocol: Tcp");
    accepted(&[(POOLS, &second), (RULES, &rule("Udp", "")), tcp]);
    refused(
        &[("[web1/v4, web1/v6, web2]", "[web1, web1/v6, web2, web2/v4]")],
        "web2/v4",
        "`web2/v4` is in pool `web` twice",
        "remove one of them",
    );
}

#[test]
fn members_without_a_name_of_their_own_are_the_ipv4_ones() {
    let ipv6_only =
        "    ipConfigurations:\n      - { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::4' }\n";
    let both = "    ipConfigurations:\n      - { name: v4, subnet: web, privateIPAddress: 10.0.1.4 }\n      - { name: v6, subnet: web, privateIPAddress: 'fd00:1:0:1::4' }\n";
    refused(
        &[
            (both, ipv6_only),
            ("[web1/v4, web1/v6, web2]", "[web1, web2]"),
            (SINGLE, &SINGLE.replace("web1/v4", "web2")),
        ],
        "web1",
        "`web1` has no IPv4 ip configuration",
        "write which of the others: web1/v6",
    );
    refused(
        &[(SINGLE, &SINGLE.replace("web1/v4", "web1/v6"))],
        "web1/v6",
        "inbound NAT rule `ssh-web1` sends from IPv4 to fd00:1:0:1::4",
        "name an IPv4 ip configuration, or another frontend",
    );
    refused(
        &[("[web1/v4, web1/v6, web2]", "[web1/v4, web1/v7, web2]")],
        "web1/v7",
        "`web1` has no ip configuration `v7`",
        "did you mean `web1/v",
    );
}

#[test]
fn public_addresses_fit_the_family_and_are_outside_every_network() {
    accepted(&[("2001:db8:ffff::10", "2a01:db8::10")]);
    for (address, message) in [
        ("fd00:9::1", "fd00:9::1 is outside 2000::/3 and cannot be a public address"),
        ("fe80::1", "fe80::1 is in fe80::/10 (link-local) and cannot be a public address"),
    ] {
        refused(&[("2001:db8:ffff::10'", &format!("{address}'"))], "'", message, "the world can reach");
    }
    refused(
        &[("'fd00:1::/48']", "'fd00:1::/48', '2001:db8::/32']")],
        "'2001:db8:ffff::10'",
        "public address 2001:db8:ffff::10 is inside the address space of `lab`",
        "choose an address outside",
    );
    refused(
        &[
            ("publicIPAddress: pip-mail", "publicIPAddress: pip-new"),
            ("{ name: pip-mail, ipAddress: 203.0.113.20", "{ name: pip-new, ipAddress: '2001:db8::20'"),
        ],
        "pip-new",
        "`mail/v4` is IPv4 (10.0.2.4), public IP address `pip-new` is IPv6",
        "give it to an IPv6 ip configuration of the guest, or name an IPv4 address",
    );
    let network = accepted(&[
        (
            "privateIPAddress: 'fd00:1:0:1::4' }",
            "privateIPAddress: 'fd00:1:0:1::4', publicIPAddress: pip-new }",
        ),
        (
            "publicIPAddresses:\n",
            "publicIPAddresses:\n  - { name: pip-new, ipAddress: '2001:db8::20', announce: address }\n",
        ),
    ]);
    assert_eq!(network.interfaces[0].addresses[1].public_address, Some(0));
}

#[test]
fn prefixes_have_at_most_16_addresses_and_serve_outbound_rules_only() {
    const PREFIX: &str = "ipPrefix: 203.0.113.32/30";
    let network = accepted(&[(PREFIX, "ipPrefix: 198.51.100.16/28")]);
    assert_eq!(network.load_balancers[0].frontends[2].public_addresses.len(), 16);
    refused(
        &[(PREFIX, "ipPrefix: 198.51.100.0/27")],
        "198.51.100.0/27",
        "198.51.100.0/27 has more than 16 addresses",
        "as in Azure a public prefix is at most a /28",
    );
    refused(
        &[(PREFIX, "ipPrefix: '2001:db8::/64'")],
        "'2001:db8::/64'",
        "2001:db8::/64 has more than 16 addresses",
        "at most a /124",
    );
    refused(
        &[(PREFIX, "ipPrefix: 203.0.113.33/30")],
        "203.0.113.33/30",
        "203.0.113.33/30 has bits set behind the /30",
        "the network is 203.0.113.32/30",
    );
    refused(
        &[("ipAddress: 203.0.113.30", "ipAddress: 203.0.113.33")],
        "203.0.113.32/30",
        "203.0.113.33 is defined twice as a public address",
        "use the first definition",
    );
    refused(
        &[(PREFIX, "ipPrefix: 10.0.9.0/30")],
        "10.0.9.0/30",
        "public prefix 10.0.9.0/30 is inside the address space of `lab`",
        "choose an address outside",
    );
    refused(
        &[("frontendIPConfiguration: fe-web\n", "frontendIPConfiguration: fe-out\n")],
        "fe-out",
        "load balancing rule `http` is on a public IP prefix",
        "prefixes are for outbound rules: name a frontend with a `publicIPAddress`",
    );
    refused(
        &[("publicIPPrefix: pp-out }", "publicIPPrefix: pp-out, publicIPAddress: pip-web }")],
        "publicIPPrefix",
        "`publicIPAddress` and `publicIPPrefix` are given together",
        "make it two frontends",
    );
    refused(
        &[("name: fe-web6, publicIPAddress: pip-web6", "name: fe-web6")],
        "fe-web6",
        "frontend `fe-web6` lacks `publicIPAddress` or `publicIPPrefix`",
        "add `publicIPAddress: ...`",
    );
    warned(
        &[(
            "publicIPPrefixes:\n",
            "publicIPPrefixes:\n  - { name: spare, ipPrefix: 198.51.100.0/31, announce: proxy }\n",
        )],
        "spare",
        "nothing uses public IP prefix `spare`",
        "name it as `publicIPPrefix` of a frontend, or remove it",
    );
    refused(
        &[("publicIPPrefix: pp-out", "publicIPPrefix: pp-uot")],
        "pp-uot",
        "no public IP prefix is named `pp-uot`",
        "did you mean `pp-out`?",
    );
}

#[test]
fn probes_ask_for_what_azure_lets_them() {
    for (to, at, message, help) in [
        (
            "protocol: Tcp, port: 8080, requestPath: /health",
            "requestPath",
            "probe `alive` is a Tcp probe and has a path",
            "remove `requestPath`",
        ),
        (
            "protocol: Http, port: 8080",
            "alive",
            "probe `alive` lacks `requestPath`",
            "such as `requestPath: /health`",
        ),
        (
            "protocol: Https, port: 8080, requestPath: /",
            "Https",
            "probe `alive` is an HTTPS probe, which there is none of",
            "use `Tcp`, or `Http`",
        ),
        (
            "protocol: Http, port: 8080, requestPath: health",
            "health",
            "the request path does not begin with `/`",
            "such as /health",
        ),
        (
            "protocol: Http, port: 8080, requestPath: \"/a\\r\\nHost: b\"",
            "\"/a",
            "the request path contains '\\r'",
            "visible ASCII",
        ),
        (
            "protocol: Http, port: 8080, requestPath: \"/a b\"",
            "\"/a b",
            "the request path contains ' '",
            "visible ASCII",
        ),
        (
            "protocol: Http, port: 25, requestPath: /",
            "25",
            "probe `alive` probes port 25 with HTTP",
            "Azure refuses it too",
        ),
        (
            "protocol: Tcp, port: 8080, intervalInSeconds: 4",
            "4",
            "`intervalInSeconds` is 4, outside 5..=86400",
            "from 5 to",
        ),
        (
            "protocol: Tcp, port: 8080, probeThreshold: 0",
            "0",
            "`probeThreshold` is 0, outside 1..=100",
            "from 1 to 100",
        ),
        (
            "protocol: Tcp, port: 8080, probeThreshold: 101",
            "101",
            "`probeThreshold` is 101, outside 1..=100",
            "from 1 to 100",
        ),
        (
            "protocol: Tcp, port: 8080, probeThreshold: 2, numberOfProbes: 2",
            "numberOfProbes",
            "`probeThreshold` and `numberOfProbes` are given together",
            "they mean the same",
        ),
        ("protocol: Tcp, port: 0", "0", "`port` is 0, outside 1..=65535", "from 1 to"),
    ] {
        refused(&[(ALIVE, to)], at, message, help);
    }
    for port in [19, 21, 70, 110, 119, 143, 220, 993] {
        refused(
            &[(ALIVE, &format!("protocol: Http, port: {port}, requestPath: /"))],
            &port.to_string(),
            &format!("probe `alive` probes port {port} with HTTP"),
            "use `Tcp`",
        );
        accepted(&[(ALIVE, &format!("protocol: Tcp, port: {port}"))]);
    }
    warned(
        &[("        probe: alive\n", "")],
        "alive",
        "nothing uses probe `alive`",
        "name it as `probe` of a load balancing rule",
    );
    refused(
        &[("probe: alive", "probe: allive")],
        "allive",
        "no probe of this load balancer is named `allive`",
        "did you mean `alive`?",
    );
}

#[test]
fn idle_timeouts_have_the_limits_of_their_kind() {
    for (from, to, range) in [
        ("idleTimeoutInMinutes: 15", "idleTimeoutInMinutes: 31", "4..=30"),
        ("idleTimeoutInMinutes: 15", "idleTimeoutInMinutes: 3", "4..=30"),
        (
            SINGLE,
            "frontendPort: 2201, backendPort: 22, backendIPConfiguration: web1/v4, idleTimeoutInMinutes: 31",
            "4..=30",
        ),
        ("allocatedOutboundPorts: 0, idleTimeoutInMinutes: 4", "idleTimeoutInMinutes: 121", "4..=120"),
        (
            DEFAULT,
            "defaultOutbound: { publicIPAddress: pip-default, idleTimeoutInMinutes: 121 }\n",
            "4..=120",
        ),
    ] {
        let findings = policy::parse("policy.yaml", &changed(&[(from, to)])).map(|_| ()).expect_err("wrong");
        assert!(findings.to_string().contains(&format!("outside {range}")), "{findings}");
    }
    accepted(&[("idleTimeoutInMinutes: 15", "idleTimeoutInMinutes: 30")]);
}

#[test]
fn a_range_of_inbound_nat_has_a_port_for_every_member() {
    accepted(&[(SSH, "frontendPortRangeStart: 2210, frontendPortRangeEnd: 2211")]);
    refused(
        &[(SSH, "frontendPortRangeStart: 2210, frontendPortRangeEnd: 2210")],
        "2210",
        "inbound NAT rule `ssh` has 1 ports (2210 to 2210) for the 2 members of pool `web`",
        "the range needs 1 more",
    );
    refused(
        &[(SSH, "frontendPortRangeStart: 2219, frontendPortRangeEnd: 2210")],
        "2210",
        "the range of inbound NAT rule `ssh` ends before it begins",
        "write `frontendPortRangeStart: 2210` and `frontendPortRangeEnd: 2219`",
    );
    refused(
        &[(SSH, "frontendPort: 2210, frontendPortRangeEnd: 2219")],
        "frontendPortRangeEnd",
        "`frontendPortRangeEnd` and `frontendPort` are given together",
        "one port and one member: `frontendPort`, `backendIPConfiguration`; a range and a pool",
    );
    refused(
        &[(SSH, "frontendPortRangeStart: 2210")],
        "ssh",
        "inbound NAT rule `ssh` lacks `frontendPortRangeEnd`",
        "add `frontendPortRangeEnd: ...`",
    );
    refused(
        &[(SINGLE, "frontendPort: 2201, backendPort: 22")],
        "ssh-web1",
        "inbound NAT rule `ssh-web1` lacks `backendIPConfiguration`",
        "add `backendIPConfiguration: ...`",
    );
}

#[test]
fn default_outbound_and_the_subnets_that_allow_it_need_each_other() {
    refused(
        &[(DEFAULT, ""), ("  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }\n", "")],
        "true",
        "subnet `build` allows default outbound, but there is none",
        "add `defaultOutbound: { publicIPAddress: ... }` to the policy",
    );
    warned(
        &[(ACCESS, "")],
        "defaultOutbound",
        "no subnet allows default outbound: nobody leaves by it",
        "write `defaultOutboundAccess: true` in a subnet",
    );
    accepted(&[
        (ACCESS, ", defaultOutboundAccess: false"),
        (DEFAULT, ""),
        ("  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }\n", ""),
    ]);
    refused(
        &[(
            "defaultOutbound:\n  publicIPAddress: pip-default",
            "defaultOutbound:\n  publicIPAddressIPv6: pip-default",
        )],
        "pip-default",
        "`pip-default` is IPv4, IPv6 is needed here",
        "write it as `publicIPAddress`",
    );
    refused(
        &[
            (
                "defaultOutbound:\n  publicIPAddress: pip-default",
                "defaultOutbound:\n  publicIPAddress: pip-mail",
            ),
            ("  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }\n", ""),
        ],
        "pip-mail",
        "public IP address `pip-mail` is used twice",
        "define another one",
    );
    let text = changed(&[
        ("  publicIPAddress: pip-default\n", ""),
        ("  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }\n", ""),
    ]);
    let findings = policy::parse("policy.yaml", &text).map(|_| ()).expect_err("wrong");
    one_error(
        &findings,
        &text,
        "defaultOutbound",
        "`defaultOutbound` has no address",
        "add `publicIPAddress: ...`",
    );
}

#[test]
fn default_outbound_is_for_those_who_have_no_other_way_out() {
    let members = |changes: Changes<'_>, v6| {
        let network =
            policy::parse("policy.yaml", &changed(changes)).unwrap_or_else(|found| panic!("{found}")).network;
        allocation::default_outbound_members(&network, v6)
    };
    let everywhere = [
        ("networkSecurityGroup: web }", "networkSecurityGroup: web, defaultOutboundAccess: true }"),
        ("networkSecurityGroup: mail }", "networkSecurityGroup: mail, defaultOutboundAccess: true }"),
    ];
    assert_eq!(members(&[], false), [(3, 0)]);
    // The mail server has an address of its own, the web servers a pool with rules.
    assert_eq!(members(&everywhere, false), [(3, 0)]);
    assert_eq!(members(&everywhere, true), []);
    let mut own = everywhere.to_vec();
    own.extend([(", publicIPAddress: pip-mail", ""), ("web1/v4, web1/v6, web2]", "web1/v6, web2]")]);
    assert_eq!(members(&own, false), [(0, 0), (2, 0), (3, 0)]);
}

/// A policy whose pool has so many members, with these parts of a load balancer.
fn pool(members: usize, publics: &str, balancer: &str, rest: &str) -> String {
    let mut text = String::from(
        "virtualNetworks:\n  - name: v\n    addressSpace: { addressPrefixes: [10.0.0.0/8] }\n    subnets:\n      - { name: s, addressPrefix: 10.0.0.0/16, defaultOutboundAccess: true }\nnetworkInterfaces:\n",
    );
    let mut names = Vec::new();
    for n in 0..members {
        text += &format!(
            "  - {{ name: m{n}, device: lan, ipConfigurations: [{{ subnet: s, privateIPAddress: 10.0.{}.{} }}] }}\n",
            1 + n / 200,
            2 + n % 200
        );
        names.push(format!("m{n}"));
    }
    text += &format!(
        "publicIPAddresses:\n{publics}  - {{ name: d, ipAddress: 203.0.113.99, announce: proxy }}\n"
    );
    if !balancer.is_empty() {
        text += &format!(
            "loadBalancers:\n  - name: lb\n    backendAddressPools: [{{ name: p, backendIPConfigurations: [{}] }}]\n{balancer}",
            names.join(", ")
        );
    }
    text + "uplinks: [{ device: up }]\n" + rest
}

const A: &str = "  - { name: a, ipAddress: 203.0.113.1, announce: proxy }\n";
const DEFAULT_D: &str = "defaultOutbound: { publicIPAddress: d }\n";
const FE_A: &str = "    frontendIPConfigurations: [{ name: a, publicIPAddress: a }]\n";

fn said(text: &str) -> String {
    match policy::parse("policy.yaml", text) {
        Ok(loaded) => loaded.warnings.to_string(),
        Err(findings) => findings.to_string(),
    }
}

#[test]
fn units_with_a_listener_are_lost_to_snat_once_each() {
    // 8 members of 8,000 ports fill an address.
    let with = |rules: &str, ports: u32| {
        let balancer = format!(
            "{FE_A}    outboundRules: [{{ name: out, frontendIPConfigurations: [a], backendAddressPool: p, protocol: All, allocatedOutboundPorts: {ports} }}]\n    loadBalancingRules: [{rules}]\n"
        );
        said(&pool(8, A, &balancer, DEFAULT_D))
    };
    let rule = |port: u32| {
        format!(
            "{{ name: r{port}, frontendIPConfiguration: a, backendAddressPool: p, protocol: Tcp, frontendPort: {port}, disableOutboundSnat: true }},"
        )
    };
    assert_eq!(with("", 8000), "");
    // Ports below 1024 are no SNAT ports anyway.
    assert_eq!(with(&rule(80), 8000), "");
    let full = with(&rule(8080), 8000);
    assert!(
        full.contains("needs 64000 ports (8000 per member x 8 members), its frontend has 63992"),
        "{full}"
    );
    let full = with(&(rule(8080) + &rule(8087)), 8000);
    assert!(full.contains("its frontend has 63992"), "two in one block cost one: {full}");
    let full = with(&(rule(8080) + &rule(8088)), 8000);
    assert!(
        full.contains("its frontend has 63984") && full.contains("at most 7992 ports per member fit"),
        "{full}"
    );
    assert_eq!(with(&(rule(8080) + &rule(8088)), 7992), "");
}

#[test]
fn a_range_of_inbound_nat_costs_its_units_too() {
    let balancer = format!(
        "{FE_A}    outboundRules: [{{ name: out, frontendIPConfigurations: [a], backendAddressPool: p, protocol: Tcp, allocatedOutboundPorts: 32000 }}]\n    inboundNatRules: [{{ name: n, frontendIPConfiguration: a, protocol: Udp, frontendPortRangeStart: 50000, frontendPortRangeEnd: 50009, backendPort: 9, backendAddressPool: p }}]\n"
    );
    let text = said(&pool(2, A, &balancer, DEFAULT_D));
    assert!(
        text.contains("needs 64000 ports (32000 per member x 2 members), its frontend has 63984"),
        "{text}"
    );
}

#[test]
fn load_balancing_rules_give_their_pool_the_tier_of_its_size() {
    let balancer = |more: &str| {
        format!(
            "{FE_A}    loadBalancingRules: [{{ name: r, frontendIPConfiguration: a, backendAddressPool: p, protocol: Tcp, frontendPort: 80{more} }}]\n"
        )
    };
    assert_eq!(said(&pool(50, A, &balancer(""), DEFAULT_D)), "");
    let host = A.replace("proxy", "address");
    let text = said(&pool(50, &host, &balancer(""), DEFAULT_D));
    assert!(text.contains("load balancing rule r needs 51200 ports (1024 per member (the default) x 50 members), its frontend has 36280"), "{text}");
    assert!(text.contains("set `reserveHostPorts: true`"), "{text}");
    let large = said(&pool(1001, A, &balancer(""), DEFAULT_D));
    assert!(large.contains("no default allocation for the 1001 members of pool `p`"), "{large}");
    assert!(large.contains("`disableOutboundSnat: true`"), "{large}");
    // Two pools on one frontend share it.
    let two = "    frontendIPConfigurations: [{ name: a, publicIPAddress: a }]\n    outboundRules: [{ name: out, frontendIPConfigurations: [a], backendAddressPool: p, protocol: Udp, allocatedOutboundPorts: 64000 }]\n    loadBalancingRules: [{ name: r, frontendIPConfiguration: a, backendAddressPool: p, protocol: Tcp, frontendPort: 80, disableOutboundSnat: true }]\n";
    assert_eq!(said(&pool(1, A, two, DEFAULT_D)), "");
}

#[test]
fn the_variants_of_allocation_are_checked_by_what_they_need() {
    let publics = format!("{A}{}", A.replace("name: a", "name: b").replace(".1,", ".2,"));
    let balancer = |variant: &str| {
        format!(
            "    snatAllocation: {variant}\n    frontendIPConfigurations: [{{ name: a, publicIPAddress: a }}, {{ name: b, publicIPAddress: b }}]\n    outboundRules: [{{ name: out, frontendIPConfigurations: [a, b], backendAddressPool: p, protocol: All }}]\n"
        )
    };
    for variant in ["min1024", "multiply", "basic"] {
        assert_eq!(said(&pool(50, &publics, &balancer(variant), DEFAULT_D)), "", "{variant}");
    }
    // 50 members: 1,024 of two addresses; 2,048 of them; 1,024 of either, of which one is the host's.
    let host = publics.replacen("proxy", "address", 1);
    assert_eq!(said(&pool(50, &host, &balancer("min1024"), DEFAULT_D)), "");
    let multiply = said(&pool(50, &host, &balancer("multiply"), DEFAULT_D));
    assert!(multiply.contains("needs 102400 ports (2048 per member (the default) x 50 members), its set of 2 frontends has 100280"), "{multiply}");
    let basic = said(&pool(50, &host, &balancer("basic"), DEFAULT_D));
    assert!(basic.contains("needs 51200 ports (1024 per member (the default) x 50 members), its smallest of 2 frontends has 36280"), "{basic}");
}

#[test]
fn every_address_of_a_prefix_has_its_own_64000_ports() {
    let balancer = |ports: u32| {
        format!(
            "    frontendIPConfigurations: [{{ name: a, publicIPPrefix: pp }}]\n    outboundRules: [{{ name: out, frontendIPConfigurations: [a], backendAddressPool: p, protocol: All, allocatedOutboundPorts: {ports} }}]\n"
        )
    };
    let prefix = format!(
        "{DEFAULT_D}publicIPPrefixes: [{{ name: pp, ipPrefix: 198.51.100.0/30, announce: routed }}]\n"
    );
    assert_eq!(said(&pool(4, "", &balancer(64000), &prefix)), "");
    let text = said(&pool(5, "", &balancer(64000), &prefix));
    assert!(
        text.contains("needs 320000 ports (64000 per member x 5 members), its frontend has 256000"),
        "{text}"
    );
}

#[test]
fn default_outbound_has_room_for_a_thousand_guests_on_an_address_of_its_own() {
    assert_eq!(said(&pool(1000, "", "", DEFAULT_D)), "");
    let many = said(&pool(1001, "", "", DEFAULT_D));
    assert!(
        many.contains("1001 IPv4 addresses of guests leave by default outbound")
            && many.contains("it has ports for 1000"),
        "{many}"
    );
    let host = said(
        &pool(50, "", "", DEFAULT_D)
            .replace("203.0.113.99, announce: proxy", "203.0.113.99, announce: address"),
    );
    assert!(
        host.contains(
            "default outbound needs 51200 ports (1024 for each of 50 IPv4 addresses), `d` has 36280"
        ),
        "{host}"
    );
    assert!(host.contains("set `reserveHostPorts: true`"), "{host}");
}

#[test]
fn several_mistakes_are_reported_at_once() {
    let text = changed(&[
        ("ipPrefix: 203.0.113.32/30", "ipPrefix: 203.0.113.0/24"),
        ("protocol: Http, port: 8080", "protocol: Http, port: 25"),
        ("frontendPort: 80\n", "frontendPort: 0\n"),
        ("loadDistribution: SourceIP #", "loadDistribution: RoundRobin #"),
        (SSH, "frontendPortRangeStart: 2210, frontendPortRangeEnd: 2210"),
        ("idleTimeoutInMinutes: 4, enableTcpReset: true }", "idleTimeoutInMinutes: 200 }"),
        ("onExhaustion: icmp", "onExhaustion: rst"),
    ]);
    let findings = policy::parse("policy.yaml", &text).map(|_| ()).expect_err("the policy is wrong");
    let expected = [
        "203.0.113.0/24 has more than 16 addresses",
        "probe `alive` probes port 25 with HTTP",
        "`frontendPort` is 0, outside 1..=65535",
        "`loadDistribution` cannot be `RoundRobin`",
        "inbound NAT rule `ssh` has 1 ports (2210 to 2210) for the 2 members of pool `web`",
        "`idleTimeoutInMinutes` is 200, outside 4..=120",
        "`onExhaustion` cannot be `rst`",
    ];
    assert_eq!(messages(&findings), expected);
    assert!(findings.entries().iter().all(|entry| !entry.help.is_empty() && entry.span.is_some()));
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
