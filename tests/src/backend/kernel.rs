//! The loaded programs, by BPF_PROG_TEST_RUN, in a namespace and on a bpffs of their own.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context as _;
use portcullis::datapath::{Datapath, LoadOptions, Route, now_tick};
use portcullis_common::engine::Hook;
use portcullis_common::layout::HalfRecord;
use portcullis_common::{GuestFlows, NextHop, Reason};

use super::{Action, At, Backend, Gateway, Outcome};
use crate::lab::{BpfFs, Namespace};

/// The policy in the kernel. Must be made and used inside its namespace: see [`KernelBackend::with`].
pub struct KernelBackend {
    pub gateway: Gateway,
    pub datapath: Datapath,
    hook: Hook,
}

impl KernelBackend {
    /// Runs `work` with the policy loaded, on a thread inside a namespace that has a veth for every device.
    pub fn with<T: Send>(
        yaml: &str,
        devices: &[&str],
        hook: Hook,
        work: impl FnOnce(&mut KernelBackend) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        Self::with_table(yaml, devices, hook, 1 << 14, work)
    }

    /// The same with a flow table of so many buckets.
    pub fn with_table<T: Send>(
        yaml: &str,
        devices: &[&str],
        hook: Hook,
        flow_buckets: u32,
        work: impl FnOnce(&mut KernelBackend) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let namespace = Namespace::create("table")?;
        let bpffs = BpfFs::mount()?;
        for (number, device) in devices.iter().enumerate() {
            namespace.ip(&format!("link add name {device} type veth peer name peer{number}"))?;
            namespace.ip(&format!("link set dev {device} up"))?;
            namespace.ip(&format!("link set dev peer{number} up"))?;
        }
        let indices: BTreeMap<String, u32> = devices
            .iter()
            .map(|d| Ok((d.to_string(), namespace.ifindex(d)?)))
            .collect::<anyhow::Result<_>>()?;
        namespace.enter(|| {
            let gateway = Gateway::compile(yaml, |name| indices.get(name).copied())?;
            let mut datapath = Datapath::open(
                &bpffs.path().join("portcullis"),
                &LoadOptions { flow_buckets, ..Default::default() },
            )?;
            datapath.install(&gateway.image())?;
            for (index, hop) in gateway.next_hops() {
                datapath.set_next_hop(index, &hop)?;
            }
            for destination in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
                let next_hop = gateway.world_hop.into();
                datapath.set_route(&Route { destination, prefix_length: 0, next_hop })?;
            }
            work(&mut KernelBackend { gateway, datapath, hook })
        })
    }

    fn run_on(&mut self, hook: Hook, at: At, frame: &[u8]) -> anyhow::Result<Outcome> {
        let (outcome, actions) = match (at, hook) {
            (At::Ingress(device), Hook::Xdp) => (self.datapath.run_xdp(frame, self.ifindex(device)?)?, XDP),
            (At::Ingress(device), Hook::Tc) => (self.datapath.run_tc(frame, self.ifindex(device)?)?, TC),
            // Egress has no XDP: both kernel backends use the TC program here.
            (At::HostEgress(device), _) => {
                (self.datapath.run_classifier("pc_host", frame, self.ifindex(device)?, 0)?, TC)
            }
            (At::Guard, _) => {
                let uplink = self.gateway.devices[&self.gateway.uplink].ifindex;
                (self.datapath.run_classifier("pc_guard", frame, uplink, 0)?, TC)
            }
        };
        let action = actions.iter().find(|(code, _)| *code == outcome.verdict).map(|(_, action)| *action);
        Ok(Outcome {
            action: action.with_context(|| format!("{} answered {}", self.name(), outcome.verdict))?,
            frame: outcome.packet,
        })
    }

    pub fn ifindex(&self, device: &str) -> anyhow::Result<u32> {
        self.gateway.devices.get(device).map(|d| d.ifindex).with_context(|| format!("no device {device}"))
    }
}

const XDP: [(u32, Action); 3] = [(1, Action::Drop), (2, Action::Pass), (4, Action::Send)];
/// TC_ACT_UNSPEC is how a program says "next"; outside a chain it is -1.
const TC: [(u32, Action); 3] = [(2, Action::Drop), (u32::MAX, Action::Pass), (7, Action::Send)];

impl Backend for KernelBackend {
    fn name(&self) -> &'static str {
        match self.hook {
            Hook::Xdp => "XDP",
            Hook::Tc => "TC",
        }
    }
    fn hook(&self) -> Hook {
        self.hook
    }
    fn gateway(&self) -> &Gateway {
        &self.gateway
    }
    fn run(&mut self, at: At, frame: &[u8]) -> anyhow::Result<Outcome> {
        self.run_on(self.hook, at, frame)
    }
    fn run_left_to_tc(&mut self, at: At, frame: &[u8]) -> anyhow::Result<Outcome> {
        self.run_on(Hook::Tc, at, frame)
    }
    fn change(&mut self, yaml: &str) -> anyhow::Result<()> {
        self.gateway.recompile(yaml)?;
        self.datapath.install(&self.gateway.image())?;
        Ok(())
    }
    fn adopt_for(&mut self, seconds: u32) {
        self.datapath.adopt_for(seconds);
    }
    fn set_world(&mut self, change: &dyn Fn(&mut NextHop)) -> anyhow::Result<()> {
        let mut hop = self.gateway.world();
        change(&mut hop);
        self.datapath.set_next_hop(self.gateway.world_hop, &hop)
    }
    fn cut_off(&mut self, destination: IpAddr) -> anyhow::Result<()> {
        let prefix_length = if destination.is_ipv4() { 32 } else { 128 };
        self.datapath.set_route(&Route { destination, prefix_length, next_hop: 0 })
    }
    fn counters(&self) -> anyhow::Result<BTreeMap<Reason, u64>> {
        let counts = self.datapath.reasons()?;
        Ok(Reason::ALL
            .iter()
            .filter_map(|reason| counts.get(*reason as usize).map(|c| (*reason, c.packets)))
            .filter(|(_, packets)| *packets != 0)
            .collect())
    }
    fn guest_flows(&self, member: &str) -> anyhow::Result<GuestFlows> {
        let hop = self.gateway.hop_of(member)?;
        let used = self.datapath.guest_uses()?.read(hop);
        Ok(GuestFlows {
            held: used.held.into(),
            waiting: used.half_open.into(),
            refused: used.refused,
            replaced: used.replaced,
            ..GuestFlows::default()
        })
    }
    fn rule_hits(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        Ok(self
            .datapath
            .rule_counts()?
            .into_iter()
            .filter(|(_, count)| count.hits != 0)
            .map(|(id, count)| (self.gateway.registry.rule_key(id).unwrap_or("?").to_owned(), count.hits))
            .collect())
    }
    fn half_records(&self) -> anyhow::Result<(Vec<HalfRecord>, u32)> {
        let (four, six) = (self.datapath.flow_table()?, self.datapath.flow_table6()?);
        Ok((four.iter().chain(six.iter()).map(|(_, half)| half).collect(), now_tick()))
    }
}
