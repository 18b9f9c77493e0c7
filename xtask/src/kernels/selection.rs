//! Which tests run under another kernel: the one place that says so.

/// Packages and targets of the end-to-end suite, with the names that are wanted of them; none means all. Left out are
/// tests without a kernel (policy, compiler, model, oracle on the host), benches, and what counts on a processor's
/// speed (a thousand members, millions of claims): all of them run on the machine itself.
pub const END_TO_END: [(&str, &str, &[&str]); 23] = [
    // Every program verifies, and what it costs the verifier.
    ("portcullis-tests", "budget", &[]),
    // Tables, generations, attaching by tcx and clsact, adopting, taking down; the host's side by netlink.
    ("portcullis", "portcullis", &["datapath::", "hosts::"]),
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

/// Names wanted of a target; `None` if it is not part of the end-to-end suite.
pub fn wanted(package: &str, target: &str) -> Option<&'static [&'static str]> {
    let entry = END_TO_END.iter().find(|(p, t, _)| (*p, *t) == (package, target));
    entry.map(|(_, _, names)| *names)
}

/// What this kernel cannot run.
pub fn skipped(version: (u32, u32)) -> impl Iterator<Item = &'static Skip> {
    SKIPPED.iter().filter(move |skip| version < skip.from)
}
