//! Under attack: what one guest may hold of the flow table, half-open flows from outside, and the full table, on the host engine,
//! under XDP and under TC. Every counter and every rule hit is asserted; no controller runs, so what frees itself does so by the
//! datapath alone.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use portcullis::datapath::now_tick;
use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow::{FLAG_FORWARD, LIVE, ctl, record};
use portcullis_common::quota::held;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC, host_env};
use portcullis_tests::claiming::pin_to;
use portcullis_tests::lab::{Craft, Craft6, Mac, TcpFlags};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = "
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16, 'fd00:1::/48'] }
    subnets: [{ name: a, addressPrefixes: [10.0.1.0/24, 'fd00:1:0:1::/64'] }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: '02:00:00:00:00:01', ipConfigurations: [{ name: v4, subnet: a, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: '02:00:00:00:00:02', ipConfigurations: [{ name: v4, subnet: a, privateIPAddress: 10.0.1.5 }] }
  - { name: vm3, device: vm3, macAddress: '02:00:00:00:00:03', ipConfigurations: [{ name: v4, subnet: a, privateIPAddress: 10.0.1.6, publicIPAddress: pip3 }, { name: v6, subnet: a, privateIPAddress: 'fd00:1:0:1::6', publicIPAddress: pip36 }] }
  - { name: vm4, device: vm4, macAddress: '02:00:00:00:00:04', ipConfigurations: [{ name: v4, subnet: a, privateIPAddress: 10.0.1.7, publicIPAddress: pip4 }] }
publicIPAddresses:
  - { name: pip, ipAddress: 203.0.113.10, announce: proxy }
  - { name: pip3, ipAddress: 203.0.113.23, announce: proxy }
  - { name: pip36, ipAddress: '2001:db8:ffff::23', announce: proxy }
  - { name: pip4, ipAddress: 203.0.113.24, announce: proxy }
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: pip }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1, vm2] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 1024 }]
uplinks: [{ device: up }]
";

const DEVICES: [&str; 5] = ["vm1", "vm2", "vm3", "vm4", "up"];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
/// What one guest may hold in most of the tests, and how many half-open flows of those.
const QUOTA: u16 = 64;
const SHARE: u16 = 8;
const PATIENCE: Duration = Duration::from_secs(30);

fn policy(quota: u32, more: &str) -> String {
    format!("{POLICY}flowTable: {{ maxFlowsPerGuest: {quota}, maxFlowsPerGuestIPv6: {quota} }}\n{more}")
}

/// Flows that have not been answered last for longer than any test.
fn lasting(quota: u32) -> String {
    policy(quota, "timeouts: { tcpHalfOpenSeconds: 3600 }\n")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("a literal")
}

/// A segment from one end to another.
fn tcp(mac: Mac, from: (&str, u16), to: (&str, u16), flags: TcpFlags, ack: u32) -> Vec<u8> {
    match (ip(from.0), ip(to.0)) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            Craft::new(mac, a, GATEWAY, b).tcp(from.1, to.1, flags, 1, ack, b"")
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let mut frame = Craft6::new(mac, a, GATEWAY, b).tcp(from.1, to.1, flags, 1);
            // Acknowledgement and checksum (RFC 1624) of the TCP header behind 54 bytes.
            frame[62..66].copy_from_slice(&ack.to_be_bytes());
            let sum = u32::from(!u16::from_be_bytes([frame[70], frame[71]])) + (ack >> 16) + (ack & 0xffff);
            let sum = (sum & 0xffff) + (sum >> 16);
            frame[70..72].copy_from_slice(&(!(sum as u16)).to_be_bytes());
            frame
        }
        _ => panic!("two families"),
    }
}

fn udp(mac: Mac, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    let (IpAddr::V4(a), IpAddr::V4(b)) = (ip(from.0), ip(to.0)) else { panic!("of IPv4") };
    Craft::new(mac, a, GATEWAY, b).udp(from.1, to.1, b"?")
}

fn mac(guest: u8) -> Mac {
    [2, 0, 0, 0, 0, guest]
}

/// A guest's SYN to the world, the `n`-th.
fn calls(guest: u8, n: u16) -> Vec<u8> {
    let from = format!("10.0.1.{}", 3 + guest);
    tcp(mac(guest), (&from, 2000 + n), ("198.51.100.7", 80), TcpFlags::SYN, 0)
}

fn device(guest: u8) -> At {
    At::Ingress(DEVICES[usize::from(guest) - 1])
}

const WORLD: At = At::Ingress("up");

/// A conversation somebody in the world begins with guest 3 or 4: family, whose, the client's number.
#[derive(Clone, Copy)]
struct Client {
    v6: bool,
    guest: u8,
    n: u16,
}

impl Client {
    fn new(guest: u8, n: u16) -> Self {
        Self { v6: false, guest, n }
    }

    fn ends(self) -> [String; 3] {
        if self.v6 {
            let client = format!("2001:db8:1::{:x}", self.n + 1);
            [client, "2001:db8:ffff::23".into(), "fd00:1:0:1::6".into()]
        } else {
            let client = format!("198.51.{}.{}", 100 + self.n / 200, 1 + self.n % 200);
            [client, format!("203.0.113.{}", 20 + self.guest), format!("10.0.1.{}", 3 + self.guest)]
        }
    }

    fn sends(self, flags: TcpFlags, ack: u32) -> Vec<u8> {
        let [client, public, _] = self.ends();
        tcp(ROUTER_MAC, (&client, 4000), (&public, 443), flags, ack)
    }

    fn syn(self) -> Vec<u8> {
        self.sends(TcpFlags::SYN, 0)
    }

    fn answer(self) -> Vec<u8> {
        let [client, _, private] = self.ends();
        tcp(mac(self.guest), (&private, 443), (&client, 4000), TcpFlags::SYN_ACK, 2)
    }

    fn datagram(self) -> Vec<u8> {
        let [client, public, _] = self.ends();
        udp(ROUTER_MAC, (&client, 4000), (&public, 53))
    }

    fn datagram_back(self) -> Vec<u8> {
        let [client, _, private] = self.ends();
        udp(mac(self.guest), (&private, 53), (&client, 4000))
    }
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    fn sends(&mut self, name: &str, at: At, frame: &[u8], reason: Reason) {
        let outcome = self.0.run(name, at, frame, reason, &[]);
        assert_eq!(outcome.action, Action::Send, "{name} on {}", self.0.backend.name());
    }

    fn drops(&mut self, name: &str, at: At, frame: &[u8], reason: Reason) {
        let outcome = self.0.run(name, at, frame, reason, &[]);
        assert_eq!(outcome.action, Action::Drop, "{name} on {}", self.0.backend.name());
    }

    /// What the guest has: flows, places in the ring, refused, replaced.
    fn has(&self, member: &str) -> [i64; 4] {
        let used = self.0.backend.guest_flows(member).expect("the guest is there");
        [held(used.held).into(), used.waiting as i64, used.refused as i64, used.replaced as i64]
    }

    /// A real client connects: SYN, the answer, and what tells that it was heard.
    fn connects(&mut self, client: Client) {
        self.sends("a SYN", WORLD, &client.syn(), NewFlow);
        self.sends("its answer", device(client.guest), &client.answer(), Forwarded);
        self.sends("the client's ACK", WORLD, &client.sends(TcpFlags::ACK, 2), Forwarded);
    }
}

/// Runs the test on all three, with flow tables of so many buckets.
fn everywhere_with(policy: &str, buckets: u32, test: impl Fn(&mut Table<'_>) + Sync) {
    test(&mut Table(Ledger::new(&mut HostBackend::with_table(policy, buckets).unwrap())));
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with_table(policy, &DEVICES, hook, buckets, |backend| {
            test(&mut Table(Ledger::new(backend)));
            Ok(())
        })
        .unwrap();
    }
}

fn everywhere(policy: &str, test: impl Fn(&mut Table<'_>) + Sync) {
    everywhere_with(policy, 1 << 12, test);
}

#[test]
fn a_guest_that_holds_its_quota_opens_no_more_while_its_flows_and_its_neighbours_new_ones_go_on() {
    everywhere(&lasting(QUOTA.into()), |t| {
        for n in 0..QUOTA {
            t.sends("within the quota", device(1), &calls(1, n), NewFlow);
        }
        assert_eq!(t.has("vm1/v4"), [QUOTA.into(), 0, 0, 0]);
        for n in QUOTA..QUOTA + 5 {
            t.drops("beyond it", device(1), &calls(1, n), GuestFlowQuota);
        }
        assert_eq!(t.has("vm1/v4"), [QUOTA.into(), 0, 5, 0]);
        t.sends("a live flow", device(1), &calls(1, 3), Forwarded);
        for n in 0..QUOTA {
            t.sends("the neighbour", device(2), &calls(2, n), NewFlow);
        }
        // From the world, and from the neighbour: who pays is not the guest that is full.
        let neighbour = tcp(mac(2), ("10.0.1.5", 9), ("10.0.1.4", 80), TcpFlags::SYN, 0);
        t.drops("the neighbour is full, too", device(2), &neighbour, GuestFlowQuota);
        let third = tcp(mac(3), ("10.0.1.6", 9), ("10.0.1.4", 80), TcpFlags::SYN, 0);
        t.sends("to the full guest from one that is not", device(3), &third, NewFlow);
        assert_eq!(t.has("vm3/v4"), [1, 0, 0, 0]);
        assert_eq!(t.has("vm1/v4"), [QUOTA.into(), 0, 5, 0]);
    });
}

#[test]
fn a_port_scan_by_a_guest_ends_at_its_quota_whatever_the_protocol() {
    everywhere(&lasting(QUOTA.into()), |t| {
        for port in 1..=200u16 {
            let probe = tcp(mac(1), ("10.0.1.4", 1000), ("198.51.100.9", port), TcpFlags::SYN, 0);
            if port <= QUOTA {
                t.sends("a probe", device(1), &probe, NewFlow);
            } else {
                t.drops("a probe", device(1), &probe, GuestFlowQuota);
            }
        }
        // Sockets of UDP with two flows each; the public port of a socket is not one.
        for n in 0..QUOTA {
            let datagram = udp(mac(2), ("10.0.1.5", 1000 + n / 2), ("198.51.100.7", 53 + n % 2));
            t.sends("a datagram", device(2), &datagram, NewFlow);
        }
        assert_eq!(t.has("vm2/v4"), [QUOTA.into(), 0, 0, 0]);
        let datagram = udp(mac(2), ("10.0.1.5", 1000), ("198.51.100.7", 99));
        t.drops("of a socket that has its port", device(2), &datagram, GuestFlowQuota);
        let datagram = udp(mac(2), ("10.0.1.5", 3000), ("198.51.100.7", 53));
        t.drops("of another", device(2), &datagram, GuestFlowQuota);
        assert_eq!(t.has("vm2/v4"), [QUOTA.into(), 0, 2, 0]);
    });
}

#[test]
fn what_was_reserved_for_a_flow_that_could_not_be_made_is_given_back() {
    let denied = lasting(QUOTA.into()).replace("allocatedOutboundPorts: 1024", "allocatedOutboundPorts: 8");
    everywhere(&denied, |t| {
        for n in 0..8 {
            t.sends("a port each", device(1), &calls(1, n), NewFlow);
        }
        t.drops("no port left", device(1), &calls(1, 8), SnatExhausted);
        let datagram = |n: u16| udp(mac(1), ("10.0.1.4", 1000 + n), ("198.51.100.7", 53));
        for n in 0..8 {
            t.sends("a port each", device(1), &datagram(n), NewFlow);
        }
        t.drops("no port left", device(1), &datagram(8), SnatExhausted);
        assert_eq!(t.has("vm1/v4"), [16, 0, 0, 0]);
    });
}

#[test]
fn flows_that_have_died_make_room_for_new_ones_with_nobody_there_to_tidy() {
    let policy = policy(QUOTA.into(), "timeouts: { tcpHalfOpenSeconds: 1 }\n");
    let rounds = |backend: &mut dyn Backend, later: &mut dyn FnMut()| {
        let mut made = 0;
        let mut refused = 0;
        for round in 0..3 {
            for n in 0..QUOTA {
                let from = Instant::now();
                loop {
                    let outcome = backend.run(device(1), &calls(1, round * QUOTA + n)).unwrap();
                    if outcome.action == Action::Send {
                        break;
                    }
                    refused += 1;
                    assert!(from.elapsed() < PATIENCE, "{}: flow {n} of round {round}", backend.name());
                    later();
                }
                made += 1;
            }
            let used = backend.guest_flows("vm1/v4").unwrap();
            assert!(held(used.held) <= QUOTA.into(), "{}", held(used.held));
        }
        let counters: BTreeMap<Reason, u64> = backend.counters().unwrap();
        let expected: BTreeMap<Reason, u64> =
            [(NewFlow, made), (GuestFlowQuota, refused)].into_iter().filter(|(_, n)| *n != 0).collect();
        assert_eq!(counters, expected, "{}", backend.name());
        assert!(refused > 0, "{}: the quota was used up", backend.name());
    };
    // An hour passes after each refusal.
    let mut host = HostBackend::new(&policy).unwrap();
    let clock = std::rc::Rc::new(std::cell::Cell::new(1000));
    let hour = 3600 * 15;
    let mut passed = 0;
    let mut refused = 0;
    for n in 0..3 * QUOTA {
        while host.run(device(1), &calls(1, n)).unwrap().action == Action::Drop {
            refused += 1;
            clock.set(clock.get() + hour);
            host.env.set_now(clock.get());
            passed += 1;
            assert!(passed < 10, "flow {n}");
        }
    }
    assert_eq!(
        (passed, refused),
        (2, 2),
        "one refusal each time the quota is used up, and none after the hour"
    );
    let used = host.guest_flows("vm1/v4").unwrap();
    assert_eq!((held(used.held), used.refused), (QUOTA.into(), 2));
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(&policy, &DEVICES, hook, |backend| {
            rounds(backend, &mut || std::thread::sleep(Duration::from_millis(50)));
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn half_open_flows_from_the_world_take_an_eighth_of_the_quota_the_oldest_goes_first_an_answered_one_never() {
    everywhere(&lasting(QUOTA.into()), |t| {
        for v6 in [false, true] {
            let client = |n| Client { v6, guest: 3, n };
            let member = if v6 { "vm3/v6" } else { "vm3/v4" };
            t.connects(client(500));
            for n in 0..40 {
                t.sends("one of the flood", WORLD, &client(n).syn(), NewFlow);
            }
            // The answered one has given up its place in the ring and lives on.
            assert_eq!(t.has(member), [1 + i64::from(SHARE), SHARE.into(), 0, 40 - i64::from(SHARE)]);
            for n in 0..40 - SHARE {
                t.drops("one that was replaced", device(3), &client(n).answer(), NoFlow);
            }
            for n in 40 - SHARE..40 {
                t.sends("one of the latest", device(3), &client(n).answer(), Forwarded);
            }
            t.sends("the answered one", WORLD, &client(500).sends(TcpFlags::ACK, 2), Forwarded);
            // The server has answered those eight; nobody acknowledges it: they go, too.
            for n in 40..48 {
                t.sends("more of the flood", WORLD, &client(n).syn(), NewFlow);
            }
            for n in 40 - SHARE..40 {
                t.drops("answered to nobody", device(3), &client(n).answer(), NoFlow);
            }
            for n in 501..550 {
                t.connects(client(n));
            }
            for n in 500..550 {
                t.sends("a real client", WORLD, &client(n).sends(TcpFlags::ACK, 2), Forwarded);
            }
            let [flows, places, refused, replaced] = t.has(member);
            assert_eq!((flows, places, refused), (50, SHARE.into(), 0), "all of the flood is gone");
            assert_eq!(replaced, 48);
        }
    });
}

#[test]
fn datagrams_nobody_answers_are_half_open_and_those_of_a_conversation_are_not() {
    everywhere(&lasting(QUOTA.into()), |t| {
        let talks = Client::new(3, 500);
        t.sends("a question", WORLD, &talks.datagram(), NewFlow);
        t.sends("its answer", device(3), &talks.datagram_back(), Forwarded);
        for n in 0..30 {
            t.sends("a forged one", WORLD, &Client::new(3, n).datagram(), NewFlow);
        }
        assert_eq!(t.has("vm3/v4"), [1 + i64::from(SHARE), SHARE.into(), 0, 30 - i64::from(SHARE)]);
        t.sends("the conversation", WORLD, &talks.datagram(), Forwarded);
    });
}

#[test]
fn all_guests_together_have_half_open_flows_in_an_eighth_of_the_table() {
    // Made for 128 flows: sixteen places.
    everywhere_with(&lasting(4096), 64, |t| {
        t.connects(Client::new(4, 500));
        for n in 0..40 {
            t.sends("a flood to one", WORLD, &Client::new(3, n).syn(), NewFlow);
        }
        for n in 0..6 {
            t.sends("and to the other", WORLD, &Client::new(4, n).syn(), NewFlow);
        }
        assert_eq!(t.has("vm3/v4"), [10, 10, 0, 30]);
        assert_eq!(t.has("vm4/v4"), [7, 6, 0, 0]);
        for n in 0..30 {
            t.drops("the oldest", device(3), &Client::new(3, n).answer(), NoFlow);
        }
        for n in 30..40 {
            t.sends("the latest of one", device(3), &Client::new(3, n).answer(), Forwarded);
        }
        for n in 0..6 {
            t.sends("and of the other", device(4), &Client::new(4, n).answer(), Forwarded);
        }
        t.sends("the answered one", WORLD, &Client::new(4, 500).sends(TcpFlags::ACK, 2), Forwarded);
    });
}

#[test]
fn a_full_table_refuses_new_flows_and_drops_none_that_lives() {
    let policy = lasting(4096);
    let test = |backend: &mut dyn Backend| {
        let (mut lives, mut refused) = (Vec::new(), 0);
        for n in 0..600 {
            let outcome = backend.run(device(1), &calls(1, n)).unwrap();
            if outcome.action == Action::Send {
                lives.push(n);
            } else {
                refused += 1;
            }
        }
        let used = backend.guest_flows("vm1/v4").unwrap();
        assert_eq!(held(used.held) as usize, lives.len());
        for n in &lives {
            assert_eq!(backend.run(device(1), &calls(1, *n)).unwrap().action, Action::Send, "flow {n}");
        }
        let made = lives.len() as u64;
        // 256 pairs of records: so many flows at most.
        assert!((128..=256).contains(&made), "{made}");
        assert_eq!(
            backend.counters().unwrap(),
            [(NewFlow, made), (Forwarded, made), (TableFull, refused)].into(),
            "{}",
            backend.name()
        );
    };
    test(&mut HostBackend::with_table(&policy, 64).unwrap());
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with_table(&policy, &DEVICES, hook, 64, |backend| {
            test(backend);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_flood_of_drops_is_counted_whole_and_told_in_samples() {
    const FLOOD: u16 = 4000;
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(&lasting(QUOTA.into()), &DEVICES, hook, |backend| {
            // Sampling is by processor.
            pin_to(0);
            for n in 0..QUOTA {
                backend.run(device(1), &calls(1, n))?;
            }
            let rate = backend.gateway.compiled.settings.event_rate;
            let first = now_tick();
            for n in 0..FLOOD {
                backend.run(device(1), &calls(1, QUOTA + n))?;
            }
            let ticks = now_tick() - first + 1;
            let mut events = backend.datapath.events()?;
            let mut told = 0;
            while let Some(event) = events.try_next() {
                assert_eq!(event.reason, GuestFlowQuota as u8);
                told += 1;
            }
            let counters = backend.counters()?;
            assert_eq!(
                counters,
                [(NewFlow, QUOTA.into()), (GuestFlowQuota, FLOOD.into())].into(),
                "{hook:?}: every packet counts"
            );
            assert!((1..=ticks * rate).contains(&told), "{hook:?}: {told} events in {ticks} ticks of {rate}");
            assert!(told < u32::from(FLOOD) / 2, "{hook:?}: {told} events");
            Ok(())
        })
        .unwrap();
    }
}

/// Forward halves of the guest's live flows.
fn counted(env: &portcullis_common::engine::host::HostEnv) -> i32 {
    let slots = (env.control.bucket_mask + 1) * 8;
    let live = |index| {
        let r = record::<V4, _>(env, index)?;
        // SAFETY: it points into the table, which nobody else uses now.
        let c = unsafe { ctl(r) };
        (c.phase() == LIVE && c.flags() & FLAG_FORWARD != 0).then_some(())
    };
    (0..slots).filter_map(live).count() as i32
}

#[test]
fn threads_that_open_flows_while_time_passes_never_hold_more_than_the_quota_and_the_count_stays_exact() {
    let policy = policy(QUOTA.into(), "timeouts: { tcpHalfOpenSeconds: 1 }\n");
    let backend = HostBackend::new(&policy).unwrap();
    let ifindex = backend.gateway().devices["vm1"].ifindex;
    let hop = backend.gateway().hop_of("vm1/v4").unwrap();
    // A small table: slots are taken over by insertions, too.
    let env = host_env(backend.gateway(), 64);
    let held_now = || {
        let guest = env.guest_flows(hop.into()).unwrap();
        // SAFETY: an element of the table, whose words are read whole.
        held(unsafe { portcullis_common::atomic::load(&raw const (*guest).held) })
    };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u16 {
            let (env, over, held_now) = (&env, &over, &held_now);
            scope.spawn(move || {
                for n in 0..20_000u16 {
                    let (_, _, _) = env.packet(
                        &calls(1, (n.wrapping_mul(7) + thread * 131) % 5000),
                        ifindex,
                        Hook::Tc,
                        false,
                    );
                    if thread == 0 && n % 50 == 0 {
                        env.set_now(env.now() + 5);
                    }
                    // Each thread may have reserved a place that it has to give back.
                    if held_now() > i32::from(QUOTA) + 4 {
                        over.store(true, SeqCst);
                    }
                }
            });
        }
    });
    assert!(!over.load(SeqCst));
    assert_eq!(held_now(), counted(&env), "every flow counts once");
    let counters: BTreeMap<Reason, u64> = env.counters().into_iter().collect();
    assert!(counters[&GuestFlowQuota] > 0, "{counters:?}");
    assert!(counters[&NewFlow] > u64::from(QUOTA), "{counters:?}");
    assert_eq!(counters.values().sum::<u64>(), 80_000, "{counters:?}");
    // An hour later a new flow finds all of them dead: the count falls to what lives.
    env.set_now(env.now() + 3600 * 15);
    for n in 0..QUOTA {
        let before = env.counted(NewFlow).packets;
        let (_, _, _) = env.packet(&calls(1, 20_000 + n), ifindex, Hook::Tc, false);
        assert_eq!(env.counted(NewFlow).packets, before + 1);
    }
    assert!(held_now() <= QUOTA.into());
    assert_eq!(held_now(), counted(&env));
}
