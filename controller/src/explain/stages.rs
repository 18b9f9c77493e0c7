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
use super::way_out::WayOut;
use super::{HopAnswer, text};
use crate::compile::Registry;
use crate::daemon::InForce;
use crate::flows::end;

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `device`, `packet`, `flow`, `sender`, `route`, `platformRules`, `group` (once for each), `wayOut`, `translation`,
    /// `loop` (back in, to one of our own public addresses: then `sender` to `translation` once more), `nextHop`, `verdict`.
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
        | Reason::SnatSearching
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
    /// Of the last pass.
    pub groups: &'a [GroupAnswer],
    /// The pass before, if the packet came back in.
    pub back: Option<&'a Back<'a>>,
    pub way_out: Option<&'a WayOut>,
    pub translation: Option<&'a Translation>,
    pub next_hop: Option<&'a HopAnswer>,
    /// The guest that gets it.
    pub to: &'a str,
    pub live: &'a LiveFlows,
}

/// The way out of a packet that came back in.
pub struct Back<'a> {
    pub context: &'a Context,
    /// The packet as it came back.
    pub ends: &'a Ends<'a>,
    pub groups: &'a [GroupAnswer],
    pub translation: Translation,
}

/// The stages.
pub fn stages(told: &Told<'_>) -> Vec<Stage> {
    let mut list = List { stages: Vec::new(), reason: told.reason };
    list.tell("device", false, device(told));
    match told.back {
        None => list.pass(told, told.ends, told.context, told.groups, true),
        Some(back) => {
            list.pass(told, told.ends, back.context, back.groups, false);
            list.way_out(told, false);
            list.tell("translation", false, back.translation.text(told.to));
            let (source, destination) = (back.ends.source, back.ends.destination);
            let (from, to) = (back.ends.source_port, back.ends.destination_port);
            let text =
                format!("back in, as if from the world: {} -> {}", end(source, from), end(destination, to));
            list.tell("loop", false, text);
            list.pass(told, back.ends, told.context, told.groups, true);
        }
    }
    let ended = end_of(told.reason, told.back.map_or(told.ends, |back| back.ends), told.context);
    if told.back.is_none() {
        list.way_out(told, ended == End::Translation);
    }
    match told.translation {
        Some(translation) => list.tell("translation", false, translation.text(told.to)),
        None if ended == End::Translation => list.tell("translation", true, String::new()),
        None => {}
    }
    match told.next_hop {
        Some(hop) => list.tell("nextHop", false, hop.text()),
        None if ended == End::NextHop => list.tell("nextHop", true, String::new()),
        None if ended == End::Not && told.verdict == "host" => {
            list.tell("nextHop", false, "this host".to_owned());
        }
        None => {}
    }
    let verdict = format!("{} ({})", text::verdict(told.verdict), told.reason.label());
    list.stages.push(Stage { stage: "verdict".to_owned(), ended: true, text: verdict });
    list.stages
}

/// Stages under way.
struct List {
    stages: Vec<Stage>,
    reason: Reason,
}

impl List {
    fn ended_by(&self) -> String {
        format!("{}: {}", self.reason.label(), self.reason.description().trim())
    }

    fn tell(&mut self, stage: &str, ended: bool, text: String) {
        let text = if ended && !matches!(stage, "platformRules" | "group") {
            if text.is_empty() { self.ended_by() } else { format!("{text}: {}", self.ended_by()) }
        } else {
            text
        };
        self.stages.push(Stage { stage: stage.to_owned(), ended, text });
    }

    fn way_out(&mut self, told: &Told<'_>, ended: bool) {
        // Told when it was asked for: after the groups.
        let asked = ended || told.translation.is_some() || told.back.is_some() || told.next_hop.is_some();
        if let Some(way) = told.way_out.filter(|_| asked) {
            self.tell("wayOut", false, way.text.clone());
        }
    }

    /// From the packet to the groups, in one pass. `last`: it may have ended in this one.
    fn pass(
        &mut self,
        told: &Told<'_>,
        ends: &Ends<'_>,
        context: &Context,
        groups: &[GroupAnswer],
        last: bool,
    ) {
        let end = if last { end_of(told.reason, ends, context) } else { End::Not };
        let again = last && told.back.is_some();
        if end == End::Packet {
            self.tell("packet", true, String::new());
            return;
        }
        if !again {
            self.tell("flow", false, flow(told.live));
        }
        // What comes from outside and is not ours goes to the kernel whoever sent it.
        if told.reason != Reason::NotOurs {
            self.tell("sender", end == End::Sender, sender(told, ends));
        }
        if end >= End::Route {
            let text = route(told.in_force, told.registry, ends, context);
            self.tell("route", end == End::Route, text);
        }
        if end <= End::Route {
            return;
        }
        for group in groups {
            let stage = if group.level == "platform" { "platformRules" } else { "group" };
            self.tell(stage, group.denied(), text::group(group));
        }
        if last && told.reason == Reason::PlatformAddress {
            let ended_by = self.ended_by();
            self.tell("platformRules", true, ended_by);
        } else if groups.is_empty() {
            self.tell("group", false, no_group(told, ends, context));
        }
    }
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

fn sender(told: &Told<'_>, ends: &Ends<'_>) -> String {
    let source = ends.source;
    match &ends.from {
        Sender::Guest(guest) => {
            let known =
                told.in_force.compiled.guest_hops.get(guest.number).is_some_and(|hop| hop.mac.is_some());
            let mac = if known { "its pinned" } else { "its" };
            format!("{} has {source}, and sends from {mac} hardware address", guest.name)
        }
        Sender::Host => format!("this host, from {source}"),
        Sender::World if told.back.is_some() => format!("{source}, the guest's public address"),
        Sender::World => format!("{source}, somebody in the world"),
    }
}

fn no_group(told: &Told<'_>, ends: &Ends<'_>, context: &Context) -> String {
    let host_access = match &ends.from {
        Sender::Guest(guest) => is_host_access(told.in_force, guest, ends, context),
        _ => false,
    };
    if host_access {
        "none asked: hostAccess opens it".to_owned()
    } else {
        "none stands in the way: not filtered".to_owned()
    }
}
