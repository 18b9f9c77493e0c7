//! A policy as Portcullis reads it.

use std::fmt::Write as _;

use ipnet::IpNet;

use super::policy::{ASGS, GUESTS, Policy, SPACE, Side, Term};

impl Policy {
    /// As Portcullis reads it.
    pub fn yaml(&self) -> String {
        let mut yaml = format!(
            "virtualNetworks:\n  - name: v\n    addressSpace: {{ addressPrefixes: [{}, '{}'] }}\n    subnets:\n",
            SPACE[0], SPACE[1]
        );
        for (subnet, number, group) in [("a", 1, "g0"), ("b", 2, "g1")] {
            let _ = writeln!(
                yaml,
                "      - {{ name: {subnet}, addressPrefixes: [10.0.{number}.0/24, 'fd00:1:0:{number}::/64'], networkSecurityGroup: {group} }}"
            );
        }
        yaml.push_str("networkInterfaces:\n");
        for (number, guest) in GUESTS.iter().enumerate() {
            let asgs = |six: bool| {
                let member = |asg: &usize| self.members[*asg].contains(&(number, six));
                (0..ASGS).filter(member).map(|asg| format!("Asg{asg}")).collect::<Vec<_>>().join(", ")
            };
            let nic =
                guest.groups.1.map_or(String::new(), |group| format!("    networkSecurityGroup: g{group}\n"));
            let _ = write!(
                yaml,
                "  - name: {0}\n    device: {0}\n    macAddress: 02:00:00:00:00:0{number}\n{nic}    ipConfigurations:\n      \
                 - {{ name: v4, subnet: {1}, privateIPAddress: {2}, publicIPAddress: p{number}, applicationSecurityGroups: [{3}] }}\n      \
                 - {{ name: v6, subnet: {1}, privateIPAddress: '{4}', applicationSecurityGroups: [{5}] }}\n",
                guest.name,
                guest.subnet,
                guest.v4,
                asgs(false),
                guest.v6,
                asgs(true)
            );
        }
        yaml.push_str("publicIPAddresses:\n");
        for number in 0..GUESTS.len() {
            let _ = writeln!(
                yaml,
                "  - {{ name: p{number}, ipAddress: 203.0.113.{}, announce: proxy }}",
                20 + number
            );
        }
        yaml.push_str("uplinks: [{ device: up }]\napplicationSecurityGroups: [{ name: Asg0 }, { name: Asg1 }, { name: Asg2 }]\nserviceTags:\n  tags:\n");
        for (tag, nets) in self.tags.iter().enumerate() {
            let _ = writeln!(yaml, "    - {{ name: Tag{tag}, addressPrefixes: [{}] }}", quoted(nets));
        }
        yaml.push_str("networkSecurityGroups:\n");
        for (group, rules) in self.groups.iter().enumerate() {
            let _ = write!(yaml, "  - name: g{group}\n    securityRules:\n");
            for (number, rule) in rules.iter().enumerate() {
                let _ = writeln!(
                    yaml,
                    "      - {{ name: r{number}, priority: {}, direction: {}, access: {}, protocol: '{}', source{}, \
                     destination{}, sourcePortRanges: [{}], destinationPortRanges: [{}] }}",
                    100 + number * 7,
                    if rule.inbound { "Inbound" } else { "Outbound" },
                    if rule.allow { "Allow" } else { "Deny" },
                    rule.protocol,
                    azure_side(&rule.source),
                    azure_side(&rule.destination),
                    azure_ports(&rule.source_ports),
                    azure_ports(&rule.destination_ports),
                );
            }
        }
        yaml
    }
}

fn quoted(nets: &[IpNet]) -> String {
    nets.iter().map(|net| format!("'{net}'")).collect::<Vec<_>>().join(", ")
}

fn azure_side(side: &Side) -> String {
    let name = |term: &Term| match term {
        Term::Any => "'*'".to_owned(),
        Term::Prefix(net) => format!("'{net}'"),
        Term::VirtualNetwork => "VirtualNetwork".to_owned(),
        Term::Internet => "Internet".to_owned(),
        Term::Tag(tag) => format!("Tag{tag}"),
        Term::Asg(asg) => format!("Asg{asg}"),
    };
    let names = side.iter().map(name).collect::<Vec<_>>().join(", ");
    match side[..] {
        [Term::Asg(_), ..] => format!("ApplicationSecurityGroups: [{names}]"),
        [_] => format!("AddressPrefix: {names}"),
        _ => format!("AddressPrefixes: [{names}]"),
    }
}

fn azure_ports(ranges: &[(u16, u16)]) -> String {
    let range = |(low, high): &(u16, u16)| match (low, high) {
        (0, 65535) => "'*'".to_owned(),
        (low, high) if low == high => low.to_string(),
        (low, high) => format!("{low}-{high}"),
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(", ")
}
