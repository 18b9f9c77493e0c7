//! Ports taken from a guest drain: its live flows go on, it gets no new ones there, and neither a new daemon nor time loses
//! track of them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{TcpEcho, TcpHold, TopologySpec, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(1500);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

fn server(port: u16) -> SocketAddr {
    (IpAddr::V4(SERVER), port).into()
}

/// Units of a guest for TCP as they are on disk: in use, and those that drain with the second until which.
fn units(edge: &Edge, guest: &str) -> (Vec<u64>, Vec<(u64, u64)>) {
    let text = std::fs::read(edge.daemon.spec().state_dir.join("state.json")).unwrap();
    let saved: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(saved["version"], 2);
    let runs = saved["ownership"]["frontends"]["203.0.113.10"]["tcp"].as_array().unwrap().clone();
    let (mut used, mut draining) = (Vec::new(), Vec::new());
    for run in runs.iter().filter(|run| run["member"].as_str().unwrap().starts_with(guest)) {
        let of_run = run["first"].as_u64().unwrap()..=run["last"].as_u64().unwrap();
        match run["drainingUntil"].as_u64() {
            Some(until) => draining.extend(of_run.map(|unit| (unit, until))),
            None => used.extend(of_run),
        }
    }
    (used, draining)
}

#[test]
fn flows_on_ports_that_drain_live_on_through_a_new_daemon_and_the_ports_are_free_when_the_last_has_ended() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let spec = TopologySpec::clean_veth(2);
        let with = |ports| LabPolicy { ports, ..LabPolicy::new(hook) }.yaml(&spec);
        let mut edge = Edge::start(&spec, &with(32)).unwrap();
        let vm1 = |edge: &Edge| edge.topology.guest("vm1").clone();
        let _servers =
            [9000, 9001].map(|port| TcpEcho::start(edge.topology.internet(), server(port)).unwrap());
        let mut held = TcpHold::open(&vm1(&edge), server(9000), 32, LIMIT).unwrap();
        assert_eq!(held.alive(LIMIT), 32, "{hook:?}: each port of its four units serves a flow");
        let before = units(&edge, "vm1");
        assert_eq!((before.0.len(), before.1.len()), (4, 0));

        let (done, said) = edge.apply(&with(16)).unwrap();
        assert!(done, "{said}");
        let (used, draining) = units(&edge, "vm1");
        assert_eq!(used, before.0[..2], "{hook:?}: of equals the last go");
        assert_eq!(draining.iter().map(|unit| unit.0).collect::<Vec<_>>(), before.0[2..]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(draining.iter().all(|unit| (now + 3500..=now + 3600).contains(&unit.1)), "{draining:?}");
        let idle = units(&edge, "vm2");
        assert_eq!((idle.0.len(), idle.1.len()), (2, 0), "{hook:?}: nothing lives on the other guest's");
        assert_eq!(held.alive(LIMIT), 32, "{hook:?}: nobody is cut off");
        let more = TcpHold::open(&vm1(&edge), server(9000), 1, SOON).unwrap();
        assert_eq!(more.established(), 0, "{hook:?}: no new flow where it drains");
        let elsewhere = TcpHold::open(&vm1(&edge), server(9001), 17, LIMIT).unwrap();
        assert_eq!(
            elsewhere.established(),
            16,
            "{hook:?}: towards another server all it has left, and no more"
        );

        edge.daemon.kill();
        assert_eq!(held.alive(LIMIT), 32);
        edge.restart().unwrap();
        assert_eq!(
            units(&edge, "vm1"),
            (used, draining),
            "{hook:?}: a new daemon goes on where the old one was"
        );
        assert_eq!(held.alive(LIMIT), 32);

        let generation = edge.generation().unwrap();
        edge.ask(&["flows", "kill", "--guest", "vm1", "--to", "198.51.100.1:9000"]).unwrap();
        let over = || units(&edge, "vm1").1.is_empty();
        assert!(eventually(Duration::from_secs(20), over), "{hook:?}: {:?}", units(&edge, "vm1"));
        assert!(eventually(LIMIT, || edge.generation().unwrap() > generation));
        assert_eq!(units(&edge, "vm1").0, before.0[..2]);

        let (done, said) = edge.apply(&with(32)).unwrap();
        assert!(done, "{said}");
        let after = units(&edge, "vm1").0;
        assert_eq!(after.len(), 4);
        assert!(before.0[..2].iter().all(|unit| after.contains(unit)), "{hook:?}: growing only adds");
    }
}

#[test]
fn when_the_grace_is_over_the_flows_on_reclaimed_ports_end_and_the_others_live_on() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let spec = TopologySpec::clean_veth(2);
        let with =
            |ports| LabPolicy { ports, ..LabPolicy::new(hook) }.yaml(&spec) + "snat: { drainMinutes: 0 }\n";
        let edge = Edge::start(&spec, &with(16)).unwrap();
        let vm1 = edge.topology.guest("vm1").clone();
        let _server = TcpEcho::start(edge.topology.internet(), server(9000)).unwrap();
        let mut held = TcpHold::open(&vm1, server(9000), 16, LIMIT).unwrap();
        assert_eq!(held.alive(LIMIT), 16, "{hook:?}");

        let (done, said) = edge.apply(&with(8)).unwrap();
        assert!(done, "{said}");
        assert_eq!(units(&edge, "vm1").1.len(), 1, "{hook:?}: flows live on the unit that was taken");
        let over = || units(&edge, "vm1").1.is_empty();
        assert!(eventually(Duration::from_secs(20), over), "{hook:?}: {:?}", units(&edge, "vm1"));
        let flows = || edge.ask(&["flows", "--guest", "vm1"]).unwrap()["total"].as_u64().unwrap();
        assert_eq!(flows(), 8, "{hook:?}: those on the eight ports it has left");
        assert_eq!(held.alive(LIMIT), 8, "{hook:?}");
    }
}

/// Every flow of a guest stands on a port that is the guest's own, as the disk has it; how many there are.
fn on_own_ports(edge: &Edge, guest: &str) -> usize {
    let (used, draining) = units(edge, guest);
    let answer = edge.ask(&["flows", "--guest", guest, "--limit", "1000"]).unwrap();
    let flows = answer["flows"].as_array().unwrap();
    for flow in flows {
        let unit = flow["translatedSourcePort"].as_u64().unwrap() / 8;
        assert!(
            used.contains(&unit) || draining.iter().any(|(drains, _)| *drains == unit),
            "{guest}: {flow}"
        );
    }
    flows.len()
}

/// The look at drains comes every ten seconds; a change of the policy may come before it.
#[test]
fn a_change_of_the_policy_after_the_grace_hands_out_no_port_on_which_a_flow_of_the_old_owner_lives() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let spec = TopologySpec::clean_veth(2);
        // All the ports of the address, so that nobody gets any but those that another has lost.
        let half =
            LabPolicy { ports: 32_000, ..LabPolicy::new(hook) }.yaml(&spec) + "snat: { drainMinutes: 0 }\n";
        let all = half.replace("[vm1, vm2]", "[vm2]").replace("32000", "64000");
        let edge = Edge::start(&spec, &half).unwrap();
        let [vm1, vm2] = ["vm1", "vm2"].map(|guest| edge.topology.guest(guest).clone());
        let _servers =
            [9000, 9001].map(|port| TcpEcho::start(edge.topology.internet(), server(port)).unwrap());
        let mut old = TcpHold::open(&vm1, server(9000), 64, LIMIT).unwrap();
        assert_eq!((old.alive(LIMIT), on_own_ports(&edge, "vm1")), (64, 64), "{hook:?}");

        let (done, said) = edge.apply(&all).unwrap();
        assert!(done, "{said}");
        let lost = units(&edge, "vm1").1;
        assert!((1..=64).contains(&lost.len()), "{hook:?}: those under the flows drain: {lost:?}");
        assert_eq!(units(&edge, "vm2").0.len(), 8000 - lost.len(), "{hook:?}");
        let mut new = TcpHold::open(&vm2, server(9001), 64, LIMIT).unwrap();
        assert_eq!((new.alive(LIMIT), on_own_ports(&edge, "vm2")), (64, 64), "{hook:?}: on none of those");
        // The grace is none, so it is over by now.
        let (done, said) = edge.apply(&(all + "timeouts: { udpSeconds: 60 }\n")).unwrap();
        assert!(done, "{said}");
        assert_eq!(units(&edge, "vm1"), (Vec::new(), Vec::new()), "{hook:?}");
        assert_eq!(units(&edge, "vm2").0.len(), 8000, "{hook:?}: every port is its");
        assert_eq!(on_own_ports(&edge, "vm1"), 0, "{hook:?}: no flow of the old owner's");
        assert_eq!(old.alive(SOON), 0, "{hook:?}");
        new.open_more(&vm2, server(9001), 64, LIMIT).unwrap();
        assert_eq!((new.alive(LIMIT), on_own_ports(&edge, "vm2")), (128, 128), "{hook:?}");
    }
}
