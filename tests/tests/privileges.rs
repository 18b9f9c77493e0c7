//! What the daemon may do, and what the unit lets it do: the same.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use portcullis::privileges::{FOR_A_START, KEPT};
use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{TcpEcho, TopologySpec, eventually, tcp_exchange};

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/portcullis.service");
const LIMIT: Duration = Duration::from_secs(30);

/// A set of /proc/PID/status, as the bits that are set.
fn bits(status: &str, set: &str) -> BTreeSet<u8> {
    let line =
        status.lines().find_map(|line| line.strip_prefix(set)).unwrap_or_else(|| panic!("{set}: {status}"));
    let word = u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap();
    (0..64).filter(|bit| word >> bit & 1 != 0).collect()
}

/// Every thread of the daemon has the four capabilities and no way to more.
fn has_only_the_four(edge: &Edge, when: &str) {
    let pid = edge.daemon.pid().unwrap();
    let kept: BTreeSet<u8> = KEPT.iter().map(|kept| kept.index()).collect();
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // One that has just ended has no status.
        let Ok(status) = fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(bits(&status, set), kept, "{when}: {set} of {status}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(bits(&status, set), BTreeSet::new(), "{when}: {set} of {status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{when}: {status}");
        threads += 1;
    }
    assert!(threads >= 3, "{when}: {threads} threads");
}

#[test]
fn every_thread_of_a_running_daemon_has_four_capabilities_and_all_it_does_later_works_with_them() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        let with_two = policy.yaml(&spec);
        let mut fewer = spec.clone();
        fewer.guests.pop();
        let mut edge = Edge::start(&spec, &policy.yaml(&fewer)).unwrap();
        has_only_the_four(&edge, "started");
        // A new device: programs are attached, routes and sysctls set.
        let (applied, said) = edge.apply(&with_two).unwrap();
        assert!(applied, "{hook:?}: {said}");
        let server: SocketAddr = ([198, 51, 100, 1], 80).into();
        let _echo = TcpEcho::start(edge.topology.internet(), server).unwrap();
        for guest in ["vm1", "vm2"] {
            tcp_exchange(edge.topology.guest(guest), None, server, b"through", LIMIT).unwrap();
        }
        // Probes: a namespace and devices of their own, and pages written into the generation in force.
        policy.extra = "".into();
        let probed = with_two.replace(
            "outboundRules:",
            "probes: [{ name: alive, protocol: Tcp, port: 8080, intervalInSeconds: 5, probeThreshold: 1 }]\n    \
             loadBalancingRules: [{ name: web, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, \
             frontendPort: 80, backendPort: 8080, probe: alive, disableOutboundSnat: true }]\n    outboundRules:",
        );
        let (applied, said) = edge.apply(&probed).unwrap();
        assert!(applied, "{hook:?}: {said}");
        let health = || edge.ask(&["status"]).unwrap()["balanced"].to_string();
        assert!(
            eventually(LIMIT, || health().contains("refused")),
            "{hook:?}: probes reach guests: {}",
            health()
        );
        // What asks the kernel about programs, and loads some more.
        let status = edge.ask(&["status"]).unwrap();
        let device = &status["devices"][0]["programs"];
        assert!(device.to_string().contains("pc_tc"), "{hook:?}: {device}");
        edge.ask(&["explain", "--from", "vm1", "--to", "198.51.100.1:80", "--live"]).unwrap();
        has_only_the_four(&edge, "after all that");
        // Over a datapath that is there: its programs are asked for by number.
        edge.daemon.kill();
        edge.restart().unwrap();
        has_only_the_four(&edge, "started again");
        assert_eq!(edge.ask(&["status"]).unwrap()["adopted"], true, "{hook:?}");
        tcp_exchange(edge.topology.guest("vm1"), None, server, b"through", LIMIT).unwrap();
        assert!(!edge.daemon.log().contains("not permitted"), "{hook:?}: {}", edge.daemon.log());
    }
}

/// Values of a setting of the unit.
fn setting(unit: &str, name: &str) -> Vec<String> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

#[test]
fn the_unit_grants_what_the_daemon_keeps_and_what_its_start_needs_and_nothing_else() {
    let unit = fs::read_to_string(UNIT).unwrap();
    let granted: BTreeSet<String> = setting(&unit, "CapabilityBoundingSet").into_iter().collect();
    let wanted: BTreeSet<String> = KEPT.iter().chain(&FOR_A_START).map(ToString::to_string).collect();
    assert_eq!(granted, wanted);
    assert_eq!(setting(&unit, "AmbientCapabilities"), [""; 0]);
    for (name, value) in [
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("PrivateTmp", "yes"),
        ("MemoryDenyWriteExecute", "yes"),
        ("RuntimeDirectory", "portcullis"),
        ("StateDirectory", "portcullis"),
        ("Type", "notify"),
    ] {
        assert_eq!(setting(&unit, name), [value], "{name}");
    }
    let before = setting(&unit, "Before");
    for target in ["network-pre.target", "network-online.target"] {
        assert!(before.iter().any(|before| before == target), "boot is closed until {target}: {before:?}");
    }
    assert!(setting(&unit, "SystemCallFilter").contains(&"bpf".to_owned()));
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("skipped: no systemd-analyze");
        return;
    }
    // It wants to find the program.
    let place = std::env::temp_dir().join(format!("pc-unit-{}", std::process::id()));
    fs::create_dir_all(&place).unwrap();
    let unit = fs::read_to_string(UNIT).unwrap().replace("/usr/sbin/portcullis", "/bin/true");
    let file = place.join("portcullis.service");
    fs::write(&file, unit).unwrap();
    let verified = Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&file).output().unwrap();
    fs::remove_dir_all(&place).unwrap();
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success(), "{said}");
    assert!(!said.contains("portcullis.service"), "{said}");
}
