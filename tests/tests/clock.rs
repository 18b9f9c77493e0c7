//! Time that does what nobody expects: a million flows that end in the same second, ticks and counters that wrap, a clock that is
//! not the kernel's.

use std::process::Command;
use std::time::Duration;

use portcullis::datapath::{FlowTable, now_tick};
use portcullis_common::Reason;
use portcullis_common::clock::{GRACE, ticks};
use portcullis_common::engine::Hook;
use portcullis_common::flow::{Ctl, LIVE};
use portcullis_common::layout::{FlowKey, HalfRecord};
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend};
use portcullis_tests::claiming::{GUEST, craft, policy, segment, syn};
use portcullis_tests::edge::binary;
use portcullis_tests::lab::{Frame, TcpFlags, eventually};

const PATIENCE: Duration = Duration::from_secs(30);
const BOTH: [Hook; 2] = [Hook::Xdp, Hook::Tc];

/// Both halves of a flow of nobody's.
fn put_pair(flows: &FlowTable, slot: u32, deadline: u32) {
    for (at, peer) in [(slot, slot + 1), (slot + 1, slot)] {
        let key = FlowKey { source: at, network: 0x7777, ..FlowKey::default() };
        let ctl = Ctl::new(5, LIVE, 0, 0, 0).0;
        let record = HalfRecord { key, ctl, peer, deadline, ..HalfRecord::default() };
        // SAFETY: in bounds, and neither programs nor a reaper look at this slot: it is written before either runs.
        unsafe { flows.slot(at).write_volatile(record) };
    }
}

#[test]
fn of_a_million_flows_that_end_in_one_second_none_keeps_new_ones_out_and_all_are_freed() {
    const FLOWS: u32 = 1_000_000;
    for hook in BOTH {
        // Half full, as a table made for a million is with a million in it.
        KernelBackend::with_table(&policy(1024), &["vm1", "uplink"], hook, 1 << 19, |backend| {
            let name = backend.name();
            let flows = backend.datapath.flow_table()?;
            let end = now_tick().wrapping_add(ticks(2));
            for flow in 0..FLOWS {
                // One second of ticks; spread over the whole table.
                put_pair(&flows, flow * 4, end.wrapping_add(flow % ticks(1)));
            }
            assert!(flows.slots() >= FLOWS * 4);
            let mut made = 0u64;
            let mut open = |backend: &mut KernelBackend, count: u16| {
                for n in 0..count {
                    let source = 2000 + (made % 500) as u16;
                    let outcome =
                        backend.run(At::Ingress("vm1"), &craft().udp(source, 9000 + n, b"x")).unwrap();
                    assert_eq!(outcome.action, Action::Send, "{name}: flow {made}; {:?}", backend.counters());
                    made += 1;
                }
            };
            // Before, while they end, and when all have ended and nobody has tidied.
            while (now_tick().wrapping_sub(end.wrapping_add(ticks(1) + GRACE + 1)) as i32) < 0 {
                open(backend, 200);
            }
            open(backend, 5000);
            let before = flows.iter().count();
            let swept = flows.sweep(now_tick(), |_, _| ());
            println!("{name}: {made} packets meanwhile, {} of {before} halves freed at once", swept.freed);
            // What the datapath has taken over is not there to be freed.
            let left: Vec<HalfRecord> = flows.iter().map(|(_, record)| record).collect();
            assert!(
                left.iter().all(|record| record.key.network != 0x7777),
                "{name}: all of the million are gone"
            );
            assert_eq!(before - left.len(), swept.freed as usize, "{name}");
            assert!(swept.freed > FLOWS, "{name}: {swept:?}");
            assert_eq!(swept.live as usize, left.len(), "{name}: {swept:?}");
            assert_eq!(backend.counters()?.get(&Reason::TableFull), None, "{name}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn packets_and_bytes_of_a_flow_wrap_and_touch_nothing_beside_them() {
    for hook in BOTH {
        KernelBackend::with(&policy(8), &["vm1", "uplink"], hook, |backend| {
            let name = backend.name();
            let frame = craft().udp(2000, 53, b"some bytes");
            let first = backend.run(At::Ingress("vm1"), &frame)?;
            assert_eq!(first.action, Action::Send, "{name}");
            let flows = backend.datapath.flow_table()?;
            let (slot, before) = flows
                .iter()
                .find(|(_, record)| {
                    record.key.source == u32::from_ne_bytes(GUEST.octets()) && record.packets == 1
                })
                .expect("the flow's half");
            let full = HalfRecord {
                packets: u32::MAX,
                bytes_low: u32::MAX,
                hops: before.hops | 0xff << 24,
                ..before
            };
            assert_eq!(full.bytes(), (1 << 40) - 1);
            // SAFETY: in bounds; no program runs.
            unsafe { flows.slot(slot).write_volatile(full) };
            let second = backend.run(At::Ingress("vm1"), &frame)?;
            assert_eq!((second.action, &second.frame), (Action::Send, &first.frame), "{name}");
            let after = flows.read(slot).expect("nobody writes");
            let length = before.bytes();
            assert_eq!((after.packets, after.bytes()), (0, length - 1), "{name}: modulo 2^32 and 2^40");
            let rest = HalfRecord {
                packets: before.packets,
                bytes_low: before.bytes_low,
                hops: before.hops,
                deadline: before.deadline,
                ..after
            };
            assert_eq!(rest, before, "{name}: all else is as it was");
            assert_eq!(
                (after.hops << 8, after.next_hop(), after.ingress()),
                (before.hops << 8, before.next_hop(), before.ingress())
            );
            Ok(())
        })
        .unwrap();
    }
}

/// The life of flows around the moment at which the ticks begin again, on the host engine, where time is ours.
#[test]
fn flows_live_idle_out_and_give_back_their_ports_over_the_wrap_of_the_ticks() {
    for start in [u32::MAX - ticks(100), u32::MAX - 1, u32::MAX, 0] {
        // Eight ports, two hundred seconds for UDP, thirty for a SYN.
        let yaml = policy(8).replace("tcpHalfOpenSeconds: 3600", "tcpHalfOpenSeconds: 30");
        let mut backend = HostBackend::new(&yaml).unwrap();
        let sends = |backend: &mut HostBackend, frame: &[u8]| {
            let outcome = backend.run(At::Ingress("vm1"), frame).unwrap();
            (outcome.action == Action::Send).then(|| Frame::parse(outcome.frame).source().unwrap())
        };
        let at =
            |backend: &HostBackend, seconds: u32| backend.env.set_now(start.wrapping_add(ticks(seconds)));
        backend.env.set_now(start);
        let datagram = craft().udp(2000, 53, b"x");
        let port = sends(&mut backend, &datagram).expect("a new flow");
        let half_open: Vec<_> =
            (0..8).map(|n| sends(&mut backend, &syn(3000 + n)).expect("eight ports")).collect();
        assert_eq!(sends(&mut backend, &syn(4000)), None, "{start:#x}: all are taken");
        // Refreshed across it, and found again under its port each time; the idle timer is four minutes.
        for minute in 1..4 {
            at(&backend, minute * 60);
            assert_eq!(sends(&mut backend, &datagram), Some(port), "{start:#x}, minute {minute}");
        }
        // What was half open is over, and its ports are claimed anew.
        let mut again: Vec<_> =
            (0..8).map(|n| sends(&mut backend, &syn(5000 + n)).expect("eight ports again")).collect();
        again.sort();
        let mut before = half_open.clone();
        before.sort();
        assert_eq!(again, before, "{start:#x}");
        assert_eq!(
            sends(&mut backend, &segment(3000, TcpFlags::ACK)),
            None,
            "{start:#x}: the old ones are strangers"
        );
        // Idle for longer than its timer, it is none any more: a datagram from elsewhere is a stranger's.
        at(&backend, 3 * 60 + 239);
        let back = answer(&port);
        assert_eq!(
            backend.run(At::Ingress("uplink"), &back).unwrap().action,
            Action::Send,
            "{start:#x}: alive"
        );
        at(&backend, 3 * 60 + 239 + 242);
        assert_eq!(
            backend.run(At::Ingress("uplink"), &back).unwrap().action,
            Action::Drop,
            "{start:#x}: over"
        );
    }
}

/// What the server sends to a port of the gateway's.
fn answer(port: &std::net::SocketAddr) -> Vec<u8> {
    use portcullis_tests::backend::ROUTER_MAC;
    use portcullis_tests::claiming::{DESTINATION, FRONTEND};
    use portcullis_tests::lab::Craft;
    Craft::new(ROUTER_MAC, DESTINATION, [2, 0, 0, 0, 0xaa, 1], FRONTEND).udp(53, port.port(), b"y")
}

#[test]
fn a_daemon_whose_clock_is_not_the_kernels_refuses_to_start() {
    let place = std::env::temp_dir().join(format!("pc-clock-{}", std::process::id()));
    std::fs::create_dir_all(&place).unwrap();
    let file = place.join("policy.yaml");
    std::fs::write(&file, policy(8)).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--time", "--fork", "--monotonic", "100000"]).arg(binary().unwrap()).arg("run");
    command.arg("--policy").arg(&file).arg("--state-dir").arg(place.join("state"));
    command.arg("--pin-dir").arg(place.join("pins")).arg("--socket").arg(place.join("socket"));
    let mut child =
        command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    let ended = eventually(PATIENCE, || child.try_wait().unwrap().is_some());
    if !ended {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    std::fs::remove_dir_all(&place).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.contains("unshare failed") {
        println!("skipped: this kernel has no time namespaces: {said}");
        return;
    }
    assert!(ended && !output.status.success() && said.contains("time namespace"), "{said}");
}
