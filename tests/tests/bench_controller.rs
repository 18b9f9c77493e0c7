//! The bench's sections about the controller, and the hero run, on their smallest run: that they measure what they say,
//! not how much that is.

use portcullis_tests::bench::{Options, Report, run};
use portcullis_tests::lab::why_unavailable;

fn measured(only: &str) -> Option<Report> {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return None;
    }
    let report = run(&Options { only: vec![only.into()], ..Options::smoke() }).expect("the bench runs");
    assert_eq!(report.failures().collect::<Vec<_>>(), []);
    Some(report)
}

#[test]
fn a_flow_takes_two_records_and_as_much_again_for_room() {
    let Some(report) = measured("memory") else { return };
    let bytes =
        ["bytes_per_flow_v4", "bytes_per_flow_v6"].map(|name| report.figure(name).expect("measured").value);
    assert_eq!(bytes, [4.0 * 64.0, 4.0 * 128.0]);
}

#[test]
fn sweeps_over_flows_written_and_flows_forwarded_are_measured() {
    let Some(report) = measured("reaper") else { return };
    for name in ["reaper_ms_per_million", "reaper_forwarded_ms_per_million", "reaper_swept_mpps"] {
        let figure = report.figure(name).unwrap_or_else(|| panic!("no {name}"));
        assert!(figure.value > 0.0, "{figure:?}");
    }
}

#[test]
fn a_change_of_policy_is_taken_apart_and_nothing_of_it_is_missing() {
    let Some(report) = measured("flip") else { return };
    let Some(whole) = report.figure("policy_flip_s") else {
        // Azure's tag file is not here, which the report says.
        assert!(report.notes[0].text.contains("was not measured"), "{:?}", report.notes);
        return;
    };
    let parts = ["parsed", "compiled", "installed"]
        .map(|part| report.figure(&format!("policy_flip_{part}_s")).expect("measured").value);
    assert!((parts.iter().sum::<f64>() - whole.value).abs() < 1e-6, "{parts:?} are {whole:?}");
}

#[test]
fn the_idle_daemon_is_looked_at_with_an_empty_and_with_a_full_table() {
    let Some(report) = measured("idle") else { return };
    for name in ["idle_anon_mib", "idle_cpu_percent", "idle_anon_mib_1m", "idle_cpu_percent_1m"] {
        assert!(report.figure(name).is_some_and(|figure| figure.value > 0.0), "{name}: {report:?}");
    }
}

/// That not one packet is lost, and that all flows and ports are gone in time, are conditions of the run itself.
#[test]
fn the_hero_run_loses_nothing_and_leaves_nothing() {
    let Some(report) = measured("hero") else { return };
    let rate = report.figure("hero_cps").expect("it held").value;
    assert!([1000.0, 900.0, 810.0, 729.0].contains(&rate), "{rate} is none of the rates that it tries");
    let note = report.notes.iter().find(|note| note.text.starts_with("hero run")).expect("a note");
    assert!(note.text.contains(&format!("{rate:.0} SYNs and 500 datagrams sent")), "{}", note.text);
}
