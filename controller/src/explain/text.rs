//! An explanation for people.

use std::fmt::Write as _;

use super::trace::{GroupAnswer, Tried};
use super::{Explanation, HopAnswer, LiveAnswer};
use crate::cli::table::Table;
use crate::flows::end;

/// For people.
pub fn verdict(verdict: &str) -> &'static str {
    match verdict {
        "forward" => "forwarded",
        "host" => "given to this host",
        _ => "DROPPED",
    }
}

/// One line about a group.
pub fn group(group: &GroupAnswer) -> String {
    let tried = match group.tried.len() {
        1 => "1 rule tried".to_owned(),
        n => format!("{n} rules tried"),
    };
    let said = if group.rule.is_empty() {
        "no rule matches".to_owned()
    } else {
        format!("{} by {}/{}", group.access, group.group, group.rule)
    };
    if group.level == "platform" {
        return format!("{said} ({tried}), before the groups of {}", group.guest);
    }
    let only = group.only_tag.as_ref().map_or_else(String::new, |tag| format!(", only those for {tag}"));
    format!("{said} ({tried}{only}), {} {}, {}", place(group), group.guest, group.direction)
}

fn place(group: &GroupAnswer) -> &'static str {
    match group.level.as_str() {
        "subnet" => "on the subnet of",
        "platform" => "before the groups of",
        _ => "on the network interface of",
    }
}

impl HopAnswer {
    /// For people.
    pub fn text(&self) -> String {
        let known = if self.resolved { "" } else { ", hardware address asked of the kernel" };
        format!("{} on {}{known}", self.name, self.device)
    }
}

impl LiveAnswer {
    fn text(&self) -> String {
        let hooks: Vec<String> =
            self.hooks.iter().map(|hook| format!("{}: {}", hook.hook, hook.action)).collect();
        let rule = if self.rule.is_empty() { String::new() } else { format!(" by {}", self.rule) };
        let becomes = self.becomes.as_ref().map_or_else(String::new, |after| format!(", leaves as {after}"));
        let hooks = hooks.join(", ");
        format!("{} ({}){rule}{becomes} [{hooks}]", verdict(&self.verdict), self.reason)
    }
}

impl Explanation {
    /// For people: the verdict first, then how it came about.
    pub fn text(&self) -> String {
        let mut text = self.head();
        let groups: Vec<&GroupAnswer> = self.groups.iter().filter(|group| !group.rule.is_empty()).collect();
        if !groups.is_empty() {
            let mut table =
                Table::new(&["GUEST", "AT", "GROUP", "DIRECTION", "PRIORITY>", "RULE", "ACCESS", "TRIED>"]);
            for group in groups {
                let at = match group.level.as_str() {
                    "subnet" => "subnet",
                    "platform" => "before the groups",
                    _ => "network interface",
                };
                table.row([
                    group.guest.clone(),
                    at.to_owned(),
                    group.group.clone(),
                    group.direction.clone(),
                    group.priority.to_string(),
                    group.rule.clone(),
                    group.access.clone(),
                    group.tried.len().to_string(),
                ]);
            }
            text += "\nRules that matched, in the order they were asked (--all-rules shows every rule that was tried):\n";
            text += &table.render("");
        }
        text
    }

    /// The same with every rule that was tried.
    pub fn text_with_rules(&self) -> String {
        let mut text = self.head();
        for group in &self.groups {
            let _ =
                writeln!(text, "\n{} {} {}, {}:", group.group, place(group), group.guest, group.direction);
            let mut table = Table::new(&["PRIORITY>", "RULE", "ACCESS", "DOES NOT MATCH"]);
            for tried in &group.tried {
                let (priority, rule, access) = (tried.priority, tried.rule.clone(), tried.access.clone());
                table.row([priority.to_string(), rule, access, tried.misses()]);
            }
            text += &table.render("no rule was tried");
        }
        text
    }

    fn head(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line("verdict", &format!("{} ({}): {}", verdict(&self.verdict), self.reason, self.description));
        let (what, ports) = match self.protocol.as_str() {
            "tcp" => ("TCP SYN".to_owned(), true),
            "udp" => ("UDP".to_owned(), true),
            "icmp" => ("ICMP echo request".to_owned(), false),
            "icmp6" => ("ICMPv6 echo request".to_owned(), false),
            other => (format!("protocol {other}"), false),
        };
        let end = |address, port| if ports { end(address, port) } else { end(address, 0) };
        let from = end(self.source, self.source_port);
        let to = end(self.destination, self.destination_port);
        line("packet", &format!("{what} {from} -> {to}, met on {}", self.device));
        line("from", &self.from);
        if !self.to.is_empty() {
            line("to", &self.to);
        }
        if !self.rule.is_empty() {
            line("rule", &self.rule);
        }
        if let Some(translation) = self.translation.as_ref().filter(|t| t.method != "direct") {
            let from = end(translation.new_source, translation.new_source_port);
            let to = end(translation.new_destination, translation.new_destination_port);
            line("becomes", &format!("{from} -> {to}"));
        }
        if let Some(way) = &self.way_out {
            line("leaves by", &way.text);
            for advice in &way.advice {
                line("advice", advice);
            }
        }
        match (self.live_flow, self.live_flow_rules.as_slice()) {
            (false, _) => line("live flow", "none"),
            (true, []) => line("live flow", "yes: its packets pass without asking a rule"),
            (true, rules) => {
                line("live flow", &format!("yes, allowed by {}: its packets pass", rules.join(" and by ")))
            }
        }
        if let Some(live) = &self.live {
            line("kernel", &live.text());
            let word = if live.agrees { "agrees" } else { "DISAGREES" };
            line("", &format!("{word}: {}", live.comparison));
        }
        for note in &self.notes {
            line("note", note);
        }
        text += "\nStage by stage:\n";
        for stage in self.stages.iter().filter(|stage| stage.stage != "verdict") {
            let name = match stage.stage.as_str() {
                "platformRules" => "platform",
                "nextHop" => "next hop",
                "wayOut" => "way out",
                other => other,
            };
            let end = if stage.ended { "  <- ends here" } else { "" };
            let _ = writeln!(text, "  {name:<12}{}{end}", stage.text);
        }
        text
    }
}

impl Tried {
    /// The fields that do not match; empty if it is the rule that decided.
    fn misses(&self) -> String {
        let fields = &self.fields;
        let all = [
            (fields.protocol_matched, "protocol"),
            (fields.source_matched, "source"),
            (fields.source_port_matched, "source port"),
            (fields.destination_matched, "destination"),
            (fields.destination_port_matched, "destination port"),
        ];
        let missed: Vec<&str> = all.iter().filter(|(matched, _)| !matched).map(|(_, name)| *name).collect();
        if missed.is_empty() { "(matches)".to_owned() } else { missed.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::trace::FieldsMatched;

    fn tried(rule: &str, port: bool) -> Tried {
        let fields = FieldsMatched {
            protocol_matched: true,
            source_matched: true,
            source_port_matched: true,
            destination_matched: true,
            destination_port_matched: port,
        };
        Tried { rule: rule.into(), priority: 100, access: "Allow".into(), fields }
    }

    #[test]
    fn the_short_table_has_the_rule_that_matched_and_the_long_one_what_the_others_lack() {
        let mut explanation = Explanation::example();
        explanation.groups.push(GroupAnswer {
            guest: "vm1/v4".into(),
            level: "subnet".into(),
            group: "web".into(),
            direction: "Outbound".into(),
            only_tag: None,
            rule: "AllowWeb".into(),
            priority: 200,
            default_rule: false,
            access: "Allow".into(),
            tried: vec![tried("AllowSsh", false), tried("AllowWeb", true)],
        });
        let short = explanation.text();
        assert!(short.contains("AllowWeb  Allow       2") && !short.contains("AllowSsh"), "{short}");
        let long = explanation.text_with_rules();
        assert!(long.contains("AllowSsh  Allow   destination port"), "{long}");
        assert!(long.contains("AllowWeb  Allow   (matches)"), "{long}");
    }

    #[test]
    fn json_has_every_rule_that_was_tried_with_its_five_fields() {
        let json = serde_json::to_value(tried("AllowSsh", false)).unwrap();
        assert_eq!(
            (&json["destinationPortMatched"], &json["protocolMatched"]),
            (&false.into(), &true.into())
        );
        assert_eq!(serde_json::from_value::<Tried>(json).unwrap(), tried("AllowSsh", false));
    }
}
