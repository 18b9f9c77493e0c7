//! `portcullis import` on inputs that are broken, strange or hostile: an error or a policy that passes `check`, never a
//! panic, and never a Deny rule that is lost without an error.

mod import_support;

use import_support::{at_level, data, files, imported, run};
use portcullis::policy;
use portcullis::policy::import::report::Level;
use serde_json::{Value, json};

/// xorshift64*, seeded: a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

fn pointers(value: &Value, at: String, all: &mut Vec<String>) {
    all.push(at.clone());
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, inner)| pointers(inner, format!("{at}/{}", escape(key)), all))
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, inner)| pointers(inner, format!("{at}/{index}"), all));
        }
        _ => {}
    }
}

fn strange(random: &mut Random) -> Value {
    let all = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e300),
        json!(u64::MAX),
        json!(4097),
        json!(100.5),
        json!(""),
        json!("*"),
        json!("[parameters('x')]"),
        json!("[concat('a', "),
        json!("0.0.0.0/0"),
        json!("0.0.0.0/32"),
        json!("255.255.255.255"),
        json!("10.0.0.0/8"),
        json!("10.0.0.0/33"),
        json!("10.0.0.1-10.0.0.9"),
        json!("fd00::/48"),
        json!("::/0"),
        json!("80,443"),
        json!("65535-1"),
        json!("Icmp"),
        json!("Deny"),
        json!("Outbound"),
        json!("AzurePlatformDNS"),
        json!("a\u{0}b\u{1b}[2J\n# x"),
        json!("yes"),
        json!("ü".repeat(200)),
        json!([]),
        json!({}),
        json!([[[]]]),
        json!({"id": 5}),
        json!({"id": "/x/y"}),
        json!("IPv6"),
        json!({"id": "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v/subnets/s"}),
    ];
    all[random.below(all.len())].clone()
}

#[test]
fn no_change_to_a_real_input_makes_a_policy_that_check_refuses() {
    let mut inputs = Vec::new();
    for folder in ["azure-rest-examples", "azure-lb"] {
        inputs.extend(data(folder).map(|folder| files(&folder)).unwrap_or_default());
    }
    if let Some(path) = data("azure-nsg/quickstart-concrete.ndjson") {
        let text = std::fs::read_to_string(path).unwrap();
        inputs.extend(text.lines().map(|line| ("group".to_owned(), line.as_bytes().to_vec())));
    }
    inputs.retain(|(name, bytes)| run(name, bytes).is_ok());
    if inputs.is_empty() {
        return;
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut policies, mut refused) = (0, 0);
    for turn in 0..12_000 {
        let (name, bytes) = &inputs[random.below(inputs.len())];
        let mut value: Value = serde_json::from_slice(bytes).unwrap();
        let (_, other) = &inputs[random.below(inputs.len())];
        let other: Value = serde_json::from_slice(other).unwrap();
        for _ in 0..=random.below(4) {
            let mut all = Vec::new();
            pointers(&value, String::new(), &mut all);
            let at = all[random.below(all.len())].clone();
            let mut there = Vec::new();
            pointers(&other, String::new(), &mut there);
            let from = other.pointer(&there[random.below(there.len())]).unwrap().clone();
            let new = if random.below(2) == 0 { strange(&mut random) } else { from };
            match value.pointer_mut(&at).unwrap() {
                Value::Array(items) if random.below(2) == 0 => {
                    let copies = items.clone();
                    items.extend(copies);
                    items.push(new);
                }
                place => *place = new,
            }
        }
        // Two inputs in one, now and then.
        let value = if turn % 5 == 0 { json!([value, other]) } else { value };
        match run(name, value.to_string().as_bytes()) {
            Ok(imported) => {
                policies += 1;
                if let Err(findings) = policy::parse("policy.yaml", &imported.yaml) {
                    panic!("turn {turn}, {name}: {findings}\n{value}\n{}", imported.yaml);
                }
            }
            Err(_) => refused += 1,
        }
    }
    println!("{policies} policies, {refused} refused");
    assert!(policies > 6000, "{policies}");
}

#[test]
fn an_input_that_is_cut_off_anywhere_is_an_error() {
    let Some(folder) = data("azure-rest-examples") else { return };
    let bytes = std::fs::read(folder.join("NetworkSecurityGroupGet.json")).unwrap();
    let whole = bytes.iter().rposition(|b| *b == b'}').unwrap();
    for end in 0..whole {
        assert!(run("cut", &bytes[..end]).is_err(), "{end}");
    }
}

#[test]
fn what_is_no_azure_json_is_told_so() {
    for (input, message) in [
        ("", "no resource of a kind"),
        ("hello", "not JSON"),
        ("[1, 2]", "no resource of a kind"),
        ("{}", "no resource of a kind"),
        ("{\"a\": 1, \"a\": 2}", "given twice"),
        ("{\"type\": \"Microsoft.Compute/virtualMachines\", \"name\": \"vm\"}", "no resource of a kind"),
    ] {
        assert!(run("x", input.as_bytes()).unwrap_err().contains(message), "{input}");
    }
    assert!(run("x", "[".repeat(1 << 20).as_bytes()).unwrap_err().contains("recursion limit"));
    assert!(run("x", &[0xff; 100]).is_err());
}

fn deny(change: &[(&str, Value)]) -> Value {
    let mut properties = json!({
        "priority": 200, "direction": "Inbound", "access": "Deny", "protocol": "Tcp", "sourceAddressPrefix": "*",
        "sourcePortRange": "*", "destinationAddressPrefix": "*", "destinationPortRange": "22"
    });
    for (key, value) in change {
        properties[*key] = value.clone();
    }
    json!({"type": "Microsoft.Network/networkSecurityGroups", "name": "nsg", "properties": {"securityRules": [
        {"name": "d", "properties": properties}]}})
}

#[test]
fn a_deny_rule_that_cannot_be_carried_over_is_an_error_whatever_is_wrong_with_it() {
    let expression = json!("[parameters('x')]");
    for (property, value) in [
        ("priority", json!(5)),
        ("priority", expression.clone()),
        ("priority", json!(null)),
        ("direction", json!("Sideways")),
        ("protocol", json!("Gre")),
        ("access", expression.clone()),
        ("sourceAddressPrefix", json!("Storage.WestUS")),
        ("sourceAddressPrefix", expression.clone()),
        ("destinationAddressPrefix", json!("10.0.0.0/40")),
        ("sourceAddressPrefixes", json!(["10.0.0.0/8"])),
        ("destinationPortRange", json!("99999")),
        ("destinationPortRange", json!(null)),
        ("sourcePortRanges", expression.clone()),
        ("sourceApplicationSecurityGroups", expression.clone()),
        ("destinationApplicationSecurityGroups", json!([{"id": "/x"}])),
    ] {
        let (imported, loaded) = imported(&deny(&[(property, value.clone())]));
        assert!(!at_level(&imported, Level::Error).is_empty(), "{property}: {value}\n{}", imported.yaml);
        assert!(imported.yaml.contains("ATTENTION"), "{property}");
        assert!(loaded.network.groups[0].rules.len() <= 1);
    }
    let (whole, loaded) = imported(&deny(&[]));
    assert!(at_level(&whole, Level::Error).is_empty());
    assert_eq!(loaded.network.groups[0].rules.len(), 1);
}

#[test]
fn rules_that_cannot_be_read_at_all_are_an_error() {
    for rules in [json!("[variables('rules')]"), json!(["x"]), json!({"a": 1})] {
        let group = json!({"type": "Microsoft.Network/networkSecurityGroups", "name": "nsg", "properties": {"securityRules": rules}});
        let (imported, _) = imported(&group);
        assert!(!at_level(&imported, Level::Error).is_empty(), "{rules}");
    }
}

/// Found by the fuzzer.
#[test]
fn a_network_without_interfaces_and_without_room_for_one_is_refused_with_what_to_do() {
    let network = |prefix: &str| {
        json!({
            "id": "/subscriptions/s/resourceGroups/r/providers/Microsoft.Network/virtualNetworks/v",
            "name": "v",
            "type": "Microsoft.Network/virtualNetworks",
            "properties": { "addressSpace": { "addressPrefixes": [prefix] } }
        })
    };
    let why = run("small.json", network("10.0.0.0/32").to_string().as_bytes()).unwrap_err();
    assert!(why.starts_with("small.json: no interface") && why.contains("widen an address space"), "{why}");
    imported(&network("10.0.0.0/24"));
}
