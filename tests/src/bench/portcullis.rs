//! Portcullis as it is shipped: policy text, compiler, tables and programs. Only the daemon is missing, so what it
//! would mirror from the kernel (route and router) is written here.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use portcullis::compile::{Compiled, DeviceFacts, GuestHop, HostFacts, Ownership, Registry, compile};
use portcullis::datapath::{
    AttachDevice, AttachPlan, Datapath, FlowTable, LoadOptions, PolicyImage, Role, Route, now_tick,
};
use portcullis_common::Reason;
use portcullis_common::flow::{Ctl, FLAG_FORWARD};
use portcullis_common::layout::{
    HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, HOP_FLAG_XDP, HOP_GUEST, HOP_WORLD, KIND_FLOW, NEXT_HOP_SLOTS,
    NextHop,
};

use super::layout::{SOCKETS, Seen};
use super::policy::{self, Groups};
use super::rig::{Port, Rig, SERVER, network_order};
use crate::lab::BpfFs;
use crate::stop;

/// The next hop of the default route; far from those the compiler hands out.
const WORLD_HOP: u16 = NEXT_HOP_SLOTS as u16 - 1;
const MTU: u16 = 1500;
/// After this the slots of a flow that was ended are free again.
const GRACE: Duration = Duration::from_millis(400);
/// How long that may take in all.
const FREE: Duration = Duration::from_secs(10);

/// What a policy's `flowTable.maxFlows` is when nobody says anything.
pub(super) fn default_table() -> u32 {
    ::portcullis::policy::network::FlowTable::default().max_flows
}

/// What a flow table is made for that has room for so many flows: the flows, and a mapping for each UDP socket, which
/// takes as much room as a flow; a quarter more than that, as for a table that refuses nobody. The default if that is
/// enough.
pub(super) fn table_for(flows: u32) -> u32 {
    let records = flows + SOCKETS;
    (records + records / 4).max(default_table())
}

/// Namespaces with Portcullis in the gateway.
pub(super) struct Portcullis {
    flows: FlowTable,
    datapath: Datapath,
    pub rig: Rig,
    /// Which hook the guests' device has.
    xdp: bool,
    // The pins go last: what is still attached goes with them.
    _pins: BpfFs,
}

impl Portcullis {
    /// Builds it with a flow table for `max_flows` flows and with these groups, under XDP (and TC behind it, as always)
    /// or under TC alone.
    pub fn build(max_flows: u32, groups: Groups, xdp: bool) -> anyhow::Result<Self> {
        let rig = Rig::build("Portcullis", policy::PUBLIC)?;
        let text = policy::text(&rig.inside.device, &rig.outside.device, max_flows, groups);
        let loaded = ::portcullis::policy::parse("the bench's policy", &text)
            .map_err(|problems| anyhow!("the bench's policy: {problems:?}"))?;
        let facts = HostFacts {
            devices: [&rig.inside, &rig.outside].map(|port| (port.device.clone(), facts_of(port))).into(),
            ..HostFacts::default()
        };
        let compiled = compile(&loaded.network, &facts, &mut Registry::default(), &Ownership::default(), 1)
            .map_err(|errors| anyhow!("compiling the bench's policy: {errors:?}"))?;

        let pins = BpfFs::mount()?;
        let mut datapath =
            Datapath::open(&pins.path().join("portcullis"), &LoadOptions::for_flows(max_flows, 1024))?;
        datapath.install(&image(compiled))?;
        let hop = NextHop {
            ifindex: rig.outside.ifindex,
            kind: HOP_WORLD,
            flags: HOP_FLAG_RESOLVED | HOP_FLAG_XDP,
            mtu: MTU,
            mac: rig.server.mac,
            source_mac: rig.outside.mac,
            address: network_order(SERVER),
            ..NextHop::default()
        };
        datapath.set_next_hop(WORLD_HOP, &hop)?;
        let everywhere =
            Route { destination: [0; 4].into(), prefix_length: 0, next_hop: u32::from(WORLD_HOP) };
        datapath.set_route(&everywhere)?;
        let mut built = Self { flows: datapath.flow_table()?, datapath, rig, xdp, _pins: pins };
        built.hook()?;
        Ok(built)
    }

    /// The namespaces, the datapath and the directory of its pins, which has to be dropped last.
    pub fn into_parts(self) -> (Rig, Datapath, BpfFs) {
        (self.rig, self.datapath, self._pins)
    }

    /// The flow table of IPv4, mapped once more.
    pub fn map_table(&self) -> anyhow::Result<FlowTable> {
        self.datapath.flow_table()
    }

    fn hook(&mut self) -> anyhow::Result<()> {
        let device = |port: &Port, role, xdp| AttachDevice {
            ifindex: port.ifindex,
            name: port.device.clone(),
            role,
            xdp,
        };
        let plan = AttachPlan {
            devices: vec![
                device(&self.rig.inside, Role::Guest, self.xdp),
                device(&self.rig.outside, Role::Uplink, false),
            ],
            ..AttachPlan::default()
        };
        let datapath = &mut self.datapath;
        self.rig.gateway.enter(|| {
            let attached = datapath.attach(&plan)?;
            datapath.commit(attached)
        })
    }

    /// Makes the datapath know `flows` flows, by their first packets; at least `enough` of them.
    pub fn open_flows(&mut self, flows: u32, enough: u32) -> anyhow::Result<()> {
        if self.known() >= enough {
            return Ok(());
        }
        let table = &self.flows;
        let opened = self.rig.answered(|rig| rig.open_flows(flows, enough, |_| Ok(known(table))));
        opened.with_context(|| format!("the datapath counted {}", self.counts()))
    }

    /// Live flows in the table.
    pub fn known(&self) -> u32 {
        known(&self.flows)
    }

    /// As [`Rig::inspect`], and nothing that is measured as XDP may in truth go the long way through TC.
    pub fn inspect(&mut self, packets: u32) -> anyhow::Result<Seen> {
        let _statistics = self.datapath.enable_stats()?;
        let before = self.statistics("pc_tc")?.0;
        let seen = self.rig.inspect(packets)?;
        let by_tc = self.statistics("pc_tc")?.0 - before;
        ensure!(
            (by_tc == 0) == self.xdp,
            "of {packets} packets {by_tc} went through TC; the datapath counted {}",
            self.counts()
        );
        Ok(seen)
    }

    /// Runs of a program and time in them, while the kernel keeps statistics.
    pub fn statistics(&self, program: &str) -> anyhow::Result<(u64, Duration)> {
        let programs = self.datapath.program_info()?;
        let found = programs.iter().find(|info| info.name == program);
        found
            .map(|info| (info.run_count, info.run_time))
            .with_context(|| format!("there is no program {program}"))
    }

    /// Packets that a security rule has denied so far.
    pub fn denied(&self) -> anyhow::Result<u64> {
        let reasons = self.datapath.reasons()?;
        let of = |reason: Reason| reasons.get(reason as usize).map_or(0, |count| count.packets);
        Ok(of(Reason::DeniedByRule))
    }

    /// Ends all flows, and returns when their slots are free.
    pub fn flush(&self) -> anyhow::Result<()> {
        end_all(&self.flows)
    }

    /// The reasons that packets were counted under, for error messages.
    pub fn counts(&self) -> String {
        let reasons = match self.datapath.reasons() {
            Ok(reasons) => reasons,
            Err(error) => return format!("(cannot be read: {error:#})"),
        };
        let counted = Reason::ALL.iter().zip(reasons).filter(|(_, count)| count.packets > 0);
        let parts: Vec<String> =
            counted.map(|(reason, count)| format!("{} {}", count.packets, reason.label())).collect();
        if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
    }
}

/// Ends all flows of a table, and returns when their slots are free.
pub(super) fn end_all(table: &FlowTable) -> anyhow::Result<()> {
    let until = Instant::now() + FREE;
    loop {
        let now = now_tick();
        for (index, record) in table.iter() {
            if Ctl(record.ctl).flags() & FLAG_FORWARD != 0 && table.is_alive(&record, now) {
                table.end(index, &record, now);
            }
        }
        thread::sleep(GRACE);
        let swept = table.sweep(now_tick(), |_, _| {});
        // Mappings of UDP sockets end by themselves; nobody who is measured minds them.
        if swept.waiting == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "after {FREE:?} flows that were ended are there still: {swept:?}");
        stop::check()?;
    }
}

fn known(table: &FlowTable) -> u32 {
    let forward = |ctl: u64, kind: u8| kind == KIND_FLOW && Ctl(ctl).flags() & FLAG_FORWARD != 0;
    table.iter().filter(|(_, record)| forward(record.ctl, record.key.kind)).count() as u32
}

/// What the compiler wants to know of a port.
pub(super) fn facts_of(port: &Port) -> DeviceFacts {
    DeviceFacts { ifindex: port.ifindex, mac: port.mac, ..DeviceFacts::default() }
}

/// The compiler's answer as the datapath takes it.
pub(super) fn image(compiled: Compiled) -> PolicyImage {
    PolicyImage {
        generation: compiled.generation,
        pages: compiled.pages,
        prefixes: compiled.prefixes,
        prefixes6: compiled.prefixes6,
        spaces: compiled.spaces,
        spaces6: compiled.spaces6,
        endpoints: compiled.endpoints,
        endpoints6: compiled.endpoints6,
        devices: compiled.devices,
        guest_hops: compiled.guest_hops.iter().map(|hop| (hop.index, next_hop(hop))).collect(),
        settings: compiled.settings,
        rule_ids: compiled.rules.iter().map(|rule| rule.id).collect(),
    }
}

fn next_hop(guest: &GuestHop) -> NextHop {
    NextHop {
        ifindex: guest.ifindex,
        kind: HOP_GUEST,
        flags: if guest.mac.is_some() { HOP_FLAG_PINNED | HOP_FLAG_RESOLVED } else { 0 },
        mtu: MTU,
        mac: guest.mac.unwrap_or_default(),
        source_mac: guest.source_mac,
        address: portcullis_common::layout::v4(guest.address),
        ..NextHop::default()
    }
}
