//! Groups that stand nowhere, application groups without use, and rules about addresses that are elsewhere.

use super::view::{View, guarded};
use super::{Findings, Severity, Surroundings, group_path, rule_path};
use crate::policy::network::{AddressMatch, Direction, Network};

/// Rules whose local side (destination inbound, source outbound) has no address that the group guards.
pub(super) fn local_side(views: &[View<'_>], findings: &mut Findings<'_>) {
    let Some(first) = views.first() else { return };
    let guarded: Vec<_> = views.iter().map(|view| guarded(view.network, view.group, view.subnet)).collect();
    if guarded.iter().all(|set| set.is_empty()) {
        return;
    }
    let local = |view: &View<'_>, index: usize| {
        let region = &view.regions[index];
        if first.direction == Direction::Inbound { region.destination.clone() } else { region.source.clone() }
    };
    for index in first.own() {
        let elsewhere = views.iter().zip(&guarded).all(|(view, guarded)| {
            view.space.is_empty(index) || local(view, index).common(guarded).is_empty()
        });
        let empty = views.iter().all(|view| view.space.is_empty(index));
        if !elsewhere || empty {
            continue;
        }
        let rule = first.rules[index];
        let (side, terms) = match first.direction {
            Direction::Inbound => ("destination", &rule.destination),
            Direction::Outbound => ("source", &rule.source),
        };
        let about = rule_path(first.network, first.group, rule);
        let title = format!("{:?} rule {} ({})", rule.direction, rule.name, rule.priority);
        let group = &first.network.groups[first.group].name;
        let applications = terms.iter().all(|term| matches!(term, AddressMatch::Application(_)));
        match applications {
            true => findings.add(
                "PC105",
                Severity::Warning,
                about,
                format!("{title} is for members of an application group, and nobody behind {group} is one"),
                "name the application group in an ip configuration there, or attach the group where its members are",
            ),
            false => findings.add(
                "PC104",
                Severity::Warning,
                about,
                format!("{title} can never match: its {side} is no address of the subnets and interfaces of {group}"),
                format!("correct the {side} (rules see private addresses), or attach the group where it is meant"),
            ),
        };
    }
}

/// Things that nothing uses, and services under addresses that this host does not have.
pub(super) fn check(network: &Network, around: Surroundings<'_>, findings: &mut Findings<'_>) {
    for (index, group) in network.groups.iter().enumerate() {
        let used = network.subnets.iter().any(|subnet| subnet.group == Some(index))
            || network.interfaces.iter().any(|interface| interface.group == Some(index));
        if !used {
            findings.add(
                "PC401",
                Severity::Warning,
                group_path(network, index),
                format!("network security group {} is attached nowhere: it filters nothing", group.name),
                "name it as `networkSecurityGroup` of a subnet or a network interface, or remove it",
            );
        }
    }
    for (index, group) in network.application_groups.iter().enumerate() {
        let about = format!("applicationSecurityGroups/{}", group.name);
        let configurations = network.interfaces.iter().flat_map(|interface| &interface.addresses);
        let members = configurations.filter(|c| c.application_groups.contains(&index)).count();
        let term = AddressMatch::Application(index);
        let mut rules = network.groups.iter().flat_map(|group| &group.rules);
        let named = rules.any(|rule| rule.source.contains(&term) || rule.destination.contains(&term));
        if members == 0 {
            findings.add(
                "PC402",
                Severity::Warning,
                about.clone(),
                format!(
                    "application security group {} has no member: rules that name it match nothing",
                    group.name
                ),
                "name it under `applicationSecurityGroups` of an ip configuration, or remove it",
            );
        }
        if !named {
            findings.add(
                "PC403",
                Severity::Info,
                about,
                format!("no rule names application security group {}", group.name),
                "name it in a rule, or remove it",
            );
        }
    }
    let Some(addresses) = around.host_addresses else { return };
    for service in &network.platform.services {
        if !addresses.contains(&service.address.into()) {
            findings.add(
                "PC501",
                Severity::Warning,
                format!("platformServices/{}", service.name),
                format!(
                    "platform service {} is under {}, which this host does not have",
                    service.name, service.address
                ),
                format!("add it: ip address add {}/32 dev lo", service.address),
            );
        }
    }
}
