//! The bench on its smallest run: that it measures what it says, not how fast that is.

use portcullis_tests::bench::{Options, run};
use portcullis_tests::lab::why_unavailable;

#[test]
fn the_bench_sends_packets_through_every_candidate_and_they_arrive_translated() {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return;
    }
    let report =
        run(&Options { only: vec!["established_1k".into(), "tc_established_1k".into()], ..Options::smoke() })
            .expect("the bench runs");
    let seen: Vec<_> = report.verified.iter().map(|v| (v.figure.as_str(), v.seen, v.translated)).collect();
    assert_eq!(
        seen,
        [
            ("bare_redirect_1k", 1024, 0),
            ("nft_1k", 1024, 1024),
            ("established_1k", 1024, 1024),
            ("tc_established_1k", 1024, 1024),
        ]
    );
    for name in ["bare_redirect_1k", "nft_1k", "established_1k", "tc_established_1k"] {
        let figure =
            report.figures.iter().find(|figure| figure.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert!(figure.value > 0.0, "{figure:?}");
    }
    assert!(report.json().expect("serialises").contains("\"ratio_to_nftables\""));
}
