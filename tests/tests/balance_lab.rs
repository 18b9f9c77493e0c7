//! Load balancing rules, inbound NAT rules and floating IP with real clients and servers, under XDP and under TC: who serves
//! whom, what the server sees, and what happens to everybody when a member leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, WithHook, under_both};
use portcullis_tests::frontends::{CLIENTS, FRONTEND, FRONTEND6, Frontends, SERVER6};
use portcullis_tests::lab::{
    HttpServer, Links, Namespace, TcpEcho, TcpHold, UdpEcho, curl, eventually, tcp_connect_from,
    tcp_exchange, udp_exchange, udp_socket,
};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, connects, echoes, private, private6};

const REST: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip-lb6, ipAddress: '2001:db8:ffff::10', announce: proxy }
networkSecurityGroups:
  - name: web
    securityRules:
      - { name: NotHim, priority: 100, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: 198.51.100.60, destinationAddressPrefix: '*', destinationPortRange: '*' }
      - { name: Serve, priority: 110, direction: Inbound, access: Allow, protocol: '*', sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRanges: [53, 8080, 22] }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }, { name: fe6, publicIPAddress: pip-lb6 }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [MEMBERS] }]
    loadBalancingRules:
      - { name: each, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080 }
      - { name: client, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 81, backendPort: 8080, loadDistribution: SourceIP }
      - { name: client-udp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 81, backendPort: 53, loadDistribution: SourceIP }
      - { name: protocol, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 82, backendPort: 8080, loadDistribution: SourceIPProtocol }
      - { name: protocol-udp, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 82, backendPort: 53, loadDistribution: SourceIPProtocol }
      - { name: dns, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Udp, frontendPort: 53 }
      - { name: each6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8080 }
      - { name: dns6, frontendIPConfiguration: fe6, backendAddressPool: pool, protocol: Udp, frontendPort: 53 }
    inboundNatRules:
      - { name: one, frontendIPConfiguration: fe, protocol: Tcp, frontendPort: 2201, backendPort: 22, backendIPConfiguration: vm1/v4 }
      - { name: ssh, frontendIPConfiguration: fe, protocol: Tcp, frontendPortRangeStart: 2210, frontendPortRangeEnd: 2219, backendPort: 22, backendAddressPool: pool }
";

const ALL: [u8; 3] = [1, 2, 3];

fn lab(hook: WithHook) -> Frontends {
    let mut lab = Frontends::new(hook, &[1, 1, 1]).with_ipv6();
    lab.subnet.insert(1, "networkSecurityGroup: web".into());
    lab
}

/// The rest of the policy with these members in the pool.
fn rest(members: &[u8]) -> String {
    let members: Vec<String> = members.iter().map(|n| format!("vm{n}/v4, vm{n}/v6")).collect();
    REST.replace("MEMBERS", &members.join(", "))
}

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

/// An echo server of TCP at this port of every guest.
fn tcp_servers(edge: &Edge, port: u16) -> BTreeMap<u8, TcpEcho> {
    let start = |number| TcpEcho::start(vm(edge, number), at(private(1, number), port)).unwrap();
    ALL.into_iter().map(|number| (number, start(number))).collect()
}

fn udp_servers(edge: &Edge, port: u16) -> BTreeMap<u8, UdpEcho> {
    let start = |number| UdpEcho::start(vm(edge, number), at(private(1, number), port)).unwrap();
    ALL.into_iter().map(|number| (number, start(number))).collect()
}

/// A connection from this client of the world's to a port of the frontend, and the guest that has it.
fn connect(edge: &Edge, servers: &BTreeMap<u8, TcpEcho>, client: Ipv4Addr, port: u16) -> (TcpStream, u8) {
    let source = Some(at(client, 0));
    let stream = tcp_connect_from(edge.topology.internet(), source, at(FRONTEND, port), LIMIT);
    let stream = stream.unwrap_or_else(|error| panic!("{client} to {port}: {error}; {:?}", edge.reasons()));
    let local = stream.local_addr().unwrap();
    let mut who = None;
    let accepted = eventually(LIMIT, || {
        who = servers.iter().find(|(_, server)| server.peers().contains(&local)).map(|(number, _)| *number);
        who.is_some()
    });
    assert!(accepted, "some guest sees {local}");
    (stream, who.unwrap())
}

/// Which guest answers this client's datagram.
fn asks(edge: &Edge, servers: &BTreeMap<u8, UdpEcho>, client: Ipv4Addr, port: u16) -> u8 {
    let socket = udp_socket(edge.topology.internet(), at(client, 0)).unwrap();
    // Connected: an answer from anywhere but the frontend is not taken.
    socket.connect(at(FRONTEND, port)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send(b"query").unwrap();
    let mut answer = [0; 16];
    assert_eq!(socket.recv(&mut answer).unwrap(), 5);
    let local = socket.local_addr().unwrap();
    *servers.iter().find(|(_, server)| server.peers().contains(&local)).unwrap().0
}

fn clients() -> impl Iterator<Item = Ipv4Addr> {
    // The last is the one that the group denies.
    (1..CLIENTS).map(|last| Ipv4Addr::new(198, 51, 100, last))
}

#[test]
fn two_hundred_connections_spread_over_three_members_which_see_their_clients_and_survive_a_member_leaving() {
    under_both(|hook| {
        let lab = lab(hook);
        let edge = lab.start(&rest(&ALL));
        let servers = tcp_servers(&edge, 8080);
        let world = edge.topology.internet();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let mut hold = TcpHold::open(world, at(FRONTEND, 80), 200, LIMIT).unwrap();
        assert_eq!(hold.established(), 200, "{hook:?}: {:?}", hold.failures());
        assert_eq!(hold.alive(LIMIT), 200, "{hook:?}");
        let shares: Vec<usize> = servers.values().map(|server| server.peers().len()).collect();
        println!("{hook:?}: 200 connections over three members: {shares:?}");
        // Each is binomial with a mean of 67 and a deviation of 7: fewer than 30 once in ten million.
        assert!(shares.iter().all(|share| *share >= 30), "{hook:?}: {shares:?}");
        let seen: BTreeSet<SocketAddr> = servers.values().flat_map(TcpEcho::peers).collect();
        assert_eq!(seen, BTreeSet::from_iter(hold.locals()), "{hook:?}: clients' own addresses and ports");

        apply(&edge, &lab.yaml(&rest(&[1, 2])));
        assert_eq!(hold.alive(LIMIT), 200, "{hook:?}: live ones go on, the leaver's too");
        let before = servers[&3].peers().len();
        let mut more = TcpHold::open(world, at(FRONTEND, 80), 100, LIMIT).unwrap();
        assert_eq!((more.established(), more.alive(LIMIT)), (100, 100), "{hook:?}");
        assert_eq!(servers[&3].peers().len(), before, "{hook:?}: none of the new ones is the leaver's");
        assert_eq!(hold.alive(LIMIT), 200, "{hook:?}");

        // Nobody in the pool: live ones do not care, new ones get nothing.
        apply(&edge, &lab.yaml(&rest(&[])));
        assert_eq!((hold.alive(LIMIT), more.alive(LIMIT)), (200, 100), "{hook:?}");
        let refused = tcp_exchange(world, None, at(FRONTEND, 80), b"?", SOON).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut, "{hook:?}");
        assert_eq!(edge.reason("no_healthy_backend").unwrap(), 1, "{hook:?}: {:?}", edge.reasons());
        check.end(&edge).unwrap();
    });
}

#[test]
fn affinity_keeps_a_client_with_its_member_and_a_members_leaving_moves_its_own_clients_alone() {
    under_both(|hook| {
        let lab = lab(hook);
        let edge = lab.start(&rest(&ALL));
        let (tcp, udp) = (tcp_servers(&edge, 8080), udp_servers(&edge, 53));
        let check = HookCheck::begin(&edge, hook).unwrap();
        let mut live = Vec::new();
        let mut member: BTreeMap<(Ipv4Addr, u16), u8> = BTreeMap::new();
        let mut differ = 0;
        for client in clients() {
            for port in [81, 82] {
                let (stream, who) = connect(&edge, &tcp, client, port);
                live.push(stream);
                member.insert((client, port), who);
                assert_eq!(connect(&edge, &tcp, client, port).1, who, "{hook:?}: {client} comes again");
                let other = asks(&edge, &udp, client, port);
                assert_eq!(asks(&edge, &udp, client, port), other, "{hook:?}: {client} asks again");
                if port == 81 {
                    assert_eq!(other, who, "{hook:?}: by source alone, UDP goes where TCP goes");
                } else {
                    differ += usize::from(other != who);
                }
            }
        }
        // Were the protocol not counted, none would.
        assert!(differ > 0, "{hook:?}: by source and protocol, some clients' UDP goes elsewhere");
        let of = |member: &BTreeMap<(Ipv4Addr, u16), u8>, who| member.values().filter(|m| **m == who).count();
        println!(
            "{hook:?}: clients by member {:?}; {differ} of 59 differ by protocol",
            ALL.map(|who| of(&member, who))
        );
        assert!(ALL.into_iter().all(|who| of(&member, who) >= 10), "{hook:?}: {member:?}");

        apply(&edge, &lab.yaml(&rest(&[1, 3])));
        assert!(live.iter_mut().all(|stream| echoes(stream, LIMIT)), "{hook:?}: all live ones go on");
        for (&(client, port), &before) in &member {
            let (_, now) = connect(&edge, &tcp, client, port);
            assert!(
                now == before || (before == 2 && now != 2),
                "{hook:?}: {client} was with {before}, now {now}"
            );
        }
        apply(&edge, &lab.yaml(&rest(&ALL)));
        for (&(client, port), &before) in &member {
            let (_, now) = connect(&edge, &tcp, client, port);
            assert_eq!(now, before, "{hook:?}: back, it has its own clients and no others");
        }
        assert!(live.iter_mut().all(|stream| echoes(stream, LIMIT)), "{hook:?}");
        check.end(&edge).unwrap();
    });
}

#[test]
fn datagrams_and_both_families_are_balanced_and_the_members_group_judges_the_client() {
    under_both(|hook| {
        let edge = lab(hook).start(&rest(&ALL));
        let world = edge.topology.internet();
        let tcp = tcp_servers(&edge, 8080);
        let udp = udp_servers(&edge, 53);
        let six = |number| at(private6(1, number), 8080);
        let tcp6 = ALL.map(|number| TcpEcho::start(vm(&edge, number), six(number)).unwrap());
        let udp6 = ALL.map(|number| UdpEcho::start(vm(&edge, number), at(private6(1, number), 53)).unwrap());
        let check = HookCheck::begin(&edge, hook).unwrap();

        let of: BTreeSet<u8> = clients().map(|client| asks(&edge, &udp, client, 53)).collect();
        assert_eq!(of, BTreeSet::from(ALL), "{hook:?}: UDP spreads");
        let mut hold = TcpHold::open(world, at(FRONTEND6, 80), 60, LIMIT).unwrap();
        assert_eq!((hold.established(), hold.alive(LIMIT)), (60, 60), "{hook:?}: IPv6");
        let seen: BTreeSet<SocketAddr> = tcp6.iter().flat_map(TcpEcho::peers).collect();
        assert_eq!(seen, BTreeSet::from_iter(hold.locals()), "{hook:?}: the client's own address and port");
        assert!(seen.iter().all(|peer| peer.ip() == IpAddr::from(SERVER6)), "{hook:?}");
        assert!(tcp6.iter().all(|server| server.peers().len() >= 5), "{hook:?}");
        // The second half in fragments.
        for length in [5, 3000].into_iter().flat_map(|length| [length; 20]) {
            udp_exchange(world, None, at(FRONTEND6, 53), &vec![7; length], LIMIT).unwrap();
            udp_exchange(world, None, at(FRONTEND, 53), &vec![7; length], LIMIT).unwrap();
        }
        assert!(udp6.iter().all(|server| !server.peers().is_empty()), "{hook:?}");
        assert!(tcp.values().all(|server| server.peers().is_empty()), "{hook:?}");

        // The group sees the client's address and the member's port, and each decision counts once.
        connects(
            &edge,
            &format!("{hook:?}: a client"),
            world,
            at(FRONTEND, 80),
            true,
            &["web Inbound Serve"],
        );
        let hits = |name| edge.rule_hits("web", "Inbound", name).unwrap();
        assert_eq!(hits("NotHim"), 0);
        let him = Some(at([198, 51, 100, 60], 0));
        let refused = tcp_connect_from(world, him, at(FRONTEND, 80), SOON).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut, "{hook:?}: he gets nothing");
        assert_eq!(hits("NotHim"), 1, "{hook:?}");
        let refused = tcp_exchange(world, None, at(FRONTEND, 83), b"?", SOON).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut, "{hook:?}");
        assert_eq!(edge.reason("no_listener").unwrap(), 1, "{hook:?}: {:?}", edge.reasons());
        check.end(&edge).unwrap();
    });
}

#[test]
fn a_nat_rule_leads_to_its_member_and_a_range_keeps_each_members_port_when_others_leave_and_come_back() {
    under_both(|hook| {
        let lab = lab(hook);
        let edge = lab.start(&rest(&ALL));
        let servers = tcp_servers(&edge, 22);
        let world = edge.topology.internet();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let single = |edge: &Edge| connect(edge, &servers, SERVER, 2201);
        let (mut session, who) = single(&edge);
        assert_eq!(who, 1, "{hook:?}");
        let ports = |edge: &Edge| -> BTreeMap<u8, u16> {
            // All at once: those that lead to nobody take as long as one.
            let leads = |port| tcp_exchange(world, None, at(FRONTEND, port), b"who", LIMIT).is_ok();
            let lead: Vec<u16> = std::thread::scope(|scope| {
                let asked: Vec<_> =
                    (2210..=2219).map(|port| (port, scope.spawn(move || leads(port)))).collect();
                asked.into_iter().filter_map(|(port, leads)| leads.join().unwrap().then_some(port)).collect()
            });
            let mut led = BTreeMap::new();
            for port in lead {
                let (_, who) = connect(edge, &servers, SERVER, port);
                assert_eq!(led.insert(who, port), None, "a member has one port");
            }
            led
        };
        let before = ports(&edge);
        println!("{hook:?}: {before:?}");
        assert_eq!(before.len(), 3, "{hook:?}: {before:?}");
        let mut sessions: Vec<TcpStream> =
            before.values().map(|port| connect(&edge, &servers, SERVER, *port).0).collect();

        // The first leaves: the others' ports are not renumbered; nor are they when it is back.
        apply(&edge, &lab.yaml(&rest(&[2, 3])));
        let without = ports(&edge);
        assert_eq!(without, BTreeMap::from([(2, before[&2]), (3, before[&3])]), "{hook:?}");
        assert!(sessions.iter_mut().all(|stream| echoes(stream, LIMIT)), "{hook:?}: sessions go on");
        assert_eq!(single(&edge).1, 1, "{hook:?}: a single rule's member need not be in a pool");
        apply(&edge, &lab.yaml(&rest(&ALL)));
        let back = ports(&edge);
        assert_eq!((back[&2], back[&3], back.len()), (before[&2], before[&3], 3), "{hook:?}: {back:?}");
        assert!(echoes(&mut session, LIMIT) && sessions.iter_mut().all(|s| echoes(s, LIMIT)), "{hook:?}");
        check.end(&edge).unwrap();
    });
}

#[test]
fn with_floating_ip_a_guest_serves_on_the_frontends_own_address_and_its_answers_arrive() {
    under_both(|hook| {
        let floating = rest(&ALL)
            .replace("frontendPort: 80, backendPort: 8080", "frontendPort: 8080, enableFloatingIP: true")
            .replace(
                "protocol: Udp, frontendPort: 53 ",
                "protocol: Udp, frontendPort: 53, enableFloatingIP: true ",
            );
        let edge = lab(hook).start(&floating);
        let world = edge.topology.internet();
        for number in ALL {
            vm(&edge, number).ip(&format!("address add {FRONTEND}/32 dev lo")).unwrap();
            vm(&edge, number).ip(&format!("address add {FRONTEND6}/128 dev lo nodad")).unwrap();
        }
        let serve = |address: SocketAddr| ALL.map(|n| TcpEcho::start(vm(&edge, n), address).unwrap());
        let (four, six) = (serve(at(FRONTEND, 8080)), serve(at(FRONTEND6, 8080)));
        let udp = ALL.map(|n| UdpEcho::start(vm(&edge, n), at(FRONTEND, 53)).unwrap());
        let check = HookCheck::begin(&edge, hook).unwrap();
        for (frontend, servers) in [(at(FRONTEND, 8080), &four), (at(FRONTEND6, 8080), &six)] {
            let mut hold = TcpHold::open(world, frontend, 60, LIMIT).unwrap();
            assert_eq!((hold.established(), hold.alive(LIMIT)), (60, 60), "{hook:?}: {frontend}");
            let seen: BTreeSet<SocketAddr> = servers.iter().flat_map(TcpEcho::peers).collect();
            assert_eq!(seen, BTreeSet::from_iter(hold.locals()), "{hook:?}: clients' own addresses");
            assert!(servers.iter().all(|server| server.peers().len() >= 5), "{hook:?}: spread");
        }
        for _ in 0..40 {
            udp_exchange(world, None, at(FRONTEND, 53), b"query", LIMIT).unwrap();
        }
        assert!(udp.iter().all(|server| !server.peers().is_empty()), "{hook:?}");
        let spoofed = edge.reason("spoofed_source").unwrap();
        assert_eq!(spoofed, 0, "{hook:?}");
        check.end(&edge).unwrap();

        // In no flow, the frontend's address is not the guest's to send from.
        let own = tcp_connect_from(vm(&edge, 1), Some(at(FRONTEND, 9999)), at(SERVER, 80), SOON).unwrap_err();
        assert_eq!(own.kind(), std::io::ErrorKind::TimedOut, "{hook:?}");
        assert_eq!(edge.reason("spoofed_source").unwrap(), 1, "{hook:?}");
    });
}

#[test]
fn containers_with_their_offloads_on_serve_a_frontend_and_outlive_their_controller() {
    let mut lab = lab(WithHook::Auto);
    lab.links = Links::ContainerVeth;
    let mut edge = lab.start(&rest(&ALL));
    let world = edge.topology.internet().clone();
    let wire = edge.topology.sniff_internet().unwrap();
    let check = HookCheck::begin(&edge, WithHook::Auto).unwrap();
    let body: String = (0..10_000_000u32).map(|i| char::from(b'a' + (i / 7 % 26) as u8)).collect();
    {
        let web = ALL.map(|n| HttpServer::start(vm(&edge, n), at(private(1, n), 8080), &body).unwrap());
        for number in 0..6 {
            let url = format!("http://{FRONTEND}:80/");
            let reply = curl(&world, &url, Duration::from_secs(60), &[]).unwrap();
            assert!(reply.status == 200 && reply.body == body, "{number}: {} bytes", reply.body.len());
            let asked: Vec<SocketAddr> =
                web.iter().flat_map(|server| server.requests()).map(|(peer, _)| peer).collect();
            assert!(asked.contains(&reply.local), "the server sees {}: {asked:?}", reply.local);
        }
    }
    let servers = tcp_servers(&edge, 8080);
    let _udp = udp_servers(&edge, 53);
    let large = vec![7; 1_000_000];
    tcp_exchange(&world, None, at(FRONTEND, 80), &large, LIMIT).unwrap();
    for length in [1, 33, 3000] {
        udp_exchange(&world, None, at(FRONTEND, 53), &large[..length], LIMIT).unwrap();
    }
    assert!(wire.bad_checksums().is_empty(), "{:?}", wire.bad_checksums());
    drop(wire);
    let mut hold = TcpHold::open(&world, at(FRONTEND, 80), 60, LIMIT).unwrap();
    let (_, who) = connect(&edge, &servers, SERVER, 81);
    check.end(&edge).unwrap();

    // With nobody in charge, live ones go on and new ones are balanced as before; and so it is after a new beginning.
    edge.daemon.kill();
    for moment in ["killed", "back"] {
        assert_eq!(hold.alive(LIMIT), hold.established(), "{moment}");
        hold.open_more(&world, at(FRONTEND, 80), 60, LIMIT).unwrap();
        let source = Some(at(SERVER, 0));
        let stream = tcp_connect_from(&world, source, at(FRONTEND, 81), LIMIT).unwrap();
        let local = stream.local_addr().unwrap();
        assert!(eventually(LIMIT, || servers[&who].peers().contains(&local)), "{moment}: the same member");
        if moment == "killed" {
            edge.restart().unwrap();
        }
    }
    assert_eq!((hold.established(), hold.alive(LIMIT)), (180, 180), "{:?}", hold.failures());
}
