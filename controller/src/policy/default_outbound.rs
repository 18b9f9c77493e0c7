//! Default outbound: the way out of guests that have no other (scenario 3 of `reference/azure.md` §2.1).

use std::net::IpAddr;

use super::allocation::{MAX_POOL, capacity, default_outbound_members, tier};
use super::capacity::{beside_host, help_host};
use super::diagnostics::Problems;
use super::fields::Fields;
use super::frontends::family;
use super::network::{self, Network};
use super::networks::Resolved;
use super::outbound_rules::IDLE_MINUTES;
use super::publics::Publics;
use super::shape;
use super::source::{Span, Text};
use super::tree::Node;

/// Fields and the family of each.
const ADDRESSES: [(&str, bool); 2] = [("publicIPAddress", false), ("publicIPAddressIPv6", true)];

/// The section as read.
pub struct DefaultOutbound {
    span: Span,
    /// References, and whether IPv6 is meant.
    addresses: Vec<(Text, bool)>,
    idle_minutes: Option<u32>,
}

/// Reads `defaultOutbound`.
pub fn read(node: Option<&Node<'_>>, key: Span, problems: &mut Problems) -> Option<DefaultOutbound> {
    let fields = Fields::open(node?, &shape::DEFAULT_OUTBOUND, problems)?;
    let addresses: Vec<_> = ADDRESSES
        .iter()
        .filter_map(|(field, v6)| fields.text(field, problems).map(|text| (text, *v6)))
        .collect();
    if ADDRESSES.iter().all(|(field, _)| fields.node(field).is_none()) {
        problems.error(key, "`defaultOutbound` has no address").help(
            "add `publicIPAddress: ...` or `publicIPAddressIPv6: ...` with the name of a public address",
        );
    }
    let idle = fields.number("idleTimeoutInMinutes", *IDLE_MINUTES.start(), *IDLE_MINUTES.end(), problems);
    Some(DefaultOutbound { span: key, addresses, idle_minutes: idle.map(|idle| idle.value) })
}

/// Takes its addresses, and checks it against the subnets that allow it.
pub fn resolve(
    read: Option<DefaultOutbound>,
    networks: &Resolved,
    publics: &mut Publics,
    problems: &mut Problems,
) -> Option<network::DefaultOutbound> {
    let Some(read) = read else {
        // Every subnet that asks for it: one of them may be the slip.
        for (subnet, span) in &networks.default_outbound {
            problems
                .error(
                    *span,
                    format!("subnet `{}` allows default outbound, but there is none", networks.subnets[*subnet].name),
                )
                .help("add `defaultOutbound: { publicIPAddress: ... }` to the policy, or write `defaultOutboundAccess: false`");
        }
        return None;
    };
    if networks.default_outbound.is_empty() {
        problems
            .warning(read.span, "no subnet allows default outbound: nobody leaves by it")
            .help("write `defaultOutboundAccess: true` in a subnet, or remove `defaultOutbound`");
    }
    let mut public_addresses = Vec::new();
    for (reference, v6) in &read.addresses {
        let Some(found) = publics.take(reference, "default outbound", problems) else { continue };
        let other = publics.family(found).filter(|is| is != v6);
        if let Some(is) = other {
            let field = if is { ADDRESSES[1].0 } else { ADDRESSES[0].0 };
            problems
                .error(
                    reference.span,
                    format!("`{}` is {}, {} is needed here", reference.value, family(is), family(*v6)),
                )
                .help(format!("write it as `{field}`, or name another address"));
        }
        public_addresses.push(found);
    }
    let idle_timeout_seconds = read.idle_minutes.map(|minutes| minutes * 60);
    Some(network::DefaultOutbound { public_addresses, idle_timeout_seconds })
}

/// Does everyone who leaves by it get ports? Asked when the whole policy is known and has no error.
pub fn check(network: &Network, span: Span, problems: &mut Problems) {
    let Some(outbound) = &network.default_outbound else { return };
    for at in &outbound.public_addresses {
        let public = &network.public_addresses[*at];
        let members = default_outbound_members(network, public.address.is_ipv6()).len();
        let kind = family(matches!(public.address, IpAddr::V6(_)));
        let Some(ports) = tier(members) else {
            problems
                .error(span, format!("{members} {kind} addresses of guests leave by default outbound"))
                .help(format!(
                    "it has ports for {MAX_POOL}: put the others into a pool with an outbound rule"
                ));
            continue;
        };
        let have = u64::from(capacity(public, &network.uplinks, &[]));
        let need = u64::from(ports) * members as u64;
        if need > have {
            let found = problems.error(
                span,
                format!(
                    "default outbound needs {need} ports ({ports} for each of {members} {kind} addresses), `{}` has {have}",
                    public.name
                ),
            );
            if beside_host(public, &network.uplinks) {
                found.help(help_host());
            }
            found.help("or put some of the guests into a pool with an outbound rule");
        }
    }
}
