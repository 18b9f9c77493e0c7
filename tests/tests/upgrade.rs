//! An upgrade to a build with another layout of tables: it says what it does, and no connection dies; or it refuses.
//!
//! A layout that is read is 3, whose flows look like today's; the pins of a running gateway are given its name. With
//! [`OLD_BUILD`] it is a gateway of such a build.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use portcullis_common::layout::ABI;
use portcullis_tests::edge::{Edge, LabPolicy, WithHook, binary, under_both};
use portcullis_tests::lab::{
    TcpEcho, TcpHold, Topology, TopologySpec, UdpEcho, eventually, ping, tcp_exchange,
};
use portcullis_tests::stream::{TcpStreamOfNumbers, UdpStreamOfNumbers};

const LIMIT: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// A layout that this build reads, and one that it does not.
const READABLE: u32 = 3;
const UNREADABLE: u32 = 1;

fn at(port: u16) -> SocketAddr {
    (SERVER, port).into()
}

/// Names, in the environment, a build of [`READABLE`].
const OLD_BUILD: &str = "PORTCULLIS_LAYOUT_3";

/// A gateway with a dead daemon, whose pins say that they are of another layout.
fn of_another_layout(hook: WithHook, version: u32, traffic: impl FnOnce(&Edge)) -> Edge {
    let spec = TopologySpec::clean_veth(2);
    let old = std::env::var_os(OLD_BUILD).filter(|_| version == READABLE).map(PathBuf::from);
    let build = old.clone().unwrap_or_else(|| binary().unwrap());
    let topology = Topology::build(&spec).unwrap();
    let mut edge = Edge::start_build(topology, &LabPolicy::new(hook).yaml(&spec), &build).unwrap();
    traffic(&edge);
    edge.daemon.kill();
    if old.is_some() {
        edge.daemon.spec_mut().binary = binary().unwrap();
        return edge;
    }
    let pins = edge.daemon.spec().pin_dir.clone();
    move_pins(&pins.join(format!("v{ABI}")), &pins.join(format!("v{version}")));
    edge
}

/// Gives pins another directory. bpffs moves files, and no directory that has any.
fn move_pins(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let place = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            move_pins(&entry.path(), &place);
        } else {
            fs::rename(entry.path(), place).unwrap();
        }
    }
    fs::remove_dir(from).unwrap();
}

#[test]
fn an_upgrade_from_another_layout_copies_every_flow_and_no_stream_breaks() {
    under_both(|hook| {
        let (mut numbers, mut datagrams, mut held, mut servers) = (None, None, None, None);
        let mut edge = of_another_layout(hook, READABLE, |edge| {
            let tcp = TcpEcho::start(edge.topology.internet(), at(80)).unwrap();
            let udp = UdpEcho::start(edge.topology.internet(), at(53)).unwrap();
            let vm1 = edge.topology.guest("vm1");
            numbers = Some(TcpStreamOfNumbers::start(vm1, at(80)).unwrap());
            datagrams = Some(UdpStreamOfNumbers::start(vm1, at(53)).unwrap());
            held = Some(TcpHold::open(edge.topology.guest("vm2"), at(80), 200, LIMIT).unwrap());
            servers = Some((tcp, udp));
        });
        let (numbers, datagrams, mut held) = (numbers.unwrap(), datagrams.unwrap(), held.unwrap());
        let (tcp, udp) = servers.unwrap();
        let going = |when: &str| {
            let (there, back) = (numbers.echoed(), datagrams.echoed());
            assert!(
                eventually(LIMIT, || numbers.echoed() > there + 200 && datagrams.echoed() > back + 200),
                "{hook:?}, {when}: {:?}, {:?}",
                numbers.failure(),
                datagrams.failure()
            );
        };
        going("with a dead daemon");
        let peers = (tcp.peers(), udp.peers());
        assert_eq!((peers.0.len(), peers.1.len()), (201, 1), "{hook:?}");

        edge.restart().unwrap();
        going("after the upgrade");
        assert_eq!(held.alive(LIMIT), 200, "{hook:?}: no connection has died");
        assert_eq!((tcp.peers(), udp.peers()), peers, "{hook:?}: all under the same ports");
        let status = edge.ask(&["status"]).unwrap();
        let migrated = &status["older"]["migrated"];
        assert_eq!(migrated["from"], READABLE, "{hook:?}: {status}");
        // 201 connections, the stream of datagrams and the mapping of its socket.
        assert_eq!(
            (&migrated["before"], &migrated["lost"]),
            (&203.into(), &0.into()),
            "{hook:?}: {migrated}"
        );
        assert_eq!(status["adopted"], true, "{hook:?}");
        assert_eq!(status["flows"]["live"], 202, "{hook:?}: {}", status["flows"]);
        let counted = ["vm1", "vm2"].map(|guest| edge.held(guest).unwrap());
        assert_eq!(counted, [2, 200], "{hook:?}: counted for the guests' quotas, the mapping not");
        let pins = fs::read_dir(&edge.daemon.spec().pin_dir).unwrap();
        let versions: Vec<_> = pins.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(versions, [format!("v{ABI}").as_str()], "{hook:?}: nothing is left of the old one");
        let log = edge.daemon.log();
        assert!(log.contains("live flows: they are copied into this build's"), "{log}");

        // And new flows begin, with ports that none of those stands on.
        tcp_exchange(edge.topology.guest("vm1"), None, at(80), b"a new connection", LIMIT).unwrap();
        assert_eq!(ping(edge.topology.guest("vm2"), SERVER.into(), 3, LIMIT).unwrap().received, 3);
        assert_eq!(held.alive(LIMIT), 200, "{hook:?}");
        numbers.stop().unwrap_or_else(|error| panic!("{hook:?}: TCP: {error}"));
        let lost = datagrams.stop().unwrap_or_else(|error| panic!("{hook:?}: UDP: {error}"));
        assert_eq!(lost, 0, "{hook:?}: datagrams");
    });
}

#[test]
fn a_layout_that_cannot_be_read_is_refused_while_everything_goes_on_and_reset_starts_anew() {
    under_both(|hook| {
        let mut kept = None;
        let mut edge = of_another_layout(hook, UNREADABLE, |edge| {
            let server = TcpEcho::start(edge.topology.internet(), at(80)).unwrap();
            let numbers = TcpStreamOfNumbers::start(edge.topology.guest("vm1"), at(80)).unwrap();
            kept = Some((server, numbers));
        });
        let (_server, numbers) = kept.unwrap();
        let refused = edge.restart().expect_err("it refuses").to_string();
        assert!(refused.contains("layout 1, which this build cannot read"), "{hook:?}: {refused}");
        assert!(refused.contains("`--reset`"), "{hook:?}: it says what to do: {refused}");
        let before = numbers.echoed();
        assert!(eventually(LIMIT, || numbers.echoed() > before + 200), "{hook:?}: {:?}", numbers.failure());
        let pins = edge.daemon.spec().pin_dir.clone();
        let versions: Vec<_> = fs::read_dir(&pins).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(versions, ["v1"], "{hook:?}: nothing is left of what refused");

        edge.daemon.spec_mut().arguments.push("--reset".into());
        edge.restart().unwrap();
        assert!(edge.daemon.log().contains("the live flows of another layout are lost"), "{hook:?}");
        // Its port was the old table's; it is told, and not left in silence.
        assert!(eventually(LIMIT, || numbers.failure().is_some()), "{hook:?}: the flow is gone");
        let failure = numbers.failure().unwrap();
        assert!(failure.contains("reset by peer"), "{hook:?}: {failure}");
        tcp_exchange(edge.topology.guest("vm1"), None, at(80), b"a new connection", LIMIT).unwrap();
        assert!(!pins.join("v1").exists(), "{hook:?}");
    });
}
