//! The engine in plain memory.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context as _;
use portcullis_common::clock::ticks;
use portcullis_common::engine::host::HostEnv;
use portcullis_common::engine::{Hook, Verdict};
use portcullis_common::env::Env as _;
use portcullis_common::flow::{Ctl, LIVE};
use portcullis_common::layout::HalfRecord;
use portcullis_common::{GuestFlows, NextHop, Reason};

use super::{Action, At, Backend, Gateway, Outcome};

/// The policy on the host engine.
pub struct HostBackend {
    gateway: Gateway,
    pub env: HostEnv,
}

impl HostBackend {
    /// Compiles the policy for devices numbered from 10 on, in the order they are asked for.
    pub fn new(yaml: &str) -> anyhow::Result<Self> {
        Self::with_table(yaml, 1 << 12)
    }

    /// The same with flow tables of so many buckets.
    pub fn with_table(yaml: &str, buckets: u32) -> anyhow::Result<Self> {
        let numbers = std::cell::RefCell::new(BTreeMap::new());
        let gateway = Gateway::compile(yaml, |name| {
            let mut numbers = numbers.borrow_mut();
            let next = 10 + numbers.len() as u32;
            Some(*numbers.entry(name.to_owned()).or_insert(next))
        })?;
        let env = host_env(&gateway, buckets);
        Ok(Self { gateway, env })
    }
}

/// Tables of the host engine with this policy in force.
pub fn host_env(gateway: &Gateway, buckets: u32) -> HostEnv {
    let mut env = HostEnv::new(buckets, [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321]);
    put_in_force(&mut env, gateway);
    env.routes.insert(0, 0, gateway.world_hop as u32);
    env.routes6.insert(0, 0, gateway.world_hop as u32);
    env
}

fn put_in_force(env: &mut HostEnv, gateway: &Gateway) {
    let c = &gateway.compiled;
    let parity = (c.generation & 1) as usize;
    env.control.settings[parity] = c.settings;
    env.policy[parity] = c.host_policy();
    for device in &c.devices {
        env.set_device(c.generation, *device);
    }
    for (index, hop) in gateway.next_hops() {
        env.set_next_hop(index, hop);
    }
    env.control.generation = c.generation;
}

impl Backend for HostBackend {
    fn name(&self) -> &'static str {
        "host engine"
    }
    fn hook(&self) -> Hook {
        Hook::Tc
    }
    fn gateway(&self) -> &Gateway {
        &self.gateway
    }
    fn run(&mut self, at: At, frame: &[u8]) -> anyhow::Result<Outcome> {
        let index = |name: &str| {
            self.gateway.devices.get(name).map(|d| d.ifindex).with_context(|| format!("no device {name}"))
        };
        let (verdict, frame) = match at {
            At::Ingress(device) => {
                let (verdict, frame, _) = self.env.packet(frame, index(device)?, Hook::Tc, false);
                (verdict, frame)
            }
            At::HostEgress(device) => {
                let (verdict, frame, _) = self.env.packet(frame, index(device)?, Hook::Tc, true);
                (verdict, frame)
            }
            At::Guard => (self.env.guard(frame), frame.to_vec()),
        };
        let action = match verdict {
            Verdict::Pass => Action::Pass,
            Verdict::Drop => Action::Drop,
            Verdict::Redirect(_) | Verdict::Neighbour(..) | Verdict::Neighbour6(_) => Action::Send,
            Verdict::Next(stage) => anyhow::bail!("the engine stopped before {stage:?}"),
        };
        Ok(Outcome { action, frame })
    }
    fn change(&mut self, yaml: &str) -> anyhow::Result<()> {
        self.gateway.recompile(yaml)?;
        put_in_force(&mut self.env, &self.gateway);
        Ok(())
    }
    fn adopt_for(&mut self, seconds: u32) {
        let until = self.env.now().wrapping_add(ticks(seconds));
        self.env.control.start = if seconds == 0 { 0 } else { until };
    }
    fn set_world(&mut self, change: &dyn Fn(&mut NextHop)) -> anyhow::Result<()> {
        let mut hop = self.gateway.world();
        change(&mut hop);
        self.env.set_next_hop(self.gateway.world_hop, hop);
        Ok(())
    }
    fn cut_off(&mut self, destination: IpAddr) -> anyhow::Result<()> {
        match destination {
            IpAddr::V4(address) => self.env.routes.insert4(32, address.octets(), 0),
            IpAddr::V6(address) => self.env.routes6.insert6(128, address.octets(), 0),
        }
        Ok(())
    }
    fn counters(&self) -> anyhow::Result<BTreeMap<Reason, u64>> {
        Ok(self.env.counters().into_iter().collect())
    }
    fn guest_flows(&self, member: &str) -> anyhow::Result<GuestFlows> {
        let guest = self.env.guest_flows(self.gateway.hop_of(member)?.into()).context("a next hop")?;
        // SAFETY: an element of the table, which nobody writes meanwhile.
        Ok(unsafe { *guest })
    }
    fn rule_hits(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let hits = self.env.rule_hits.lock().map_err(|_| anyhow::anyhow!("a test thread panicked"))?;
        Ok(hits
            .iter()
            .map(|(id, count)| (self.gateway.registry.rule_key(*id).unwrap_or("?").to_owned(), count.packets))
            .collect())
    }
    fn half_records(&self) -> anyhow::Result<(Vec<HalfRecord>, u32)> {
        // SAFETY: the elements live as long as the tables, and nobody runs a packet meanwhile: that takes `&mut self`.
        let four = (0..).map_while(|i| self.env.bucket(i)).flat_map(|bucket| unsafe { (*bucket).slots });
        // SAFETY: as above.
        let six = (0..).map_while(|i| self.env.bucket6(i)).flat_map(|bucket| unsafe { (*bucket).slots });
        let live = |half: &HalfRecord| Ctl(half.ctl).phase() == LIVE;
        Ok((four.chain(six.map(|record| record.half)).filter(live).collect(), self.env.now()))
    }
}
