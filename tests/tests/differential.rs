//! Random sequences of packets, fragments, ICMP errors and TCP segments in any order, with the clock moved: the host engine
//! against a model of the RFCs that shares nothing with it (`tests/src/rfc_model`), and the kernel's programs against both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use portcullis::datapath::now_tick;
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{
    Action, At, Backend, Gateway as Compiled, HostBackend, KernelBackend, Outcome,
};
use portcullis_tests::rfc_model::{
    Body, DEVICES, Device, Expect, Gateway, Owned, POLICY, Packet, Seen, Step, Walk, received, sent,
};

/// Sequences of the test, and packets of each. `PORTCULLIS_WALKS` asks for more.
const WALKS: u64 = 60;
const STEPS: usize = 1_000;
/// Ticks at which the host engine begins.
const START: u32 = 1_000;

fn name(device: Device) -> &'static str {
    DEVICES[device as usize]
}

/// The ports that vm1 owns, read from what the compiler gave it.
fn owned(compiled: &Compiled) -> Owned {
    let of = |protocol, v6: bool| {
        let address: IpAddr = if v6 { "2001:db8:ffff::10" } else { "203.0.113.10" }.parse().unwrap();
        let member = if v6 { "vm1/v6" } else { "vm1/v4" };
        let ownership = &compiled.compiled.ownership;
        let is = |port: &u16| {
            ownership.owner(address, protocol, *port).is_some_and(|owner| owner.member == member)
        };
        let ports: BTreeSet<u16> = (1..=u16::MAX).filter(is).collect();
        assert_eq!(ports.len(), 8);
        ((protocol, v6), ports)
    };
    BTreeMap::from([of(6, false), of(6, true), of(17, false), of(17, true)])
}

/// Port or identifier with which a frame left under the load balancer's address.
fn port_of(frame: &[u8], protocol: u8) -> Option<u16> {
    let word = |at: usize| frame.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let mut at = if word(12)? == 0x86dd { 54 } else { 34 };
    if word(12)? == 0x86dd && frame.get(20) == Some(&44) {
        at += 8;
    }
    word(if matches!(protocol, 1 | 58) { at + 4 } else { at })
}

/// Judges what became of a packet; says what is wrong with it.
fn compare(model: &mut Gateway, device: Device, packet: &Packet, outcome: &Outcome) -> Result<(), String> {
    let frame = received(device, packet);
    let left = outcome.action == Action::Send && device == Device::Vm1;
    let port = left.then(|| port_of(&outcome.frame, packet.protocol())).flatten();
    let expected = model.judge(device, packet, Seen { port });
    let right = match &expected {
        Expect::Drop => outcome.action == Action::Drop,
        Expect::Pass => outcome.action == Action::Pass && outcome.frame == frame,
        Expect::Ignored => {
            outcome.action == Action::Drop || outcome.action == Action::Pass && outcome.frame == frame
        }
        // An answer goes back to the hardware address that asked.
        Expect::Refused => {
            outcome.action == Action::Drop
                || outcome.action == Action::Send && outcome.frame[..6] == frame[6..12]
        }
        Expect::Send(to, packet) => outcome.action == Action::Send && outcome.frame == sent(*to, packet),
        Expect::Wrong(_) => false,
    };
    if right {
        return Ok(());
    }
    let wanted = match &expected {
        Expect::Send(to, packet) => format!("{:02x?}", sent(*to, packet)),
        _ => String::new(),
    };
    Err(format!(
        "{device:?} sends {packet:?}\n expected {expected:?}\n     came {:?}\n   wanted {wanted}\n      got {:02x?}",
        outcome.action, outcome.frame
    ))
}

/// Runs steps on a fresh host engine beside a fresh model; what is wrong, if anything.
fn replay(steps: &[Step]) -> Result<(), String> {
    let mut host = HostBackend::new(POLICY).unwrap();
    let mut model = Gateway::new(START, owned(host.gateway()));
    host.env.set_now(START);
    for step in steps {
        match step {
            Step::Clock(by) => {
                if !model.settled_at(model.now + by) {
                    return Ok(());
                }
                model.set_now(model.now + by);
                host.env.set_now(model.now);
            }
            Step::Packet(device, packet) => {
                let outcome = host.run(At::Ingress(name(*device)), &received(*device, packet)).unwrap();
                compare(&mut model, *device, packet, &outcome)?;
            }
        }
    }
    Ok(())
}

/// As few of the steps as still disagree.
fn shrunk(mut steps: Vec<Step>) -> Vec<Step> {
    let mut size = steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(at..(at + size).min(steps.len()));
            if replay(&fewer).is_err() {
                steps = fewer;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    steps
}

fn walks() -> u64 {
    std::env::var("PORTCULLIS_WALKS").ok().and_then(|n| n.parse().ok()).unwrap_or(WALKS)
}

/// What kind of disagreement it is: walks find the same one many times.
fn kind(device: Device, packet: &Packet, why: &str) -> String {
    let of = |from: &str| {
        let rest = why.split(from).nth(1).unwrap_or_default();
        rest.chars().take_while(|c| c.is_alphanumeric()).collect::<String>()
    };
    let what = match &packet.body {
        Body::Tcp { flags, .. } => format!("Tcp with {flags:#x}"),
        Body::Error { quote, .. } => format!("Error about {}", quote.protocol()),
        Body::Udp { .. } => "Udp".to_owned(),
        Body::Echo { reply, .. } => format!("Echo, reply {reply}"),
    };
    let piece = if packet.piece.is_some() { ", a fragment" } else { "" };
    format!("{device:?}: {what}{piece}, expected {}, came {}", of("expected "), of("came "))
}

#[test]
fn the_host_engine_does_what_the_rfcs_say_in_random_sequences() {
    let mut seen = BTreeMap::new();
    let mut faults: BTreeMap<String, (usize, Vec<Step>, String)> = BTreeMap::new();
    for seed in 1..=walks() {
        let mut host = HostBackend::new(POLICY).unwrap();
        let mut model = Gateway::new(START, owned(host.gateway()));
        host.env.set_now(START);
        let mut walk = Walk::new(seed, true);
        let mut steps = Vec::new();
        for _ in 0..STEPS {
            let step = walk.next(&model);
            steps.push(step.clone());
            match &step {
                Step::Clock(by) => {
                    model.set_now(model.now + by);
                    host.env.set_now(model.now);
                }
                Step::Packet(device, packet) => {
                    let outcome = host.run(At::Ingress(name(*device)), &received(*device, packet)).unwrap();
                    if let Err(why) = compare(&mut model, *device, packet, &outcome) {
                        let fault = faults
                            .entry(kind(*device, packet, &why))
                            .or_insert_with(|| (0, steps, format!("seed {seed}: {why}")));
                        fault.0 += 1;
                        // The two are no longer in the same state.
                        break;
                    }
                }
            }
        }
        for (reason, count) in host.counters().unwrap() {
            *seen.entry(reason).or_insert(0u64) += count;
        }
    }
    for (kind, (times, steps, why)) in &faults {
        let least = shrunk(steps.clone());
        println!(
            "=== {kind} ({times} times)\n{why}\nthe least that disagrees: {least:#?}\n{:?}\n",
            replay(&least)
        );
    }
    assert!(faults.is_empty(), "{:#?}", faults.keys().collect::<Vec<_>>());
    // A walk that goes nowhere would agree with everything.
    println!("{seen:?}");
    use portcullis_common::Reason::*;
    for reason in [
        Forwarded,
        NewFlow,
        NoFlow,
        FragmentOutOfOrder,
        IcmpError,
        Spoofed,
        Martian,
        NoGuest,
        DeniedByRule,
        NoOutboundMethod,
        NoListener,
        TcpFlags,
    ] {
        assert!(seen.get(&reason).is_some_and(|count| *count >= 5), "{reason:?}: {seen:?}");
    }
}

/// A packet through the kernel's programs as on a device: what XDP leaves alone comes to TC.
fn through_kernel(kernel: &mut KernelBackend, device: Device, frame: &[u8]) -> Outcome {
    let outcome = kernel.run(At::Ingress(name(device)), frame).unwrap();
    if kernel.hook() == Hook::Tc || outcome.action != Action::Pass {
        return outcome;
    }
    assert_eq!(outcome.frame, frame, "XDP touched what it hands up");
    let ran = kernel.datapath.run_tc(frame, kernel.ifindex(name(device)).unwrap()).unwrap();
    let action = match ran.verdict {
        2 => Action::Drop,
        7 => Action::Send,
        u32::MAX => Action::Pass,
        other => panic!("TC answered {other}"),
    };
    Outcome { action, frame: ran.packet }
}

fn kernel_agrees_under(hook: Hook) {
    for seed in 1..=3u64 {
        KernelBackend::with(POLICY, &DEVICES, hook, |kernel| {
            let mut host = HostBackend::new(POLICY)?;
            // The same seed chooses the same ports.
            host.env.control.seed = kernel.datapath.seed();
            let mut model = Gateway::new(START, owned(host.gateway()));
            let mut walk = Walk::new(1_000 + seed, false);
            for number in 0..STEPS {
                let Step::Packet(device, packet) = walk.next(&model) else { continue };
                let frame = received(device, &packet);
                host.env.set_now(now_tick());
                let expected = host.run(At::Ingress(name(device)), &frame)?;
                let outcome = through_kernel(kernel, device, &frame);
                // Whether a refusal is answered is a matter of a budget in time.
                if packet.ttl > 1 {
                    assert_eq!(
                        (outcome.action, outcome.action != Action::Drop, &outcome.frame),
                        (
                            expected.action,
                            expected.action != Action::Drop,
                            if expected.action == Action::Drop { &outcome.frame } else { &expected.frame }
                        ),
                        "seed {seed}, packet {number}: {device:?} sends {packet:?}"
                    );
                }
                if let Err(why) = compare(&mut model, device, &packet, &outcome) {
                    panic!("seed {seed}, packet {number} under {hook:?}: {why}");
                }
                assert_eq!(kernel.counters()?, host.counters()?, "seed {seed}, packet {number}: {packet:?}");
            }
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{hook:?}: {e:#}"));
    }
}

#[test]
fn the_programs_under_xdp_do_what_the_host_engine_and_the_model_do() {
    kernel_agrees_under(Hook::Xdp);
}

#[test]
fn the_programs_under_tc_do_what_the_host_engine_and_the_model_do() {
    kernel_agrees_under(Hook::Tc);
}
