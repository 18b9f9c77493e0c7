//! The lab of the quickstart: its guests, the internet, and the gateway with the policy in force.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use portcullis::api::{Request, client};
use portcullis::explain::{Explanation, Question};
use portcullis::flows::SnatUse;
use portcullis::observe::{Drops, RuleHits, Status};
use serde::de::DeserializeOwned;

use super::plan::Party;
use crate::edge::binary;
use crate::lab::{BpfFs, Daemon, DaemonSpec, GuestSpec, Namespace, Topology, TopologySpec};
use crate::stop;

/// Ready within this, or it has failed.
const READY: Duration = Duration::from_secs(30);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The running lab. Dropped, everything is gone.
pub(super) struct Stand {
    // Dropped in this order: the daemon before the namespaces it is in.
    pub daemon: Daemon,
    pub topology: Topology,
    _bpffs: BpfFs,
}

/// Every counter of the daemon.
#[derive(Debug, Clone, Default)]
pub(super) struct Counters {
    /// Hits by `group/Direction/rule`.
    pub rules: BTreeMap<String, u64>,
    /// Packets by reason.
    pub reasons: BTreeMap<String, u64>,
}

impl Stand {
    /// Builds everything, saying so.
    ///
    /// # Errors
    /// Also if a signal asked to stop.
    pub fn build(policy: &str, name: &str) -> anyhow::Result<Self> {
        let portcullis = binary()?;
        say("making network namespaces: gateway, internet, vm1, vm2, vm3");
        let topology = Topology::build(&topology())?;
        stop::check()?;
        say(&format!("starting portcullis with {name}"));
        let bpffs = BpfFs::mount()?;
        let file = bpffs.scratch().write("policy.yaml", policy)?;
        let mut daemon = Daemon::spawn(topology.gateway(), &DaemonSpec::beside(&bpffs, &portcullis, &file))?;
        let ready = daemon.wait_ready(READY);
        stop::check()?;
        ready?;
        Ok(Stand { daemon, topology, _bpffs: bpffs })
    }

    /// Where somebody lives.
    pub fn namespace(&self, party: Party) -> &Namespace {
        match party {
            Party::Guest(name) => self.topology.guest(name),
            Party::Internet => self.topology.internet(),
        }
    }

    /// Asks the daemon.
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> anyhow::Result<T> {
        let answer = client::ask_within(&self.daemon.spec().socket, request, PATIENCE)?;
        let answer = answer.map_err(|failure| anyhow!("the daemon refuses: {}", failure.message))?;
        serde_json::from_value(answer).context("the daemon's answer is not what this version expects")
    }

    pub fn explain(&self, question: Question) -> anyhow::Result<Explanation> {
        self.ask(&Request::Explain(question))
    }

    pub fn snat(&self) -> anyhow::Result<SnatUse> {
        self.ask(&Request::Snat { guest: None, frontend: None })
    }

    pub fn drops(&self) -> anyhow::Result<Drops> {
        self.ask(&Request::Drops { all: false })
    }

    pub fn rules(&self) -> anyhow::Result<RuleHits> {
        self.ask(&Request::Rules { group: None, shadowed: false })
    }

    pub fn status(&self) -> anyhow::Result<Status> {
        self.ask(&Request::Status)
    }

    /// Reads every counter.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        let rules = self.rules()?.rules;
        let reasons = self.drops()?.reasons;
        Ok(Counters {
            rules: rules
                .into_iter()
                .map(|r| (format!("{}/{}/{}", r.group, r.direction, r.name), r.hits))
                .collect(),
            reasons: reasons.into_iter().map(|r| (r.reason, r.packets)).collect(),
        })
    }

    /// Does this guest own this port of this frontend?
    pub fn owns(&self, guest: &str, address: Ipv4Addr, port: u16) -> anyhow::Result<bool> {
        let guests = self.snat()?.guests;
        let mine = guests.iter().filter(|g| g.guest.split('/').next() == Some(guest));
        let mut ranges = mine.flat_map(|g| &g.ranges);
        Ok(ranges.any(|r| r.address == std::net::IpAddr::V4(address) && (r.first..=r.last).contains(&port)))
    }
}

impl Counters {
    /// By how much a rule's hits grew since `before`.
    pub fn rule_since(&self, before: &Counters, rule: &str) -> u64 {
        grown(&self.rules, &before.rules, rule)
    }

    /// By how much a reason's packets grew since `before`.
    pub fn reason_since(&self, before: &Counters, reason: &str) -> u64 {
        grown(&self.reasons, &before.reasons, reason)
    }
}

fn grown(now: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>, key: &str) -> u64 {
    let read = |counts: &BTreeMap<String, u64>| counts.get(key).copied().unwrap_or(0);
    read(now).saturating_sub(read(before))
}

/// What `examples/quickstart.yaml` is about.
fn topology() -> TopologySpec {
    let guest = |number: u8, address: [u8; 4], gateway: [u8; 4]| GuestSpec {
        address: address.into(),
        gateway: gateway.into(),
        ..GuestSpec::numbered(number, "pc-vm")
    };
    let mut spec = TopologySpec::clean_veth(0);
    spec.guests = vec![
        guest(1, [10, 0, 1, 4], [10, 0, 1, 1]),
        guest(2, [10, 0, 1, 5], [10, 0, 1, 1]),
        guest(3, [10, 0, 2, 4], [10, 0, 2, 1]),
    ];
    spec
}

/// A line of progress. Nobody reading it is no reason to stop.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
