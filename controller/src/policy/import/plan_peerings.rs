//! What connects virtual networks: peerings, and appliances that routes lead to.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::draft;
use super::names::Unique;
use super::plan::{Plan, renamed};
use super::plan_networks::overlap;
use super::report::{Level, Place, Report};
use super::sources::Sources;

impl Plan {
    /// Only peerings with two sides, between networks that share no addresses, also not with another peer.
    pub fn peerings(&mut self, sources: &Sources, report: &mut Report) {
        let sides: HashSet<(usize, usize)> = sources
            .networks
            .iter()
            .enumerate()
            .flat_map(|(at, network)| network.peerings.iter().map(move |peering| (at, peering)))
            .filter_map(|(at, peering)| Some((at, self.networks.ids.find(&peering.remote.id)?)))
            .collect();
        let mut peers: Vec<Vec<usize>> = vec![Vec::new(); sources.networks.len()];
        let spaces: Vec<Vec<IpNet>> =
            self.networks.networks.iter().map(|network| network.space.clone()).collect();
        let apart = |a: usize, b: usize| {
            spaces[a].iter().all(|one| spaces[b].iter().all(|other| !overlap(one, other)))
        };
        for (at, network) in sources.networks.iter().enumerate() {
            let mut names = Unique::default();
            for peering in &network.peerings {
                let remote = self.networks.ids.find(&peering.remote.id);
                let named = &peering.named;
                let why = match remote {
                    None => format!("{} is not in the input", peering.remote.id.title()),
                    Some(remote) if remote == at => "a network cannot be peered with itself".to_owned(),
                    Some(remote) if !sides.contains(&(remote, at)) => {
                        "the other network is not peered with this one".to_owned()
                    }
                    Some(remote)
                        if self.networks.networks[at]
                            .peerings
                            .iter()
                            .any(|(_, name)| *name == self.networks.networks[remote].name) =>
                    {
                        "the networks are peered already".to_owned()
                    }
                    Some(remote) => {
                        let together = peers[at].contains(&remote)
                            || (apart(at, remote)
                                && peers[at].iter().all(|other| apart(*other, remote))
                                && peers[remote].iter().all(|other| apart(*other, at)));
                        if together {
                            if !peers[at].contains(&remote) {
                                peers[at].push(remote);
                                peers[remote].push(at);
                            }
                            let name = names.take(&named.name, "peering");
                            renamed(named, &name, report);
                            let remote = self.networks.networks[remote].name.clone();
                            self.networks.networks[at].peerings.push((name, remote));
                            continue;
                        }
                        "the networks share addresses, or one does with another peer".to_owned()
                    }
                };
                report.add(
                    Level::Warning,
                    &named.place,
                    &named.title,
                    "remoteVirtualNetwork",
                    why,
                    "import both networks, or peer them in the policy",
                );
            }
        }
    }

    /// An appliance is a guest of a network that uses the table, or of a peer.
    pub fn drop_appliances_nobody_reaches(&mut self, report: &mut Report) {
        for table in &mut self.draft.route_tables {
            let networks = &self.networks.networks;
            let uses = |network: &draft::Network| {
                network.subnets.iter().any(|s| s.route_table.as_ref() == Some(&table.name))
            };
            let users: Vec<&draft::Network> = networks.iter().filter(|network| uses(network)).collect();
            let holds =
                |network: &draft::Network, address| network.space.iter().any(|part| part.contains(&address));
            let reached = |address: IpAddr| {
                users.is_empty()
                    || users.iter().any(|user| {
                        holds(user, address)
                            || user.peerings.iter().any(|(_, peer)| {
                                networks.iter().any(|other| other.name == *peer && holds(other, address))
                            })
                    })
            };
            let name = table.name.clone();
            for route in &mut table.routes {
                let Some(address) = route.address.filter(|address| !reached(*address)) else { continue };
                let why = format!(
                    "no network that uses the table reaches the appliance {address}: the route leads nowhere here"
                );
                let title = format!("routetables/{name}/routes/{}", route.name);
                let nowhere = Place::nowhere();
                report.add(
                    Level::Warning,
                    &nowhere,
                    &title,
                    "nextHopIpAddress",
                    why,
                    "import the appliance's network, or write the next hop",
                );
                (route.hop, route.address) = ("None", None);
            }
        }
    }
}
