//! The controller dead for long: idle flows free their ports all the same, new ones are claimed, nothing fills up (promise 5).
//!
//! An hour is a number of turnovers here: every port of a guest is given back and claimed anew again and again, each time by a
//! flow that could not be there if the one before had not gone.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use portcullis_common::engine::Hook;
use portcullis_common::{Reason, clock};
use portcullis_tests::backend::{Action, At, Backend as _, KernelBackend};
use portcullis_tests::claiming::{PORTS, craft, policy, source_port, syn};
use portcullis_tests::edge::Edge;
use portcullis_tests::edge::{HookCheck, LabPolicy, under_both};
use portcullis_tests::lab::{
    Craft, RawSender, Sniffer, TcpEcho, TcpFlags, TopologySpec, eventually, tcp_exchange,
};

const PATIENCE: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const TURNOVERS: u16 = 25;

#[test]
fn with_the_daemon_killed_every_port_of_a_guest_is_claimed_anew_twenty_five_times() {
    /// Of the guest, and half-open connections that use all of them towards one destination.
    const FEW: usize = 8;
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        policy.ports = FEW as u32;
        policy.extra = "timeouts: { tcpHalfOpenSeconds: 1, tcpResetSeconds: 1 }\n".into();
        let mut edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let wire = Sniffer::start(edge.topology.internet(), "eth0").unwrap();
        edge.daemon.kill();
        let vm1 = edge.topology.guest_spec("vm1");
        let craft = Craft::new(vm1.mac, vm1.address, vm1.gateway_mac, SERVER);
        let sender = RawSender::open(edge.topology.guest("vm1"), "eth0").unwrap();
        let mut owned = BTreeSet::new();
        for turnover in 0..TURNOVERS {
            wire.clear();
            let mut ports = BTreeSet::new();
            let claimed = eventually(PATIENCE, || {
                // Sent again until it is let through, as a guest's kernel would.
                for n in 0..FEW as u16 {
                    let source = 2000 + turnover * FEW as u16 + n;
                    sender.send(&craft.tcp(source, 4443, TcpFlags::SYN, 1, 0, b"")).unwrap();
                }
                let frames = wire.frames();
                let syns = frames.iter().filter(|frame| frame.is_tcp_with(TcpFlags::SYN) && !frame.outgoing);
                ports = syns.filter_map(|syn| syn.source()).collect();
                ports.len() == FEW
            });
            assert!(claimed, "{hook:?}: turnover {turnover}: {ports:?}");
            assert!(ports.iter().all(|port| port.ip() == IpAddr::from(FRONTEND)), "{hook:?}: {ports:?}");
            owned.extend(ports);
            assert_eq!(
                owned.len(),
                FEW,
                "{hook:?}: turnover {turnover}: the same ports each time: {owned:?}"
            );
        }
        // A new daemon finds all of it in order.
        edge.restart().unwrap();
        assert_eq!(edge.ask(&["status"]).unwrap()["adopted"], true, "{hook:?}");
        let reasons = edge.reasons().unwrap();
        assert_eq!(reasons.get("table_full"), None, "{hook:?}: {reasons:?}");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let _echo = TcpEcho::start(edge.topology.internet(), (SERVER, 80).into()).unwrap();
        tcp_exchange(edge.topology.guest("vm2"), None, (SERVER, 80).into(), b"after all", PATIENCE).unwrap();
        check.end(&edge).unwrap();
    });
}

/// The kernel's programs and nothing else: no daemon, no reaper. All 1,024 ports of the guest for UDP and for TCP, in a table
/// that holds two turnovers' flows.
#[test]
fn without_anybody_who_tidies_a_table_for_two_turnovers_takes_twenty_five_of_all_ports_for_udp_and_tcp() {
    for hook in [Hook::Xdp, Hook::Tc] {
        // Flows take two half-records, those of UDP a pair of their socket's besides: 6 k of 16 k slots at once.
        KernelBackend::with_table(&policy(0), &["vm1", "uplink"], hook, 1 << 11, |backend| {
            backend.gateway.recompile_as(&policy(0), |settings| {
                settings.idle = [1; 16];
                settings.tcp_half_open = 1;
                settings.tcp_reset = 1;
                settings.udp_hold = 0;
            })?;
            backend.datapath.install(&backend.gateway.image())?;
            let name = backend.name();
            let mut send = |frame: &[u8]| -> Option<u16> {
                let outcome = backend.run(At::Ingress("vm1"), frame).unwrap();
                (outcome.action == Action::Send).then(|| source_port(&outcome.frame))
            };
            let mut claimed = [BTreeSet::new(), BTreeSet::new()];
            for turnover in 0..TURNOVERS {
                for (protocol, ports) in claimed.iter_mut().enumerate() {
                    // Every other turnover from other sockets, so that none finds what it had.
                    let base = 10_000 + turnover % 2 * 20_000;
                    for n in 0..PORTS {
                        let source = base + n;
                        let frame = if protocol == 0 { craft().udp(source, 80, b"x") } else { syn(source) };
                        let mut port = None;
                        // Refused while those before it are over by less than the grace.
                        assert!(
                            eventually(PATIENCE, || {
                                port = send(&frame);
                                port.is_some()
                            }),
                            "{name}: turnover {turnover}, socket {n}"
                        );
                        ports.insert(port.unwrap_or_default());
                    }
                }
                // Over by themselves: nothing comes to be known of them but by the clock.
                std::thread::sleep(Duration::from_nanos(u64::from(clock::GRACE + 2) << clock::TICK_SHIFT));
            }
            for ports in claimed {
                assert!(ports.len() <= usize::from(PORTS), "{name}: {} ports", ports.len());
                assert!(ports.len() > usize::from(PORTS) * 9 / 10, "{name}: {} ports", ports.len());
            }
            let counters = backend.counters()?;
            assert_eq!(counters.get(&Reason::TableFull), None, "{name}: {counters:?}");
            let through = u64::from(TURNOVERS) * 2 * u64::from(PORTS);
            assert_eq!(counters.get(&Reason::NewFlow), Some(&through), "{name}: {counters:?}");
            Ok(())
        })
        .unwrap();
    }
}
