//! The gateway through its life: start, end by either signal, start over what is running, change of policy, and the way out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use ipnet::IpNet;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::{
    Frame, GuestEnd, Namespace, Sniffer, TcpEcho, Topology, TopologySpec, UdpEcho, eventually, ping,
    tcp_connect, tcp_exchange, udp_exchange, udp_socket,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn yaml(hook: WithHook, spec: &TopologySpec, extra: &str) -> String {
    let mut policy = LabPolicy::new(hook);
    policy.extra = extra.into();
    policy.yaml(spec)
}

/// New flows of every kind from a guest.
fn everything_works(edge: &Edge, guest: &str, when: &str) {
    let guest = edge.topology.guest(guest);
    let pinged = ping(guest, SERVER.into(), 3, LIMIT).unwrap();
    assert_eq!(pinged.received, 3, "{when}: {pinged:?}");
    tcp_exchange(guest, None, at(SERVER, 80), b"a new connection", LIMIT)
        .unwrap_or_else(|error| panic!("{when}: TCP: {error}"));
    udp_exchange(guest, None, at(SERVER, 53), b"a new question", LIMIT)
        .unwrap_or_else(|error| panic!("{when}: UDP: {error}"));
}

/// Sends data on an open connection to an echo server and reads it back.
fn still_alive(stream: &mut TcpStream, data: &[u8], when: &str) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(data).unwrap_or_else(|error| panic!("{when}: {error}"));
    let mut echoed = vec![0; data.len()];
    stream.read_exact(&mut echoed).unwrap_or_else(|error| panic!("{when}: {error}"));
    assert_eq!(echoed, data, "{when}");
}

/// A guest that never stops sending datagrams until this is dropped.
struct Chatter {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Chatter {
    fn start(guest: &Namespace) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let socket = udp_socket(guest, at(Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Told of errors, and not interested.
                if socket.send_to(b"chatter", at(SERVER, 9)).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                // The rate of the sender, which waits for nothing.
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self { stop, sent, thread: Some(thread) }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Chatter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn is_leak(frame: &Frame) -> bool {
    let private: IpNet = "10.0.0.0/8".parse().unwrap();
    frame.ip.as_ref().is_some_and(|ip| private.contains(&ip.source))
        || frame.arp.is_some_and(|arp| private.contains(&IpAddr::from(arp.sender)))
}

/// Waits until a guest's device has the gateway's address and says whether the uplink has its guard and the guest its programs at that moment; `None`
/// if it did not come, or on kernels without tcx.
fn guarded_when_guests_find_the_gateway(gateway: &Namespace) -> JoinHandle<Option<bool>> {
    let gateway = gateway.clone();
    std::thread::spawn(move || {
        gateway.enter(|| {
            let deadline = Instant::now() + 2 * LIMIT;
            while Instant::now() < deadline {
                // As fast as it can: the moment between the two is what is looked for.
                let is_gateway = |interface: InterfaceAddress| {
                    interface.interface_name == "pc-vm1"
                        && interface
                            .address
                            .is_some_and(|a| a.as_sockaddr_in().is_some_and(|a| a.ip() == GATEWAY))
                };
                if getifaddrs().unwrap().any(is_gateway) {
                    let runs = |device: &str, side, name: &str| {
                        let (_, programs) = SchedClassifier::query_tcx(device, side).ok()?;
                        Some(programs.iter().any(|program| program.name_as_str() == Some(name)))
                    };
                    return Some(
                        runs("pc-up", TcAttachType::Egress, "pc_guard")?
                            && runs("pc-vm1", TcAttachType::Ingress, "pc_tc")?
                            && runs("pc-vm1", TcAttachType::Egress, "pc_host")?,
                    );
                }
            }
            None
        })
    })
}

#[test]
fn a_stopped_or_killed_daemon_leaves_the_gateway_working_and_nothing_private_gets_out_although_the_host_forwards()
 {
    for hook in BOTH {
        let spec = TopologySpec::clean_veth(2);
        let topology = Topology::build(&spec).unwrap();
        let gateway = topology.gateway();
        gateway.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
        gateway.set_sysctl("net.ipv4.conf.all.forwarding", "1").unwrap();
        let internet = topology.internet();
        let (_tcp, _udp) = (
            TcpEcho::start(internet, at(SERVER, 80)).unwrap(),
            UdpEcho::start(internet, at(SERVER, 53)).unwrap(),
        );
        let leaks = Sniffer::start_filtered(internet, "eth0", is_leak).unwrap();
        // Asks for its gateway all the time, so that no moment of the start is missed.
        topology.guest("vm1").set_sysctl("net.ipv4.neigh.eth0.retrans_time_ms", "2").unwrap();
        let chatter = Chatter::start(topology.guest("vm1"));
        assert!(eventually(LIMIT, || chatter.sent() > 100));
        let none = |when: &str| {
            assert!(
                leaks.frames().is_empty(),
                "{hook:?}, {when}: {} leaked, first {:?}",
                leaks.frames().len(),
                leaks.frames()[0]
            );
            assert_eq!(leaks.lost(), 0, "{hook:?}, {when}: the sniffer saw everything");
        };
        none("before the start");

        let guarded = guarded_when_guests_find_the_gateway(topology.gateway());
        let mut edge = Edge::start_in(topology, &yaml(hook, &spec, "")).unwrap();
        assert_ne!(
            guarded.join().unwrap(),
            Some(false),
            "{hook:?}: guard and groups come before a guest's gateway address"
        );
        none("at the start");
        everything_works(&edge, "vm2", &format!("{hook:?}, running"));
        assert!(edge.daemon.terminate().unwrap().success(), "{hook:?}: SIGTERM is an orderly end");
        everything_works(&edge, "vm2", &format!("{hook:?}, after SIGTERM"));
        none("after SIGTERM");
        edge.restart().unwrap();
        everything_works(&edge, "vm2", &format!("{hook:?}, started again"));
        none("started again");
        edge.daemon.kill();
        everything_works(&edge, "vm2", &format!("{hook:?}, after SIGKILL"));
        everything_works(&edge, "vm1", &format!("{hook:?}, after SIGKILL"));
        none("after SIGKILL");
        edge.restart().unwrap();
        let check = HookCheck::begin(&edge, hook).unwrap();
        everything_works(&edge, "vm2", &format!("{hook:?}, started after SIGKILL"));
        check.end(&edge).unwrap();
        let before = chatter.sent();
        assert!(eventually(LIMIT, || chatter.sent() > before + 100), "the guest has talked all the time");
        none("in the end");
    }
}

#[test]
fn a_new_start_adopts_the_running_datapath_and_open_connections_keep_their_port() {
    for hook in BOTH {
        let spec = TopologySpec::clean_veth(1);
        let mut edge = Edge::start(&spec, &yaml(hook, &spec, "")).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let _udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 53)).unwrap();
        assert_eq!(edge.ask(&["status"]).unwrap()["adopted"], false, "{hook:?}");
        let mut generation = edge.generation().unwrap();
        let mut stream = tcp_connect(edge.topology.guest("vm1"), None, at(SERVER, 80), LIMIT).unwrap();
        still_alive(&mut stream, b"before", "before");
        let public = server.peers()[0];
        let wire = edge.topology.sniff_internet().unwrap();
        for killed in [true, false] {
            if killed {
                edge.daemon.kill();
            } else {
                edge.daemon.terminate().unwrap();
            }
            still_alive(&mut stream, b"without a daemon", &format!("{hook:?}, dead, killed: {killed}"));
            edge.restart().unwrap();
            wire.clear();
            still_alive(&mut stream, b"with a new daemon", &format!("{hook:?}, adopted, killed: {killed}"));
            let carried =
                wire.frames().into_iter().filter(|f| f.payload() == b"with a new daemon" && !f.outgoing);
            let sources: Vec<_> = carried.filter_map(|frame| frame.source()).collect();
            assert_eq!(sources, [public], "{hook:?}: the port stays");
            let status = edge.ask(&["status"]).unwrap();
            assert_eq!(status["adopted"], true, "{hook:?}: {status}");
            assert!(edge.generation().unwrap() > generation, "{hook:?}: {status}");
            generation = edge.generation().unwrap();
            assert!(edge.owns("vm1", public.port()).unwrap(), "{hook:?}");
            let check = HookCheck::begin(&edge, hook).unwrap();
            everything_works(&edge, "vm1", &format!("{hook:?}, adopted"));
            check.end(&edge).unwrap();
        }
    }
}

#[test]
fn a_policy_with_errors_changes_nothing_and_says_where_they_are() {
    for hook in BOTH {
        let spec = TopologySpec::clean_veth(1);
        let good = yaml(hook, &spec, "");
        let edge = Edge::start(&spec, &good).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let _udp = UdpEcho::start(edge.topology.internet(), at(SERVER, 53)).unwrap();
        let mut stream = tcp_connect(edge.topology.guest("vm1"), None, at(SERVER, 80), LIMIT).unwrap();
        still_alive(&mut stream, b"before", "before");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let generation = edge.generation().unwrap();
        let broken = format!("{good}uplinkz: [{{ device: pc-up }}]\n");
        let line = broken.lines().count();
        let mut unchanged = |when: &str| {
            assert_eq!(edge.generation().unwrap(), generation, "{hook:?}, {when}");
            still_alive(&mut stream, when.as_bytes(), when);
            everything_works(&edge, "vm1", when);
        };

        let file = edge.bpffs.scratch().write("broken.yaml", &broken).unwrap();
        let (status, _, said) = edge.daemon.client(&["apply", file.to_str().unwrap()]).unwrap();
        assert_eq!(status.code(), Some(2), "{hook:?}: {said}");
        assert!(
            said.contains("uplinkz") && said.contains(&format!("broken.yaml:{line}:")),
            "{hook:?}: line {line}: {said}"
        );
        unchanged("applied");

        // The daemon looks at the file it was started with.
        let trouble = || edge.ask(&["status"]).unwrap()["lastError"].clone();
        edge.bpffs.scratch().write("policy.yaml", "this is no policy: [").unwrap();
        let noticed = |part: &str| trouble().to_string().contains(part);
        assert!(eventually(LIMIT, || noticed("policy.yaml")), "{hook:?}: {}", trouble());
        unchanged("overwritten");
        edge.bpffs.scratch().write("policy.yaml", &broken).unwrap();
        assert!(eventually(LIMIT, || noticed("uplinkz")), "{hook:?}: {}", trouble());
        assert!(noticed(&format!("policy.yaml:{line}:")), "{hook:?}: {}", trouble());
        unchanged("overwritten again");
        edge.bpffs.scratch().write("policy.yaml", &good).unwrap();
        assert!(eventually(LIMIT, || trouble() == Value::Null), "{hook:?}: {}", trouble());
        still_alive(&mut stream, b"and all is well", "mended");
        check.end(&edge).unwrap();
        drop(stream);
        assert!(server.peers().iter().all(|peer| peer.ip() == IpAddr::from(FRONTEND)));
    }
}

#[test]
fn a_change_of_policy_is_one_generation_that_new_flows_obey_and_live_ones_survive() {
    for hook in BOTH {
        let spec = TopologySpec::clean_veth(1);
        let mut policy = LabPolicy::new(hook);
        let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let server = TcpEcho::start(edge.topology.internet(), at(SERVER, 80)).unwrap();
        let elsewhere = TcpEcho::start(edge.topology.internet(), at(SERVER, 81)).unwrap();
        let guest = edge.topology.guest("vm1");
        let mut stream = tcp_connect(guest, None, at(SERVER, 80), LIMIT).unwrap();
        still_alive(&mut stream, b"before", "before");
        let check = HookCheck::begin(&edge, hook).unwrap();
        let generation = edge.generation().unwrap();
        let open = policy.yaml(&spec);

        policy.subnet_group = Some("web");
        policy.extra = "networkSecurityGroups:\n  - name: web\n    securityRules:\n      - { name: Deny80, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 80 }\n".into();
        let (applied, said) = edge.apply(&policy.yaml(&spec)).unwrap();
        assert!(applied, "{hook:?}: {said}");
        assert_eq!(edge.generation().unwrap(), generation + 1, "{hook:?}: {said}");
        let blocked = tcp_exchange(guest, None, at(SERVER, 80), b"new", SOON);
        assert!(blocked.is_err(), "{hook:?}: new flows are denied");
        assert!(edge.rule_hits("web", "Outbound", "Deny80").unwrap() >= 1, "{hook:?}");
        still_alive(&mut stream, b"the live one stays", "denied");
        tcp_exchange(guest, None, at(SERVER, 81), b"elsewhere", LIMIT).unwrap();
        assert_eq!((server.peers().len(), elsewhere.peers().len()), (1, 1), "{hook:?}");

        let (applied, said) = edge.apply(&open).unwrap();
        assert!(applied, "{hook:?}: {said}");
        assert_eq!(edge.generation().unwrap(), generation + 2, "{hook:?}: {said}");
        tcp_exchange(guest, None, at(SERVER, 80), b"new", LIMIT).unwrap();
        still_alive(&mut stream, b"and still stays", "allowed again");
        check.end(&edge).unwrap();
    }
}

/// Everything about the gateway's host that the controller might change, as text by what it is.
type HostState = BTreeMap<String, String>;

fn host_state(topology: &Topology) -> HostState {
    let gateway = topology.gateway();
    let mut state = HostState::new();
    for question in [
        "ip -j -d link",
        "ip -j address",
        "ip -j -4 route show table all",
        "ip -j rule",
        "ip -j neigh show nud permanent",
        "tc -j qdisc",
        "bpftool -j net",
    ] {
        let answer = gateway.run(&question.split(' ').collect::<Vec<_>>()).unwrap();
        let mut value: Value =
            serde_json::from_str(if answer.trim().is_empty() { "[]" } else { &answer }).unwrap();
        without_clocks(&mut value);
        state.insert(question.to_owned(), format!("{value:#}"));
    }
    let links: Value = serde_json::from_str(&gateway.ip("-j link").unwrap()).unwrap();
    let devices: Vec<&str> =
        links.as_array().unwrap().iter().filter_map(|link| link["ifname"].as_str()).collect();
    for device in devices {
        state.insert(format!("ethtool -k {device}"), gateway.run(&["ethtool", "-k", device]).unwrap());
        for direction in ["ingress", "egress"] {
            // Without clsact there is nothing to list, which some versions say by failing.
            let filters =
                gateway.run(&["tc", "filter", "show", "dev", device, direction]).unwrap_or_default();
            state.insert(format!("tc filter {device} {direction}"), filters);
        }
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            // Kernels before 6.6 have none; there it is the filters above.
            let programs = gateway.enter(|| SchedClassifier::query_tcx(device, direction));
            let names = programs.map_or_else(
                |_| Vec::new(),
                |(_, programs)| {
                    programs.iter().map(|program| program.name_as_str().unwrap_or("?").to_owned()).collect()
                },
            );
            state.insert(format!("tcx {device} {direction:?}"), names.join(" "));
        }
    }
    let far = topology.guests().iter().filter_map(|(spec, end)| match end {
        GuestEnd::Namespace(namespace) => Some((spec.name.as_str(), namespace)),
        GuestEnd::Tap(_) => None,
    });
    for (name, namespace) in far.chain([("internet", topology.internet())]) {
        state
            .insert(format!("ethtool -k eth0 of {name}"), namespace.run(&["ethtool", "-k", "eth0"]).unwrap());
    }
    gateway.enter(|| sysctls(Path::new("/proc/sys/net"), &mut state));
    state
}

/// Takes out what a bridge's clock changes by itself.
fn without_clocks(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !name.ends_with("_timer"));
            fields.values_mut().for_each(without_clocks);
        }
        Value::Array(items) => items.iter_mut().for_each(without_clocks),
        _ => {}
    }
}

/// Every sysctl below a directory, of the calling thread's namespace.
fn sysctls(directory: &Path, state: &mut HostState) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            sysctls(&path, state);
        } else if let Ok(value) = fs::read_to_string(&path) {
            state.insert(path.display().to_string(), value);
        }
    }
}

fn assert_as_before(before: &HostState, after: &HostState, when: &str) {
    let lines = |state: &HostState, key: &str| -> Vec<String> {
        state.get(key).map(|text| text.lines().map(str::to_owned).collect()).unwrap_or_default()
    };
    let mut differences = String::new();
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for key in keys.into_iter().filter(|key| before.get(*key) != after.get(*key)) {
        let (was, is) = (lines(before, key), lines(after, key));
        let gone = was.iter().filter(|line| !is.contains(line)).map(|line| format!("  - {line}\n"));
        let new = is.iter().filter(|line| !was.contains(line)).map(|line| format!("  + {line}\n"));
        differences += &format!("{key}\n{}", gone.chain(new).collect::<String>());
    }
    assert!(differences.is_empty(), "{when}: not as before:\n{differences}");
}

/// How the daemon ends before `down`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Down,
    Terminated,
    Killed,
}

/// Starts, lets traffic pass, ends, takes away; the host is as it was.
fn comes_and_goes(hook: WithHook, spec: &TopologySpec, end: End) {
    let when = format!("{hook:?}, {:?}, {end:?}", spec.links);
    let topology = Topology::build(spec).unwrap();
    // What somebody else reserved is theirs.
    topology.gateway().set_sysctl("net.ipv4.ip_local_reserved_ports", "8080,9000-9010").unwrap();
    let before = host_state(&topology);
    let mut policy = LabPolicy::new(hook);
    policy.announce = "address";
    let yaml = policy.yaml(spec).replace(
        &format!("hook: {} }}]", hook.word()),
        &format!("hook: {}, reserveHostPorts: true }}]", hook.word()),
    );
    assert!(yaml.contains("reserveHostPorts"), "{yaml}");
    let mut edge = Edge::start_in(topology, &yaml).unwrap();
    let internet = edge.topology.internet();
    let _tcp = TcpEcho::start(internet, at(SERVER, 80)).unwrap();
    let udp = UdpEcho::start(internet, at(SERVER, 53)).unwrap();
    match &edge.topology.guests()[0].1 {
        GuestEnd::Namespace(_) => everything_works(&edge, "vm1", &when),
        GuestEnd::Tap(tap) => {
            let gateway = tap.resolve(GATEWAY, LIMIT).expect("the gateway answers");
            tap.send_udp(gateway, 5000, SocketAddrV4::new(SERVER, 53), b"question").unwrap();
            assert!(tap.wait_for(LIMIT, |f| f.frame.source() == Some(at(SERVER, 53))).is_some(), "{when}");
        }
    }
    assert!(udp.peers().iter().all(|peer| peer.ip() == IpAddr::from(FRONTEND)), "{when}");
    let during = host_state(&edge.topology);
    let changed = |key: &str| before[key] != during[key];
    assert!(changed("ip -j address"), "{when}: there is something to undo");
    for device in spec.guests.iter().map(|guest| &guest.device).chain([&spec.uplink_device]) {
        let attached = ["tcx {} Ingress", "tcx {} Egress", "tc filter {} ingress", "tc filter {} egress"];
        let attached = attached.map(|key| during[&key.replace("{}", device)].contains("pc_"));
        assert!(
            attached == [true, true, false, false] || attached == [false, false, true, true],
            "{when}: {device}: {during:#?}"
        );
    }
    assert!(hook != WithHook::Xdp || changed("bpftool -j net"), "{when}: XDP is on the devices");
    assert!(
        changed("/proc/sys/net/ipv4/ip_local_reserved_ports"),
        "{when}: {}",
        during["/proc/sys/net/ipv4/ip_local_reserved_ports"]
    );
    assert!(!edge.bpffs.pins().unwrap().is_empty(), "{when}");

    match end {
        End::Down => {}
        End::Terminated => assert!(edge.daemon.terminate().unwrap().success(), "{when}"),
        End::Killed => edge.daemon.kill(),
    }
    // Fails unless the exit code is 0.
    let said = edge.daemon.down().unwrap();
    assert!(said.contains("restored") && said.contains("removed"), "{when}: {said}");
    assert_eq!(said.contains("stopped"), end == End::Down, "{when}: {said}");
    assert!(!said.contains("NOT UNDONE"), "{when}: {said}");
    assert_as_before(&before, &host_state(&edge.topology), &when);
    assert_eq!(edge.bpffs.pins().unwrap(), Vec::<String>::new(), "{when}: no pins");
    assert!(!edge.daemon.spec().socket.exists(), "{when}: no socket");
    let again = edge.daemon.down().unwrap();
    assert!(again.starts_with("nothing was there"), "{when}: {again}");
    assert_as_before(&before, &host_state(&edge.topology), &format!("{when}, down twice"));
}

#[test]
fn down_leaves_the_host_as_it_was_before_the_first_start() {
    comes_and_goes(WithHook::Xdp, &TopologySpec::clean_veth(2), End::Down);
    comes_and_goes(WithHook::Tc, &TopologySpec::clean_veth(2), End::Down);
    comes_and_goes(WithHook::Auto, &TopologySpec::bridged_taps(2), End::Down);
}

#[test]
fn down_works_without_a_daemon_however_it_ended() {
    for end in [End::Terminated, End::Killed] {
        comes_and_goes(WithHook::Xdp, &TopologySpec::clean_veth(1), end);
        comes_and_goes(WithHook::Tc, &TopologySpec::container_veth(1), end);
    }
}
