//! The profile `rfc` with real sockets, under XDP and under TC, and what a third party says of it: coturn's natdiscovery, which asks
//! a STUN server with two addresses how it is seen (RFC 5780).

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use portcullis_tests::edge::{Edge, HookCheck, WithHook, under_both};
use portcullis_tests::frontends::{FRONTEND, Frontends};
use portcullis_tests::lab::{Namespace, ProcessGuard, TcpEcho, eventually, tcp_connect, tcp_exchange};
use portcullis_tests::site::{LIMIT, SERVER, SOON, apply, at, private};

/// Beside [`SERVER`], another address of the STUN server's.
const SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const PATIENCE: Duration = Duration::from_secs(30);

/// vm1 has no group, vm2 one that lets no stranger in.
const REST: &str = "
networkSecurityGroups: [{ name: closed, securityRules: [] }]
publicIPAddresses: [{ name: pip-lb, ipAddress: 203.0.113.10, announce: proxy }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip-lb }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 64 }]
";

fn with(profile: &str) -> String {
    format!("{REST}snat: {{ profile: {profile} }}\n")
}

fn start(hook: WithHook, profile: &str) -> (Frontends, Edge) {
    let mut lab = Frontends::new(hook, &[1, 2]);
    lab.subnet.insert(2, "networkSecurityGroup: closed".into());
    let edge = lab.start(&with(profile));
    (lab, edge)
}

/// A STUN server with two addresses and two ports of each.
struct Stun {
    _server: ProcessGuard,
    files: std::path::PathBuf,
}

impl Stun {
    fn start(world: &Namespace) -> Self {
        let files = std::env::temp_dir().join(format!("portcullis-stun-{}", std::process::id()));
        std::fs::create_dir_all(&files).unwrap();
        let (pid, data) = (files.join("pid"), files.join("data"));
        let (first, second) = (SERVER.to_string(), SECOND.to_string());
        // No configuration, no relaying, no other transport than UDP.
        let server = world.spawn(&[
            "turnserver",
            "-n",
            "--stun-only",
            "--no-cli",
            "--no-tls",
            "--no-dtls",
            "--no-tcp",
            "--listening-ip",
            &first,
            "--listening-ip",
            &second,
            "--listening-port",
            "3478",
            "--alt-listening-port",
            "3479",
            "--log-file",
            "stdout",
            "--pidfile",
            pid.to_str().unwrap(),
            "--userdb",
            data.to_str().unwrap(),
        ]);
        let stun = Self { _server: server.unwrap(), files };
        let up = || asked(world, "-m").is_ok_and(|said| said.iter().any(|word| word.contains("Mapping")));
        assert!(eventually(PATIENCE, up), "the server answers");
        stun
    }
}

impl Drop for Stun {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.files);
    }
}

/// What natdiscovery says about the way from a namespace to the world, every sentence once.
fn asked(from: &Namespace, what: &str) -> anyhow::Result<Vec<String>> {
    let output = from.run(&["turnutils_natdiscovery", what, "-p", "3478", &SERVER.to_string()])?;
    let mut said: Vec<String> =
        output.lines().filter(|line| line.contains("NAT")).map(str::to_owned).collect();
    said.dedup();
    Ok(said)
}

fn says(from: &Namespace, what: &str) -> Vec<String> {
    asked(from, what).unwrap()
}

#[test]
fn natdiscovery_says_that_mapping_is_endpoint_independent_and_filtering_what_profile_and_groups_make_it() {
    under_both(|hook| {
        let (lab, edge) = start(hook, "rfc");
        let (open, closed) = (edge.topology.guest("vm1"), edge.topology.guest("vm2"));
        let _stun = Stun::start(edge.topology.internet());
        let check = HookCheck::begin(&edge, hook).unwrap();
        let what = format!("{hook:?}");
        for guest in [open, closed] {
            assert_eq!(says(guest, "-m"), ["NAT with Endpoint Independent Mapping!"], "{what}");
        }
        assert_eq!(says(open, "-f"), ["NAT with Endpoint Independent Filtering!"], "{what}");
        assert_eq!(says(closed, "-f"), ["NAT with Address and Port Dependent Filtering!"], "{what}");
        check.end(&edge).unwrap();

        apply(&edge, &lab.yaml(&with("azure")));
        assert_eq!(
            says(open, "-m"),
            ["NAT with Endpoint Independent Mapping!"],
            "{what}: of UDP also by azure"
        );
        assert_eq!(says(open, "-f"), ["NAT with Address and Port Dependent Filtering!"], "{what}");
    });
}

#[test]
fn in_rfc_connections_of_one_local_port_leave_under_one_public_port_at_which_others_reach_its_socket() {
    under_both(|hook| {
        let (lab, edge) = start(hook, "rfc");
        let (guest, closed, world) =
            (edge.topology.guest("vm1"), edge.topology.guest("vm2"), edge.topology.internet());
        let servers = [SERVER, SECOND].map(|address| TcpEcho::start(world, at(address, 80)).unwrap());
        let check = HookCheck::begin(&edge, hook).unwrap();
        let what = format!("{hook:?}");
        let mut live = Vec::new();
        let mut mapped = |from: &Namespace| -> SocketAddr {
            let met = servers.each_ref().map(|server| {
                let before = server.peers().len();
                live.push(tcp_connect(from, Some(5000), server.address(), LIMIT).unwrap());
                assert!(eventually(PATIENCE, || server.peers().len() > before));
                *server.peers().last().unwrap()
            });
            assert_eq!(met[0], met[1], "{what}: one port towards both");
            met[0]
        };
        let outside = [mapped(guest), mapped(closed)];
        assert_eq!(outside.map(|met| met.ip()), [IpAddr::from(FRONTEND); 2], "{what}");
        let inside = [(guest, private(1, 1)), (closed, private(2, 2))];
        let _listening = inside.map(|(guest, address)| TcpEcho::start(guest, at(address, 5000)).unwrap());

        // A third party, by the mapping: to the guest without a group, and not to the other.
        tcp_exchange(world, None, outside[0], b"are you there", LIMIT)
            .unwrap_or_else(|error| panic!("{what}: {error}; {:?}", edge.reasons()));
        let denied = edge.reason("denied_by_rule").unwrap();
        let refused = tcp_exchange(world, None, outside[1], b"and you", SOON).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut, "{what}");
        assert_eq!(edge.reason("denied_by_rule").unwrap(), denied + 1, "{what}");

        check.end(&edge).unwrap();
        // Its neighbour too, out and in again, which XDP leaves to TC.
        tcp_exchange(closed, None, outside[0], b"neighbour", LIMIT)
            .unwrap_or_else(|error| panic!("{what}: {error}; {:?}", edge.reasons()));

        apply(&edge, &lab.yaml(&with("azure")));
        let missed = edge.reason("no_flow").unwrap();
        let refused = tcp_exchange(world, None, outside[0], b"still", SOON).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut, "{what}");
        assert_eq!(edge.reason("no_flow").unwrap(), missed + 1, "{what}");
    });
}
