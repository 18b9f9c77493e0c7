//! Rules' limits, and the settings of the whole policy: platform rules and services, live flows, tables.

mod policy_support;

use policy_support::{accepted, changed, refused, refused_text, warned};
use portcullis::policy;
use portcullis::policy::network::{
    FlowTable, Limits, OnRuleChange, Platform, PlatformService, RuleProtocol, TransportProtocol,
};

const MINIMAL: &str = include_str!("../../examples/minimal.yaml");

/// A policy with one group whose rules have these source prefixes.
fn rules(count: usize, limits: &str, source: impl Fn(usize) -> String) -> String {
    let mut text = MINIMAL.to_owned();
    text += limits;
    text += "\nnetworkSecurityGroups:\n  - name: big\n    securityRules:\n";
    for n in 0..count {
        let (direction, priority) =
            if n < 3997 { ("Inbound", 100 + n) } else { ("Outbound", 100 + n - 3997) };
        text += &format!(
            "      - {{ name: r{n}, priority: {priority}, direction: {direction}, access: Allow, protocol: Tcp, {}, destinationAddressPrefix: '*', destinationPortRange: 1 }}\n",
            source(n)
        );
    }
    text
}

fn any(_: usize) -> String {
    "sourceAddressPrefix: '*'".to_owned()
}

#[test]
fn a_group_has_a_thousand_rules_unless_the_limit_is_raised_up_to_what_the_datapath_holds() {
    policy::parse("policy.yaml", &rules(1000, "", any)).unwrap_or_else(|findings| panic!("{findings}"));
    refused_text(
        &rules(1001, "", any),
        "r1000",
        "more than 1000 rules in one group",
        "raise `limits.securityRulesPerGroup` (up to 7994)",
    );
    let raised = "limits: { securityRulesPerGroup: 7994 }\n";
    let loaded = policy::parse("policy.yaml", &rules(7994, raised, any))
        .unwrap_or_else(|findings| panic!("{findings}"));
    assert_eq!(loaded.network.groups[0].rules.len(), 7994);
    refused(
        &[("securityRulesPerGroup: 2000", "securityRulesPerGroup: 7995")],
        "7995",
        "`securityRulesPerGroup` is 7995, outside 1..=7994",
        "write a whole number from 1 to 7994",
    );
}

#[test]
fn addresses_are_counted_per_group_and_side_and_tags_are_not() {
    // 1,000 rules of four prefixes each fill a side; the tags beside them are free.
    let four = |n: usize| {
        let prefix = |m: usize| format!("10.{}.{}.{}", n / 200, n % 200, m);
        format!(
            "sourceAddressPrefixes: [{}, {}, {}, {}, Internet]",
            prefix(1),
            prefix(2),
            prefix(3),
            prefix(4)
        )
    };
    policy::parse("policy.yaml", &rules(1000, "", four)).unwrap_or_else(|findings| panic!("{findings}"));
    let five = |n: usize| if n == 999 { four(n).replace("Internet", "10.9.9.9") } else { four(n) };
    refused_text(
        &rules(1000, "", five),
        "10.9.9.9",
        "more than 4000 source addresses and prefixes in the rules of one group",
        "tags do not count), or raise `limits.addressPrefixesPerGroup`",
    );
    let raised = "limits: { addressPrefixesPerGroup: 4001 }\n";
    policy::parse("policy.yaml", &rules(1000, raised, five)).unwrap_or_else(|findings| panic!("{findings}"));
    refused(
        &[
            ("securityRulesPerGroup: 2000", "addressPrefixesPerGroup: 1"),
            (
                "destinationAddressPrefix: AzurePlatformIMDS",
                "destinationAddressPrefixes: [10.7.0.1, 10.7.0.2]",
            ),
        ],
        "10.7.0.2",
        "more than 1 destination addresses and prefixes",
        "define a service tag for them",
    );
}

#[test]
fn the_number_of_groups_is_limited_too() {
    refused(
        &[("securityRulesPerGroup: 2000", "networkSecurityGroups: 1")],
        "app",
        "more than 1 network security groups",
        "raise `limits.networkSecurityGroups`",
    );
}

#[test]
fn every_limit_is_read_and_azures_hold_otherwise() {
    let text = "securityRulesPerGroup: 2000";
    let all = "networkSecurityGroups: 11\n  securityRulesPerGroup: 12\n  addressPrefixesPerGroup: 13\n  applicationSecurityGroups: 14\n  \
               applicationSecurityGroupsPerIpConfiguration: 15\n  applicationSecurityGroupsPerRule: 16\n  \
               applicationSecurityGroupsPerGroup: 17\n  ipConfigurationsPerApplicationSecurityGroup: 18\n  policyMemoryMiB: 19";
    let limits = Limits {
        network_security_groups: 11,
        rules_per_group: 12,
        prefixes_per_group: 13,
        application_groups: 14,
        application_groups_per_configuration: 15,
        application_groups_per_rule: 16,
        application_groups_per_group: 17,
        configurations_per_application_group: 18,
        policy_memory_mib: 19,
    };
    assert_eq!(accepted(&[(text, all)]).network.limits, limits);
    assert_eq!(accepted(&[(text, "policyMemoryMiB: 512")]).network.limits, Limits::default());
    for field in [
        "networkSecurityGroups",
        "addressPrefixesPerGroup",
        "applicationSecurityGroups",
        "applicationSecurityGroupsPerIpConfiguration",
        "applicationSecurityGroupsPerRule",
        "applicationSecurityGroupsPerGroup",
        "ipConfigurationsPerApplicationSecurityGroup",
        "policyMemoryMiB",
    ] {
        refused(
            &[(text, &format!("{field}: 0"))],
            "0",
            &format!("`{field}` is 0, outside 1..="),
            "write a whole number",
        );
        refused(&[(text, &format!("{field}: 2000000"))], "2000000", "outside 1..=", "write a whole number");
    }
}

#[test]
fn all_protocols_and_spellings_of_a_rule_are_read() {
    let rule = ["access: Allow\n        protocol: Tcp", "destinationPortRange: 80\n"];
    for (word, protocol) in [
        ("TCP", RuleProtocol::Tcp),
        ("udp", RuleProtocol::Udp),
        ("UDP", RuleProtocol::Udp),
        ("Icmp", RuleProtocol::Icmp),
        ("ESP", RuleProtocol::Esp),
        ("ah", RuleProtocol::Ah),
        ("'*'", RuleProtocol::Any),
    ] {
        let access = format!("access: ALLOW\n        protocol: {word}");
        let has_ports = matches!(protocol, RuleProtocol::Tcp | RuleProtocol::Udp | RuleProtocol::Any);
        let ports = if has_ports { "destinationPortRange: '80'\n" } else { "destinationPortRange: '*'\n" };
        let loaded =
            accepted(&[(rule[0], &access), (rule[1], ports), ("direction: Inbound", "direction: inbound")]);
        assert_eq!(loaded.network.groups[0].rules[0].protocol, protocol);
    }
}

#[test]
fn platform_rules_and_services_are_read() {
    let kms = ("allowKms: false", "allowKms: true\n  kmsServers: [192.0.2.1, 198.51.100.0/30]");
    let platform = accepted(&[kms]).network.platform;
    let service = PlatformService {
        name: "metadata".to_owned(),
        address: "169.254.169.254".parse().unwrap(),
        protocol: TransportProtocol::Tcp,
        port: 80,
    };
    let kms_servers = ["192.0.2.1/32", "198.51.100.0/30"].map(|net| net.parse().unwrap()).to_vec();
    assert_eq!(
        platform,
        Platform { allow_kms: true, kms_servers, block_smtp: true, services: vec![service] }
    );
    assert_eq!(accepted(&[]).network.platform.kms_servers, Platform::default().kms_servers);
    assert!(accepted(&[]).places.contains_key("platformServices/metadata"));
    refused(
        &[("allowKms: false", "kmsServers: []")],
        "kmsServers",
        "`kmsServers` is empty",
        "leave `kmsServers` out to use Azure's",
    );
    refused(
        &[("allowKms: false", "kmsServers: [kms.example]")],
        "kms.example",
        "`kms.example` is not an address prefix",
        "write a prefix",
    );
    refused(&[("allowKms: false", "allowKms: 1")], "1", "`allowKms` must be true or false", "without quotes");
}

#[test]
fn a_platform_service_is_at_a_platform_address_and_declared_once() {
    let service = "{ name: metadata, address: 169.254.169.254, protocol: Tcp, port: 80 }";
    refused(
        &[("address: 169.254.169.254", "address: 169.254.169.253")],
        "169.254.169.253",
        "`169.254.169.253` is not an address of the platform",
        "use 168.63.129.16 or 169.254.169.254",
    );
    refused(&[("port: 80 }", "port: 0 }")], "0", "`port` is 0, outside 1..=65535", "from 1 to 65535");
    refused(
        &[("protocol: Tcp, port", "protocol: Icmp, port")],
        "Icmp",
        "`protocol` cannot be `Icmp`",
        "use one of: `Tcp`, `Udp`, `All`",
    );
    let second = |text: &str| format!("{service}\n  - {text}");
    refused(
        &[(service, &second("{ name: other, address: 169.254.169.254, protocol: All, port: 80 }"))],
        "80",
        "port 80 of 169.254.169.254 is declared twice",
        "let one be Tcp and the other Udp",
    );
    refused(
        &[(service, &second("{ name: Metadata, address: 168.63.129.16, protocol: All, port: 53 }"))],
        "Metadata",
        "a second platform service is named `Metadata`",
        "rename one of them",
    );
    let beside = second("{ name: dns, address: 168.63.129.16, protocol: all, port: 53 }");
    assert_eq!(accepted(&[(service, &beside)]).network.platform.services.len(), 2);
    accepted(&[(service, &second("{ name: udp, address: 169.254.169.254, protocol: Udp, port: 80 }"))]);
}

#[test]
fn what_a_change_of_rules_does_to_live_flows_is_said_once() {
    assert_eq!(accepted(&[]).network.on_rule_change, OnRuleChange::Keep);
    let loaded = accepted(&[("onRuleChange: keep", "onRuleChange: Reevaluate")]);
    assert_eq!(loaded.network.on_rule_change, OnRuleChange::Reevaluate);
    assert_eq!(accepted(&[("onRuleChange: keep\n", "")]).network.on_rule_change, OnRuleChange::Keep);
    refused(
        &[("onRuleChange: keep", "onRuleChange: drop")],
        "drop",
        "`onRuleChange` cannot be `drop`",
        "use one of: `keep`, `reevaluate`",
    );
    refused(
        &[("- name: tiers", "- name: tiers\n    flushConnection: true")],
        "flushConnection",
        "write `onRuleChange: reevaluate` at the top",
        "remove it",
    );
}

#[test]
fn both_flow_tables_have_a_size() {
    let table = accepted(&[("maxFlowsIPv6: 65536", "maxFlowsIPv6: 4194304")]).network.flow_table;
    assert_eq!(
        table,
        FlowTable {
            max_flows: 262_144,
            max_flows_v6: 4_194_304,
            max_flows_per_guest: 65_536,
            max_flows_per_guest_v6: 1_048_576,
        }
    );
    assert_eq!(accepted(&[("  maxFlowsIPv6: 65536\n", "")]).network.flow_table, FlowTable::default());
    refused(
        &[("maxFlowsIPv6: 65536", "maxFlowsIPv6: 1023")],
        "1023",
        "`maxFlowsIPv6` is 1023, outside 1024..=4194304",
        "from 1024 to 4194304",
    );
}

#[test]
fn a_guest_may_hold_a_quarter_of_either_table_but_no_less_than_1024_flows_or_what_the_policy_says() {
    let small = accepted(&[("maxFlowsIPv6: 65536", "maxFlowsIPv6: 2048")]).network.flow_table;
    assert_eq!((small.max_flows_per_guest, small.max_flows_per_guest_v6), (65_536, 1024));
    let told = "maxFlowsIPv6: 65536\n  maxFlowsPerGuest: 16\n  maxFlowsPerGuestIPv6: 5000";
    let told = accepted(&[("maxFlowsIPv6: 65536", told)]).network.flow_table;
    assert_eq!((told.max_flows_per_guest, told.max_flows_per_guest_v6), (16, 5000));
    refused(
        &[("maxFlowsIPv6: 65536", "maxFlowsPerGuest: 15")],
        "15",
        "`maxFlowsPerGuest` is 15, outside 16..=4194304",
        "from 16 to 4194304",
    );
}

#[test]
fn a_rule_of_two_families_is_warned_of() {
    let text = changed(&[]);
    assert!(text.contains("sourceAddressPrefix: Offices"));
    warned(
        &[
            ("sourceAddressPrefix: Offices", "sourceAddressPrefix: '2001:db8::/32'"),
            ("destinationAddressPrefix: '*'", "destinationAddressPrefix: 10.1.1.4"),
        ],
        "AllowOffices",
        "matches nothing: one side is IPv4, the other IPv6",
        "write both sides in one family",
    );
}
