//! A load balancer on the only address there is, which is the host's own: its ports are the guests', all others the host's.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use portcullis_tests::edge::{HookCheck, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{TcpEcho, TcpHold, UdpEcho, tcp_connect, tcp_exchange, udp_exchange};
use portcullis_tests::site::{LIMIT, SERVER, apply, at, private};

const REST: &str = "
publicIPAddresses: [{ name: pip-lb, ipAddress: 203.0.113.10, announce: address }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    loadBalancingRules:
      - { name: web, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080 }
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 53 }
    inboundNatRules:
      - { name: ssh, frontendIPConfiguration: fe, protocol: Tcp, frontendPort: 2222, backendPort: 22, backendIPConfiguration: vm2 }
";

#[test]
fn a_frontend_on_the_hosts_own_address_takes_its_ports_and_leaves_the_host_all_others() {
    under_both(|hook| {
        let mut lab = Frontends::new(hook, &[1, 1]);
        lab.one_address = true;
        let edge = lab.start(REST);
        let (host, world) = (edge.topology.gateway(), edge.topology.internet());
        let vm = |number: u8| edge.topology.guest(&format!("vm{number}"));
        let web = [1, 2].map(|n| TcpEcho::start(vm(n), at(private(1, n), 8080)).unwrap());
        let dns = [1, 2].map(|n| UdpEcho::start(vm(n), at(private(1, n), 53)).unwrap());
        let ssh = TcpEcho::start(vm(2), at(private(1, 2), 22)).unwrap();
        // The host serves the same ports, and two of its own.
        let hidden = [80, 2222].map(|port| TcpEcho::start(host, at(FRONTEND, port)).unwrap());
        let own = [22, 8080].map(|port| TcpEcho::start(host, at(FRONTEND, port)).unwrap());
        let server = TcpEcho::start(world, at(SERVER, 80)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let mut hold = TcpHold::open(world, at(FRONTEND, 80), 40, LIMIT).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (40, 40), "{hook:?}: {:?}", hold.failures());
        assert!(web.iter().all(|server| !server.peers().is_empty()), "{hook:?}: both serve");
        for _ in 0..20 {
            udp_exchange(world, None, at(FRONTEND, 53), b"query", LIMIT).unwrap();
        }
        assert!(dns.iter().all(|server| !server.peers().is_empty()), "{hook:?}");
        tcp_exchange(world, None, at(FRONTEND, 2222), b"ssh", LIMIT).unwrap();
        assert_eq!(ssh.peers().len(), 1, "{hook:?}");
        tcp_exchange(vm(1), None, server.address(), b"out", LIMIT).unwrap();
        let peer = server.peers()[0];
        assert!(
            peer.ip() == IpAddr::from(FRONTEND) && edge.owns("vm1", peer.port()).unwrap(),
            "{hook:?}: {peer}"
        );
        check.end(&edge).unwrap();

        // A guest that calls it, out and in again, is served as anybody.
        let before: usize = web.iter().map(|server| server.peers().len()).sum();
        let mut by_guest = TcpHold::open(vm(1), at(FRONTEND, 80), 10, LIMIT).unwrap();
        assert_eq!(
            (by_guest.established(), by_guest.alive(LIMIT)),
            (10, 10),
            "{hook:?}: {:?}",
            edge.reasons()
        );
        let peers: Vec<SocketAddr> = web.iter().flat_map(TcpEcho::peers).collect();
        assert_eq!(peers.len(), before + 10, "{hook:?}");
        assert_eq!(peers.iter().filter(|p| p.ip() == IpAddr::from(FRONTEND)).count(), 10, "{hook:?}");

        // What is the host's stays the host's.
        for own in &own {
            tcp_exchange(world, None, own.address(), b"the host's own", LIMIT).unwrap();
            assert_eq!(own.peers().len(), 1, "{hook:?}");
        }
        let closed = tcp_connect(world, None, at(FRONTEND, 81), LIMIT).unwrap_err();
        assert_eq!(closed.kind(), ErrorKind::ConnectionRefused, "{hook:?}: the host says so");
        let out = tcp_exchange(host, None, server.address(), b"the host", LIMIT).unwrap();
        assert_eq!(server.peers()[1], out.local, "{hook:?}: left as it is");
        assert!(
            hidden.iter().all(|server| server.peers().is_empty()),
            "{hook:?}: the rules' are the guests'"
        );

        // The rule goes, and its port is the host's for new connections at once.
        let without = REST.replace("frontendPort: 80,", "frontendPort: 79,");
        apply(&edge, &lab.yaml(&without));
        tcp_exchange(world, None, at(FRONTEND, 80), b"the host's again", LIMIT).unwrap();
        assert_eq!(hidden[0].peers().len(), 1, "{hook:?}");
        assert_eq!((hold.alive(LIMIT), by_guest.alive(LIMIT)), (40, 10), "{hook:?}: live ones go on");
    });
}
