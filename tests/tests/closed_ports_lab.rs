//! The reset of a closed TCP port and the ICMP error of a closed UDP port find their way back through every translation there is,
//! of both families, under XDP and under TC, to the socket that asked.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use portcullis_tests::edge::{Edge, HookCheck, under_both};
use portcullis_tests::frontends::{FRONTEND, FRONTEND6, Frontends, SERVER6};
use portcullis_tests::lab::{Namespace, Sniffer, tcp_exchange, udp_exchange};
use portcullis_tests::site::{LIMIT, SERVER, at};

const OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 22);
const OWN6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x22);

/// vm1 is in a pool, vm2 has addresses of its own, vm3 uses the shared ones. Nobody serves anything.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip2, ipAddress: 203.0.113.22, announce: proxy }
  - { name: pip26, ipAddress: '2001:db8:ffff::22', announce: proxy }
  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }
  - { name: pip-default6, ipAddress: '2001:db8:ffff::30', announce: proxy }
defaultOutbound: { publicIPAddress: pip-default, publicIPAddressIPv6: pip-default6 }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm1/v6] }]
    loadBalancingRules:
      - { name: tcp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: udp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: tcp6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: udp6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Udp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: floating-tcp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 82, enableFloatingIP: true, disableOutboundSnat: true }
      - { name: floating-udp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 82, enableFloatingIP: true, disableOutboundSnat: true }
    inboundNatRules:
      - { name: one, frontendIPConfiguration: fe, protocol: All, frontendPort: 81, backendPort: 22, backendIPConfiguration: vm1/v4 }
    outboundRules:
      - { name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }
      - { name: out6, frontendIPConfigurations: [fe6], backendAddressPool: pool, protocol: All }
";

/// SYNs that the namespace's kernel has sent again.
fn syn_retransmissions(namespace: &Namespace) -> u64 {
    let text = namespace.enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|name| name == "TCPSynRetrans").unwrap();
    values.split(' ').nth(place).unwrap().parse().unwrap()
}

/// Asserts that the destination's host says that nobody listens: of TCP to the first SYN, of UDP by an ICMP error that comes
/// back to the socket that asked.
fn is_closed(edge: &Edge, what: &str, from: &Namespace, to: SocketAddr) {
    let before = syn_retransmissions(from);
    let error = tcp_exchange(from, None, to, b"?", LIMIT).expect_err("nobody listens");
    let again = syn_retransmissions(from) - before;
    let refused = error.kind() == ErrorKind::ConnectionRefused && again == 0;
    assert!(refused, "{what} to {to}: {error} after {again} more SYNs; {:?}", edge.reasons());
    let error = udp_exchange(from, None, to, b"?", LIMIT).expect_err("nobody listens");
    let refused = error.kind() == ErrorKind::ConnectionRefused;
    assert!(refused, "{what} to {to} by UDP: {error}; {:?}", edge.reasons());
}

/// Lets a host send as many ICMP errors as there are to send: six at once are Linux's measure.
fn unlimited_errors(namespace: &Namespace) {
    namespace.set_sysctl("net.ipv4.icmp_ratelimit", "0").unwrap();
    namespace.set_sysctl("net.ipv6.icmp.ratelimit", "0").unwrap();
}

/// Asserts that nothing with a private address came to where these eyes look, and nothing broken.
fn assert_clean(what: &str, eyes: &Sniffer) {
    let private = ["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().expect("a literal"));
    let leaked = eyes.private_sources(&private);
    assert!(leaked.is_empty() && eyes.lost() == 0, "{what}: {leaked:?}");
    assert!(eyes.bad_checksums().is_empty(), "{what}: {:?}", eyes.bad_checksums());
}

#[test]
fn a_closed_port_answers_through_every_translation_of_both_families() {
    under_both(|hook| {
        let mut lab = Frontends::new(hook, &[1, 1, 1]).with_ipv6();
        lab.subnet.insert(1, "defaultOutboundAccess: true".into());
        lab.configuration.insert(2, "publicIPAddress: pip2".into());
        lab.configuration6.insert(2, "publicIPAddress: pip26".into());
        let edge = lab.start(REST);
        let vm = |number: u8| edge.topology.guest(&format!("vm{number}"));
        let world = edge.topology.internet();
        vm(1).ip(&format!("address add {FRONTEND}/32 dev lo")).unwrap();
        for namespace in [world, vm(1), vm(2), vm(3)] {
            unlimited_errors(namespace);
        }
        let wire = edge.topology.sniff_internet().unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        for (number, by) in [(1, "by port"), (2, "one to one"), (3, "by default outbound")] {
            for server in [at(SERVER, 9), at(SERVER6, 9)] {
                is_closed(&edge, &format!("{hook:?}: out, {by}"), vm(number), server);
            }
        }
        let ways = [
            ("a guest's own address", at(OWN, 9)),
            ("a guest's own address", at(OWN6, 9)),
            ("a load balancing rule", at(FRONTEND, 80)),
            ("a load balancing rule", at(FRONTEND6, 80)),
            ("an inbound NAT rule", at(FRONTEND, 81)),
            ("floating IP", at(FRONTEND, 82)),
        ];
        for (way, address) in ways {
            is_closed(&edge, &format!("{hook:?}: in by {way}"), world, address);
        }
        check.end(&edge).unwrap();

        // Out and in again.
        vm(1).ip(&format!("address del {FRONTEND}/32 dev lo")).unwrap();
        for (way, address) in ways.into_iter().filter(|(way, _)| *way != "floating IP") {
            for from in [3, 2, 1] {
                is_closed(&edge, &format!("{hook:?}: vm{from} by {way}"), vm(from), address);
            }
        }
        assert_clean(&format!("{hook:?}"), &wire);
    });
}
