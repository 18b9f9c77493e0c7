//! SNAT ports: what pools need, and what addresses have.

use portcullis::policy;

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
    // An outbound rule for Udp leaves the Tcp ports of its frontend alone, but not the frontend.
    let udp = format!(
        "{}    outboundRules: [{{ name: out, frontendIPConfigurations: [a], backendAddressPool: p, protocol: Udp, allocatedOutboundPorts: 64000 }}]\n",
        balancer(", disableOutboundSnat: true")
    );
    assert_eq!(said(&pool(1, A, &udp, DEFAULT_D)), "");
}

#[test]
fn pools_that_share_a_frontend_share_its_ports() {
    let rules = "    loadBalancingRules:\n      - { name: r, frontendIPConfiguration: a, backendAddressPool: p, protocol: Tcp, frontendPort: 80 }\n      - { name: s, frontendIPConfiguration: a, backendAddressPool: q, protocol: Tcp, frontendPort: 81 }\n";
    let two = |announce: &str, rules: &str| {
        let text = pool(50, &A.replace("proxy", announce), &format!("{FE_A}{rules}"), DEFAULT_D);
        text.replacen(", m25,", "] }, { name: q, backendIPConfigurations: [m25,", 1)
    };
    assert_eq!(said(&two("proxy", rules)), "");
    let text = said(&two("address", rules));
    assert!(
        text.contains("load balancing rule r, load balancing rule s need 51200 ports together, the frontend they share has 36280"),
        "{text}"
    );
    // Tcp and Udp are counted apart.
    assert_eq!(said(&two("address", &rules.replacen("q, protocol: Tcp", "q, protocol: Udp", 1))), "");
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
