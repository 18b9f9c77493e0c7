//! Peerings: two virtual networks that reach each other as if they were one.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::Names;
use super::network::VirtualNetwork;
use super::overlap::overlaps;
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// A peering as read.
pub struct Peering {
    name: Option<Text>,
    remote: Option<Text>,
}

/// Reads `virtualNetworkPeerings`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Peering> {
    items.iter().filter_map(|node| read_peering(node, problems)).collect()
}

fn read_peering(node: &Node<'_>, problems: &mut Problems) -> Option<Peering> {
    let fields = Fields::open(node, &shape::PEERING, problems)?;
    let name = fields.text("name", problems);
    let remote = fields.text("remoteVirtualNetwork", problems);
    Some(Peering { name, remote })
}

/// Checks the peerings of every network (in the order of `networks`) and enters them. `spans` are the networks' names,
/// `spaces` the prefixes of all.
pub fn resolve(
    read: &[Vec<Peering>],
    names: &Names,
    networks: &mut [VirtualNetwork],
    spans: &[Span],
    spaces: &[(usize, At<IpNet>)],
    register: &mut Register,
    problems: &mut Problems,
) {
    // Remote network to the place that names it, of every network; sorted, so that reports do not depend on a hasher.
    let mut links: Vec<Vec<(usize, Span)>> = Vec::new();
    let mut complete = true;
    for (index, peerings) in read.iter().enumerate() {
        links.push(read_links(index, peerings, names, networks, register, &mut complete, problems));
    }
    for (index, own) in links.iter().enumerate() {
        for (remote, span) in own {
            if links[*remote].binary_search_by_key(&index, |(back, _)| *back).is_ok() {
                networks[index].peers.push(*remote);
            } else if complete {
                // After a misspelt reference this may be what was meant.
                one_sided(&networks[index].name, &networks[*remote].name, *span, spans[*remote], problems);
            }
        }
    }
    check_spaces(&links, networks, spaces, problems);
}

fn one_sided(name: &str, remote: &str, span: Span, remote_span: Span, problems: &mut Problems) {
    problems
        .error(span, format!("`{name}` is peered with `{remote}`, but `{remote}` is not peered with `{name}`"))
        .also(remote_span, format!("the side of `{remote}` is missing here"))
        .help(format!(
            "a peering has two sides: add `virtualNetworkPeerings: [{{ name: to-{name}, remoteVirtualNetwork: {name} }}]` \
             to `{remote}`"
        ));
}

fn read_links(
    index: usize,
    peerings: &[Peering],
    names: &Names,
    networks: &[VirtualNetwork],
    register: &mut Register,
    complete: &mut bool,
    problems: &mut Problems,
) -> Vec<(usize, Span)> {
    let own = &networks[index].name;
    let mut own_names = Names::new("peering of this virtual network");
    let mut links: HashMap<usize, Span> = HashMap::new();
    for (at, peering) in peerings.iter().enumerate() {
        if let Some(name) = &peering.name {
            own_names.declare(name, at, problems);
            register.add(&["virtualNetworks", own, "virtualNetworkPeerings", &name.value], name.span);
        }
        let Some(text) = &peering.remote else { continue };
        let Some(remote) = names.find(text, "virtualNetworks", problems) else {
            *complete = false;
            continue;
        };
        if remote == index {
            problems
                .error(text.span, format!("`{own}` is peered with itself"))
                .help("name the other virtual network");
        } else if let Some(first) = links.get(&remote) {
            problems
                .error(text.span, format!("`{own}` is peered with `{}` twice", networks[remote].name))
                .also(*first, "the first one")
                .help("remove one of them");
        } else {
            links.insert(remote, text.span);
        }
    }
    let mut links: Vec<_> = links.into_iter().collect();
    links.sort_unstable();
    links
}

/// What a network reaches has to be told apart by address: its own space and those of all its peers.
fn check_spaces(
    links: &[Vec<(usize, Span)>],
    networks: &[VirtualNetwork],
    spaces: &[(usize, At<IpNet>)],
    problems: &mut Problems,
) {
    let mut of_network: Vec<Vec<&At<IpNet>>> = vec![Vec::new(); networks.len()];
    for (network, prefix) in spaces {
        of_network[*network].push(prefix);
    }
    let mut told = HashSet::new();
    for (index, own) in links.iter().enumerate().filter(|(_, own)| !own.is_empty()) {
        let reached = std::iter::once(index).chain(own.iter().map(|(remote, _)| *remote));
        let all: Vec<_> = reached
            .flat_map(|network| of_network[network].iter().map(move |prefix| (*prefix, network)))
            .collect();
        for (one, other) in overlaps(&all) {
            let (a, b) = (one.1.min(other.1), one.1.max(other.1));
            // Overlaps inside one space have been reported there.
            if a == b || !told.insert((a, b)) {
                continue;
            }
            let link =
                |network: usize| own.iter().find(|(remote, _)| *remote == network).map(|(_, span)| *span);
            let Some(span) = link(if a == index { b } else { a }).max(link(b)) else { continue };
            let (first, second) = (&networks[one.1].name, &networks[other.1].name);
            let message = if a == index || b == index {
                format!("`{}` and `{}` are peered, but share addresses", networks[a].name, networks[b].name)
            } else {
                format!(
                    "`{}` is peered with both `{}` and `{}`, which share addresses",
                    networks[index].name, networks[a].name, networks[b].name
                )
            };
            problems
                .error(span, message)
                .also(other.0.span, format!("{} of `{second}`", other.0.value))
                .also(one.0.span, format!("{} of `{first}`", one.0.value))
                .help("give one of them another address space, or remove the peering");
        }
    }
}
