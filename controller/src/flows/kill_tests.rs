//! Ending flows, on tables of real maps.

use portcullis_common::clock::GRACE;
use portcullis_common::flow::{ENDED, FLAG_FORWARD, FLAG_SNAT, FREE, LIVE};
use portcullis_common::layout::{FlowKey, HalfRecord6, KIND_FLOW, hops, v4, v6};

use super::*;
use crate::datapath::{Datapath, LoadOptions};

const GUEST: u16 = 7;
const OTHER: u16 = 8;
const WORLD_HOP: u16 = 2;
const GENERATION: u32 = 5;

/// What is put into a table: two slots from `slot` on.
#[derive(Clone, Copy)]
pub(crate) struct Put {
    pub slot: u32,
    pub protocol: u8,
    pub kind: u8,
    pub flags: u8,
    pub guest: u16,
    pub from: (&'static str, u16),
    pub to: (&'static str, u16),
    /// Source after translation.
    pub outside: (&'static str, u16),
}

pub(crate) const TCP: Put = Put {
    slot: 0,
    protocol: 6,
    kind: KIND_FLOW,
    flags: FLAG_SNAT,
    guest: GUEST,
    from: ("10.0.0.4", 40000),
    to: ("198.51.100.1", 443),
    outside: ("203.0.113.10", 1024),
};

pub(crate) fn put(table: &FlowTable, what: Put) {
    let [from, to, outside] = [what.from, what.to, what.outside].map(|(address, port)| {
        let address: IpAddr = address.parse().unwrap();
        // Of IPv6 the key has the last 32 bits.
        let short = match address {
            IpAddr::V4(_) => v4(address),
            IpAddr::V6(_) => v6(address)[3],
        };
        (address, short, port.to_be())
    });
    let key = FlowKey {
        source: from.1,
        destination: to.1,
        source_port: from.2,
        destination_port: to.2,
        network: 1,
        protocol: what.protocol,
        kind: what.kind,
    };
    let deadline = now_tick() + 10_000;
    let forward = HalfRecord {
        key,
        ctl: Ctl::new(GENERATION, LIVE, 0, 0, what.flags | FLAG_FORWARD).0,
        peer: what.slot + 1,
        deadline,
        hops: hops(WORLD_HOP, what.guest),
        new_source: outside.1,
        new_source_port: outside.2,
        new_destination: to.1,
        new_destination_port: to.2,
        // With an epoch above the rule's id.
        rule: 3 << 20 | 9,
        ..HalfRecord::default()
    };
    let reverse = HalfRecord {
        key: FlowKey { source: to.1, destination: outside.1, network: 0, ..key },
        ctl: Ctl::new(GENERATION, LIVE, 0, 0, what.flags).0,
        peer: what.slot,
        hops: hops(what.guest, WORLD_HOP),
        ..forward
    };
    for (slot, half) in [(what.slot, forward), (what.slot + 1, reverse)] {
        let to_v6 = |address| v6(address);
        // SAFETY: in bounds, and nobody else uses this table.
        unsafe {
            if table.is_v6() {
                let wide = HalfRecord6 {
                    half,
                    source: to_v6(from.0),
                    destination: to_v6(to.0),
                    new_source: to_v6(outside.0),
                    new_destination: to_v6(to.0),
                };
                table.slot(slot).cast::<HalfRecord6>().write_volatile(wide);
            } else {
                table.slot(slot).write_volatile(half);
            }
        }
    }
}

/// A flow or mapping whose other half is the claim of its public port, as the datapath writes it.
pub(crate) fn claimed(table: &FlowTable, what: Put) {
    put(table, what);
    let record = table.slot(what.slot + 1);
    // SAFETY: in bounds, and nobody else uses this table.
    unsafe {
        (*record).key.source_port = what.to.1.to_be();
        (*record).key.destination_port = what.outside.1.to_be();
        if table.is_v6() {
            (*record.cast::<HalfRecord6>()).destination = v6(what.outside.0.parse().unwrap());
        }
    }
}

/// Maps both tables of a datapath in a place of its own.
pub(crate) fn with_tables(test: impl FnOnce(&FlowTable, &FlowTable) + Send) {
    crate::datapath::tests::support::in_a_place_of_its_own(|place| {
        let options = LoadOptions { flow_buckets: 8, flow_buckets6: 8, ..LoadOptions::default() };
        let datapath = Datapath::open(&place.pins(), &options).expect("opens");
        test(&datapath.flow_table().expect("maps"), &datapath.flow_table6().expect("maps"));
    });
}

fn selection(from: Option<&str>, to: Option<&str>, protocol: Option<&str>) -> Wanted {
    let own = |text: Option<&str>| text.map(str::to_owned);
    let selection =
        Selection { from: own(from), to: own(to), protocol: own(protocol), ..Selection::default() };
    Wanted::read(&selection).unwrap()
}

fn slots(table: &FlowTable, wanted: &Wanted, dry_run: bool) -> Vec<u32> {
    let mut slots = Vec::new();
    end_flows(table, now_tick(), dry_run, |pair| wanted.has(pair), |pair| slots.push(pair.slot));
    slots
}

#[test]
fn only_the_flows_that_every_selector_matches_are_ended_in_both_directions() {
    with_tables(|flows, _| {
        put(flows, TCP);
        put(flows, Put { slot: 2, to: ("198.51.100.1", 80), ..TCP });
        put(flows, Put { slot: 4, protocol: 17, ..TCP });
        put(flows, Put { slot: 6, from: ("10.0.0.5", 40000), outside: ("203.0.113.10", 2048), ..TCP });
        for (wanted, expected) in [
            (selection(Some("10.0.0.4"), None, None), &[0, 2, 4][..]),
            (selection(None, Some("198.51.100.1:443"), None), &[0, 4, 6]),
            (selection(None, None, Some("udp")), &[4]),
            (selection(Some("10.0.0.4:40000"), Some("198.51.100.1:80"), Some("6")), &[2]),
            // Under its public address, as a server's log has it.
            (selection(Some("203.0.113.10:2048"), None, None), &[6]),
            (selection(Some("198.51.100.1"), None, None), &[]),
            (selection(None, Some("fd00::1"), None), &[]),
        ] {
            assert_eq!(slots(flows, &wanted, true), expected, "{wanted:?}");
        }
        assert_eq!(live(flows, now_tick()).count(), 4, "a dry run ends nothing");

        assert_eq!(slots(flows, &selection(Some("10.0.0.4"), None, Some("tcp")), false), [0, 2]);
        assert_eq!([0, 1, 2, 3].map(|slot| flows.ctl(slot).phase()), [ENDED; 4]);
        assert_eq!(live(flows, now_tick()).map(|pair| pair.slot).collect::<Vec<_>>(), [4, 6]);
        assert_eq!(slots(flows, &selection(Some("10.0.0.4"), None, Some("tcp")), false), [] as [u32; 0]);
        // The slots are used again after the grace, as a flow's that died by itself.
        assert_eq!(flows.sweep(now_tick(), |_, _| ()).waiting, 4);
        let swept = flows.sweep(now_tick() + GRACE + 2, |_, _| ());
        assert_eq!((swept.live, swept.freed), (4, 4));
        assert_eq!(flows.ctl(0).phase(), FREE);
    });
}

#[test]
fn a_flow_of_ipv6_is_selected_by_its_whole_addresses() {
    with_tables(|_, flows| {
        let tcp = Put {
            from: ("fd00:1::4", 40000),
            to: ("fd00:2::5", 443),
            outside: ("fd00:1::4", 40000),
            flags: 0,
            ..TCP
        };
        put(flows, tcp);
        // The same last 32 bits, which is all that the first half of its record knows.
        put(flows, Put { slot: 2, from: ("fd00:9::4", 40000), outside: ("fd00:9::4", 40000), ..tcp });
        let pair = live(flows, now_tick()).next().unwrap();
        let ends = pair.ends().unwrap();
        assert_eq!(
            (ends.source.to_string(), ends.new_destination.to_string()),
            ("[fd00:1::4]:40000".to_owned(), "[fd00:2::5]:443".to_owned())
        );
        assert_eq!(pair.rule(), 9, "without the epoch");
        assert_eq!(slots(flows, &selection(Some("[fd00:1::4]:40000"), None, None), false), [0]);
        assert_eq!(pair.ends(), Some(ends), "an ended flow is told as it was");
        // Its slot in use by another flow.
        // SAFETY: in bounds, and nobody else uses this table.
        unsafe { (&raw mut (*flows.slot(0)).ctl).write_volatile(Ctl::new(GENERATION + 1, LIVE, 0, 0, 0).0) };
        assert_eq!(pair.ends(), None);
    });
}

#[test]
fn a_flush_ends_the_flows_of_both_families_and_the_mappings_of_one_guest_or_of_all() {
    with_tables(|flows, flows6| {
        let udp = Put { slot: 4, protocol: 17, flags: FLAG_SNAT | FLAG_MAPPED, ..TCP };
        let mapping = Put { slot: 6, kind: KIND_MAPPING, flags: FLAG_SNAT, ..udp };
        let six = Put { from: ("fd00::4", 1), to: ("fd00::5", 2), outside: ("fd00::4", 1), flags: 0, ..TCP };
        for guest in [GUEST, OTHER] {
            let shift = if guest == GUEST { 0 } else { 16 };
            for put_here in [TCP, udp, mapping] {
                put(flows, Put { slot: put_here.slot + shift, guest, ..put_here });
            }
            put(flows6, Put { slot: shift, guest, ..six });
        }
        assert_eq!(flush_tables([flows, flows6], Some(&HashSet::from([GUEST]))), [3, 1]);
        assert_eq!(live(flows, now_tick()).map(|pair| pair.slot).collect::<Vec<_>>(), [16, 20]);
        assert_eq!(flows.iter().count(), 6, "two flows and the mapping of the other guest");
        assert_eq!(flows6.iter().count(), 2);
        assert_eq!(flush_tables([flows, flows6], None), [3, 1]);
        assert_eq!((flows.iter().count(), flows6.iter().count()), (0, 0));
        assert_eq!(flush_tables([flows, flows6], None), [0, 0]);
    });
}

#[test]
fn a_selection_that_selects_nothing_or_cannot_be_read_says_what_is_expected() {
    let refused = |selection: Selection| Wanted::read(&selection).unwrap_err().message;
    assert!(refused(Selection { dry_run: true, ..Selection::default() }).contains("flows flush"));
    for text in ["", "vm1", "10.0.0.4:", "10.0.0.4:99999", "fd00::4]:443", "[fd00::4", "10.0.0.0/8", "\u{0}"]
    {
        let message = refused(Selection { from: Some(text.into()), ..Selection::default() });
        assert!(message.contains("[fd00::4]:443 is expected"), "{text}: {message}");
    }
    let message = refused(Selection { to: Some("x".repeat(60_000)), ..Selection::default() });
    assert!(message.len() < 200, "what was asked is not told back at any length");
    assert!(refused(Selection { protocol: Some("sctp".into()), ..Selection::default() }).contains("icmp6"));
    assert_eq!(parse_end("[fd00::4]").unwrap(), ("fd00::4".parse().unwrap(), None));
    assert_eq!(parse_end("[fd00::4]:443").unwrap(), ("fd00::4".parse().unwrap(), Some(443)));
    assert_eq!(parse_end("10.0.0.4:443").unwrap(), (IpAddr::from([10, 0, 0, 4]), Some(443)));
}

#[test]
fn what_was_ended_is_said_in_a_line() {
    let mut ended = Ended { flows_ended: 1, mappings_ended: 0, dry_run: false, flows: Vec::new() };
    assert_eq!(ended.text(), "1 flow ended\n");
    (ended.flows_ended, ended.mappings_ended) = (3, 2);
    assert_eq!(ended.text(), "3 flows and 2 mappings ended\n");
    ended.dry_run = true;
    assert_eq!(ended.text(), "3 flows would be ended\n");
    let json = serde_json::to_value(&ended).unwrap();
    assert_eq!((json["flowsEnded"].as_u64(), json["dryRun"].as_bool()), (Some(3), Some(true)));
}
