//! What changes on the host under a running gateway is followed, by netlink and without a restart: links that flap, devices that
//! come and go, routers with another hardware address, another address of the uplink's, another default route. Each with
//! a guest that never stops talking: its flow goes on under its address and port.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{Namespace, TopologySpec, UdpEcho, eventually, ping, udp_exchange, udp_socket};
use serde_json::Value;

/// The longest that anything takes: the router is asked for every 20 s, and given up by the kernel some seconds later.
const PATIENCE: Duration = Duration::from_secs(90);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// A guest's flow that lives through all of it.
struct Flow {
    socket: UdpSocket,
    said: u32,
}

impl Flow {
    fn open(guest: &Namespace) -> Self {
        let socket = udp_socket(guest, (Ipv4Addr::UNSPECIFIED, 0).into()).unwrap();
        Self { socket, said: 0 }
    }

    /// Asks until an answer comes; what is asked between a change and its consequence may be lost.
    fn goes_on(&mut self, edge: &Edge, server: &UdpEcho, when: &str) {
        let answered = eventually(PATIENCE, || self.is_answered());
        assert!(answered, "{when}: {:?}, {}", edge.reasons(), edge.ask(&["status"]).unwrap()["nextHops"]);
        // From here on nothing is lost any more.
        for _ in 0..50 {
            assert!(self.is_answered(), "{when}: answered once and then no more; {:?}", edge.reasons());
        }
        let peers = server.peers();
        let mine: Vec<_> = peers.iter().filter(|peer| peer.ip() == IpAddr::from(FRONTEND)).collect();
        assert_eq!((peers.len(), mine.len()), (1, 1), "{when}: one address and port throughout: {peers:?}");
    }

    fn is_answered(&mut self) -> bool {
        self.said += 1;
        let word = self.said.to_be_bytes();
        if self.socket.send_to(&word, (SERVER, 53)).is_err() {
            // Its device is gone.
            return false;
        }
        self.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let until = Instant::now() + Duration::from_millis(500);
        let mut buffer = [0; 16];
        while Instant::now() < until {
            match self.socket.recv(&mut buffer) {
                // An earlier answer that was late.
                Ok(4) if buffer[..4] != word => {}
                Ok(length) => return length == 4,
                Err(_) => return false,
            }
        }
        false
    }
}

struct Scene {
    edge: Edge,
    server: UdpEcho,
    others: UdpEcho,
    flow: Flow,
    hook: WithHook,
    generation: u64,
    pid: u32,
}

impl Scene {
    fn start(hook: WithHook) -> Self {
        let spec = TopologySpec::clean_veth(2);
        Self::start_with(hook, &spec, &LabPolicy::new(hook).yaml(&spec))
    }

    fn start_with(hook: WithHook, spec: &TopologySpec, policy: &str) -> Self {
        let edge = Edge::start(spec, policy).unwrap();
        let server = UdpEcho::start(edge.topology.internet(), (SERVER, 53).into()).unwrap();
        let others = UdpEcho::start(edge.topology.internet(), (SERVER, 54).into()).unwrap();
        let flow = Flow::open(edge.topology.guest("vm1"));
        let (generation, pid) = (edge.generation().unwrap(), edge.daemon.pid().unwrap());
        let mut scene = Self { edge, server, others, flow, hook, generation, pid };
        scene.works("before");
        scene
    }

    /// The live flow goes on, new ones are made, both guests reach the world, and it is the same daemon.
    fn works(&mut self, when: &str) {
        let when = format!("{:?}: {when}", self.hook);
        self.flow.goes_on(&self.edge, &self.server, &when);
        for guest in ["vm1", "vm2"] {
            let guest = self.edge.topology.guest(guest);
            let new =
                || udp_exchange(guest, None, (SERVER, 54).into(), b"new", Duration::from_secs(1)).is_ok();
            assert!(eventually(PATIENCE, new), "{when}: a new flow; {:?}", self.edge.reasons());
            let pinged = ping(guest, SERVER.into(), 3, PATIENCE).unwrap();
            assert_eq!(pinged.received, 3, "{when}: {pinged:?}");
        }
        assert!(self.others.peers().iter().all(|peer| peer.ip() == IpAddr::from(FRONTEND)), "{when}");
        assert_eq!(self.edge.daemon.pid(), Some(self.pid), "{when}");
        assert!(self.edge.daemon.is_running(), "{when}");
        assert!(self.edge.generation().unwrap() >= self.generation, "{when}");
    }

    /// The hook that was asked for carries new flows again: XDP leaves to TC what goes to a router not resolved yet, and for good
    /// what goes to one that no route names any more (`daemon/world.rs`).
    fn ends(self) {
        let mut scene = self;
        scene.flow = Flow::open(scene.edge.topology.guest("vm1"));
        let mut said = String::new();
        let carried = eventually(PATIENCE, || {
            let check = HookCheck::begin(&scene.edge, scene.hook).unwrap();
            assert!((0..20).all(|_| scene.flow.is_answered()), "{:?}", scene.hook);
            check.end(&scene.edge).map_err(|error| said = error.to_string()).is_ok()
        });
        assert!(carried, "{:?}: {said}; {:?}", scene.hook, scene.routers());
    }

    fn internet(&self, line: &str) {
        self.edge.topology.internet().ip(line).unwrap();
    }

    fn gateway(&self, line: &str) {
        self.edge.topology.gateway().ip(line).unwrap();
    }

    /// The router that guests' packets go to, as `status` has it.
    fn routers(&self) -> Vec<(String, Option<String>)> {
        let status = self.edge.ask(&["status"]).unwrap();
        let hops = status["nextHops"].as_array().unwrap().iter();
        let world = hops.filter(|hop| hop["kind"] == "world" && hop["resolved"] == true);
        world.map(|hop| (text(&hop["address"]), hop["mac"].as_str().map(str::to_owned))).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

const DEFAULT: &str = "route replace default via 203.0.113.100";

#[test]
fn an_uplink_that_loses_its_carrier_or_is_taken_down_is_used_again_once_it_is_back() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        for time in 0..3 {
            // The other end's doing: the carrier goes, the routes stay.
            scene.internet("link set eth0 down");
            assert!(!scene.flow.is_answered(), "{hook:?}: there is no link");
            scene.internet("link set eth0 up");
            scene.works(&format!("the carrier is back, time {time}"));
            // This end's: the kernel forgets the routes, and whoever manages the network adds them again.
            scene.gateway("link set pc-up down");
            assert!(!scene.flow.is_answered(), "{hook:?}: there is no uplink");
            scene.gateway("link set pc-up up");
            scene.gateway(DEFAULT);
            scene.works(&format!("the uplink is up again, time {time}"));
        }
        scene.ends();
    });
}

#[test]
fn a_guests_device_that_is_deleted_and_made_again_is_served_and_its_flow_goes_on() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        for time in 0..3 {
            scene.edge.topology.unplug("vm1").unwrap();
            // The other guest hears nothing of it.
            let other = ping(scene.edge.topology.guest("vm2"), SERVER.into(), 5, PATIENCE).unwrap();
            assert_eq!(other.received, 5, "{hook:?}, time {time}: {other:?}");
            scene.edge.topology.plug("vm1").unwrap();
            scene.works(&format!("made again, time {time}"));
        }
        scene.ends();
    });
}

#[test]
fn a_guests_device_that_flaps_faster_than_anybody_follows_is_served_in_the_end() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        for _ in 0..20 {
            scene.gateway("link set pc-vm1 down");
            scene.gateway("link set pc-vm1 up");
        }
        scene.edge.topology.unplug("vm1").unwrap();
        scene.edge.topology.plug("vm1").unwrap();
        scene.works("after a burst");
        scene.ends();
    });
}

#[test]
fn a_router_that_changes_its_hardware_address_and_says_so_is_followed() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        // The internet's end announces its changes by gratuitous ARP.
        scene.edge.topology.internet().set_sysctl("net.ipv4.conf.eth0.arp_notify", "1").unwrap();
        let gateway = scene.edge.topology.gateway();
        // The kernel believes another address only after so long.
        gateway.set_sysctl("net.ipv4.neigh.pc-up.locktime", "0").unwrap();
        for last in 1..4 {
            let mac = format!("02:50:43:ff:01:{last:02x}");
            scene.internet(&format!("link set eth0 address {mac}"));
            let known = || scene.routers().iter().any(|(_, known)| known.as_deref() == Some(&*mac));
            assert!(eventually(PATIENCE, known), "{hook:?}: {mac}: {:?}", scene.routers());
            scene.works(&mac);
        }
        scene.ends();
    });
}

#[test]
fn a_router_that_changes_its_hardware_address_in_silence_is_asked_for_again() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        let gateway = scene.edge.topology.gateway();
        for (name, value) in
            [("base_reachable_time_ms", "1000"), ("retrans_time_ms", "200"), ("delay_first_probe_time", "1")]
        {
            gateway.set_sysctl(&format!("net.ipv4.neigh.pc-up.{name}"), value).unwrap();
        }
        let mac = "02:50:43:ff:02:01";
        scene.internet(&format!("link set eth0 address {mac}"));
        // Its flow is what it is asked for; the guest goes on all the time.
        scene.works("another router under the same address");
        let known = || scene.routers().iter().any(|(_, known)| known.as_deref() == Some(mac));
        assert!(eventually(PATIENCE, known), "{hook:?}: {:?}", scene.routers());
        scene.ends();
    });
}

#[test]
fn an_uplink_with_another_address_and_a_default_route_by_another_router_are_followed() {
    under_both(|hook| {
        let mut scene = Scene::start(hook);
        // Another router on the link, with an address of its own.
        scene.internet("address add 203.0.113.101/24 dev eth0");
        scene.gateway("route replace default via 203.0.113.101");
        let by = |router: &str, scene: &Scene| scene.routers().iter().any(|(address, _)| address == router);
        assert!(eventually(PATIENCE, || by("203.0.113.101", &scene)), "{hook:?}: {:?}", scene.routers());
        scene.works("by another router");
        // What was the router is gone.
        scene.internet("address del 203.0.113.100/24 dev eth0");
        scene.internet("address replace 203.0.113.101/24 dev eth0");
        scene.works("the first router is gone");
        // The uplink is renumbered; with its last address in the prefix the kernel drops the routes through it.
        scene.gateway("address add 203.0.113.7/24 dev pc-up");
        scene.gateway("address del 203.0.113.1/24 dev pc-up");
        scene.gateway("address replace 203.0.113.7/24 dev pc-up");
        scene.gateway("route replace default via 203.0.113.101");
        scene.works("renumbered");
        scene.ends();
    });
}

#[test]
fn rules_of_policy_routing_are_warned_of_while_they_are_there() {
    let scene = Scene::start(WithHook::Tc);
    let warned =
        || scene.edge.ask(&["status"]).unwrap()["warnings"].to_string().contains("500: from 10.9.0.0/16");
    assert!(!warned());
    scene.gateway("rule add from 10.9.0.0/16 lookup 77 priority 500");
    assert!(eventually(PATIENCE, warned), "{}", scene.edge.ask(&["status"]).unwrap()["warnings"]);
    assert!(
        scene.edge.daemon.log().contains("500: from 10.9.0.0/16 lookup 77"),
        "{}",
        scene.edge.daemon.log()
    );
    scene.gateway("rule del priority 500");
    assert!(eventually(PATIENCE, || !warned()), "it went with the rule");
}
