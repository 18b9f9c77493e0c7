//! Application security groups: membership, what rules may say with them, and their limits.

mod policy_support;

use policy_support::{accepted, changed, refused, refused_text, second_places, warned};
use portcullis::policy::network::{AddressMatch, ServiceTag};

const APP: &str = "{ name: v4, subnet: app, privateIPAddress: 10.1.1.4 }";
const WEB6: &str = "privateIPAddress: 'fd00:1:0:1::4', applicationSecurityGroups: [AsgWeb]";
const TO_DB: &str = "sourceApplicationSecurityGroups: [AsgLogic]";
const GROUPS: &str = "applicationSecurityGroups:\n  - { name: AsgWeb }";

#[test]
fn the_documentations_three_groups_are_read_with_their_members_and_rules() {
    let network = accepted(&[]).network;
    let names: Vec<_> = network.application_groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["AsgWeb", "AsgLogic", "AsgDb"]);
    assert!(network.application_groups.iter().all(|group| group.network == Some(0)));
    assert_eq!(network.interfaces[0].addresses[0].application_groups, [0]);
    assert_eq!(network.interfaces[0].addresses[1].application_groups, [0]);
    assert!(network.interfaces[3].addresses[0].application_groups.is_empty());
    let rules = &network.groups[0].rules;
    let sides: Vec<_> = rules.iter().map(|r| (r.priority, r.source.clone(), r.destination.clone())).collect();
    let group = |index| vec![AddressMatch::Application(index)];
    assert_eq!(
        sides,
        [
            (100, vec![AddressMatch::Tag(ServiceTag::Internet)], group(0)),
            (110, group(1), group(2)),
            (120, vec![AddressMatch::Any], group(2)),
        ]
    );
}

#[test]
fn group_names_are_found_in_any_case_and_a_list_holds_several() {
    let loaded = accepted(&[
        (
            "destinationApplicationSecurityGroups: [AsgWeb]",
            "destinationApplicationSecurityGroups: [asgdb, ASGWEB]",
        ),
        ("applicationSecurityGroups: [AsgLogic]", "applicationSecurityGroups: [asgLOGIC, asgweb]"),
    ]);
    let destination = &loaded.network.groups[0].rules[0].destination;
    assert_eq!(destination, &[AddressMatch::Application(2), AddressMatch::Application(0)]);
    assert_eq!(loaded.network.interfaces[1].addresses[0].application_groups, [0, 1]);
    assert!(loaded.places.contains_key("applicationSecurityGroups/AsgWeb"));
}

#[test]
fn a_group_without_members_belongs_to_no_network_and_one_without_use_is_warned_of() {
    let loaded = accepted(&[("applicationSecurityGroups: [AsgLogic]", "applicationSecurityGroups: []")]);
    assert_eq!(loaded.network.application_groups[1].network, None);
    warned(
        &[(GROUPS, "applicationSecurityGroups:\n  - { name: Spare }\n  - { name: AsgWeb }")],
        "Spare",
        "nothing uses application security group `Spare`",
        "or remove it",
    );
}

#[test]
fn all_members_are_in_the_virtual_network_of_the_first() {
    let text = changed(&[(
        APP,
        "{ name: v4, subnet: app, privateIPAddress: 10.1.1.4, applicationSecurityGroups: [AsgWeb] }",
    )]);
    let findings = refused_text(
        &text,
        "AsgWeb",
        "`vm-app/v4` is in virtual network `spoke`, application security group `AsgWeb` is in `hub`",
        "all members of a group are in the virtual network of the first",
    );
    let label = &findings.entries()[0].secondary[0];
    assert_eq!(label.message, "its first member, `vm-web/v4`, is in `hub`");
    assert_eq!(second_places(&findings, &text), ["AsgWeb"]);
    assert_ne!(Some(label.span), findings.entries()[0].span);
}

#[test]
fn a_rule_with_groups_on_both_sides_needs_them_in_one_virtual_network() {
    let far = [
        (GROUPS, "applicationSecurityGroups:\n  - { name: Far }\n  - { name: AsgWeb }"),
        (APP, "{ name: v4, subnet: app, privateIPAddress: 10.1.1.4, applicationSecurityGroups: [Far] }"),
    ];
    let both = [far[0], far[1], (TO_DB, "sourceApplicationSecurityGroups: [AsgLogic, Far]")];
    let findings = refused(
        &both,
        "AsgDb",
        "rule `Allow-Database-BusinessLogic` names application security groups of two virtual networks",
        "use address prefixes for the other side",
    );
    assert_eq!(findings.entries()[0].secondary[0].message, "`Far` is in `spoke`");
    assert_eq!(second_places(&findings, &changed(&both)), ["Far"]);
    // On one side only it may stand: it just matches nothing elsewhere.
    let one = "destinationAddressPrefix: '*'\n        destinationPortRanges: [22, 8000-8010]";
    let to_far =
        "destinationApplicationSecurityGroups: [Far]\n        destinationPortRanges: [22, 8000-8010]";
    accepted(&[far[0], far[1], (one, to_far)]);
}

#[test]
fn a_side_is_addresses_or_groups_and_one_of_them_is_needed() {
    let with = |more: &str| format!("{TO_DB}\n        {more}");
    for more in ["sourceAddressPrefix: 10.0.2.0/24", "sourceAddressPrefixes: [10.0.2.0/24]"] {
        let findings = refused(
            &[(TO_DB, &with(more))],
            "sourceApplicationSecurityGroups",
            "and `sourceApplicationSecurityGroups` are given together",
            "a side is addresses or application security groups",
        );
        assert_eq!(findings.entries()[0].secondary.len(), 1);
    }
    refused(
        &[(TO_DB, "description: none")],
        "Allow-Database-BusinessLogic",
        "lacks `sourceAddressPrefix` or `sourceAddressPrefixes`",
        "add `sourceAddressPrefix",
    );
    refused(
        &[(TO_DB, "sourceApplicationSecurityGroups: []")],
        "sourceApplicationSecurityGroups",
        "`sourceApplicationSecurityGroups` is empty",
        "add at least one group",
    );
}

#[test]
fn groups_that_do_not_exist_or_exist_twice_are_refused() {
    refused(
        &[(TO_DB, "sourceApplicationSecurityGroups: [AsgLogik]")],
        "AsgLogik",
        "no application security group is named `AsgLogik`",
        "did you mean `AsgLogic`?",
    );
    refused(
        &[(WEB6, "privateIPAddress: 'fd00:1:0:1::4', applicationSecurityGroups: [Asgweb, Elsewhere]")],
        "Elsewhere",
        "no application security group is named `Elsewhere`",
        "define it under `applicationSecurityGroups`, or use one of: AsgDb, AsgLogic, AsgWeb",
    );
    refused(
        &[(GROUPS, "applicationSecurityGroups:\n  - { name: ASGDB }\n  - { name: AsgWeb }")],
        "AsgDb",
        "a second application security group is named `AsgDb`",
        "rename one of them",
    );
    refused(
        &[(TO_DB, "sourceApplicationSecurityGroups: [AsgLogic, asglogic]")],
        "asglogic",
        "application security group `asglogic` is named twice",
        "remove one of them",
    );
}

/// The example with `count` more groups, and the texts of a list of them.
fn many(count: usize) -> (String, String) {
    let names: Vec<_> = (0..count).map(|n| format!("G{n}")).collect();
    let groups: String = names.iter().map(|name| format!("  - {{ name: {name} }}\n")).collect();
    (format!("applicationSecurityGroups:\n{groups}  - {{ name: AsgWeb }}"), names.join(", "))
}

#[test]
fn azures_limits_of_application_groups_hold_until_raised() {
    let raise = |field: &str, to: usize| format!("limits:\n  {field}: {to}");
    let (groups, ten) = many(10);
    let source = format!("sourceApplicationSecurityGroups: [{ten}, AsgLogic]");
    let rule = [(GROUPS, groups.as_str()), (TO_DB, source.as_str())];
    refused(
        &rule,
        "AsgLogic",
        "more than 10 application security groups on one side of a rule",
        "raise `limits.applicationSecurityGroupsPerRule`",
    );
    accepted(&[rule[0], rule[1], ("limits:", &raise("applicationSecurityGroupsPerRule", 11))]);

    let (groups, twenty) = many(20);
    let member = format!("privateIPAddress: 'fd00:1:0:1::4', applicationSecurityGroups: [{twenty}, AsgWeb]");
    let configuration = [(GROUPS, groups.as_str()), (WEB6, member.as_str())];
    refused(
        &configuration,
        "AsgWeb",
        "`vm-web/v6` is in more than 20 application security groups",
        "raise `limits.applicationSecurityGroupsPerIpConfiguration`",
    );
    let limit = raise("applicationSecurityGroupsPerIpConfiguration", 21);
    accepted(&[configuration[0], configuration[1], ("limits:", &limit)]);

    refused(
        &[("limits:", &raise("ipConfigurationsPerApplicationSecurityGroup", 1))],
        "AsgWeb",
        "application security group `AsgWeb` has more than 1 members",
        "raise `limits.ipConfigurationsPerApplicationSecurityGroup`",
    );
    refused(
        &[("limits:", &raise("applicationSecurityGroupsPerGroup", 2))],
        "AsgDb",
        "more than 2 application security groups in the rules of one group",
        "raise `limits.applicationSecurityGroupsPerGroup`",
    );
    let (groups, _) = many(2998);
    let text = changed(&[(GROUPS, &groups)]);
    refused_text(
        &text,
        "AsgDb",
        "more than 3000 application security groups",
        "raise `limits.applicationSecurityGroups`",
    );
}
