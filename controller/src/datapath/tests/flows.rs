//! The reaper's rule, on a table of a real map.

use portcullis_common::clock::GRACE;
use portcullis_common::flow::{BUSY, Ctl, FREE, LIVE};
use portcullis_common::layout::{FlowKey, HalfRecord};

use super::support::in_a_place_of_its_own;
use crate::datapath::{Datapath, FlowTable, LoadOptions};

const NOW: u32 = 100_000;

fn put(flows: &FlowTable, slot: u32, phase: u8, peer: u32, deadline: u32) {
    let key = FlowKey { source: slot, ..FlowKey::default() };
    let record =
        HalfRecord { key, ctl: Ctl::new(5, phase, 0, 0, 0).0, peer, deadline, ..HalfRecord::default() };
    // SAFETY: in bounds, and nobody else uses this table.
    unsafe { flows.slot(slot).write_volatile(record) };
}

#[test]
fn a_flow_is_freed_only_when_both_directions_are_dead_for_the_grace_and_its_generation_stays() {
    freed_when_dead(NOW);
}

/// The ticks of a machine that has been up for nine years.
#[test]
fn a_flow_is_freed_no_earlier_and_no_later_where_the_ticks_wrap() {
    for now in [u32::MAX - GRACE, u32::MAX, 0, 1, GRACE, 500, 1000, 8 * GRACE] {
        freed_when_dead(now);
    }
}

fn freed_when_dead(now: u32) {
    in_a_place_of_its_own(move |place| {
        let options = LoadOptions { flow_buckets: 8, ..LoadOptions::default() };
        let datapath = Datapath::open(&place.pins(), &options).expect("opens");
        let flows = datapath.flow_table().expect("maps");
        let (long_ago, later) = (now.wrapping_sub(1000), now.wrapping_add(1000));
        // Alive by one direction, dying, dead, abandoned, just taken.
        put(&flows, 0, LIVE, 1, long_ago);
        put(&flows, 1, LIVE, 0, later);
        put(&flows, 2, LIVE, 3, long_ago);
        put(&flows, 3, LIVE, 2, now.wrapping_sub(GRACE));
        put(&flows, 4, LIVE, 5, long_ago);
        put(&flows, 5, LIVE, 4, now.wrapping_sub(GRACE + 1));
        put(&flows, 6, BUSY, 0, now.wrapping_sub(9 * GRACE + 1));
        put(&flows, 7, BUSY, 0, now);
        assert_eq!(flows.iter().count(), 6);
        let mut freed = Vec::new();
        let swept = flows.sweep(now, |slot, record| freed.push((slot, record.key.source)));
        assert_eq!(freed, [(4, 4), (5, 5)], "at {now}");
        assert_eq!((swept.live, swept.waiting, swept.freed), (2, 3, 3), "at {now}");
        assert_eq!(swept.due, Some(GRACE + 1), "those that wait, at {now}");
        assert_eq!(flows.ctl(4), Ctl::new(5, FREE, 0, 0, 0));
        assert_eq!(flows.ctl(6).phase(), FREE);
        assert_eq!(flows.iter().map(|(slot, _)| slot).collect::<Vec<_>>(), [0, 1, 2, 3]);
    });
}

#[test]
fn halves_that_only_their_peers_keep_alive_are_told_from_dead_ones_however_many_there_are() {
    in_a_place_of_its_own(|place| {
        let options = LoadOptions { flow_buckets: 64, ..LoadOptions::default() };
        let datapath = Datapath::open(&place.pins(), &options).expect("opens");
        let flows = datapath.flow_table().expect("maps");
        let pairs = flows.slots() / 2;
        for pair in 0..pairs {
            let dead = pair % 100 == 7;
            put(&flows, pair, LIVE, pairs + pair, NOW - 1000);
            put(&flows, pairs + pair, LIVE, pair, if dead { NOW - 1000 } else { NOW + 50 + pair });
        }
        let mut freed = Vec::new();
        let swept = flows.sweep(NOW, |slot, _| freed.push(slot));
        assert_eq!(freed, [7, 107, 207, 263, 363, 463]);
        assert_eq!((swept.live, swept.waiting, swept.freed), (flows.slots() - 6, 0, 6));
        assert_eq!(swept.due, Some(50 + GRACE + 1), "when the first of them dies");
        assert_eq!(flows.sweep(NOW + 1_000_000, |_, _| ()).due, None, "nothing is left");
    });
}

#[test]
fn a_recycled_peer_keeps_nobody_alive() {
    in_a_place_of_its_own(|place| {
        let options = LoadOptions { flow_buckets: 8, ..LoadOptions::default() };
        let datapath = Datapath::open(&place.pins(), &options).expect("opens");
        let flows = datapath.flow_table().expect("maps");
        put(&flows, 0, LIVE, 1, NOW - 1000);
        put(&flows, 1, LIVE, 9, NOW + 1000);
        // SAFETY: in bounds, and nobody else uses this table.
        unsafe { (&raw mut (*flows.slot(1)).ctl).write_volatile(Ctl::new(6, LIVE, 0, 0, 0).0) };
        assert_eq!(flows.sweep(NOW, |_, _| ()).freed, 1);
        assert_eq!(flows.ctl(0).phase(), FREE);
        assert_eq!(flows.ctl(1).phase(), LIVE);
    });
}
