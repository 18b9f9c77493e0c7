//! What each stage of the datapath made of the packet, in its order, up to the one that ended it. Told from what the engine
//! left in its context; the verdict and its reason are the engine's own.

use portcullis_common::Reason;
use portcullis_common::engine::Context;
use serde::{Deserialize, Serialize};

use super::ends::{Ends, Sender};
use super::flow::LiveFlows;
use super::route::route;
use super::trace::{GroupAnswer, is_host_access};
use super::translation::Translation;
use super::{HopAnswer, text};
use crate::compile::Registry;
use crate::daemon::InForce;

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `device`, `packet`, `flow`, `sender`, `route`, `platformRules`, `group` (once for each), `translation`, `nextHop`,
    /// `verdict`.
    pub stage: String,
    /// Did the packet end here?
    pub ended: bool,
    /// For people.
    pub text: String,
}

/// Where a packet can end, in the engine's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Packet,
    Sender,
    Route,
    PlatformRules,
    Groups,
    Translation,
    NextHop,
    /// Nowhere: it passed them all.
    Not,
}

fn end_of(reason: Reason, ends: &Ends<'_>, context: &Context) -> End {
    let world = matches!(ends.from, Sender::World);
    match reason {
        Reason::Spoofed => End::Sender,
        // From outside it is the source that may not come from there.
        Reason::Martian if world => End::Sender,
        Reason::DeniedByRule => End::Groups,
        Reason::DeniedByPlatform => End::PlatformRules,
        Reason::PlatformAddress if context.way != 0 => End::PlatformRules,
        Reason::NoOutboundMethod
        | Reason::NoPorts
        | Reason::NoRoute
        | Reason::SnatExhausted
        | Reason::SnatRefused
        | Reason::TableFull
        | Reason::Contended => End::Translation,
        Reason::TtlExpired | Reason::Unresolved => End::NextHop,
        // Chosen once the route is found; DHCP and what cannot be read end before anybody asks for one.
        _ if context.way != 0 => End::Not,
        Reason::ToHost | Reason::DhcpServer | Reason::Malformed | Reason::Broadcast => End::Packet,
        Reason::HostAccess if is_dhcp(ends) => End::Packet,
        _ => End::Route,
    }
}

fn is_dhcp(ends: &Ends<'_>) -> bool {
    ends.protocol == 17 && matches!((ends.source_port, ends.destination_port), (68, 67) | (546, 547))
}

/// Everything the stages are told from.
pub struct Told<'a> {
    pub in_force: &'a InForce,
    pub registry: &'a Registry,
    pub ends: &'a Ends<'a>,
    pub context: &'a Context,
    pub reason: Reason,
    /// As [`super::Explanation::verdict`].
    pub verdict: &'a str,
    pub device: &'a str,
    pub groups: &'a [GroupAnswer],
    pub translation: Option<&'a Translation>,
    pub next_hop: Option<&'a HopAnswer>,
    pub live: &'a LiveFlows,
}

/// The stages.
pub fn stages(told: &Told<'_>) -> Vec<Stage> {
    let end = end_of(told.reason, told.ends, told.context);
    let ended_by = || format!("{}: {}", told.reason.label(), told.reason.description().trim());
    let mut stages = Vec::new();
    let mut tell = |stage: &str, ended: bool, text: String| {
        let text = if ended && !matches!(stage, "platformRules" | "group") {
            if text.is_empty() { ended_by() } else { format!("{text}: {}", ended_by()) }
        } else {
            text
        };
        stages.push(Stage { stage: stage.to_owned(), ended, text });
    };
    tell("device", false, device(told));
    if end == End::Packet {
        tell("packet", true, String::new());
    } else {
        tell("flow", false, flow(told.live));
        // What comes from outside and is not ours goes to the kernel whoever sent it.
        if told.reason != Reason::NotOurs {
            tell("sender", end == End::Sender, sender(told));
        }
        if end >= End::Route {
            let text = route(told.in_force, told.registry, told.ends, told.context);
            tell("route", end == End::Route, text);
        }
    }
    if end > End::Route {
        for group in told.groups {
            let stage = if group.level == "platform" { "platformRules" } else { "group" };
            tell(stage, group.denied(), text::group(group));
        }
        if told.reason == Reason::PlatformAddress {
            tell("platformRules", true, ended_by());
        } else if told.groups.is_empty() {
            tell("group", false, no_group(told));
        }
    }
    match told.translation {
        Some(translation) => tell("translation", false, translation.text()),
        None if end == End::Translation => tell("translation", true, String::new()),
        None => {}
    }
    match told.next_hop {
        Some(hop) => tell("nextHop", false, hop.text()),
        None if end == End::NextHop => tell("nextHop", true, String::new()),
        None if end == End::Not && told.verdict == "host" => tell("nextHop", false, "this host".to_owned()),
        None => {}
    }
    let verdict = format!("{} ({})", text::verdict(told.verdict), told.reason.label());
    stages.push(Stage { stage: "verdict".to_owned(), ended: true, text: verdict });
    stages
}

fn device(told: &Told<'_>) -> String {
    let network = || told.in_force.network_name(told.ends.network, told.registry);
    match &told.ends.from {
        Sender::Guest(_) => format!("{}, a guest's device in {}", told.device, network()),
        Sender::Host => format!("{}, a guest's device in {}, where this host sends", told.device, network()),
        Sender::World => format!("{}, an uplink", told.device),
    }
}

fn flow(live: &LiveFlows) -> String {
    let of = match live.exact.as_deref() {
        None => return "none: the packet is judged as the first of a new flow".to_owned(),
        Some("") => "without asking a rule".to_owned(),
        Some(rule) => format!("by {rule}"),
    };
    let half = if live.is_answer { "an answer in a live flow" } else { "of a live flow" };
    format!("{half}, allowed {of}: its packets pass; what follows is about a new one")
}

fn sender(told: &Told<'_>) -> String {
    let source = told.ends.source;
    match &told.ends.from {
        Sender::Guest(guest) => {
            let known =
                told.in_force.compiled.guest_hops.get(guest.number).is_some_and(|hop| hop.mac.is_some());
            let mac = if known { "its pinned" } else { "its" };
            format!("{} has {source}, and sends from {mac} hardware address", guest.name)
        }
        Sender::Host => format!("this host, from {source}"),
        Sender::World => format!("{source}, somebody in the world"),
    }
}

fn no_group(told: &Told<'_>) -> String {
    let host_access = match &told.ends.from {
        Sender::Guest(guest) => is_host_access(told.in_force, guest, told.ends, told.context),
        _ => false,
    };
    if host_access {
        "none asked: hostAccess opens it".to_owned()
    } else {
        "none stands in the way: not filtered".to_owned()
    }
}
