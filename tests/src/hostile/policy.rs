//! The policy file.

use std::collections::BTreeSet;

use portcullis::answers::lint::Surroundings;
use portcullis::compile::{self, DeviceFacts, HostFacts, Ownership, Registry};
use portcullis::{answers, policy as policies};

/// Reads the bytes as a policy: in order or with findings, never with a panic. What is in order is compiled and linted.
///
/// # Panics
/// If a finding cannot be shown, or a policy in order has none of what it must have.
pub fn policy(bytes: &[u8]) {
    // `policy::load` refuses what is no UTF-8 before anything else.
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let loaded = match policies::parse("fuzz.yaml", text) {
        Ok(loaded) => loaded,
        Err(findings) => {
            assert!(!findings.to_string().is_empty(), "refused without a word");
            return;
        }
    };
    let _ = loaded.warnings.to_string();
    let network = &loaded.network;
    assert!(!network.interfaces.is_empty(), "a policy needs an interface");
    let mut facts = HostFacts::default();
    let names = network.interfaces.iter().map(|i| &i.device).chain(network.uplinks.iter().map(|u| &u.device));
    for (number, name) in names.collect::<BTreeSet<_>>().into_iter().enumerate() {
        let mac = [0x02, 0, 0, 0, 0xaa, number as u8];
        let facts_of = DeviceFacts { ifindex: 10 + number as u32, mac, gateway_mac: mac };
        facts.devices.insert(name.clone(), facts_of);
    }
    let _ = compile::compile(network, &facts, &mut Registry::default(), &Ownership::default(), 1);
    let _ = answers::lint(network, &loaded.places, Surroundings { host_addresses: None });
}
