//! `--live`: the kernel's own programs asked the same question, on the hooks that the device really has, and held against
//! the engine on the host. Nothing is claimed, learned or counted ([`crate::datapath::dry_run`]).

use anyhow::Context as _;
use portcullis_common::Reason;
use portcullis_common::engine::Hook;
use serde::{Deserialize, Serialize};

use super::Explanation;
use super::ends::{Ends, Sender};
use super::flow::LiveFlows;
use super::packet::{self, Tuple};
use crate::api::Failure;
use crate::compile::Registry;
use crate::daemon::shared::rule_text;
use crate::daemon::{InForce, Shared};
use crate::datapath::Answer;
use crate::hosts::AttachedHook;

/// What the kernel says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveAnswer {
    /// The programs that were asked, in order: TC follows where XDP passes the packet on.
    pub hooks: Vec<HookAnswer>,
    /// As the explanation's own.
    pub verdict: String,
    pub reason: String,
    /// The rule that decides; of a live flow, the one that allowed it.
    pub rule: String,
    /// Addresses and ports of the packet as it leaves, such as `203.0.113.10:1024 -> 198.51.100.1:443`; `null` unless it is
    /// forwarded.
    pub becomes: Option<String>,
    /// Is that what the engine on the host says?
    pub agrees: bool,
    /// Why (not), for people.
    pub comparison: String,
}

/// One program's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookAnswer {
    /// `xdp`, `tc`, or `hostEgress` for what this host sends to a guest.
    pub hook: String,
    /// `pass`, `drop` or `redirect`.
    pub action: String,
}

/// `XDP_*` and `TC_ACT_*` of linux/bpf.h and linux/pkt_cls.h.
fn action(hook: &str, code: u32) -> anyhow::Result<&'static str> {
    const UNSPEC: u32 = u32::MAX;
    Ok(match (hook, code) {
        ("xdp", 1) => "drop",
        ("xdp", 2) => "pass",
        ("xdp", 4) => "redirect",
        ("tc" | "hostEgress", 2) => "drop",
        ("tc" | "hostEgress", UNSPEC) => "pass",
        ("tc", 7) => "redirect",
        _ => anyhow::bail!("the program of {hook} answered {code}, which it never does: please report it"),
    })
}

/// What was asked of the kernel and what it said.
pub struct Heard {
    hooks: Vec<HookAnswer>,
    reason: Reason,
    rule: u32,
    after: Option<Tuple>,
}

/// Asks the kernel. The thread is bound to one processor meanwhile.
pub fn ask(shared: &Shared, in_force: &InForce, ends: &Ends<'_>, frame: &[u8]) -> Result<Heard, Failure> {
    if let Some(device) = &ends.missing_device {
        return Err(Failure::input(format!(
            "device {device} does not exist yet, so the kernel cannot be asked about it: leave --live out"
        )));
    }
    let datapath = shared.datapath();
    let dry = datapath.dry_run()?;
    let mut hooks = Vec::new();
    let mut note = |hook: &'static str, answer: &Answer| -> anyhow::Result<bool> {
        let action = action(hook, answer.outcome.verdict)?;
        hooks.push(HookAnswer { hook: hook.to_owned(), action: action.to_owned() });
        Ok(action == "pass")
    };
    let answer = if matches!(ends.from, Sender::Host) {
        let answer = dry.from_host(frame, ends.ifindex)?;
        note("hostEgress", &answer)?;
        answer
    } else {
        let choice = in_force.choices.iter().find(|choice| choice.ifindex == ends.ifindex);
        let choice = choice.context("the device of the question is none of the policy's")?;
        let first = match choice.hook {
            AttachedHook::Xdp => {
                let answer = dry.ingress(Hook::Xdp, frame, ends.ifindex)?;
                (!note("xdp", &answer)?).then_some(answer)
            }
            AttachedHook::Tc => None,
        };
        match first {
            Some(answer) => answer,
            None => {
                let answer = dry.ingress(Hook::Tc, frame, ends.ifindex)?;
                note("tc", &answer)?;
                answer
            }
        }
    };
    if answer.context.generation != in_force.compiled.generation {
        let error = anyhow::anyhow!("another policy came into force while the kernel was asked: ask again");
        return Err(Failure::failed(&error));
    }
    // What passes without a word of the engine is a packet that is none of its business.
    let reason = answer.reason.unwrap_or(Reason::NotOurs);
    Ok(Heard {
        hooks,
        reason,
        rule: answer.context.rule,
        after: packet::read(&answer.outcome.packet, ends.protocol),
    })
}

/// The kernel's answer beside the engine's.
pub fn answer(
    in_force: &InForce,
    registry: &Registry,
    heard: Heard,
    explanation: &Explanation,
    live: &LiveFlows,
    from_host: bool,
) -> LiveAnswer {
    let Heard { hooks, reason, rule, after } = heard;
    let verdict = match hooks.last().map(|hook| hook.action.as_str()) {
        Some("drop") => "drop",
        Some("redirect") => "forward",
        _ if from_host => "forward",
        _ => "host",
    };
    let of_flow = is_of_flow(reason, live);
    let rule = match (&live.exact, of_flow) {
        (Some(rule), true) => rule.clone(),
        _ => rule_text(in_force, registry, rule),
    };
    let after = after.filter(|_| verdict == "forward");
    let end = crate::flows::end;
    let becomes = after.map(|tuple| {
        format!(
            "{} -> {}",
            end(tuple.source, tuple.source_port),
            end(tuple.destination, tuple.destination_port)
        )
    });
    let mut answer = LiveAnswer {
        hooks,
        verdict: verdict.to_owned(),
        reason: reason.label().to_owned(),
        rule,
        becomes,
        agrees: false,
        comparison: String::new(),
    };
    (answer.agrees, answer.comparison) = compare(&answer, after, explanation, of_flow);
    answer
}

/// Does the kernel take the packet for one of a live flow, and is there such a flow?
fn is_of_flow(reason: Reason, live: &LiveFlows) -> bool {
    live.exact.is_some() && matches!(reason, Reason::Forwarded | Reason::ToHost | Reason::FromHost)
}

fn compare(kernel: &LiveAnswer, after: Option<Tuple>, engine: &Explanation, of_flow: bool) -> (bool, String) {
    if of_flow {
        let text = if engine.verdict == kernel.verdict {
            "the same; to the kernel it is a packet of the live flow, the engine was asked about a new one"
        } else {
            "the kernel lets it pass as a packet of the live flow; the engine was asked about a new one, which could not be opened now"
        };
        return (true, text.to_owned());
    }
    let mut differ = Vec::new();
    for (what, theirs, ours) in [
        ("verdict", &kernel.verdict, &engine.verdict),
        ("reason", &kernel.reason, &engine.reason),
        ("rule", &kernel.rule, &engine.rule),
    ] {
        if theirs != ours {
            let word = |text: &String| if text.is_empty() { "none".to_owned() } else { text.clone() };
            differ.push(format!("{what} {} in the kernel, {} by the engine", word(theirs), word(ours)));
        }
    }
    if let (Some(after), Some(translation)) = (after, &engine.translation) {
        // The port of an outbound rule is an example: the kernel knows which ones are taken.
        let any = matches!(translation.method.as_str(), "loadBalancer" | "default");
        let ports = any || after.source_port == translation.new_source_port;
        let same = after.source == translation.new_source
            && after.destination == translation.new_destination
            && after.destination_port == translation.new_destination_port
            && ports;
        if !same {
            differ.push("the translated addresses are not the same".to_owned());
        }
    }
    if differ.is_empty() {
        return (true, "the same".to_owned());
    }
    // The engine on the host begins with an empty flow table; a full one is no bug.
    let full = ["table_full", "snat_exhausted", "snat_refused_again", "snat_search_goes_on", "contended"];
    let why = if full.contains(&kernel.reason.as_str()) {
        "the kernel has no room for the flow right now"
    } else {
        "please report it, unless the policy or a route has changed in this moment"
    };
    (false, format!("{}: {why}", differ.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(verdict: &str, reason: &str, rule: &str) -> LiveAnswer {
        LiveAnswer {
            hooks: Vec::new(),
            verdict: verdict.into(),
            reason: reason.into(),
            rule: rule.into(),
            becomes: None,
            agrees: false,
            comparison: String::new(),
        }
    }

    fn engine(verdict: &str, reason: &str, rule: &str) -> Explanation {
        Explanation {
            verdict: verdict.into(),
            reason: reason.into(),
            rule: rule.into(),
            ..Explanation::example()
        }
    }

    #[test]
    fn the_same_verdict_reason_and_rule_is_agreement_and_nothing_less() {
        let said = engine("forward", "new_flow", "g/Outbound/A");
        assert!(compare(&kernel("forward", "new_flow", "g/Outbound/A"), None, &said, false).0);
        for other in [
            kernel("drop", "new_flow", "g/Outbound/A"),
            kernel("forward", "forwarded", "g/Outbound/A"),
            kernel("forward", "new_flow", "g/Outbound/B"),
        ] {
            let (agrees, why) = compare(&other, None, &said, false);
            assert!(!agrees && why.contains("please report"), "{why}");
        }
        let full = kernel("drop", "snat_exhausted", "g/Outbound/A");
        assert!(compare(&full, None, &said, false).1.contains("no room"));
    }

    #[test]
    fn a_live_flow_that_passes_agrees_with_whatever_a_new_one_would_meet() {
        let forwarded = kernel("forward", "forwarded", "g/Outbound/A");
        let (agrees, why) = compare(&forwarded, None, &engine("forward", "new_flow", "g/Outbound/A"), true);
        assert!(agrees && why.starts_with("the same"), "{why}");
        let (agrees, why) =
            compare(&forwarded, None, &engine("drop", "denied_by_rule", "g/Outbound/D"), true);
        assert!(agrees && why.contains("could not be opened now"), "{why}");
    }

    #[test]
    fn another_address_after_translation_is_a_disagreement_and_another_port_of_a_pool_is_none() {
        let mut said = engine("forward", "new_flow", "");
        let address = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
        let translation = said.translation.insert(super::super::Translation {
            method: "loadBalancer".into(),
            public_address: Some(address("203.0.113.10")),
            example_port: Some(1024),
            frontend: None,
            outbound_rule: None,
            inbound: None,
            new_source: address("203.0.113.10"),
            new_source_port: 1024,
            new_destination: address("198.51.100.1"),
            new_destination_port: 443,
        });
        let mut after = Tuple {
            source: translation.new_source,
            source_port: 2048,
            destination: translation.new_destination,
            destination_port: 443,
        };
        let kernel = kernel("forward", "new_flow", "");
        assert!(compare(&kernel, Some(after), &said, false).0);
        after.source = address("203.0.113.11");
        assert!(!compare(&kernel, Some(after), &said, false).0);
    }

    #[test]
    fn codes_of_both_hooks_have_their_words_and_others_are_no_answer() {
        assert_eq!([1, 2, 4].map(|code| action("xdp", code).unwrap()), ["drop", "pass", "redirect"]);
        assert_eq!([2, u32::MAX, 7].map(|code| action("tc", code).unwrap()), ["drop", "pass", "redirect"]);
        assert!(action("xdp", 0).is_err() && action("hostEgress", 7).is_err());
    }
}
