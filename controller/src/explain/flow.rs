//! Live flows that the packet of a question would belong to.

use std::net::{IpAddr, SocketAddr};

use super::ends::Ends;
use crate::compile::Registry;
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::datapath::now_tick;
use crate::flows::{Pair, address, live};

/// What there is.
#[derive(Debug, Clone, Default)]
pub struct LiveFlows {
    pub any: bool,
    /// The rules that allowed them, each once, without the empty text of "no group asked".
    pub rules: Vec<String>,
    /// The rule (perhaps empty) of the one that has the source port of the packet, too.
    pub exact: Option<String>,
    /// That one was opened by the other side: the packet is an answer in it.
    pub is_answer: bool,
}

/// Looks for them. `any_port`: whatever the source port is.
pub fn live_flows(
    shared: &Shared,
    in_force: &InForce,
    registry: &Registry,
    ends: &Ends<'_>,
    any_port: bool,
) -> LiveFlows {
    let mut found = LiveFlows::default();
    let [v4, v6] = shared.flow_tables();
    let table = if ends.source.is_ipv6() { v6 } else { v4 };
    for pair in live(table, now_tick()) {
        if pair.forward.key.protocol != ends.protocol {
            continue;
        }
        for (half, is_answer) in [(Half::Forward, false), (Half::Answer, true)] {
            let Some((source, destination, network)) = key(&pair, half) else { continue };
            let to = SocketAddr::new(ends.destination, ends.destination_port);
            if network != ends.network || source.ip() != ends.source || destination != to {
                continue;
            }
            let exact = source.port() == ends.source_port;
            if !exact && !any_port {
                continue;
            }
            let rule = rule_text(in_force, registry, pair.rule());
            found.any = true;
            if exact {
                found.exact = Some(rule.clone());
                found.is_answer = is_answer;
            }
            found.rules.push(rule);
        }
    }
    found.rules.retain(|rule| !rule.is_empty());
    found.rules.sort_unstable();
    found.rules.dedup();
    found
}

#[derive(Clone, Copy)]
enum Half {
    Forward,
    Answer,
}

/// Where the packets of a half come from and go to, and the network they are seen in.
fn key(pair: &Pair<'_>, half: Half) -> Option<(SocketAddr, SocketAddr, u16)> {
    let (slot, record) = match half {
        Half::Forward => (pair.slot, &pair.forward),
        Half::Answer => (pair.forward.peer, &pair.reverse),
    };
    let key = record.key;
    let [source, destination] = if pair.table.is_v6() {
        let [source, destination, ..] = pair.table.addresses6(slot, record)?;
        [source, destination].map(IpAddr::V6)
    } else {
        [key.source, key.destination].map(|a| IpAddr::V4(address(a)))
    };
    let at = |address: IpAddr, port: u16| SocketAddr::new(address, u16::from_be(port));
    Some((at(source, key.source_port), at(destination, key.destination_port), key.network))
}
