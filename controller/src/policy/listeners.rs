//! Ports of frontends that the world sends to: each belongs to one load balancing or inbound NAT rule.

use std::collections::HashMap;

use super::allocation::same_ports;
use super::diagnostics::Problems;
use super::frontends::Frontends;
use super::network::TransportProtocol;
use super::source::Span;

/// A rule's port or range of ports.
pub struct Listener {
    pub frontend: usize,
    pub protocol: TransportProtocol,
    /// Inclusive.
    pub ports: (u16, u16),
    /// `load balancing rule \`http\``.
    pub title: String,
    /// Where the port, or the first of the range, stands.
    pub span: Span,
}

/// Reports rules that have a port of one frontend and protocol in common: for each the one that reaches furthest of
/// those that begin before it.
pub fn check(listeners: &[Listener], frontends: &Frontends, problems: &mut Problems) {
    for protocol in [TransportProtocol::Tcp, TransportProtocol::Udp] {
        let mut order: Vec<&Listener> =
            listeners.iter().filter(|listener| same_ports(listener.protocol, protocol)).collect();
        order.sort_by_key(|listener| (listener.frontend, listener.ports));
        let mut furthest: HashMap<usize, &Listener> = HashMap::new();
        for listener in order {
            let Some(before) = furthest.get(&listener.frontend).copied() else {
                furthest.insert(listener.frontend, listener);
                continue;
            };
            if listener.ports.0 <= before.ports.1 {
                report(before, listener, protocol, frontends, problems);
            }
            if listener.ports.1 > before.ports.1 {
                furthest.insert(listener.frontend, listener);
            }
        }
    }
}

fn report(
    one: &Listener,
    other: &Listener,
    protocol: TransportProtocol,
    frontends: &Frontends,
    problems: &mut Problems,
) {
    let (earlier, later) = if one.span.used < other.span.used { (one, other) } else { (other, one) };
    let frontend = &frontends.built[one.frontend].name;
    let (low, high) = (one.ports.0.max(other.ports.0), one.ports.1.min(other.ports.1));
    let ports = if low == high { format!("port {low}") } else { format!("ports {low} to {high}") };
    // Two rules for both protocols are in each other's way once, not twice.
    let both = [one, other].iter().all(|listener| listener.protocol == TransportProtocol::All);
    let protocol = if both { "Tcp and Udp".to_owned() } else { format!("{protocol:?}") };
    problems
        .error(later.span, format!("{protocol} {ports} of frontend `{frontend}` has two rules"))
        .label(format!("by {}", later.title))
        .also(earlier.span, format!("already taken by {}", earlier.title))
        .help("choose another port, or another frontend");
}
