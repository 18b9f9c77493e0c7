//! `portcullis import`: the shapes Azure's tools write, and what becomes of rules that our policy words differently.

mod import_support;

use std::process::Command;

use import_support::{at_level, checked, imported, run};
use portcullis::policy::import::report::Level;
use portcullis::policy::network::{Access, OnRuleChange, RouteHop, SecurityRule};
use serde_json::{Value, json};

const SCOPE: &str = "/subscriptions/s/resourceGroups/rg/providers/Microsoft.Network";

fn rule(name: &str, priority: u32, access: &str, change: &[(&str, Value)]) -> Value {
    let mut properties = json!({
        "priority": priority, "direction": "Inbound", "access": access, "protocol": "Tcp", "sourceAddressPrefix": "*",
        "sourcePortRange": "*", "destinationAddressPrefix": "*", "destinationPortRange": "80"
    });
    for (key, value) in change {
        properties[*key] = value.clone();
    }
    json!({"name": name, "properties": properties})
}

fn group(rules: &[Value]) -> Value {
    json!({"type": "Microsoft.Network/networkSecurityGroups", "name": "nsg", "properties": {"securityRules": rules}})
}

fn words(rules: &[SecurityRule]) -> Vec<(String, u16, Access)> {
    let mut all: Vec<_> = rules.iter().map(|rule| (rule.name.clone(), rule.priority, rule.access)).collect();
    all.sort_by_key(|(_, priority, _)| *priority);
    all
}

#[test]
fn several_tags_and_both_families_become_several_rules_where_priorities_are_free() {
    let tags = json!(["Internet", "VirtualNetwork", "10.0.0.0/8", "fd00::/8"]);
    let rules = [
        rule("a", 100, "Allow", &[("sourceAddressPrefix", json!("")), ("sourceAddressPrefixes", tags)]),
        rule("b", 110, "Deny", &[]),
    ];
    let (imported, loaded) = imported(&group(&rules));
    let named = |name: &str, priority, access| (name.to_owned(), priority, access);
    assert_eq!(
        words(&loaded.network.groups[0].rules),
        [named("a", 100, Access::Allow), named("a-2", 101, Access::Allow), named("b", 110, Access::Deny)]
    );
    assert!(at_level(&imported, Level::Warning).is_empty());
}

#[test]
fn a_part_of_a_rule_that_no_priority_is_free_for_is_told_and_never_takes_anothers_place() {
    let tags = ("sourceAddressPrefixes", json!(["Internet", "VirtualNetwork"]));
    let single = ("sourceAddressPrefix", json!(null));
    let rules = [rule("a", 100, "Deny", &[tags, single]), rule("b", 101, "Allow", &[])];
    let (imported, loaded) = imported(&group(&rules));
    assert_eq!(words(&loaded.network.groups[0].rules).len(), 2);
    assert_eq!(at_level(&imported, Level::Error).len(), 1);
}

#[test]
fn of_two_rules_with_one_priority_the_one_that_denies_comes_first() {
    let (_, loaded) = imported(&group(&[rule("a", 4096, "Allow", &[]), rule("d", 4096, "Deny", &[])]));
    let all = words(&loaded.network.groups[0].rules);
    assert_eq!(all, [("d".to_owned(), 4095, Access::Deny), ("a".to_owned(), 4096, Access::Allow)]);
}

#[test]
fn icmp_with_ports_is_left_out_if_it_allows_and_widened_if_it_denies() {
    let icmp = ("protocol", json!("Icmp"));
    let rules = [
        rule("a", 100, "Allow", std::slice::from_ref(&icmp)),
        rule("d", 110, "Deny", std::slice::from_ref(&icmp)),
    ];
    let (imported, loaded) = imported(&group(&rules));
    assert_eq!(words(&loaded.network.groups[0].rules), [("d".to_owned(), 110, Access::Deny)]);
    assert!(!at_level(&imported, Level::Warning).is_empty());
    assert!(at_level(&imported, Level::Error).is_empty());
}

/// A small network as `az … list` prints it: no `properties`, ids everywhere.
fn flattened() -> Value {
    let id = |rest: &str| format!("{SCOPE}/{rest}");
    json!([
        {"type": "Microsoft.Network/virtualNetworks", "id": id("virtualNetworks/v"), "name": "v", "resourceGroup": "rg",
         "addressSpace": {"addressPrefixes": ["10.0.0.0/16", "fd00:1::/48"]},
         "virtualNetworkPeerings": [{"name": "to-w", "remoteVirtualNetwork": {"id": id("virtualNetworks/w"), "resourceGroup": "rg"}, "peeringState": "Connected"}],
         "subnets": [{"name": "web", "addressPrefixes": ["10.0.1.0/24", "fd00:1:0:1::/64"], "networkSecurityGroup": {"id": id("networkSecurityGroups/nsg")},
                      "routeTable": {"id": id("routeTables/rt")}}]},
        {"type": "Microsoft.Network/virtualNetworks", "id": id("virtualNetworks/w"), "name": "w", "addressSpace": {"addressPrefixes": ["10.1.0.0/16"]},
         "virtualNetworkPeerings": [{"name": "to-v", "remoteVirtualNetwork": {"id": id("virtualNetworks/v")}, "peeringState": "Connected"}], "subnets": []},
        {"type": "Microsoft.Network/routeTables", "id": id("routeTables/rt"), "name": "rt",
         "routes": [{"name": "all", "addressPrefix": "0.0.0.0/0", "nextHopType": "VirtualAppliance", "nextHopIpAddress": "10.0.1.5"}]},
        {"type": "Microsoft.Network/networkSecurityGroups", "id": id("networkSecurityGroups/nsg"), "name": "nsg", "flushConnection": true,
         "securityRules": [{"name": "web", "priority": 100, "direction": "Inbound", "access": "Allow", "protocol": "Tcp", "sourceAddressPrefix": "Internet",
            "sourcePortRange": "*", "destinationAddressPrefix": "", "destinationAddressPrefixes": [], "destinationPortRange": 80,
            "destinationApplicationSecurityGroups": [{"id": id("applicationSecurityGroups/AsgWeb")}]}]},
        {"type": "Microsoft.Network/applicationSecurityGroups", "id": id("applicationSecurityGroups/AsgWeb"), "name": "AsgWeb"},
        {"type": "Microsoft.Network/publicIPAddresses", "id": id("publicIPAddresses/pip"), "name": "pip", "ipAddress": "203.0.113.77"},
        {"type": "Microsoft.Network/networkInterfaces", "id": id("networkInterfaces/a-very-long-name-of-a-nic"), "name": "a-very-long-name-of-a-nic",
         "macAddress": "00-0D-3A-1B-C7-21", "ipConfigurations": [
            {"name": "ipconfig1", "privateIPAddress": "10.0.1.4", "subnet": {"id": id("virtualNetworks/v/subnets/web")},
             "publicIPAddress": {"id": id("publicIPAddresses/pip")}, "applicationSecurityGroups": [{"id": id("applicationSecurityGroups/asgweb")}]},
            {"name": "six", "privateIPAddressVersion": "IPv6", "subnet": {"id": id("virtualNetworks/v/subnets/web")}}]},
        {"type": "Microsoft.Network/networkInterfaces", "id": id("networkInterfaces/fw"), "name": "fw",
         "networkSecurityGroup": {"id": id("networkSecurityGroups/elsewhere")},
         "ipConfigurations": [{"name": "ipconfig1", "privateIPAddress": "10.0.1.5", "subnet": {"id": id("virtualNetworks/v/subnets/web")}}]}
    ])
}

#[test]
fn what_az_prints_becomes_a_whole_network_with_references_by_name() {
    let (imported, loaded) = imported(&flattened());
    let network = &loaded.network;
    assert_eq!(network.on_rule_change, OnRuleChange::Reevaluate);
    assert_eq!(
        (network.virtual_networks[0].peers.as_slice(), network.subnets[0].route_table),
        (&[1][..], Some(0))
    );
    assert_eq!(
        network.route_tables[0].routes[0].next_hop,
        RouteHop::VirtualAppliance("10.0.1.5".parse().unwrap())
    );
    let nic = &network.interfaces[0];
    assert_eq!((nic.device.as_str(), nic.mac), ("tap-a-very-long", Some([0, 0x0d, 0x3a, 0x1b, 0xc7, 0x21])));
    assert_eq!(nic.addresses[0].application_groups, [0]);
    assert_eq!(
        network.public_addresses[nic.addresses[0].public_address.unwrap()].address.to_string(),
        "203.0.113.77"
    );
    assert_eq!(nic.addresses[1].address.to_string(), "fd00:1:0:1::4", "made up from the subnet");
    assert_eq!(network.uplinks[0].device, "uplink-REPLACE");
    // The group that is not in the input lets nothing through until somebody writes it.
    let closed = &network.groups[network.interfaces[1].group.unwrap()];
    assert_eq!(closed.name, "elsewhere");
    assert!(closed.rules.iter().all(|rule| rule.access == Access::Deny) && closed.rules.len() == 2);
    let warnings: Vec<_> =
        at_level(&imported, Level::Warning).iter().map(|item| item.property.clone()).collect();
    assert_eq!(warnings, ["networkSecurityGroup"]);
}

#[test]
fn a_template_finds_its_resources_by_expression_and_its_children_by_name() {
    let template = json!({"$schema": "https://schema.management.azure.com/x", "contentVersion": "1.0.0.0", "parameters": {"p": {}}, "resources": [
        {"type": "Microsoft.Network/networkSecurityGroups", "apiVersion": "1", "name": "[variables('nsg')]", "properties": {},
         "resources": [{"type": "securityRules", "name": "nested", "properties": rule("nested", 100, "Allow", &[])["properties"]}]},
        {"type": "Microsoft.Network/networkSecurityGroups/securityRules", "name": "[concat(variables('nsg'), '/outer')]",
         "properties": rule("outer", 110, "Deny", &[])["properties"]},
        {"type": "Microsoft.Network/virtualNetworks", "name": "v", "properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": [
            {"name": "s", "properties": {"addressPrefix": "10.0.0.0/24", "networkSecurityGroup": {"id": "[resourceId('Microsoft.Network/networkSecurityGroups', variables('nsg'))]"}}}]}}
    ]});
    let (_, loaded) = imported(&template);
    let [group] = loaded.network.groups.as_slice() else { panic!("one group") };
    assert_eq!(group.name, "nsg");
    assert_eq!(
        words(&group.rules),
        [("nested".to_owned(), 100, Access::Allow), ("outer".to_owned(), 110, Access::Deny)]
    );
    assert_eq!(loaded.network.subnets[0].group, Some(0));
}

#[test]
fn names_that_yaml_would_take_for_something_else_arrive_as_they_are() {
    let mut rules = Vec::new();
    for (at, name) in ["yes", "80", "null", "1e3", "0x10"].into_iter().enumerate() {
        rules.push(rule(name, 100 + at as u32, "Deny", &[("description", json!("a: b # \"c\"\n*d"))]));
    }
    let (_, loaded) = imported(&group(&rules));
    let names: Vec<_> = loaded.network.groups[0].rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["yes", "80", "null", "1e3", "0x10"]);
    assert_eq!(loaded.network.groups[0].rules[0].description, "a: b # \"c\"\n*d");
}

#[test]
fn the_exit_code_says_whether_all_was_carried_over_and_whether_it_may_be_wider() {
    let folder = std::env::temp_dir().join(format!("pc-import-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let import = |name: &str, text: &str, more: &[&str]| {
        let file = folder.join(name);
        std::fs::write(&file, text).unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_portcullis"))
            .arg("import")
            .arg(file)
            .args(more)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let tag = ("sourceAddressPrefix", json!("Storage.WestUS"));
    let whole = group(&[rule("a", 100, "Allow", &[])]).to_string();
    let allow = group(&[rule("a", 100, "Allow", std::slice::from_ref(&tag))]).to_string();
    let deny = group(&[rule("a", 100, "Deny", std::slice::from_ref(&tag))]).to_string();
    let (code, yaml, report) = import("whole", &whole, &[]);
    assert_eq!(code, Some(0), "{report}");
    checked("whole", &yaml);
    assert_eq!(import("allow", &allow, &[]).0, Some(3));
    let (code, _, report) = import("deny", &deny, &["--output", "json"]);
    assert_eq!(code, Some(4));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["found"]["networkSecurityGroups"], 1);
    assert_eq!(
        report["items"].as_array().unwrap().iter().filter(|item| item["level"] == "error").count() as u64,
        report["errors"]
    );
    assert!(report["items"][0]["path"].as_str().unwrap().starts_with("$.properties.securityRules[0]"));
    assert_eq!(import("broken", "{", &[]).0, Some(2));
    let target = folder.join("policy.yaml");
    let to = ["--to", target.to_str().unwrap()];
    assert_eq!(import("whole", &whole, &to).0, Some(0));
    assert_eq!(import("whole", &whole, &to).0, Some(1), "an existing policy is not replaced");
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(run("x", whole.as_bytes()).is_ok());
}
