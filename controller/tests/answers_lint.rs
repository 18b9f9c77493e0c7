//! Each finding of `lint` where it belongs, and none where it does not; the commands as a person runs them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portcullis::answers::lint::{LintReport, Severity, Surroundings, lint};
use portcullis::policy;
use serde_json::Value;

fn lab() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/answers_support/lab.yaml")
}

fn report(text: &str, addresses: Option<&[IpAddr]>) -> LintReport {
    let loaded = policy::parse("policy.yaml", text).unwrap_or_else(|findings| panic!("{findings}"));
    lint(&loaded.network, &loaded.places, Surroundings { host_addresses: addresses })
}

#[test]
fn every_kind_of_finding_is_told_with_its_code_severity_and_line() {
    let text = std::fs::read_to_string(lab()).unwrap();
    let report = report(&text, Some(&[IpAddr::from([10, 0, 0, 1])]));
    let found: Vec<(String, Severity, String)> =
        report.findings.iter().map(|f| (f.code.clone(), f.severity, f.about.clone())).collect();
    use Severity::{Error, Warning};
    let rule = |group: &str, rule: &str| format!("networkSecurityGroups/{group}/securityRules/{rule}");
    let expected = [
        ("PC402", Warning, "applicationSecurityGroups/AsgEmpty".to_owned()),
        ("PC203", Warning, "routeTables/rt".to_owned()),
        ("PC501", Warning, "platformServices/dns".to_owned()),
        ("PC201", Error, rule("web-nsg", "Ssh")),
        ("PC101", Error, rule("web-nsg", "DenyHttps")),
        ("PC101", Warning, rule("web-nsg", "SshAgain")),
        ("PC104", Warning, rule("web-nsg", "Elsewhere")),
        ("PC105", Warning, rule("web-nsg", "ForDb")),
        ("PC102", Warning, rule("web-nsg", "ForNobody")),
        ("PC301", Warning, rule("web-nsg", "DenyVnet")),
        ("PC202", Error, rule("nic-nsg", "OpenAll")),
        ("PC301", Error, rule("db-nsg", "DenyRest")),
        ("PC401", Warning, "networkSecurityGroups/unused-nsg".to_owned()),
    ];
    assert_eq!(found, expected.map(|(code, severity, about)| (code.to_owned(), severity, about)));
    let lines: Vec<&str> = text.lines().collect();
    for finding in &report.findings {
        let (line, column) = (finding.line.unwrap(), finding.column.unwrap());
        let name = finding.about.rsplit('/').next().unwrap();
        assert!(lines[line - 1][column - 1..].starts_with(name), "{finding:?}");
        assert!(!finding.help.is_empty());
    }
    let shadowed = report.findings.iter().find(|f| f.about.ends_with("DenyHttps")).unwrap();
    assert_eq!(shadowed.rules, ["Http"]);
    assert_eq!((report.errors, report.warnings), (4, 9));
}

#[test]
fn a_policy_without_faults_is_told_nothing() {
    let text = "
applicationSecurityGroups: [{ name: AsgWeb }]
virtualNetworks:
  - name: v
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets: [{ name: s, addressPrefix: 10.0.0.0/24, networkSecurityGroup: nsg }]
networkInterfaces:
  - name: vm
    device: tap0
    ipConfigurations: [{ name: c, subnet: s, privateIPAddress: 10.0.0.4, applicationSecurityGroups: [AsgWeb] }]
networkSecurityGroups:
  - name: nsg
    securityRules:
      - { name: Https, priority: 100, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet,
          sourcePortRange: '*', destinationApplicationSecurityGroups: [AsgWeb], destinationPortRange: 443 }
      - { name: SshFromOffice, priority: 110, direction: Inbound, access: Allow, protocol: Tcp,
          sourceAddressPrefix: 198.51.100.0/24, sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 22 }
      - { name: NoMail, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*',
          sourcePortRange: '*', destinationAddressPrefix: Internet, destinationPortRange: 25 }
";
    let report = report(text, None);
    assert_eq!(report.findings, [], "{}", report.text());
    assert_eq!(report.text(), "nothing to say\n");
}

#[test]
fn an_opening_that_a_rule_before_it_closes_is_none_and_two_halves_are_the_internet() {
    let with = |rules: &str| {
        let text = format!(
            "
virtualNetworks:
  - name: v
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets: [{{ name: s, addressPrefix: 10.0.0.0/24, networkSecurityGroup: nsg }}]
networkInterfaces:
  - {{ name: vm, device: tap0, ipConfigurations: [{{ name: c, subnet: s, privateIPAddress: 10.0.0.4 }}] }}
networkSecurityGroups:
  - name: nsg
    securityRules:
{rules}"
        );
        let report = report(&text, None);
        report
            .findings
            .iter()
            .map(|f| format!("{} {}", f.code, f.about.rsplit('/').next().unwrap()))
            .collect::<Vec<_>>()
    };
    let rule = |name: &str, priority: u16, access: &str, source: &str, port: &str| {
        format!(
            "      - {{ name: {name}, priority: {priority}, direction: Inbound, access: {access}, protocol: Tcp, \
             sourceAddressPrefixes: [{source}], sourcePortRange: '*', destinationAddressPrefix: '*', \
             destinationPortRange: {port} }}\n"
        )
    };
    let halves = "0.0.0.0/1, 128.0.0.0/1";
    assert_eq!(with(&rule("Halves", 200, "Allow", halves, "22")), ["PC201 Halves"]);
    assert_eq!(with(&rule("Half", 200, "Allow", "0.0.0.0/3", "22")), Vec::<String>::new(), "a few");
    assert_eq!(with(&rule("Web", 200, "Allow", halves, "443")), Vec::<String>::new());
    assert_eq!(with(&rule("Most", 200, "Allow", halves, "1-60000")), ["PC201 Most"]);
    let closed =
        rule("No", 100, "Deny", halves, "0-6000") + &rule("Range", 200, "Allow", halves, "3300-6100");
    assert_eq!(with(&closed), Vec::<String>::new(), "what is for administration is denied before");
}

fn run(arguments: &[&str], input: &str) -> (Option<i32>, String, String) {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The program may end without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let out = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn the_commands_answer_offline_with_exit_codes_that_mean_something() {
    let lab = lab();
    let file = lab.to_str().unwrap();
    let ask = |arguments: &[&str], input: &str| run(&[arguments, &["--policy", file]].concat(), input);
    let (code, text, _) = ask(&["lint"], "");
    assert_eq!(code, Some(1));
    assert!(text.contains(&format!("{file}:45:17")) && text.contains("error[PC201]"), "{text}");
    let clean = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/minimal.yaml");
    let clean = clean.to_str().unwrap();
    assert_eq!(run(&["lint", "--policy", clean], "").0, Some(0));
    assert_eq!(run(&["lint", "--deny", "warnings", "--policy", clean], "").0, Some(0));
    assert_eq!(run(&["lint", "--policy", "/nonexistent"], "").0, Some(2));

    let (code, text, _) = ask(&["effective", "vm1", "--output", "json"], "");
    assert_eq!(code, Some(0));
    assert!(serde_json::from_str::<Value>(&text).unwrap()["value"].is_array());
    let (code, _, error) = ask(&["effective", "vm9"], "");
    assert_eq!(code, Some(2));
    assert!(error.contains("no network interface `vm9`"), "{error}");

    let verify =
        ["verify", "--nic", "vm1", "--direction", "Outbound", "--local", "10.0.1.4:5000", "--remote"];
    let (code, text, _) = ask(&[&verify[..], &["1.1.1.1:443"]].concat(), "");
    assert_eq!(
        (code, text.as_str()),
        (Some(0), "Allow: by DefaultRule_AllowInternetOutBound of web-nsg on the subnet\n")
    );
    let (code, text, _) = ask(&[&verify[..], &["1.1.1.1:23", "--output", "json"]].concat(), "");
    assert_eq!(code, Some(3), "denied");
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        serde_json::json!({ "access": "Deny", "ruleName": "UserRule_NoTelnet" })
    );
    assert_eq!(ask(&[&verify[..], &["1.1.1.1:*"]].concat(), "").0, Some(2));
    assert_eq!(ask(&["verify", "--nic", "vm1"], "").0, Some(2), "usage");
    let request = r#"{"targetResourceId":"/subscriptions/s/virtualMachines/vm1","direction":"Inbound","protocol":"TCP",
        "localPort":"443","remotePort":"*","localIPAddress":"10.0.1.4","remoteIPAddress":"1.1.1.1"}"#;
    assert_eq!(ask(&["verify", "--request", "-"], request).0, Some(0));
    assert_eq!(ask(&["verify", "--request", "-"], &"x".repeat(70_000)).0, Some(2));

    let diagnose = ["diagnose", "--nic", "vm1", "--direction", "Inbound", "--protocol", "TCP", "--source"];
    let (code, text, _) = ask(
        &[&diagnose[..], &["8.0.0.0/6", "--destination", "10.0.1.4", "--destination-port", "443"]].concat(),
        "",
    );
    assert_eq!(code, Some(3));
    assert!(text.contains("parts of the profile are decided apart"), "{text}");
    let (code, text, _) = ask(&["tags", "show", "198.51.100.7"], "");
    assert_eq!(code, Some(0));
    assert!(text.contains("Corp"), "{text}");
    assert_eq!(ask(&["tags", "list", "--output", "json"], "").0, Some(0));
    let (code, _, error) = run(&["effective", "vm1", "--socket", "/nonexistent/control.sock"], "");
    assert_eq!(code, Some(1), "no daemon: {error}");
}
