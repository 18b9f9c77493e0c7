//! What a tag stands for is worked out twice: for the tables and for the answers. Both must say the same.

use std::path::Path;

use portcullis::answers::expand::{BUILT_IN, tag_prefixes};
use portcullis::compile;
use portcullis::policy;
use portcullis::policy::network::ServiceTag;

fn both_agree(text: &str) -> usize {
    let loaded = policy::parse("tags.yaml", text).unwrap_or_else(|errors| panic!("{errors}"));
    let network = &loaded.network;
    let named = (0..network.tags.len()).map(ServiceTag::Named);
    let mut compared = 0;
    for tag in BUILT_IN.into_iter().chain(named) {
        for (number, subnet) in network.subnets.iter().enumerate() {
            let mut answered = tag_prefixes(network, number, tag);
            let mut compiled = compile::tag_prefixes(network, number, tag);
            answered.sort_unstable();
            compiled.sort_unstable();
            assert_eq!(answered, compiled, "{tag:?} in {}", subnet.name);
            compared += 1;
        }
    }
    compared
}

#[test]
fn the_tables_and_the_answers_mean_the_same_by_every_tag_in_every_subnet() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests/policies");
    let groups = std::fs::read_to_string(tests.join("groups.yaml")).unwrap();
    let groups = groups.replace("@ON_RULE_CHANGE@", "keep").replace("@RULE@", "Allow");
    let widened = groups.replace("- name: forced\n", "- name: forced\n    widenVirtualNetwork: true\n");
    assert_ne!(groups, widened);
    let families = std::fs::read_to_string(tests.join("both-families.yaml")).unwrap();
    assert_eq!(both_agree(&groups), 7 * 5);
    assert_eq!(both_agree(&widened), 7 * 5);
    assert_eq!(both_agree(&families), 6 * 2);
}

#[test]
fn the_tables_and_the_answers_mean_the_same_by_every_tag_of_the_public_file() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/data/servicetags/ServiceTags_Public_20251013.json"
    );
    if !Path::new(file).exists() {
        println!("skipped: no {file}");
        return;
    }
    let text = format!(
        "serviceTags: {{ file: '{file}' }}
virtualNetworks: [{{ name: v, addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}, subnets: [{{ name: a, addressPrefix: 10.0.1.0/24 }}] }}]
networkInterfaces: [{{ name: vm, device: vm, ipConfigurations: [{{ subnet: a, privateIPAddress: 10.0.1.4 }}] }}]
"
    );
    assert_eq!(both_agree(&text), 6 + 3039);
}
