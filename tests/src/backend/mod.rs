//! One policy on three engines: on the host, under XDP and under TC by BPF_PROG_TEST_RUN. What a packet meets on one
//! must be what it meets on the others (design §7).

mod host;
mod kernel;

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context as _;
use portcullis::compile::{self, Compiled, DeviceFacts, HostFacts, Ownership, Registry};
use portcullis::datapath::PolicyImage;
use portcullis::policy;
use portcullis_common::engine::Hook;
use portcullis_common::{
    GuestFlows, HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, HOP_HOST, HOP_LOOP, HOP_WORLD,
    HalfRecord, NEXT_HOP_HOST, NEXT_HOP_LOOP, NextHop, Reason,
};

pub use host::{HostBackend, host_env};
pub use kernel::KernelBackend;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Left to the kernel, untouched.
    Pass,
    Drop,
    /// Sent out of a device.
    Send,
}

/// A packet after the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub action: Action,
    pub frame: Vec<u8>,
}

/// Where a packet meets the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Arriving on this device.
    Ingress(&'static str),
    /// Sent by the host, leaving on this guest's device.
    HostEgress(&'static str),
    /// Leaving on the uplink.
    Guard,
}

/// An engine with the policy in force.
pub trait Backend {
    fn name(&self) -> &'static str;
    fn hook(&self) -> Hook;
    fn gateway(&self) -> &Gateway;
    fn run(&mut self, at: At, frame: &[u8]) -> anyhow::Result<Outcome>;
    /// Runs a packet that XDP has left to the TC program of its device.
    ///
    /// # Errors
    /// As [`Backend::run`].
    fn run_left_to_tc(&mut self, at: At, frame: &[u8]) -> anyhow::Result<Outcome> {
        self.run(at, frame)
    }
    /// Puts another policy in force, as the next generation.
    fn change(&mut self, yaml: &str) -> anyhow::Result<()>;
    /// As if the first start had been a moment ago, with a grace of so many seconds.
    fn adopt_for(&mut self, seconds: u32);
    /// Changes the next hop towards the world.
    fn set_world(&mut self, change: &dyn Fn(&mut NextHop)) -> anyhow::Result<()>;
    /// Makes a hole in the routes: what goes to this address has no way out.
    fn cut_off(&mut self, destination: IpAddr) -> anyhow::Result<()>;
    /// Counters that are not zero.
    fn counters(&self) -> anyhow::Result<BTreeMap<Reason, u64>>;
    /// Hits of rules that are not zero, by the rule's key (`web/Inbound/securityRules/AllowSsh`).
    fn rule_hits(&self) -> anyhow::Result<BTreeMap<String, u64>>;
    /// Every published half-record, and the tick it is now. Of IPv6 the half that both families have.
    fn half_records(&self) -> anyhow::Result<(Vec<HalfRecord>, u32)>;
    /// What the guest with this ip configuration (`vm1/ipconfig1`) has of the flow tables.
    fn guest_flows(&self, member: &str) -> anyhow::Result<GuestFlows>;
}

/// The hardware address of the router towards the world, on every backend.
pub const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0xff, 0x01];

/// A compiled policy and the devices it was compiled for.
pub struct Gateway {
    pub compiled: Compiled,
    pub registry: Registry,
    pub devices: BTreeMap<String, DeviceFacts>,
    pub uplink: String,
    /// Index of the next hop towards the world.
    pub world_hop: u16,
    /// See [`STRICT`].
    strict: bool,
}

/// A policy of the tests that says this asks for frames to the uplink's own hardware address, as the product does. The others' frames
/// are for any device of the gateway's.
pub const STRICT: &str = "# frames for other stations are told apart";

fn address_any(compiled: &mut Compiled, strict: bool) {
    if !strict {
        compiled.devices.iter_mut().for_each(|device| device.strict = 0);
    }
}

impl Gateway {
    /// Compiles `yaml` for devices with these interface indices, as generation 1. The one uplink has the default route.
    pub fn compile(yaml: &str, ifindex: impl Fn(&str) -> Option<u32>) -> anyhow::Result<Self> {
        let loaded = policy::parse("test.yaml", yaml)
            .map_err(|errors| anyhow::anyhow!("the test's policy:\n{errors}"))?;
        let network = loaded.network;
        let uplink = network.uplinks.first().context("the policy has no uplink")?.device.clone();
        let mut facts = HostFacts::default();
        let names =
            network.interfaces.iter().map(|i| &i.device).chain(network.uplinks.iter().map(|u| &u.device));
        for (number, name) in names.enumerate() {
            let ifindex = ifindex(name).with_context(|| format!("no device {name}"))?;
            let mac = [0x02, 0, 0, 0, 0xaa, number as u8];
            facts.devices.entry(name.clone()).or_insert(DeviceFacts { ifindex, mac, gateway_mac: mac });
        }
        facts.addresses.push([203, 0, 113, 1].into());
        let mut registry = Registry::default();
        let mut compiled = compile::compile(&network, &facts, &mut registry, &Ownership::default(), 1)
            .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        let strict = yaml.contains(STRICT);
        address_any(&mut compiled, strict);
        let world_hop = registry
            .next_hop(&format!("world:{uplink}/203.0.113.254"))
            .map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(Self { compiled, registry, devices: facts.devices, uplink, world_hop, strict })
    }

    /// The same devices with another policy, as the next generation.
    pub fn recompile(&mut self, yaml: &str) -> anyhow::Result<()> {
        let loaded = policy::parse("test.yaml", yaml)
            .map_err(|errors| anyhow::anyhow!("the test's policy:\n{errors}"))?;
        self.compile_next(&loaded.network)
    }

    /// The same with other settings than the policy's, for what no policy can say.
    pub fn recompile_as(
        &mut self,
        yaml: &str,
        change: impl FnOnce(&mut portcullis_common::layout::Settings),
    ) -> anyhow::Result<()> {
        self.recompile(yaml)?;
        change(&mut self.compiled.settings);
        Ok(())
    }

    /// The same with a policy that was never a file.
    pub fn compile_next(&mut self, network: &policy::network::Network) -> anyhow::Result<()> {
        let mut facts = HostFacts { devices: self.devices.clone(), ..HostFacts::default() };
        facts.addresses.push([203, 0, 113, 1].into());
        let generation = self.compiled.generation + 1;
        self.compiled =
            compile::compile(network, &facts, &mut self.registry, &self.compiled.ownership, generation)
                .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        address_any(&mut self.compiled, self.strict);
        Ok(())
    }

    /// Index of a guest's next hop, by its ip configuration.
    pub fn hop_of(&self, member: &str) -> anyhow::Result<u16> {
        let (hop, _) = self
            .registry
            .next_hops()
            .find(|(_, key)| key.strip_prefix("guest:") == Some(member))
            .with_context(|| format!("no guest {member}"))?;
        Ok(hop)
    }

    /// The next hops by index: the host, every guest (resolved only if the policy pins its MAC), the router.
    pub fn next_hops(&self) -> Vec<(u16, NextHop)> {
        let mut hops = vec![
            (NEXT_HOP_HOST, NextHop { kind: HOP_HOST, ..NextHop::default() }),
            (NEXT_HOP_LOOP, NextHop { kind: HOP_LOOP, ..NextHop::default() }),
        ];
        for hop in &self.compiled.guest_hops {
            let pinned = if hop.mac.is_some() { HOP_FLAG_PINNED | HOP_FLAG_RESOLVED } else { 0 };
            hops.push((
                hop.index,
                NextHop {
                    ifindex: hop.ifindex,
                    kind: HOP_GUEST,
                    flags: HOP_FLAG_XDP | pinned,
                    mtu: 1500,
                    mac: hop.mac.unwrap_or_default(),
                    source_mac: hop.source_mac,
                    address: portcullis_common::layout::v4(hop.address),
                    address6: portcullis_common::layout::v6(hop.address),
                    ..NextHop::default()
                },
            ));
        }
        let uplink = &self.devices[&self.uplink];
        hops.push((
            self.world_hop,
            NextHop {
                ifindex: uplink.ifindex,
                kind: HOP_WORLD,
                flags: HOP_FLAG_XDP | HOP_FLAG_RESOLVED,
                mtu: 1500,
                mac: ROUTER_MAC,
                source_mac: uplink.mac,
                address: u32::from_ne_bytes([203, 0, 113, 254]),
                ..NextHop::default()
            },
        ));
        hops
    }

    /// The next hop towards the world, resolved.
    fn world(&self) -> NextHop {
        let mut hops = self.next_hops().into_iter();
        hops.find(|(index, _)| *index == self.world_hop).map(|(_, hop)| hop).unwrap_or_default()
    }

    /// What `Datapath::install` takes.
    pub fn image(&self) -> PolicyImage {
        let c = &self.compiled;
        PolicyImage {
            generation: c.generation,
            pages: c.pages.clone(),
            prefixes: c.prefixes.clone(),
            prefixes6: c.prefixes6.clone(),
            spaces: c.spaces.clone(),
            spaces6: c.spaces6.clone(),
            endpoints: c.endpoints.clone(),
            endpoints6: c.endpoints6.clone(),
            devices: c.devices.clone(),
            guest_hops: self.next_hops().into_iter().filter(|(_, hop)| hop.kind == HOP_GUEST).collect(),
            settings: c.settings,
            rule_ids: c.rules.iter().map(|r| r.id).collect(),
        }
    }

    /// Does `member` (`vm1/ipconfig1`) own this port of this public address, for TCP and for UDP?
    pub fn owns(&self, member: &str, address: std::net::Ipv4Addr, port: u16) -> bool {
        let owner = |protocol| self.compiled.ownership.owner(address.into(), protocol, port);
        [6, 17].into_iter().all(|protocol| owner(protocol).is_some_and(|owner| owner.member == member))
    }
}
