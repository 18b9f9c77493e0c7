//! Three namespaces in a row with the bench's programs at both ends; what forwards in the middle is a candidate's.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::generator::while_sending;
use super::layout::{Expected, Generator, PICK_IN_ORDER, PICK_RANDOM, Seen, TCP, UDP};
use super::napi::{self, NapiThread};
use super::programs::{Programs, Sending};
use super::table::Capacity;
use crate::lab::{LabId, Mac, Namespace, eventually};
use crate::stop;

/// Where the flows go to. From the documentation's prefixes, and on no device: the server's program takes everything.
pub(super) const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The server on the link, the gateway's router.
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// The gateway on that link.
pub(super) const UPLINK: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The gateway on the guests' side.
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

const FAR: &str = "eth0";
/// Passes over the flows until all are known. One does, unless a packet is lost.
const PASSES: u32 = 4;
/// How long nothing may arrive before the rest is given up for lost.
const SILENCE: Duration = Duration::from_millis(50);
/// The first random number; any but 0.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Device names are unique on the machine, because NAPI threads are known by them.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// One end of a veth.
#[derive(Debug, Clone)]
pub(super) struct Port {
    pub device: String,
    pub ifindex: u32,
    pub mac: Mac,
}

/// The namespaces and the programs at both ends.
pub(super) struct Rig {
    // Programs are detached before their devices go.
    pub programs: Programs,
    pub gateway: Namespace,
    client: Namespace,
    /// The server's namespace lives as long as the rig.
    _server: Namespace,
    /// The gateway's device towards the client.
    pub inside: Port,
    /// The gateway's device towards the server.
    pub outside: Port,
    /// The server's device.
    pub server: Port,
    generator: Generator,
    expected: Expected,
    napi: NapiThread,
}

/// One measurement.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sample {
    pub packets_per_second: f64,
    /// Share of the time that the gateway's thread was running; much less than one means that somebody else was, or
    /// that the generator was too slow.
    pub busy: f64,
    /// All packets of the measurement, translated or not, and strangers.
    pub seen: Seen,
}

impl Rig {
    /// Builds it; `public` is the address that translated packets come from.
    pub fn build(label: &str, public: Ipv4Addr) -> anyhow::Result<Self> {
        Self::build_with(label, public, Capacity::NONE)
    }

    /// The same with room in the bench's own flow tables.
    pub fn build_with(label: &str, public: Ipv4Addr, capacity: Capacity) -> anyhow::Result<Self> {
        Self::build_all(public, capacity).with_context(|| format!("the namespaces for {label}"))
    }

    fn build_all(public: Ipv4Addr, capacity: Capacity) -> anyhow::Result<Self> {
        let lab = LabId::fresh();
        let [client, gateway, server] =
            ["client", "gateway", "server"].map(|name| Namespace::create_in(&lab, name));
        let (client, gateway, server) = (client?, gateway?, server?);
        let stem = format!("b{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let inside = connect(&gateway, &format!("{stem}i"), &client)?;
        let outside = connect(&gateway, &format!("{stem}o"), &server)?;
        // GRO gives the veth NAPI, and NAPI takes the frames that the client's device is handed, or the server's when it
        // answers.
        for device in [&inside.device, &outside.device] {
            gateway.run(&["ethtool", "-K", device, "gro", "on"])?;
        }
        gateway.ip(&format!("address add {GATEWAY}/24 dev {}", inside.device))?;
        gateway.ip(&format!("address add {UPLINK}/24 dev {}", outside.device))?;
        for device in ["all", &inside.device] {
            gateway.set_sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
        }
        let server_port = port(&server, FAR)?;
        gateway.ip(&format!(
            "neighbour replace {SERVER} lladdr {} dev {} nud permanent",
            mac_text(server_port.mac),
            outside.device
        ))?;
        gateway.ip(&format!("route add default via {SERVER} dev {}", outside.device))?;
        let napi = NapiThread::start(&gateway, &inside.device)?;
        napi.pin(napi::processors().1)?;

        let mut programs = Programs::load(capacity)?;
        let generator = Generator {
            ifindex: client.ifindex(FAR)?,
            destination: network_order(DESTINATION),
            gateway_mac: inside.mac,
            protocol: UDP,
            ..Generator::default()
        };
        let expected = Expected {
            public: network_order(public),
            destination: network_order(DESTINATION),
            ..Expected::default()
        };
        programs.tell_sink(&expected)?;
        programs.attach("pcb_sink", &server, server_port.ifindex)?;
        Ok(Self {
            programs,
            gateway,
            client,
            _server: server,
            inside,
            outside,
            server: server_port,
            generator,
            expected,
            napi,
        })
    }

    /// Where the packets come from, and its device.
    pub fn client(&self) -> (&Namespace, &'static str) {
        (&self.client, FAR)
    }

    /// Runs `work` while the hero run's generator sends what it was told.
    pub fn while_hero_sends<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        while_sending(&self.programs, &self.client, Sending::Hero, work)
    }

    /// Sends the first packet of each flow, no faster than they arrive, until `known` says that `enough` are there.
    pub fn open_flows(
        &mut self,
        flows: u32,
        enough: u32,
        mut known: impl FnMut(&Self) -> anyhow::Result<u32>,
    ) -> anyhow::Result<()> {
        let mut there = 0;
        for _ in 0..PASSES {
            self.send_each(flows)?;
            there = known(self)?;
            if there >= enough {
                return Ok(());
            }
        }
        anyhow::bail!(
            "only {there} of {flows} flows are there after {PASSES} passes over all of them, {enough} are wanted"
        )
    }

    /// Sends a packet of each of `flows` flows and adds up the checksums of those that arrive. If some were
    /// lost all are sent again.
    pub fn inspect(&mut self, flows: u32) -> anyhow::Result<Seen> {
        self.expected.check = 1;
        self.programs.tell_sink(&self.expected)?;
        let seen = self.send_until_all_arrive(flows);
        self.expected.check = 0;
        self.programs.tell_sink(&self.expected)?;
        seen
    }

    /// Runs `work` while the server answers every packet that it gets.
    pub fn answered<T>(&mut self, work: impl FnOnce(&mut Self) -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.expected.answer = 1;
        self.programs.tell_sink(&self.expected)?;
        let worked = work(self);
        self.expected.answer = 0;
        self.programs.tell_sink(&self.expected)?;
        worked
    }

    /// From here on the packets are SYNs, each the first of a connection, or datagrams again.
    pub fn send_syns(&mut self, syns: bool) {
        self.generator.protocol = if syns { TCP } else { UDP };
    }

    fn send_until_all_arrive(&mut self, flows: u32) -> anyhow::Result<Seen> {
        let mut seen = Seen::default();
        for _ in 0..PASSES {
            let before = self.programs.seen()?;
            self.send_each(flows)?;
            seen = difference(before, self.programs.seen()?);
            if seen.packets == u64::from(flows) {
                break;
            }
        }
        Ok(seen)
    }

    /// Sends packets of `flows` flows at random, as many as the client can, and counts what arrives in `window`.
    pub fn measure(&mut self, flows: u32, ramp: Duration, window: Duration) -> anyhow::Result<Sample> {
        self.aim(flows, PICK_RANDOM, SEED)?;
        while_sending(&self.programs, &self.client, Sending::Flows, || {
            thread::sleep(ramp);
            let (start, busy, before) = (Instant::now(), self.napi.run_time()?, self.programs.seen()?);
            thread::sleep(window);
            let (end, busy_end, after) = (Instant::now(), self.napi.run_time()?, self.programs.seen()?);
            let seconds = (end - start).as_secs_f64();
            let seen = difference(before, after);
            Ok(Sample {
                packets_per_second: seen.packets as f64 / seconds,
                busy: busy_end.saturating_sub(busy).as_secs_f64() / seconds,
                seen,
            })
        })
    }

    /// Sends a packet of each of `flows` flows, as fast as they arrive, and says how fast that is.
    pub fn burst(&mut self, flows: u32) -> anyhow::Result<Sample> {
        let (seen, busy) = (self.programs.seen()?, self.napi.run_time()?);
        let began = Instant::now();
        let arriving = self.send_each(flows)?;
        let whole = began.elapsed().as_secs_f64();
        let seen = difference(seen, self.programs.seen()?);
        Ok(Sample {
            packets_per_second: arriving,
            busy: self.napi.run_time()?.saturating_sub(busy).as_secs_f64() / whole,
            seen,
        })
    }

    /// Sends packets that do not arrive, as many as the client can, and counts those that the gateway has received in
    /// `window`.
    pub fn measure_received(
        &mut self,
        flows: u32,
        ramp: Duration,
        window: Duration,
    ) -> anyhow::Result<Sample> {
        self.aim(flows, PICK_RANDOM, SEED)?;
        while_sending(&self.programs, &self.client, Sending::Flows, || {
            thread::sleep(ramp);
            // Each with a time of its own: this thread shares a processor with the gateway's, which goes first.
            let ran = || -> anyhow::Result<_> { Ok((Instant::now(), self.napi.run_time()?)) };
            let (seen, (start, before), (then, ran_before)) =
                (self.programs.seen()?, self.received()?, ran()?);
            thread::sleep(window);
            let (seen_end, (end, after), (now, ran_after)) =
                (self.programs.seen()?, self.received()?, ran()?);
            let ran = ran_after.saturating_sub(ran_before).as_secs_f64();
            Ok(Sample {
                packets_per_second: (after - before) as f64 / (end - start).as_secs_f64(),
                busy: ran / (now - then).as_secs_f64(),
                seen: difference(seen, seen_end),
            })
        })
    }

    /// Packets that the gateway's device towards the client has received so far, and when that was. veth counts what its NAPI
    /// has handed on, whatever became of it there.
    pub fn received(&self) -> anyhow::Result<(Instant, u64)> {
        let (now, text) =
            self.gateway.enter(|| (Instant::now(), std::fs::read_to_string("/proc/thread-self/net/dev")));
        let text = text.context("/proc/thread-self/net/dev")?;
        let of = |line: &str| -> Option<u64> {
            let (device, numbers) = line.split_once(':')?;
            let packets = numbers.split_whitespace().nth(1)?;
            if device.trim() == self.inside.device { packets.parse().ok() } else { None }
        };
        let packets =
            text.lines().find_map(of).with_context(|| format!("{} is not in {text}", self.inside.device))?;
        Ok((now, packets))
    }

    /// One packet of each flow, no faster than they arrive; returns when they have arrived or are lost, with how many arrived
    /// a second. The time is the generator's own, which is never further than a window ahead: this thread shares a
    /// processor with the gateway's, which goes first.
    fn send_each(&mut self, flows: u32) -> anyhow::Result<f64> {
        self.aim(flows, PICK_IN_ORDER, 0)?;
        let before = self.programs.seen()?.packets;
        while_sending(&self.programs, &self.client, Sending::Flows, || {
            let (mut arrived, mut since) = (before, Instant::now());
            loop {
                thread::sleep(Duration::from_millis(2));
                stop::check()?;
                let now = self.programs.seen()?.packets;
                if now != arrived {
                    (arrived, since) = (now, Instant::now());
                }
                let (sent, took) = self.programs.position()?;
                let all_sent = sent >= u64::from(flows);
                if all_sent && (arrived - before >= u64::from(flows) || since.elapsed() > SILENCE) {
                    return Ok((arrived - before) as f64 / took.as_secs_f64());
                }
            }
        })
    }

    fn aim(&mut self, flows: u32, pick: u32, start: u64) -> anyhow::Result<()> {
        ensure!(flows.is_power_of_two(), "{flows} flows are not a power of two");
        self.generator.flow_mask = flows - 1;
        self.generator.pick = pick;
        self.programs.tell_generator(&self.generator)?;
        self.programs.seek(start)
    }
}

fn connect(gateway: &Namespace, device: &str, far: &Namespace) -> anyhow::Result<Port> {
    gateway.ip(&format!("link add {device} type veth peer name {FAR} netns {}", far.name()))?;
    gateway.ip(&format!("link set {device} up"))?;
    far.ip(&format!("link set {FAR} up"))?;
    let carrier =
        || gateway.ip(&format!("-o link show dev {device}")).is_ok_and(|line| line.contains("LOWER_UP"));
    ensure!(eventually(Duration::from_secs(2), carrier), "{device} has no carrier");
    port(gateway, device)
}

fn port(namespace: &Namespace, device: &str) -> anyhow::Result<Port> {
    Ok(Port { device: device.to_owned(), ifindex: namespace.ifindex(device)?, mac: namespace.mac(device)? })
}

pub(super) fn difference(before: Seen, after: Seen) -> Seen {
    Seen {
        packets: after.packets - before.packets,
        connections: after.connections - before.connections,
        translated: after.translated - before.translated,
        sound: after.sound - before.sound,
        other: after.other - before.other,
    }
}

/// An address as the tables have it.
pub(super) fn network_order(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
