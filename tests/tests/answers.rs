//! The answers about security groups through the running daemon: the same as about the policy's file, and true of the
//! packets that are sent.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, WithHook, binary};
use portcullis_tests::lab::{ScratchDir, TcpEcho, Topology, TopologySpec, ping, tcp_connect};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const SERVER: [u8; 4] = [198, 51, 100, 1];

const GROUPS: &str = "
applicationSecurityGroups: [{ name: unused }]
serviceTags: { tags: [{ name: Corp, addressPrefixes: [198.51.100.0/24] }] }
networkSecurityGroups:
  - name: nic
    securityRules:
      - { name: CorpHttps, priority: 100, direction: Outbound, access: Allow, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: Corp, destinationPortRange: 443 }
      - { name: NoCorp, priority: 110, direction: Outbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: Corp, destinationPortRange: '*' }
      - { name: Never, priority: 120, direction: Outbound, access: Allow, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: 198.51.100.7, destinationPortRange: 22 }
";

/// Asks offline: what it prints, and its exit code.
fn offline(policy: &std::path::Path, arguments: &[&str]) -> (Value, i32) {
    let output = Command::new(binary().unwrap())
        .args(["--output", "json"])
        .args(arguments)
        .arg("--policy")
        .arg(policy)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (value, output.status.code().unwrap())
}

fn daemon(edge: &Edge, arguments: &[&str]) -> (Value, i32) {
    let arguments = [&["--output", "json"], arguments].concat();
    let (status, out, err) = edge.daemon.client(&arguments).unwrap();
    let value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {out}{err}"));
    (value, status.code().unwrap())
}

#[test]
fn the_daemon_answers_as_the_policys_file_does_and_packets_meet_that_fate() {
    let spec = TopologySpec::clean_veth(2);
    let mut policy = LabPolicy::new(WithHook::Tc);
    policy.nic_groups.insert("vm1", "nic");
    policy.extra = GROUPS.to_owned();
    let yaml = policy.yaml(&spec);
    let edge = Edge::start(&spec, &yaml).unwrap();
    let file = edge.bpffs.scratch().write("same.yaml", &yaml).unwrap();
    let guest = edge.topology.guest("vm1");
    assert_eq!(ping(edge.topology.guest("vm2"), IpAddr::from(SERVER), 1, LIMIT).unwrap().received, 1);

    let verify = |port: &str| -> Vec<String> {
        let remote = format!("198.51.100.1:{port}");
        [
            "verify",
            "--nic",
            "vm1",
            "--direction",
            "Outbound",
            "--local",
            "10.0.0.4:40000",
            "--remote",
            &remote,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let diagnose =
        ["diagnose", "--nic", "vm1", "--direction", "Outbound", "--protocol", "TCP", "--source", "10.0.0.4"];
    let diagnose = [&diagnose[..], &["--destination", "Corp", "--destination-port", "443"]].concat();
    let (https, ssh) = (verify("443"), verify("22"));
    let words = |of: &[String]| -> Vec<String> { of.to_vec() };
    for (arguments, code) in [
        (words(&https), 0),
        (words(&ssh), 3),
        (diagnose.iter().map(|w| (*w).to_owned()).collect(), 0),
        (["effective", "vm1"].map(str::to_owned).to_vec(), 0),
        (["effective", "vm2"].map(str::to_owned).to_vec(), 0),
        (["tags", "list"].map(str::to_owned).to_vec(), 0),
        (["tags", "show", "198.51.100.9"].map(str::to_owned).to_vec(), 0),
        (["tags", "show", "corp"].map(str::to_owned).to_vec(), 0),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (there, here) = (daemon(&edge, &arguments), offline(&file, &arguments));
        assert_eq!(there.1, code, "{arguments:?}: {}", there.0);
        assert_eq!(there, here, "{arguments:?}");
    }
    let https: Vec<&str> = https.iter().map(String::as_str).collect();
    let ssh: Vec<&str> = ssh.iter().map(String::as_str).collect();
    assert_eq!(daemon(&edge, &https).0["access"], "Allow");
    let denied = daemon(&edge, &ssh).0;
    assert_eq!(denied["access"], "Deny");
    assert!(denied["ruleName"].as_str().unwrap().contains("NoCorp"), "{denied}");

    // Lint: the rule that never matches, by name of what shadows it; places are the daemon's file's.
    let (lint, code) = daemon(&edge, &["lint"]);
    let findings = lint["findings"].as_array().unwrap();
    let shadowed =
        findings.iter().find(|f| f.to_string().contains("Never")).unwrap_or_else(|| panic!("{lint}"));
    assert!(shadowed.to_string().contains("NoCorp"), "{shadowed}");
    assert!(findings.iter().any(|f| f.to_string().contains("unused")), "{lint}");
    assert_eq!(code, 0);
    let rules = daemon(&edge, &["rules", "--shadowed"]).0;
    let rows = rules["rules"].as_array().unwrap();
    let row =
        |name: &str| rows.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("{name}: {rules}"));
    assert_eq!(row("Never")["shadowedBy"], json!(["NoCorp"]));

    // What was told is what happens, and is counted: in all, and under the generation in force.
    let server = |port| TcpEcho::start(edge.topology.internet(), SocketAddr::from((SERVER, port))).unwrap();
    let (_https, _ssh) = (server(443), server(22));
    assert!(tcp_connect(guest, None, SocketAddr::from((SERVER, 443)), LIMIT).is_ok());
    assert!(tcp_connect(guest, None, SocketAddr::from((SERVER, 22)), SOON).is_err());
    let hits = |edge: &Edge, name: &str| {
        let rules = daemon(edge, &["rules", "--group", "nic"]).0;
        let row = rules["rules"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap().clone();
        (
            row["hits"].as_u64().unwrap(),
            ["hitsThisGeneration", "bytesThisGeneration"].map(|key| row[key].as_u64().unwrap()),
            rules["generation"].as_u64(),
        )
    };
    let (all, now, generation) = hits(&edge, "CorpHttps");
    assert_eq!((all, now[0]), (1, 1));
    assert!(now[1] >= 40, "bytes of a SYN: {now:?}");
    assert!(hits(&edge, "NoCorp").0 >= 1);
    let (applied, said) = edge.apply(&yaml.replace("name: unused", "name: other")).unwrap();
    assert!(applied, "{said}");
    let (all, now, next) = hits(&edge, "CorpHttps");
    assert_eq!((all, now), (1, [0, 0]), "counters go on, the generation's begin anew");
    assert_eq!(next, generation.map(|g| g + 1));
}

#[test]
fn a_new_tag_file_comes_into_force_by_itself() {
    let tags = |prefix: &str| {
        json!({ "changeNumber": 1, "cloud": "Public", "values": [
            { "name": "Storage", "id": "Storage", "properties": { "addressPrefixes": [prefix] } }
        ] })
        .to_string()
    };
    let spec = TopologySpec::clean_veth(1);
    let mut policy = LabPolicy::new(WithHook::Tc);
    policy.nic_groups.insert("vm1", "nic");
    policy.extra = "serviceTags: { file: tags.json }
networkSecurityGroups:
  - name: nic
    securityRules:
      - { name: NoStorage, priority: 100, direction: Outbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: storage, destinationPortRange: '*' }
"
    .to_owned();
    let topology = Topology::build(&spec).unwrap();
    let scratch = ScratchDir::create().unwrap();
    scratch.write("tags.json", &tags("192.0.2.0/24")).unwrap();
    let policy = policy
        .yaml(&spec)
        .replace("file: tags.json", &format!("file: '{}'", scratch.path().join("tags.json").display()));
    let edge = Edge::start_in(topology, &policy).unwrap();
    let guest = edge.topology.guest("vm1");
    assert_eq!(ping(guest, IpAddr::from(SERVER), 1, LIMIT).unwrap().received, 1);
    let generation = edge.generation().unwrap();
    scratch.write("tags.json", &tags("198.51.100.0/24")).unwrap();
    assert!(edge.wait(|edge| (edge.generation().ok()? > generation).then_some(())).is_some());
    assert_eq!(ping(guest, IpAddr::from(SERVER), 1, SOON).unwrap().received, 0);
    assert!(edge.rule_hits("nic", "Outbound", "NoStorage").unwrap() >= 1);
    // Half a file is refused and changes nothing.
    let generation = edge.generation().unwrap();
    scratch.write("tags.json", "{ \"values\": [").unwrap();
    let said = |edge: &Edge| edge.daemon.log().contains("the policy before stays in force").then_some(());
    assert!(edge.wait(said).is_some(), "{}", edge.daemon.log());
    assert_eq!(edge.generation().unwrap(), generation);
    assert_eq!(ping(guest, IpAddr::from(SERVER), 1, SOON).unwrap().received, 0);
}
