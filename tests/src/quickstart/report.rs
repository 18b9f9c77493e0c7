//! What became of everything, for people and for programs.

use std::fmt;

use portcullis::cli::table::Table;
use serde::Serialize;

use super::plan::{CLIENT, Protocol, SERVER, VM1, VM2, VM3};
use super::run::{Outcome, Seen};
use super::stand::Stand;
use crate::lab::Sniffer;

/// The whole run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub policy: String,
    pub devices: Vec<Device>,
    pub steps: Vec<Outcome>,
    pub uplink: Uplink,
    pub ok: bool,
}

/// A device of the gateway and where it is met.
#[derive(Debug, Serialize)]
pub(super) struct Device {
    pub name: String,
    /// `xdp` or `tc`
    pub hook: String,
    pub why: String,
}

/// What passed on the wire to the internet meanwhile.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Uplink {
    pub frames: usize,
    /// Frames with a guest's private address as source; none may.
    pub private_sources: usize,
    /// Frames whose checksum is wrong; none may be.
    pub bad_checksums: usize,
    /// Frames that passed unseen.
    pub missed: u64,
}

impl Uplink {
    fn ok(&self) -> bool {
        self.private_sources == 0 && self.bad_checksums == 0 && self.missed == 0 && self.frames > 0
    }
}

impl Report {
    pub fn new(stand: &Stand, policy: String, steps: Vec<Outcome>, wire: &Sniffer) -> anyhow::Result<Self> {
        let devices = stand.status()?.devices.into_iter();
        let devices = devices.map(|d| Device { name: d.name, hook: d.hook, why: d.why }).collect();
        let uplink = Uplink {
            frames: wire.frames().len(),
            private_sources: wire.private_sources(&["10.0.0.0/16".parse()?]).len(),
            bad_checksums: wire.bad_checksums().len(),
            missed: wire.lost(),
        };
        let mut report = Report { policy, devices, steps, uplink, ok: false };
        report.ok = report.wrong() == 0;
        Ok(report)
    }

    /// Steps, and the look at the wire.
    pub fn checks(&self) -> usize {
        self.steps.len() + 1
    }

    /// How many of them are wrong.
    pub fn wrong(&self) -> usize {
        let steps = self.steps.iter().filter(|step| !step.problems.is_empty()).count();
        steps + usize::from(!self.uplink.ok())
    }

    /// Devices by hook, with why it was chosen for the first of them.
    fn hooks(&self) -> Vec<(&str, &str, Vec<&str>)> {
        let mut hooks: Vec<(&str, &str, Vec<&str>)> = Vec::new();
        for device in &self.devices {
            match hooks.iter_mut().find(|(hook, ..)| *hook == device.hook) {
                Some((.., devices)) => devices.push(&device.name),
                // Behind the semicolon stands what else one could ask for.
                None => {
                    let why = device.why.split(';').next().unwrap_or_default();
                    hooks.push((&device.hook, why, vec![&device.name]));
                }
            }
        }
        hooks
    }

    fn table(&self) -> Table {
        let mut table =
            Table::new(&["FROM", "PROTO", "TO", "ARRIVED FROM", "DECIDED BY", "COUNTED>", "RESULT"]);
        for step in &self.steps {
            let port = |port: u16| if port == 0 { String::new() } else { format!(":{port}") };
            let name =
                if step.spoofed { format!("{} as {}", step.from, step.source) } else { step.from.to_owned() };
            table.row([
                name + &port(step.source_port),
                protocol(step.protocol).to_owned(),
                format!("{}{}", step.destination, port(step.destination_port)),
                match step.arrived {
                    None => "nothing".to_owned(),
                    Some(Seen { address, port }) if step.protocol == Protocol::Icmp => {
                        format!("{address} id {port}")
                    }
                    Some(Seen { address, port }) => format!("{address}:{port}"),
                },
                step.decided_by.clone(),
                format!("+{}", step.counted),
                if step.problems.is_empty() { "OK" } else { "WRONG" }.to_owned(),
            ]);
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.policy)?;
        writeln!(f, "  vm1 {VM1}, vm2 {VM2}, vm3 {VM3}, internet {CLIENT} and {SERVER}")?;
        for (hook, why, devices) in self.hooks() {
            writeln!(f, "  {} on {hook}: {why}", devices.join(", "))?;
        }
        writeln!(f)?;
        f.write_str(&self.table().render("nothing was sent"))?;
        writeln!(f)?;
        for step in self.steps.iter().filter(|step| !step.problems.is_empty()) {
            let to = format!("{}:{}", step.destination, step.destination_port);
            writeln!(f, "WRONG  {} {} {to} ({})", step.from, protocol(step.protocol), step.what)?;
            for problem in &step.problems {
                writeln!(f, "       {problem}")?;
            }
        }
        let Uplink { frames, private_sources, bad_checksums, missed } = &self.uplink;
        writeln!(
            f,
            "On the uplink {frames} frames: {private_sources} with a private source, {bad_checksums} with a wrong \
             checksum{}.",
            if *missed == 0 { String::new() } else { format!(", {missed} unseen") }
        )?;
        let right = self.checks() - self.wrong();
        writeln!(f, "{right} of {} checks are as the policy says.", self.checks())
    }
}

pub(super) fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Icmp => "ping",
    }
}
