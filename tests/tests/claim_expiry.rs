//! Claims that come back as they do in life: a RST, the shortest hold there is, and nobody who tidies. Both CPUs run the
//! kernel's programs on one block of 1,024 ports and one destination, and a ledger has every port.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use portcullis_common::clock::{GRACE, TICK_SHIFT};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Backend as _, KernelBackend};
use portcullis_tests::claiming::{Holders, PORTS, pin_to, policy, segment, source_port};
use portcullis_tests::lab::TcpFlags;

/// Of each CPU in a round: almost the block.
const EACH: u16 = 500;
const ROUNDS: u16 = 10;
const TICK: Duration = Duration::from_nanos(1 << TICK_SHIFT);

#[test]
fn claims_released_by_rst_come_back_after_their_hold_and_not_before_and_none_is_lost() {
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(&policy(0), &["vm1", "uplink"], hook, |backend| {
            backend.gateway.recompile_as(&policy(0), |settings| settings.tcp_reset = 1)?;
            backend.datapath.install(&backend.gateway.image())?;
            rounds(backend);
            Ok(())
        })
        .unwrap();
    }
}

fn rounds(backend: &KernelBackend) {
    let (name, hook, datapath) = (backend.name(), backend.hook(), &backend.datapath);
    let ifindex = backend.ifindex("vm1").unwrap();
    // The public port under which a frame leaves.
    let send = |frame: &[u8]| {
        let (out, sent) = match hook {
            Hook::Xdp => (datapath.run_xdp(frame, ifindex).unwrap(), 4),
            Hook::Tc => (datapath.run_tc(frame, ifindex).unwrap(), 7),
        };
        (out.verdict == sent).then(|| source_port(&out.packet))
    };
    let ledger = Holders::default();
    let claim = |source: u16| {
        let port = send(&segment(source, TcpFlags::SYN))?;
        ledger.claimed(port);
        Some(port)
    };
    let give_back = |source: u16, port: u16| {
        ledger.releasing(port);
        assert_eq!(send(&segment(source, TcpFlags::RST)), Some(port), "{name}: the flow's own port");
    };
    let both = |work: &(dyn Fn(u16) + Sync)| {
        std::thread::scope(|scope| {
            for cpu in 0..2u16 {
                scope.spawn(move || {
                    pin_to(cpu);
                    work(cpu);
                });
            }
        });
    };
    let (mut looked, mut round) = (0, 0);
    // A busy machine lets the hold pass before anybody looks; then there are more rounds.
    while round < ROUNDS || looked == 0 && round < 20 * ROUNDS {
        // Other source ports than in the round before.
        let base = 2000 + round % 2 * 4000;
        let ports: Vec<AtomicU32> = (0..2 * EACH).map(|_| AtomicU32::new(0)).collect();
        both(&|cpu| {
            for n in cpu * EACH..(cpu + 1) * EACH {
                let port = claim(base + n).unwrap_or_else(|| panic!("{name}: refused in round {round}"));
                ports[n as usize].store(port.into(), SeqCst);
            }
        });
        let since = Instant::now();
        both(&|cpu| {
            for n in cpu * EACH..(cpu + 1) * EACH {
                give_back(base + n, ports[n as usize].load(SeqCst) as u16);
            }
        });
        // Held: there is what was free before, and no more.
        let free = PORTS - 2 * EACH;
        let early: Vec<_> = (0..=free).map_while(|n| Some((n, claim(base + 2 * EACH + n)?))).collect();
        if since.elapsed() < TICK * GRACE {
            assert_eq!(early.len(), usize::from(free), "{name}: a port was handed out within its hold");
            looked += 1;
        }
        for (n, port) in early {
            give_back(base + 2 * EACH + n, port);
        }
        // The hold, the grace, the time in which a refused guest is not tried again.
        std::thread::sleep(TICK * 9);
        round += 1;
    }
    assert!(looked > 0, "{name}: nobody looked into the hold in {round} rounds");
    let [claims, _, releases] = ledger.counts();
    println!("{name}: {claims} claims, {releases} releases, {looked} looks into the hold");
    assert!(claims >= u64::from(ROUNDS) * 2 * u64::from(EACH), "{name}");
    assert_eq!(claims, releases, "{name}");
    assert!(ledger.none(), "{name}");
    let again = (0..PORTS + 100).filter(|n| send(&segment(20_000 + n, TcpFlags::SYN)).is_some());
    assert_eq!(again.count(), usize::from(PORTS), "{name}: the whole block is there, no port has leaked");
}
