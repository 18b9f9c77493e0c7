//! Rules that can never match, by which rules they are shadowed, and rules that change nothing.

use super::view::{View, contexts};
use super::{Findings, Severity, rule_path};
use crate::answers::regions::Cover;
use crate::policy::network::{Access, Direction, Network};

/// What becomes of a rule's packets in one subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It decides some. Without it all of them would be decided the same, if `redundant`.
    Live { redundant: bool },
    /// It has none.
    Empty,
    /// Rules before it, by place in the view, take them all; none of these can be left out.
    Shadowed(Vec<usize>),
    /// The rules defeat the search.
    Undecided,
}

/// The fate of every rule that somebody wrote.
pub fn fates(view: &View<'_>) -> Vec<Fate> {
    view.own().map(|rule| fate(view, rule)).collect()
}

fn fate(view: &View<'_>, rule: usize) -> Fate {
    if view.space.is_empty(rule) {
        return Fate::Empty;
    }
    let before: Vec<usize> = (0..rule).collect();
    match view.space.covered_by_fewest(&[rule], &before) {
        Cover::Covered(by) => Fate::Shadowed(by),
        Cover::Left(_) => Fate::Live { redundant: redundant(view, rule) },
        Cover::Undecided => Fate::Undecided,
    }
}

/// Would every packet that this rule decides be decided the same without it? It would not if a later rule of the other
/// access would be the next to match some of them.
fn redundant(view: &View<'_>, rule: usize) -> bool {
    let other = |&later: &usize| view.rules[later].access != view.rules[rule].access;
    let mut later = (rule + 1..view.rules.len()).rev().filter(other);
    !later.any(|later| {
        if !view.space.meet(&[rule, later]) {
            return false;
        }
        let before: Vec<usize> = (0..later).filter(|&k| k != rule).collect();
        // Not found out is not said.
        !matches!(view.space.covered(&[rule, later], &before), Cover::Covered(_))
    })
}

/// Names of the rules that shadow each rule of a group and direction, in the order of `in_order` without the default rules;
/// `None` for a rule that matches something somewhere.
pub fn shadowed(network: &Network, group: usize, direction: Direction) -> Vec<Option<Vec<String>>> {
    let views: Vec<View<'_>> =
        contexts(network, group).into_iter().map(|s| View::new(network, group, direction, s)).collect();
    let Some(first) = views.first() else {
        return Vec::new();
    };
    let fates: Vec<Vec<Fate>> = views.iter().map(fates).collect();
    first.own().map(|rule| never(first, &fates, rule)).collect()
}

/// The names of its shadows if a rule matches nowhere; none if there is simply nothing for it.
fn never(view: &View<'_>, fates: &[Vec<Fate>], rule: usize) -> Option<Vec<String>> {
    let mut by: Vec<usize> = Vec::new();
    for fates in fates {
        match &fates[rule] {
            Fate::Empty => {}
            Fate::Shadowed(rules) => by.extend(rules),
            Fate::Live { .. } | Fate::Undecided => return None,
        }
    }
    by.sort_unstable();
    by.dedup();
    Some(by.into_iter().map(|k| view.rules[k].name.clone()).collect())
}

/// Reports on a group and direction, seen from everywhere it stands.
pub(super) fn check(views: &[View<'_>], findings: &mut Findings<'_>) {
    let Some(view) = views.first() else { return };
    let fates: Vec<Vec<Fate>> = views.iter().map(fates).collect();
    for index in view.own() {
        let rule = view.rules[index];
        let about = rule_path(view.network, view.group, rule);
        let title = format!("{:?} rule {} ({})", rule.direction, rule.name, rule.priority);
        match never(view, &fates, index) {
            Some(by) if by.is_empty() => {
                findings.add(
                    "PC102",
                    Severity::Warning,
                    about,
                    format!("{title} matches nothing: a side has no address, or the sides have no family in common"),
                    "give its application groups members, correct the addresses, or remove the rule",
                );
            }
            Some(by) => {
                let opposed = by.iter().any(|name| {
                    view.own().any(|k| view.rules[k].name == *name && view.rules[k].access != rule.access)
                });
                // What was to be denied is allowed: that is worse than the other way round.
                let severity =
                    if opposed && rule.access == Access::Deny { Severity::Error } else { Severity::Warning };
                let what = if opposed { "with the other access" } else { "with the same access" };
                let take = if by.len() == 1 { "takes" } else { "take" };
                let message =
                    format!("{title} can never match: {} {take} every packet before it, {what}", list(&by));
                let help = "give it a lower priority number than theirs, narrow them, or remove it";
                findings.add("PC101", severity, about, message, help).rules = by;
            }
            None if fates.iter().any(|fates| fates[index] == Fate::Undecided) => {
                findings.add(
                    "PC106",
                    Severity::Info,
                    about,
                    format!(
                        "whether {title} can match was not found out: the rules before it cut it up too often"
                    ),
                    "join rules by using plural forms, or order them so that wide ones come last",
                );
            }
            None if fates.iter().all(|fates| fates[index] == Fate::Live { redundant: true }) => {
                findings.add(
                    "PC103",
                    Severity::Info,
                    about,
                    format!("{title} changes nothing: without it every packet would be decided the same"),
                    "remove it, or keep it for its counter",
                );
            }
            None => {}
        }
    }
}

/// The first few names.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 6;
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..SHOWN].join(", ")),
    }
}
