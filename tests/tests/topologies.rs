//! Hosts of all kinds, each with real traffic: containers on veth, virtual machines on taps of a bridge, one public address
//! for everything, a router whose hardware address is not known yet, and the host as a party itself.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use ipnet::IpNet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{
    Checksum, Frame, HttpServer, IperfOptions, Namespace, Sniffer, TapFrame, TapGuest, TcpEcho, TcpFlags,
    TopologySpec, Transport, UdpEcho, bits_per_second, curl, eventually, iperf3, ping, tcp_connect,
    tcp_exchange, udp_exchange, udp_socket,
};

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const VM1: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
const VM2: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn private() -> [IpNet; 1] {
    ["10.0.0.0/8".parse().unwrap()]
}

fn is_private(address: IpAddr) -> bool {
    private()[0].contains(&address)
}

fn start(spec: &TopologySpec, hook: WithHook, change: impl FnOnce(&mut LabPolicy)) -> Edge {
    let mut policy = LabPolicy::new(hook);
    change(&mut policy);
    Edge::start(spec, &policy.yaml(spec)).unwrap()
}

/// One round trip of everything, so that neighbours and guests are known.
fn warm_up(edge: &Edge, guests: &[&str]) {
    for guest in guests {
        let reached = ping(edge.topology.guest(guest), SERVER.into(), 2, LIMIT).unwrap();
        assert!(reached.received > 0, "{guest} reaches the internet: {reached:?}");
    }
}

/// Runs `work` and asserts that the TC entry of each device ran meanwhile and no XDP program did.
fn on_tc(edge: &Edge, devices: &[&str], work: impl FnOnce()) {
    let runs = edge.runs_during(work).unwrap();
    for device in devices {
        let of = |program: &str| runs.get(&((*device).to_owned(), program.to_owned())).copied().unwrap_or(0);
        assert!(of("pc_tc") > 0, "TC ran for {device}: {runs:?}");
        assert_eq!(of("pc_xdp"), 0, "XDP did not run for {device}: {runs:?}");
    }
}

/// What was on the wire was translated and is intact, and nothing was missed.
fn assert_clean(wire: &Sniffer) {
    assert!(
        wire.private_sources(&private()).is_empty(),
        "private source: {:?}",
        wire.private_sources(&private())
    );
    assert!(wire.bad_checksums().is_empty(), "checksum: {:?}", wire.bad_checksums());
    assert_eq!(wire.lost(), 0, "the sniffer saw everything");
}

#[test]
fn containers_on_untouched_veth_use_tc_and_keep_their_offloads() {
    let spec = TopologySpec::container_veth(2);
    let edge = start(&spec, WithHook::Auto, |_| {});
    let (vm1, vm2, internet) =
        (edge.topology.guest("vm1"), edge.topology.guest("vm2"), edge.topology.internet());
    let tcp = TcpEcho::start(internet, at(SERVER, 80)).unwrap();
    let udp = UdpEcho::start(internet, at(SERVER, 53)).unwrap();
    let page = "a page of more than one segment ".repeat(4000);
    let http = HttpServer::start(internet, at(SERVER, 8080), &page).unwrap();
    let wire = edge.topology.sniff_internet().unwrap();
    on_tc(&edge, &["pc-vm1", "pc-up"], || {
        let pinged = ping(vm1, SERVER.into(), 3, LIMIT).unwrap();
        assert_eq!((pinged.received, pinged.duplicates), (3, 0));
        assert_eq!(udp_exchange(vm1, None, at(SERVER, 53), b"over udp", LIMIT).unwrap().echoed, b"over udp");
        // Larger than the MTU: the guest's stack fragments nothing here but hands over large TCP segments.
        let large = vec![b'x'; 100_000];
        assert_eq!(tcp_exchange(vm1, None, at(SERVER, 80), &large, LIMIT).unwrap().echoed, large);
        let reply = curl(vm1, &format!("http://{}/", http.address()), LIMIT, &[]).unwrap();
        assert_eq!((reply.status, reply.body.trim_end()), (200, page.trim_end()));
    });
    assert_clean(&wire);
    for peer in tcp.peers().into_iter().chain(udp.peers()) {
        assert_eq!(peer.ip(), IpAddr::from(FRONTEND));
        assert!(edge.owns("vm1", peer.port()).unwrap(), "{peer} is vm1's");
    }
    let partial = |frame: &Frame| !frame.outgoing && frame.checksums().transport == Checksum::PartialGood;
    assert!(
        wire.frames().iter().any(partial),
        "the guest's checksums are still left to do: offloads were on"
    );
    drop(wire);

    // Bulk, both ways: only what must not be is kept.
    let wrong =
        |frame: &Frame| !frame.checksums_ok() || frame.ip.as_ref().is_some_and(|ip| is_private(ip.source));
    let watch = Sniffer::start_filtered(internet, "eth0", wrong).unwrap();
    for (reverse, port) in [(false, 5201), (true, 5202)] {
        let options = IperfOptions { seconds: 1, reverse, ..IperfOptions::default() };
        let report = iperf3(internet, at(SERVER, port), vm1, at(SERVER, port), &options).unwrap();
        let rate = bits_per_second(&report).unwrap();
        assert!(rate > 1e6, "{rate} bit/s, reverse {reverse}");
    }
    assert!(watch.frames().is_empty(), "{:?}", watch.frames());
    drop(watch);

    let inside = edge.topology.sniff_guest("vm2").unwrap();
    let (tcp2, udp2) = (TcpEcho::start(vm2, at(VM2, 80)).unwrap(), UdpEcho::start(vm2, at(VM2, 53)).unwrap());
    on_tc(&edge, &["pc-vm1", "pc-vm2"], || {
        assert_eq!(ping(vm1, VM2.into(), 3, LIMIT).unwrap().received, 3, "guest to guest");
        assert_eq!(tcp_exchange(vm1, None, at(VM2, 80), b"neighbour", LIMIT).unwrap().echoed, b"neighbour");
        assert_eq!(udp_exchange(vm1, None, at(VM2, 53), b"neighbour", LIMIT).unwrap().echoed, b"neighbour");
    });
    for peer in tcp2.peers().into_iter().chain(udp2.peers()) {
        assert_eq!(peer.ip(), IpAddr::from(VM1), "between guests nothing is translated");
    }
    assert!(inside.bad_checksums().is_empty(), "{:?}", inside.bad_checksums());

    for device in ["pc-vm1", "pc-vm2", "pc-up"] {
        let said = edge.device(device).unwrap();
        assert_eq!(said["hook"], "tc", "{said}");
        assert!(
            said["why"].as_str().is_some_and(|why| why.contains("veth") && why.contains("checksum")),
            "{said}"
        );
    }
}

/// A tap guest's frames from `source`, TCP or UDP.
fn came_from(source: SocketAddr) -> impl FnMut(&TapFrame) -> bool {
    move |received| received.frame.source() == Some(source)
}

fn assert_intact(received: &TapFrame) {
    assert!(received.frame.checksums_ok(), "{received:?}");
    if received.frame.partial {
        let offset = if received.frame.ip.as_ref().unwrap().protocol == 6 { 16 } else { 6 };
        assert_eq!((received.header.csum_start, received.header.csum_offset), (34, offset), "{received:?}");
    }
}

fn v4_at(address: Ipv4Addr, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address, port)
}

#[test]
fn virtual_machines_on_taps_of_a_bridge_with_partial_checksums_work() {
    let spec = TopologySpec::bridged_taps(2);
    let edge = start(&spec, WithHook::Auto, |_| {});
    let (gateway, internet) = (edge.topology.gateway(), edge.topology.internet());
    let (vm1, vm2): (&TapGuest, &TapGuest) = (edge.topology.tap("vm1"), edge.topology.tap("vm2"));
    let bridge = gateway.mac("pc-br0").unwrap();
    let addresses = gateway.ip("-4 -o address show dev pc-br0").unwrap();
    assert!(addresses.contains("10.0.0.1/24"), "the bridge has the gateway's address: {addresses}");

    assert_eq!(vm1.resolve(GATEWAY, LIMIT), Some(bridge), "ARP for the gateway is answered");
    assert_eq!(vm2.resolve(GATEWAY, LIMIT), Some(bridge));
    assert_eq!(
        vm1.resolve(VM2, LIMIT),
        Some(bridge),
        "and for other guests, so that what they send passes the gateway"
    );
    let answers = vm1
        .received()
        .into_iter()
        .filter(|f| f.frame.arp.is_some_and(|arp| arp.operation == 2 && arp.sender == VM2));
    assert!(
        answers.into_iter().all(|f| f.frame.arp.unwrap().sender_mac == bridge),
        "nobody but the gateway answers for vm2"
    );

    let udp = UdpEcho::start(internet, at(SERVER, 53)).unwrap();
    let tcp = TcpEcho::start(internet, at(SERVER, 80)).unwrap();
    let wire = edge.topology.sniff_internet().unwrap();
    on_tc(&edge, &["pc-tap1", "pc-up"], || {
        vm1.send_udp(bridge, 5000, v4_at(SERVER, 53), b"a question").unwrap();
        let answer = vm1.wait_for(LIMIT, came_from(at(SERVER, 53))).expect("the answer reaches the tap");
        assert_eq!(answer.frame.payload(), b"a question");
        assert_eq!(answer.frame.destination(), Some(at(VM1, 5000)));
        assert_eq!((answer.frame.source_mac, answer.frame.destination_mac), (bridge, vm1.mac()));
        assert_intact(&answer);

        vm1.send_syn(bridge, 6000, v4_at(SERVER, 80), 1000).unwrap();
        let answer = vm1.wait_for(LIMIT, came_from(at(SERVER, 80))).expect("the SYN is answered");
        assert!(answer.frame.is_tcp_with(TcpFlags::SYN_ACK), "{answer:?}");
        let Some(Transport::Tcp { sequence, acknowledgment: 1001, .. }) =
            answer.frame.ip.as_ref().map(|ip| ip.transport)
        else {
            panic!("{answer:?}");
        };
        assert_intact(&answer);
        let craft = vm1.craft(bridge, SERVER);
        vm1.send_partial(craft.tcp(6000, 80, TcpFlags::ACK, 1001, sequence + 1, b"some data")).unwrap();
        let echo = vm1.wait_for(LIMIT, |f| {
            f.frame.source() == Some(at(SERVER, 80)) && f.frame.payload() == b"some data"
        });
        assert_intact(&echo.expect("data comes back"));
    });
    let arrived = |destination: SocketAddr| {
        wire.frames().into_iter().find(|f| f.destination() == Some(destination)).unwrap()
    };
    for (destination, peers) in [(at(SERVER, 53), udp.peers()), (at(SERVER, 80), tcp.peers())] {
        let frame = arrived(destination);
        assert!(matches!(frame.checksums().transport, Checksum::Good | Checksum::PartialGood), "{frame:?}");
        assert_eq!(frame.source().map(|source| source.ip()), Some(FRONTEND.into()), "{frame:?}");
        assert_eq!(peers.len(), 1);
        assert!(edge.owns("vm1", peers[0].port()).unwrap(), "{peers:?}");
    }

    // From guest to guest, and back.
    vm1.send_udp(bridge, 5001, v4_at(VM2, 7000), b"hello neighbour").unwrap();
    let got = vm2.wait_for(LIMIT, came_from(at(VM1, 5001))).expect("guest to guest");
    assert_eq!((got.frame.payload(), got.frame.source_mac), (&b"hello neighbour"[..], bridge));
    assert_intact(&got);
    vm2.send_udp(bridge, 7000, v4_at(VM1, 5001), b"hello yourself").unwrap();
    assert_intact(&vm1.wait_for(LIMIT, came_from(at(VM2, 7000))).expect("and back"));
    vm1.send_syn(bridge, 6001, v4_at(VM2, 80), 5).unwrap();
    let syn = vm2.wait_for(LIMIT, |f| f.frame.source() == Some(at(VM1, 6001))).expect("a SYN to a guest");
    assert!(syn.frame.is_tcp_with(TcpFlags::SYN));
    assert_intact(&syn);

    // A source that is another's.
    let before = edge.reason("spoofed_source").unwrap();
    let mut spoofed = vm1.craft(bridge, SERVER);
    spoofed.source = VM2;
    vm1.send_partial(spoofed.udp(9, 9, b"not mine")).unwrap();
    assert!(
        eventually(LIMIT, || edge.reason("spoofed_source").unwrap() == before + 1),
        "{:?}",
        edge.reasons()
    );
    spoofed.destination = GATEWAY;
    vm1.send_partial(spoofed.udp(9, 9, b"not mine")).unwrap();
    assert!(
        eventually(LIMIT, || edge.reason("spoofed_source").unwrap() == before + 2),
        "{:?}",
        edge.reasons()
    );
    assert!(!wire.frames().iter().any(|f| f.destination().is_some_and(|d| d.port() == 9)));
    assert_clean(&wire);

    // The host and a guest.
    let host = udp_socket(gateway, at(GATEWAY, 0)).unwrap();
    host.set_read_timeout(Some(LIMIT)).unwrap();
    host.send_to(b"from the host", at(VM1, 7)).unwrap();
    let port = host.local_addr().unwrap().port();
    assert_intact(&vm1.wait_for(LIMIT, came_from(at(GATEWAY, port))).expect("the host reaches the guest"));
    vm1.send_udp(bridge, 7, v4_at(GATEWAY, port), b"to the host").unwrap();
    let mut buffer = [0; 64];
    let (length, from) = host.recv_from(&mut buffer).expect("the guest's answer reaches the host");
    assert_eq!((&buffer[..length], from), (&b"to the host"[..], at(VM1, 7)));

    for device in ["pc-tap1", "pc-tap2"] {
        let said = edge.device(device).unwrap();
        assert_eq!(said["hook"], "tc", "{said}");
        assert!(
            said["why"].as_str().is_some_and(|why| why.contains("tap") && why.contains("partial checksums")),
            "{said}"
        );
    }
}

/// First and last port the host takes for its own connections.
fn ephemeral(host: &Namespace) -> (u16, u16) {
    let range = host.sysctl("net.ipv4.ip_local_port_range").unwrap();
    let mut bounds = range.split_whitespace().map(|bound| bound.parse().unwrap());
    (bounds.next().unwrap(), bounds.next().unwrap())
}

#[test]
fn a_host_whose_only_address_is_the_frontend_keeps_its_own_connections_and_services() {
    for (hook, spec) in [
        (WithHook::Xdp, TopologySpec::clean_veth(1)),
        (WithHook::Tc, TopologySpec::clean_veth(1)),
        (WithHook::Auto, TopologySpec::container_veth(1)),
    ] {
        let edge = start(&spec.one_public_address(), hook, |policy| policy.announce = "address");
        let (host, internet, guest) =
            (edge.topology.gateway(), edge.topology.internet(), edge.topology.guest("vm1"));
        warm_up(&edge, &["vm1"]);
        let (first, last) = ephemeral(host);
        let ranges = edge.port_ranges("vm1").unwrap();
        assert!(
            ranges.iter().all(|(low, high)| *high < first || *low > last),
            "{hook:?}: {ranges:?} beside {first}..{last}"
        );
        let tcp = TcpEcho::start(internet, at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(internet, at(SERVER, 53)).unwrap();

        let check = HookCheck::begin(&edge, hook).unwrap();
        tcp_exchange(guest, None, at(SERVER, 80), b"a guest", LIMIT).unwrap();
        udp_exchange(guest, None, at(SERVER, 53), b"a guest", LIMIT).unwrap();
        check.end(&edge).unwrap();
        for peer in [tcp.peers()[0], udp.peers()[0]] {
            assert_eq!(peer.ip(), IpAddr::from(FRONTEND), "{hook:?}");
            assert!(edge.owns("vm1", peer.port()).unwrap(), "{hook:?}: {peer}");
        }
        let own = tcp_exchange(host, None, at(SERVER, 80), b"the host", LIMIT).unwrap();
        assert_eq!(own.local, tcp.peers()[1], "{hook:?}: the host's own connection is left as it is");
        assert_eq!(own.local.ip(), IpAddr::from(FRONTEND));
        assert!((first..=last).contains(&own.local.port()), "{hook:?}: {own:?}");
        let own = udp_exchange(host, None, at(SERVER, 53), b"the host", LIMIT).unwrap();
        assert_eq!(udp.peers()[1].port(), own.local.port(), "{hook:?}");
        assert!(ping(host, SERVER.into(), 2, LIMIT).unwrap().received == 2, "{hook:?}: the host pings");

        let server = TcpEcho::start(host, at(FRONTEND, 22)).unwrap();
        let reached = tcp_exchange(internet, None, at(FRONTEND, 22), b"ssh", LIMIT).unwrap();
        assert_eq!(reached.echoed, b"ssh", "{hook:?}");
        assert_eq!(server.peers(), [SocketAddr::new(spec_internet(&edge), reached.local.port())], "{hook:?}");
        let refused =
            tcp_connect(internet, None, at(FRONTEND, 23), LIMIT).map(drop).map_err(|error| error.kind());
        assert_eq!(
            refused,
            Err(ErrorKind::ConnectionRefused),
            "{hook:?}: the host answers for ports that are its own"
        );

        let owned = ranges[0].0;
        let wire = edge.topology.sniff_internet().unwrap();
        let before = edge.reason("no_flow").unwrap();
        let failed =
            tcp_connect(internet, None, at(FRONTEND, owned), SOON).map(drop).map_err(|error| error.kind());
        assert_eq!(
            failed,
            Err(ErrorKind::TimedOut),
            "{hook:?}: nobody answers for a port of SNAT's without a flow"
        );
        let counted = eventually(LIMIT, || edge.reason("no_flow").unwrap() > before);
        assert!(counted, "{hook:?}: {:?}", edge.reasons());
        let answered = |f: &Frame| f.source() == Some(at(FRONTEND, owned));
        assert!(!wire.frames().iter().any(answered), "{hook:?}: {:?}", wire.frames());
        assert_clean(&wire);
    }
}

fn spec_internet(edge: &Edge) -> IpAddr {
    edge.topology.spec().internet_address.addr().into()
}

/// Is the next hop towards the internet known to the datapath?
fn router_is_known(edge: &Edge) -> bool {
    let status = edge.ask(&["status"]).unwrap();
    let hops = status["nextHops"].as_array().unwrap();
    let world: Vec<_> = hops.iter().filter(|hop| hop["kind"] == "world").collect();
    assert!(!world.is_empty(), "{status}");
    world.iter().any(|hop| hop["resolved"] == true)
}

#[test]
fn the_first_packet_towards_a_router_not_yet_resolved_arrives() {
    for hook in BOTH {
        let edge = start(&TopologySpec::clean_veth(1), hook, |_| {});
        let (host, internet, guest) =
            (edge.topology.gateway(), edge.topology.internet(), edge.topology.guest("vm1"));
        warm_up(&edge, &["vm1"]);
        let server = UdpEcho::start(internet, at(SERVER, 53)).unwrap();
        let wire = edge.topology.sniff_internet().unwrap();

        // Forgotten the moment before.
        host.ip("neigh flush all").unwrap();
        let sent = udp_exchange(guest, None, at(SERVER, 53), b"first after a flush", LIMIT);
        assert_eq!(sent.unwrap().echoed, b"first after a flush", "{hook:?}");

        // Not to be had for a while, known to be so, and nobody but the packet asks for it.
        internet.set_sysctl("net.ipv4.conf.all.arp_ignore", "8").unwrap();
        host.ip("neigh flush all").unwrap();
        assert!(
            eventually(LIMIT, || !router_is_known(&edge)),
            "{hook:?}: {:?}",
            edge.ask(&["status"]).unwrap()["nextHops"]
        );
        let daemon = Pid::from_raw(edge.daemon.pid().unwrap().try_into().unwrap());
        kill(daemon, Signal::SIGSTOP).unwrap();
        host.ip("neigh flush all nud all").unwrap();
        wire.clear();
        let client = udp_socket(guest, at(VM1, 0)).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.send_to(b"the very first", at(SERVER, 53)).unwrap();
        let router = edge.topology.spec().internet_address.addr();
        let asked =
            wire.wait_for(LIMIT, |f| f.arp.is_some_and(|arp| arp.operation == 1 && arp.target == router));
        assert!(
            asked.is_some(),
            "{hook:?}: the packet makes the kernel ask for the router: {:?}",
            wire.frames()
        );
        assert!(!wire.frames().iter().any(|f| f.destination() == Some(at(SERVER, 53))), "{hook:?}: it waits");
        internet.set_sysctl("net.ipv4.conf.all.arp_ignore", "0").unwrap();
        let arrived = wire.wait_for(LIMIT, |f| f.payload() == b"the very first" && !f.outgoing);
        let arrived = arrived.unwrap_or_else(|| panic!("{hook:?}: it arrives: {:?}", wire.frames()));
        assert_eq!(arrived.source().map(|source| source.ip()), Some(FRONTEND.into()), "{hook:?}: translated");
        let mut buffer = [0; 64];
        let (length, _) = client.recv_from(&mut buffer).expect("and is answered");
        assert_eq!(&buffer[..length], b"the very first");
        kill(daemon, Signal::SIGCONT).unwrap();
        assert_eq!(server.datagrams(), 2, "{hook:?}: each once");
        assert_clean(&wire);

        // While the router was unknown XDP handed its packets to TC (ADR 0003). Now it is known again.
        assert!(eventually(LIMIT, || router_is_known(&edge)), "{hook:?}");
        let check = HookCheck::begin(&edge, hook).unwrap();
        udp_exchange(guest, None, at(SERVER, 53), b"as ever", LIMIT).unwrap();
        check.end(&edge).unwrap();
    }
}

#[test]
fn host_and_guest_reach_each_other_as_far_as_host_access_goes() {
    for (hook, spec) in [
        (WithHook::Xdp, TopologySpec::clean_veth(2)),
        (WithHook::Tc, TopologySpec::clean_veth(2)),
        (WithHook::Auto, TopologySpec::container_veth(2)),
    ] {
        let mut policy = LabPolicy::new(hook);
        let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let (host, guest) = (edge.topology.gateway(), edge.topology.guest("vm1"));
        // The host first: nobody has said a word yet.
        for (name, address) in [("vm1", VM1), ("vm2", VM2)] {
            assert_eq!(
                ping(host, address.into(), 3, LIMIT).unwrap().received,
                3,
                "{hook:?}: the host pings {name}"
            );
        }
        assert_eq!(
            ping(guest, GATEWAY.into(), 3, LIMIT).unwrap().received,
            3,
            "{hook:?}: vm1 pings its gateway"
        );
        let neighbours = guest.ip("neigh show 10.0.0.1").unwrap();
        assert!(neighbours.contains("02:50:43:01:00:01"), "{hook:?}: {neighbours}");
        let inside = TcpEcho::start(guest, at(VM1, 80)).unwrap();
        tcp_exchange(host, None, at(VM1, 80), b"from the host", LIMIT).unwrap();
        assert_eq!(inside.peers()[0].ip(), IpAddr::from(GATEWAY), "{hook:?}: as the gateway");

        let server = TcpEcho::start(host, at(GATEWAY, 22)).unwrap();
        let before = edge.reason("host_access").unwrap();
        assert!(tcp_exchange(guest, None, at(GATEWAY, 22), b"let me in", SOON).is_err(), "{hook:?}");
        assert!(
            eventually(LIMIT, || edge.reason("host_access").unwrap() > before),
            "{hook:?}: {:?}",
            edge.reasons()
        );
        assert!(server.peers().is_empty(), "{hook:?}");

        policy.extra = "hostAccess: { services: [{ protocol: Tcp, portRange: 22 }] }\n".into();
        let (applied, said) = edge.apply(&policy.yaml(&spec)).unwrap();
        assert!(applied, "{hook:?}: {said}");
        let reached = tcp_exchange(guest, None, at(GATEWAY, 22), b"let me in", LIMIT).unwrap();
        assert_eq!(reached.echoed, b"let me in", "{hook:?}");
        assert_eq!(server.peers()[0].ip(), IpAddr::from(VM1), "{hook:?}");
        let refused = tcp_exchange(guest, None, at(GATEWAY, 23), b"and here", SOON);
        assert!(refused.is_err(), "{hook:?}: only the port that was named");
        assert!(
            ping(guest, SERVER.into(), 2, LIMIT).unwrap().received > 0,
            "{hook:?}: the world is where it was"
        );
        // What is for the host itself XDP leaves to TC; what crosses the gateway it does not.
        let check = HookCheck::begin(&edge, hook).unwrap();
        assert_eq!(ping(guest, SERVER.into(), 2, LIMIT).unwrap().received, 2, "{hook:?}");
        check.end(&edge).unwrap();
    }
}
