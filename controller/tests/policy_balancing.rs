//! Load balancers and public addresses: every check says where and what to do.

mod policy_support;

use policy_support::balanced::*;
use portcullis::policy;

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
fn two_rules_to_one_backend_port_are_warned_of() {
    let second = |more: &str| {
        format!(
            "{RULES}      - {{ name: second, frontendIPConfiguration: fe-web, backendAddressPool: web, disableOutboundSnat: true, protocol: Tcp, frontendPort: 81, {more} }}\n"
        )
    };
    warned(
        &[(RULES, &second("backendPort: 8080"))],
        "http",
        "two load balancing rules send to port 8080 of one pool",
        "choose another backendPort, or enableFloatingIP",
    );
    accepted(&[(RULES, &second("backendPort: 8080, enableFloatingIP: true"))]);
    accepted(&[(RULES, &second("backendPort: 8081"))]);
}
