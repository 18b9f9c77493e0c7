//! Guests that talk to public addresses of their own gateway, with real sockets: to the frontend they serve themselves, and to a
//! neighbour's own address. They go out and in again (ADR 0007), so the receiver sees a public address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, WithHook, under_both};
use portcullis_tests::frontends::{FRONTEND, FRONTEND6, Frontends};
use portcullis_tests::lab::{
    HttpServer, Links, Namespace, TcpEcho, TcpHold, UdpEcho, curl, ping_sized, tcp_exchange, udp_exchange,
};
use portcullis_tests::site::{LIMIT, SOON, at, private, private6};

const OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 23);

/// vm1 and vm2 serve a frontend of each family; vm3 has an address of its own and a group.
const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.23, announce: proxy }
networkSecurityGroups:
  - name: strict
    securityRules:
      - { name: FromFrontend, priority: 100, direction: Inbound, access: Allow, protocol: '*', sourceAddressPrefix: 203.0.113.10, destinationAddressPrefix: '*', destinationPortRanges: [80, 53] }
      - { name: Echo, priority: 110, direction: Inbound, access: Allow, protocol: Icmp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: '*' }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1/v4, vm2/v4, vm1/v6, vm2/v6] }]
    loadBalancingRules:
      - { name: web, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080, disableOutboundSnat: true }
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 53, disableOutboundSnat: true }
      - { name: web6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080 }
    inboundNatRules:
      - { name: second, frontendIPConfiguration: fe, protocol: Tcp, frontendPort: 8001, backendPort: 8001, backendIPConfiguration: vm2/v4 }
      - { name: first, frontendIPConfiguration: fe, protocol: Tcp, frontendPort: 8002, backendPort: 8001, backendIPConfiguration: vm1/v4 }
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]
";

fn start(hook: WithHook) -> Edge {
    start_on(hook, Links::CleanVeth)
}

fn start_on(hook: WithHook, links: Links) -> Edge {
    let mut lab = Frontends::new(hook, &[1, 1, 2]).with_ipv6();
    lab.links = links;
    lab.configuration.insert(3, "publicIPAddress: pip3".into());
    lab.subnet.insert(2, "networkSecurityGroup: strict".into());
    lab.start(REST)
}

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

/// Runs `work`, in which guests send at least `packets` packets each of which takes two passes: TC's programs do them.
fn by_tc(edge: &Edge, hook: WithHook, packets: u64, work: impl FnOnce()) {
    let runs = edge.runs_during(work).unwrap();
    let of =
        |program: &str| runs.iter().filter(|((_, p), _)| p == program).map(|(_, n)| *n).max().unwrap_or(0);
    let (xdp, tc) = (of("pc_xdp"), of("pc_tc"));
    println!("{hook:?}: pc_xdp ran {xdp} times, pc_tc {tc}");
    assert!(tc >= packets, "{hook:?}: pc_tc ran {tc} times: {runs:?}");
    match hook {
        // Every packet met XDP first, which left it to TC.
        WithHook::Xdp => assert!(xdp >= packets, "{hook:?}: pc_xdp ran {xdp} times"),
        WithHook::Tc | WithHook::Auto => assert_eq!(xdp, 0, "{hook:?}"),
    }
}

#[test]
fn a_guest_reaches_its_own_frontend_served_by_its_neighbour_and_by_itself_under_its_public_address() {
    under_both(|hook| {
        let edge = start(hook);
        let wire = edge.topology.sniff_internet().unwrap();
        let tcp = [1, 2].map(|n| TcpEcho::start(vm(&edge, n), at(private(1, n), 8080)).unwrap());
        let tcp6 = [1, 2].map(|n| TcpEcho::start(vm(&edge, n), at(private6(1, n), 8080)).unwrap());
        let udp = [1, 2].map(|n| UdpEcho::start(vm(&edge, n), at(private(1, n), 53)).unwrap());
        let is_frontend = |peer: &SocketAddr| peer.ip() == IpAddr::from(FRONTEND);
        by_tc(&edge, hook, 40 * 6, || {
            let mut hold = TcpHold::open(vm(&edge, 1), at(FRONTEND, 80), 40, LIMIT).unwrap();
            assert_eq!((hold.established(), hold.alive(LIMIT)), (40, 40), "{hook:?}: {:?}", edge.reasons());
        });
        let served: Vec<SocketAddr> = tcp.iter().flat_map(TcpEcho::peers).collect();
        // All from one of two would be one in 2^39.
        assert!(tcp.iter().all(|server| !server.peers().is_empty()), "{hook:?}: by both: {served:?}");
        assert!(served.iter().all(is_frontend), "{hook:?}: {served:?}");
        assert_eq!(BTreeSet::from_iter(&served).len(), 40, "{hook:?}: each a port of its own");
        for peer in &served {
            assert!(edge.owns("vm1/v4", peer.port()).unwrap(), "{hook:?}: {peer} is a port of vm1's");
        }
        by_tc(&edge, hook, 40 * 2, || {
            for _ in 0..40 {
                udp_exchange(vm(&edge, 2), None, at(FRONTEND, 53), b"query", LIMIT).unwrap();
            }
        });
        for server in &udp {
            assert!(!server.peers().is_empty() && server.peers().iter().all(is_frontend), "{hook:?}");
        }
        let mut hold = TcpHold::open(vm(&edge, 2), at(FRONTEND6, 80), 40, LIMIT).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (40, 40), "{hook:?}: IPv6: {:?}", edge.reasons());
        for server in &tcp6 {
            let peers = server.peers();
            assert!(
                !peers.is_empty() && peers.iter().all(|p| p.ip() == IpAddr::from(FRONTEND6)),
                "{peers:?}"
            );
        }
        // None of it was on the wire.
        let ours = |address: IpAddr| address == IpAddr::from(FRONTEND) || address == IpAddr::from(FRONTEND6);
        let mut frames = wire.frames();
        frames.retain(|f| f.ip.as_ref().is_some_and(|ip| ours(ip.source) && ours(ip.destination)));
        assert!(frames.is_empty() && wire.lost() == 0, "{hook:?}: {frames:?}");
    });
}

#[test]
fn a_guest_reaches_a_neighbours_own_address_and_its_group_judges_it_as_a_stranger_from_the_internet() {
    under_both(|hook| {
        let edge = start(hook);
        let tcp = [80, 81].map(|port| TcpEcho::start(vm(&edge, 3), at(private(2, 3), port)).unwrap());
        let udp = UdpEcho::start(vm(&edge, 3), at(private(2, 3), 53)).unwrap();
        let big = vec![5; 3000];
        by_tc(&edge, hook, 20, || {
            tcp_exchange(vm(&edge, 1), None, at(OWN, 80), &big, LIMIT).unwrap();
            udp_exchange(vm(&edge, 1), None, at(OWN, 53), b"query", LIMIT).unwrap();
            udp_exchange(vm(&edge, 1), None, at(OWN, 53), &big, LIMIT).unwrap();
            for size in [56, 3000] {
                let pinged = ping_sized(vm(&edge, 1), OWN.into(), 3, size, LIMIT).unwrap();
                assert_eq!(
                    (pinged.received, pinged.duplicates, pinged.errors),
                    (3, 0, 0),
                    "{hook:?}: {size}"
                );
            }
        });
        for peer in tcp[0].peers().into_iter().chain(udp.peers()) {
            assert_eq!(peer.ip(), IpAddr::from(FRONTEND), "{hook:?}: the sender's public address");
            assert!(edge.owns("vm1/v4", peer.port()).unwrap(), "{hook:?}: {peer}");
        }
        let denied = || edge.rule_hits("strict", "Inbound", "DenyAllInBound").unwrap();
        let before = denied();
        tcp_exchange(vm(&edge, 1), None, at(OWN, 81), b"?", SOON).expect_err("81 is not allowed");
        assert_eq!(denied(), before + 1, "{hook:?}");
        assert!(tcp[1].peers().is_empty(), "{hook:?}");

        // And the other way: a guest with an address of its own calls the frontend, port for port.
        let web = [1, 2].map(|n| TcpEcho::start(vm(&edge, n), at(private(1, n), 8080)).unwrap());
        tcp_exchange(vm(&edge, 3), Some(45678), at(FRONTEND, 80), &big, LIMIT).unwrap();
        let peers: Vec<SocketAddr> = web.iter().flat_map(TcpEcho::peers).collect();
        assert_eq!(peers, [at(OWN, 45678)], "{hook:?}");
    });
}

/// Downloads ten megabytes from a neighbour and from oneself, by way of the frontend.
fn download(edge: &Edge, who: &str) {
    let body: String = (0..10_000_000u32).map(|i| char::from(b'a' + (i / 7 % 26) as u8)).collect();
    for (port, server) in [(8001, 2), (8002, 1)] {
        let http = HttpServer::start(vm(edge, server), at(private(1, server), 8001), &body).unwrap();
        let begun = Instant::now();
        let url = format!("http://{FRONTEND}:{port}/");
        let reply = curl(vm(edge, 1), &url, Duration::from_secs(60), &[]).unwrap();
        println!("{who}: 10 MB from vm{server} in {:?}", begun.elapsed());
        assert!(reply.status == 200 && reply.body == body, "{who}: {} bytes", reply.body.len());
        let (peer, _) = &http.requests()[0];
        assert_eq!(peer.ip(), IpAddr::from(FRONTEND), "{who}");
    }
}

#[test]
fn ten_megabytes_of_http_come_through_a_hairpin_whole_from_a_neighbour_and_from_oneself() {
    under_both(|hook| download(&start(hook), &format!("{hook:?}")));
}

#[test]
fn containers_with_their_offloads_on_take_the_hairpin_with_large_segments_and_fragments() {
    let edge = start_on(WithHook::Auto, Links::ContainerVeth);
    let check = HookCheck::begin(&edge, WithHook::Auto).unwrap();
    download(&edge, "containers");
    let eyes = edge.topology.sniff_guest("vm3").unwrap();
    let udp = UdpEcho::start(vm(&edge, 3), at(private(2, 3), 53)).unwrap();
    let tcp = TcpEcho::start(vm(&edge, 3), at(private(2, 3), 80)).unwrap();
    let big = vec![5; 1_000_000];
    tcp_exchange(vm(&edge, 1), None, at(OWN, 80), &big, LIMIT).unwrap();
    for length in [1, 33, 3000] {
        udp_exchange(vm(&edge, 1), None, at(OWN, 53), &big[..length], LIMIT).unwrap();
    }
    for peer in tcp.peers().into_iter().chain(udp.peers()) {
        assert_eq!(peer.ip(), IpAddr::from(FRONTEND), "the sender's public address");
    }
    let large = eyes.frames().iter().map(|frame| frame.bytes.len()).max();
    assert!(large > Some(1514), "segments were large: {large:?}");
    assert!(eyes.bad_checksums().is_empty(), "{:?}", eyes.bad_checksums());
    check.end(&edge).unwrap();
}
