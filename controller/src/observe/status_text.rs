//! `status` for people.

use std::fmt::Write as _;
use std::time::Duration;

use super::Status;
use crate::cli::table::Table;
use crate::observe::balancing::BackendState;
use crate::observe::time::{bytes, span};

impl Status {
    /// For people: what is wrong first, then what is.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if let Some(error) = &self.last_error {
            let _ = writeln!(text, "ERROR since {}: {}", error.at, error.message);
            if let Some(details) = &error.details {
                text.push_str(details);
            }
            text.push('\n');
        }
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line(
            "portcullis",
            format!(
                "{}, process {}, up {}",
                self.version,
                self.pid,
                span(Duration::from_secs(self.uptime_seconds))
            ),
        );
        line(
            "policy",
            format!("{}, generation {}, since {}", self.policy_file, self.generation, self.applied_at),
        );
        for (name, flows) in [("flows", &self.flows), ("flows IPv6", &self.flows_v6)] {
            line(
                name,
                format!(
                    "{} live, made for {} ({:.1} % full)",
                    flows.live, flows.capacity, flows.fill_percent
                ),
            );
        }
        line(
            "memory",
            format!(
                "policy {}, flow tables {}, daemon {}",
                bytes(self.memory.policy_bytes),
                bytes(self.memory.flow_table_bytes),
                bytes(self.memory.resident_bytes)
            ),
        );
        if let Some(taken) = &self.older.before.taken_over {
            line("first start", format!("{taken}; {} adopted", self.older.adopted));
        }
        if let Some(migrated) = &self.older.before.migrated {
            line("upgrade", migrated.to_string());
        }
        let lost: u64 = self.lost.iter().map(|lost| lost.packets).sum();
        line("lost", format!("{lost} packets by the kernel after a redirect"));
        for firewall in &self.firewalls {
            line(
                "warning",
                format!("{} is here ({}); forwarded packets bypass it", firewall.name, firewall.evidence),
            );
        }
        for warning in &self.warnings {
            line("warning", warning.trim_end().replace('\n', "; "));
        }
        for event in &self.health_events {
            line("health", event.text.clone());
        }
        for device in &self.missing_devices {
            line("missing", format!("device {device}: its guests are served as soon as it exists"));
        }
        text.push('\n');
        text.push_str(&self.device_table());
        text.push('\n');
        text.push_str(&self.hop_table());
        if !self.balanced.is_empty() {
            text.push('\n');
            text.push_str(&self.backend_table());
        }
        text
    }

    fn device_table(&self) -> String {
        let mut table = Table::new(&["DEVICE", "ROLE", "HOOK", "ATTACHED", "WHY"]);
        for device in &self.devices {
            let attached: Vec<String> = device
                .programs
                .iter()
                .map(|program| {
                    let name = if program.program.is_empty() { &program.kind } else { &program.program };
                    let runs = program.run_count.map_or_else(String::new, |runs| format!(" x{runs}"));
                    format!("{}:{name}#{}{runs}", program.hook, program.program_id)
                })
                .collect();
            let attached = if attached.is_empty() { "NOTHING".to_owned() } else { attached.join(" ") };
            table.row([
                device.name.clone(),
                device.role.clone(),
                device.hook.clone(),
                attached,
                device.why.clone(),
            ]);
        }
        table.render("no devices")
    }

    fn backend_table(&self) -> String {
        let mut table = Table::new(&["RULE", "PROBE", "BACKEND", "STATE", "SINCE", "WHY"]);
        for rule in &self.balanced {
            for backend in &rule.backends {
                let state = match backend.state {
                    BackendState::Up => "up",
                    BackendState::Down => "DOWN",
                    BackendState::NotProbed => "not probed",
                };
                table.row([
                    rule.rule.clone(),
                    rule.probe.clone().unwrap_or_default(),
                    backend.name.clone(),
                    state.to_owned(),
                    backend.since.clone().unwrap_or_default(),
                    backend.why.clone().unwrap_or_default(),
                ]);
            }
        }
        table.render("no backends")
    }

    fn hop_table(&self) -> String {
        let mut table = Table::new(&["NEXT HOP", "DEVICE", "ADDRESS", "MAC", "FLOWS", "REFUSED", "STATE"]);
        for hop in self.next_hops.iter().filter(|hop| hop.kind != "host") {
            let state = match (hop.resolved, hop.pinned, hop.fresh_seconds) {
                (_, true, _) => "pinned by the policy".to_owned(),
                (true, _, Some(fresh)) => format!("fresh for {fresh:.0}s"),
                (true, _, None) => "learned".to_owned(),
                (false, ..) if hop.kind == "guest" => "not heard of yet".to_owned(),
                (false, ..) if hop.address.is_unspecified() => {
                    "the kernel resolves each destination".to_owned()
                }
                (false, ..) => "unresolved".to_owned(),
            };
            let address = if hop.address.is_unspecified() { String::new() } else { hop.address.to_string() };
            table.row([
                hop.name.clone(),
                hop.device.clone(),
                address,
                hop.mac.clone().unwrap_or_default(),
                hop.flows
                    .as_ref()
                    .map_or_else(String::new, |flows| format!("{} of {}", flows.held, flows.most)),
                hop.flows.as_ref().map_or_else(String::new, |flows| flows.refused.to_string()),
                state,
            ]);
        }
        table.render("no next hops")
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;

    #[test]
    fn what_is_wrong_stands_first_and_every_device_and_router_is_listed() {
        let status = Status {
            version: "0.1.0".into(),
            pid: 7,
            started_at: "2026-11-22T05:33:50Z".into(),
            uptime_seconds: 61,
            policy_file: "/etc/portcullis/policy.yaml".into(),
            generation: 3,
            applied_at: "2026-11-22T05:33:50Z".into(),
            adopted: false,
            older: Older::default(),
            last_error: Some(LastError { at: "now".into(), message: "it is broken".into(), details: None }),
            devices: vec![Device {
                name: "pc-vm1".into(),
                ifindex: 3,
                role: "guest".into(),
                hook: "tc".into(),
                why: "a veth".into(),
                warning: None,
                xdp_redirect: false,
                programs: Vec::new(),
            }],
            missing_devices: vec!["pc-vm2".into()],
            next_hops: vec![Hop {
                index: 2,
                name: "world:up/192.0.2.1".into(),
                kind: "world".into(),
                device: "up".into(),
                address: std::net::IpAddr::from([192, 0, 2, 1]),
                mac: None,
                resolved: false,
                pinned: false,
                xdp: false,
                fresh_seconds: None,
                flows: None,
            }],
            routes: 1,
            flows: FlowUse { live: 1, capacity: 2, fill_percent: 50.0, slots: 8 },
            flows_v6: FlowUse { live: 3, capacity: 4, fill_percent: 75.0, slots: 16 },
            reaper: ReaperReport::default(),
            balanced: Vec::new(),
            lost: vec![Lost { at: "xdp_redirect_err".into(), packets: 4 }],
            firewalls: Vec::new(),
            warnings: Vec::new(),
            health_events: Vec::new(),
            health_looks: 0,
            memory: Memory { resident_bytes: 0, policy_bytes: 0, flow_table_bytes: 0 },
            programs: Vec::new(),
        };
        let text = status.text();
        assert!(text.starts_with("ERROR since now: it is broken"), "{text}");
        for part in [
            "up 1m 1s",
            "1 live, made for 2 (50.0 % full)",
            "flows IPv6  3 live, made for 4 (75.0 % full)",
            "4 packets by the kernel",
            "device pc-vm2",
            "NOTHING",
            "world:up/192.0.2.1",
            "unresolved",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["flowsIPv6"]["fillPercent"], 75.0);
        assert_eq!(json["nextHops"][0]["freshSeconds"], serde_json::Value::Null);
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), status);
    }
}
