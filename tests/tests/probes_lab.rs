//! Health probes with the daemon and real servers, under XDP and under TC: they come from 168.63.129.16, pass the groups,
//! and what they find decides about new flows only.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{HttpServer, TcpEcho, TopologySpec, eventually, ping, tcp_connect};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, echoes};
use serde_json::Value;

const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Above the interval of 5 s, with a threshold of 1 and some patience.
const FOUND_OUT: Duration = Duration::from_secs(12);

fn policy(hook: WithHook, spec: &TopologySpec, rules: &str) -> String {
    let mut policy = LabPolicy::new(hook);
    policy.extra = format!(
        "networkSecurityGroups: [{{ name: web, securityRules: [{rules}{{ name: In, priority: 200, direction: Inbound, access: Allow, protocol: Tcp, sourceAddressPrefix: Internet, destinationAddressPrefix: '*', destinationPortRange: 8081 }}] }}]\n"
    );
    policy.subnet_group = Some("web");
    policy.yaml(spec).replace(
        "uplinks:",
        "    probes: [{ name: alive, protocol: Http, port: 8080, requestPath: /health, intervalInSeconds: 5, probeThreshold: 1 }]\n    \
         loadBalancingRules: [{ name: echo, frontendIPConfiguration: fe, backendAddressPool: pool, protocol: Tcp, frontendPort: 80, backendPort: 8081, probe: alive, disableOutboundSnat: true }]\nuplinks:",
    )
}

/// State and reason of each backend.
fn backends(edge: &Edge) -> BTreeMap<String, (String, String)> {
    let status = edge.ask(&["status"]).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rules = status["balanced"].as_array().unwrap();
    let all = rules.iter().flat_map(|rule| rule["backends"].as_array().unwrap());
    all.map(|backend| {
        let name = text(&backend["name"]);
        (name.split('/').next().unwrap().to_owned(), (text(&backend["state"]), text(&backend["why"])))
    })
    .collect()
}

fn is(edge: &Edge, guest: &str, state: &str, why: &str) -> bool {
    backends(edge).get(guest).is_some_and(|(s, w)| s == state && w == why)
}

/// Opens connections from the world to the frontend; how many each echo server got.
fn spread(edge: &Edge, servers: &[TcpEcho; 2], count: usize) -> [usize; 2] {
    let before = servers.each_ref().map(|server| server.peers().len());
    for _ in 0..count {
        let mut stream = tcp_connect(edge.topology.internet(), None, at(FRONTEND, 80), LIMIT).unwrap();
        assert!(echoes(&mut stream, LIMIT));
    }
    let after = servers.each_ref().map(|server| server.peers().len());
    [after[0] - before[0], after[1] - before[1]]
}

/// A connection that the second server got.
fn to_the_second(edge: &Edge, servers: &[TcpEcho; 2]) -> TcpStream {
    for _ in 0..64 {
        let before = servers[1].peers().len();
        let mut stream = tcp_connect(edge.topology.internet(), None, at(FRONTEND, 80), LIMIT).unwrap();
        assert!(echoes(&mut stream, LIMIT));
        if servers[1].peers().len() > before {
            return stream;
        }
    }
    panic!("64 connections and none to the second server");
}

#[test]
fn a_failed_probe_stops_new_flows_only_and_a_group_that_blocks_probes_is_named() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let spec = TopologySpec::clean_veth(2);
        let mut edge = Edge::start(&spec, &policy(hook, &spec, "")).unwrap();
        let guests = ["vm1", "vm2"];
        let address = |number: u8| Ipv4Addr::new(10, 0, 0, 3 + number);
        for guest in guests {
            ping(edge.topology.guest(guest), IpAddr::V4(SERVER), 1, SOON).unwrap();
        }
        let (vm1, vm2) = (edge.topology.guest("vm1").clone(), edge.topology.guest("vm2").clone());
        let health = [
            HttpServer::start(&vm1, at(address(1), 8080), "ok").unwrap(),
            HttpServer::start(&vm2, at(address(2), 8080), "ok").unwrap(),
        ];
        let echo = [
            TcpEcho::start(&vm1, at(address(1), 8081)).unwrap(),
            TcpEcho::start(&vm2, at(address(2), 8081)).unwrap(),
        ];
        // Before the servers were there a probe may have failed.
        let both_up = |edge: &Edge| guests.iter().all(|guest| is(edge, guest, "up", ""));
        let probed = || health.iter().all(|server| !server.requests().is_empty());
        assert!(eventually(FOUND_OUT, || probed() && both_up(&edge)), "{hook:?}: {:?}", backends(&edge));
        for server in &health {
            let (peer, path) = server.requests()[0].clone();
            let expected = (IpAddr::from([168, 63, 129, 16]), "GET /health HTTP/1.1");
            assert_eq!((peer.ip(), path.as_str()), expected, "{hook:?}");
        }
        let [first, second] = spread(&edge, &echo, 40);
        assert!(first > 0 && second > 0, "{hook:?}: {first} and {second}");
        let mut held = to_the_second(&edge, &echo);
        let generation = edge.generation().unwrap();

        health[1].set_status(503);
        assert!(
            eventually(FOUND_OUT, || is(&edge, "vm2", "down", "HTTP 503")),
            "{hook:?}: {:?}",
            backends(&edge)
        );
        // Written a moment after it is known.
        let out = || spread(&edge, &echo, 40) == [40, 0];
        assert!(eventually(LIMIT, out), "{hook:?}: no new flow goes to a backend that is down");
        assert!(echoes(&mut held, LIMIT), "{hook:?}: an established flow stays");
        assert_eq!(edge.generation().unwrap(), generation, "{hook:?}: in place, without a new generation");

        // A daemon that starts again knows it at once, and gives no window to the dead backend.
        edge.daemon.terminate().unwrap();
        assert_eq!(spread(&edge, &echo, 10), [10, 0], "{hook:?}: the datapath goes on");
        edge.restart().unwrap();
        assert!(is(&edge, "vm2", "down", "HTTP 503"), "{hook:?}: {:?}", backends(&edge));
        assert_eq!(spread(&edge, &echo, 10), [10, 0], "{hook:?}: after a restart");
        assert!(echoes(&mut held, LIMIT), "{hook:?}: an established flow stays over a restart");

        health[1].set_status(200);
        assert!(eventually(FOUND_OUT, || is(&edge, "vm2", "up", "")), "{hook:?}: {:?}", backends(&edge));
        let back = || spread(&edge, &echo, 40).iter().all(|flows| *flows > 0);
        assert!(eventually(LIMIT, back), "{hook:?}: after it came back");

        let deny = "{ name: NoProbes, priority: 100, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: AzureLoadBalancer, destinationAddressPrefix: 10.0.0.4, destinationPortRange: '*' }, ";
        apply(&edge, &policy(hook, &spec, deny));
        let why = "no answer: a rule denies it: web/Inbound/NoProbes";
        let found = eventually(FOUND_OUT, || is(&edge, "vm1", "down", why));
        assert!(found, "{hook:?}: {:?}", backends(&edge));
        let warnings = edge.ask(&["status"]).unwrap()["warnings"].to_string();
        assert!(warnings.contains("web/Inbound/NoProbes denies health probes"), "{hook:?}: {warnings}");
        let out = || spread(&edge, &echo, 20) == [0, 20];
        assert!(eventually(LIMIT, out), "{hook:?}: the guest that cannot be probed is out");

        // The device comes and goes with the policy's probes, and goes with `down`.
        let gateway = edge.topology.gateway().clone();
        let device = || gateway.ip("link show pcprobe1").is_ok();
        assert!(device(), "{hook:?}");
        let unprobed = policy(hook, &spec, "").replace(" probe: alive,", "");
        let (applied, said) = edge.apply(&unprobed).unwrap();
        assert!(applied && !said.contains("pcprobe"), "{hook:?}: {said}");
        assert!(!device() && is(&edge, "vm1", "notProbed", ""), "{hook:?}: {:?}", backends(&edge));
        let [first, second] = spread(&edge, &echo, 40);
        assert!(first > 0 && second > 0, "{hook:?}: {first} and {second} without a probe");
        apply(&edge, &policy(hook, &spec, ""));
        let before = health[0].requests().len();
        assert!(device() && eventually(FOUND_OUT, || health[0].requests().len() > before), "{hook:?}");
        edge.daemon.down().unwrap();
        assert!(eventually(LIMIT, || !device()), "{hook:?}: gone with down");
        let _ = held.write_all(b"x").and_then(|()| held.read(&mut [0; 1]));
    }
}
