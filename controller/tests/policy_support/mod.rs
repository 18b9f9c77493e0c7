//! `examples/two-networks.yaml` with small changes, and what is said about them.
#![allow(dead_code, reason = "each test file uses its part of it")]

pub mod balanced;

use portcullis::policy::{self, Diagnostic, Diagnostics, Loaded, Severity};

pub const BASE: &str = include_str!("../../../examples/two-networks.yaml");

pub type Changes<'a> = &'a [(&'a str, &'a str)];

/// The example with replacements; every one must occur.
pub fn changed(changes: Changes<'_>) -> String {
    replaced(BASE, changes)
}

/// A policy with replacements; every one must occur.
pub fn replaced(base: &str, changes: Changes<'_>) -> String {
    let mut text = base.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "the example has no {from:?}");
        text = text.replacen(from, to, 1);
    }
    text
}

pub fn accepted(changes: Changes<'_>) -> Loaded {
    policy::parse("policy.yaml", &changed(changes)).unwrap_or_else(|findings| panic!("{findings}"))
}

/// Asserts that the changes lead to exactly one error, that its caret stands at `at`, and that it says `message` and
/// what to do about it: `help`.
pub fn refused(changes: Changes<'_>, at: &str, message: &str, help: &str) -> Diagnostics {
    refused_text(&changed(changes), at, message, help)
}

/// The same of a whole text.
pub fn refused_text(text: &str, at: &str, message: &str, help: &str) -> Diagnostics {
    let findings = policy::parse("policy.yaml", text).map(|_| ()).expect_err("the policy is wrong");
    one(&findings, Severity::Error, text, at, message, help);
    findings
}

/// Asserts that the changed example is in order but for exactly one warning.
pub fn warned(changes: Changes<'_>, at: &str, message: &str, help: &str) -> Loaded {
    let text = changed(changes);
    let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|findings| panic!("{findings}"));
    one(&loaded.warnings, Severity::Warning, &text, at, message, help);
    loaded
}

/// The places a finding shows besides its caret: the text that stands there.
pub fn second_places<'t>(findings: &Diagnostics, text: &'t str) -> Vec<&'t str> {
    let labels = findings.entries().iter().flat_map(|entry| &entry.secondary);
    labels.map(|label| &text[label.span.start as usize..label.span.end as usize]).collect()
}

fn one(findings: &Diagnostics, severity: Severity, text: &str, at: &str, message: &str, help: &str) {
    let found: Vec<&Diagnostic> = findings.entries().iter().filter(|e| e.severity == severity).collect();
    let [found] = found.as_slice() else {
        panic!("expected one {}, {message:?}, got\n{findings}", severity.word())
    };
    assert!(found.message.contains(message), "expected {message:?}, got\n{findings}");
    assert!(found.help.iter().any(|line| line.contains(help)), "expected help {help:?}, got\n{findings}");
    let place = findings.position(found).expect("a finding has a place");
    let line = text.lines().nth(place.line - 1).expect("the line exists");
    let rest: String = line.chars().skip(place.column - 1).collect();
    assert!(rest.starts_with(at), "expected the caret at {at:?}, it is at {rest:?}\n{findings}");
    let rendered = findings.to_string();
    assert!(rendered.contains(&format!("policy.yaml:{}:{}", place.line, place.column)), "{rendered}");
    assert!(rendered.contains('^'), "{rendered}");
}
