//! What holds for all SNAT ports: when they are free again, and what is said to guests that find none.

use super::diagnostics::Problems;
use super::fields::Fields;
use super::network::{Refusal, Snat, Timeouts};
use super::shape;
use super::tree::Node;

/// Minutes; a day at most.
const MAX_DRAIN: u32 = 1440;

/// Whose hold-down of ports before their reuse towards the same destination (`reference/azure.md` §2.4).
#[derive(Clone, Copy)]
enum Profile {
    Azure,
    NatGateway,
}

/// Reads `snat`; also what `timeouts` default to, which the profile decides.
pub fn read(node: Option<&Node<'_>>, problems: &mut Problems) -> (Snat, Timeouts) {
    let default = Snat::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::SNAT, problems)) else {
        return (default, Timeouts::default());
    };
    let profiles = [("azure", Profile::Azure), ("natgateway", Profile::NatGateway)];
    let profile = fields.choice("profile", &profiles, problems).map_or(Profile::Azure, |word| word.value);
    let refusals = [("silent", Refusal::Silent), ("icmp", Refusal::Icmp), ("reset", Refusal::Reset)];
    let refusal = fields.choice("onExhaustion", &refusals, problems).map(|word| word.value);
    let drain = fields.number("drainMinutes", 0, MAX_DRAIN, problems);
    let (udp_hold_seconds, timeouts) = match profile {
        Profile::Azure => (0, Timeouts::default()),
        Profile::NatGateway => {
            (65, Timeouts { tcp_fin: 65, tcp_reset: 16, tcp_half_open: 30, ..Timeouts::default() })
        }
    };
    let drain_seconds = drain.map_or(default.drain_seconds, |minutes| minutes.value * 60);
    (Snat { refusal: refusal.unwrap_or_default(), drain_seconds, udp_hold_seconds }, timeouts)
}
