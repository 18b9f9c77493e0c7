//! Service tags: built in, of the policy, and of Azure's published files.

mod policy_support;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use policy_support::{accepted, changed, refused, second_places};
use portcullis::policy::network::{AddressMatch, ServiceTag, TagDefinition};
use portcullis::policy::{self, Loaded, Severity};

const FROM: &str = "sourceAddressPrefix: Offices";
const TAGS: &str = "serviceTags:\n  tags:\n";
const OFFICES: &str = "- { name: Offices, addressPrefixes: [198.51.100.0/24, '2001:db8:5::/48'] }";

/// A folder of this test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("portcullis-tags-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes the tag file and the changed example beside it, which names it.
    fn policy(&self, tags: &[u8], changes: &[(&str, &str)]) -> Result<Loaded, policy::Diagnostics> {
        std::fs::write(self.0.join("tags.json"), tags).unwrap();
        let named = [&[(TAGS, "serviceTags:\n  file: tags.json\n  tags:\n")], changes].concat();
        let path = self.0.join("policy.yaml");
        std::fs::write(&path, changed(&named)).unwrap();
        policy::load(&path)
    }

    /// Asserts that the tag file is refused at the place that names it.
    fn refused(&self, tags: &[u8], message: &str, help: &str) {
        // That the rule's tag is unknown only follows from it.
        let change = [(FROM, "sourceAddressPrefix: Sql.WestUS")];
        let findings = self.policy(tags, &change).map(|_| ()).expect_err("the tag file is wrong");
        let [found] = findings.entries() else { panic!("expected one finding\n{findings}") };
        assert!(found.message.contains(message), "expected {message:?}, got\n{findings}");
        assert!(found.message.contains("tags.json"), "the file is named: {findings}");
        assert!(found.help[0].contains(help), "expected {help:?}, got\n{findings}");
        let rendered = findings.to_string();
        assert!(rendered.contains("file: tags.json") && rendered.contains("^^^^^^^^^"), "{rendered}");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn file(entries: &[(&str, &[&str])]) -> Vec<u8> {
    let values: Vec<_> = entries
        .iter()
        .map(|(name, prefixes)| {
            serde_json::json!({ "name": name, "id": name, "properties": { "changeNumber": 1, "addressPrefixes": prefixes } })
        })
        .collect();
    serde_json::to_vec(&serde_json::json!({ "changeNumber": 1, "cloud": "Public", "values": values }))
        .unwrap()
}

/// Azure's own file, or nothing with a printed reason.
fn published(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/servicetags").join(name);
    if !path.is_file() {
        eprintln!("skipped: {} is not here", path.display());
        return None;
    }
    Some(path.canonicalize().unwrap())
}

fn distinct(tags: &[TagDefinition]) -> usize {
    tags.iter().flat_map(|tag| tag.prefixes.iter()).collect::<HashSet<_>>().len()
}

#[test]
fn azures_public_file_loads_whole_and_quickly() {
    let Some(path) = published("ServiceTags_Public_20251013.json") else { return };
    let section = format!("serviceTags:\n  file: '{}'\n  tags:\n", path.display());
    let text = changed(&[(TAGS, &section), (FROM, "sourceAddressPrefix: storage.WESTUS")]);
    let mut times = Vec::new();
    let mut last = None;
    for _ in 0..5 {
        let start = Instant::now();
        let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|findings| panic!("{findings}"));
        times.push(start.elapsed());
        last = Some(loaded);
    }
    let loaded = last.unwrap();
    let tags = &loaded.network.tags;
    assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
    assert_eq!((tags.len() - 1, distinct(&tags[..tags.len() - 1])), (3039, 52_317));
    let AddressMatch::Tag(ServiceTag::Named(index)) = loaded.network.groups[1].rules[0].source[0] else {
        panic!("{:?}", loaded.network.groups[1].rules[0].source)
    };
    assert_eq!(tags[index].name, "Storage.WestUS");
    times.sort();
    eprintln!("policy with the public tag file: {:?} (median of {})", times[2], times.len());
    assert!(times[2] < Duration::from_secs(1), "{times:?}");
}

#[test]
fn azures_file_of_china_loads_whole() {
    let Some(path) = published("ServiceTags_China_20260720.json") else { return };
    let section = format!("serviceTags:\n  file: '{}'\n  tags:\n", path.display());
    let loaded = accepted(&[(TAGS, &section)]);
    let tags = &loaded.network.tags;
    assert_eq!((tags.len() - 1, distinct(&tags[..tags.len() - 1])), (327, 2484));
    assert_eq!(tags.last().unwrap().name, "Offices");
    assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
}

#[test]
fn what_the_discovery_api_answers_is_a_tag_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/data/azure-rest-examples/ServiceTagsList.json");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return eprintln!("skipped: {} is not here", path.display());
    };
    let example: serde_json::Value = serde_json::from_str(&text).unwrap();
    let body = example["responses"]["200"]["body"].to_string();
    let folder = Folder::new("discovery");
    let loaded = folder
        .policy(body.as_bytes(), &[(FROM, "sourceAddressPrefix: servicebus.eastus2")])
        .unwrap_or_else(|findings| panic!("{findings}"));
    let sizes: Vec<_> = loaded.network.tags.iter().map(|tag| tag.prefixes.len()).collect();
    assert_eq!(sizes, [3, 2, 3, 3, 2, 2], "five tags of the file and the policy's own");
}

#[test]
fn a_tag_file_is_found_beside_the_policy_with_or_without_a_byte_order_mark() {
    let folder = Folder::new("beside");
    let plain = file(&[("Sql", &["13.66.60.72/32", "2603:1000::/40"]), ("Sql.WestUS", &["13.66.60.0/24"])]);
    let marked = [b"\xef\xbb\xbf".as_slice(), &plain].concat();
    for bytes in [plain, marked] {
        let loaded = folder.policy(&bytes, &[(FROM, "sourceAddressPrefix: SQL.westus")]).unwrap();
        assert_eq!(loaded.network.tags.len(), 3);
        assert_eq!(loaded.network.tags[0].prefixes.len(), 2);
        let source = &loaded.network.groups[1].rules[0].source;
        assert_eq!(source, &[AddressMatch::Tag(ServiceTag::Named(1))]);
        assert!(loaded.places.contains_key("serviceTags"));
    }
}

#[test]
fn tags_of_the_policy_and_built_in_ones_are_found_in_any_case() {
    let loaded = accepted(&[(FROM, "sourceAddressPrefix: OFFICES")]);
    let tags = &loaded.network.tags;
    assert_eq!((tags.len(), tags[0].name.as_str()), (1, "Offices"));
    let prefixes: Vec<_> = tags[0].prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(prefixes, ["198.51.100.0/24", "2001:db8:5::/48"]);
    assert_eq!(loaded.network.groups[1].rules[0].source, [AddressMatch::Tag(ServiceTag::Named(0))]);
    assert!(loaded.places.contains_key("serviceTags/Offices"));
    for (word, tag) in [
        ("azureplatformdns", ServiceTag::AzurePlatformDns),
        ("AZUREPLATFORMIMDS", ServiceTag::AzurePlatformImds),
        ("AzurePlatformLKM", ServiceTag::AzurePlatformLkm),
        ("azureloadbalancer", ServiceTag::AzureLoadBalancer),
    ] {
        let to = format!("destinationAddressPrefix: {word}");
        let loaded = accepted(&[("destinationAddressPrefix: AzurePlatformIMDS", &to)]);
        assert_eq!(loaded.network.groups[1].rules[1].destination, [AddressMatch::Tag(tag)]);
    }
    // A tag may be listed with addresses; what it stands for may be single addresses.
    let listed = accepted(&[
        (FROM, "sourceAddressPrefixes: [offices, 10.0.0.9]"),
        ("198.51.100.0/24, ", "198.51.100.7, "),
    ]);
    assert_eq!(listed.network.groups[1].rules[0].source.len(), 2);
    assert_eq!(listed.network.tags[0].prefixes[0].to_string(), "198.51.100.7/32");
}

#[test]
fn an_unknown_tag_is_refused_with_the_one_that_was_meant() {
    refused(
        &[(FROM, "sourceAddressPrefix: Ofices")],
        "Ofices",
        "there is no service tag `Ofices`",
        "did you mean `Offices`?",
    );
    refused(
        &[(FROM, "sourceAddressPrefix: Storage.WestUS")],
        "Storage.WestUS",
        "there is no service tag `Storage.WestUS`",
        "name its tag file under `serviceTags: { file: ... }`",
    );
    let folder = Folder::new("unknown");
    let tags = file(&[("Storage.WestUS", &["13.66.60.0/24"])]);
    for (written, help) in
        [("Storage.WestUSA", "did you mean `Storage.WestUS`?"), ("Kubernetes", "neither the tag file nor")]
    {
        let change = format!("sourceAddressPrefix: {written}");
        let findings = folder.policy(&tags, &[(FROM, &change)]).map(|_| ()).expect_err("unknown");
        let [found] = findings.entries() else { panic!("{findings}") };
        assert_eq!(found.message, format!("there is no service tag `{written}`"));
        assert!(found.help[0].contains(help), "{findings}");
    }
}

#[test]
fn platform_tags_are_destinations_of_outbound_rules() {
    for tag in ["AzurePlatformDNS", "azureplatformimds", "AzurePlatformLKM"] {
        for change in [
            (FROM, format!("sourceAddressPrefix: {tag}")),
            ("destinationAddressPrefix: '*'", format!("destinationAddressPrefix: {tag}")),
            (
                "sourceAddressPrefix: '*'\n        destinationAddressPrefix: Az",
                format!("sourceAddressPrefix: {tag}\n        destinationAddressPrefix: Az"),
            ),
        ] {
            refused(
                &[(change.0, &change.1)],
                tag,
                "an AzurePlatform tag can only be the destination of an outbound rule",
                "write `direction: Outbound`",
            );
        }
    }
}

#[test]
fn own_tags_have_names_of_their_own() {
    let second = |text: &str| format!("{OFFICES}\n    - {text}");
    for name in ["Internet", "virtual_network", "AzurePlatformDNS"] {
        refused(
            &[(OFFICES, &second(&format!("{{ name: {name}, addressPrefixes: [10.9.0.0/16] }}")))],
            name,
            "is built in and cannot be redefined",
            "choose another name",
        );
    }
    let twice = second("{ name: OFFICES, addressPrefixes: [10.9.0.0/16] }");
    let findings = refused(
        &[(OFFICES, &twice)],
        "OFFICES",
        "a second service tag is named `OFFICES`",
        "rename one of them",
    );
    assert_eq!(second_places(&findings, &changed(&[(OFFICES, &twice)])), ["Offices"]);
    refused(
        &[(OFFICES, &second("{ name: A b, addressPrefixes: [10.9.0.0/16] }"))],
        "A b",
        "the name of this service tag contains ' '",
        "a name has 1 to 80 of the characters",
    );
    let folder = Folder::new("clash");
    let findings =
        folder.policy(&file(&[("offices", &["10.9.0.0/16"])]), &[]).map(|_| ()).expect_err("twice");
    let [found] = findings.entries() else { panic!("{findings}") };
    assert_eq!(found.message, "service tag `Offices` is in the tag file too");
    assert_eq!(found.secondary[0].message, "the tag file");
}

#[test]
fn own_tags_stand_for_addresses() {
    refused(
        &[(OFFICES, "- { name: Offices, addressPrefixes: [] }")],
        "addressPrefixes",
        "service tag `Offices` stands for nothing",
        "add at least one address or prefix",
    );
    refused(
        &[(OFFICES, "- { name: Offices }")],
        "Offices",
        "service tag `Offices` lacks `addressPrefixes`",
        "add",
    );
    refused(
        &[("198.51.100.0/24", "198.51.100.9/24")],
        "198.51.100.9/24",
        "has bits set behind the /24",
        "the network is 198.51.100.0/24",
    );
    refused(
        &[("198.51.100.0/24", "Internet")],
        "Internet",
        "`Internet` is not an address prefix",
        "write a prefix such as",
    );
}

#[test]
fn a_tag_file_that_is_none_is_refused_with_its_name_and_what_to_do() {
    let folder = Folder::new("broken");
    let whole = file(&[("Sql", &["13.66.60.72/32"])]);
    folder.refused(b"", "EOF", "download it again");
    folder.refused(&whole[..whole.len() / 2], "EOF", "it is not whole, or not JSON");
    folder.refused(b"<html>", "expected value at line 1 column 1", "not JSON");
    folder.refused(b"{}", "missing field `values`", "this is not Azure's format");
    folder.refused(
        b"{\"values\": [{\"name\": \"A\"}]}",
        "missing field `properties`",
        "this is not Azure's format",
    );
    folder.refused("[".repeat(1 << 20).as_bytes(), "invalid type: sequence", "not Azure's format");
    folder.refused(&b"{\"values\": \xff\xfe"[..], "at line 1", "not JSON");
    folder.refused(&vec![b' '; (64 << 20) + 1], "is larger than 64 MiB", "is this the right one?");
    folder.refused(
        &file(&[("Sql.WestUS", &["10.0.0.0/8"]), ("SQL.WestUS", &["10.0.0.0/8"])]),
        "two service tags are named `SQL.WestUS`",
        "download it again",
    );
    std::fs::remove_file(folder.0.join("tags.json")).unwrap();
    let missing = policy::load(&folder.0.join("policy.yaml")).map(|_| ()).expect_err("no file").to_string();
    assert!(
        missing.contains("cannot read the tag file") && missing.contains("relative to the policy file"),
        "{missing}"
    );
    refused(
        &[(TAGS, "serviceTags:\n  file: /dev/zero\n  tags:\n")],
        "/dev/zero",
        "the tag file /dev/zero is not a regular file",
        "name the JSON file itself",
    );
    refused(
        &[(TAGS, "serviceTags:\n  file: /tmp\n  tags:\n")],
        "/tmp",
        "is not a regular file",
        "name the JSON",
    );
}

#[test]
fn what_cannot_be_used_of_a_tag_file_is_left_out_with_a_warning_that_names_the_tag() {
    let folder = Folder::new("junk");
    let tags = file(&[
        ("Good", &["10.0.0.0/8", "2001:db8::7"]),
        ("Bits", &["10.0.0.1/8", "10.1.0.0/16", "\u{1b}[31m"]),
        ("Internet", &["0.0.0.0/0"]),
        ("no name", &["10.0.0.0/8"]),
    ]);
    let loaded = folder.policy(&tags, &[]).unwrap_or_else(|findings| panic!("{findings}"));
    let sizes: Vec<_> =
        loaded.network.tags.iter().map(|tag| (tag.name.as_str(), tag.prefixes.len())).collect();
    assert_eq!(sizes, [("Good", 2), ("Bits", 1), ("Offices", 2)]);
    let rendered = loaded.warnings.to_string();
    for said in [
        "service tag `Bits` has 2 prefixes that cannot be used, such as `10.0.0.1/8`",
        "service tag `Internet` is built in: the file's is not used",
        "service tag `no name` is not used",
    ] {
        assert!(rendered.contains(said), "{said:?} in\n{rendered}");
    }
    assert!(!rendered.contains('\u{1b}'));

    let many: Vec<(String, Vec<&str>)> = (0..500).map(|n| (format!("T{n}"), vec!["junk"])).collect();
    let many: Vec<(&str, &[&str])> =
        many.iter().map(|(name, list)| (name.as_str(), list.as_slice())).collect();
    let loaded = folder.policy(&file(&many), &[]).unwrap_or_else(|findings| panic!("{findings}"));
    let warnings = loaded.warnings.entries();
    assert_eq!(warnings.len(), 21);
    assert!(warnings.iter().all(|found| found.severity == Severity::Warning));
    assert!(warnings[20].message.contains("480 more service tags"));
}
