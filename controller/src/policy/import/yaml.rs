//! Writes a draft as YAML, with comments where something was made up.
//!
//! The policy is written by hand rather than through serde: comments are half of what it has to say. Every text passes
//! [`scalar`], which quotes whatever YAML might take for something else.

use std::fmt::Write;
use std::net::Ipv4Addr;

use super::draft::{Draft, Rule, Side};
use super::yaml_balancers::{Fields, balancers};

/// The policy as text; `heading` becomes a comment at its beginning.
pub fn write(draft: &Draft, heading: &[String]) -> String {
    let mut out = Writer(String::new());
    for line in heading {
        out.comment(0, line);
    }
    out.line(0, "");
    if draft.reevaluate {
        out.line(0, "onRuleChange: reevaluate");
    }
    if !draft.limits.is_empty() {
        let limits: Vec<_> = draft.limits.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        out.line(0, &format!("limits: {{ {} }}", limits.join(", ")));
    }
    if !draft.application_groups.is_empty() {
        out.line(0, "applicationSecurityGroups:");
        for name in &draft.application_groups {
            out.line(1, &format!("- name: {}", scalar(name)));
        }
    }
    tags(draft, &mut out);
    if !draft.route_tables.is_empty() {
        out.line(0, "routeTables:");
    }
    for table in &draft.route_tables {
        out.line(1, &format!("- name: {}", scalar(&table.name)));
        if !table.routes.is_empty() {
            out.line(2, "routes:");
        }
        for route in &table.routes {
            let mut fields = vec![
                ("name", scalar(&route.name)),
                ("addressPrefix", scalar(&route.prefix.to_string())),
                ("nextHopType", route.hop.to_owned()),
            ];
            fields.extend(route.address.map(|address| ("nextHopIpAddress", scalar(&address.to_string()))));
            out.item(3, &fields, None);
        }
    }
    networks(draft, &mut out);
    interfaces(draft, &mut out);
    if !draft.groups.is_empty() {
        out.line(0, "networkSecurityGroups:");
    }
    for group in &draft.groups {
        out.comment(1, group.comment.as_deref().unwrap_or_default());
        out.line(1, &format!("- name: {}", scalar(&group.name)));
        if !group.rules.is_empty() {
            out.line(2, "securityRules:");
        }
        for rule in &group.rules {
            write_rule(rule, &mut out);
        }
    }
    if !draft.publics.is_empty() {
        out.line(0, "publicIPAddresses:");
    }
    for public in &draft.publics {
        let fields = [
            ("name", scalar(&public.name)),
            ("ipAddress", scalar(&public.address.to_string())),
            ("announce", "proxy".to_owned()),
        ];
        out.item(1, &fields, public.comment.as_deref());
    }
    if !draft.prefixes.is_empty() {
        out.line(0, "publicIPPrefixes:");
    }
    for public in &draft.prefixes {
        let prefix = scalar(&public.prefix.to_string());
        let fields = [("name", scalar(&public.name)), ("ipPrefix", prefix), ("announce", "proxy".to_owned())];
        out.item(1, &fields, None);
    }
    balancers(draft, &mut out);
    if let Some(public) = &draft.default_outbound {
        out.line(0, &format!("defaultOutbound: {{ publicIPAddress: {} }}", scalar(public)));
    }
    if let Some(device) = &draft.uplink {
        out.line(0, "uplinks:");
        out.item(1, &[("device", scalar(device))], Some("REPLACE: the device towards the world"));
    }
    out.0
}

fn tags(draft: &Draft, out: &mut Writer) {
    if draft.tag_file.is_none() && draft.tags.is_empty() {
        return;
    }
    out.line(0, "serviceTags:");
    if let Some(file) = &draft.tag_file {
        out.line(1, &format!("file: {}", scalar(file)));
    }
    if !draft.tags.is_empty() {
        out.line(1, "tags:");
    }
    for tag in &draft.tags {
        let prefixes: Vec<_> = tag.prefixes.iter().map(ToString::to_string).collect();
        out.item(2, &[("name", scalar(&tag.name)), ("addressPrefixes", list(&prefixes))], None);
    }
}

fn networks(draft: &Draft, out: &mut Writer) {
    out.line(0, "virtualNetworks:");
    for network in &draft.networks {
        out.comment(1, network.comment.as_deref().unwrap_or_default());
        out.line(1, &format!("- name: {}", scalar(&network.name)));
        let space: Vec<_> = network.space.iter().map(ToString::to_string).collect();
        out.line(2, &format!("addressSpace: {{ addressPrefixes: {} }}", list(&space)));
        if !network.peerings.is_empty() {
            out.line(2, "virtualNetworkPeerings:");
        }
        for (name, remote) in &network.peerings {
            out.item(3, &[("name", scalar(name)), ("remoteVirtualNetwork", scalar(remote))], None);
        }
        if !network.subnets.is_empty() {
            out.line(2, "subnets:");
        }
        for subnet in &network.subnets {
            let prefixes: Vec<_> = subnet.prefixes.iter().map(ToString::to_string).collect();
            let mut fields = vec![("name", scalar(&subnet.name))];
            fields.push(match prefixes.as_slice() {
                [prefix] => ("addressPrefix", scalar(prefix)),
                _ => ("addressPrefixes", list(&prefixes)),
            });
            fields.extend(subnet.group.iter().map(|group| ("networkSecurityGroup", scalar(group))));
            fields.extend(subnet.route_table.iter().map(|table| ("routeTable", scalar(table))));
            flag(subnet.default_outbound, "defaultOutboundAccess", &mut fields);
            out.item(3, &fields, subnet.comment.as_deref());
        }
    }
}

fn interfaces(draft: &Draft, out: &mut Writer) {
    out.line(0, "networkInterfaces:");
    for interface in &draft.interfaces {
        out.comment(1, interface.comment.as_deref().unwrap_or_default());
        out.line(1, &format!("- name: {}", scalar(&interface.name)));
        out.line(2, &format!("device: {}", scalar(&interface.device)));
        if let Some(mac) = &interface.mac {
            out.line(2, &format!("macAddress: {}", scalar(mac)));
        }
        if let Some(group) = &interface.group {
            out.line(2, &format!("networkSecurityGroup: {}", scalar(group)));
        }
        out.line(2, "ipConfigurations:");
        for configuration in &interface.configurations {
            let mut fields = vec![
                ("name", scalar(&configuration.name)),
                ("subnet", scalar(&configuration.subnet)),
                ("privateIPAddress", scalar(&configuration.address.to_string())),
            ];
            fields.extend(configuration.public.iter().map(|public| ("publicIPAddress", scalar(public))));
            if !configuration.application_groups.is_empty() {
                fields.push(("applicationSecurityGroups", list(&configuration.application_groups)));
            }
            out.item(3, &fields, configuration.comment.as_deref());
        }
    }
}

fn write_rule(rule: &Rule, out: &mut Writer) {
    let mut fields = vec![("name", scalar(&rule.name))];
    if !rule.description.is_empty() {
        fields.push(("description", scalar(&rule.description)));
    }
    fields.push(("priority", rule.priority.to_string()));
    fields.push(("direction", format!("{:?}", rule.direction)));
    fields.push(("access", format!("{:?}", rule.access)));
    fields.push(("protocol", scalar(rule.protocol)));
    let sides = [
        (&rule.source, ["sourceAddressPrefix", "sourceAddressPrefixes", "sourceApplicationSecurityGroups"]),
        (
            &rule.destination,
            [
                "destinationAddressPrefix",
                "destinationAddressPrefixes",
                "destinationApplicationSecurityGroups",
            ],
        ),
    ];
    for (side, [one, many, groups]) in sides {
        fields.push(match side {
            Side::Addresses(terms) if terms.len() == 1 => (one, scalar(&terms[0])),
            Side::Addresses(terms) => (many, list(terms)),
            Side::Groups(names) => (groups, list(names)),
        });
    }
    let ports = [
        (&rule.source_ports, "sourcePortRange", "sourcePortRanges"),
        (&rule.destination_ports, "destinationPortRange", "destinationPortRanges"),
    ];
    for (ranges, one, many) in ports {
        let words: Vec<_> = ranges.iter().map(|range| port_words(*range)).collect();
        fields.push(match words.as_slice() {
            [word] => (one, scalar(word)),
            _ => (many, list(&words)),
        });
    }
    let mut first = "- ";
    for (key, value) in fields {
        out.line(3, &format!("{first}{key}: {value}"));
        first = "  ";
    }
}

/// False is the default of every one of them.
pub fn flag(value: bool, name: &'static str, fields: &mut Fields) {
    if value {
        fields.push((name, "true".to_owned()));
    }
}

/// Text under construction.
pub struct Writer(String);

impl Writer {
    pub fn line(&mut self, depth: usize, text: &str) {
        let _ = writeln!(self.0, "{:width$}{text}", "", width = depth * 2);
    }

    /// A comment on a line of its own; nothing for an empty one. What stands in it cannot end it.
    fn comment(&mut self, depth: usize, text: &str) {
        if !text.is_empty() {
            self.line(depth, &format!("# {}", one_line(text)));
        }
    }

    /// `- { a: 1, b: 2 }  # comment`
    pub fn item(&mut self, depth: usize, fields: &[(&str, String)], comment: Option<&str>) {
        let fields: Vec<_> = fields.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        let comment = comment.map(|text| format!("  # {}", one_line(text))).unwrap_or_default();
        self.line(depth, &format!("- {{ {} }}{comment}", fields.join(", ")));
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if printable(c) { c } else { ' ' }).collect()
}

fn port_words((low, high): (u16, u16)) -> String {
    match (low, high) {
        (0, u16::MAX) => "*".to_owned(),
        _ if low == high => low.to_string(),
        _ => format!("{low}-{high}"),
    }
}

/// A list in one line.
pub fn list<T: AsRef<str>>(items: &[T]) -> String {
    format!("[{}]", items.iter().map(|item| scalar(item.as_ref())).collect::<Vec<_>>().join(", "))
}

/// What YAML 1.2 lets stand unescaped, without line breaks and byte order marks.
fn printable(c: char) -> bool {
    matches!(c, ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}' | '\u{10000}'..)
        && !matches!(c, '\u{2028}' | '\u{2029}')
}

/// A text as YAML: bare if no reader can take it for a number, a boolean, null or syntax, else in double quotes.
pub fn scalar(text: &str) -> String {
    let word = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
    // A bare address or prefix has two dots, so it is neither a number nor a base 60 one of YAML 1.1.
    let number = text.bytes().all(|b| b.is_ascii_digit() || b".-+_eExobafABCDEFinNIF/".contains(&b));
    let address = text.split('/').next().is_some_and(|address| address.parse::<Ipv4Addr>().is_ok());
    let reserved = ["true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan", "inf"];
    let bare = !text.is_empty()
        && text.chars().all(word)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && (address || !number)
        && !reserved.iter().any(|word| word.eq_ignore_ascii_case(text));
    if bare {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            _ if printable(c) => quoted.push(c),
            _ => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_yaml_could_take_for_something_else_is_quoted() {
        for bare in ["web-nsg", "10.0.0.0/16", "10.0.0.4", "Storage.WestUS", "Tcp", "vnet/web", "8m-k"] {
            assert_eq!(scalar(bare), bare);
        }
        for text in [
            "",
            "*",
            "80",
            "8000-8010",
            "yes",
            "No",
            "null",
            "~",
            "1e3",
            "0x10",
            "1.5",
            "-a",
            "a: b",
            "a #b",
            "y",
            "fd00::/8",
            ".inf",
            "{a}",
            "ä",
            "12_3",
        ] {
            assert_eq!(scalar(text), format!("\"{text}\""));
        }
        assert_eq!(scalar("a\"b\\c\n\u{7}\u{2028}"), "\"a\\\"b\\\\c\\n\\U00000007\\U00002028\"");
    }

    #[test]
    fn every_text_comes_back_from_the_reader_as_it_was() {
        for text in [
            "yes",
            "80",
            "*",
            "a\nb",
            "tab\t",
            "ünï",
            "\u{1}\u{85}\u{feff}\u{10ffff}",
            "it's \"so\"",
            " x ",
            "- a",
            "!t",
        ] {
            let yaml = format!("a: {}\nb: [{}, x]\n", scalar(text), scalar(text));
            let read: std::collections::BTreeMap<String, serde_json::Value> =
                serde_saphyr::from_str(&yaml).unwrap();
            assert_eq!(read["a"].as_str(), Some(text), "{yaml}");
            assert_eq!(read["b"][0].as_str(), Some(text), "{yaml}");
        }
    }
}
