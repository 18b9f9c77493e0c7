//! Virtual networks and subnets of the policy: prefixes that fit into each other, made up where the input has none.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::draft;
use super::names::{Id, Index, Unique};
use super::networks::Network;
use super::report::{Level, Place, Report};
use crate::policy::network::default_gateway;
use crate::policy::{prefixes, subnets};

/// What is made up where the input has no address space.
const MADE_UP: &str = "10.255.0.0/16";

/// Networks under construction, with who has which address.
#[derive(Default)]
pub struct Networks {
    pub networks: Vec<draft::Network>,
    pub ids: Index,
    /// Subnets: (network, position in it).
    pub subnets: Vec<(usize, usize)>,
    pub subnet_ids: Index,
    pub names: Unique,
    subnet_names: Vec<Unique>,
    used: HashSet<(usize, IpAddr)>,
    /// Where to go on looking for a free address: (subnet, prefix) to offset.
    next: HashMap<(usize, IpNet), u32>,
}

/// A subnet to be added.
pub struct Wanted<'a> {
    pub id: &'a Id,
    pub title: &'a str,
    pub place: &'a Place,
    pub prefixes: Vec<IpNet>,
    pub group: Option<String>,
    pub route_table: Option<String>,
    pub default_outbound: bool,
    pub comment: Option<String>,
}

impl Networks {
    /// Adds a network without its subnets.
    pub fn add(&mut self, network: &Network, report: &mut Report) -> usize {
        let named = &network.named;
        let name = self.names.take(&named.name, "vnet");
        if name != named.name {
            let why = format!("the network is called `{name}` here");
            report.add(Level::Note, &named.place, &named.title, "name", why, "choose a name you like");
        }
        let mut space: Vec<IpNet> = Vec::new();
        for prefix in &network.space {
            if let Some(why) = forbidden(prefix) {
                let why = format!("{prefix} is {why}, which no virtual network can have");
                report.add(
                    Level::Warning,
                    &named.place,
                    &named.title,
                    "addressSpace",
                    why,
                    "choose another prefix",
                );
            } else if let Some(other) = space.iter().find(|other| overlap(other, prefix)) {
                let why = format!("{prefix} overlaps {other}");
                report.add(
                    Level::Note,
                    &named.place,
                    &named.title,
                    "addressSpace",
                    why,
                    "none needed if one is inside the other",
                );
            } else {
                space.push(*prefix);
            }
        }
        self.ids.add(&named.id);
        let comment = (!network.given)
            .then(|| "REPLACE: this network is not in the input, its address space is made up".to_owned());
        if !network.given {
            let why = "the network is not in the input; its address space is made up";
            report.add(
                Level::Note,
                &named.place,
                &named.title,
                "addressSpace",
                why,
                "import the network too, or write its address space",
            );
        }
        self.networks.push(draft::Network {
            name,
            space,
            peerings: Vec::new(),
            subnets: Vec::new(),
            comment,
        });
        self.subnet_names.push(Unique::default());
        self.networks.len() - 1
    }

    /// Adds a subnet; the address space grows if it has to. `None` if there is no room for it.
    pub fn add_subnet(&mut self, network: usize, wanted: Wanted<'_>, report: &mut Report) -> Option<usize> {
        let mut prefixes = Vec::new();
        let loss = if wanted.group.is_some() { Level::Error } else { Level::Warning };
        for prefix in wanted.prefixes {
            let too_long = match prefix {
                IpNet::V4(net) => net.prefix_len() > 30,
                IpNet::V6(net) => !(48..=126).contains(&net.prefix_len()),
            };
            let taken = self.networks[network].subnets.iter().flat_map(|s| &s.prefixes).chain(&prefixes);
            let taken = taken.copied().find(|other| overlap(other, &prefix));
            let why = if let Some(why) = forbidden(&prefix) {
                format!("{prefix} is {why}, which no virtual network can have")
            } else if too_long {
                format!("{prefix} is too small or too large for a subnet")
            } else if let Some(other) = taken {
                format!("{prefix} overlaps {other}, which another subnet of the network has")
            } else {
                prefixes.push(prefix);
                continue;
            };
            report.add(
                loss,
                wanted.place,
                wanted.title,
                "addressPrefix",
                why,
                "give the subnet a prefix of its own",
            );
        }
        let mut comment = wanted.comment;
        if prefixes.is_empty() {
            let Some(prefix) = self.free_prefix(network) else {
                let why = "there is no room for the subnet in the address space";
                report.add(loss, wanted.place, wanted.title, "", why, "add the subnet to the policy by hand");
                return None;
            };
            if comment.is_none() {
                let why = format!("the subnet has no usable prefix in the input; {prefix} is made up");
                report.add(
                    Level::Note,
                    wanted.place,
                    wanted.title,
                    "addressPrefix",
                    why,
                    "write the right one",
                );
            }
            comment.get_or_insert_with(|| "REPLACE: the prefix is made up".to_owned());
            prefixes.push(prefix);
        }
        for prefix in &prefixes {
            let space = &mut self.networks[network].space;
            if space.iter().any(|whole| whole.contains(prefix)) {
                continue;
            }
            let why = format!("{prefix} was added to the address space");
            report.add(
                Level::Note,
                wanted.place,
                wanted.title,
                "addressPrefix",
                why,
                "see whether the network is complete",
            );
            space.retain(|part| !overlap(part, prefix));
            space.push(*prefix);
        }
        let name = self.subnet_names[network].take(wanted.id.name(), "subnet");
        if name != wanted.id.name() {
            let why = format!("the subnet is called `{name}` here");
            report.add(Level::Note, wanted.place, wanted.title, "name", why, "choose a name you like");
        }
        let Wanted { group, route_table, default_outbound, .. } = wanted;
        let own = &mut self.networks[network].subnets;
        own.push(draft::Subnet { name, prefixes, group, route_table, default_outbound, comment });
        self.subnets.push((network, own.len() - 1));
        self.subnet_ids.add(wanted.id);
        Some(self.subnets.len() - 1)
    }

    /// Gives a network that ended up without any address space a made-up one.
    pub fn fill_empty(&mut self, report: &mut Report) {
        for network in self.networks.iter_mut().filter(|network| network.space.is_empty()) {
            network.space.extend(MADE_UP.parse::<IpNet>());
            network.comment = Some("REPLACE: the address space is made up".to_owned());
            let title = format!("virtualnetworks/{}", network.name);
            let why = format!("the network has no usable address space; {MADE_UP} is made up");
            report.add(Level::Note, &Place::nowhere(), &title, "addressSpace", why, "write the right one");
        }
    }

    /// A /24 of the network that no subnet has, or what is left of it.
    fn free_prefix(&mut self, network: usize) -> Option<IpNet> {
        let network = &mut self.networks[network];
        if !network.space.iter().any(|part| part.addr().is_ipv4()) {
            network.space.push(MADE_UP.parse().ok()?);
        }
        let free = |prefix: &IpNet| {
            network.subnets.iter().flat_map(|s| &s.prefixes).all(|other| !overlap(other, prefix))
        };
        for part in &network.space {
            let IpNet::V4(part) = part else { continue };
            for length in [24, 28, 30] {
                let length = length.max(part.prefix_len());
                let found = part.subnets(length).ok()?.take(4096).map(IpNet::V4).find(free);
                if let Some(prefix) = found.filter(|prefix| prefix.prefix_len() <= 30) {
                    return Some(prefix);
                }
            }
        }
        None
    }

    /// `network/subnet`.
    pub fn reference(&self, subnet: usize) -> String {
        let (network, at) = self.subnets[subnet];
        format!("{}/{}", self.networks[network].name, self.networks[network].subnets[at].name)
    }

    /// Takes an address if a guest can have it.
    pub fn claim(&mut self, subnet: usize, address: IpAddr) -> Result<(), String> {
        let (network, at) = self.subnets[subnet];
        let prefixes = &self.networks[network].subnets[at].prefixes;
        let Some(prefix) = prefixes.iter().find(|prefix| prefix.contains(&address)) else {
            return Err(format!("{address} is not in its subnet"));
        };
        if reserved(prefix, address) {
            return Err(format!("{address} is the network, broadcast or gateway address of its subnet"));
        }
        if !self.used.insert((network, address)) {
            return Err(format!("{address} is another guest's"));
        }
        Ok(())
    }

    /// A free address; Azure keeps the first four of a subnet for itself, so those come last.
    pub fn allocate(&mut self, subnet: usize, v6: bool) -> Option<IpAddr> {
        let (network, at) = self.subnets[subnet];
        let prefixes: Vec<IpNet> = self.networks[network].subnets[at].prefixes.clone();
        for prefix in prefixes.into_iter().filter(|prefix| prefix.addr().is_ipv6() == v6) {
            let next = self.next.entry((subnet, prefix)).or_insert(4);
            for offset in (*next..*next + (1 << 16)).chain(1..4) {
                let address = match prefix {
                    IpNet::V4(net) => {
                        IpAddr::V4(Ipv4Addr::from(u32::from(net.network()).saturating_add(offset)))
                    }
                    IpNet::V6(net) => IpAddr::V6(Ipv6Addr::from(
                        u128::from(net.network()).saturating_add(u128::from(offset)),
                    )),
                };
                if prefix.contains(&address)
                    && !reserved(&prefix, address)
                    && self.used.insert((network, address))
                {
                    *next = (*next).max(offset + 1);
                    return Some(address);
                }
            }
        }
        None
    }
}

/// The prefix that a subnet needs to hold these addresses.
pub fn prefix_around(addresses: &[IpAddr]) -> Vec<IpNet> {
    let mut prefixes = Vec::new();
    let v4: Vec<u32> = addresses
        .iter()
        .filter_map(|a| if let IpAddr::V4(a) = a { Some(u32::from(*a)) } else { None })
        .collect();
    if let Some(first) = v4.first() {
        let same = v4.iter().map(|other| (first ^ other).leading_zeros()).min().unwrap_or(24) as u8;
        // Addresses all over the place are no subnet: the first one's is taken, the others get new ones.
        let length = if same < 16 { 24 } else { same.min(24) };
        prefixes.extend(Ipv4Net::new(Ipv4Addr::from(*first), length).map(|net| IpNet::V4(net.trunc())));
    }
    if let Some(IpAddr::V6(first)) = addresses.iter().find(|a| a.is_ipv6()) {
        prefixes.extend(Ipv6Net::new(*first, 64).map(|net| IpNet::V6(net.trunc())));
    }
    prefixes
}

fn reserved(prefix: &IpNet, address: IpAddr) -> bool {
    subnets::reserved(prefix, address).is_some() || default_gateway(prefix) == Some(address)
}

/// Why no virtual network may have this prefix.
fn forbidden(prefix: &IpNet) -> Option<String> {
    prefixes::forbidden(prefix).map(|(range, why)| format!("in {range} ({why})"))
}

pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}
