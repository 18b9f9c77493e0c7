//! A policy translated for nftables.

use std::fmt::Write as _;

use ipnet::IpNet;

use super::policy::{GUESTS, Policy, Rule, SPACE, Term};

/// What Azure's tag Internet leaves out, beside the virtual network.
const NOT_INTERNET: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, \
                            192.168.0.0/16, 224.0.0.0/4, 240.0.0.0/4, 168.63.129.16/32";

impl Policy {
    /// A chain for each group and direction, that drops or returns; they are called in Azure's
    /// order.
    pub fn ruleset(&self) -> String {
        let mut text = String::from("table inet groups {\n  counter judged { }\n  counter passed { }\n");
        let mut set = |name: &str, elements: [String; 2]| {
            for (family, kind, elements) in
                [("4", "ipv4_addr", &elements[0]), ("6", "ipv6_addr", &elements[1])]
            {
                let elements =
                    if elements.is_empty() { String::new() } else { format!("elements = {{ {elements} }};") };
                let _ = writeln!(
                    text,
                    "  set {name}{family} {{ type {kind}; flags interval; auto-merge; {elements} }}"
                );
            }
        };
        set("VirtualNetwork", [format!("{}, 168.63.129.16", SPACE[0]), SPACE[1].to_owned()]);
        set("NotInternet", [NOT_INTERNET.to_owned(), SPACE[1].to_owned()]);
        for (tag, nets) in self.tags.iter().enumerate() {
            let of = |six: bool| {
                let nets = nets.iter().filter(|net| net.addr().is_ipv6() == six).map(IpNet::to_string);
                nets.collect::<Vec<_>>().join(", ")
            };
            set(&format!("Tag{tag}_"), [of(false), of(true)]);
        }
        for (asg, members) in self.members.iter().enumerate() {
            let of = |six: bool| {
                let members = members.iter().filter(|(_, family)| *family == six);
                members
                    .map(|(guest, _)| GUESTS[*guest].address(six).to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            set(&format!("Asg{asg}_"), [of(false), of(true)]);
        }
        for (group, rules) in self.groups.iter().enumerate() {
            for inbound in [true, false] {
                let _ = writeln!(text, "  chain g{group}_{} {{", way(inbound));
                rules
                    .iter()
                    .filter(|rule| rule.inbound == inbound)
                    .for_each(|rule| text.push_str(&nft_rule(rule)));
                for (ip, six) in [("ip", 4), ("ip6", 6)] {
                    let _ = writeln!(
                        text,
                        "    {ip} saddr @VirtualNetwork{six} {ip} daddr @VirtualNetwork{six} return"
                    );
                }
                text.push_str(if inbound {
                    "    ip saddr 168.63.129.16 return\n"
                } else {
                    "    ip daddr != @NotInternet4 return\n    ip6 daddr 2000::/3 ip6 daddr != @NotInternet6 return\n"
                });
                text.push_str("    drop\n  }\n");
            }
        }
        text.push_str("  chain forward {\n    type filter hook forward priority 0; policy accept;\n    counter name judged\n");
        for inbound in [false, true] {
            for guest in &GUESTS {
                for (ip, address) in [("ip", guest.address(false)), ("ip6", guest.address(true))] {
                    let (subnet, nic) = (Some(guest.groups.0), guest.groups.1);
                    let order = if inbound { [subnet, nic] } else { [nic, subnet] };
                    for group in order.into_iter().flatten() {
                        let side = if inbound { "daddr" } else { "saddr" };
                        let _ = writeln!(text, "    {ip} {side} {address} jump g{group}_{}", way(inbound));
                    }
                }
            }
        }
        text + "    counter name passed\n  }\n}\n"
    }
}

fn way(inbound: bool) -> &'static str {
    if inbound { "in" } else { "out" }
}

/// The lines of one rule: one for each pair of terms and family.
fn nft_rule(rule: &Rule) -> String {
    let mut lines = String::new();
    let ports = |side: &str, ranges: &[(u16, u16)]| match ranges {
        [(0, 65535)] => String::new(),
        ranges => {
            let ranges: Vec<String> = ranges.iter().map(|(low, high)| format!("{low}-{high}")).collect();
            format!("th {side} {{ {} }} ", ranges.join(", "))
        }
    };
    let ports = ports("sport", &rule.source_ports) + &ports("dport", &rule.destination_ports);
    let protocol = match rule.protocol {
        "Tcp" => "meta l4proto tcp ",
        "Udp" => "meta l4proto udp ",
        "Icmp" => "meta l4proto { icmp, ipv6-icmp } ",
        _ if ports.is_empty() => "",
        _ => "meta l4proto { tcp, udp } ",
    };
    let verdict = if rule.allow { "return" } else { "drop" };
    for six in [false, true] {
        let family = if six { "ipv6" } else { "ipv4" };
        for source in rule.source.iter().filter_map(|term| nft_term(term, "saddr", six)) {
            for destination in rule.destination.iter().filter_map(|term| nft_term(term, "daddr", six)) {
                let _ = writeln!(
                    lines,
                    "    meta nfproto {family} {source}{destination}{protocol}{ports}{verdict}"
                );
            }
        }
    }
    lines
}

/// A term for one family; `None` if it has no address of it.
fn nft_term(term: &Term, side: &str, six: bool) -> Option<String> {
    let (ip, number) = if six { ("ip6", 6) } else { ("ip", 4) };
    Some(match term {
        Term::Any => String::new(),
        Term::Prefix(net) if net.addr().is_ipv6() == six => format!("{ip} {side} {net} "),
        Term::Prefix(_) => return None,
        Term::VirtualNetwork => format!("{ip} {side} @VirtualNetwork{number} "),
        Term::Internet if six => format!("ip6 {side} 2000::/3 ip6 {side} != @NotInternet6 "),
        Term::Internet => format!("ip {side} != @NotInternet4 "),
        Term::Tag(tag) => format!("{ip} {side} @Tag{tag}_{number} "),
        Term::Asg(asg) => format!("{ip} {side} @Asg{asg}_{number} "),
    })
}
