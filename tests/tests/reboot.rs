//! Who owns which ports has a history, and survives what wipes everything that is not on disk.

use std::fs;

use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{TcpEcho, TcpHold, TopologySpec, eventually};

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
    let limit = std::time::Duration::from_secs(5);
    let vm1 = edge.topology.guest("vm1").clone();
    let mut held = TcpHold::open(&vm1, server, 64, limit).unwrap();
    assert!(eventually(limit, || held.alive(limit) == 64), "and they serve it");
}
