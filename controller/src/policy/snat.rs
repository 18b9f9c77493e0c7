//! What holds for all SNAT ports: whose behaviour, when they are free again, and what is said to guests that find none.

use super::diagnostics::Problems;
use super::fields::Fields;
use super::network::{Filtering, Network, Refusal, Snat, Timeouts, TransportProtocol};
use super::shape;
use super::source::Span;
use super::tree::Node;

/// Minutes; a day at most.
const MAX_DRAIN: u32 = 1440;

/// Established TCP may not be forgotten before: 2 hours and 4 minutes (RFC 5382 REQ-5).
const ESTABLISHED: u32 = 7440;
/// Half-open and ending TCP by default (RFC 7857 §2.1, which allows less).
const TRANSITORY: u32 = 240;
/// UDP: two minutes at least, five by default (RFC 4787 REQ-5).
const UDP: u32 = 120;
const UDP_DEFAULT: u32 = 300;
/// Queries (RFC 5508 REQ-2).
const QUERY: u32 = 60;

/// Whose behaviour: Azure's, with the hold-down of ports before their reuse towards the same destination of its load balancer or
/// its NAT gateway (`reference/azure.md` §2.4), or that of RFC 4787, 5382 and 5508 (docs/rfc-compliance.md).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Azure,
    NatGateway,
    Rfc,
}

impl Profile {
    fn timeouts(self) -> Timeouts {
        let default = Timeouts::default();
        match self {
            Self::Azure => default,
            Self::NatGateway => Timeouts { tcp_fin: 65, tcp_reset: 16, tcp_half_open: 30, ..default },
            Self::Rfc => Timeouts {
                tcp_established: ESTABLISHED,
                tcp_half_open: TRANSITORY,
                tcp_fin: TRANSITORY,
                tcp_reset: TRANSITORY,
                tcp_transitory: TRANSITORY,
                udp: UDP_DEFAULT,
                icmp: QUERY,
                ..default
            },
        }
    }

    fn snat(self) -> Snat {
        let default = Snat::default();
        match self {
            Self::Azure => default,
            Self::NatGateway => Snat { udp_hold_seconds: 65, ..default },
            Self::Rfc => Snat {
                refusal: Refusal::Icmp,
                tcp_port_per_socket: true,
                filtering: Filtering::EndpointIndependent,
                tell_every_refusal: true,
                ..default
            },
        }
    }
}

/// Reads `snat`; also what `timeouts` default to, which the profile decides, and where the profile `rfc` is asked for: then
/// [`check_rfc`] is due.
pub fn read(node: Option<&Node<'_>>, problems: &mut Problems) -> (Snat, Timeouts, Option<Span>) {
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::SNAT, problems)) else {
        return (Snat::default(), Timeouts::default(), None);
    };
    let profiles = [("azure", Profile::Azure), ("natgateway", Profile::NatGateway), ("rfc", Profile::Rfc)];
    let named = fields.choice("profile", &profiles, problems);
    let profile = named.as_ref().map_or(Profile::Azure, |word| word.value);
    let filters = [
        ("addressAndPort", Filtering::AddressAndPort),
        ("endpointIndependent", Filtering::EndpointIndependent),
    ];
    let filtering = fields.choice("filtering", &filters, problems).map(|word| word.value);
    let refusals = [("silent", Refusal::Silent), ("icmp", Refusal::Icmp), ("reset", Refusal::Reset)];
    let refusal = fields.choice("onExhaustion", &refusals, problems).map(|word| word.value);
    let drain = fields.number("drainMinutes", 0, MAX_DRAIN, problems);
    let default = profile.snat();
    let snat = Snat {
        refusal: refusal.unwrap_or(default.refusal),
        drain_seconds: drain.map_or(default.drain_seconds, |minutes| minutes.value * 60),
        filtering: filtering.unwrap_or(default.filtering),
        ..default
    };
    let rfc = named.filter(|word| word.value == Profile::Rfc).map(|word| word.span);
    (snat, profile.timeouts(), rfc)
}

/// Nothing in the policy may undercut the timers that the RFCs forbid to undercut.
pub fn check_rfc(network: &Network, profile: Span, problems: &mut Problems) {
    let timeouts = &network.timeouts;
    for (field, is, least, requirement) in [
        ("tcpEstablishedSeconds", timeouts.tcp_established, ESTABLISHED, "RFC 5382 REQ-5"),
        ("udpSeconds", timeouts.udp, UDP, "RFC 4787 REQ-5"),
        ("icmpSeconds", timeouts.icmp, QUERY, "RFC 5508 REQ-2"),
    ] {
        if is < least {
            problems
                .error(profile, format!("`profile: rfc` allows no `{field}` below {least}; it is {is}"))
                .help(format!("{requirement} says so: remove the field, or use another profile"));
        }
    }
    let of = |balancer: &str, kind: &str, name: &str| format!("loadBalancers/{balancer}/{kind}/{name}");
    let mut short = Vec::new();
    for balancer in &network.load_balancers {
        let rules = balancer.rules.iter().filter(|rule| rule.idle_timeout_seconds.is_some());
        let rules = rules.filter(|rule| rule.protocol != TransportProtocol::Udp);
        short.extend(rules.map(|rule| of(&balancer.name, "loadBalancingRules", &rule.name)));
        let rules = balancer.nat_rules.iter().filter(|rule| rule.idle_timeout_seconds.is_some());
        let rules = rules.filter(|rule| rule.protocol != TransportProtocol::Udp);
        short.extend(rules.map(|rule| of(&balancer.name, "inboundNatRules", &rule.name)));
        let rules = balancer.outbound_rules.iter().filter(|rule| rule.idle_timeout_seconds.is_some());
        let rules = rules.filter(|rule| rule.protocol != TransportProtocol::Udp);
        short.extend(rules.map(|rule| of(&balancer.name, "outboundRules", &rule.name)));
    }
    let default = network.default_outbound.as_ref().and_then(|default| default.idle_timeout_seconds);
    short.extend(default.map(|_| "defaultOutbound".to_owned()));
    for place in short {
        problems
            .error(
                profile,
                format!(
                    "`profile: rfc` keeps TCP for 124 minutes, `idleTimeoutInMinutes` of {place} for less"
                ),
            )
            .help("RFC 5382 REQ-5 says so: remove `idleTimeoutInMinutes`, or use another profile");
    }
}
