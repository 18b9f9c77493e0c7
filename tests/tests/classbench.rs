//! ClassBench filter sets as one group, in the kernel: they load, the programs verify, and every header meets the filter
//! that a linear search finds. `controller/tests/compile_classbench.rs` does the same with more headers on the tables.
//!
//! Headers come from the host, whose packets may have any source; their destinations are guests. As many as there is
//! room for in the next-hop table are made, for the destinations that most headers have.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use portcullis::policy;
use portcullis::policy::network::{Direction, Network, SecurityGroup};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::KernelBackend;
use portcullis_tests::classbench::{self, Filter, Header};
use portcullis_tests::lab::{Craft, TcpFlags};
use portcullis_tests::random::Random;

const GUESTS: usize = 3000;

const BASE: &str = "
virtualNetworks: [{ name: lab, addressSpace: { addressPrefixes: [10.0.0.0/8] }, subnets: [{ name: a, addressPrefix: 10.0.0.0/16 }] }]
networkInterfaces: [{ name: vm, device: vm, macAddress: 02:00:00:00:00:01, ipConfigurations: [{ subnet: a, privateIPAddress: 10.0.1.4 }] }]
uplinks: [{ device: up }]
";

fn file(name: &str) -> Option<String> {
    let path = format!("{}/../../shared/data/classbench/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("skipped: no {path}");
    }
    text
}

/// The filters as the inbound group of one interface that has all these addresses.
fn network(filters: &[Filter], addresses: &[Ipv4Addr]) -> Network {
    let mut network = policy::parse("base.yaml", BASE).expect("a literal").network;
    let rules = classbench::rules(filters, Direction::Inbound);
    network.groups.push(SecurityGroup { name: "classbench".into(), rules });
    // Any source may come from the host then; inside a virtual network only its own addresses.
    network.virtual_networks[0].address_space.clear();
    let interface = &mut network.interfaces[0];
    interface.group = Some(0);
    let template = interface.addresses[0].clone();
    interface.addresses = addresses
        .iter()
        .map(|&address| {
            let mut configuration = template.clone();
            configuration.name = address.to_string();
            configuration.address = IpAddr::V4(address);
            configuration
        })
        .collect();
    network
}

/// The headers whose destinations are among the most frequent ones, and those destinations.
fn reachable(headers: Vec<Header>) -> (Vec<Header>, Vec<Ipv4Addr>) {
    let mut counts: HashMap<Ipv4Addr, usize> = HashMap::new();
    for header in &headers {
        *counts.entry(header.destination).or_default() += 1;
    }
    let mut addresses: Vec<(usize, Ipv4Addr)> = counts.into_iter().map(|(a, n)| (n, a)).collect();
    addresses.sort_unstable_by(|a, b| b.cmp(a));
    let addresses: Vec<Ipv4Addr> = addresses.into_iter().take(GUESTS).map(|(_, a)| a).collect();
    let known: std::collections::HashSet<_> = addresses.iter().copied().collect();
    (headers.into_iter().filter(|h| known.contains(&h.destination)).collect(), addresses)
}

fn frame(header: &Header) -> Vec<u8> {
    let craft = Craft::new([2, 0, 0, 0, 0xaa, 0], header.source, [2, 0, 0, 0, 0, 1], header.destination);
    let (sport, dport) = (header.source_port, header.destination_port);
    match header.protocol {
        6 => craft.tcp(sport, dport, TcpFlags::SYN, 1, 0, b""),
        17 => craft.udp(sport, dport, b""),
        1 => craft.echo_request(7, 1, b""),
        // The engine does not check the header's checksum: the kernel has.
        number => {
            let mut frame = craft.udp(0, 0, b"12345678");
            frame[23] = number;
            frame
        }
    }
}

/// Runs the headers through the kernel; answers how many met a filter.
fn agree(
    backend: &mut KernelBackend,
    filters: &[Filter],
    headers: Vec<Header>,
) -> anyhow::Result<(usize, usize)> {
    let (headers, addresses) = reachable(headers);
    backend.gateway.compile_next(&network(filters, &addresses))?;
    let image = backend.gateway.image();
    backend.datapath.install(&image)?;
    let names: HashMap<u32, &str> =
        backend.gateway.compiled.rules.iter().map(|rule| (rule.id, rule.name.as_str())).collect();
    let (dry, ifindex) = (backend.datapath.dry_run()?, backend.ifindex("vm")?);
    let mut matched = 0;
    for header in &headers {
        let answer = dry.from_host(&frame(header), ifindex)?;
        let name = names.get(&answer.context.rule).copied().unwrap_or("no rule");
        match classbench::first_match(filters, header) {
            Some(filter) => {
                assert_eq!(name, format!("securityRules/f{filter}"), "{header:?}: {:?}", answer.reason);
                let allowed = answer.outcome.verdict == u32::MAX;
                assert_eq!(allowed, classbench::allows(filter), "{header:?}");
                matched += 1;
            }
            None => assert!(
                name.starts_with("defaultSecurityRules/"),
                "{header:?} met {name}: {:?}",
                answer.reason
            ),
        }
    }
    Ok((headers.len(), matched))
}

#[test]
fn every_filter_set_agrees_with_a_linear_search_in_the_kernel() {
    KernelBackend::with(BASE, &["vm", "up"], Hook::Tc, |backend| {
        for name in ["acl1_1k", "fw1_1k", "ipc1_1k", "acl1_1k_jiachang", "acl1_10k", "fw1_10k"] {
            let Some(text) = file(name) else { return Ok(()) };
            let mut filters = classbench::filters(&text)?;
            filters.truncate(classbench::MOST);
            let mut random = Random(2026);
            let headers = classbench::corner_headers(&filters, 20_000, |n| random.below(n));
            let (asked, matched) = agree(backend, &filters, headers)?;
            println!(
                "{name}: {} filters, {asked} headers, {matched} met a filter, no mismatch",
                filters.len()
            );
            assert!(asked > 2000 && matched > asked / 4, "{name}: {asked} headers, {matched} met a filter");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_supplied_trace_agrees_with_a_linear_search_in_the_kernel() {
    let (Some(text), Some(trace)) = (file("acl1_1k_jiachang"), file("acl1_1k_jiachang_trace")) else {
        return;
    };
    KernelBackend::with(BASE, &["vm", "up"], Hook::Tc, |backend| {
        let filters = classbench::filters(&text)?;
        let headers = classbench::trace(&trace)?;
        let all = headers.len();
        let (asked, matched) = agree(backend, &filters, headers)?;
        println!("{asked} of {all} headers of the trace, {matched} met a filter, no mismatch");
        assert!(asked > all / 2 && matched > asked / 2);
        Ok(())
    })
    .unwrap();
}
