//! From the tables of another layout to these (ADR 0011): copied once before the programs are exchanged and again after it,
//! until a look finds nothing more. Meanwhile nothing is claimed here: what misses may be among what is still to come.

use std::fmt;
use std::mem;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use aya_obj::generated::bpf_map_type;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, LIVE};
use portcullis_common::layout::{
    Bucket, Bucket6, FlowKey, HalfRecord, HalfRecord6, NEXT_HOP_HOST, NEXT_HOP_LOOP, NextHop,
    START_MIGRATING, WORLD,
};
use portcullis_common::packet::headers::TCP;
use portcullis_common::tcp_state::{
    ACKED_FORWARD, ACKED_REVERSE, ANSWERED, FIN_FORWARD, FIN_REVERSE, OPENED, RESET,
};
use serde::{Deserialize, Serialize};

use super::flow_table::{FlowTable, now_tick};
use super::flow_writer::{FlowWriter, Written};
use super::guest_flows::GuestUses;
use super::load::Datapath;
use super::pins::Pins;
use super::sys;
use super::table::Table;

/// Layouts whose flows and next hops this build reads, besides its own. Each is described below by records of its own, so
/// that a change of today's is noticed here.
const READABLE: [u32; 1] = [3];

const FINS: u8 = FIN_FORWARD | FIN_REVERSE;

/// Looks at the old tables after the programs were exchanged, at most: each takes what came during the one before.
const LOOKS: u32 = 5;

/// [`HalfRecord`] of layout 3.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Half3 {
    key: FlowKey,
    ctl: u64,
    peer: u32,
    deadline: u32,
    hops: u32,
    new_source: u32,
    new_destination: u32,
    new_source_port: u16,
    new_destination_port: u16,
    rule: u32,
    packets: u32,
    bytes_low: u32,
    ack: u32,
}

// What reads the tables of today ([`FlowTable`]) reads those of layout 3 too.
const _: () = {
    assert!(size_of::<Half3>() == size_of::<HalfRecord>());
    assert!(mem::offset_of!(Half3, ctl) == mem::offset_of!(HalfRecord, ctl));
    assert!(mem::offset_of!(Half3, peer) == mem::offset_of!(HalfRecord, peer));
    assert!(mem::offset_of!(Half3, deadline) == mem::offset_of!(HalfRecord, deadline));
};

/// A record of layout 3 as one of today.
fn from3(record: HalfRecord) -> HalfRecord {
    // SAFETY: 64 bytes of plain integers either way, without padding.
    let old = unsafe { mem::transmute::<HalfRecord, Half3>(record) };
    HalfRecord {
        key: old.key,
        ctl: old.ctl,
        peer: old.peer,
        deadline: old.deadline,
        hops: old.hops,
        new_source: old.new_source,
        new_destination: old.new_destination,
        new_source_port: old.new_source_port,
        new_destination_port: old.new_destination_port,
        rule: old.rule,
        packets: old.packets,
        bytes_low: old.bytes_low,
        ack: old.ack,
    }
}

/// TCP's state in layout 3, which went by flags alone, as today's ([`tcp_state`]). What is not known of the numbers is taken for what
/// it nearly always is: that a FIN which passed was acknowledged, and that the answer to a guest's SYN is one.
fn tcp3(bits: u8, from_world: bool) -> u8 {
    if bits & (OPENED | ANSWERED) == OPENED && bits & RESET == 0 && bits & FINS != FINS {
        // A guest's word is taken for what it acknowledges itself.
        return if from_world { OPENED } else { OPENED | ACKED_FORWARD };
    }
    let mut now = OPENED | ANSWERED | bits & (FINS | RESET);
    if bits & FIN_FORWARD != 0 {
        now |= ACKED_FORWARD;
    }
    if bits & FIN_REVERSE != 0 {
        now |= ACKED_REVERSE;
    }
    now
}

/// What has been copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Migrated {
    /// The layout they were in.
    pub from: u32,
    /// Live flows, with the mappings of UDP sockets and pings counted as such.
    pub before: u32,
    /// Those that came, or changed, between the first look and the exchange of the programs.
    pub after: u32,
    /// Flows for which there was no room, or whose place something else had.
    pub lost: u32,
}

impl fmt::Display for Migrated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Migrated { from, before, after, lost } = self;
        write!(
            f,
            "{before} flows of layout {from} were copied before the programs were exchanged, {after} after it; {lost} lost"
        )
    }
}

/// Tables of another layout that are still pinned, and perhaps in use.
pub(super) struct Old {
    version: u32,
    place: PathBuf,
    flows: [FlowTable; 2],
    next_hops: Table,
    pub migrated: Migrated,
}

/// What other layouts left behind.
pub(super) enum Found {
    Nothing,
    Readable(Box<Old>),
    /// Why not.
    Unreadable(anyhow::Error),
}

impl Old {
    /// Looks for tables of other layouts.
    pub fn find(pins: &Pins) -> anyhow::Result<Found> {
        for place in pins.versions()?.into_iter().skip(1) {
            if !place.join("maps").join("FLOWS").exists() {
                continue;
            }
            return Ok(match Self::open(place) {
                Ok(old) => Found::Readable(Box::new(old)),
                Err(error) => Found::Unreadable(error),
            });
        }
        Ok(Found::Nothing)
    }

    fn open(place: PathBuf) -> anyhow::Result<Self> {
        let name = place.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let version: u32 = name.trim_start_matches('v').parse().context("the directory's name")?;
        if !READABLE.contains(&version) {
            bail!("{} holds tables of layout {version}, which this build cannot read", place.display());
        }
        let open = |name: &str, value: usize| {
            let path = place.join("maps").join(name);
            let fd = sys::open_pin(&path).with_context(|| format!("BPF_OBJ_GET {}", path.display()))?;
            let table = Table::from_fd(name, fd.with_context(|| format!("{} is gone", path.display()))?)?;
            let array = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
            if (table.shape.kind, table.shape.key, table.shape.value as usize) != (array, 4, value) {
                bail!("{} does not look like layout {version}", path.display());
            }
            Ok(table)
        };
        let flows = [
            FlowTable::map(&open("FLOWS", size_of::<Bucket>())?, size_of::<Half3>(), GuestUses::detached()?)?,
            FlowTable::map(
                &open("FLOWS6", size_of::<Bucket6>())?,
                size_of::<HalfRecord6>(),
                GuestUses::detached()?,
            )?,
        ];
        let next_hops = open("NEXT_HOPS", size_of::<NextHop>())?;
        Ok(Self {
            version,
            place,
            flows,
            next_hops,
            migrated: Migrated { from: version, ..Migrated::default() },
        })
    }

    /// Live flows at the moment.
    pub fn live(&self) -> u32 {
        self.pairs().count() as u32
    }

    /// What is to be done, for the operator.
    pub fn intent(&self) -> String {
        format!(
            "{} holds tables of layout {} with {} live flows: they are copied into this build's before its programs take \
             over and again after it, until nothing new is found there; meanwhile no new flow begins",
            self.place.display(),
            self.version,
            self.live()
        )
    }

    /// Every flow that is alive: the half of whoever opened it and the other one. Also whether it is of IPv6.
    fn pairs(&self) -> impl Iterator<Item = (bool, [HalfRecord6; 2])> + '_ {
        let now = now_tick();
        self.flows.iter().flat_map(move |table| {
            table.iter().filter_map(move |(index, record)| {
                let ctl = Ctl(record.ctl);
                if ctl.flags() & FLAG_FORWARD == 0
                    || !table.is_alive(&record, now)
                    || record.peer >= table.slots()
                {
                    return None;
                }
                let peer = table.read(record.peer)?;
                let other = Ctl(peer.ctl);
                if other.phase() != LIVE || other.generation() != ctl.generation() || peer.peer != index {
                    return None;
                }
                let mut pair = [wide(table, index, record)?, wide(table, record.peer, peer)?];
                if record.key.protocol == TCP {
                    let bits = tcp3(ctl.tcp() | other.tcp(), record.key.network == WORLD);
                    for half in &mut pair {
                        half.half.ctl = Ctl(half.half.ctl).with_tcp(bits).0;
                    }
                }
                Some((table.is_v6(), pair))
            })
        })
    }

    /// Copies what is not there yet and brings the rest up to date; how many flows were new here.
    fn copy(&mut self, writer: &FlowWriter) -> (u32, u32) {
        let now = now_tick();
        let (mut new, mut lost) = (0, 0);
        for (v6, pair) in self.pairs() {
            if writer.merge(v6, &pair, now) {
                continue;
            }
            match writer.write(v6, &pair, now) {
                Written::New => new += 1,
                Written::Exists | Written::Full => lost += 1,
            }
        }
        (new, lost)
    }
}

/// A record of the old table with the addresses of IPv6 beside it.
fn wide(table: &FlowTable, index: u32, record: HalfRecord) -> Option<HalfRecord6> {
    let half = from3(record);
    if !table.is_v6() {
        return Some(HalfRecord6 { half, ..HalfRecord6::default() });
    }
    let words = |address: std::net::Ipv6Addr| portcullis_common::layout::words6(address.octets());
    let [source, destination, new_source, new_destination] = table.addresses6(index, &record)?.map(words);
    Some(HalfRecord6 { half, source, destination, new_source, new_destination })
}

impl Datapath {
    /// First half of a migration: next hops with the hardware addresses that were learned, and all flows.
    pub(super) fn begin_migration(&mut self, mut old: Box<Old>) -> anyhow::Result<()> {
        log::warn!("{}", old.intent());
        self.control.set_start(START_MIGRATING);
        for (index, hop) in old.next_hops.entries::<u32, NextHop>()? {
            let ours = index == u32::from(NEXT_HOP_HOST) || index == u32::from(NEXT_HOP_LOOP);
            if hop.kind != 0 && !ours {
                self.tables.next_hops.update(&index, &hop, 0)?;
            }
        }
        let writer = self.flow_writer()?;
        (old.migrated.before, old.migrated.lost) = old.copy(&writer);
        self.old = Some(old);
        Ok(())
    }

    /// Are flows of another layout on their way here?
    pub fn is_migrating(&self) -> bool {
        self.old.is_some()
    }

    /// Second half, once every hook runs this build's programs: what has come or changed since. From then on flows are
    /// claimed here. `None` if there was nothing to migrate.
    ///
    /// # Errors
    /// If the tables cannot be mapped; then nothing is claimed until the next start.
    pub fn finish_migration(&mut self) -> anyhow::Result<Option<Migrated>> {
        let Some(mut old) = self.old.take() else { return Ok(None) };
        let writer = self.flow_writer()?;
        for _ in 0..LOOKS {
            let (new, lost) = old.copy(&writer);
            old.migrated.after += new;
            old.migrated.lost = lost;
            if new == 0 {
                break;
            }
        }
        self.control.set_start(0);
        Ok(Some(old.migrated))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_common::packet::headers::{ACK, FIN, SYN};
    use portcullis_common::tcp_state::{Segment, State, Tracked, after, plain, state};

    const CLOSED: u8 = OPENED | ANSWERED | FINS;

    #[test]
    fn an_established_connection_is_exactly_that_so_its_segments_go_the_short_way() {
        for from_world in [false, true] {
            assert!(plain(tcp3(OPENED | ANSWERED, from_world), ACK));
        }
    }

    #[test]
    fn a_connection_whose_syn_was_under_way_is_established_by_the_answer_and_its_acknowledgement() {
        for from_world in [false, true] {
            let bits = tcp3(OPENED, from_world);
            assert_eq!(state(bits), State::HalfOpen);
            let answer = Segment {
                flags: SYN | ACK,
                guest: from_world,
                sequence: 500,
                end: 501,
                acknowledgement: 101,
                ..Segment::default()
            };
            let (flow, _) = after(Tracked { bits, own: 0, other: 0 }, &answer);
            let last = Segment {
                flags: ACK,
                forward: true,
                guest: !from_world,
                sequence: 101,
                end: 101,
                acknowledgement: 501,
            };
            let (flow, _) = after(Tracked { bits: flow.bits, own: flow.other, other: flow.own }, &last);
            assert_eq!(flow.bits, OPENED | ANSWERED, "from the world: {from_world}");
        }
    }

    #[test]
    fn a_half_closed_connection_carries_data_and_ends_with_the_other_sides_fin() {
        let bits = tcp3(OPENED | ANSWERED | FIN_FORWARD, false);
        assert_eq!(state(bits), State::Established);
        let back = Segment { flags: ACK, acknowledgement: 77, end: 900, ..Segment::default() };
        let (flow, _) = after(Tracked { bits, own: 0, other: 0 }, &back);
        assert_eq!((state(flow.bits), flow.own), (State::Established, 77), "what it acknowledges is noted");
        let (flow, _) = after(flow, &Segment { flags: FIN | ACK, ..back });
        let last = Segment { flags: ACK, forward: true, acknowledgement: 900, ..Segment::default() };
        let (flow, _) = after(Tracked { bits: flow.bits, own: flow.other, other: flow.own }, &last);
        assert_eq!(state(flow.bits), State::Closed);
    }

    #[test]
    fn what_was_over_is_over() {
        for (bits, is) in [(CLOSED, State::Closed), (CLOSED & !ANSWERED, State::Closed)] {
            assert_eq!(state(tcp3(bits, false)), is);
        }
        for bits in [OPENED | RESET, OPENED | ANSWERED | RESET, CLOSED | RESET] {
            assert_eq!(state(tcp3(bits, false)), State::Reset);
        }
    }

    #[test]
    fn bits_that_layout_3_had_not_are_not_believed() {
        for bits in [32, 64, 128] {
            assert_eq!(tcp3(OPENED | ANSWERED | bits, true), OPENED | ANSWERED);
        }
    }
}
