//! Ports that drain: when they are over, and who waits for them (ADR 0008).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::task::block_in_place;

use super::Refusal;
use super::gateway::Gateway;
use super::plan::HostView;
use crate::compile::{Compiled, LiveUnits, Ownership};
use crate::datapath::FlowTable;
use crate::flows::{end_on, live_units};
use crate::observe::time::unix_seconds;

/// The host with its live flows, so that no port they stand on is handed to another guest. If nobody owns any, nobody loses
/// one, and no table is read.
pub fn occupied(mut view: HostView, ownership: &Ownership, tables: [&FlowTable; 2]) -> HostView {
    if !ownership.frontends.is_empty() {
        view.facts.live = live_units(tables);
    }
    view
}

/// Is it time to hand out ports again? Some drain is over and somebody waits for ports, or all are: a policy is not compiled
/// for each unit that nobody waits for.
fn due(ownership: &Ownership, live: &LiveUnits, compiled: &Compiled, now: u64) -> bool {
    let (mut over, mut open) = (false, false);
    for (address, protocol, unit, until) in ownership.draining() {
        let done = until <= now || !live.contains_key(&(address, protocol, unit));
        over |= done;
        open |= !done;
    }
    let waits = || {
        let allocations = compiled.outbound.iter().flat_map(|of| of.allocations.iter().flatten());
        allocations.into_iter().any(|of| of.ports < of.entitled)
    };
    over && (!open || waits())
}

impl Gateway {
    /// Looks after the ports that drain: ends what lives on those whose grace is over, and has them handed out again. Says
    /// whether another generation is in force.
    pub async fn look_after_drains(&mut self) -> Result<bool, Refusal> {
        if self.ownership.draining().next().is_none() {
            return Ok(false);
        }
        let in_force = self.shared.in_force();
        let due = block_in_place(|| {
            let (now, tables) = (unix_seconds(SystemTime::now()), self.shared.flow_tables());
            let expired = self.ownership.draining().filter(|unit| unit.3 <= now);
            let expired: HashSet<_> = expired.map(|(address, p, unit, _)| (address, p, unit)).collect();
            if !expired.is_empty() {
                let ended = end_on(tables, &expired);
                log::info!(
                    "the grace of {} units of ports is over: {ended} flows on them ended",
                    expired.len()
                );
            }
            due(&self.ownership, &live_units(tables), &in_force.compiled, now)
        });
        if due {
            self.apply(in_force.file.clone(), Arc::clone(&in_force.loaded)).await?;
        }
        Ok(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::ports::{Owner, TCP};
    use crate::compile::{AllocationOf, HostFacts, OutboundOf, Registry, Scenario, compile};
    use crate::policy::network::Network;

    #[test]
    fn ports_are_handed_out_again_when_somebody_waits_for_them_or_all_drains_are_over() {
        let (mut registry, nobody) = (Registry::default(), Ownership::default());
        let mut compiled =
            compile(&Network::default(), &HostFacts::default(), &mut registry, &nobody, 1).unwrap();
        let address = "203.0.113.7".parse().unwrap();
        let mut ownership = nobody;
        let units = ownership.frontends.entry(address).or_default();
        let owner = |draining_until| Owner { member: "vm1/a".into(), draining_until };
        units.tcp.extend([(1, owner(None)), (2, owner(Some(100))), (3, owner(Some(200)))]);
        let both: LiveUnits = [((address, TCP, 2), 1), ((address, TCP, 3), 1)].into();
        let one: LiveUnits = [((address, TCP, 3), 1)].into();
        assert!(!due(&ownership, &both, &compiled, 99));
        assert!(!due(&ownership, &one, &compiled, 99), "nobody waits");
        assert!(due(&ownership, &LiveUnits::new(), &compiled, 99), "no flow is left");
        assert!(due(&ownership, &both, &compiled, 200), "the grace is over");
        let waiting = AllocationOf {
            scenario: Scenario::OutboundRule,
            place: "loadBalancers/lb/outboundRules/out".into(),
            frontends: vec![address],
            ports: 8,
            entitled: 16,
            draining: 0,
        };
        compiled
            .outbound
            .push(OutboundOf { allocations: [Some(waiting), None, None], ..OutboundOf::default() });
        assert!(!due(&ownership, &both, &compiled, 99), "nothing to be had");
        assert!(due(&ownership, &one, &compiled, 99));
        assert!(due(&ownership, &both, &compiled, 100));
    }
}
