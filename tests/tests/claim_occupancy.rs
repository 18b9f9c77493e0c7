//! Claims out of a block of 1,024 ports towards one destination, by how much of it is taken: each succeeds, down to the
//! last port, and what it costs is printed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend};
use portcullis_tests::claiming::{FRONTEND, MEMBER, PORTS, craft, inside_key, policy, source_port};
use portcullis_tests::occupancy::{Filled, STAYS, fill, fill_in_kernel};
use portcullis_tests::release::{give_back, release};

/// Taken: 0, 50, 90 and 99 per cent, and all but one.
const OCCUPANCIES: [u16; 5] = [0, 512, 921, 1013, 1023];
const CLAIMS: u16 = 1000;

/// Median, mean and longest, in nanoseconds.
fn told(mut spans: Vec<Duration>) -> String {
    spans.sort_unstable();
    let mean = spans.iter().sum::<Duration>() / spans.len() as u32;
    let ns = |span: Duration| span.as_nanos();
    format!(
        "median {:>6} ns, mean {:>6} ns, longest {:>7} ns",
        ns(spans[spans.len() / 2]),
        ns(mean),
        ns(spans[spans.len() - 1])
    )
}

fn tell(name: &str, filled: Filled) {
    for (occupancy, spans) in filled.claims {
        println!("{name}: claim with {occupancy:>4} of {PORTS} taken: {}", told(spans));
    }
    println!("{name}: refused, all {PORTS} tried: {} ns", filled.refused.as_nanos());
    println!("{name}: refused again:                    {}", told(filled.refused_again));
    println!("{name}: packet of a live flow:            {}", told(filled.live));
}

#[test]
fn at_every_occupancy_of_a_block_a_claim_succeeds_down_to_the_last_port_on_the_host() {
    let backend = HostBackend::new(&policy(0)).unwrap();
    let (env, gateway) = (&backend.env, backend.gateway());
    let vm1 = gateway.compiled.devices.iter().find(|device| device.kind == 1).unwrap();
    let send = |frame: &[u8]| {
        let began = Instant::now();
        let (verdict, out, _) = env.packet(frame, vm1.ifindex, Hook::Tc, false);
        let span = began.elapsed();
        (matches!(verdict, Verdict::Redirect(_)).then(|| source_port(&out)), span)
    };
    let filled = fill(gateway, &OCCUPANCIES, CLAIMS, send, |source| {
        let key = inside_key(source, vm1.network);
        let (index, _) = flow::find::<V4, _>(env, &env.control, &key, env.now()).expect("it was claimed");
        release(|i| flow::record::<V4, _>(env, i).unwrap(), index, |r| give_back(env, r));
    });
    tell("host engine", filled.unwrap());
}

#[test]
fn at_every_occupancy_of_a_block_a_claim_succeeds_down_to_the_last_port_in_the_kernel() {
    for (name, hook) in [("XDP", Hook::Xdp), ("TC", Hook::Tc)] {
        tell(name, fill_in_kernel(hook, &OCCUPANCIES, CLAIMS).unwrap());
    }
}

/// Every one of 1,024 inside sockets, or echo identifiers, gets a port, the last as the first; one more does not.
fn fill_by_socket(backend: &mut dyn Backend) {
    let name = backend.name();
    let craft = craft();
    let udp = |socket| craft.udp(socket, 53, b"");
    let echo = |socket| craft.echo_request(socket, 1, b"");
    // Where the port, or the identifier, stands in the frame.
    for (what, at, frame) in [("UDP", 34, &udp as &dyn Fn(u16) -> Vec<u8>), ("echo", 38, &echo)] {
        let mut taken = BTreeSet::new();
        for socket in 0..PORTS {
            let out = backend.run(At::Ingress("vm1"), &frame(STAYS + socket)).unwrap();
            assert_eq!(out.action, Action::Send, "{name}, {what}: refused with {socket} of {PORTS} taken");
            let port = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
            assert!(taken.insert(port), "{name}, {what}: {port} twice");
            assert!(backend.gateway().owns(MEMBER, FRONTEND, port));
        }
        let out = backend.run(At::Ingress("vm1"), &frame(STAYS + PORTS)).unwrap();
        assert_eq!(out.action, Action::Drop, "{name}, {what}: all are taken");
    }
}

#[test]
fn every_socket_and_every_echo_identifier_gets_a_port_of_its_own_down_to_the_last() {
    fill_by_socket(&mut HostBackend::new(&policy(0)).unwrap());
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(&policy(0), &["vm1", "uplink"], hook, |backend| {
            fill_by_socket(backend);
            Ok(())
        })
        .unwrap();
    }
}
