//! Claims that come back as they do in life: a RST, the shortest hold there is, and nobody who tidies. Both CPUs run the
//! kernel's programs on one block of 1,024 ports and one destination, and a ledger has every port.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use portcullis_common::clock::{GRACE, TICK_SHIFT};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Backend as _, KernelBackend};
use portcullis_tests::lab::{Craft, TcpFlags};

/// Flows that are half open must not end while a busy machine lets a thread wait.
const POLICY: &str = r#"
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets: [{ name: a, addressPrefix: 10.0.1.0/24 }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, ipConfigurations: [{ subnet: a, privateIPAddress: 10.0.1.4 }] }
publicIPAddresses: [{ name: p, ipAddress: 203.0.113.10, announce: proxy }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: p }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]
uplinks: [{ device: uplink }]
timeouts: { tcpHalfOpenSeconds: 3600 }
"#;
const PORTS: u16 = 1024;
/// Of each CPU in a round: almost the block.
const EACH: u16 = 500;
const ROUNDS: u16 = 10;
const TICK: Duration = Duration::from_nanos(1 << TICK_SHIFT);

fn frame(source_port: u16, flags: TcpFlags) -> Vec<u8> {
    let craft =
        Craft::new([2, 0, 0, 0, 0, 1], [10, 0, 1, 4].into(), [2, 0, 0, 0, 0xaa, 0], [198, 51, 100, 7].into());
    craft.tcp(source_port, 80, flags, 1, 0, b"")
}

/// Who holds which port.
struct Ledger {
    holders: Vec<AtomicU32>,
    claims: AtomicU64,
    releases: AtomicU64,
}

impl Ledger {
    fn claimed(&self, port: u16) {
        assert_eq!(self.holders[port as usize].fetch_add(1, SeqCst), 0, "port {port} owned twice");
        self.claims.fetch_add(1, SeqCst);
    }

    /// Before the RST is sent.
    fn releasing(&self, port: u16) {
        assert_eq!(self.holders[port as usize].fetch_sub(1, SeqCst), 1, "port {port} was not held");
        self.releases.fetch_add(1, SeqCst);
    }
}

#[test]
fn claims_released_by_rst_come_back_after_their_hold_and_not_before_and_none_is_lost() {
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(POLICY, &["vm1", "uplink"], hook, |backend| {
            backend.gateway.recompile_as(POLICY, |settings| settings.tcp_reset = 1)?;
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
        (out.verdict == sent).then(|| u16::from_be_bytes([out.packet[34], out.packet[35]]))
    };
    let ledger = Ledger {
        holders: (0..=u16::MAX).map(|_| AtomicU32::new(0)).collect(),
        claims: AtomicU64::new(0),
        releases: AtomicU64::new(0),
    };
    let claim = |source: u16| {
        let port = send(&frame(source, TcpFlags::SYN))?;
        ledger.claimed(port);
        Some(port)
    };
    let give_back = |source: u16, port: u16| {
        ledger.releasing(port);
        assert_eq!(send(&frame(source, TcpFlags::RST)), Some(port), "{name}: the flow's own port");
    };
    let both = |work: &(dyn Fn(u16) + Sync)| {
        std::thread::scope(|scope| {
            for cpu in 0..2u16 {
                scope.spawn(move || {
                    let mut set = nix::sched::CpuSet::new();
                    set.set(cpu.into()).unwrap();
                    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
                    work(cpu);
                });
            }
        });
    };
    let mut looked = 0;
    for round in 0..ROUNDS {
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
    }
    assert!(looked > 0, "{name}: this machine is too slow to look into the hold");
    let (claims, releases) = (ledger.claims.load(SeqCst), ledger.releases.load(SeqCst));
    println!("{name}: {claims} claims, {releases} releases, {looked} looks into the hold");
    assert!(claims >= u64::from(ROUNDS) * 2 * u64::from(EACH), "{name}");
    assert_eq!(claims, releases, "{name}");
    assert!(ledger.holders.iter().all(|holders| holders.load(SeqCst) == 0), "{name}");
    let again = (0..PORTS + 100).filter(|n| send(&frame(20_000 + n, TcpFlags::SYN)).is_some());
    assert_eq!(again.count(), usize::from(PORTS), "{name}: the whole block is there, no port has leaked");
}
