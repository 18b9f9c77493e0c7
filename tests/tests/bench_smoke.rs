//! The bench on its smallest run: that it measures what it says, not how fast that is.

use std::collections::BTreeSet;

use portcullis_tests::bench::{Options, REQUIRED, figures, run};
use portcullis_tests::lab::why_unavailable;
use serde_json::Value;

/// Figures that are not everywhere: what is needed for them, and the beginnings of their names.
const ELSEWHERE: [(&str, &[&str]); 3] = [
    ("iptables is installed", &["iptables_"]),
    ("the service tags of `/work/shared/data`", &["group_", "policy_flip_"]),
    ("the processor counts instructions", &["stage_"]),
];

#[test]
fn every_section_runs_and_every_figure_is_in_the_json_or_a_note_says_why_not() {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return;
    }
    let report = run(&Options::smoke()).expect("the bench runs");
    let failures: Vec<_> = report.failures().collect();
    assert_eq!(failures, [], "{:?}", report.notes);

    // Every candidate was sent packets that arrived as they should before it was measured.
    let seen: Vec<_> =
        report.verified.iter().filter(|v| v.section == "established" && v.figure.ends_with("_1k")).collect();
    let seen: Vec<_> = seen.iter().map(|v| (v.figure.as_str(), v.seen, v.translated)).collect();
    let expected = [
        ("bare_redirect_1k", 1024, 0),
        ("kernel_forward_1k", 1024, 0),
        ("nft_1k", 1024, 1024),
        ("iptables_1k", 1024, 1024),
        ("established_1k", 1024, 1024),
        ("established_in_1m_table_1k", 1024, 1024),
        ("tc_established_1k", 1024, 1024),
    ];
    let iptables = seen.iter().any(|(name, ..)| *name == "iptables_1k");
    let expected: Vec<_> =
        expected.into_iter().filter(|(name, ..)| iptables || *name != "iptables_1k").collect();
    assert_eq!(seen, expected);

    let json: Value = serde_json::from_str(&report.json().expect("serialises")).expect("is JSON");
    assert_eq!((&json["scale"], &json["interrupted"]), (&"smoke".into(), &false.into()));
    let listed = json["figures"].as_array().expect("a list");
    let names: BTreeSet<&str> = listed.iter().filter_map(|figure| figure["name"].as_str()).collect();
    assert_eq!(names.len(), listed.len(), "a figure is there twice");
    let elsewhere =
        |name: &str| ELSEWHERE.iter().any(|(_, stems)| stems.iter().any(|stem| name.starts_with(stem)));
    let missing: Vec<String> =
        figures().into_iter().filter(|name| !names.contains(name.as_str()) && !elsewhere(name)).collect();
    assert_eq!(missing, [] as [String; 0], "{:?}", report.notes);
    for figure in listed {
        for key in ["value", "unit", "rounds", "spread"] {
            assert!(!figure[key].is_null(), "{key} of {figure}");
        }
        for key in ["ratio_to_limit", "ratio_to_nftables", "must", "goal", "by", "goal_by", "better", "met"] {
            assert!(figure.get(key).is_some(), "{key} of {figure}");
        }
        let rate = figure["unit"] == "Mpps";
        let sensible = |value: f64| value.is_finite() && (value > 0.0 || !rate);
        assert!(figure["value"].as_f64().is_some_and(sensible), "{figure}");
    }
    // The hero run has nothing to reach: its rate is reported.
    let judged = |name: &str| REQUIRED.contains(&name) && name != "hero_cps";
    for figure in listed.iter().filter(|figure| figure["name"].as_str().is_some_and(judged)) {
        for key in ["must", "goal", "by", "better"] {
            assert!(!figure[key].is_null(), "{key} of {figure}");
        }
    }
    for plot in ["established", "growth-flows", "growth-rules"] {
        let points =
            report.series.iter().filter(|series| series.plot == plot).map(|series| series.points.len());
        assert!(points.min().is_some_and(|least| least > 1), "{plot}");
    }
}
