//! `flows kill` and `flows flush`: ending live flows.
//!
//! An ended flow is gone for the datapath with the store of its control word: its next packet is a stranger's, dropped as
//! `no_flow` unless it may open a flow, and its slots are used again after the grace (some 200 ms).

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use portcullis_common::flow::{Ctl, FLAG_MAPPED};
use portcullis_common::layout::{HalfRecord, KIND_MAPPING};
use serde::{Deserialize, Serialize};

use super::list::{Flow, MOST, Pair, hops_of, is_of, live, protocol_number, table, told};
use crate::api::Failure;
use crate::daemon::Shared;
use crate::datapath::{FlowTable, now_tick};

/// Programs that found a mapping before it was ended have long published their flow after this: a run takes microseconds.
pub(super) const IN_FLIGHT: Duration = Duration::from_millis(5);

/// Which flows to end; all that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selection {
    /// `vm1` or `vm1/ipconfig1`, at either end.
    pub guest: Option<String>,
    /// `ADDR` or `ADDR:PORT` (`[ADDR]:PORT` of IPv6) of the side that opened it, before or after translation.
    pub from: Option<String>,
    /// The same of the other side.
    pub to: Option<String>,
    /// A name as `flows` shows it, or a number.
    pub protocol: Option<String>,
    /// Only say what would be ended.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// Flows that were ended, or would be.
    pub flows_ended: usize,
    /// Ports of UDP sockets and echo identifiers given back, or that would be. Only `flush` ends them.
    pub mappings_ended: usize,
    /// Nothing was done.
    pub dry_run: bool,
    /// The flows as they were, at most 100,000; `flush` lists none.
    pub flows: Vec<Flow>,
}

/// Ends the flows that are selected.
pub fn kill(shared: &Shared, selection: &Selection) -> Result<Ended, Failure> {
    let in_force = shared.in_force();
    let wanted = Wanted::read(selection)?;
    let hops = selection.guest.as_deref().map(|name| hops_of(&in_force, name)).transpose()?;
    if !selection.dry_run {
        shared.end_grace("flows were ended by hand");
    }
    let now = now_tick();
    let mut ended = Vec::new();
    let mut count = 0;
    for table in shared.flow_tables() {
        let selected =
            |pair: &Pair<'_>| hops.as_ref().is_none_or(|hops| is_of(&pair.forward, hops)) && wanted.has(pair);
        end_flows(table, now, selection.dry_run, selected, |pair| {
            count += 1;
            if ended.len() < MOST {
                ended.push(*pair);
            }
        });
    }
    if !selection.dry_run {
        log::info!("{count} flows ended by `flows kill`");
    }
    let flows = told(&in_force, &shared.registry().clone(), &ended, now);
    Ok(Ended { flows_ended: count, mappings_ended: 0, dry_run: selection.dry_run, flows })
}

/// Ends all flows, or all of one guest, and gives their ports back.
pub fn flush(shared: &Shared, guest: Option<&str>) -> Result<Ended, Failure> {
    let in_force = shared.in_force();
    let hops = guest.map(|name| hops_of(&in_force, name)).transpose()?;
    shared.end_grace("flows were ended by hand");
    let [flows, mappings] = flush_tables(shared.flow_tables(), hops.as_ref());
    log::info!("{flows} flows and {mappings} mappings ended by `flows flush`");
    Ok(Ended { flows_ended: flows, mappings_ended: mappings, dry_run: false, flows: Vec::new() })
}

/// Ends flows and mappings of the guests with these next hops, or all; how many of each.
fn flush_tables(tables: [&FlowTable; 2], hops: Option<&HashSet<u16>>) -> [usize; 2] {
    let of = |record: &HalfRecord| hops.is_none_or(|hops| is_of(record, hops));
    let mut flows = 0;
    for table in tables {
        end_flows(table, now_tick(), false, |pair| of(&pair.forward), |_| flows += 1);
    }
    let mut mappings = 0;
    for table in tables {
        mappings += end_mappings(table, now_tick(), of);
    }
    // A flow lives no longer than the mapping behind it. Those that were opened over one since the first pass: from here on
    // nobody finds an ended mapping, and whoever found it before is done.
    std::thread::sleep(IN_FLIGHT);
    for table in tables {
        let over_mapping =
            |pair: &Pair<'_>| Ctl(pair.forward.ctl).flags() & FLAG_MAPPED != 0 && of(&pair.forward);
        end_flows(table, now_tick(), false, over_mapping, |_| flows += 1);
    }
    [flows, mappings]
}

/// Ends the flows of a table that `selected` picks, and tells each that is ended now (or, dry, would be).
fn end_flows<'t>(
    table: &'t FlowTable,
    now: u32,
    dry_run: bool,
    selected: impl Fn(&Pair<'t>) -> bool,
    mut tell: impl FnMut(&Pair<'t>),
) {
    for pair in live(table, now).filter(selected) {
        if dry_run || table.end(pair.slot, &pair.forward, now) {
            tell(&pair);
        }
    }
}

/// Ends the mappings of a table that `selected` picks; how many.
fn end_mappings(table: &FlowTable, now: u32, selected: impl Fn(&HalfRecord) -> bool) -> usize {
    let mappings = table.iter().filter(|(_, record)| record.key.kind == KIND_MAPPING && selected(record));
    // Ending either half ends both: the second one is found ended.
    mappings.filter(|(slot, record)| table.is_alive(record, now) && table.end(*slot, record, now)).count()
}

/// A selection that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    from: Option<End>,
    to: Option<End>,
    protocol: Option<u8>,
}

/// An address, with a port if it matters.
type End = (IpAddr, Option<u16>);

impl Wanted {
    fn read(selection: &Selection) -> Result<Self, Failure> {
        let Selection { guest, from, to, protocol, .. } = selection;
        if [guest, from, to, protocol].iter().all(|selector| selector.is_none()) {
            return Err(Failure::input(
                "say which flows: --guest, --from, --to or --protocol; `portcullis flows flush` ends them all",
            ));
        }
        let end = |text: &Option<String>| text.as_deref().map(parse_end).transpose();
        let protocol = protocol.as_deref().map(|name| {
            protocol_number(name).ok_or_else(|| {
                Failure::input(format!(
                    "`{name}` is no protocol: tcp, udp, icmp, icmp6, esp, ah, or a number from 0 to 255"
                ))
            })
        });
        Ok(Self { from: end(from)?, to: end(to)?, protocol: protocol.transpose()? })
    }

    fn has(&self, pair: &Pair<'_>) -> bool {
        if self.protocol.is_some_and(|protocol| protocol != pair.forward.key.protocol) {
            return false;
        }
        if self.from.is_none() && self.to.is_none() {
            return true;
        }
        let Some(ends) = pair.ends() else { return false };
        let is = |wanted: Option<End>, either: [SocketAddr; 2]| {
            wanted.is_none_or(|(address, port)| {
                either.iter().any(|end| end.ip() == address && port.is_none_or(|port| port == end.port()))
            })
        };
        is(self.from, [ends.source, ends.new_source]) && is(self.to, [ends.destination, ends.new_destination])
    }
}

/// `10.0.1.4`, `10.0.1.4:443`, `fd00::4`, `[fd00::4]`, `[fd00::4]:443`
fn parse_end(text: &str) -> Result<End, Failure> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Ok(address) = text.parse().or_else(|_| bare.unwrap_or(text).parse()) {
        return Ok((address, None));
    }
    text.parse::<SocketAddr>().map(|end| (end.ip(), Some(end.port()))).map_err(|_| {
        Failure::input(format!(
            "`{}` is no address: 10.0.1.4, 10.0.1.4:443, fd00::4 or [fd00::4]:443 is expected",
            text.chars().take(80).collect::<String>()
        ))
    })
}

impl Ended {
    /// For people.
    pub fn text(&self) -> String {
        let flows = |count: usize| if count == 1 { "1 flow".to_owned() } else { format!("{count} flows") };
        if self.dry_run {
            let list = if self.flows.is_empty() { String::new() } else { table(&self.flows).render("") };
            return format!("{list}{} would be ended\n", flows(self.flows_ended));
        }
        let mappings = match self.mappings_ended {
            0 => String::new(),
            1 => " and 1 mapping".to_owned(),
            count => format!(" and {count} mappings"),
        };
        format!("{}{mappings} ended\n", flows(self.flows_ended))
    }
}

#[cfg(test)]
#[path = "kill_tests.rs"]
pub(crate) mod tests;
