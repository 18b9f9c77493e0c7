//! Which tests run under another kernel: the one place that says so.

/// Packages and targets of the end-to-end suite, with the names that are wanted of them; none means all. Left out are
/// tests without a kernel (policy, compiler, model, oracle on the host), benches, and what counts on a processor's
/// speed (a thousand members, millions of claims): all of them run on the machine itself.
pub const END_TO_END: [(&str, &str, &[&str]); 26] = [
    // Every program verifies, and what it costs the verifier.
    ("portcullis-tests", "budget", &[]),
    ("portcullis", "datapath_open", &[]),
    // Tables, generations, attaching by tcx and clsact, adopting, taking down; the host's side by netlink.
    ("portcullis", "portcullis", &["datapath::", "hosts::"]),
    ("portcullis", "datapath_attach", &[]),
    ("portcullis", "datapath_test_run", &[]),
    // The packet tables: engine, XDP and TC agree.
    ("portcullis-tests", "packet_table", &[]),
    ("portcullis-tests", "packet_table6", &[]),
    ("portcullis-tests", "packet_outbound", &[]),
    ("portcullis-tests", "packet_balance", &[]),
    ("portcullis-tests", "packet_groups", &[]),
    ("portcullis-tests", "packet_icmp", &[]),
    ("portcullis-tests", "packet_icmp_hostile", &[]),
    ("portcullis-tests", "packet_icmp_own", &[]),
    // A gateway with guests and a world around it.
    ("portcullis-tests", "end_to_end", &[]),
    ("portcullis-tests", "lifecycle", &[]),
    ("portcullis-tests", "apply", &[]),
    ("portcullis-tests", "reboot", &[]),
    ("portcullis-tests", "outbound_lab", &[]),
    ("portcullis-tests", "outbound6_lab", &[]),
    ("portcullis-tests", "groups_lab", &[]),
    ("portcullis-tests", "balance_lab", &[]),
    ("portcullis-tests", "hairpin_lab", &[]),
    ("portcullis-tests", "icmp_lab", &[]),
    ("portcullis-tests", "ipv6_lab", &[]),
    ("portcullis-tests", "refusal_lab", &[]),
    ("portcullis-tests", "topologies", &[]),
];

/// A test that an older kernel cannot run.
#[derive(Debug)]
pub struct Skip {
    pub test: &'static str,
    /// The first series that can, major and minor.
    pub from: (u32, u32),
    pub why: &'static str,
}

/// All of them.
pub const SKIPPED: &[Skip] = &[];

/// Place of a target in the end-to-end suite, and the names wanted of it; `None` if it is not part of that.
pub fn wanted(package: &str, target: &str) -> Option<(usize, &'static [&'static str])> {
    let place = END_TO_END.iter().position(|(p, t, _)| (*p, *t) == (package, target))?;
    END_TO_END.get(place).map(|(_, _, names)| (place, *names))
}

/// What this kernel cannot run.
pub fn skipped(version: (u32, u32)) -> impl Iterator<Item = &'static Skip> {
    SKIPPED.iter().filter(move |skip| version < skip.from)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_end_to_end_suite_consists_of_tests_that_exist_each_once() {
        let root = xtask::workspace_root();
        for (i, (package, target, _)) in END_TO_END.iter().enumerate() {
            let directory = if *package == "portcullis" { "controller" } else { "tests" };
            let file = match (*package, *target) {
                ("portcullis", "portcullis") => root.join("controller/src/lib.rs"),
                _ => root.join(directory).join("tests").join(target).with_extension("rs"),
            };
            assert!(Path::new(&file).is_file(), "{}", file.display());
            assert_eq!(wanted(package, target).map(|(place, _)| place), Some(i), "{target} is there twice");
        }
        assert_eq!(wanted("portcullis-tests", "bench_smoke"), None);
    }

    #[test]
    fn what_an_older_kernel_cannot_run_is_left_out_there_and_only_there() {
        let newest = SKIPPED.iter().map(|skip| skip.from).max().unwrap_or_default();
        assert_eq!(skipped(newest).count(), 0);
        assert_eq!(skipped((0, 0)).count(), SKIPPED.len());
        assert!(SKIPPED.iter().all(|skip| !skip.why.is_empty()));
    }
}
