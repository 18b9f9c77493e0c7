//! Under attack, with real clients beside it, under XDP and under TC: a flood of SYNs from forged sources at a guest that listens, and a
//! guest that opens flows as fast as it can, also when nobody runs but the datapath.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, under_both};
use portcullis_tests::lab::{
    Craft, RawSender, TcpEcho, TcpFlags, TcpHold, TopologySpec, eventually, tcp_exchange,
};
use portcullis_tests::site::at;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 8080;
const PUBLIC: [(&str, &str); 2] = [("vm1", "203.0.113.21"), ("vm2", "203.0.113.22")];

/// What `status` says of the flows that a guest holds.
fn holds(edge: &Edge, guest: &str) -> Value {
    let status = edge.ask(&["status"]).unwrap();
    let hops = status["nextHops"].as_array().unwrap();
    let name = format!("guest:{guest}/");
    let hop = hops.iter().find(|hop| hop["name"].as_str().unwrap().starts_with(&name));
    hop.unwrap_or_else(|| panic!("{guest} is not in {status}"))["flows"].clone()
}

/// Somebody nobody has heard of, another one each time.
fn stranger(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(11, 0, 0, 1)) + n)
}

#[test]
fn a_flood_of_syns_from_forged_sources_leaves_room_for_every_real_client_of_that_guest_and_of_its_neighbour()
{
    const QUOTA: u32 = 32_768;
    const FLOOD: u32 = 40_000;
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        policy.instances = PUBLIC.into();
        policy.extra = format!("flowTable: {{ maxFlowsPerGuest: {QUOTA} }}\n");
        let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let world = edge.topology.internet();
        let _servers = ["vm1", "vm2"].map(|name| {
            let own = edge.topology.guest_spec(name).address;
            TcpEcho::start(edge.topology.guest(name), at(own, PORT)).unwrap()
        });
        let public = |guest: usize| PUBLIC[guest].1.parse::<Ipv4Addr>().unwrap();
        let mut held = [0, 1].map(|guest| TcpHold::open(world, at(public(guest), PORT), 10, LIMIT).unwrap());
        assert!(held.iter().all(|held| held.established() == 10), "{hook:?}");

        // What goes to a neighbour on the uplink's own link is TC's under either hook (ADR 0003); what comes in is not.
        assert_eq!(edge.device("pc-up").unwrap()["hook"], hook.word());
        let (sent, over) = (AtomicU32::new(0), AtomicBool::new(false));
        let made = std::thread::scope(|scope| {
            scope.spawn(|| {
                let raw = RawSender::open(world, "eth0").unwrap();
                let (mac, gateway) = (TopologySpec::INTERNET_MAC, TopologySpec::UPLINK_MAC);
                let mut n = 0;
                // Ten thousand a second: four times the guest's share, and more than its quota, in the end.
                while n < FLOOD || !over.load(SeqCst) {
                    for _ in 0..100 {
                        let syn = Craft::new(mac, stranger(n), gateway, public(0));
                        raw.send(&syn.tcp(4000, PORT, TcpFlags::SYN, n, 0, b"")).unwrap();
                        n += 1;
                    }
                    sent.store(n, SeqCst);
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            let mut made = [0u64, 0];
            while sent.load(SeqCst) < FLOOD {
                for guest in [0, 1] {
                    let outcome = tcp_exchange(world, None, at(public(guest), PORT), b"hello", LIMIT);
                    assert!(
                        outcome.is_ok(),
                        "{hook:?}: {}: {outcome:?}; {:?}",
                        PUBLIC[guest].0,
                        edge.reasons()
                    );
                    made[guest] += 1;
                }
            }
            println!("{hook:?}: {made:?} connections beside {} forged SYNs", sent.load(SeqCst));
            over.store(true, SeqCst);
            made
        });
        for (held, (name, _)) in held.iter_mut().zip(PUBLIC) {
            assert_eq!(held.alive(LIMIT), 10, "{hook:?}: {name}: who was there before lives on");
        }
        let reasons = edge.reasons().unwrap();
        for refused in ["guest_flow_quota", "table_full"] {
            assert_eq!(reasons.get(refused), None, "{hook:?}: {reasons:?}");
        }
        // Of two processors one may take the place the other has just made; a SYN is sent again.
        let unlucky = reasons.get("half_open_quota").copied().unwrap_or(0);
        assert!(unlucky < u64::from(FLOOD / 1000), "{hook:?}: {reasons:?}");
        assert!(reasons["new_flow"] >= u64::from(FLOOD), "{hook:?}: {reasons:?}");
        let [one, two] = ["vm1", "vm2"].map(|name| holds(&edge, name));
        assert_eq!(one["mostHalfOpen"], QUOTA / 8);
        assert!(one["halfOpen"].as_u64().unwrap() <= u64::from(QUOTA / 8), "{hook:?}: {one}");
        assert!(one["replaced"].as_u64().unwrap() >= u64::from(FLOOD / 2), "{hook:?}: {one}");
        // Nothing but those, and the real clients' connections, ended or not.
        assert!(one["held"].as_u64().unwrap() <= u64::from(QUOTA / 8) + made[0] + 10, "{hook:?}: {one}");
        assert_eq!((&two["replaced"], &two["refused"]), (&0.into(), &0.into()), "{hook:?}: {two}");
    });
}

#[test]
fn a_guest_that_opens_flows_as_fast_as_it_can_stops_at_its_quota_and_has_room_again_when_they_have_died_without_a_daemon()
 {
    const QUOTA: u32 = 256;
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(2);
        let mut policy = LabPolicy::new(hook);
        policy.extra =
            format!("flowTable: {{ maxFlowsPerGuest: {QUOTA} }}\ntimeouts: {{ tcpHalfOpenSeconds: 5 }}\n");
        let mut edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
        let world = edge.topology.internet();
        let server = edge.topology.internet_socket(9000);
        let _server = TcpEcho::start(world, server).unwrap();
        let (vm1, vm2) = (edge.topology.guest("vm1").clone(), edge.topology.guest("vm2").clone());
        let mut held = TcpHold::open(&vm1, server, 20, LIMIT).unwrap();
        assert_eq!(held.established(), 20, "{hook:?}");

        let mine = edge.topology.guest_spec("vm1").clone();
        let raw = RawSender::open(&vm1, "eth0").unwrap();
        let syn = |n: u16| {
            let nobody = Ipv4Addr::new(11, 0, 0, (n >> 8) as u8);
            Craft::new(mine.mac, mine.address, mine.gateway_mac, nobody).tcp(
                2000,
                n,
                TcpFlags::SYN,
                1,
                0,
                b"",
            )
        };
        let mut connections = 0;
        for n in 1..=4000 {
            raw.send(&syn(n)).unwrap();
            if n % 200 == 0 {
                let outcome = tcp_exchange(&vm2, None, server, b"hello", LIMIT);
                assert!(outcome.is_ok(), "{hook:?}: {outcome:?}; {:?}", edge.reasons());
                connections += 1;
            }
        }
        assert_eq!(connections, 20);
        assert_eq!(held.alive(LIMIT), 20, "{hook:?}: its live connections go on");
        let [one, two] = ["vm1", "vm2"].map(|name| holds(&edge, name));
        assert_eq!(one["most"], QUOTA);
        assert!(one["held"].as_u64().unwrap() <= u64::from(QUOTA), "{hook:?}: {one}");
        assert!(one["refused"].as_u64().unwrap() > 0, "{hook:?}: {one}");
        assert_eq!(two["refused"], 0, "{hook:?}: {two}");
        let told = edge.reason("guest_flow_quota").unwrap();
        assert_eq!(told, one["refused"].as_u64().unwrap(), "{hook:?}: every refused packet counts as one");

        // The quota full once more, and nobody there but the datapath.
        for n in 1..=2000 {
            raw.send(&syn(n)).unwrap();
        }
        edge.daemon.kill();
        let again = || tcp_exchange(&vm1, None, server, b"hello", Duration::from_secs(3)).is_ok();
        assert!(eventually(LIMIT, again), "{hook:?}: dead flows make room");
        for _ in 0..100 {
            let outcome = tcp_exchange(&vm1, None, server, b"hello", LIMIT);
            assert!(outcome.is_ok(), "{hook:?}: {outcome:?}");
        }
        assert_eq!(held.alive(LIMIT), 20, "{hook:?}");
        edge.restart().unwrap();
        let one = holds(&edge, "vm1");
        assert!(one["held"].as_u64().unwrap() <= u64::from(QUOTA), "{hook:?}: {one}");
    });
}
