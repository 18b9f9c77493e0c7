//! `explain`: what would happen to the first packet of a flow, and why. The answer comes from the same engine that runs
//! in the kernel, over the tables of the policy in force; with `--live` the kernel's own programs are asked as well.

mod arrival;
mod ends;
mod engine_run;
mod environment;
mod flow;
mod live;
mod packet;
mod route;
mod stages;
mod text;
mod trace;
mod translation;
mod way_out;
mod words;

use std::net::IpAddr;

use portcullis_common::engine::Context;
use portcullis_common::engine::host::HostEnv;
use portcullis_common::env::Env as _;
use portcullis_common::layout::{HOP_FLAG_RESOLVED, NEXT_HOP_HOST};
use serde::{Deserialize, Serialize};

use self::ends::{Ends, Sender, ends};
use self::engine_run::{Said, come_back, run};
use self::flow::{LiveFlows, live_flows};
use self::stages::{Back, Told};
use crate::api::{Failure, Protocol};
use crate::compile::Registry;
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::flows::protocol_name;

pub use arrival::Arrival;
pub use live::{HookAnswer, LiveAnswer};
pub use stages::Stage;
pub use trace::{GroupAnswer, Tried};
pub use translation::Translation;
pub use way_out::{PortsLeft, WayOut};

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    /// A guest's name, `host`, or an address; perhaps with a port: `vm1`, `10.0.1.4:5000`, `[fd00::4]:5000`.
    pub from: String,
    /// The same; with a port for TCP and UDP.
    pub to: String,
    #[serde(default)]
    pub protocol: Protocol,
    /// Some port, if it is left out.
    #[serde(default)]
    pub from_port: Option<u16>,
    /// Between names: of IPv6.
    #[serde(default)]
    pub ipv6: bool,
    /// Ask the kernel's programs, too.
    #[serde(default)]
    pub live: bool,
}

/// What would happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// As `flows` shows it: `tcp`, `icmp6`, `132`.
    pub protocol: String,
    /// The guest it is from (`vm1/ipconfig1`), `host` or `world`.
    pub from: String,
    pub source: IpAddr,
    /// The identifier of an echo request; 0 where the protocol has no ports.
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// The guest it reaches, `host` or `world`; empty if it reaches nobody.
    pub to: String,
    /// Device where it is met.
    pub device: String,
    /// `forward`, `host` (given to this host's own stack) or `drop`.
    pub verdict: String,
    /// The reason's label, as in `drops`.
    pub reason: String,
    pub description: String,
    /// The rule that decided, `web-nsg/Outbound/DenySmtp`; empty if no rule was asked.
    pub rule: String,
    /// What each stage made of it, up to the one that ended it; the verdict last.
    pub stages: Vec<Stage>,
    /// The rules before the groups and every group that was asked, in order, with every rule that was tried.
    pub groups: Vec<GroupAnswer>,
    /// How a guest leaves for the world; `null` for everything else.
    pub way_out: Option<WayOut>,
    /// How its addresses change; `null` unless it is forwarded.
    pub translation: Option<Translation>,
    pub next_hop: Option<HopAnswer>,
    /// Is there such a flow already? Then its packets pass by what was decided for the first of them.
    pub live_flow: bool,
    /// The rules that allowed those flows.
    pub live_flow_rules: Vec<String>,
    /// What the kernel says; `null` unless it was asked.
    pub live: Option<LiveAnswer>,
    pub notes: Vec<String>,
}

/// Where it goes next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HopAnswer {
    /// As in `status`.
    pub name: String,
    pub device: String,
    /// Is its hardware address known? If not, the kernel finds it out.
    pub resolved: bool,
}

/// Answers the question. With `live` the thread is bound to one processor for some tenths of a second.
pub fn explain(shared: &Shared, question: &Question) -> Result<Explanation, Failure> {
    let in_force = shared.in_force();
    let ends = ends(&in_force, question)?;
    let (env, source_mac) = environment::environment(shared, &in_force, &ends)?;
    let frame = packet::build(&packet::Contents {
        source_mac,
        destination_mac: environment::device_mac(&in_force, &ends),
        source: ends.source,
        source_port: ends.source_port,
        destination: ends.destination,
        destination_port: ends.destination_port,
        protocol: ends.protocol,
    });
    let from_host = matches!(ends.from, Sender::Host);
    let engine = run(&env, &frame, &ends, from_host);
    let registry = shared.registry().clone();
    let any_port = ends.source_port == ends::SOME_PORT && !names_port(question);
    let live = live_flows(shared, &in_force, &registry, &ends, any_port);
    // Whoever comes back in has left before.
    let out = engine.out.as_ref().unwrap_or(&engine.context);
    let way_out = way_out::way_out(shared, &in_force, &ends, out);
    let mut explanation = told(&in_force, &registry, &ends, &env, &engine, way_out, &live);
    explanation.notes.extend(notes(question, &ends));
    if question.live {
        let heard = live::ask(shared, &in_force, &ends, &frame)?;
        // Once more: a flow that began or ended while the programs were loaded is none of their fault.
        let live = live_flows(shared, &in_force, &registry, &ends, any_port);
        explanation.live = Some(live::answer(&in_force, &registry, heard, &explanation, &live, from_host));
    }
    Ok(explanation)
}

/// The explanation, as far as the engine alone can give it.
fn told(
    in_force: &InForce,
    registry: &Registry,
    ends: &Ends<'_>,
    env: &HostEnv,
    said: &Said,
    way_out: Option<WayOut>,
    live: &LiveFlows,
) -> Explanation {
    let Said { verdict, reason, context, out } = said;
    let back = out.as_ref().map(|out| (out, come_back(ends, out)));
    let (groups, groups_out) = match &back {
        None => (trace::groups(in_force, ends, context), Vec::new()),
        Some((out, again)) => (trace::groups(in_force, again, context), trace::groups(in_force, ends, out)),
    };
    let all_groups: Vec<GroupAnswer> = groups_out.iter().chain(&groups).cloned().collect();
    let mut notes = Vec::new();
    if let Ok(hits) = env.rule_hits.lock() {
        notes.extend(trace::disagreement(in_force, registry, &hits, &all_groups));
    }
    let hop = (*verdict != "drop").then(|| env.next_hop(u32::from(context.egress))).flatten();
    let next_hop = hop.filter(|_| context.egress > NEXT_HOP_HOST).map(|hop| {
        // SAFETY: the environment is ours alone and keeps its next hops where they are.
        let hop = unsafe { *hop };
        HopAnswer {
            name: registry.next_hop_key(context.egress).unwrap_or("?").to_owned(),
            device: in_force.device_name(hop.ifindex),
            resolved: hop.flags & HOP_FLAG_RESOLVED != 0,
        }
    });
    let way = way_out.as_ref();
    let forward = *verdict == "forward";
    let last = back.as_ref().map_or(ends, |(_, again)| again);
    let translation = forward.then(|| translation::translation(in_force, last, context, way));
    let to = receiver(in_force, context, verdict);
    let back = back.as_ref().map(|(out, again)| Back {
        context: out,
        ends: again,
        groups: &groups_out,
        translation: translation::translation(in_force, ends, out, way),
    });
    let device = ends.missing_device.clone().unwrap_or_else(|| in_force.device_name(ends.ifindex));
    let stages = stages::stages(&Told {
        in_force,
        registry,
        ends,
        context,
        reason: *reason,
        verdict,
        device: &device,
        groups: &groups,
        back: back.as_ref(),
        way_out: way,
        translation: translation.as_ref(),
        to: &to,
        next_hop: next_hop.as_ref(),
        live,
    });
    let translation = match (translation, back) {
        (Some(inbound), Some(back)) => Some(back.translation.and_back(inbound)),
        (translation, _) => translation,
    };
    Explanation {
        protocol: protocol_name(ends.protocol),
        from: match &ends.from {
            Sender::Guest(guest) => guest.name.to_owned(),
            Sender::Host => "host".to_owned(),
            Sender::World => "world".to_owned(),
        },
        source: ends.source,
        source_port: ends.source_port,
        destination: ends.destination,
        destination_port: ends.destination_port,
        to,
        device,
        verdict: (*verdict).to_owned(),
        reason: reason.label().to_owned(),
        description: reason.description().trim().to_owned(),
        rule: rule_text(in_force, registry, context.rule),
        stages,
        groups: all_groups,
        way_out,
        translation,
        next_hop,
        live_flow: live.any,
        live_flow_rules: live.rules.clone(),
        live: None,
        notes,
    }
}

fn receiver(in_force: &InForce, context: &Context, verdict: &str) -> String {
    // Before the receiver is looked for, the context has 0 there, which is a guest's number.
    let guest = (context.way != 0).then(|| in_force.guest(context.to as usize)).flatten();
    match (verdict, guest) {
        // Also of a packet that is dropped: it was on its way there.
        (_, Some(guest)) => guest.name.to_owned(),
        ("host", None) => "host".to_owned(),
        ("forward", None) => "world".to_owned(),
        _ => String::new(),
    }
}

/// Does the question name the sender's port?
fn names_port(question: &Question) -> bool {
    question.from_port.is_some() || words::read(&question.from).is_ok_and(|(_, port)| port.is_some())
}

fn notes(question: &Question, ends: &Ends<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(device) = &ends.missing_device {
        notes.push(format!("device {device} does not exist yet; this is what will happen once it does"));
    }
    if question.protocol.has_ports() && !names_port(question) {
        notes.push(format!("asked with source port {}; --from-port asks with another", ends::SOME_PORT));
    }
    notes
}

#[cfg(test)]
impl Explanation {
    /// An explanation to be changed by a test.
    fn example() -> Self {
        Self {
            protocol: "tcp".into(),
            from: "vm1/v4".into(),
            source: [10, 0, 0, 4].into(),
            source_port: 40_000,
            destination: [198, 51, 100, 1].into(),
            destination_port: 443,
            to: "world".into(),
            device: "tap-vm1".into(),
            verdict: "forward".into(),
            reason: "new_flow".into(),
            description: "x".into(),
            rule: String::new(),
            stages: Vec::new(),
            groups: Vec::new(),
            way_out: None,
            translation: None,
            next_hop: None,
            live_flow: false,
            live_flow_rules: Vec::new(),
            live: None,
            notes: Vec::new(),
        }
    }
}
