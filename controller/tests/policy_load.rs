//! What a policy in order becomes, and what is said about files that cannot be read as one.

use std::path::Path;

use portcullis::policy::network::{
    AddressMatch, Announce, Direction, RuleProtocol, ServiceTag, TransportProtocol,
};
use portcullis::policy::{self, Diagnostics};

fn quickstart() -> policy::Loaded {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.yaml");
    policy::load(&path).unwrap_or_else(|findings| panic!("{findings}"))
}

fn refused(text: &str) -> Diagnostics {
    policy::parse("policy.yaml", text).map(|_| ()).expect_err("the policy is wrong")
}

#[test]
fn the_quickstart_becomes_the_network_it_describes() {
    let network = quickstart().network;
    assert_eq!(network.subnets.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["web", "db"]);
    assert_eq!(network.subnets[0].gateways, ["10.0.1.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(network.subnets[1].group, Some(1));
    let vm3 = &network.interfaces[2];
    assert_eq!(
        (vm3.device.as_str(), vm3.addresses[0].subnet, vm3.addresses[0].public_address),
        ("pc-vm3", 1, Some(1))
    );
    assert_eq!(network.interfaces[1].group, Some(2));
    let smtp = &network.groups[0].rules[0];
    assert_eq!((smtp.direction, smtp.protocol, smtp.priority), (Direction::Outbound, RuleProtocol::Tcp, 100));
    assert_eq!(smtp.source, [AddressMatch::Any]);
    assert_eq!(smtp.destination, [AddressMatch::Tag(ServiceTag::Internet)]);
    assert_eq!(
        (smtp.source_ports.as_slice(), smtp.destination_ports.as_slice()),
        (&[(0, 65535)][..], &[(25, 25)][..])
    );
    let balancer = &network.load_balancers[0];
    assert_eq!(balancer.pools[0].members, [(0, 0), (1, 0)]);
    let rule = &balancer.outbound_rules[0];
    assert_eq!(
        (rule.protocol, rule.allocated_outbound_ports, rule.idle_timeout_seconds),
        (TransportProtocol::All, 0, Some(240))
    );
    assert_eq!(network.public_addresses[0].announce, Announce::Proxy);
    assert_eq!(network.uplinks[0].device, "pc-up");
    assert!(network.virtual_networks[0].id > 0);
}

#[test]
fn places_lead_back_into_the_file() {
    let loaded = quickstart();
    let text = std::fs::read_to_string(&loaded.places["uplinks/pc-up"].0).unwrap();
    let lines: Vec<_> = text.lines().collect();
    for (path, (_, line, column)) in &loaded.places {
        let name = path.rsplit('/').next().unwrap();
        assert!(lines[line - 1][column - 1..].starts_with(name), "{path} at {line}:{column}");
    }
    for path in [
        "virtualNetworks/lab/subnets/db",
        "networkInterfaces/vm1/ipConfigurations/primary",
        "networkSecurityGroups/db-nsg/securityRules/DenyVnet",
        "publicIPAddresses/pip-web",
        "loadBalancers/lb/frontendIPConfigurations/web-frontend",
        "loadBalancers/lb/backendAddressPools/web-pool",
        "loadBalancers/lb/outboundRules/web-out",
    ] {
        assert!(loaded.places.contains_key(path), "{path}");
    }
}

#[test]
fn a_later_stage_can_point_into_the_file() {
    let loaded = quickstart();
    let mut findings = loaded.no_findings();
    findings.error_at(
        &loaded.places,
        "loadBalancers/lb/outboundRules/web-out",
        "does not fit",
        "make it smaller",
    );
    let (_, line, column) = &loaded.places["loadBalancers/lb/outboundRules/web-out"];
    let rendered = findings.to_string();
    assert!(rendered.contains(&format!("{line}:{column}")) && rendered.contains("^^^^^^^"), "{rendered}");
}

#[test]
fn an_empty_file_is_an_error_that_says_how_to_begin() {
    for text in ["", "# nothing\n", "{}", "---\n"] {
        let findings = refused(text);
        assert_eq!(findings.entries().len(), 1);
        assert_eq!(findings.entries()[0].message, "the policy is empty");
        assert!(findings.entries()[0].help[0].contains("examples/minimal.yaml"));
    }
    assert!(refused("uplinks: [{ device: eth0 }]\n").to_string().contains("no network interface"));
}

#[test]
fn broken_yaml_is_reported_with_its_place_and_what_to_do() {
    for (text, line, column, help) in [
        ("a: *\n", 1, 4, "quote it, '*'"),
        ("a:\n\t- b\n", 2, 2, "spaces only"),
        ("a: *b\n", 1, 4, "needs quotes"),
        ("a: [1\nb: 2\n", 2, 2, "is closed"),
        ("a: b: c\n", 1, 5, "quote a value"),
        ("a: !x 1\n", 1, 7, "no YAML tags"),
        ("a: 1\n---\nb: 2\n", 3, 1, "one policy per file"),
        ("a: &a [*a]\n", 1, 8, "write the value out"),
    ] {
        let findings = refused(text);
        let entry = &findings.entries()[0];
        let at = findings.position(entry).unwrap();
        assert_eq!((findings.entries().len(), at.line, at.column), (1, line, column), "{findings}");
        assert!(entry.help[0].contains(help), "{findings}");
    }
    assert!(refused(&"[".repeat(5000)).to_string().contains("nested deeper than 32 levels"));
}

#[test]
fn files_that_are_not_text_are_refused_in_words() {
    let directory = std::env::temp_dir();
    let load = |path: &Path| policy::load(path).map(|_| ()).expect_err("no policy").to_string();
    assert!(load(&directory).contains("name the policy file inside the directory"));
    assert!(load(&directory.join("portcullis-no-such-file.yaml")).contains("check the path"));
    let path = directory.join(format!("portcullis-latin1-{}.yaml", std::process::id()));
    std::fs::write(&path, b"\xef\xbb\xbfa: 1\nb: K\xf6ln\n").unwrap();
    let message = load(&path);
    std::fs::remove_file(&path).unwrap();
    assert!(message.contains("not UTF-8 from here on") && message.contains(":2:5"), "{message}");
}

#[test]
fn byte_order_marks_and_windows_line_ends_change_nothing() {
    let text = include_str!("../../examples/minimal.yaml");
    let plain = policy::parse("policy.yaml", text).unwrap();
    for other in [format!("\u{feff}{text}"), text.replace('\n', "\r\n")] {
        let loaded = policy::parse("policy.yaml", &other).unwrap();
        assert_eq!((loaded.network, loaded.places), (plain.network.clone(), plain.places.clone()));
    }
    let findings = refused(&text.replace("subnet: web", "subnet: wbe").replace('\n', "\r\n"));
    assert!(findings.to_string().contains("did you mean `web`?"), "{findings}");
    assert!(!findings.to_string().contains('\r'), "{:?}", findings.to_string());
}

#[test]
fn anchors_and_merge_keys_may_be_used_and_mistakes_in_them_are_told_once() {
    let text = include_str!("../../examples/minimal.yaml").replace(
        "publicIPAddresses:",
        "networkSecurityGroups:
  - name: g
    securityRules:
      - &rule { name: A, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefixes: &from [10.0.9.0/24, 10.0.8.1], destinationAddressPrefix: '*', destinationPortRange: 1 }
      - { <<: *rule, name: B, priority: 101, destinationPortRange: 2 }
      - { name: C, priority: 102, direction: Inbound, access: Allow, protocol: Udp, sourceAddressPrefixes: *from, destinationAddressPrefix: '*', destinationPortRange: 3 }

publicIPAddresses:",
    );
    let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|findings| panic!("{findings}"));
    let rules = &loaded.network.groups[0].rules;
    assert_eq!(rules.iter().map(|rule| rule.priority).collect::<Vec<_>>(), [100, 101, 102]);
    assert!(rules.iter().all(|rule| rule.source == rules[0].source));
    assert_eq!(loaded.warnings.entries().len(), 1, "{}", loaded.warnings);

    let findings = refused(&text.replace("10.0.8.1]", "10.0.8.1/8]"));
    assert_eq!(findings.entries().len(), 1, "{findings}");
}

#[test]
fn groups_of_thousands_of_rules_are_read() {
    let mut text = include_str!("../../examples/minimal.yaml").to_owned();
    text += "limits: { securityRulesPerGroup: 7994 }\n";
    text += "networkSecurityGroups:\n  - name: big\n    securityRules:\n";
    for direction in ["Inbound", "Outbound"] {
        for priority in 100..=4096 {
            text += &format!(
                "      - {{ name: {direction}{priority}, priority: {priority}, direction: {direction}, access: Allow, protocol: Tcp, sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: {priority} }}\n"
            );
        }
    }
    let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|findings| panic!("{findings}"));
    assert_eq!(loaded.network.groups[0].rules.len(), 2 * 3997);
}

#[test]
fn a_file_full_of_mistakes_is_cut_short_for_people_and_whole_for_programs() {
    let mut text = include_str!("../../examples/minimal.yaml").to_owned();
    text += "networkSecurityGroups:\n  - name: big\n    securityRules:\n";
    for priority in 100..=1099 {
        text += &format!(
            "      - {{ name: r{priority}, priority: {priority}, direction: Inbound, access: Alow, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: 1 }}\n"
        );
    }
    let findings = refused(&text);
    assert_eq!(findings.counts(), (1000, 0));
    assert!(findings.to_string().contains("... and 800 more"));
    assert_eq!(findings.to_json()["diagnostics"].as_array().unwrap().len(), 1000);
}
