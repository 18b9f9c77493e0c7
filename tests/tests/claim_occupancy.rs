//! Claims out of a block of 1,024 ports towards one destination, by how much of it is taken: each succeeds, down to the
//! last port, and what it costs is printed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow;
use portcullis_tests::backend::{Action, At, Backend, Gateway, HostBackend, KernelBackend};
use portcullis_tests::claiming::{FRONTEND, MEMBER, PORTS, craft, inside_key, policy, source_port, syn};
use portcullis_tests::release::release;

/// Taken: 0, 50, 90 and 99 per cent, and all but one.
const OCCUPANCIES: [u16; 5] = [0, 512, 921, 1013, 1023];
const CLAIMS: u16 = 1000;
/// Source ports of what stays, and of what is claimed and given back.
const STAYS: u16 = 2000;
const GOES: u16 = 30_000;
/// Of the flow table: the block takes a quarter of it.
const BUCKETS: u32 = 1 << 10;

/// Median and longest, in nanoseconds.
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

/// `send` runs a frame of the guest's and says under which port it left and how long it took; `give_back` frees the
/// flow with this source port.
fn fill(
    name: &str,
    gateway: &Gateway,
    mut send: impl FnMut(&[u8]) -> (Option<u16>, Duration),
    mut give_back: impl FnMut(u16),
) {
    let mut taken = BTreeSet::new();
    for occupancy in OCCUPANCIES {
        for flow in taken.len() as u16..occupancy {
            let port = send(&syn(STAYS + flow)).0.unwrap_or_else(|| panic!("{name}: {flow} are taken"));
            assert!(taken.insert(port), "{name}: {port} twice");
        }
        let spans = (GOES..GOES + CLAIMS).map(|source| {
            let (port, span) = send(&syn(source));
            let port = port.unwrap_or_else(|| panic!("{name}: refused with {occupancy} of {PORTS} taken"));
            assert!(!taken.contains(&port), "{name}: {port} is taken");
            assert!(gateway.owns(MEMBER, FRONTEND, port), "{name}: {port}");
            give_back(source);
            span
        });
        println!("{name}: claim with {occupancy:>4} of {PORTS} taken: {}", told(spans.collect()));
    }
    // The last of all; and what comes after it is refused, quickly.
    let last = send(&syn(STAYS + PORTS - 1)).0.expect("one port is left");
    assert!(taken.insert(last), "{name}: {last} twice");
    let (refused, first) = send(&syn(GOES));
    assert_eq!(refused, None, "{name}: all are taken");
    println!("{name}: refused, all {PORTS} tried: {} ns", first.as_nanos());
    let spans = (0..CLAIMS).map(|n| {
        let (refused, span) = send(&syn(GOES + n));
        assert_eq!(refused, None, "{name}: all are taken");
        span
    });
    println!("{name}: refused again:                    {}", told(spans.collect()));
    let spans = (0..CLAIMS).map(|n| {
        let (port, span) = send(&syn(STAYS + n));
        assert!(port.is_some_and(|port| taken.contains(&port)), "{name}: a live flow");
        span
    });
    println!("{name}: packet of a live flow:            {}", told(spans.collect()));
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
    fill("host engine", gateway, send, |source| {
        let key = inside_key(source, vm1.network);
        let (index, _) = flow::find::<V4, _>(env, &env.control, &key, env.now()).expect("it was claimed");
        release(|i| flow::record::<V4, _>(env, i).unwrap(), index);
    });
}

#[test]
fn at_every_occupancy_of_a_block_a_claim_succeeds_down_to_the_last_port_in_the_kernel() {
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with_table(&policy(0), &["vm1", "uplink"], hook, BUCKETS, |backend| {
            let table = backend.datapath.flow_table()?;
            let network = backend.gateway.compiled.devices.iter().find(|d| d.kind == 1).unwrap().network;
            let (name, ifindex) = (backend.name(), backend.ifindex("vm1")?);
            let datapath = &backend.datapath;
            let send = |frame: &[u8]| {
                let began = Instant::now();
                let (out, span, sent) = match hook {
                    // The kernel's own measure of the program alone.
                    Hook::Xdp => {
                        let (out, span) = datapath.time_xdp(frame, ifindex, 1).unwrap();
                        (out, span, 4)
                    }
                    // With the system call around it, about 1,300 ns.
                    Hook::Tc => (datapath.run_tc(frame, ifindex).unwrap(), began.elapsed(), 7),
                };
                ((out.verdict == sent).then(|| source_port(&out.packet)), span)
            };
            fill(name, &backend.gateway, send, |source| {
                let mut records = table.iter();
                let forward =
                    records.find(|(_, r)| r.key.network == network && r.key.source_port == source.to_be());
                release(|i| table.slot(i), forward.expect("it was claimed").0);
            });
            Ok(())
        })
        .unwrap();
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
