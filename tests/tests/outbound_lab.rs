//! Azure's scenarios of outbound connections with real sockets, under XDP and under TC: a guest's own address, a load balancer's,
//! default outbound, which goes before which, and what becomes of live connections when that changes.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};

use portcullis_tests::edge::{Edge, HookCheck, WithHook, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{
    Links, Namespace, TcpEcho, UdpEcho, ping_sized, raw_socket, tcp_connect, tcp_exchange, udp_exchange,
};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, private};

/// The guest's own address, and the one that default outbound shares.
const OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 21);
const DEFAULT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 30);

const ADDRESSES: &str = "
publicIPAddresses:
  - { name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip1, ipAddress: 203.0.113.21, announce: proxy }
  - { name: pip-default, ipAddress: 203.0.113.30, announce: proxy }
";
const BY_DEFAULT: &str = "defaultOutbound: { publicIPAddress: pip-default }\n";

/// A load balancer of these members; `rules` of it.
fn balancer(members: &str, rules: &str) -> String {
    format!(
        "loadBalancers:
  - name: lb
    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip-lb }}]
    backendAddressPools: [{{ name: pool, backendIPConfigurations: [{members}] }}]
    probes: [{{ name: alive, protocol: Tcp, port: 9 }}]
{rules}"
    )
}

const OUTBOUND_RULE: &str = "    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All }]\n";

fn vm(edge: &Edge, number: u8) -> &Namespace {
    edge.topology.guest(&format!("vm{number}"))
}

/// Under which address the world sees a guest's new connection.
fn leaves_under(edge: &Edge, number: u8, server: &TcpEcho) -> IpAddr {
    let sent = tcp_exchange(vm(edge, number), None, server.address(), b"who am I", LIMIT);
    sent.unwrap_or_else(|error| panic!("vm{number} reaches the world: {error}; {:?}", edge.reasons()));
    server.peers().last().unwrap().ip()
}

/// The guest has no way out, and that is what is counted.
fn has_no_way_out(edge: &Edge, what: &str, number: u8, server: &TcpEcho) {
    let before = edge.reason("no_outbound_method").unwrap();
    let refused = tcp_exchange(vm(edge, number), None, server.address(), b"?", SOON).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::TimedOut, "{what}");
    assert_eq!(edge.reason("no_outbound_method").unwrap(), before + 1, "{what}");
}

fn lives(stream: &mut TcpStream, what: &str) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"still").unwrap();
    let mut heard = [0; 5];
    stream.read_exact(&mut heard).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(&heard, b"still", "{what}");
}

/// A packet of a protocol without ports arrives, and from where.
fn raw_arrives(from: &UdpSocket, to: &UdpSocket, destination: Ipv4Addr, protocol: u8) -> IpAddr {
    to.set_read_timeout(Some(LIMIT)).unwrap();
    let payload = [protocol; 24];
    from.send_to(&payload, at(destination, 0)).unwrap();
    let mut buffer = [0; 128];
    let (length, source) = to.recv_from(&mut buffer).unwrap();
    // What is received begins with the IP header.
    assert_eq!((buffer[9], &buffer[20..length]), (protocol, &payload[..]));
    source.ip()
}

/// Every protocol, both ways, of a guest with an address of its own that is in a pool too.
fn carries_everything(hook: WithHook, links: Links) {
    let mut lab = Frontends::new(hook, &[1]);
    lab.links = links;
    lab.configuration.insert(1, "publicIPAddress: pip1".into());
    let edge = lab.start(&format!("{ADDRESSES}{}", balancer("vm1", OUTBOUND_RULE)));
    let (guest, world, address) = (vm(&edge, 1), edge.topology.internet(), private(1, 1));
    let wire = edge.topology.sniff_internet().unwrap();
    let check = HookCheck::begin(&edge, hook).unwrap();
    let big: Vec<u8> = (0..3000u16).map(|i| (i % 251) as u8).collect();

    for (here, there, bound, met, destination) in
        [(guest, world, SERVER, OWN, SERVER), (world, guest, address, SERVER, OWN)]
    {
        let what = format!("{hook:?} to {destination}");
        let tcp = TcpEcho::start(there, at(bound, 8000)).unwrap();
        tcp_exchange(here, Some(45678), at(destination, 8000), &big, LIMIT).unwrap();
        assert_eq!(tcp.peers(), [at(met, 45678)], "{what}: the same port");
        let udp = UdpEcho::start(there, at(bound, 8001)).unwrap();
        udp_exchange(here, Some(45679), at(destination, 8001), b"small", LIMIT).unwrap();
        udp_exchange(here, Some(45679), at(destination, 8001), &big, LIMIT).unwrap();
        assert_eq!(udp.peers(), [at(met, 45679)], "{what}: 3,000 bytes too");
        for size in [56, 3000] {
            let pinged = ping_sized(here, destination.into(), 3, size, LIMIT).unwrap();
            assert_eq!((pinged.received, pinged.duplicates, pinged.errors), (3, 0, 0), "{what}: {size}");
        }
    }
    // ESP, SCTP, GRE: both directions of one flow, and then from outside first.
    for (protocol, outside_first) in [(50, false), (132, false), (47, true)] {
        let inside = raw_socket(guest, address.into(), protocol).unwrap();
        let outside = raw_socket(world, SERVER.into(), protocol).unwrap();
        for inbound in [outside_first, !outside_first] {
            let what = format!("{hook:?}: protocol {protocol}, inbound {inbound}");
            let (source, is) = if inbound {
                (raw_arrives(&outside, &inside, OWN, protocol), SERVER)
            } else {
                (raw_arrives(&inside, &outside, SERVER, protocol), OWN)
            };
            assert_eq!(source, IpAddr::from(is), "{what}");
        }
    }
    check.end(&edge).unwrap();
    let fragments = |source: Ipv4Addr| {
        let frames = wire.frames();
        frames.iter().filter_map(|f| f.ip.as_ref()).filter(|ip| ip.fragment && ip.source == source).count()
    };
    // A datagram and three pings each way, each answered: 14 of 3,000 bytes, three fragments each, half of them ours.
    assert_eq!((fragments(OWN), fragments(SERVER)), (24, 24), "{hook:?}");
    assert!(wire.private_sources(&["10.0.0.0/8".parse().unwrap()]).is_empty(), "{hook:?}");
    assert!(wire.bad_checksums().is_empty() && wire.lost() == 0, "{hook:?}: {:?}", wire.bad_checksums());
}

#[test]
fn an_instance_address_carries_every_protocol_and_fragments_in_both_directions_one_to_one() {
    under_both(|hook| carries_everything(hook, Links::CleanVeth));
}

#[test]
fn an_instance_address_of_a_container_with_its_offloads_on_carries_every_protocol_too() {
    carries_everything(WithHook::Auto, Links::ContainerVeth);
}

#[test]
fn a_guests_own_address_goes_before_its_pool_and_the_pool_before_default_outbound_which_is_off_unless_asked()
{
    under_both(|hook| {
        // vm1 has everything, vm2 a pool, vm3 only a subnet with default outbound, vm4 not even that.
        let mut lab = Frontends::new(hook, &[1, 1, 1, 2]);
        lab.configuration.insert(1, "publicIPAddress: pip1".into());
        let rest = format!("{ADDRESSES}{}", balancer("vm1, vm2", OUTBOUND_RULE));
        let edge = lab.start(&rest);
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        for number in [3, 4] {
            has_no_way_out(&edge, &format!("{hook:?}: vm{number}, nothing asked for"), number, &server);
        }
        apply(&edge, &lab.yaml(&format!("{rest}{BY_DEFAULT}")));
        has_no_way_out(&edge, &format!("{hook:?}: its subnet does not allow it"), 3, &server);
        lab.subnet.insert(1, "defaultOutboundAccess: true".into());
        apply(&edge, &lab.yaml(&format!("{rest}{BY_DEFAULT}")));
        for (number, address) in [(1, OWN), (2, FRONTEND), (3, DEFAULT)] {
            assert_eq!(leaves_under(&edge, number, &server), IpAddr::from(address), "{hook:?}: vm{number}");
        }
        has_no_way_out(&edge, &format!("{hook:?}: vm4's subnet does not allow it"), 4, &server);

        // The next one down takes over as each is taken away.
        lab.configuration.clear();
        apply(&edge, &lab.yaml(&format!("{rest}{BY_DEFAULT}")));
        assert_eq!(leaves_under(&edge, 1, &server), IpAddr::from(FRONTEND), "{hook:?}: then its pool's");
        let without = format!("{ADDRESSES}{}", balancer("vm2", OUTBOUND_RULE));
        apply(&edge, &lab.yaml(&format!("{without}{BY_DEFAULT}")));
        assert_eq!(leaves_under(&edge, 1, &server), IpAddr::from(DEFAULT), "{hook:?}: then the shared one");
        lab.subnet.clear();
        apply(&edge, &lab.yaml(&without));
        has_no_way_out(&edge, &format!("{hook:?}: then none"), 1, &server);
        check.end(&edge).unwrap();
    });
}

#[test]
fn live_connections_keep_their_address_when_the_way_out_changes_and_new_ones_take_the_new_one_at_once() {
    under_both(|hook| {
        let mut lab = Frontends::new(hook, &[1]);
        lab.subnet.insert(1, "defaultOutboundAccess: true".into());
        let nowhere = format!("{ADDRESSES}{BY_DEFAULT}");
        let rule = format!("{nowhere}{}", balancer("vm1", OUTBOUND_RULE));
        let own = {
            let mut own = lab.clone();
            own.configuration.insert(1, "publicIPAddress: pip1".into());
            own
        };
        // Default outbound, an outbound rule, an address of its own, and back.
        let steps = [
            (lab.yaml(&rule), FRONTEND),
            (own.yaml(&rule), OWN),
            (lab.yaml(&rule), FRONTEND),
            (lab.yaml(&nowhere), DEFAULT),
            (own.yaml(&nowhere), OWN),
            (lab.yaml(&nowhere), DEFAULT),
        ];
        let edge = lab.start(&nowhere);
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 53)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let talker =
            portcullis_tests::lab::udp_socket(vm(&edge, 1), at(Ipv4Addr::UNSPECIFIED, 5000)).unwrap();
        talker.connect(at(SERVER, 53)).unwrap();
        talker.set_read_timeout(Some(LIMIT)).unwrap();
        let mut open: Vec<TcpStream> = Vec::new();
        let mut expected = DEFAULT;
        for step in 0..=steps.len() {
            let what = format!("{hook:?}, step {step}");
            open.push(tcp_connect(vm(&edge, 1), None, at(SERVER, 80), LIMIT).unwrap());
            lives(open.last_mut().unwrap(), &what);
            assert_eq!(server.peers().last().unwrap().ip(), IpAddr::from(expected), "{what}: a new one");
            talker.send(b"?").unwrap();
            talker.recv(&mut [0; 8]).unwrap();
            if let Some((yaml, address)) = steps.get(step) {
                apply(&edge, yaml);
                expected = *address;
            }
            for (number, stream) in open.iter_mut().enumerate() {
                lives(stream, &format!("{what}: connection {number}"));
            }
        }
        assert_eq!(server.peers().len(), steps.len() + 1, "{hook:?}: nobody connected anew");
        assert_eq!(udp.peers().len(), 1, "{hook:?}: nor has a live UDP flow moved: {:?}", udp.peers());
        assert_eq!(udp.peers()[0].ip(), IpAddr::from(DEFAULT), "{hook:?}");
        check.end(&edge).unwrap();
    });
}

/// A load balancing rule whose port nobody serves and whose probe nobody answers.
fn silent_rule(protocol: &str, more: &str) -> String {
    format!(
        "    loadBalancingRules: [{{ name: rule, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: {protocol}, frontendPort: 80, probe: alive{more} }}]\n"
    )
}

#[test]
fn a_load_balancing_rule_gives_ports_without_a_listener_or_a_healthy_probe_unless_it_says_disable_outbound_snat()
 {
    under_both(|hook: WithHook| {
        let mut lab = Frontends::new(hook, &[1, 1]);
        lab.subnet.insert(1, "defaultOutboundAccess: true".into());
        let rest = |rules: &str| format!("{ADDRESSES}{BY_DEFAULT}{}", balancer("vm1", rules));
        let edge = lab.start(&rest(&silent_rule("Tcp", "")));
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 53)).unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        let ask = |limit| udp_exchange(vm(&edge, 1), None, at(SERVER, 53), b"?", limit);
        assert_eq!(leaves_under(&edge, 1, &server), IpAddr::from(FRONTEND), "{hook:?}");
        ask(SOON).expect_err("a rule of TCP gives TCP ports alone");
        apply(&edge, &lab.yaml(&rest(&silent_rule("Udp", ""))));
        ask(LIMIT).unwrap();
        assert_eq!(udp.peers()[0].ip(), IpAddr::from(FRONTEND), "{hook:?}");
        has_no_way_out(&edge, &format!("{hook:?}: and one of UDP UDP ports"), 1, &server);

        apply(&edge, &lab.yaml(&rest(&silent_rule("Tcp", ", disableOutboundSnat: true"))));
        has_no_way_out(&edge, &format!("{hook:?}: not even default outbound"), 1, &server);
        assert_eq!(
            leaves_under(&edge, 2, &server),
            IpAddr::from(DEFAULT),
            "{hook:?}: which its neighbour has"
        );
        let both = silent_rule("Tcp", ", disableOutboundSnat: true") + OUTBOUND_RULE;
        apply(&edge, &lab.yaml(&rest(&both)));
        assert_eq!(leaves_under(&edge, 1, &server), IpAddr::from(FRONTEND), "{hook:?}: by an outbound rule");
        // A pool that no rule links to a frontend is as good as none.
        apply(&edge, &lab.yaml(&rest("")));
        assert_eq!(leaves_under(&edge, 1, &server), IpAddr::from(DEFAULT), "{hook:?}: no rule");
        check.end(&edge).unwrap();
    });
}
