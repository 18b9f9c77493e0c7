//! The bench's sections with real sockets, and its series of growth, on their smallest run: that they measure what they say, not
//! how fast that is.

use std::sync::{Mutex, PoisonError};

use portcullis_tests::bench::{Options, Report, run};
use portcullis_tests::lab::why_unavailable;

/// One at a time: they have threads that let nobody else run on a processor.
static ALONE: Mutex<()> = Mutex::new(());

fn smoke(section: &str) -> Option<Report> {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return None;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let report =
        run(&Options { only: vec![section.to_owned()], ..Options::smoke() }).expect("the bench runs");
    assert_eq!(report.failures().collect::<Vec<_>>(), [], "{report}");
    Some(report)
}

/// What was looked at before it was measured: figure, sent, arrived, arrived translated.
fn verified(report: &Report) -> Vec<(&str, u32, u64, u64)> {
    report.verified.iter().map(|v| (v.figure.as_str(), v.sent, v.seen, v.translated)).collect()
}

fn assert_measured(report: &Report, names: &[&str]) {
    for name in names {
        let figure = report.figure(name).unwrap_or_else(|| panic!("no {name}"));
        assert!(figure.value > 0.0, "{figure:?}");
        assert_eq!(figure.samples.len(), 1, "{figure:?}");
        assert!(figure.ratio_to_limit.is_some() && figure.ratio_to_nftables.is_some(), "{figure:?}");
    }
}

#[test]
fn tcp_cycles_pass_every_candidate_and_every_port_that_was_claimed_is_free_at_the_end() {
    let Some(report) = smoke("tcp_crr") else { return };
    assert_eq!(
        verified(&report),
        [
            ("forwarding_tcp_crr", 512, 512, 0),
            ("nft_tcp_crr", 512, 512, 512),
            ("tcp_crr", 512, 512, 512),
            ("tcp_crr_tc", 512, 512, 512),
            ("wire_tcp_crr", 512, 512, 0),
        ]
    );
    assert_measured(&report, &["forwarding_tcp_crr", "nft_tcp_crr", "tcp_crr", "tcp_crr_tc"]);
    // The section fails if a cycle did not claim a port, or one is not free after the hold-down; it says what it counted.
    for name in ["tcp_crr: ", "tcp_crr_tc: "] {
        let account =
            report.notes.iter().find_map(|note| note.text.strip_prefix(name)).expect("it is accounted for");
        let cycles: u64 = account.split(' ').next().and_then(|word| word.parse().ok()).expect("it begins so");
        assert!(cycles > 512, "{account}");
        assert!(account.contains(&format!("claimed {cycles} times")), "{account}");
    }
}

#[test]
fn a_bulk_stream_passes_every_candidate_in_large_segments_and_under_the_address_it_should() {
    let Some(report) = smoke("tcp_bulk") else { return };
    let seen = verified(&report);
    let names: Vec<&str> = seen.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names, ["forwarding_tcp_bulk", "nft_tcp_bulk", "tcp_bulk_tc"]);
    for (name, sent, arrived, translated) in seen {
        assert!(sent > 0, "{name}");
        let wanted = if name.starts_with("forwarding") { 0 } else { arrived };
        assert_eq!((u64::from(sent), translated), (arrived, wanted), "{name}");
    }
    assert_measured(
        &report,
        &[
            "forwarding_tcp_bulk",
            "nft_tcp_bulk",
            "tcp_bulk_tc",
            "nft_tcp_bulk_one_core",
            "tcp_bulk_tc_one_core",
        ],
    );
}

#[test]
fn pings_pass_every_candidate_beside_background_and_their_percentiles_are_in_order() {
    let Some(report) = smoke("latency") else { return };
    assert_eq!(
        verified(&report),
        [
            ("forwarding_latency_p99", 64, 64, 0),
            ("nft_latency_p99", 64, 64, 64),
            ("latency_p99", 64, 64, 64),
            ("latency_p99_tc", 64, 64, 64),
        ]
    );
    for [middle, late] in [
        ["forwarding_latency_p50", "forwarding_latency_p99"],
        ["nft_latency_p50", "nft_latency_p99"],
        ["latency_p50", "latency_p99"],
        ["latency_p50_tc", "latency_p99_tc"],
    ] {
        assert_measured(&report, &[middle, late]);
        let value = |name| report.figure(name).map(|figure| figure.value);
        assert!(value(middle) <= value(late), "{middle} {:?}, {late} {:?}", value(middle), value(late));
    }
}

#[test]
fn growth_by_guests_and_by_occupancy_has_a_point_for_each_size() {
    let Some(report) = smoke("guests") else { return };
    let sizes = |report: &Report, plot: &str| -> Vec<Vec<f64>> {
        let lines = report.series.iter().filter(|series| series.plot == plot);
        lines.map(|series| series.points.iter().map(|(x, _)| *x).collect()).collect()
    };
    assert_eq!(sizes(&report, "established_by_guests"), [[1.0, 4.0, 16.0], [1.0, 4.0, 16.0]]);
    let Some(report) = smoke("occupancy") else { return };
    let taken = [1018.0, 1023.0].map(|ports: f64| ports / 1024.0 * 100.0);
    assert_eq!(sizes(&report, "claim_by_occupancy"), [taken, taken]);
    assert!(report.series.iter().flat_map(|series| &series.points).all(|(_, ns)| *ns > 0.0), "{report}");
}
