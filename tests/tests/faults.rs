//! Whole or not at all (promise 3), shown on the daemon itself: whichever of its bpf(2) calls fails, the packets that come
//! afterwards are judged by the old policy, or all by the new one.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::{Intercept, TopologySpec, eventually, udp_socket};

const PATIENCE: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// What the two policies make of a new flow to a port: the first, the second.
const TABLE: [(u16, bool, bool); 4] =
    [(1001, true, false), (1002, false, true), (1004, false, false), (1003, true, true)];

/// One lab with both policies on disk.
struct Stage {
    edge: Edge,
    intercept: Intercept,
    files: [PathBuf; 2],
    servers: Vec<UdpSocket>,
    clients: u32,
}

impl Stage {
    fn start(hook: WithHook) -> Self {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        policy.subnet_group = Some("ports");
        let mut yaml = |of_second: bool| {
            let rule = |(n, (port, first, second)): (usize, (u16, bool, bool))| {
                let access = if if of_second { second } else { first } { "Allow" } else { "Deny" };
                format!(
                    "      - {{ name: p{port}, priority: {}, direction: Outbound, access: {access}, protocol: Udp, \
                     sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: {port} }}\n",
                    100 + n
                )
            };
            let rules: String = TABLE.into_iter().enumerate().map(rule).collect();
            policy.extra = format!("networkSecurityGroups:\n  - name: ports\n    securityRules:\n{rules}");
            // The second has a device more: programs are attached, host and routes are prepared.
            let mut spec = spec.clone();
            spec.guests.truncate(1 + usize::from(of_second));
            policy.yaml(&spec)
        };
        let policies = [yaml(false), yaml(true)];
        let mut edge = Edge::start(&spec, &policies[0]).unwrap();
        let intercept = Intercept::default();
        edge.daemon.kill();
        edge.daemon.spec_mut().intercept = Some(intercept.clone());
        edge.restart().unwrap();
        // In files of their own: the one that the daemon watches does not change.
        let names = ["first.yaml", "second.yaml"];
        let files = [0, 1].map(|n| edge.bpffs.scratch().write(names[n], &policies[n]).unwrap());
        let servers = TABLE.map(|(port, ..)| {
            let socket = udp_socket(edge.topology.internet(), (SERVER, port).into()).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        });
        let stage = Self { edge, intercept, files, servers: servers.into(), clients: 0 };
        assert!(stage.intercept.calls() > 100, "the daemon's calls are seen: {}", stage.intercept.calls());
        stage
    }

    /// Applies one of the policies; whether it came into force, and what was said.
    fn apply(&self, second: bool) -> (bool, String) {
        let file = self.files[usize::from(second)].to_str().unwrap();
        let (status, out, err) = self.edge.daemon.client(&["apply", file]).unwrap();
        (status.success(), out + &err)
    }

    /// New flows of the first guest are judged by one of the policies, wholly.
    fn judged_by(&mut self, second: bool, when: &str) {
        self.clients += 1;
        let word = format!("round {}", self.clients);
        let guest = self.edge.topology.guest("vm1");
        for (number, (port, ..)) in (0..).zip(TABLE) {
            let to: SocketAddr = (SERVER, port).into();
            // One that no round before had: its flow would live on, whatever the policy.
            let own = 10_000 + self.clients as u16 * TABLE.len() as u16 + number;
            let client = udp_socket(guest, (Ipv4Addr::UNSPECIFIED, own).into()).unwrap();
            client.send_to(word.as_bytes(), to).unwrap();
        }
        for ((port, of_first, of_second), server) in TABLE.into_iter().zip(&self.servers) {
            if if second { of_second } else { of_first } {
                let mut buffer = [0; 256];
                let (length, _) = server.recv_from(&mut buffer).unwrap_or_else(|error| {
                    panic!("{when}: port {port} was denied ({error}); {:?}", self.edge.reasons())
                });
                assert_eq!(String::from_utf8_lossy(&buffer[..length]), word, "{when}: port {port}");
            }
        }
        // The last of the table has arrived, so those before it would have, too.
        for ((port, ..), server) in TABLE.into_iter().zip(&self.servers) {
            server.set_nonblocking(true).unwrap();
            let more = server.recv_from(&mut [0; 256]);
            server.set_nonblocking(false).unwrap();
            assert_eq!(more.unwrap_err().kind(), ErrorKind::WouldBlock, "{when}: port {port} was allowed");
        }
    }

    /// What is attached where, as the kernel says.
    fn attached(&self) -> Vec<(String, String, String)> {
        let status = self.edge.ask(&["status"]).unwrap();
        let devices = status["devices"].as_array().unwrap().iter();
        let mut all: Vec<_> = devices
            .flat_map(|device| {
                let programs = device["programs"].as_array().unwrap().iter();
                programs
                    .map(|p| (device["name"].to_string(), p["hook"].to_string(), p["program"].to_string()))
            })
            .collect();
        all.sort();
        all
    }
}

fn every_call_of_an_apply(hook: WithHook) {
    let mut stage = Stage::start(hook);
    stage.judged_by(false, "before");
    let attached = stage.attached();
    let (mut failed, mut past_the_flip) = (0, 0);
    for n in 1.. {
        assert!(n < 2000, "never got through");
        stage.intercept.fail_nth(n);
        let (applied, said) = stage.apply(true);
        let struck = stage.intercept.struck();
        let when = format!("{hook:?}, call {n}, struck: {struck}, {}", said.trim_end());
        match (applied, struck) {
            (false, true) => {
                stage.judged_by(false, &when);
                assert_eq!(stage.attached(), attached, "{when}");
                failed += 1;
            }
            // After the flip, or a call of somebody else's in the daemon, who looks after ports or health.
            (true, true) => {
                stage.judged_by(true, &when);
                let (back, said) = stage.apply(false);
                assert!(back, "{when}: and back: {said}");
                stage.judged_by(false, &when);
                assert!(
                    eventually(PATIENCE, || stage.attached() == attached),
                    "{when}: {:?}, {attached:?}",
                    stage.attached()
                );
                past_the_flip += 1;
            }
            (true, false) => {
                stage.judged_by(true, &when);
                break;
            }
            (false, false) => panic!("{when}"),
        }
    }
    println!("{hook:?}: {failed} calls left the old policy in force, {past_the_flip} the new one");
    // Seven tables are made, seven filled, seven slots set; a device gets its programs.
    assert!(failed > 25, "{hook:?}: {failed}");
}

#[test]
fn whichever_call_of_an_apply_fails_packets_are_judged_by_the_old_policy_or_all_by_the_new_one_under_xdp() {
    every_call_of_an_apply(WithHook::Xdp);
}

#[test]
fn whichever_call_of_an_apply_fails_packets_are_judged_by_the_old_policy_or_all_by_the_new_one_under_tc() {
    every_call_of_an_apply(WithHook::Tc);
}

/// Programs are loaded and replaced under their links at a start. Each takes seconds, so it is a sample, the last calls whole.
#[test]
fn whichever_call_of_a_start_over_a_running_gateway_fails_packets_are_judged_as_before() {
    for hook in [WithHook::Xdp, WithHook::Tc] {
        let mut stage = Stage::start(hook);
        stage.judged_by(false, "before");
        let before = stage.intercept.calls();
        stage.edge.daemon.kill();
        stage.edge.restart().unwrap();
        let calls = stage.intercept.calls() - before;
        let sample =
            (1..=8).map(|part| calls * part / 9).chain((0..6).map(|back| calls.saturating_sub(back * 9)));
        let (mut failed, mut begun) = (0, 0);
        for n in sample {
            stage.edge.daemon.kill();
            stage.intercept.fail_nth(n.max(1));
            stage.edge.daemon.start().unwrap();
            let when = format!("{hook:?}, call {n} of {calls}");
            match stage.edge.daemon.wait_ready(6 * PATIENCE) {
                Ok(()) => begun += 1,
                Err(error) => {
                    assert!(!stage.edge.daemon.is_running(), "{when}: {error:#}");
                    failed += 1;
                }
            }
            stage.intercept.struck();
            stage.judged_by(false, &when);
        }
        println!("{hook:?}: {failed} of {} starts failed, {calls} calls in one", failed + begun);
        assert!(failed > 5, "{hook:?}: {failed}");
        stage.edge.daemon.kill();
        stage.edge.restart().unwrap();
        stage.judged_by(false, "started in the end");
        assert!(stage.apply(true).0, "{hook:?}");
        stage.judged_by(true, "in the end");
    }
}
