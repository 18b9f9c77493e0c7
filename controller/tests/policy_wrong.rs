//! Wrong policies: where each finding points and what it says. `policies/` has one file per mistake.

use std::path::Path;

use portcullis::policy::{self, Diagnostics, Severity};

fn refused(name: &str) -> Diagnostics {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policies").join(name);
    policy::load(&path).map(|_| ()).expect_err("the policy is wrong")
}

/// (line, column, message) of every error.
fn errors(findings: &Diagnostics) -> Vec<(usize, usize, &str)> {
    let entries = findings.entries().iter().filter(|entry| entry.severity == Severity::Error);
    entries
        .map(|entry| {
            let at = findings.position(entry).expect("the error has a place");
            assert!(!entry.help.is_empty(), "no word on what to do: {}", entry.message);
            (at.line, at.column, entry.message.as_str())
        })
        .collect()
}

/// Asserts the only error of a file, with its help.
fn only(name: &str, line: usize, column: usize, message: &str, help: &str) -> Diagnostics {
    let findings = refused(name);
    assert_eq!(errors(&findings), [(line, column, message)]);
    assert_eq!(findings.entries()[0].help[0], help);
    let rendered = findings.to_string();
    assert!(rendered.contains(&format!("{name}:{line}:{column}")), "{rendered}");
    assert!(rendered.contains('^'), "{rendered}");
    findings
}

#[test]
fn a_misspelt_field_is_refused_with_the_field_that_was_meant() {
    only(
        "misspelt-field.yaml",
        38,
        9,
        "a security rule has no field `destinationPortRagne`",
        "did you mean `destinationPortRange`?",
    );
}

#[test]
fn a_duplicate_priority_is_refused_in_azures_words_and_both_places_are_shown() {
    let findings = only(
        "duplicate-priority.yaml",
        40,
        19,
        "SecurityRuleConflict: Security rule DenyTelnet conflicts with rule AllowHttps. \
         Rules cannot have the same Priority and Direction.",
        "give one of them a free priority; the lower number is asked first",
    );
    let other = findings.position_of(findings.entries()[0].secondary[0].span);
    assert_eq!((other.line, other.column), (31, 19));
}

#[test]
fn priority_99_is_refused() {
    only(
        "priority-99.yaml",
        40,
        19,
        "`priority` is 99, outside 100..=4096",
        "write a whole number from 100 to 4096",
    );
}

#[test]
fn overlapping_subnets_are_refused_and_both_are_shown() {
    let findings = only(
        "overlapping-subnets.yaml",
        11,
        24,
        "subnet `db` (10.0.0.0/22) overlaps subnet `web` (10.0.1.0/24)",
        "subnets of one virtual network must not share addresses: change one of the prefixes",
    );
    let other = findings.position_of(findings.entries()[0].secondary[0].span);
    assert_eq!((other.line, other.column), (8, 24));
}

#[test]
fn an_unknown_security_group_is_refused_with_the_one_that_was_meant() {
    only(
        "unknown-group.yaml",
        9,
        31,
        "no network security group is named `web-nsgs`",
        "did you mean `web-nsg`?",
    );
}

#[test]
fn port_70000_is_refused() {
    only(
        "port-70000.yaml",
        38,
        31,
        "port 70000 is outside 0..=65535",
        "write a port from 0 to 65535, a range such as 8000-8010, or '*'",
    );
}

#[test]
fn an_address_outside_its_subnet_is_refused() {
    only(
        "address-outside-subnet.yaml",
        25,
        27,
        "10.0.3.4 is not in subnet `db` (10.0.2.0/24)",
        "choose an address of this subnet",
    );
}

#[test]
fn two_interfaces_with_one_address_are_refused_and_both_are_shown() {
    let findings = only(
        "same-address.yaml",
        19,
        72,
        "`vm1` and `vm2` have the same address 10.0.1.4",
        "give one of them another address",
    );
    let other = findings.position_of(findings.entries()[0].secondary[0].span);
    assert_eq!((other.line, other.column), (16, 72));
}

#[test]
fn an_outbound_rule_that_needs_more_ports_than_exist_is_refused_with_the_numbers() {
    only(
        "too-many-ports.yaml",
        63,
        33,
        "SpecifiedAllocatedOutboundPortsForOutboundRuleExceedsTotalNumberOfAvailablePorts: outbound rule out needs \
         96000 ports (32000 per member x 3 members), its frontend has 64000",
        "at most 21328 ports per member fit; or add a frontend or remove members",
    );
}

/// The only error of a file, and where its second place is.
fn with_second(name: &str, at: (usize, usize), message: &str, help: &str, second: (usize, usize)) {
    let findings = only(name, at.0, at.1, message, help);
    let other = findings.position_of(findings.entries()[0].secondary[0].span);
    assert_eq!((other.line, other.column), second, "{findings}");
}

#[test]
fn a_peering_that_only_one_side_declares_is_refused_and_the_other_network_is_shown() {
    with_second(
        "one-sided-peering.yaml",
        (6, 70),
        "`hub` is peered with `spoke`, but `spoke` is not peered with `hub`",
        "a peering has two sides: add `virtualNetworkPeerings: [{ name: to-hub, remoteVirtualNetwork: hub }]` to `spoke`",
        (9, 11),
    );
}

#[test]
fn an_application_group_with_members_in_two_networks_is_refused_and_both_are_shown() {
    with_second(
        "group-in-two-networks.yaml",
        (31, 90),
        "`vm2/v4` is in virtual network `spoke`, application security group `AsgWeb` is in `hub`",
        "all members of a group are in the virtual network of the first: make a second group",
        (26, 90),
    );
}

#[test]
fn a_rule_between_application_groups_of_two_networks_is_refused_and_both_are_shown() {
    with_second(
        "rule-across-networks.yaml",
        (45, 48),
        "rule `AllowHttp` names application security groups of two virtual networks",
        "both have to be in one virtual network: use address prefixes for the other side",
        (44, 43),
    );
}

#[test]
fn an_unknown_service_tag_is_refused_with_the_one_that_was_meant() {
    only("unknown-tag.yaml", 44, 30, "there is no service tag `Ofices`", "did you mean `Offices`?");
}

#[test]
fn a_tag_file_that_does_not_exist_is_refused_where_it_is_named() {
    let findings = refused("missing-tag-file.yaml");
    let [(line, column, message)] = errors(&findings)[..] else { panic!("{findings}") };
    assert_eq!((line, column), (34, 9));
    assert!(
        message.starts_with("cannot read the tag file ") && message.contains("no-such-file.json"),
        "{message}"
    );
    assert!(findings.entries()[0].help[0].contains("the path is relative to the policy file"), "{findings}");
}

#[test]
fn an_appliance_outside_every_network_that_could_reach_it_is_refused() {
    only(
        "appliance-elsewhere.yaml",
        18,
        99,
        "10.9.1.4 is not in the address space of `spoke`, which uses `through`, nor of a peer",
        "an appliance is a guest of the same or of a peered virtual network: correct the address",
    );
}

#[test]
fn an_ipv6_address_outside_its_subnet_is_refused() {
    only(
        "ipv6-outside-subnet.yaml",
        27,
        52,
        "fd00:1:0:2::4 is not in subnet `web` (10.0.1.0/24, fd00:1:0:1::/64)",
        "choose an address of this subnet",
    );
}

#[test]
fn a_yaml_alias_bomb_ends_with_the_line_it_went_off_at() {
    only(
        "alias-bomb.yaml",
        8,
        10,
        "YAML aliases expand to too much here (limit: 250000 nodes in a file)",
        "aliases of aliases multiply: write the values out, or have one level of `*name` only",
    );
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    let findings = refused("several.yaml");
    let expected = [
        (9, 31, "no network security group is named `web-nsgs`"),
        (11, 24, "10.0.2.7/24 has bits set behind the /24"),
        (19, 72, "`vm1` and `vm2` have the same address 10.0.1.4"),
        (24, 17, "no subnet is named `bd`"),
        (38, 9, "a security rule has no field `destinationPortRagne`"),
        (40, 19, "`priority` is 99, outside 100..=4096"),
        (42, 9, "a security rule has no field `acces`"),
        (47, 31, "port 70000 is outside 0..=65535"),
        (50, 57, "`announce` cannot be `arp`"),
        (62, 19, "`protocol` cannot be `Icmp`"),
        (
            63,
            33,
            "SpecifiedAllocatedOutboundPortsForOutboundRuleIsNotAMultipleOfEight: outbound rule `out` asks for 8001 \
             ports per member",
        ),
        (65, 1, "a policy has no field `uplink`"),
    ];
    assert_eq!(errors(&findings), expected);
}

#[test]
fn findings_are_also_given_as_json() {
    let json = refused("duplicate-priority.yaml").to_json();
    let first = &json["diagnostics"][0];
    assert_eq!(json["errors"], 1);
    assert_eq!(
        (&first["severity"], &first["line"], &first["column"]),
        (&"error".into(), &40.into(), &19.into())
    );
    assert_eq!((&first["endLine"], &first["endColumn"]), (&40.into(), &22.into()));
    assert_eq!((&first["related"][0]["line"], &first["related"][0]["column"]), (&31.into(), &19.into()));
    assert!(first["message"].as_str().unwrap().starts_with("SecurityRuleConflict: "));
    assert!(!first["help"].as_array().unwrap().is_empty());
}

#[test]
fn colour_is_there_only_when_asked_for() {
    let findings = refused("priority-99.yaml");
    assert!(!findings.render(false).contains('\u{1b}'));
    assert!(findings.render(true).contains('\u{1b}'));
}
