//! Ending live flows by hand: `portcullis flows kill` and `flows flush`, of IPv4 and of IPv6.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{
    TcpEcho, TcpHold, Topology, TopologySpec, UdpEcho, eventually, ping, tcp_exchange, udp_exchange,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    (address.into(), port).into()
}

fn start(hook: WithHook) -> Edge {
    let spec = TopologySpec::clean_veth(2);
    let edge = Edge::start(&spec, &LabPolicy::new(hook).yaml(&spec)).unwrap();
    for guest in ["vm1", "vm2"] {
        assert!(ping(edge.topology.guest(guest), SERVER.into(), 2, LIMIT).unwrap().received > 0);
    }
    edge
}

fn listed(edge: &Edge) -> Vec<Value> {
    edge.ask(&["flows"]).unwrap()["flows"].as_array().unwrap().clone()
}

/// UDP ports of a guest in use.
fn udp_ports(edge: &Edge, guest: &str) -> u64 {
    let answer = edge.ask(&["snat"]).unwrap();
    let rows = answer["guests"].as_array().unwrap();
    let row = rows.iter().find(|row| row["guest"].as_str().unwrap().starts_with(guest)).unwrap();
    let udp = row["ports"].as_array().unwrap().iter().filter(|on| on["protocol"] == "udp");
    // A socket that is quiet has its port still.
    udp.map(|on| on["used"].as_u64().unwrap() + on["holding"].as_u64().unwrap()).sum()
}

#[test]
fn a_killed_flow_is_a_stranger_at_its_next_packet_and_the_others_live_on() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let edge = start(hook);
        let _server = TcpEcho::start(edge.topology.internet(), at(SERVER, 9000)).unwrap();
        let mut held = TcpHold::open(edge.topology.guest("vm1"), at(SERVER, 9000), 3, LIMIT).unwrap();
        assert_eq!(held.alive(LIMIT), 3);
        let victim = held.locals()[1].to_string();

        let dry = edge.ask(&["flows", "kill", "--from", &victim, "--dry-run"]).unwrap();
        assert_eq!((dry["flowsEnded"].as_u64(), dry["dryRun"].as_bool()), (Some(1), Some(true)), "{dry}");
        assert_eq!(held.alive(LIMIT), 3, "{hook:?}: a dry run ends nothing");

        let strangers = edge.reason("no_flow").unwrap();
        let killed =
            edge.ask(&["flows", "kill", "--from", &victim, "--protocol", "tcp", "--guest", "vm1"]).unwrap();
        assert_eq!(killed["flowsEnded"], 1, "{killed}");
        let flow = &killed["flows"][0];
        assert_eq!(
            (flow["source"].as_str(), flow["destinationPort"].as_u64()),
            (Some("10.0.0.4"), Some(9000))
        );
        assert_eq!(held.alive(LIMIT), 2, "{hook:?}: that flow is dead and no other");
        assert!(edge.reason("no_flow").unwrap() > strangers, "{hook:?}: its packets are dropped by name");
        let gone = |flow: &Value| format!("10.0.0.4:{}", flow["sourcePort"]) == victim;
        assert!(!listed(&edge).iter().any(gone), "{hook:?}: it is listed no more");

        // Its own port is the dead connection's until the guest gives up; another one is as good.
        let again =
            tcp_exchange(edge.topology.guest("vm1"), None, at(SERVER, 9000), b"again", LIMIT).unwrap();
        assert_eq!(again.local.ip(), GUEST, "{hook:?}: whoever may open a flow opens a new one");
    }
}

#[test]
fn a_flush_gives_udp_ports_back_and_of_one_guest_it_leaves_the_other_alone() {
    let edge = start(WithHook::Tc);
    let _tcp = TcpEcho::start(edge.topology.internet(), at(SERVER, 9000)).unwrap();
    let udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 9001)).unwrap();
    let mut first = TcpHold::open(edge.topology.guest("vm1"), at(SERVER, 9000), 2, LIMIT).unwrap();
    let mut second = TcpHold::open(edge.topology.guest("vm2"), at(SERVER, 9000), 2, LIMIT).unwrap();
    for guest in ["vm1", "vm2"] {
        udp_exchange(edge.topology.guest(guest), Some(5353), udp.address(), b"?", LIMIT).unwrap();
        assert_eq!(udp_ports(&edge, guest), 1);
    }

    let killed = edge.ask(&["flows", "kill", "--guest", "vm1", "--protocol", "udp"]).unwrap();
    assert_eq!((killed["flowsEnded"].as_u64(), killed["mappingsEnded"].as_u64()), (Some(1), Some(0)));
    assert_eq!(udp_ports(&edge, "vm1"), 1, "the mapping behind a killed flow stays until it is idle");

    let flushed = edge.ask(&["flows", "flush", "--guest", "vm1"]).unwrap();
    // Two connections and the ping; the mappings of the UDP socket and of the ping.
    assert_eq!((flushed["flowsEnded"].as_u64(), flushed["mappingsEnded"].as_u64()), (Some(3), Some(2)));
    assert_eq!((udp_ports(&edge, "vm1"), udp_ports(&edge, "vm2")), (0, 1));
    assert_eq!((first.alive(SOON), second.alive(LIMIT)), (0, 2));

    let told = edge.daemon.ask_text(&["flows", "flush"]).unwrap();
    assert!(told.contains("4 flows and 2 mappings ended"), "{told}");
    assert!(listed(&edge).is_empty());
    assert_eq!(second.alive(SOON), 0);
    assert_eq!(udp_ports(&edge, "vm2"), 0);
    // The same socket gets a port again once the grace is over.
    udp_exchange(edge.topology.guest("vm1"), Some(5353), udp.address(), b"?", LIMIT).unwrap();
    edge.ask(&["flows", "flush"]).unwrap();
    let flushed_at = Instant::now();
    let again = || {
        udp_exchange(edge.topology.guest("vm1"), Some(5353), udp.address(), b"?", Duration::from_millis(20))
    };
    assert!(eventually(LIMIT, || again().is_ok()));
    println!("the same UDP socket is served again {} ms after the flush", flushed_at.elapsed().as_millis());
    assert_eq!(udp_ports(&edge, "vm1"), 1);
}

#[test]
fn what_selects_nothing_or_makes_no_sense_is_refused_with_code_2() {
    let edge = start(WithHook::Tc);
    for (arguments, said) in [
        (&["flows", "kill"][..], "say which flows"),
        (&["flows", "kill", "--dry-run"], "say which flows"),
        (&["flows", "kill", "--guest", "vm9"], "there is no guest `vm9`"),
        (&["flows", "flush", "--guest", "vm9"], "there is no guest `vm9`"),
        (&["flows", "kill", "--to", "nowhere"], "is no address"),
        (&["flows", "kill", "--protocol", "sctp"], "is no protocol"),
    ] {
        let (status, out, err) = edge.daemon.client(arguments).unwrap();
        assert_eq!((status.code(), out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(err.contains(said), "{arguments:?}: {err}");
    }
    assert!(!listed(&edge).is_empty(), "the pings' flows are still there");
}

const POLICY6: &str = r#"
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16, "fd00:1::/48"] }
    subnets: [{ name: guests, addressPrefixes: [10.0.0.0/24, "fd00:1::/64"] }]
networkInterfaces:
  - name: vm1
    device: pc-vm1
    hook: HOOK
    ipConfigurations: [{ name: v4, subnet: guests, privateIPAddress: 10.0.0.4 }, { name: v6, subnet: guests, privateIPAddress: "fd00:1::4" }]
  - name: vm2
    device: pc-vm2
    hook: HOOK
    ipConfigurations: [{ name: v4, subnet: guests, privateIPAddress: 10.0.0.5 }, { name: v6, subnet: guests, privateIPAddress: "fd00:1::5" }]
uplinks: [{ device: pc-up, hook: HOOK }]
"#;

fn start6(hook: WithHook) -> Edge {
    let topology = Topology::build(&TopologySpec::clean_veth(2)).unwrap();
    topology.gateway().set_sysctl("net.ipv6.conf.all.disable_ipv6", "0").unwrap();
    for (guest, address) in [("vm1", "fd00:1::4"), ("vm2", "fd00:1::5")] {
        let guest = topology.guest(guest);
        guest.set_sysctl("net.ipv6.conf.all.disable_ipv6", "0").unwrap();
        guest.ip(&format!("address add {address}/64 dev eth0 nodad")).unwrap();
    }
    Edge::start_in(topology, &POLICY6.replace("HOOK", hook.word())).unwrap()
}

#[test]
fn a_flow_of_ipv6_is_listed_counted_and_killed_like_any_other() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let edge = start6(hook);
        let [first, second]: [IpAddr; 2] = ["fd00:1::4", "fd00:1::5"].map(|text| text.parse().unwrap());
        let (vm1, vm2) = (edge.topology.guest("vm1"), edge.topology.guest("vm2"));
        assert!(eventually(LIMIT, || ping(vm1, second, 1, SOON).unwrap().received == 1), "{hook:?}");
        let _server = TcpEcho::start(vm2, at(second, 9000)).unwrap();
        let mut held = TcpHold::open(vm1, at(second, 9000), 2, LIMIT).unwrap();
        assert_eq!(held.alive(LIMIT), 2, "{hook:?}");

        let flows = listed(&edge);
        let tcp: Vec<&Value> = flows.iter().filter(|flow| flow["protocol"] == "tcp").collect();
        assert_eq!(tcp.len(), 2, "{hook:?}: {flows:?}");
        assert_eq!(
            (tcp[0]["source"].as_str(), tcp[0]["destination"].as_str()),
            (Some("fd00:1::4"), Some("fd00:1::5"))
        );
        assert_eq!(
            (tcp[0]["fromGuest"].as_str(), tcp[0]["toGuest"].as_str()),
            (Some("vm1/v6"), Some("vm2/v6"))
        );
        assert!(flows.iter().any(|flow| flow["protocol"] == "icmp6"), "{hook:?}: the ping");
        let text = edge.daemon.ask_text(&["flows"]).unwrap();
        assert!(text.contains("[fd00:1::5]:9000"), "{text}");
        let status = edge.ask(&["status"]).unwrap();
        assert_eq!(
            (status["flowsIPv6"]["live"].as_u64(), status["flows"]["live"].as_u64()),
            (Some(flows.len() as u64), Some(0))
        );
        assert_eq!(status["flowsIPv6"]["capacity"], 65_536);
        let swept = edge.wait(|edge| {
            let status = edge.ask(&["status"]).ok()?;
            (status["reaper"]["ipv6"]["live"].as_u64()? == 2 * flows.len() as u64).then_some(())
        });
        assert!(swept.is_some(), "{hook:?}: the reaper sees both halves of each");

        let strangers = edge.reason("no_flow").unwrap();
        let victim = held.locals()[0].to_string();
        let killed = edge.ask(&["flows", "kill", "--from", &victim, "--to", "[fd00:1::5]:9000"]).unwrap();
        assert_eq!(killed["flowsEnded"], 1, "{killed}");
        assert_eq!(held.alive(LIMIT), 1, "{hook:?}");
        assert!(edge.reason("no_flow").unwrap() > strangers, "{hook:?}");
        let drops = edge.ask(&["drops"]).unwrap();
        let recent = drops["recent"].as_array().unwrap();
        let told = recent.iter().any(|drop| {
            let ends = [drop["source"].as_str().unwrap(), drop["destination"].as_str().unwrap()];
            drop["reason"] == "no_flow" && ends.contains(&"fd00:1::4") && ends.contains(&"fd00:1::5")
        });
        assert!(told, "{hook:?}: {recent:?}");
        assert_eq!(edge.ask(&["flows", "flush"]).unwrap()["flowsEnded"], flows.len() - 1);
        let again = tcp_exchange(vm1, None, at(second, 9000), b"again", LIMIT).unwrap();
        assert_eq!(again.local.ip(), first, "{hook:?}");
    }
}

#[test]
fn the_host_and_its_guests_of_ipv6_reach_each_other_and_down_leaves_no_trace() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let mut edge = start6(hook);
        let addresses =
            |edge: &Edge| edge.topology.gateway().ip("-6 addr show dev pc-vm1 scope global").unwrap();
        assert!(addresses(&edge).contains("fd00:1::1/128"), "{}", addresses(&edge));
        for guest in ["fd00:1::4", "fd00:1::5"] {
            let guest: IpAddr = guest.parse().unwrap();
            let reached =
                eventually(LIMIT, || ping(edge.topology.gateway(), guest, 1, SOON).unwrap().received == 1);
            assert!(reached, "{hook:?}: the host reaches {guest}");
        }
        let gateway: IpAddr = "fd00:1::1".parse().unwrap();
        let answered =
            eventually(LIMIT, || ping(edge.topology.guest("vm1"), gateway, 1, SOON).unwrap().received == 1);
        assert!(answered, "{hook:?}: a guest reaches its gateway");
        assert_eq!(edge.topology.gateway().sysctl("net.ipv6.conf.all.forwarding").unwrap(), "0");
        edge.daemon.down().unwrap();
        assert!(!addresses(&edge).contains("fd00:1::1"), "{}", addresses(&edge));
        let routes = edge.topology.gateway().ip("-6 route show").unwrap();
        assert!(!routes.contains("fd00:1::4"), "{routes}");
    }
}
