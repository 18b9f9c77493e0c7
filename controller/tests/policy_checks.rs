//! Every check of the policy, as small changes to a policy that is in order.

use portcullis::policy::{self, Diagnostics, Severity};

const GOOD: &str = include_str!("../../examples/quickstart.yaml");

fn findings(text: &str) -> Diagnostics {
    match policy::parse("policy.yaml", text) {
        Ok(loaded) => loaded.warnings,
        Err(findings) => findings,
    }
}

/// The good policy with replacements; every one must occur.
fn changed(changes: &[(&str, &str)]) -> String {
    let mut text = GOOD.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "the example has no {from:?}");
        text = text.replacen(from, to, 1);
    }
    text
}

/// Asserts that the changes lead to exactly one finding, an error that contains `message`.
fn refused(changes: &[(&str, &str)], message: &str) {
    let findings = findings(&changed(changes));
    let errors: Vec<_> = findings.entries().iter().filter(|e| e.severity == Severity::Error).collect();
    assert!(
        errors.len() == 1 && errors[0].message.contains(message),
        "expected {message:?}, got\n{findings}"
    );
    assert!(!errors[0].help.is_empty() && errors[0].span.is_some(), "{findings}");
}

fn accepted(changes: &[(&str, &str)]) -> policy::Loaded {
    policy::parse("policy.yaml", &changed(changes)).unwrap_or_else(|findings| panic!("{findings}"))
}

const SMTP: &str = "destinationPortRange: 25";
const POSTGRES: &str = "sourceAddressPrefix: 10.0.1.0/24";
const WEB: &str = "addressPrefix: 10.0.1.0/24";
const SPACE: &str = "addressPrefixes: [10.0.0.0/16]";
const PORTS: &str = "allocatedOutboundPorts: 0";
const POOL: &str = "backendIPConfigurations: [vm1, vm2]";

#[test]
fn names_follow_azures_rule_and_are_unique_without_regard_to_case() {
    refused(&[("- name: DenySmtp", "- name: Deny Smtp")], "the name of this security rule contains ' '");
    refused(&[("- name: DenySmtp", "- name: DenySmtp.")], "ends with a punctuation mark");
    refused(
        &[("- name: AllowHttps", "- name: allowpostgresfromWEB")],
        "a second rule of this group is named",
    );
    refused(
        &[("- name: db-nsg", "- name: WEB-NSG"), ("Group: db-nsg", "Group: web-nsg")],
        "a second network security group",
    );
    refused(
        &[("- name: vm2", "- name: VM1"), (POOL, "backendIPConfigurations: [vm1]")],
        "a second network interface",
    );
    refused(
        &[
            ("- name: db", "- name: Web"),
            ("subnet: db", "subnet: web"),
            ("IPAddress: 10.0.2.4", "IPAddress: 10.0.1.9"),
        ],
        "a second subnet",
    );
}

#[test]
fn words_tags_and_references_are_read_without_regard_to_case() {
    let loaded = accepted(&[
        ("direction: Outbound", "direction: OUTBOUND"),
        ("access: Deny", "access: deny"),
        ("protocol: Tcp", "protocol: TCP"),
        ("destinationAddressPrefix: Internet", "destinationAddressPrefix: INTERNET"),
        ("sourceAddressPrefix: VirtualNetwork", "sourceAddressPrefix: VIRTUAL_NETWORK"),
        ("subnet: web", "subnet: LAB/Web"),
        ("networkSecurityGroup: web-nsg", "networkSecurityGroup: Web-NSG"),
        (POOL, "backendIPConfigurations: [VM1, vm2/PRIMARY]"),
        ("announce: proxy", "announce: Proxy"),
    ]);
    let plain = accepted(&[]);
    assert_eq!(loaded.network, plain.network);
}

#[test]
fn a_description_has_at_most_140_characters() {
    const GIVEN: &str = "description: No guest of this subnet sends mail directly";
    let described = |characters: usize| format!("description: {}", "é".repeat(characters));
    accepted(&[(GIVEN, &described(140))]);
    refused(&[(GIVEN, &described(141))], "the description is 141 characters long");
}

#[test]
fn required_fields_are_asked_for() {
    refused(&[("        protocol: Tcp\n", "")], "security rule `DenySmtp` lacks `protocol`");
    refused(&[("    device: pc-vm1\n", "")], "network interface `vm1` lacks `device`");
    refused(
        &[("        destinationPortRange: 25\n", "")],
        "lacks `destinationPortRange` or `destinationPortRanges`",
    );
    refused(
        &[("        sourceAddressPrefix: 10.0.1.0/24\n", "")],
        "lacks `sourceAddressPrefix` or `sourceAddressPrefixes`",
    );
    refused(
        &[("        addressPrefix: 10.0.1.0/24\n", "")],
        "subnet `web` lacks `addressPrefix` or `addressPrefixes`",
    );
    refused(&[("priority: 110", "priority:")], "`priority` has no value");
    accepted(&[("        sourcePortRange: '*'\n", "")]);
}

#[test]
fn ports_are_numbers_texts_ranges_and_lists() {
    for good in ["'25'", "25-30", "'*'", "0-65535"] {
        accepted(&[(SMTP, &format!("destinationPortRange: {good}"))]);
    }
    let loaded = accepted(&[(SMTP, "destinationPortRanges: [465, '25', 20-24, 466]")]);
    assert_eq!(loaded.network.groups[0].rules[0].destination_ports, [(20, 25), (465, 466)]);
    refused(&[(SMTP, "destinationPortRange: '25,465'")], "several ports in one value");
    refused(&[(SMTP, "destinationPortRange: 30-25")], "ends before it begins");
    refused(&[(SMTP, "destinationPortRange: smtp")], "`smtp` is not a port");
    refused(&[(SMTP, "destinationPortRange: [25]")], "takes a single value, found a list");
    refused(&[(SMTP, "destinationPortRanges: 25")], "must be a list");
    refused(&[(SMTP, "destinationPortRanges: []")], "is empty");
    refused(&[(SMTP, "destinationPortRange: 25\n        destinationPortRanges: [26]")], "are given together");
    for protocol in ["Icmp", "Esp", "Ah"] {
        refused(&[("protocol: Tcp", &format!("protocol: {protocol}"))], "Icmp, Esp and Ah have no ports");
    }
    accepted(&[("protocol: Tcp", "protocol: Icmp"), ("        destinationPortRange: 25\n", "")]);
}

#[test]
fn a_rules_sides_are_addresses_prefixes_and_one_tag() {
    accepted(&[(POSTGRES, "sourceAddressPrefixes: [10.0.1.0/25, 10.0.1.200, Internet]")]);
    accepted(&[
        (POSTGRES, "sourceAddressPrefix: '2001:db8::/32'"),
        ("destinationAddressPrefix: 10.0.2.0/24", "destinationAddressPrefix: '*'"),
    ]);
    refused(&[(POSTGRES, "sourceAddressPrefix: 10.0.1.4/24")], "has bits set behind the /24");
    refused(&[(POSTGRES, "sourceAddressPrefix: Internett")], "there is no service tag `Internett`");
    refused(&[(POSTGRES, "sourceAddressPrefix: 10.0.1.0/24,10.0.9.0/24")], "several addresses in one value");
    refused(&[(POSTGRES, "sourceAddressPrefixes: [Internet, VirtualNetwork]")], "several service tags");
    refused(&[(POSTGRES, "sourceAddressPrefixes: ['*', 10.0.1.0/24]")], "'*' stands among others");
    refused(
        &[(POSTGRES, "sourceAddressPrefixes: [10.0.1.0/24, '2001:db8::/32']")],
        "IPv4 and IPv6 are mixed",
    );
    let mixed = changed(&[(POSTGRES, "sourceAddressPrefix: '2001:db8::/32'")]);
    assert!(findings(&mixed).entries()[0].message.contains("matches nothing"), "{}", findings(&mixed));
}

#[test]
fn a_guests_address_has_the_family_of_its_subnet() {
    let pool = (POOL, "backendIPConfigurations: [vm2]");
    refused(
        &[("privateIPAddress: 10.0.1.4", "privateIPAddress: 'fd00::4'"), pool],
        "fd00::4 is not in subnet `web`",
    );
}

#[test]
fn subnets_and_address_spaces_fit_together() {
    refused(&[(SPACE, "addressPrefixes: [10.0.0.0/16, 10.0.128.0/17]")], "overlap in one address space");
    refused(
        &[(SPACE, "addressPrefixes: [10.0.0.0/16, 169.254.0.0/17]")],
        "(link-local), which no virtual network can have",
    );
    refused(
        &[
            (SPACE, "addressPrefixes: [10.0.0.0/16, 203.0.0.0/16]"),
            ("ipAddress: 203.0.113.20", "ipAddress: 198.51.100.20"),
        ],
        "inside the address space of `lab`",
    );
    refused(&[(WEB, "addressPrefixes: [10.0.1.0/24, 10.1.1.0/24]")], "outside the address space of `lab`");
    refused(&[(WEB, "addressPrefixes: [10.0.1.0/24, 10.0.9.8/31]")], "no room for a gateway and a guest");
    refused(
        &[(WEB, "addressPrefix: 10.0.1.0/24\n        gateway: 10.0.2.1")],
        "gateway 10.0.2.1 is not in subnet `web`",
    );
    refused(
        &[(WEB, "addressPrefix: 10.0.1.0/24\n        gateway: 10.0.1.255")],
        "gateway 10.0.1.255 is the broadcast address of 10.0.1.0/24",
    );
    let loaded =
        accepted(&[(WEB, "addressPrefixes: [10.0.1.0/24, 10.0.9.0/24]\n        gateway: 10.0.1.254")]);
    let gateways: Vec<_> = loaded.network.subnets[0].gateways.iter().map(ToString::to_string).collect();
    assert_eq!(gateways, ["10.0.1.254", "10.0.9.1"]);
}

#[test]
fn a_subnets_bare_name_must_be_unique() {
    let other = "virtualNetworks:\n  - name: two\n    addressSpace: { addressPrefixes: [10.0.0.0/16] }\n    subnets:\n      - { name: db, addressPrefix: 10.0.2.0/24 }\n";
    refused(&[("virtualNetworks:\n", other)], "several virtual networks have a subnet `db`");
    let loaded = accepted(&[("virtualNetworks:\n", other), ("subnet: db", "subnet: lab/db")]);
    let plain = accepted(&[]);
    assert_eq!(
        loaded.network.virtual_networks[1].id, plain.network.virtual_networks[0].id,
        "ids do not depend on the order"
    );
    assert_ne!(loaded.network.virtual_networks[0].id, loaded.network.virtual_networks[1].id);
    refused(
        &[
            ("virtualNetworks:\n", other),
            ("subnet: db", "subnet: lab/db"),
            (
                "{ name: primary, subnet: web, privateIPAddress: 10.0.1.4 }",
                "{ name: primary, subnet: web, privateIPAddress: 10.0.1.4 }\n      - { name: second, subnet: two/db, privateIPAddress: 10.0.2.9 }",
            ),
            (POOL, "backendIPConfigurations: [vm1/primary, vm2]"),
        ],
        "has addresses in two virtual networks",
    );
}

#[test]
fn guests_addresses_are_usable_and_their_own() {
    for (address, why) in [
        ("10.0.1.0", "the network address"),
        ("10.0.1.1", "the gateway"),
        ("10.0.1.255", "the broadcast address"),
    ] {
        refused(&[("privateIPAddress: 10.0.1.4", &format!("privateIPAddress: {address}"))], why);
    }
    refused(&[("privateIPAddress: 10.0.1.4", "privateIPAddress: 10.0.1.4/24")], "is not an IP address");
    refused(&[("device: pc-vm1", "device: a-name-of-sixteen")], "Linux allows 15");
    refused(
        &[("device: pc-vm1", "device: pc-vm1\n    macAddress: 01:00:5e:00:00:01")],
        "group or zero address",
    );
    // A LAN port with several guests behind it.
    accepted(&[("device: pc-vm2", "device: pc-vm1\n    macAddress: 02-00-00-00-00-02")]);
    refused(
        &[("device: pc-vm1", "device: lan\n    hook: tc"), ("device: pc-vm2", "device: lan\n    hook: xdp")],
        "two different hooks",
    );
    let loaded =
        accepted(&[("device: pc-vm1", "device: lan"), ("device: pc-vm2", "device: lan\n    hook: tc")]);
    assert_eq!(loaded.network.interfaces[0].hook, loaded.network.interfaces[1].hook);
}

#[test]
fn a_public_address_has_one_user() {
    let vm1 = (
        "{ name: primary, subnet: web, privateIPAddress: 10.0.1.4 }",
        "{ name: primary, subnet: web, privateIPAddress: 10.0.1.4, publicIPAddress: pip-vm3 }",
    );
    refused(&[vm1], "public IP address `pip-vm3` is used twice");
    refused(
        &[("publicIPAddress: pip-web", "publicIPAddress: pip-vm3")],
        "public IP address `pip-vm3` is used twice",
    );
    refused(&[("ipAddress: 203.0.113.20", "ipAddress: 203.0.113.10")], "203.0.113.10 is defined twice");
    refused(&[("ipAddress: 203.0.113.20", "ipAddress: 10.0.7.7")], "inside the address space of `lab`");
    refused(&[("ipAddress: 203.0.113.20", "ipAddress: 127.0.0.1")], "cannot be a public address");
    let unused = findings(&changed(&[(", publicIPAddress: pip-vm3 }", " }")]));
    assert!(
        !unused.has_errors()
            && unused.entries()[0].message.contains("nothing uses public IP address `pip-vm3`")
    );
}

#[test]
fn uplinks_are_apart_from_guests_and_needed_for_public_addresses() {
    refused(&[("device: pc-up", "device: pc-vm1")], "both an uplink and a guest's device");
    refused(&[("device: pc-up", "device: pc-up\n  - device: pc-up")], "is an uplink twice");
    let text = changed(&[]);
    let without = text.replace("uplinks:\n  - device: pc-up\n    hook: auto", "uplinks: []\n# was:");
    assert!(
        findings(&without).to_string().contains("but the policy has no uplink"),
        "{}",
        findings(&without)
    );
}

#[test]
fn outbound_rules_fit_their_frontends() {
    refused(
        &[(PORTS, "allocatedOutboundPorts: 1001")],
        "IsNotAMultipleOfEight: outbound rule `web-out` asks for 1001 ports",
    );
    refused(
        &[(PORTS, "allocatedOutboundPorts: 32008")],
        "needs 64016 ports (32008 per member x 2 members), its frontend has 64000",
    );
    accepted(&[(PORTS, "allocatedOutboundPorts: 32000")]);
    // An address of the host itself has fewer.
    refused(
        &[(PORTS, "allocatedOutboundPorts: 32000"), ("announce: proxy", "announce: address")],
        "its frontend has 36280",
    );
    accepted(&[(PORTS, "allocatedOutboundPorts: 18136"), ("announce: proxy", "announce: address")]);
    accepted(&[
        (PORTS, "allocatedOutboundPorts: 32000"),
        ("announce: proxy", "announce: address"),
        ("device: pc-up", "device: pc-up\n    reserveHostPorts: true"),
    ]);
    refused(&[("idleTimeoutInMinutes: 4", "idleTimeoutInMinutes: 121")], "outside 4..=120");
    for reset in [false, true] {
        let loaded = accepted(&[("idleTimeoutInMinutes: 4", &format!("enableTcpReset: {reset}"))]);
        assert_eq!(loaded.network.load_balancers[0].outbound_rules[0].tcp_reset, reset);
    }
    refused(
        &[("frontendIPConfigurations: [web-frontend]", "frontendIPConfigurations: []")],
        "has no frontend",
    );
    refused(
        &[("frontendIPConfigurations: [web-frontend]", "frontendIPConfigurations: [web-fronted]")],
        "is named `web-fronted`",
    );
}

#[test]
fn pools_have_each_member_once_and_ports_from_one_pool() {
    refused(&[(POOL, "backendIPConfigurations: [vm1, vm2, vm1]")], "`vm1` is in pool `web-pool` twice");
    refused(&[(POOL, "backendIPConfigurations: [vm1, vm9]")], "no network interface is named `vm9`");
    refused(&[(POOL, "backendIPConfigurations: [vm1, vm2/other]")], "`vm2` has no ip configuration `other`");
    let second = "outboundRules:\n      - { name: o2, frontendIPConfigurations: [web-frontend], backendAddressPool: p2, protocol: All }";
    let pool =
        "backendIPConfigurations: [vm1, vm2]\n      - { name: p2, backendIPConfigurations: [vm2, vm3] }";
    refused(
        &[(POOL, pool), ("outboundRules:", second)],
        "`vm2/primary` has outbound ports from two pools: `lb/p2` and `lb/web-pool`",
    );
    let apart = "backendIPConfigurations: [vm1, vm2]\n      - { name: p2, backendIPConfigurations: [vm3] }";
    accepted(&[(POOL, apart), ("outboundRules:", second)]);
    refused(
        &[(POOL, apart), ("outboundRules:", second), (PORTS, "allocatedOutboundPorts: 32000")],
        "need 65024 ports together",
    );
    refused(
        &[("outboundRules:", &second.replace("p2", "web-pool"))],
        "two outbound rules give pool `web-pool` ports",
    );
}

#[test]
fn default_allocations_must_fit_too() {
    let pool = |members: usize| {
        let mut interfaces = String::from("networkInterfaces:\n");
        let mut names = Vec::new();
        for n in 0..members {
            let address = format!("10.0.{}.{}", 16 + n / 250, n % 250 + 2);
            interfaces += &format!(
                "  - {{ name: m{n}, device: lan, ipConfigurations: [{{ subnet: big, privateIPAddress: {address} }}] }}\n"
            );
            names.push(format!("m{n}"));
        }
        let subnet = "subnets:\n      - { name: big, addressPrefix: 10.0.16.0/20 }";
        [
            ("subnets:".to_owned(), subnet.to_owned()),
            ("networkInterfaces:\n".to_owned(), interfaces),
            (POOL.to_owned(), format!("backendIPConfigurations: [{}]", names.join(", "))),
        ]
    };
    let with = |members: usize, more: &[(&str, &str)]| {
        let pool = pool(members);
        let mut changes: Vec<_> = pool.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
        changes.extend(more);
        findings(&changed(&changes))
    };
    assert!(with(50, &[]).is_empty(), "{}", with(50, &[]));
    assert!(with(1000, &[]).is_empty());
    let host = with(50, &[("announce: proxy", "announce: address")]);
    assert!(
        host.to_string().contains(
            "needs 51200 ports (1024 per member (the default) x 50 members), its frontend has 36280"
        ),
        "{host}"
    );
    let large = with(1001, &[]);
    assert!(large.to_string().contains("no default allocation for the 1001 members"), "{large}");
    assert!(with(1001, &[(PORTS, "allocatedOutboundPorts: 56")]).is_empty());
}

#[test]
fn timers_and_the_flow_table_have_limits() {
    refused(&[("udpSeconds: 240", "udpSeconds: 0")], "`udpSeconds` is 0, outside 1..=86400");
    refused(&[("udpSeconds: 240", "udpSeconds: '240'")], "must be a number");
    refused(&[("maxFlows: 262144", "maxFlows: 1000")], "outside 1024..=4194304");
    refused(&[("dhcp: true", "dhcp: yes")], "must be true or false");
    refused(
        &[("dhcp: true", "services: [{ protocol: Icmp, portRange: 22 }]")],
        "`protocol` cannot be `Icmp`",
    );
    let loaded = accepted(&[("dhcp: true", "services: [{ protocol: tcp, portRange: 22 }]")]);
    assert_eq!(loaded.network.host_access.services.len(), 1);
}

#[test]
fn what_azure_has_and_this_does_not_is_named() {
    refused(
        &[("addressPrefix: 10.0.1.0/24", "natGateway: gw\n        addressPrefix: 10.0.1.0/24")],
        "NAT gateways are not available yet",
    );
    refused(&[("uplinks:", "properties: {}\nuplinks:")], "Azure's nested `properties` does not exist here");
    refused(&[("name: vm1\n", "name: vm1\n    name: vm1\n")], "`name` is given twice");
}
