//! Who owns which ports has a history, and survives what wipes everything that is not on disk.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{TcpEcho, TcpHold, TopologySpec, eventually, tcp_connect};

/// Every guest's ports.
fn ports(edge: &Edge) -> Vec<Vec<(u16, u16)>> {
    ["vm1", "vm2", "vm3"].map(|guest| edge.port_ranges(guest).unwrap()).to_vec()
}

#[test]
fn after_a_reboot_every_guest_has_the_ports_it_had_which_no_policy_alone_would_say() {
    let spec = TopologySpec::clean_veth(3);
    let with = |ports| LabPolicy { ports, ..LabPolicy::new(WithHook::Xdp) }.yaml(&spec);
    let mut edge = Edge::start(&spec, &with(32)).unwrap();
    let fresh = ports(&edge);
    for count in [8, 40, 16, 64] {
        let (done, said) = edge.apply(&with(count)).unwrap();
        assert!(done, "{said}");
    }
    let before = ports(&edge);
    assert_ne!(before, fresh);

    // The daemon is gone without a word, and with it all that the kernel held.
    edge.daemon.kill();
    fs::remove_dir_all(&edge.daemon.spec().pin_dir).unwrap();
    let socket = edge.daemon.spec().socket.clone();
    let _ = fs::remove_file(socket);
    edge.restart().unwrap();
    assert_eq!(edge.generation().unwrap(), 1, "a datapath made anew");
    assert_eq!(ports(&edge), before);

    let server = (portcullis_tests::site::SERVER, 9000).into();
    let _echo = TcpEcho::start(edge.topology.internet(), server).unwrap();
    let limit = Duration::from_secs(5);
    let vm1 = edge.topology.guest("vm1").clone();
    let mut held = TcpHold::open(&vm1, server, 64, limit).unwrap();
    assert!(eventually(limit, || held.alive(limit) == 64), "and they serve it");
}

#[test]
fn after_lost_tables_the_same_flows_get_other_ports_and_none_fails_at_a_server_that_holds_the_old_ones() {
    // So many of so few that most ports are one of an old connection's.
    const CONNECTIONS: u16 = 48;
    const PORTS: u32 = 64;
    let limit = Duration::from_secs(30);
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let policy = LabPolicy { ports: PORTS, ..LabPolicy::new(hook) };
        let mut edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let server = (portcullis_tests::site::SERVER, 9000).into();
        let echo = TcpEcho::start(edge.topology.internet(), server).unwrap();
        let vm1 = edge.topology.guest("vm1").clone();
        let open = || -> Vec<TcpStream> {
            let connect = |n| {
                let mut stream = tcp_connect(&vm1, Some(41_000 + n), server, limit).unwrap();
                stream.set_read_timeout(Some(limit)).unwrap();
                stream.write_all(b"hello").unwrap();
                assert!(stream.peek(&mut [0; 5]).unwrap() > 0, "{hook:?}: an echo for connection {n}");
                stream
            };
            (0..CONNECTIONS).map(connect).collect()
        };
        let before = open();
        let old = echo.peers();
        assert_eq!(old.len(), usize::from(CONNECTIONS), "{hook:?}");

        edge.daemon.kill();
        fs::remove_dir_all(&edge.daemon.spec().pin_dir).unwrap();
        let _ = fs::remove_file(&edge.daemon.spec().socket);
        // With the echo unread they are gone at once, by a RST that does not leave the guest.
        let hole = format!("blackhole {}/32", portcullis_tests::site::SERVER);
        vm1.ip(&format!("route add {hole}")).unwrap();
        drop(before);
        vm1.ip(&format!("route delete {hole}")).unwrap();
        edge.restart().unwrap();
        assert_eq!(echo.open_connections(), usize::from(CONNECTIONS), "{hook:?}: the server knows nothing");

        let _after = open();
        let new = echo.peers().split_off(old.len());
        assert_eq!(new.len(), old.len(), "{hook:?}: none was opened twice");
        assert_ne!(new, old, "{hook:?}: the ports are drawn anew");
        let met = new.iter().filter(|peer| old.contains(peer)).count();
        assert!(met >= 32, "{hook:?}: {met} met a connection that the server still held");
    });
}
