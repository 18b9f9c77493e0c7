//! `explain`: what would happen to the first packet of a flow, and why. The answer comes from the same engine that runs
//! in the kernel, over the tables of the policy in force.

mod ends;
mod environment;
mod packet;
mod text;
mod trace;

use std::net::Ipv4Addr;

use portcullis_common::Reason;
use portcullis_common::engine::{
    Context, Hook, Verdict, WAY_DIRECT, WAY_INSTANCE_IN, WAY_INSTANCE_OUT, WAY_SNAT,
};
use portcullis_common::env::Env as _;
use portcullis_common::layout::{HOP_FLAG_RESOLVED, NEXT_HOP_HOST};
use serde::{Deserialize, Serialize};

use self::ends::{End, Ends, ends};
use crate::api::{Failure, Protocol};
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::datapath::now_tick;
use crate::flows::{address, live};

pub use trace::GroupAnswer;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    /// A guest's name, `host`, or an address.
    pub from: String,
    /// The same, with a port.
    pub to: String,
    pub protocol: Protocol,
    /// Some port, if it is left out.
    pub from_port: Option<u16>,
}

/// What would happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub protocol: Protocol,
    /// The guest it is from (`vm1/ipconfig1`), `host` or `world`.
    pub from: String,
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub destination: Ipv4Addr,
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
    /// The rule that decided, `web-nsg/Outbound/DenySmtp`; empty if no group was asked.
    pub rule: String,
    /// Every group that was asked, in order.
    pub groups: Vec<GroupAnswer>,
    /// How its addresses change; `null` unless it is forwarded.
    pub translation: Option<Translation>,
    pub next_hop: Option<HopAnswer>,
    /// Is there such a flow already? Then its packets pass by what was decided for the first of them.
    pub live_flow: bool,
    /// The rules that allowed those flows.
    pub live_flow_rules: Vec<String>,
    pub notes: Vec<String>,
}

/// How addresses change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Translation {
    /// `direct` (not at all), `instance` (a public address of the guest's own) or `loadBalancer`.
    pub method: String,
    /// What the world sees; `null` for `direct`.
    pub public_address: Option<Ipv4Addr>,
    /// A port it might get, for `loadBalancer`.
    pub example_port: Option<u16>,
    /// `lb/web-frontend`, for `loadBalancer`.
    pub frontend: Option<String>,
    /// `lb/web-out`, for `loadBalancer`.
    pub outbound_rule: Option<String>,
    pub new_source: Ipv4Addr,
    pub new_source_port: u16,
    pub new_destination: Ipv4Addr,
    pub new_destination_port: u16,
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

/// Answers the question.
pub fn explain(shared: &Shared, question: &Question) -> Result<Explanation, Failure> {
    let in_force = shared.in_force();
    let ends = ends(&in_force, question)?;
    let (env, source_mac) = environment::environment(shared, &in_force, &ends)?;
    let frame = packet::build(&packet::Contents {
        source_mac,
        source: ends.source,
        source_port: ends.source_port,
        destination: ends.destination,
        destination_port: ends.destination_port,
        protocol: question.protocol,
    });
    let from_host = matches!(ends.from, End::Host);
    let (verdict, _, context) = env.packet(&frame, ends.ifindex, Hook::Tc, from_host);
    let counters = env.counters();
    let reason = counters.iter().find(|(reason, _)| reason.is_drop()).or(counters.first());
    let reason = reason.map_or(Reason::NotOurs, |(reason, _)| *reason);
    let verdict = match verdict {
        Verdict::Drop => "drop",
        Verdict::Redirect(_) | Verdict::Neighbour(..) | Verdict::Neighbour6(_) => "forward",
        Verdict::Pass | Verdict::Next(_) if from_host => "forward",
        Verdict::Pass | Verdict::Next(_) => "host",
    };
    let asked = env.rule_hits.lock().map_or(0, |hits| hits.values().map(|count| count.packets).sum::<u64>());
    let groups = trace::groups(&in_force, &context, asked as usize);
    let registry = shared.registry().clone();
    let hop = (verdict != "drop").then(|| env.next_hop(u32::from(context.egress))).flatten();
    let next_hop = hop.filter(|_| context.egress > NEXT_HOP_HOST).map(|hop| {
        // SAFETY: the environment is ours alone and keeps its next hops where they are.
        let hop = unsafe { *hop };
        HopAnswer {
            name: registry.next_hop_key(context.egress).unwrap_or("?").to_owned(),
            device: in_force.device_name(hop.ifindex),
            resolved: hop.flags & HOP_FLAG_RESOLVED != 0,
        }
    });
    let mut live_flow_rules = live_rules(shared, &in_force, question, &ends, &registry);
    let live_flow = !live_flow_rules.is_empty();
    live_flow_rules.retain(|rule| !rule.is_empty());
    Ok(Explanation {
        protocol: question.protocol,
        from: match &ends.from {
            End::Guest(guest) => guest.name.to_owned(),
            End::Host => "host".to_owned(),
            End::Address(_) => "world".to_owned(),
        },
        source: ends.source,
        source_port: ends.source_port,
        destination: ends.destination,
        destination_port: ends.destination_port,
        to: receiver(&in_force, &context, verdict),
        device: ends.missing_device.clone().unwrap_or_else(|| in_force.device_name(ends.ifindex)),
        verdict: verdict.to_owned(),
        reason: reason.label().to_owned(),
        description: reason.description().trim().to_owned(),
        rule: rule_text(&in_force, &registry, context.rule),
        groups,
        translation: (verdict == "forward").then(|| translation(&in_force, &ends, &context)),
        next_hop,
        live_flow,
        live_flow_rules,
        notes: notes(question, &ends),
    })
}

fn receiver(in_force: &InForce, context: &Context, verdict: &str) -> String {
    let guest = in_force.guest(context.to as usize).map(|guest| guest.name.to_owned());
    match (verdict, guest) {
        // Also of a packet that is dropped: it was on its way there.
        (_, Some(guest)) => guest,
        ("host", None) => "host".to_owned(),
        ("forward", None) => "world".to_owned(),
        _ => String::new(),
    }
}

fn translation(in_force: &InForce, ends: &Ends<'_>, context: &Context) -> Translation {
    let new = &context.new;
    let public = match context.way {
        WAY_SNAT | WAY_INSTANCE_OUT => Some(address(new.source)),
        WAY_INSTANCE_IN => Some(ends.destination),
        _ => None,
    };
    let snat = context.way == WAY_SNAT;
    let (frontend, outbound_rule) = if snat { names_of_snat(in_force, ends, public) } else { (None, None) };
    Translation {
        method: match context.way {
            WAY_DIRECT => "direct",
            WAY_SNAT => "loadBalancer",
            WAY_INSTANCE_IN | WAY_INSTANCE_OUT => "instance",
            _ => "none",
        }
        .to_owned(),
        public_address: public,
        example_port: snat.then_some(u16::from_be(new.source_port)),
        frontend,
        outbound_rule,
        new_source: address(new.source),
        new_source_port: u16::from_be(new.source_port),
        new_destination: address(new.destination),
        new_destination_port: u16::from_be(new.destination_port),
    }
}

/// The frontend with this address, and the outbound rule of the sender's pool.
fn names_of_snat(
    in_force: &InForce,
    ends: &Ends<'_>,
    public: Option<Ipv4Addr>,
) -> (Option<String>, Option<String>) {
    let network = &in_force.loaded.network;
    let End::Guest(guest) = &ends.from else { return (None, None) };
    for balancer in &network.load_balancers {
        for rule in &balancer.outbound_rules {
            if !balancer.pools[rule.pool].members.contains(&guest.place) {
                continue;
            }
            let frontend = rule.frontends.iter().map(|&f| &balancer.frontends[f]).find(|frontend| {
                public
                    .is_some_and(|public| network.public_addresses[frontend.public_address].address == public)
            });
            let frontend = frontend.map(|frontend| format!("{}/{}", balancer.name, frontend.name));
            return (frontend, Some(format!("{}/{}", balancer.name, rule.name)));
        }
    }
    (None, None)
}

/// The rules of live flows that this packet would belong to, each once; the text of "no rule" is empty.
fn live_rules(
    shared: &Shared,
    in_force: &InForce,
    question: &Question,
    ends: &Ends<'_>,
    registry: &crate::compile::Registry,
) -> Vec<String> {
    let mut rules = Vec::new();
    for pair in live(&shared.flows, now_tick()) {
        let key = &pair.forward.key;
        let same = address(key.source) == ends.source
            && address(key.destination) == ends.destination
            && key.network == ends.network
            && key.protocol == question.protocol.number()
            && u16::from_be(key.destination_port) == ends.destination_port
            && question.from_port.is_none_or(|port| u16::from_be(key.source_port) == port);
        if same {
            rules.push(rule_text(in_force, registry, pair.rule()));
        }
    }
    rules.sort_unstable();
    rules.dedup();
    rules
}

fn notes(question: &Question, ends: &Ends<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(device) = &ends.missing_device {
        notes.push(format!("device {device} does not exist yet; this is what will happen once it does"));
    }
    if question.from_port.is_none() && question.protocol != Protocol::Icmp {
        notes.push(format!("asked with source port {}; --from-port asks with another", ends::SOME_PORT));
    }
    notes
}
