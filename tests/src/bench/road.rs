//! A client, a gateway and a server with real sockets at both ends; the gateway is a candidate's.
//!
//! ```text
//!  client (all guests' addresses) ---- inside [candidate] outside ---- server (198.51.100.1 ... on its loopback)
//! ```
//!
//! Where a section is about the gateway's work, everything the gateway does is on the last processor, as the polling
//! threads of its two devices, and the sockets' calls are on the first. What it sends is received there, too: a thread
//! that had to be woken for it on another processor costs more than a packet does, which would hide what is measured (with
//! such threads nftables, Portcullis and bare forwarding all took 55 to 65 µs for a TCP cycle; without 37, 30 and 30).

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::napi::{self, NapiThread};
use crate::edge::binary;
use crate::lab::{BpfFs, Craft, Daemon, DaemonSpec, LabId, Mac, Namespace, RawSender, eventually};

/// The guests' default route.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The gateway and the server on the link between them.
const UPLINK: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
/// The address all guests share under Portcullis; under nftables it is [`UPLINK`].
const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The server's addresses, one routed hop away.
pub(super) const SERVERS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(198, 51, 100, 1),
    Ipv4Addr::new(198, 51, 100, 2),
    Ipv4Addr::new(198, 51, 100, 3),
    Ipv4Addr::new(198, 51, 100, 4),
];
/// Packets to this one end in the server's routing table, without an answer.
pub(super) const NOBODY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 99);
/// Ready within this.
const READY: Duration = Duration::from_secs(30);

/// Device names are unique on the machine, because NAPI threads are known by them.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Who forwards in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// Nobody: one veth from the client to the server. What the rest costs.
    Wire,
    /// The kernel, without rules and without translation; the server knows the way back.
    Forwarding,
    /// The kernel, with nftables: stateful accept and masquerade.
    Nftables,
    /// The controller and its datapath, both devices under XDP.
    Xdp,
    /// The same under TC.
    Tc,
}

impl Gate {
    pub const fn title(self) -> &'static str {
        match self {
            Gate::Wire => "no gateway",
            Gate::Forwarding => "kernel forwarding",
            Gate::Nftables => "nftables masquerade",
            Gate::Xdp => "Portcullis, XDP",
            Gate::Tc => "Portcullis, TC",
        }
    }

    /// From where the server sees what `guest` sends.
    pub const fn seen_as(self, guest: Ipv4Addr) -> Ipv4Addr {
        match self {
            Gate::Wire | Gate::Forwarding => guest,
            Gate::Nftables => UPLINK,
            Gate::Xdp | Gate::Tc => FRONTEND,
        }
    }

    pub const fn is_portcullis(self) -> bool {
        matches!(self, Gate::Xdp | Gate::Tc)
    }

    const fn hook(self) -> Option<&'static str> {
        match self {
            Gate::Xdp => Some("xdp"),
            Gate::Tc => Some("tc"),
            _ => None,
        }
    }
}

/// How the namespaces are linked, and what works where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    /// Transmit offloads off and GRO on at all ends, so that XDP may be anywhere. The gateway's devices are polled by
    /// threads on the last processor.
    Polled,
    /// As a container runtime leaves them: offloads on, nobody polls, a packet is the sender's work all the way.
    Container,
}

/// What is to be built.
#[derive(Debug, Clone)]
pub(super) struct RoadSpec {
    pub gate: Gate,
    pub links: Links,
    /// Addresses of guests behind the one device.
    pub guests: u16,
    /// `allocatedOutboundPorts`; 0: by the size of the pool.
    pub ports: u32,
    /// `flowTable.maxFlows`.
    pub max_flows: u32,
    /// More of the policy, as `snat: ...`.
    pub extra: String,
}

/// The namespaces, and what runs in them. Dropped, everything is gone.
pub(super) struct Road {
    /// Before the namespaces it is in.
    controller: Option<Controller>,
    pub gate: Gate,
    pub client: Namespace,
    pub gateway: Namespace,
    pub server: Namespace,
    /// The gateway's device towards the server.
    outside: String,
    guests: u16,
    /// The polling threads of the gateway's two devices.
    napi: Vec<NapiThread>,
}

struct Controller {
    // The daemon goes before the pins it made.
    daemon: Daemon,
    _pins: BpfFs,
}

impl Road {
    /// Builds it; the first guest reaches the server.
    pub fn build(spec: &RoadSpec) -> anyhow::Result<Self> {
        Self::build_all(spec).with_context(|| format!("the namespaces for {}", spec.gate.title()))
    }

    fn build_all(spec: &RoadSpec) -> anyhow::Result<Self> {
        let lab = LabId::fresh();
        let [client, gateway, server] =
            ["client", "gateway", "server"].map(|name| Namespace::create_in(&lab, name));
        let (client, gateway, server) = (client?, gateway?, server?);
        let stem = format!("r{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let [near, inside, outside, far] = ["c", "i", "o", "s"].map(|end| format!("{stem}{end}"));
        let wire = spec.gate == Gate::Wire;
        let links = [(&gateway, &inside, &client, &near), (&gateway, &outside, &server, &far)];
        let links = if wire { vec![(&client, &near, &server, &far)] } else { links.to_vec() };
        for (namespace, device, other, end) in &links {
            let name = other.name();
            namespace.ip(&format!("link add {device} type veth peer name {end} netns {name}"))?;
        }
        let ends: Vec<_> =
            links.into_iter().flat_map(|(one, device, other, end)| [(one, device), (other, end)]).collect();
        for &(namespace, device) in &ends {
            if spec.links == Links::Polled {
                let off = ["tx", "off", "tso", "off", "gso", "off"];
                namespace.run(&[&["ethtool", "-K", device], &off[..]].concat())?;
            }
            namespace.ip(&format!("link set {device} up"))?;
        }
        if spec.links == Links::Polled {
            // Of devices that are up, or the kernel does not take note that frames may be redirected into them.
            for &(namespace, device) in &ends {
                namespace.run(&["ethtool", "-K", device, "gro", "on"])?;
            }
        }
        let mut napi = Vec::new();
        if spec.links == Links::Polled {
            // Without a gateway its processor has the work of the last mile, as it always has.
            for (namespace, device) in ends.into_iter().filter(|(n, _)| wire || n.name() == gateway.name()) {
                let thread = NapiThread::start(namespace, device)?;
                thread.pin_first(napi::processors().1)?;
                napi.push(thread);
            }
        }
        let (client_mac, server_mac) = (client.mac(&near)?, server.mac(&far)?);
        let macs = if wire {
            [server_mac, client_mac, client_mac, server_mac]
        } else {
            [gateway.mac(&inside)?, gateway.mac(&outside)?, client_mac, server_mac]
        };
        let mut road = Self {
            controller: None,
            gate: spec.gate,
            client,
            gateway,
            server,
            outside,
            guests: spec.guests,
            napi,
        };
        road.address(&near, &far, macs)?;
        match spec.gate {
            Gate::Wire => {}
            Gate::Forwarding | Gate::Nftables => road.forward(&inside, macs[2])?,
            Gate::Xdp | Gate::Tc => road.control(spec, &inside, &near, macs)?,
        }
        Ok(road)
    }

    /// The address of a guest, counted from 0.
    pub fn guest(number: u16) -> Ipv4Addr {
        // The first three of a subnet are not for guests.
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 4).to_bits() + u32::from(number))
    }

    /// The addresses of all guests.
    pub fn guests(&self) -> Vec<Ipv4Addr> {
        (0..self.guests).map(Self::guest).collect()
    }

    /// Time that the gateway's threads have been running.
    pub fn gateway_time(&self) -> anyhow::Result<Duration> {
        self.napi.iter().map(|thread| thread.run_time()).sum()
    }

    /// Frames that have left the gateway towards the server, by the kernel's statistics.
    pub fn forwarded(&self) -> anyhow::Result<u64> {
        let devices = self.gateway.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        // Eight columns about reception, then bytes and packets sent.
        let columns =
            devices.lines().find_map(|line| line.trim_start().strip_prefix(&self.outside)?.strip_prefix(':'));
        let packets = columns.and_then(|columns| columns.split_whitespace().nth(9)?.parse().ok());
        packets.with_context(|| format!("{} does not count packets: {devices}", self.outside))
    }

    /// The daemon's answer to a client command.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let controller =
            self.controller.as_ref().with_context(|| format!("{} has no controller", self.gate.title()))?;
        controller.daemon.ask(&[&["--output", "json"], arguments].concat())
    }

    /// Packets by reason so far, those of reasons that occurred.
    pub fn reasons(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let answer = self.ask(&["drops"])?;
        let rows = answer["reasons"].as_array().context("drops has reasons")?;
        let counted = rows
            .iter()
            .filter_map(|row| Some((row["reason"].as_str()?.to_owned(), row["packets"].as_u64()?)));
        Ok(counted.filter(|(_, packets)| *packets > 0).collect())
    }

    /// Runs of the entry programs of XDP and of TC so far; the kernel counts them while asked to.
    pub fn runs(&self) -> anyhow::Result<[u64; 2]> {
        let status = self.ask(&["status"])?;
        let devices = status["devices"].as_array().context("status has devices")?;
        // Counted for a program, not for a device: every device shows the same number.
        let of = |name: &str| {
            let programs = devices.iter().filter_map(|device| device["programs"].as_array()).flatten();
            programs
                .filter(|p| p["program"] == name)
                .filter_map(|p| p["runCount"].as_u64())
                .max()
                .unwrap_or(0)
        };
        Ok([of("pc_xdp"), of("pc_tc")])
    }

    /// Addresses and routes of both ends. Nobody asks for hardware addresses while something is measured: who has
    /// which is written down.
    fn address(
        &self,
        near: &str,
        far: &str,
        [inside_mac, outside_mac, _, server_mac]: [Mac; 4],
    ) -> anyhow::Result<()> {
        let (inside_mac, outside_mac) = (mac_text(inside_mac), mac_text(outside_mac));
        // Not whatever the machine prefers: BBR paces by timers, which would measure those. This one is in every kernel.
        for end in [&self.client, &self.server] {
            end.set_sysctl("net.ipv4.tcp_congestion_control", "reno")?;
        }
        let mut lines = String::new();
        for guest in self.guests() {
            let _ = writeln!(lines, "address add {guest}/21 dev {near}");
        }
        let _ = writeln!(lines, "neighbour replace {GATEWAY} lladdr {inside_mac} dev {near} nud permanent");
        let _ = writeln!(lines, "route add default via {GATEWAY} dev {near}");
        batch(&self.client, &lines)?;
        let mut lines = format!("address add {ROUTER}/24 dev {far}\n");
        for server in SERVERS {
            let _ = writeln!(lines, "address add {server}/32 dev lo");
        }
        let _ = writeln!(lines, "route add blackhole {NOBODY}");
        for address in [UPLINK, FRONTEND] {
            let _ =
                writeln!(lines, "neighbour replace {address} lladdr {outside_mac} dev {far} nud permanent");
        }
        let _ = writeln!(lines, "route add 10.0.0.0/21 via {UPLINK} dev {far}");
        batch(&self.server, &lines)?;
        if self.gate == Gate::Wire {
            return Ok(());
        }
        let (outside, server_mac) = (&self.outside, mac_text(server_mac));
        batch(
            &self.gateway,
            &format!(
                "address add {UPLINK}/24 dev {outside}\n\
                 neighbour replace {ROUTER} lladdr {server_mac} dev {outside} nud permanent\n\
                 route add default via {ROUTER} dev {outside}\n"
            ),
        )
    }

    /// The kernel forwards; under nftables what the guests' group says, and masquerade.
    fn forward(&self, inside: &str, client_mac: Mac) -> anyhow::Result<()> {
        let client_mac = mac_text(client_mac);
        let mut lines = format!("address add {GATEWAY}/21 dev {inside}\n");
        for guest in self.guests() {
            let _ =
                writeln!(lines, "neighbour replace {guest} lladdr {client_mac} dev {inside} nud permanent");
        }
        batch(&self.gateway, &lines)?;
        if self.gate == Gate::Nftables {
            let outside = &self.outside;
            let ruleset = format!(
                "table ip bench {{
                     chain forward {{
                         type filter hook forward priority filter; policy drop;
                         ct state established,related accept
                         iifname {inside} ip saddr 10.0.0.0/21 meta l4proto {{ tcp, udp }} accept
                     }}
                     chain postrouting {{
                         type nat hook postrouting priority srcnat;
                         oifname {outside} masquerade
                     }}
                 }}"
            );
            self.gateway.run(&["nft", &ruleset])?;
            // As long as `natgateway` holds a closed flow.
            self.gateway.set_sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "65")?;
        }
        self.gateway.set_sysctl("net.ipv4.ip_forward", "1")
    }

    fn control(&mut self, spec: &RoadSpec, inside: &str, near: &str, macs: [Mac; 4]) -> anyhow::Result<()> {
        let pins = BpfFs::mount()?;
        let policy = policy(spec, inside, &self.outside);
        let file = pins.scratch().write("policy.yaml", &policy)?;
        let mut daemon = Daemon::spawn(&self.gateway, &DaemonSpec::beside(&pins, &binary()?, &file))?;
        daemon.wait_ready(READY)?;
        self.controller = Some(Controller { daemon, _pins: pins });
        // The kernel would ask for its gateway in the name of one of its addresses only, and it need not ask at all.
        let sender = RawSender::open(&self.client, near)?;
        for guest in self.guests() {
            sender.send(&Craft::arp_request(macs[2], guest, GATEWAY))?;
            if guest.octets()[3] % 64 == 63 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let learned = |road: &Self| -> anyhow::Result<u64> {
            let reasons = road.reasons()?;
            Ok(reasons
                .iter()
                .filter(|(reason, _)| reason == "arp_answered")
                .map(|(_, packets)| packets)
                .sum())
        };
        let all = eventually(Duration::from_secs(10), || {
            learned(self).is_ok_and(|learned| learned >= u64::from(self.guests))
        });
        ensure!(all, "only {} of {} guests could announce themselves", learned(self)?, self.guests);
        Ok(())
    }
}

/// The policy, with the group that nftables' rules stand for.
fn policy(spec: &RoadSpec, inside: &str, outside: &str) -> String {
    let hook = spec.gate.hook().unwrap_or("auto");
    let mut yaml = String::from(
        "virtualNetworks: [{ name: bench, addressSpace: { addressPrefixes: [10.0.0.0/16] }, \
         subnets: [{ name: guests, addressPrefix: 10.0.0.0/21, networkSecurityGroup: outOnly }] }]\n\
         networkSecurityGroups:\n  - name: outOnly\n    securityRules:\n",
    );
    for (priority, name, direction, access, protocol) in [
        (100, "tcp", "Outbound", "Allow", "Tcp"),
        (110, "udp", "Outbound", "Allow", "Udp"),
        (4096, "noMore", "Outbound", "Deny", "'*'"),
        (4096, "none", "Inbound", "Deny", "'*'"),
    ] {
        let _ = writeln!(
            yaml,
            "      - {{ name: {name}, priority: {priority}, direction: {direction}, access: {access}, \
             protocol: {protocol}, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', \
             destinationPortRange: '*' }}"
        );
    }
    yaml.push_str("networkInterfaces:\n");
    for guest in 0..spec.guests {
        let _ = writeln!(
            yaml,
            "  - {{ name: g{guest}, device: {inside}, hook: {hook}, ipConfigurations: [{{ subnet: guests, \
             privateIPAddress: {} }}] }}",
            Road::guest(guest)
        );
    }
    let members: Vec<String> = (0..spec.guests).map(|guest| format!("g{guest}")).collect();
    let _ = write!(
        yaml,
        "publicIPAddresses: [{{ name: pip, ipAddress: {FRONTEND}, announce: proxy }}]\n\
         loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip }}]\n    \
         backendAddressPools: [{{ name: pool, backendIPConfigurations: [{}] }}]\n    \
         outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, \
         allocatedOutboundPorts: {} }}]\n\
         uplinks: [{{ device: {outside}, hook: {hook} }}]\nflowTable: {{ maxFlows: {}, maxFlowsPerGuest: {} }}\n{}",
        members.join(", "),
        spec.ports,
        spec.max_flows,
        spec.max_flows,
        spec.extra
    );
    yaml
}

/// Runs `ip` once for many lines.
fn batch(namespace: &Namespace, lines: &str) -> anyhow::Result<()> {
    namespace.run(&["sh", "-c", &format!("ip -batch - <<end\n{lines}end")]).map(drop)
}

fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_of_the_roads_is_in_order() {
        let spec = RoadSpec {
            gate: Gate::Xdp,
            links: Links::Polled,
            guests: 64,
            ports: 1000,
            max_flows: 1 << 20,
            extra: "snat: { profile: natgateway }\n".to_owned(),
        };
        let loaded = portcullis::policy::parse("bench", &policy(&spec, "inside", "outside"));
        let loaded = loaded.unwrap_or_else(|problems| panic!("{problems:?}"));
        assert_eq!(loaded.network.interfaces.len(), 64);
        assert_eq!(loaded.network.load_balancers[0].pools[0].members.len(), 64);
    }
}
