//! One list of rules for everybody: as security rules of a policy, for nftables and for iptables.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::layout::FIRST_DESTINATION_PORT;
use super::rig::DESTINATION;
use crate::random::Random;

/// As many as a group has priorities for.
pub(super) const MOST: usize = 3997;

/// What a list does with the bench's packets, by its last rule; none of the others is about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Allowed,
    Denied,
}

/// A rule about packets that guests send.
struct Rule {
    prefix: Ipv4Addr,
    length: u8,
    protocol: &'static str,
    ports: (u16, u16),
    allow: bool,
}

/// A list of rules in the order they are asked.
pub(super) struct Rules(Vec<Rule>);

impl Rules {
    /// `count` of them, all but the last drawn by `seed`: prefixes of 12 to 28 bits, ranges of ports, by turns TCP that is
    /// allowed and UDP that is denied. The last one is about both protocols at the bench's destination.
    pub fn new(count: usize, seed: u64, last: Fate) -> Self {
        let mut random = Random(seed);
        let mut rules: Vec<Rule> = Vec::with_capacity(count + 1);
        while rules.len() + 1 < count {
            let length = 12 + random.below(17) as u8;
            let prefix = Ipv4Addr::from((random.next() as u32 | 1 << 24) & u32::MAX << (32 - length));
            let first = random.below(60_000) as u16;
            let ports = (first, first + random.below(5000) as u16);
            // Not the bench's own 198.51.100.0/24 and no address that a packet cannot have.
            let sensible =
                (1..=223).contains(&prefix.octets()[0]) && ![10, 127, 198, 203].contains(&prefix.octets()[0]);
            if sensible {
                let (protocol, allow) =
                    if rules.len().is_multiple_of(2) { ("tcp", true) } else { ("udp", false) };
                rules.push(Rule { prefix, length, protocol, ports, allow });
            }
        }
        let [a, b, c, _] = DESTINATION.octets();
        rules.push(Rule {
            prefix: Ipv4Addr::new(a, b, c, 0),
            length: 24,
            protocol: "*",
            ports: (FIRST_DESTINATION_PORT as u16, u16::MAX),
            allow: last == Fate::Allowed,
        });
        Self(rules)
    }

    /// A group `name` of a policy.
    pub fn group(&self, name: &str) -> String {
        let mut text = format!("  - name: {name}\n    securityRules:\n");
        for (i, rule) in self.0.iter().enumerate() {
            let protocol = match rule.protocol {
                "tcp" => "Tcp",
                "udp" => "Udp",
                _ => "'*'",
            };
            let _ = writeln!(
                text,
                "      - {{ name: r{i}, priority: {}, direction: Outbound, access: {}, protocol: {protocol}, \
                 sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: {}/{}, \
                 destinationPortRange: {}-{} }}",
                100 + i,
                if rule.allow { "Allow" } else { "Deny" },
                rule.prefix,
                rule.length,
                rule.ports.0,
                rule.ports.1,
            );
        }
        text
    }

    /// A chain of nftables; what it allows goes back to who jumped there.
    pub fn nft_chain(&self, name: &str) -> String {
        let mut text = format!("  chain {name} {{\n");
        for rule in &self.0 {
            let protocol = match rule.protocol {
                "*" => "meta l4proto { tcp, udp } th".to_owned(),
                one => one.to_owned(),
            };
            let _ = writeln!(
                text,
                "    ip daddr {}/{} {protocol} dport {}-{} {}",
                rule.prefix,
                rule.length,
                rule.ports.0,
                rule.ports.1,
                if rule.allow { "return" } else { "drop" },
            );
        }
        text + "  }\n"
    }

    /// The same for `iptables-restore`.
    pub fn iptables_chain(&self, name: &str) -> String {
        let mut text = String::new();
        for rule in &self.0 {
            let protocols: &[&str] = if rule.protocol == "*" { &["tcp", "udp"] } else { &[rule.protocol] };
            for protocol in protocols {
                let _ = writeln!(
                    text,
                    "-A {name} -d {}/{} -p {protocol} --dport {}:{} -j {}",
                    rule.prefix,
                    rule.length,
                    rule.ports.0,
                    rule.ports.1,
                    if rule.allow { "RETURN" } else { "DROP" },
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_rule_is_about_the_benchs_packets() {
        let rules = Rules::new(MOST, 1, Fate::Denied).0;
        assert_eq!(rules.len(), MOST);
        let holds = |rule: &Rule| {
            let mask = u32::MAX << (32 - rule.length);
            u32::from(rule.prefix) == u32::from(DESTINATION) & mask
        };
        assert_eq!(rules.iter().position(holds), Some(MOST - 1));
        assert!(!rules[MOST - 1].allow);
        assert!(rules.iter().all(|rule| rule.ports.0 <= rule.ports.1));
    }

    #[test]
    fn everybody_gets_as_many_rules() {
        let rules = Rules::new(1000, 2, Fate::Allowed);
        assert_eq!(rules.group("nic").matches("priority:").count(), 1000);
        assert_eq!(rules.nft_chain("nic").matches("ip daddr").count(), 1000);
        // iptables has no rule about two protocols with ports.
        assert_eq!(rules.iptables_chain("nic").matches("-A nic").count(), 1001);
    }
}
