//! Which units of public ports live flows stand on, and ending those on units whose time is over.

use std::collections::HashSet;
use std::net::IpAddr;

use portcullis_common::flow::{Ctl, FLAG_FORWARD, FLAG_MAPPED, FLAG_SNAT};
use portcullis_common::layout::{HalfRecord, KIND_MAPPING, WORLD};
use portcullis_common::policy::UNIT_PORTS;

use super::kill::IN_FLIGHT;
use super::list::address;
use super::ports::outside_ports;
use crate::compile::LiveUnits;
use crate::compile::ports::{TCP, UDP};
use crate::datapath::{FlowTable, now_tick};

/// A unit of a public address: address, [`TCP`] (with echo) or [`UDP`], number.
pub type Unit = (IpAddr, u8, u16);

/// Counts the live flows on each unit. A socket's mapping counts like a flow where no flow stands on its unit: its next packet
/// opens one.
pub fn live_units(tables: [&FlowTable; 2]) -> LiveUnits {
    let now = now_tick();
    let (mut flows, mut mapped) = (LiveUnits::new(), HashSet::new());
    for (table, slot, record) in claims(tables) {
        if !table.is_alive(&record, now) {
            continue;
        }
        let Some(unit) = unit_of(table, slot, &record) else { continue };
        if record.key.kind == KIND_MAPPING {
            mapped.insert(unit);
        } else {
            *flows.entry(unit).or_default() += 1;
        }
    }
    for unit in mapped {
        flows.entry(unit).or_insert(1);
    }
    flows
}

/// Ends everything that lives on these units; how many flows.
pub fn end_on(tables: [&FlowTable; 2], units: &HashSet<Unit>) -> usize {
    let end = |mappings: bool| {
        let mut ended = 0;
        for (table, slot, record) in claims(tables) {
            if (record.key.kind == KIND_MAPPING) == mappings
                && table.is_alive(&record, now_tick())
                && unit_of(table, slot, &record).is_some_and(|unit| units.contains(&unit))
                && table.end(slot, &record, now_tick())
            {
                ended += 1;
            }
        }
        ended
    };
    let flows = end(false);
    if end(true) == 0 {
        return flows;
    }
    // Flows opened over a mapping since the first pass: from here on nobody finds one, and whoever found it before is done.
    std::thread::sleep(IN_FLIGHT);
    flows + end(false)
}

/// Half-records by which a public port is taken: the answers' half of a flow, that of the strangers who came in over a mapping,
/// the outer one of a mapping.
fn claims(tables: [&FlowTable; 2]) -> impl Iterator<Item = (&FlowTable, u32, HalfRecord)> {
    let all =
        tables.into_iter().flat_map(|table| table.iter().map(move |(slot, record)| (table, slot, record)));
    all.filter(|(_, _, record)| is_claim(record))
}

fn is_claim(record: &HalfRecord) -> bool {
    let flags = Ctl(record.ctl).flags();
    let (out, opens) = (flags & FLAG_SNAT != 0, flags & FLAG_FORWARD != 0);
    record.key.network == WORLD && (out != opens) && (out || flags & FLAG_MAPPED != 0)
}

/// The unit a claim stands on; `None` if its slot has begun another life.
fn unit_of(table: &FlowTable, slot: u32, record: &HalfRecord) -> Option<Unit> {
    let public = if table.is_v6() {
        IpAddr::V6(table.addresses6(slot, record)?[1])
    } else {
        IpAddr::V4(address(record.key.destination))
    };
    let protocol = if record.key.protocol == UDP { UDP } else { TCP };
    let [_, port] = outside_ports(record);
    Some((public, protocol, u16::from_be(port) / UNIT_PORTS as u16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::kill::tests::{Put, TCP as FLOW, claimed, with_tables};
    use portcullis_common::flow::ENDED;

    #[test]
    fn flows_are_counted_by_the_unit_they_stand_on_and_those_on_a_unit_can_be_ended() {
        with_tables(|flows, flows6| {
            let public: IpAddr = "203.0.113.10".parse().unwrap();
            let public6: IpAddr = "2001:db8:ffff::10".parse().unwrap();
            // Ports 1024..=1031 are unit 128.
            claimed(flows, FLOW);
            claimed(
                flows,
                Put { slot: 2, to: ("198.51.100.2", 443), outside: ("203.0.113.10", 1031), ..FLOW },
            );
            claimed(flows, Put { slot: 4, outside: ("203.0.113.10", 1032), ..FLOW });
            // A socket of UDP with one flow, one without any, and an echo identifier, which is of TCP's units.
            let udp = Put { slot: 6, protocol: 17, outside: ("203.0.113.10", 2000), ..FLOW };
            let socket = Put { kind: KIND_MAPPING, to: ("0.0.0.0", 0), ..udp };
            claimed(flows, udp);
            claimed(flows, Put { slot: 8, ..socket });
            claimed(flows, Put { slot: 10, outside: ("203.0.113.10", 2008), ..socket });
            claimed(flows, Put { slot: 12, protocol: 1, outside: ("203.0.113.10", 3000), ..socket });
            // An instance-level address needs no port.
            claimed(flows, Put { slot: 14, flags: 0, outside: ("203.0.113.7", 40000), ..FLOW });
            let six = Put {
                from: ("fd00:1::4", 40000),
                to: ("2001:db8::1", 443),
                outside: ("2001:db8:ffff::10", 1024),
                ..FLOW
            };
            claimed(flows6, six);
            let tables = [flows, flows6];
            let expected: LiveUnits = [
                ((public, TCP, 128), 2),
                ((public, TCP, 129), 1),
                ((public, UDP, 250), 1),
                ((public, UDP, 251), 1),
                ((public, TCP, 375), 1),
                ((public6, TCP, 128), 1),
            ]
            .into();
            assert_eq!(live_units(tables), expected);

            let over = [(public, TCP, 128), (public, UDP, 250), (public, TCP, 375), (public6, TCP, 128)];
            assert_eq!(end_on(tables, &over.into()), 4, "two of TCP, one of UDP, one of IPv6");
            let left: LiveUnits = [((public, TCP, 129), 1), ((public, UDP, 251), 1)].into();
            assert_eq!(live_units(tables), left);
            for slot in [0, 1, 2, 3, 6, 7, 8, 9, 12, 13] {
                assert_eq!(flows.ctl(slot).phase(), ENDED, "slot {slot}");
            }
        });
    }
}
