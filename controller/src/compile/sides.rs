//! A rule's source and destination as numbers of lists, as far as that can be said without knowing who asks.

use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM};

use super::contexts::{Contexts, Meaning};
use super::port_classes::{ANY_PORT, PortLists};
use super::prefix::Prefix;
use super::ruleset::{Rule, Side};
use crate::policy::network::{AddressMatch, Network, RuleProtocol, SecurityRule, ServiceTag};

/// A rule with its prefixes and ports as lists; what depends on the context still open.
pub(super) struct Prepared {
    protocol: RuleProtocol,
    sides: [PreparedSide; 2],
    ports: [u32; 2],
}

struct PreparedSide {
    any: bool,
    lists: Vec<u32>,
    open: Vec<Open>,
}

/// What a context decides.
enum Open {
    VirtualNetwork,
    Internet,
    /// The list holds in one virtual network, if in any.
    Application {
        network: Option<usize>,
        list: u32,
    },
}

impl Prepared {
    pub fn new(
        network: &Network,
        rule: &SecurityRule,
        contexts: &mut Contexts<'_>,
        ports: &mut PortLists,
    ) -> Self {
        // Packets of these have no ports, and the datapath looks up port 0 for them. A range on such a rule means
        // nothing (`reference/azure.md` §1.8), so the rule must match whatever it says. A rule for any protocol with
        // a range is about ports: a packet without matches only if the range has 0.
        let portless = matches!(rule.protocol, RuleProtocol::Icmp | RuleProtocol::Esp | RuleProtocol::Ah);
        let mut ports_of = |ranges: &[(u16, u16)]| if portless { ANY_PORT } else { ports.intern(ranges) };
        Self {
            protocol: rule.protocol,
            ports: [ports_of(&rule.source_ports), ports_of(&rule.destination_ports)],
            sides: [&rule.source, &rule.destination].map(|terms| PreparedSide::new(network, terms, contexts)),
        }
    }

    /// The rule as it is where tags mean this.
    pub fn seen_from(&self, meaning: &Meaning) -> Rule {
        let side = |side: &PreparedSide| {
            if side.any {
                return Side::Any;
            }
            let open = side.open.iter().filter_map(|open| match *open {
                Open::VirtualNetwork => Some(meaning.virtual_network),
                Open::Internet => Some(meaning.internet),
                Open::Application { network, list } => (network == Some(meaning.network)).then_some(list),
            });
            Side::Lists(side.lists.iter().copied().chain(open).collect())
        };
        let [source, destination] = &self.sides;
        Rule { protocol: self.protocol, addresses: [side(source), side(destination)], ports: self.ports }
    }
}

impl PreparedSide {
    fn new(network: &Network, terms: &[AddressMatch], contexts: &mut Contexts<'_>) -> Self {
        let mut side = Self { any: false, lists: Vec::new(), open: Vec::new() };
        let mut prefixes: Vec<Prefix> = Vec::new();
        for term in terms {
            match term {
                AddressMatch::Any => side.any = true,
                AddressMatch::Prefix(net) => prefixes.push(net.into()),
                AddressMatch::Tag(ServiceTag::VirtualNetwork) => side.open.push(Open::VirtualNetwork),
                AddressMatch::Tag(ServiceTag::Internet) => side.open.push(Open::Internet),
                AddressMatch::Tag(tag) => side.lists.push(contexts.fixed(*tag)),
                AddressMatch::Application(group) => side.open.push(Open::Application {
                    network: network.application_groups[*group].network,
                    list: contexts.application(*group),
                }),
            }
        }
        // All of a family is named by many rules, so it is a list of its own; all of both is any.
        let whole = [false, true].map(Prefix::everything).map(|all| (all, prefixes.contains(&all)));
        side.any |= whole.iter().all(|&(_, named)| named);
        if !side.any {
            for (all, _) in whole.into_iter().filter(|&(_, named)| named) {
                prefixes.retain(|p| p.is_v6() != all.is_v6());
                side.lists.push(contexts.lists.intern_shared(vec![all]));
            }
            if !prefixes.is_empty() {
                side.lists.push(contexts.lists.intern(prefixes));
            }
        }
        side
    }
}

/// The rules of a group that name a platform tag as destination, as they are asked about a packet that is exempt from
/// the group but for them (`reference/azure.md` §1.8): the destination is what the exemption is for already, so here
/// it is any. Each with its position in the group. `tag` is [`EXEMPT_DNS`], [`EXEMPT_IMDS`] or [`EXEMPT_LKM`].
pub(super) fn naming_platform_tag(rules: &[&SecurityRule], tag: u32) -> Vec<(usize, SecurityRule)> {
    let wanted = match tag {
        EXEMPT_DNS => ServiceTag::AzurePlatformDns,
        EXEMPT_IMDS => ServiceTag::AzurePlatformImds,
        EXEMPT_LKM => ServiceTag::AzurePlatformLkm,
        _ => return Vec::new(),
    };
    let names = |rule: &&SecurityRule| rule.destination.contains(&AddressMatch::Tag(wanted));
    let found = rules.iter().enumerate().filter(|(_, rule)| names(rule));
    found
        .filter_map(|(position, &rule)| {
            let mut rule = rule.clone();
            rule.destination = vec![AddressMatch::Any];
            if tag == EXEMPT_DNS {
                // The tag stands for port 53 only.
                let has = rule.destination_ports.iter().any(|&(first, last)| first <= 53 && 53 <= last);
                rule.destination_ports = vec![(53, 53)];
                has.then_some((position, rule))
            } else {
                Some((position, rule))
            }
        })
        .collect()
}
