//! Which flow table: the same least NAT over a kernel hash and over buckets of records. Userspace fills either.

use portcullis_common::clock::TICK_SHIFT;
use portcullis_common::flow::{Ctl, LIVE, hash, places};
use portcullis_common::layout::{BUCKET_SLOTS, Bucket, FlowKey, HalfRecord, KIND_FLOW};

use super::established::measure_kinds;
use super::layout::{
    Entry, FIRST_DESTINATION_PORT, FIRST_GUEST, FIRST_SOURCE_PORT, GUESTS, SOCKETS, TABLE_IDLE,
    TABLE_NETWORK, Table,
};
use super::options::Options;
use super::plan::{Kind, Size};
use super::report::Report;
use super::rig::{DESTINATION, Rig, UPLINK, network_order};
use super::section::Section;

pub(super) const SECTION: Section = Section {
    name: "tables",
    title: "Which flow table: a minimal NAT over a kernel hash and over records",
    figures,
    measure,
};

const KINDS: [Kind; 4] = [Kind::Bare, Kind::Xdp, Kind::TableHash, Kind::TableRecords];

fn figures() -> Vec<String> {
    let of = |size| [Kind::TableHash, Kind::TableRecords].map(|kind| kind.figure(size));
    Size::ALL.into_iter().flat_map(of).collect()
}

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    // The first two are there to compare with, which a test does not.
    measure_kinds(&KINDS[options.scale.pick(2, 0, 0)..], options, report)
}

/// Sockets' ports after translation begin here.
const FIRST_NEW_PORT: u32 = 40_000;
/// Any two numbers; the same in every run, so that the same flows share buckets.
const SEED: [u64; 2] = [0x6a09_e667_f3bc_c908, 0xbb67_ae85_84ca_a73b];
const UDP: u8 = 17;
/// Nobody gives these entries a generation of their own.
const LIVE_ENTRY: Ctl = Ctl::new(1, LIVE, 0, 0, 0);

/// Capacities of both tables. Which one a rig does not use stays at one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    /// Entries of the kernel hash.
    pub entries: u32,
    /// Buckets of records.
    pub buckets: u32,
}

impl Capacity {
    /// Of a rig that uses neither.
    pub const NONE: Capacity = Capacity { entries: 1, buckets: 1 };
}

/// Namespaces with one of the tables in the gateway, filled.
pub(super) struct Filled {
    pub rig: Rig,
    /// How many flows the table took.
    pub known: u32,
}

impl Filled {
    /// A kernel hash for exactly as many entries as flows, as one would ask for it.
    pub fn hash(flows: u32) -> anyhow::Result<Self> {
        let mut rig = build("the kernel hash", Capacity { entries: flows, ..Capacity::NONE })?;
        rig.programs.attach("pcb_table_hash", &rig.gateway, rig.inside.ifindex)?;
        let deadline = deadline();
        rig.programs.fill_hash((0..flows).map(|flow| (key(flow), entry(flow, deadline))))?;
        Ok(Self { rig, known: flows })
    }

    /// Two slots for each flow: the load that the datapath's table is made for.
    pub fn records(flows: u32) -> anyhow::Result<Self> {
        let count = flows * 2 / BUCKET_SLOTS as u32;
        let mut rig = build("the records", Capacity { buckets: count, ..Capacity::NONE })?;
        rig.programs.attach("pcb_table_records", &rig.gateway, rig.inside.ifindex)?;
        let deadline = deadline();
        let mut buckets = vec![Bucket::default(); count as usize];
        let known = (0..flows).filter(|&flow| put(&mut buckets, flow, deadline)).count() as u32;
        rig.programs.fill_records(&buckets)?;
        Ok(Self { rig, known })
    }
}

fn build(label: &str, capacity: Capacity) -> anyhow::Result<Rig> {
    let mut rig = Rig::build_with(label, UPLINK, capacity)?;
    rig.programs.tell_table(&Table {
        seed: SEED,
        bucket_mask: capacity.buckets - 1,
        ifindex: rig.outside.ifindex,
        destination_mac: rig.server.mac,
        source_mac: rig.outside.mac,
        ..Table::default()
    })?;
    Ok(rig)
}

/// Puts a flow where the datapath would: the first free slot of the first bucket, else of the second.
fn put(buckets: &mut [Bucket], flow: u32, deadline: u32) -> bool {
    let key = key(flow);
    let at = places(hash(&key, &SEED), buckets.len() as u32 - 1);
    for bucket in [at.first, at.second] {
        for i in 0..BUCKET_SLOTS {
            let slot = &mut buckets[bucket as usize].slots[(at.start as usize + i) % BUCKET_SLOTS];
            if slot.ctl == 0 {
                let Entry { ctl, new_source, new_source_port, .. } = entry(flow, deadline);
                *slot =
                    HalfRecord { key, ctl, deadline, new_source, new_source_port, ..HalfRecord::default() };
                return true;
            }
        }
    }
    false
}

/// As the generator sends it.
fn key(flow: u32) -> FlowKey {
    FlowKey {
        source: (FIRST_GUEST | (flow & (GUESTS - 1))).to_be(),
        destination: network_order(DESTINATION),
        source_port: ((FIRST_SOURCE_PORT + (flow & (SOCKETS - 1))) as u16).to_be(),
        destination_port: ((FIRST_DESTINATION_PORT + flow / SOCKETS) as u16).to_be(),
        network: TABLE_NETWORK,
        protocol: UDP,
        kind: KIND_FLOW,
    }
}

fn entry(flow: u32, deadline: u32) -> Entry {
    Entry {
        ctl: LIVE_ENTRY.0,
        deadline,
        new_source: network_order(UPLINK),
        new_source_port: ((FIRST_NEW_PORT + (flow & (SOCKETS - 1))) as u16).to_be(),
        ..Entry::default()
    }
}

fn deadline() -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it only writes to `now`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    ((nanoseconds >> TICK_SHIFT) as u32).wrapping_add(TABLE_IDLE)
}
