//! `effective`, IP flow verify and NSG diagnostics: Azure's shapes, held against the saved examples, and what they answer.

use std::collections::BTreeMap;
use std::path::Path;

use portcullis::answers::lint::Surroundings;
use portcullis::answers::{DiagnosticParameters, FlowParameters, answer, diagnose, effective, verify};
use portcullis::api::Request;
use portcullis::policy::network::{Access, Network};
use portcullis::policy::{self, Loaded};
use serde_json::{Value, json};

fn lab() -> Loaded {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/answers_support/lab.yaml");
    policy::load(&path).unwrap_or_else(|findings| panic!("{findings}"))
}

fn saved(name: &str) -> Option<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
}

/// Every path of a value with the kind of what stands there; all items of a list are one.
fn shape(value: &Value, path: &str, into: &mut BTreeMap<String, &'static str>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if let Some(before) = into.insert(path.to_owned(), kind) {
        assert_eq!(before, kind, "{path}");
    }
    match value {
        Value::Array(items) => items.iter().for_each(|item| shape(item, &format!("{path}[]"), into)),
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| shape(value, &format!("{path}.{key}"), into))
        }
        _ => {}
    }
}

/// Ours has everything of Azure's example with the same kinds, and beyond that no more than `extra`.
fn same_shape(azure: &Value, ours: &Value, extra: &[&str]) {
    let (mut theirs, mut mine) = (BTreeMap::new(), BTreeMap::new());
    shape(azure, "", &mut theirs);
    shape(ours, "", &mut mine);
    for (path, kind) in &theirs {
        assert_eq!(mine.get(path), Some(kind), "{path} as in Azure's example");
    }
    for path in mine.keys().filter(|path| !theirs.contains_key(*path)) {
        assert!(
            extra.iter().any(|extra| path.trim_end_matches("[]").ends_with(extra)),
            "{path} is not Azure's"
        );
    }
}

#[test]
fn effective_rules_have_azures_shape_with_everything_expanded() {
    let network = lab().network;
    let answer = serde_json::to_value(effective(&network, "vm1").unwrap()).unwrap();
    if let Some(example) = saved("azure-rest-examples/NetworkInterfaceEffectiveNSGList.json") {
        let plural = [
            "sourcePortRanges",
            "destinationPortRanges",
            "sourceAddressPrefixes",
            "destinationAddressPrefixes",
            "expandedSourceAddressPrefix",
        ];
        same_shape(&example["responses"]["200"]["body"], &answer, &plural);
    }
    let groups = answer["value"].as_array().unwrap();
    assert_eq!(groups.len(), 2);
    let id = |value: &Value| value["id"].as_str().unwrap().to_owned();
    assert!(
        id(&groups[0]["networkSecurityGroup"]).ends_with("/Microsoft.Network/networkSecurityGroups/web-nsg")
    );
    assert!(id(&groups[0]["association"]["subnet"]).ends_with("/virtualNetworks/lab/subnets/web"));
    assert!(id(&groups[1]["association"]["networkInterface"]).ends_with("/networkInterfaces/vm1"));
    assert!(groups[1]["association"].get("subnet").is_none());
    let rule = |name: &str| {
        let rules = groups[0]["effectiveSecurityRules"].as_array().unwrap();
        rules.iter().find(|rule| rule["name"] == name).unwrap_or_else(|| panic!("{name}")).clone()
    };
    let http = rule("securityRules/Http");
    assert_eq!((&http["protocol"], &http["sourceAddressPrefix"]), (&json!("Tcp"), &json!("Internet")));
    assert_eq!(http["sourcePortRange"], "0-65535");
    assert_eq!(http["destinationPortRanges"], json!(["80-80", "443-443"]));
    assert!(http.get("destinationPortRange").is_none(), "two ranges");
    assert_eq!(http["expandedSourceAddressPrefix"][0], "1.0.0.0/8");
    assert_eq!(http["destinationAddressPrefix"], "AsgWeb");
    assert_eq!(http["expandedDestinationAddressPrefix"], json!(["10.0.1.4/32"]));
    assert_eq!((&http["access"], &http["priority"]), (&json!("Allow"), &json!(100)));
    let deny = rule("defaultSecurityRules/DenyAllInBound");
    assert_eq!((&deny["protocol"], &deny["sourceAddressPrefix"]), (&json!("All"), &json!("0.0.0.0/0")));
    assert_eq!(deny["destinationAddressPrefixes"], json!(["0.0.0.0/0", "::/0"]));
    let vnet = rule("defaultSecurityRules/AllowVnetInBound");
    assert_eq!(
        vnet["expandedSourceAddressPrefix"],
        json!(["10.0.0.0/15", "168.63.129.16/32", "fd00:1::/48"])
    );
    let far = effective(&network, "vm3").unwrap();
    assert!(far.value.is_empty() && far.text().contains("everything is allowed"));
    let by_id =
        effective(&network, "/subscriptions/x/providers/Microsoft.Network/networkInterfaces/VM1").unwrap();
    assert_eq!(by_id, effective(&network, "vm1").unwrap(), "an id, in any case");
    assert!(effective(&network, "vm9").unwrap_err().message.contains("vm1"));
}

fn flow(direction: &str, local: (&str, &str), remote: (&str, &str)) -> FlowParameters {
    FlowParameters {
        target_resource_id: "vm1".into(),
        direction: direction.into(),
        protocol: "TCP".into(),
        local_ip_address: local.0.into(),
        local_port: local.1.into(),
        remote_ip_address: remote.0.into(),
        remote_port: remote.1.into(),
        target_nic_resource_id: None,
    }
}

#[test]
fn ip_flow_verify_takes_azures_request_and_names_the_rule_that_decides() {
    let network = lab().network;
    let said = |ask: &FlowParameters| {
        let verdict = verify(&network, ask).unwrap();
        (verdict.access, verdict.rule_name.clone())
    };
    let allow = |name: &str| (Access::Allow, name.to_owned());
    let deny = |name: &str| (Access::Deny, name.to_owned());
    let inbound = |port, remote| flow("Inbound", ("10.0.1.4", port), (remote, "40000"));
    assert_eq!(said(&inbound("443", "1.1.1.1")), allow("UserRule_OpenAll"), "of the last group asked");
    assert_eq!(said(&inbound("81", "1.1.1.1")), deny("DefaultRule_DenyAllInBound"));
    assert_eq!(said(&inbound("81", "10.0.2.4")), deny("UserRule_DenyVnet"));
    let outbound = |remote, port| flow("outbound", ("10.0.1.4", "*"), (remote, port));
    assert_eq!(said(&outbound("1.1.1.1", "443")), allow("DefaultRule_AllowInternetOutBound"));
    assert_eq!(said(&outbound("1.1.1.1", "23")), deny("UserRule_NoTelnet"));
    assert_eq!(said(&outbound("1.1.1.1", "25")), deny("PlatformRule_BlockSmtp25"));
    assert_eq!(said(&outbound("168.63.129.16", "53")), allow("PlatformRule_Service_dns"));
    let v6 = flow("Inbound", ("fd00:1:0:1::4", "22"), ("2001:db8::1", "*"));
    assert_eq!(said(&v6), allow("UserRule_OpenAll"));

    if let Some(example) = saved("azure-rest-examples/NetworkWatcherIpFlowVerify.json") {
        let mut ask = example["parameters"]["parameters"].clone();
        ask["localIPAddress"] = json!("10.0.1.4");
        let ask: FlowParameters = serde_json::from_value(ask).unwrap();
        let verdict = verify(&network, &ask).unwrap();
        same_shape(
            &example["responses"]["200"]["body"],
            &serde_json::to_value(verdict.azure()).unwrap(),
            &[],
        );
    }
    let numbers = json!({ "targetResourceId": "vm1", "direction": "Outbound", "protocol": "udp", "localPort": 80,
        "remotePort": 53, "localIPAddress": "10.0.1.4", "remoteIPAddress": "9.9.9.9" });
    assert!(serde_json::from_value::<FlowParameters>(numbers).is_ok(), "ports as numbers");
}

#[test]
fn ip_flow_verify_refuses_what_azure_would() {
    let network = lab().network;
    let good = flow("Outbound", ("10.0.1.4", "*"), ("1.1.1.1", "443"));
    assert!(verify(&network, &good).is_ok());
    let wrong = |change: fn(&mut FlowParameters), expected: &str| {
        let mut ask = good.clone();
        change(&mut ask);
        let message = verify(&network, &ask).unwrap_err().message;
        assert!(message.contains(expected), "{message}");
    };
    wrong(|ask| ask.protocol = "ICMP".into(), "TCP and UDP");
    wrong(|ask| ask.protocol = "*".into(), "TCP and UDP");
    wrong(|ask| ask.direction = "sideways".into(), "neither Inbound nor Outbound");
    wrong(|ask| ask.remote_port = "*".into(), "source port only");
    wrong(|ask| ask.local_port = "65536".into(), "localPort");
    wrong(|ask| ask.local_port = "80-90".into(), "localPort");
    wrong(|ask| ask.remote_port = "-1".into(), "remotePort");
    wrong(|ask| ask.local_ip_address = "10.0.1.9".into(), "10.0.1.4");
    wrong(|ask| ask.remote_ip_address = "example.com".into(), "no IP address");
    wrong(|ask| ask.remote_ip_address = "::1".into(), "one family");
    wrong(|ask| ask.target_resource_id = "vm9".into(), "no network interface `vm9`");
}

fn profile(
    direction: &str,
    protocol: &str,
    source: &str,
    destination: &str,
    port: &str,
) -> DiagnosticParameters {
    let ask = json!({ "targetResourceId": "vm1", "profiles": [{ "direction": direction, "protocol": protocol,
        "source": source, "destination": destination, "destinationPort": port }] });
    serde_json::from_value(ask).unwrap()
}

/// Verdict, the rule of the last group, and the rules that decided parts.
fn diagnosed(network: &Network, ask: &DiagnosticParameters) -> (Access, String, Vec<String>) {
    let answer = diagnose(network, ask).unwrap();
    let result = &answer.results[0].network_security_group_result;
    let last = result.evaluated_network_security_groups.last();
    let rule =
        last.and_then(|group| group.matched_rule.as_ref()).map_or(String::new(), |r| r.rule_name.clone());
    let parts = last.map(|group| group.partly_matched_rules.iter().map(|r| r.rule_name.clone()).collect());
    (result.security_rule_access_result, rule, parts.unwrap_or_default())
}

#[test]
fn diagnostics_have_azures_shape_and_every_rule_tried() {
    let network = lab().network;
    let ask = profile("Inbound", "TCP", "203.0.113.9", "10.0.1.4", "22");
    let answer = diagnose(&network, &ask).unwrap();
    let ours = serde_json::to_value(&answer).unwrap();
    if let Some(example) = saved("azure-rest-examples/NetworkWatcherNetworkConfigurationDiagnostic.json") {
        same_shape(&example["responses"]["200"]["body"], &ours, &[]);
        let ask: DiagnosticParameters =
            serde_json::from_value(example["parameters"]["parameters"].clone()).unwrap();
        assert!(diagnose(&network, &ask).is_ok(), "the saved request is answered");
    }
    if let Some(example) = saved("diagnostics/nsg-diagnostics-cli-output-docs.json") {
        same_shape(&example, &ours, &[]);
    }
    let groups = &answer.results[0].network_security_group_result.evaluated_network_security_groups;
    assert_eq!(groups.len(), 2);
    let tried = &groups[0].rules_evaluation_result;
    let names: Vec<&str> = tried.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["UserRule_Http", "UserRule_Ssh"]);
    assert!(!tried[0].fields.destination_port_matched && tried[0].fields.source_matched);
    assert!(tried[1].fields.all());
    assert!(groups[0].applied_to.ends_with("/virtualNetworks/lab/subnets/web"));
    assert!(groups[1].applied_to.ends_with("/networkInterfaces/vm1"));
}

#[test]
fn a_profile_that_rules_divide_is_allowed_only_as_a_whole_and_says_who_decides_which_part() {
    let network = lab().network;
    let none = Vec::<String>::new();
    let said = |source, port| diagnosed(&network, &profile("Inbound", "TCP", source, "10.0.1.4", port));
    assert_eq!(said("Internet", "443"), (Access::Allow, "UserRule_OpenAll".into(), none.clone()));
    // 8.0.0.0/7 is public; 10.0.0.0/8 is in neither tag beyond 10.0.0.0/15: the default rule denies that part.
    let (access, rule, parts) = said("8.0.0.0/6", "443");
    assert_eq!((access, rule.as_str()), (Access::Deny, "UserRule_DenyVnet"));
    assert_eq!(parts, ["UserRule_Http", "UserRule_DenyVnet"]);
    let (access, rule, parts) = said("*", "22");
    assert_eq!((access, rule.as_str(), parts), (Access::Allow, "UserRule_OpenAll", none.clone()));
    assert_eq!(said("VirtualNetwork", "81"), (Access::Deny, "UserRule_DenyVnet".into(), none));
    let icmp = diagnosed(&network, &profile("Inbound", "Icmp", "1.1.1.1", "10.0.1.4", "*"));
    assert_eq!((icmp.0, icmp.1.as_str()), (Access::Deny, "DefaultRule_DenyAllInBound"));
    let mail = diagnose(&network, &profile("Outbound", "TCP", "10.0.1.4", "Internet", "25")).unwrap();
    let mail = &mail.results[0].network_security_group_result;
    assert_eq!(mail.security_rule_access_result, Access::Deny);
    assert_eq!(mail.platform_rule.as_ref().unwrap().rule_name, "PlatformRule_BlockSmtp25");
    for (ask, expected) in [
        (profile("Inbound", "TCP", "nowhere", "*", "1"), "no service tag of that name"),
        (profile("Inbound", "TCP", "10.0.0.0/8", "::/0", "1"), "no address family in common"),
        (profile("Inbound", "ICMP", "*", "*", "80"), "has no ports"),
        (profile("Inbound", "TCP", "*", "*", "90-80"), "destinationPort"),
        (profile("Inbound", "GRE", "*", "*", "*"), "protocol"),
    ] {
        let message = diagnose(&network, &ask).unwrap_err().message;
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn tags_say_what_they_hold_per_subnet_and_which_of_them_an_address_is_in() {
    let loaded = lab();
    let ask = |show: Option<&str>| {
        let question = Request::Tags { show: show.map(str::to_owned) };
        answer(&loaded.network, &loaded.places, Surroundings::default(), &question)
    };
    let vnet = ask(Some("virtualnetwork")).unwrap();
    assert_eq!(vnet["tags"].as_array().unwrap().len(), 3, "three subnets, three meanings");
    assert_eq!(vnet["tags"][1]["subnets"], json!(["lab/db"]));
    assert!(vnet["tags"][1]["prefixes"].as_array().unwrap().contains(&json!("0.0.0.0/0")));
    let corp = ask(Some("Corp")).unwrap();
    assert_eq!(corp["tags"][0]["prefixes"], json!(["198.51.100.0/24", "2001:db8:5::/48"]));
    let names = |answer: Value| -> Vec<String> {
        answer["tags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tag| tag["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(ask(Some("198.51.100.7")).unwrap()), ["VirtualNetwork", "Internet", "Corp"]);
    assert_eq!(names(ask(Some("198.51.0.0/16")).unwrap()), ["VirtualNetwork", "Internet"], "all of it");
    assert_eq!(names(ask(Some("169.254.169.254")).unwrap()), ["VirtualNetwork", "AzurePlatformIMDS"]);
    let list = ask(None).unwrap();
    let corp = list["tags"].as_array().unwrap().last().unwrap();
    assert_eq!((&corp["prefixes"], &corp["ipv6Prefixes"], &corp["rules"]), (&json!(2), &json!(1), &json!(3)));
    assert!(ask(Some("Cor")).unwrap_err().message.contains("did you mean Corp"));
}
