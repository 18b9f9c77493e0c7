//! Network interfaces of the policy, their subnets and addresses, and placeholders where the input has none.

use std::collections::HashMap;
use std::net::IpAddr;

use super::Options;
use super::draft;
use super::interfaces::Configuration;
use super::names::{Id, Unique};
use super::networks::Network;
use super::object::Reference;
use super::plan::{Plan, renamed};
use super::plan_networks::{Wanted, prefix_around};
use super::plan_publics::Taken;
use super::report::{Level, Place, Report};
use super::sources::{Named, Sources};

/// Groups that get a placeholder guest each; enough for any file, and within the 4,096 /28 of the made-up network.
const MAX_PLACEHOLDERS: usize = 4000;

/// Application security groups one ip configuration may be in.
const MAX_MEMBERSHIPS: usize = 20;

/// Makes up the subnets that interfaces refer to and the input lacks, large enough for the addresses they have.
pub fn missing_subnets(plan: &mut Plan, sources: &Sources, report: &mut Report) {
    let mut missing: Vec<(Reference, Vec<IpAddr>)> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for configuration in sources.interfaces.iter().flat_map(|interface| &interface.configurations) {
        let Some(reference) = &configuration.subnet else { continue };
        if reference.id.types.is_empty() || plan.networks.subnet_ids.find(&reference.id).is_some() {
            continue;
        }
        let key = format!("{:?} {}", reference.id.scope, reference.id.title().to_lowercase());
        let at = *known.entry(key).or_insert_with(|| {
            missing.push((reference.clone(), Vec::new()));
            missing.len() - 1
        });
        missing[at].1.extend(configuration.address);
    }
    for (reference, addresses) in missing {
        let parent = reference.id.parent();
        let network = plan.networks.ids.find(&parent).unwrap_or_else(|| {
            let named = Named {
                name: parent.name().to_owned(),
                title: parent.title(),
                id: parent,
                place: reference.place.clone(),
            };
            plan.networks.add(&Network::unknown(named), report)
        });
        let title = reference.id.title();
        let why = "the subnet is not in the input: its prefix is made up, and a group or route table on it is not known";
        let action = "import the virtual network too";
        report.add(Level::Warning, &reference.place, &title, "", why, action);
        let wanted = Wanted {
            id: &reference.id,
            title: &title,
            place: &reference.place,
            prefixes: prefix_around(&addresses),
            group: None,
            route_table: None,
            default_outbound: false,
            comment: Some(
                "REPLACE: the subnet is not in the input; prefix made up, group unknown".to_owned(),
            ),
        };
        plan.networks.add_subnet(network, wanted, report);
    }
}

/// The interfaces of the input.
pub fn interfaces(plan: &mut Plan, sources: &Sources, options: &Options, report: &mut Report) {
    // Addresses that are given come before those that are handed out.
    let mut given: HashMap<(usize, usize), Result<IpAddr, String>> = HashMap::new();
    let mut subnets: HashMap<(usize, usize), usize> = HashMap::new();
    for (i, interface) in sources.interfaces.iter().enumerate() {
        let mut network = None;
        for (c, configuration) in interface.configurations.iter().enumerate() {
            let Some(subnet) = subnet_of(plan, configuration, report) else { continue };
            let here = plan.networks.subnets[subnet].0;
            if *network.get_or_insert(here) != here {
                let named = &configuration.named;
                let why = "the interface has addresses in two virtual networks";
                report.add(
                    Level::Warning,
                    &named.place,
                    &named.title,
                    "subnet",
                    why,
                    "make it two network interfaces",
                );
                continue;
            }
            subnets.insert((i, c), subnet);
            if let Some(address) = configuration.address {
                given.insert((i, c), plan.networks.claim(subnet, address).map(|()| address));
            }
        }
    }
    let mut names = Unique::default();
    let mut homes: HashMap<String, usize> = HashMap::new();
    for (i, interface) in sources.interfaces.iter().enumerate() {
        let named = &interface.named;
        let mut own = Unique::default();
        let mut configurations = Vec::new();
        for (c, configuration) in interface.configurations.iter().enumerate() {
            let Some(subnet) = subnets.get(&(i, c)).copied() else { continue };
            let address = given.remove(&(i, c));
            configurations.extend(build(plan, configuration, subnet, address, &mut own, &mut homes, report));
        }
        if configurations.is_empty() {
            let why = "no ip configuration of the interface could be carried over";
            report.add(
                Level::Warning,
                &named.place,
                &named.title,
                "ipConfigurations",
                why,
                "add the interface by hand",
            );
            continue;
        }
        let name = names.take(&named.name, "nic");
        renamed(named, &name, report);
        let device = plan.devices.take(&options.device_prefix, &name);
        let why = format!("Azure has no word for it; `{device}` is made up of the name");
        report.add(
            Level::Note,
            &named.place,
            &named.title,
            "device",
            why,
            "write the device that the guest is attached to",
        );
        let group = interface.group.as_ref().map(|group| plan.group(group, &named.title, report));
        let comment = Some("REPLACE the device with the one the guest is attached to".to_owned());
        let mac = interface.mac.clone();
        plan.draft.interfaces.push(draft::Interface {
            source: named.place.id(),
            name,
            device,
            mac,
            group,
            configurations,
            comment,
        });
    }
}

/// The subnet an ip configuration is in; a placeholder if nothing says which.
fn subnet_of(plan: &mut Plan, configuration: &Configuration, report: &mut Report) -> Option<usize> {
    let named = &configuration.named;
    if let Some(found) =
        configuration.subnet.as_ref().and_then(|subnet| plan.networks.subnet_ids.find(&subnet.id))
    {
        return Some(found);
    }
    let place = configuration.subnet.as_ref().map_or(&named.place, |subnet| &subnet.place);
    let why = "it is not known in which subnet this is, nor which group and route table that has; a subnet is made up";
    report.add(
        Level::Warning,
        place,
        &named.title,
        "subnet",
        why,
        "import what is deployed, or write the subnet",
    );
    let id = Id::of("Microsoft.Network/virtualNetworks/subnets", "imported/unknown");
    if let Some(found) = plan.networks.subnet_ids.find(&id) {
        return Some(found);
    }
    placeholder_subnet(
        plan,
        &id,
        prefix_around(&configuration.address.into_iter().collect::<Vec<_>>()),
        None,
        report,
    )
}

fn placeholder_subnet(
    plan: &mut Plan,
    id: &Id,
    prefixes: Vec<ipnet::IpNet>,
    group: Option<String>,
    report: &mut Report,
) -> Option<usize> {
    let nowhere = Place::nowhere();
    let parent = id.parent();
    let network = plan.networks.ids.find(&parent).unwrap_or_else(|| {
        let named = Named {
            name: parent.name().to_owned(),
            title: parent.title(),
            id: parent,
            place: nowhere.clone(),
        };
        let made_up = "10.255.0.0/16".parse().into_iter().collect();
        plan.networks.add(&Network { space: made_up, ..Network::unknown(named) }, report)
    });
    let title = id.title();
    let comment = Some("REPLACE: the input has no subnet here, this one is made up".to_owned());
    let wanted = Wanted {
        id,
        title: &title,
        place: &nowhere,
        prefixes,
        group,
        route_table: None,
        default_outbound: false,
        comment,
    };
    plan.networks.add_subnet(network, wanted, report)
}

fn build(
    plan: &mut Plan,
    configuration: &Configuration,
    subnet: usize,
    given: Option<Result<IpAddr, String>>,
    own: &mut Unique,
    homes: &mut HashMap<String, usize>,
    report: &mut Report,
) -> Option<draft::Configuration> {
    let named = &configuration.named;
    let mut comment = None;
    let address = match given {
        Some(Ok(address)) => address,
        other => {
            let v6 = configuration.address.map_or(configuration.v6, |address| address.is_ipv6());
            let Some(address) = plan.networks.allocate(subnet, v6) else {
                let why = "there is no free address of its family in the subnet";
                report.add(
                    Level::Warning,
                    &named.place,
                    &named.title,
                    "privateIPAddress",
                    why,
                    "add it by hand",
                );
                return None;
            };
            let why = match other {
                Some(Err(why)) => format!("{why}; {address} is made up"),
                _ => format!("the input has no address; {address} is the next free one"),
            };
            report.add(
                Level::Note,
                &named.place,
                &named.title,
                "privateIPAddress",
                why,
                "write the guest's address",
            );
            comment = Some("REPLACE: the address is made up".to_owned());
            address
        }
    };
    let name = own.take(&named.name, "ipconfig");
    renamed(named, &name, report);
    let network = plan.networks.subnets[subnet].0;
    let mut application_groups: Vec<String> = Vec::new();
    for reference in &configuration.application_groups {
        let group =
            plan.application_ids.find(&reference.id).map(|at| plan.draft.application_groups[at].clone());
        let why = match group {
            Some(group) if application_groups.contains(&group) => continue,
            // A group has its members in one network; in Azure that is so, but names of several imports may collide.
            Some(group) if *homes.entry(group.clone()).or_insert(network) != network => {
                format!("the members of `{group}` are in another virtual network")
            }
            Some(_) if application_groups.len() == MAX_MEMBERSHIPS => {
                format!("an ip configuration is in at most {MAX_MEMBERSHIPS} groups")
            }
            Some(group) => {
                application_groups.push(group);
                continue;
            }
            None => format!("it is not clear which group {} is", reference.id.title()),
        };
        let action = "a Deny rule may name the group: write it with addresses";
        report.add(Level::Error, &reference.place, &named.title, "applicationSecurityGroups", why, action);
    }
    let public = configuration.public.as_ref().and_then(|reference| {
        let taken = plan.take_public(reference, &named.title, "publicIPAddress", address.is_ipv6(), report);
        let found = taken.iter().find_map(|taken| match taken {
            Taken::Address(at) => Some(&plan.draft.publics[*at]),
            Taken::Prefix(_) => None,
        })?;
        if found.address.is_ipv6() != address.is_ipv6() {
            let why = format!("{} is not of the family of {address}", found.address);
            let action = "give it to an ip configuration of its family";
            report.add(Level::Warning, &reference.place, &named.title, "publicIPAddress", why, action);
            return None;
        }
        Some(found.name.clone())
    });
    let subnet = plan.networks.reference(subnet);
    Some(draft::Configuration {
        source: named.place.id(),
        name,
        subnet,
        address,
        public,
        application_groups,
        comment,
    })
}

/// A policy has at least one guest. Where the input has none, every group gets one, or else the first subnet.
pub fn placeholders(plan: &mut Plan, options: &Options, report: &mut Report) {
    if !plan.draft.interfaces.is_empty() {
        return;
    }
    let nowhere = Place::nowhere();
    let mut subnets: Vec<(usize, String)> = Vec::new();
    if plan.networks.subnets.is_empty() {
        let groups: Vec<Option<String>> = match plan.draft.groups.len() {
            0 => vec![None],
            _ => plan
                .draft
                .groups
                .iter()
                .map(|group| Some(group.name.clone()))
                .take(MAX_PLACEHOLDERS)
                .collect(),
        };
        let alone = plan.networks.networks.is_empty();
        let mut parts = "10.255.0.0/16".parse::<ipnet::Ipv4Net>().ok().and_then(|net| net.subnets(28).ok());
        for (at, group) in groups.into_iter().enumerate() {
            let prefix = parts.as_mut().filter(|_| alone).and_then(Iterator::next);
            let id = match alone {
                true => Id::of(
                    "Microsoft.Network/virtualNetworks/subnets",
                    &format!("imported/placeholder{}", at + 1),
                ),
                false => Id::of(
                    "Microsoft.Network/virtualNetworks/subnets",
                    &format!("{}/placeholder{}", plan.networks.networks[0].name, at + 1),
                ),
            };
            let prefixes = prefix.map(ipnet::IpNet::V4).into_iter().collect();
            let found = match alone {
                true => placeholder_subnet(plan, &id, prefixes, group, report),
                false => {
                    let comment =
                        Some("REPLACE: the input has no subnet here, this one is made up".to_owned());
                    let title = id.title();
                    let wanted = Wanted {
                        id: &id,
                        title: &title,
                        place: &nowhere,
                        prefixes,
                        group,
                        route_table: None,
                        default_outbound: false,
                        comment,
                    };
                    plan.networks.add_subnet(0, wanted, report)
                }
            };
            subnets.extend(found.map(|subnet| (subnet, format!("placeholder{}", at + 1))));
        }
    } else {
        let all = plan.networks.subnets.len();
        subnets.extend((0..all).map(|subnet| (subnet, "placeholder1".to_owned())));
    }
    let one = !plan.draft.groups.is_empty() && subnets.iter().any(|(_, name)| name != "placeholder1");
    for (subnet, name) in subnets {
        let address = plan.networks.allocate(subnet, false).or_else(|| plan.networks.allocate(subnet, true));
        let Some(address) = address else { continue };
        let device = plan.devices.take(&options.device_prefix, "REPLACE");
        let configuration = draft::Configuration {
            source: String::new(),
            name: "ipconfig1".to_owned(),
            subnet: plan.networks.reference(subnet),
            address,
            public: None,
            application_groups: Vec::new(),
            comment: None,
        };
        let why = format!("the input has no interface; `{name}` is made up, on device `{device}`");
        report.add(
            Level::Note,
            &nowhere,
            &format!("networkInterfaces/{name}"),
            "",
            why,
            "write your guests instead",
        );
        plan.draft.interfaces.push(draft::Interface {
            source: String::new(),
            name,
            device,
            mac: None,
            group: None,
            configurations: vec![configuration],
            comment: Some("REPLACE: the input has no interface, this one is made up".to_owned()),
        });
        if !one {
            break;
        }
    }
}
