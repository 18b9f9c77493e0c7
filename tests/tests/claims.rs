//! Claims of public ports under contention: no port owned twice, none lost. Every success is checked against a ledger.

use portcullis_common::Reason;
use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow::{self, FREE};
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend};
use portcullis_tests::claiming::{
    FRONTEND, Holders, MEMBER, PORTS, inside_key, pin_to, policy, source_port, syn,
};
use portcullis_tests::release::{give_back, release};

/// Two threads, one block of 1,024 ports, one destination, almost all of it in use all the time.
#[test]
fn a_million_claims_and_releases_by_two_threads_on_one_block_never_share_a_port() {
    let backend = HostBackend::new(&policy(0)).unwrap();
    let env = &backend.env;
    let gateway = backend.gateway();
    let network = gateway.compiled.devices.iter().find(|d| d.kind == 1).unwrap().network;
    let ifindex = gateway.devices["vm1"].ifindex;
    let ledger = Holders::default();
    std::thread::scope(|scope| {
        for thread in 0..2u16 {
            let ledger = &ledger;
            // Time stands still: a thread that the machine stops for a while must not find its flows expired.
            scope.spawn(move || {
                // Each thread its own source ports, so that what they fight for is the block.
                let base = 2000 + thread * 30000;
                let mut held = std::collections::VecDeque::new();
                let mut next = 0u16;
                for round in 0..1_000_000u32 / 2 {
                    let source = base + next % 30000;
                    next = next.wrapping_add(1);
                    let frame = syn(source);
                    let (verdict, out, _) = env.packet(&frame, ifindex, Hook::Tc, false);
                    if matches!(verdict, Verdict::Redirect(_)) {
                        let port = source_port(&out);
                        assert!(gateway.owns(MEMBER, FRONTEND, port));
                        ledger.claimed(port);
                        held.push_back((source, port));
                    } else {
                        ledger.refused();
                    }
                    while held.len() > 511 || (held.len() > 480 && round % 3 == 0) {
                        let (source, port) = held.pop_front().unwrap();
                        let key = inside_key(source, network);
                        let (index, _) = flow::find::<V4, _>(env, &env.control, &key, env.now())
                            .expect("a held flow is there");
                        ledger.releasing(port);
                        release(|i| flow::record::<V4, _>(env, i).unwrap(), index, |r| give_back(env, r));
                    }
                }
                for (source, port) in held {
                    let key = inside_key(source, network);
                    let (index, _) = flow::find::<V4, _>(env, &env.control, &key, env.now())
                        .expect("a held flow is there");
                    ledger.releasing(port);
                    release(|i| flow::record::<V4, _>(env, i).unwrap(), index, |r| give_back(env, r));
                }
            });
        }
    });
    let [claims, refusals, releases] = ledger.counts();
    println!("{claims} claims, {refusals} refusals");
    assert!(claims > 900_000, "{claims} of 1,000,000 claims succeeded");
    assert_eq!(claims, releases);
    // None lost: every slot is free again, and the whole block can be claimed once more.
    let live = (0..=env.control.bucket_mask).flat_map(|b| (0..8).map(move |s| b << 3 | s));
    // SAFETY: the records stand in a live table.
    let left = live
        .filter(|i| unsafe { flow::ctl(flow::record::<V4, _>(env, *i).unwrap()).phase() } != FREE)
        .count();
    assert_eq!(left, 0, "slots neither free nor released");
    env.set_now(env.now() + 1000);
    let again = (0..1100u16)
        .filter(|p| matches!(env.packet(&syn(1000 + p), ifindex, Hook::Tc, false).0, Verdict::Redirect(_)));
    assert_eq!(again.count(), usize::from(PORTS));
}

/// Attempts of each CPU.
const ATTEMPTS: u32 = 5_000_000;
/// Of the flow table; the block takes a quarter of it, and it is searched for every few hundred releases.
const BUCKETS: u32 = 1 << 10;

/// The same in the kernel: both CPUs run the XDP and the TC programs on one block and one destination.
#[test]
fn ten_million_claims_and_releases_from_both_cpus_in_the_kernel_never_share_a_port_and_leak_none() {
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with_table(&policy(0), &["vm1", "uplink"], hook, BUCKETS, |backend| {
            hammer(backend);
            Ok(())
        })
        .unwrap();
    }
}

fn hammer(backend: &mut KernelBackend) {
    let ledger = Holders::default();
    let name = backend.name();
    let table = backend.datapath.flow_table().unwrap();
    let ifindex = backend.ifindex("vm1").unwrap();
    let network = backend.gateway().compiled.devices.iter().find(|d| d.kind == 1).unwrap().network;
    let (datapath, hook, began) = (&backend.datapath, backend.hook(), std::time::Instant::now());
    std::thread::scope(|scope| {
        for cpu in 0..2u16 {
            let (ledger, table) = (&ledger, &table);
            scope.spawn(move || {
                pin_to(cpu);
                let base = 2000 + cpu * 30000;
                let mut held = std::collections::VecDeque::new();
                let mut index_of = std::collections::HashMap::new();
                for round in 0..ATTEMPTS {
                    let source = base + (round % 30000) as u16;
                    let frame = syn(source);
                    let out = match hook {
                        Hook::Xdp => datapath.run_xdp(&frame, ifindex),
                        Hook::Tc => datapath.run_tc(&frame, ifindex),
                    }
                    .unwrap();
                    let sent = if hook == Hook::Xdp { 4 } else { 7 };
                    if out.verdict == sent {
                        let port = source_port(&out.packet);
                        ledger.claimed(port);
                        held.push_back((source, port));
                    } else {
                        ledger.refused();
                    }
                    // Both together then hold all but two.
                    if held.len() > 510 {
                        // One pass over the table finds the slots of all that go.
                        index_of.clear();
                        for (index, record) in table.iter() {
                            if record.key.network == network {
                                index_of.insert(u16::from_be(record.key.source_port), index);
                            }
                        }
                        while held.len() > 100 {
                            let (source, port) = held.pop_front().unwrap();
                            let index = index_of[&source];
                            ledger.releasing(port);
                            release(|i| table.slot(i), index, |r| table.guests().recycled(r));
                        }
                    }
                }
                for (index, record) in table.iter() {
                    if record.key.network == network {
                        index_of.insert(u16::from_be(record.key.source_port), index);
                    }
                }
                for (source, port) in held {
                    ledger.releasing(port);
                    release(|i| table.slot(i), index_of[&source], |r| table.guests().recycled(r));
                }
            });
        }
    });
    let [claims, refusals, releases] = ledger.counts();
    println!("{name}: {claims} claims, {refusals} refusals in {:?}", began.elapsed());
    assert_eq!(claims + refusals, 2 * u64::from(ATTEMPTS));
    assert!(claims > 9_900_000, "{name}: {claims} of 10,000,000 claims succeeded");
    assert_eq!(claims, releases, "{name}");
    assert!(ledger.none(), "{name}: held by nobody");
    let counters = backend.counters().unwrap();
    assert_eq!(counters[&Reason::NewFlow], claims, "{name}: the datapath counts the same: {counters:?}");
    assert_eq!(counters.values().sum::<u64>(), claims + refusals, "{name}: {counters:?}");
    assert_eq!(table.iter().count(), 0, "{name}: records left");
    let again = (0..1100u16).filter(|p| {
        let outcome = backend.run(At::Ingress("vm1"), &syn(1000 + p)).unwrap();
        outcome.action == Action::Send
    });
    assert_eq!(again.count(), usize::from(PORTS), "{name}: the whole block is there, no port has leaked");
}
