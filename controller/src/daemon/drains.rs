//! Ports that drain: when they are over, and who waits for them (ADR 0008).

use std::collections::HashSet;
use std::net::IpAddr;
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

/// The host with its live flows, so that no port they stand on is handed to another guest. What lives on ports whose grace is
/// over is ended before: always in this order, end and then free, whatever the reason for compiling. If nobody owns any ports,
/// nobody loses one, and no table is read.
pub fn occupied(mut view: HostView, ownership: &Ownership, tables: [&FlowTable; 2]) -> HostView {
    if !ownership.frontends.is_empty() {
        view.facts.live = end_overdue(ownership, tables, view.facts.now);
    }
    view
}

/// The host as [`occupied`] would make it, and how many flows that would end. Nothing is ended.
pub fn foreseen(mut view: HostView, ownership: &Ownership, tables: [&FlowTable; 2]) -> (HostView, u32) {
    if ownership.frontends.is_empty() {
        return (view, 0);
    }
    let mut live = live_units(tables);
    let flows = overdue(ownership, view.facts.now).into_iter().filter_map(|unit| live.remove(&unit));
    let flows = flows.sum();
    view.facts.live = live;
    (view, flows)
}

/// Units whose grace is over at `now`, in Unix seconds.
fn overdue(ownership: &Ownership, now: u64) -> HashSet<(IpAddr, u8, u16)> {
    let over = ownership.draining().filter(|unit| unit.3 <= now);
    over.map(|(address, protocol, unit, _)| (address, protocol, unit)).collect()
}

/// Ends what lives on units whose grace is over at `now`, in Unix seconds; what lives on after that, by unit.
fn end_overdue(ownership: &Ownership, tables: [&FlowTable; 2], now: u64) -> LiveUnits {
    let overdue = overdue(ownership, now);
    let live = live_units(tables);
    if !overdue.iter().any(|unit| live.contains_key(unit)) {
        return live;
    }
    let ended = end_on(tables, &overdue);
    log::info!("the grace of {} units of ports is over: {ended} flows on them ended", overdue.len());
    live_units(tables)
}

/// Is it time to hand out ports again? Some drain is over and somebody waits for ports, or all are: a policy is not compiled
/// for each unit that nobody waits for. `live` is what [`end_overdue`] left.
fn due(ownership: &Ownership, live: &LiveUnits, compiled: &Compiled) -> bool {
    let (mut over, mut open) = (false, false);
    for (address, protocol, unit, _) in ownership.draining() {
        let done = !live.contains_key(&(address, protocol, unit));
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
            let now = unix_seconds(SystemTime::now());
            let live = end_overdue(&self.ownership, self.shared.flow_tables(), now);
            due(&self.ownership, &live, &in_force.compiled)
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
    use crate::flows::on_tables::{Put, TCP as FLOW, claimed, with_tables};
    use crate::hosts::Links;
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
        assert!(!due(&ownership, &both, &compiled));
        assert!(!due(&ownership, &one, &compiled), "nobody waits");
        assert!(due(&ownership, &LiveUnits::new(), &compiled), "no flow is left");
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
        assert!(!due(&ownership, &both, &compiled), "nothing to be had");
        assert!(due(&ownership, &one, &compiled));
    }

    /// Two guests share the 64,000 ports of one address.
    fn shared(one: u32, two: u32) -> Network {
        let yaml = format!(
            "virtualNetworks:\n  - name: lab\n    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}\n    \
             subnets: [{{ name: a, addressPrefix: 10.0.1.0/24 }}]\n\
             networkInterfaces:\n  \
             - {{ name: vm1, device: vm1, ipConfigurations: [{{ name: a, subnet: a, privateIPAddress: 10.0.1.4 }}] }}\n  \
             - {{ name: vm2, device: vm2, ipConfigurations: [{{ name: a, subnet: a, privateIPAddress: 10.0.1.5 }}] }}\n\
             publicIPAddresses: [{{ name: p, ipAddress: 203.0.113.10, announce: proxy }}]\n\
             loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: p }}]\n    \
             backendAddressPools:\n      - {{ name: one, backendIPConfigurations: [vm1] }}\n      \
             - {{ name: two, backendIPConfigurations: [vm2] }}\n    outboundRules:\n      \
             - {{ name: one, frontendIPConfigurations: [fe], backendAddressPool: one, protocol: Tcp, allocatedOutboundPorts: {one} }}\n      \
             - {{ name: two, frontendIPConfigurations: [fe], backendAddressPool: two, protocol: Tcp, allocatedOutboundPorts: {two} }}\n\
             uplinks: [{{ device: uplink }}]\n"
        );
        crate::policy::parse("test.yaml", &yaml).expect("the test's policy").network
    }

    #[test]
    fn whatever_compiles_after_the_deadline_ends_the_old_owners_flows_before_their_ports_are_anothers() {
        with_tables(|flows, flows6| {
            let tables = [flows, flows6];
            let address: IpAddr = "203.0.113.10".parse().unwrap();
            let mut registry = Registry::default();
            let mut compiled = |network: &Network, ownership: &Ownership, now, generation| {
                let facts = HostFacts { now, ..HostFacts::default() };
                let view = occupied(HostView { links: Links::default(), facts }, ownership, tables);
                compile(network, &view.facts, &mut registry, ownership, generation).expect("fits").ownership
            };
            let units_of = |ownership: &Ownership, member: &str| -> Vec<u16> {
                let units = ownership.frontends[&address].tcp.iter();
                units.filter(|(_, owner)| owner.member == member).map(|(unit, _)| *unit).collect()
            };
            let first = compiled(&shared(32, 63_968), &Ownership::default(), 1000, 1);
            let four = units_of(&first, "vm1/a");
            assert_eq!((four.len(), units_of(&first, "vm2/a").len()), (4, 7996));
            for (n, unit) in (0..).zip(&four) {
                claimed(flows, Put { slot: 2 * n, outside: ("203.0.113.10", unit * 8 + 3), ..FLOW });
            }
            let grown = shared(8, 63_992);
            let second = compiled(&grown, &first, 2000, 2);
            let draining: Vec<_> = second.draining().map(|unit| (unit.2, unit.3)).collect();
            let until = draining[0].1;
            assert_eq!(draining, four[1..].iter().map(|unit| (*unit, until)).collect::<Vec<_>>());
            assert_eq!(
                units_of(&second, "vm2/a").len(),
                7996,
                "no port under a live flow is another guest's"
            );

            // Within the grace all live on, whoever compiles.
            let third = compiled(&grown, &second, until - 1, 3);
            assert_eq!(third, second);
            assert_eq!(live_units(tables).len(), 4);
            // A preview knows, and ends nothing.
            let facts = HostFacts { now: until, ..HostFacts::default() };
            let (view, ended) = foreseen(HostView { links: Links::default(), facts }, &third, tables);
            assert_eq!((view.facts.live.len(), ended), (1, 3));
            assert_eq!(live_units(tables).len(), 4);
            // A change of the policy comes before the look does.
            let fourth = compiled(&grown, &third, until, 4);
            assert_eq!(units_of(&fourth, "vm1/a"), four[..1]);
            assert_eq!(units_of(&fourth, "vm2/a").len(), 7999, "all are handed out");
            let left: LiveUnits = [((address, TCP, four[0]), 1)].into();
            assert_eq!(live_units(tables), left, "nothing lives on what is another guest's");
        });
    }
}
