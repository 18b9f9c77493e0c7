//! A rule's source and destination as numbers of lists, as far as that can be said without knowing who asks.

use portcullis_common::policy::{EXEMPT_DNS, EXEMPT_IMDS, EXEMPT_LKM};

use super::contexts::{Contexts, Meaning};
use super::port_classes::{ANY_PORT, PortLists};
use super::prefix::Prefix;
use crate::policy::network::{AddressMatch, Network, RuleProtocol, SecurityRule, ServiceTag};

/// A rule with its prefixes and ports as lists; what depends on the context still open.
pub(super) struct Prepared {
    protocol: RuleProtocol,
    sides: [PreparedSide; 2],
    ports: [u32; 2],
}

/// A rule's source or destination: any address, or those of these terms.
enum PreparedSide {
    Any,
    One(Term),
    Many(Box<[Term]>),
}

/// A list, or what a context makes one of.
#[derive(Clone, Copy)]
enum Term {
    List(u32),
    VirtualNetwork,
    Internet,
    /// The list holds in one virtual network, if in any.
    Application {
        network: Option<u32>,
        list: u32,
    },
}

/// Prefixes of the rule at hand, to be used again for the next.
pub(super) type Prefixes = Vec<Prefix>;

impl Prepared {
    pub fn new(
        network: &Network,
        rule: &SecurityRule,
        contexts: &mut Contexts<'_>,
        ports: &mut PortLists,
        scratch: &mut Prefixes,
    ) -> Self {
        // Packets of these have no ports, and the datapath looks up port 0 for them. A range on such a rule means
        // nothing (`reference/azure.md` §1.8), so the rule must match whatever it says. A rule for any protocol with
        // a range is about ports: a packet without matches only if the range has 0.
        let portless = matches!(rule.protocol, RuleProtocol::Icmp | RuleProtocol::Esp | RuleProtocol::Ah);
        let mut ports_of = |ranges: &[(u16, u16)]| if portless { ANY_PORT } else { ports.intern(ranges) };
        Self {
            protocol: rule.protocol,
            ports: [ports_of(&rule.source_ports), ports_of(&rule.destination_ports)],
            sides: [&rule.source, &rule.destination]
                .map(|terms| PreparedSide::new(network, terms, contexts, scratch)),
        }
    }

    pub fn protocol(&self) -> RuleProtocol {
        self.protocol
    }

    /// Numbers of its lists of ports, [`ANY_PORT`] for all: source and destination.
    pub fn ports(&self) -> [u32; 2] {
        self.ports
    }

    /// Is the source (0) or destination (1) any address?
    pub fn is_any(&self, side: usize) -> bool {
        matches!(self.sides[side], PreparedSide::Any)
    }

    /// The lists that its source (0) or destination (1) consists of where tags mean this. None at all for an application
    /// group of another virtual network.
    pub fn lists(&self, side: usize, meaning: &Meaning) -> impl Iterator<Item = u32> {
        let terms = match &self.sides[side] {
            PreparedSide::Any => &[][..],
            PreparedSide::One(term) => std::slice::from_ref(term),
            PreparedSide::Many(terms) => terms,
        };
        terms.iter().filter_map(|term| match *term {
            Term::List(list) => Some(list),
            Term::VirtualNetwork => Some(meaning.virtual_network),
            Term::Internet => Some(meaning.internet),
            Term::Application { network, list } => (network == Some(meaning.network as u32)).then_some(list),
        })
    }
}

impl PreparedSide {
    fn new(
        network: &Network,
        terms: &[AddressMatch],
        contexts: &mut Contexts<'_>,
        prefixes: &mut Prefixes,
    ) -> Self {
        if terms.contains(&AddressMatch::Any) {
            return Self::Any;
        }
        prefixes.clear();
        let mut found = Vec::new();
        for term in terms {
            match term {
                AddressMatch::Any => {}
                AddressMatch::Prefix(net) => prefixes.push(net.into()),
                AddressMatch::Tag(ServiceTag::VirtualNetwork) => found.push(Term::VirtualNetwork),
                AddressMatch::Tag(ServiceTag::Internet) => found.push(Term::Internet),
                AddressMatch::Tag(tag) => found.push(Term::List(contexts.fixed(*tag))),
                AddressMatch::Application(group) => found.push(Term::Application {
                    network: network.application_groups[*group].network.map(|network| network as u32),
                    list: contexts.application(*group),
                }),
            }
        }
        // All of a family is named by many rules, so it is a list of its own; all of both is any.
        let whole = [false, true].map(Prefix::everything).map(|all| prefixes.contains(&all).then_some(all));
        if whole.iter().all(Option::is_some) {
            return Self::Any;
        }
        for all in whole.into_iter().flatten() {
            prefixes.retain(|p| p.is_v6() != all.is_v6());
            found.push(Term::List(contexts.lists.intern_shared(vec![all])));
        }
        if !prefixes.is_empty() {
            found.push(Term::List(contexts.lists.intern(prefixes)));
        }
        match found[..] {
            [term] => Self::One(term),
            _ => Self::Many(found.into()),
        }
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
