//! ClassBench filter sets as one group in one direction, against a plain linear search: the rule itself must be the same.
//! How filters become rules stands in `tests/src/classbench.rs`.

#[path = "../../tests/src/classbench.rs"]
#[allow(dead_code, reason = "the tests against the kernel use the rest")]
mod classbench;
mod compile_support;

use std::collections::HashSet;
use std::time::Instant;

use classbench::{Filter, Header, MOST};
use compile_support::*;
use portcullis::compile::lookup::{PacketKey, classify, rule};
use portcullis::compile::{Compiled, Ownership, Registry, compile};
use portcullis::policy::network::{AddressMatch, Direction};

/// A file of the folder, where it is at hand.
fn file(name: &str) -> Option<String> {
    let path = format!("{}/../../shared/data/classbench/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("skipped: no {path}");
    }
    text
}

fn compiled(name: &str, filters: &[Filter]) -> Compiled {
    let mut network = network(1);
    network.groups = vec![group("classbench", classbench::rules(filters, Direction::Inbound))];
    network.interfaces[0].group = Some(0);
    let facts = facts(&network);
    let (mut registry, ownership) = (Registry::default(), Ownership::default());
    let start = Instant::now();
    let compiled = compile(&network, &facts, &mut registry, &ownership, 1).unwrap();
    println!(
        "{name}: {} of {} filters compiled in {:.2?}; image {} KiB, {} prefixes, all in all {} KiB",
        filters.len().min(MOST),
        filters.len(),
        start.elapsed(),
        compiled.pages.len() / 2,
        compiled.prefixes.len(),
        compiled.memory_bytes / 1024,
    );
    compiled
}

/// Classifies the headers both ways; answers how many a filter matched, and how many filters matched any.
fn agree(compiled: &Compiled, filters: &[Filter], headers: &[Header]) -> (usize, usize) {
    // In the order the rulesets were asked for: the interface's outbound one first.
    let inbound =
        compiled.rulesets.iter().position(|r| r.direction == Direction::Inbound).unwrap() as u32 + 1;
    let mut matched = 0;
    let mut met = HashSet::new();
    for header in headers {
        let (source, destination) = classbench::addresses(header);
        let key = PacketKey {
            source,
            destination,
            source_port: header.source_port,
            destination_port: header.destination_port,
            protocol: header.protocol,
        };
        let found = classify(compiled, inbound, &key).unwrap();
        let (id, allow) = rule(compiled, inbound, found);
        let name = &compiled.rules.iter().find(|r| r.id == id).unwrap().name;
        match classbench::first_match(filters, header) {
            Some(filter) => {
                assert_eq!(*name, format!("securityRules/f{filter}"), "{header:?}");
                assert_eq!((found, allow), (filter, classbench::allows(filter)));
                matched += 1;
                met.insert(filter);
            }
            None => assert!(name.starts_with("defaultSecurityRules/"), "{header:?} met {name}"),
        }
    }
    (matched, met.len())
}

#[test]
fn every_filter_set_agrees_with_a_linear_search_on_a_hundred_thousand_headers_from_its_corners() {
    for name in ["acl1_1k", "fw1_1k", "ipc1_1k", "acl1_1k_jiachang", "acl1_10k", "fw1_10k"] {
        let Some(text) = file(name) else { return };
        let filters = classbench::filters(&text).unwrap();
        let compiled = compiled(name, &filters);
        let mut random = Random::new(2026);
        let headers = classbench::corner_headers(&filters, 100_000, |n| random.below(n));
        let (matched, met) = agree(&compiled, &filters, &headers);
        println!("{name}: {} headers, {matched} met one of {met} filters, no mismatch", headers.len());
        assert!(matched > 40_000, "many headers should meet a filter");
    }
}

#[test]
fn the_supplied_trace_agrees_with_a_linear_search() {
    let (Some(set), Some(trace)) = (file("acl1_1k_jiachang"), file("acl1_1k_jiachang_trace")) else { return };
    let (filters, headers) = (classbench::filters(&set).unwrap(), classbench::trace(&trace).unwrap());
    let (matched, met) = agree(&compiled("acl1_1k_jiachang", &filters), &filters, &headers);
    println!("trace: {} headers, {matched} met one of {met} filters, no mismatch", headers.len());
    assert_eq!(headers.len(), 11_069);
}

#[test]
fn what_is_no_filter_or_header_is_refused_with_its_line() {
    let wrong = "@1.2.3.4/32\t5.6.7.8/32\t0 : 65535\t80 : 80\t0x06/0xFF\t0x0000/0x0000\n@1.2.3.4/33 x\n";
    assert!(classbench::filters(wrong).unwrap_err().to_string().starts_with("line 2"));
    assert!(classbench::trace("1 2 70000 4 6 0 0").unwrap_err().to_string().starts_with("line 1"));
    let gre = "@0.0.0.0/0\t5.6.7.0/24\t0 : 65535\t80 : 80\t0x2f/0xFF\t0x0000/0x0000";
    let filters = classbench::filters(gre).unwrap();
    assert_eq!(filters[0].protocol, None, "GRE cannot be said");
    let rules = classbench::rules(&filters, Direction::Inbound);
    assert_eq!(
        (rules[0].priority, &rules[0].source),
        (100, &vec![AddressMatch::Prefix("0.0.0.0/0".parse().unwrap())])
    );
}
