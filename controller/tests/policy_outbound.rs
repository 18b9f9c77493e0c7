//! Ways out: who has SNAT ports of what, and who has none.

mod policy_support;

use policy_support::Changes;
use policy_support::balanced::*;
use portcullis::policy;
use portcullis::policy::allocation;
use portcullis::policy::network::TransportProtocol;

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
    refused(
        &[
            ("  publicIPAddress: pip-default\n", ""),
            ("  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }\n", ""),
        ],
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
