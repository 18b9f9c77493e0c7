//! Timers, and what guests may ask of the host.

use portcullis_common::clock::ticks;
use portcullis_common::layout::{
    HOST_DHCP, HOST_DNS, HOST_ECHO, IDLE_ICMP, IDLE_OTHER, IDLE_TCP, IDLE_UDP, REFUSAL_ICMP, REFUSAL_RESET,
    REFUSAL_SILENT, Service, Settings,
};

use super::error::CompileError;
use super::registry::Registry;
use crate::policy::network::{Network, OnRuleChange, Refusal, TransportProtocol};

/// Sampled events per tick and CPU: enough to see what is happening, too few to slow a flood down further.
const EVENT_RATE: u32 = 8;
/// Refusals answered per tick and CPU: some hundred a second, which is more than a person or a program needs.
const ANSWERS: u32 = 32;

/// Flows judged again per tick (67 ms) and CPU after rules have changed: 60,000 a second, a fraction of what a CPU can
/// do of new ones, so that these are not held up. The others wait for their next packet after that.
const REEVALUATE: u32 = 4096;

/// What flows judged under a generation are stamped with.
pub fn epoch(generation: u32) -> u32 {
    generation & 0xfff
}

/// The settings of a generation. The registry has the idle classes already.
pub(super) fn settings(
    network: &Network,
    registry: &Registry,
    generation: u32,
) -> Result<Settings, CompileError> {
    let t = &network.timeouts;
    let access = &network.host_access;
    // A class that stands for nothing must not mean "expired at once".
    let mut idle = [ticks(t.tcp_established); 16];
    idle[IDLE_TCP as usize] = ticks(t.tcp_established);
    idle[IDLE_UDP as usize] = ticks(t.udp);
    idle[IDLE_ICMP as usize] = ticks(t.icmp);
    idle[IDLE_OTHER as usize] = ticks(t.other);
    for (class, seconds) in registry.idle_classes() {
        idle[usize::from(class)] = ticks(seconds);
    }

    let mut host_access = 0;
    for (on, bit) in [(access.dhcp, HOST_DHCP), (access.dns, HOST_DNS), (access.echo, HOST_ECHO)] {
        if on {
            host_access |= bit;
        }
    }

    let mut services = Vec::new();
    for &(protocol, first, last) in &access.services {
        let protocols: &[u16] = match protocol {
            TransportProtocol::Tcp => &[6],
            TransportProtocol::Udp => &[17],
            TransportProtocol::All => &[6, 17],
        };
        services.extend(protocols.iter().map(|&protocol| Service { protocol, first, last, pad: 0 }));
    }
    let mut table = [Service::default(); 16];
    if services.len() > table.len() {
        return Err(CompileError::new(
            "hostAccess/services",
            format!(
                "{} services of the host (TCP and UDP counted apart); there is room for 16",
                services.len()
            ),
        ));
    }
    table[..services.len()].copy_from_slice(&services);

    Ok(Settings {
        idle,
        tcp_half_open: ticks(t.tcp_half_open),
        tcp_fin: ticks(t.tcp_fin),
        tcp_reset: ticks(t.tcp_reset),
        host_access,
        services_used: services.len() as u32,
        event_rate: EVENT_RATE,
        epoch: epoch(generation),
        reevaluate: match network.on_rule_change {
            OnRuleChange::Keep => 0,
            OnRuleChange::Reevaluate => REEVALUATE,
        },
        refusal: match network.snat.refusal {
            Refusal::Silent => REFUSAL_SILENT,
            Refusal::Icmp => REFUSAL_ICMP,
            Refusal::Reset => REFUSAL_RESET,
        },
        answers: ANSWERS,
        udp_hold: if network.snat.udp_hold_seconds == 0 { 0 } else { ticks(network.snat.udp_hold_seconds) },
        tcp_transitory: ticks(t.tcp_transitory),
        services: table,
    })
}
