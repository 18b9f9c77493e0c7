//! A guest with more ports than one packet tries: its retransmission goes on where the packet before it stopped
//! (`dataplane-common/src/snat.rs`), and a flow is refused for good only if the last port has been tried.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use portcullis_common::Reason;
use portcullis_common::clock::TICK_SHIFT;
use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow;
use portcullis_common::snat::{ATTEMPTS, tried_bucket};
use portcullis_tests::backend::{Backend, HostBackend, KernelBackend};
use portcullis_tests::claiming::{FRONTEND, MEMBER, inside_key, policy, source_port, syn};
use portcullis_tests::release::{give_back, release};

/// Twice as many as one packet tries.
const PORTS: u16 = 2 * ATTEMPTS as u16;
/// Source ports of what stays, and of what is claimed and given back.
const STAYS: u16 = 2000;
const GOES: u16 = 30_000;
/// Claims of the last port: half of them are not done with their first packet.
const TRIALS: u16 = 24;
const TICK: Duration = Duration::from_nanos(1 << TICK_SHIFT);
/// Ticks after which a guest whose every port was tried may try again, and less than for which it is remembered where a search
/// stopped.
const REFUSED: u32 = 5;
/// Ticks after which that is forgotten, too.
const FORGOTTEN: u32 = 77;

/// One engine.
struct Engine<'a> {
    name: &'a str,
    /// Runs a frame of the guest's; under which port it left.
    send: &'a dyn Fn(&[u8]) -> Option<u16>,
    /// Lets ticks pass.
    wait: &'a dyn Fn(u32),
    /// Frees the flow with this source port.
    give_back: &'a dyn Fn(u16),
    counters: &'a dyn Fn() -> BTreeMap<Reason, u64>,
    /// Claims in all, and those that were not done with the first candidates that one packet tries.
    tried: &'a dyn Fn() -> [u64; 2],
    owns: &'a dyn Fn(u16) -> bool,
}

/// The port a flow gets, and how often its SYN has to be sent again for it.
fn claim(engine: &Engine<'_>, source: u16) -> (u16, u64) {
    for again in 0..=1 {
        if let Some(port) = (engine.send)(&syn(source)) {
            assert!((engine.owns)(port), "{}: {port}", engine.name);
            return (port, again);
        }
        (engine.wait)(REFUSED);
    }
    panic!("{}: {source} is refused although a port is free, and both halves were tried", engine.name)
}

fn fill(engine: &Engine<'_>) {
    let name = engine.name;
    let (mut ports, mut again) = (Vec::new(), 0);
    for flow in 0..PORTS {
        let (port, retransmissions) = claim(engine, STAYS + flow);
        ports.push(port);
        again += retransmissions;
    }
    assert_eq!(BTreeSet::from_iter(&ports).len(), usize::from(PORTS), "{name}: each has its own");
    let mut last = (STAYS + PORTS - 1, ports[usize::from(PORTS) - 1]);
    for trial in 0..TRIALS {
        (engine.give_back)(last.0);
        let (port, retransmissions) = claim(engine, GOES + trial);
        assert_eq!(port, last.1, "{name}: the only one that is free");
        last.0 = GOES + trial;
        again += retransmissions;
    }
    println!("{name}: {again} of {} SYNs had to be sent again", PORTS + TRIALS);
    assert!(again > 0, "{name}: no search was ever taken up again");
    let claims = u64::from(PORTS + TRIALS);
    let mut counters = BTreeMap::from([(Reason::NewFlow, claims), (Reason::SnatSearching, again)]);
    assert_eq!((engine.counters)(), counters, "{name}: every packet is a claim or sent again");
    let [all, beyond] = (engine.tried)();
    assert_eq!(all, claims, "{name}");
    assert!(
        beyond > 0 && beyond < claims,
        "{name}: {beyond} claims were beyond the first {ATTEMPTS} candidates"
    );

    // One too many: the first packet tries one half, the second the other; then all have been tried.
    (engine.wait)(FORGOTTEN);
    for _ in 0..2 {
        assert_eq!((engine.send)(&syn(GOES + TRIALS)), None, "{name}: all are taken");
    }
    *counters.get_mut(&Reason::SnatSearching).unwrap() += 1;
    counters.insert(Reason::SnatExhausted, 1);
    assert_eq!((engine.counters)(), counters, "{name}");
    for (flow, port) in (0..PORTS - 1).zip(&ports) {
        assert_eq!((engine.send)(&syn(STAYS + flow)), Some(*port), "{name}: a live flow keeps its port");
    }
}

#[test]
fn a_guest_of_2048_ports_gets_every_one_of_them_towards_one_destination_and_no_more_on_the_host() {
    let backend = HostBackend::new(&policy(PORTS)).unwrap();
    let (env, gateway) = (&backend.env, backend.gateway());
    let vm1 = gateway.compiled.devices.iter().find(|device| device.kind == 1).unwrap();
    let tried = || {
        let tried = env.tried.lock().unwrap();
        [tried.len(), tried.iter().filter(|n| **n > ATTEMPTS).count()].map(|count| count as u64)
    };
    let give_back = |source| {
        let key = inside_key(source, vm1.network);
        let (index, _) = flow::find::<V4, _>(env, &env.control, &key, env.now()).expect("it was claimed");
        release(|i| flow::record::<V4, _>(env, i).unwrap(), index, |r| give_back(env, r));
    };
    fill(&Engine {
        name: backend.name(),
        send: &|frame| {
            let (verdict, out, _) = env.packet(frame, vm1.ifindex, Hook::Tc, false);
            matches!(verdict, Verdict::Redirect(_)).then(|| source_port(&out))
        },
        wait: &|ticks| env.set_now(env.now() + ticks),
        give_back: &give_back,
        counters: &|| backend.counters().unwrap(),
        tried: &tried,
        owns: &|port| gateway.owns(MEMBER, FRONTEND, port),
    });
}

#[test]
fn a_guest_of_2048_ports_gets_every_one_of_them_towards_one_destination_and_no_more_in_the_kernel() {
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(&policy(PORTS), &["vm1", "uplink"], hook, |backend| {
            let backend = &*backend;
            let table = backend.datapath.flow_table()?;
            let network = backend.gateway.compiled.devices.iter().find(|d| d.kind == 1).unwrap().network;
            let (ifindex, datapath) = (backend.ifindex("vm1")?, &backend.datapath);
            let tried = || {
                let buckets = datapath.tried().unwrap();
                [buckets.iter().sum(), buckets[tried_bucket(ATTEMPTS + 1) as usize]]
            };
            let give_back = |source: u16| {
                let mut records = table.iter();
                let forward =
                    records.find(|(_, r)| r.key.network == network && r.key.source_port == source.to_be());
                release(
                    |i| table.slot(i),
                    forward.expect("it was claimed").0,
                    |r| table.guests().recycled(r),
                );
            };
            fill(&Engine {
                name: backend.name(),
                send: &|frame| {
                    let (out, sent) = match hook {
                        Hook::Xdp => (datapath.run_xdp(frame, ifindex).unwrap(), 4),
                        Hook::Tc => (datapath.run_tc(frame, ifindex).unwrap(), 7),
                    };
                    (out.verdict == sent).then(|| source_port(&out.packet))
                },
                wait: &|ticks| std::thread::sleep(TICK * ticks),
                give_back: &give_back,
                counters: &|| backend.counters().unwrap(),
                tried: &tried,
                owns: &|port| backend.gateway().owns(MEMBER, FRONTEND, port),
            });
            Ok(())
        })
        .unwrap();
    }
}
