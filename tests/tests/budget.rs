//! The verifier is a colleague: what every program may cost it, and that no program exceeds it (ADR 0002).

use portcullis::datapath::{Datapath, LoadOptions};
use portcullis_tests::lab::BpfFs;

/// Verified instructions, about a third above what was measured on 6.18 when the budget was set. The kernel refuses at a million;
/// kernels differ by a factor of two or three, so nothing here may come near it.
const BUDGET: [(&str, u32); 37] = [
    ("pc_xdp", 52_000),
    ("pc_tc", 60_000),
    ("pc_tc_loop", 60_000),
    ("pc_host", 55_000),
    ("pc_guard", 1_500),
    ("pc_xdp_classify", 125_000),
    ("pc_tc_classify", 125_000),
    ("pc_xdp_claim", 155_000),
    ("pc_tc_claim", 155_000),
    ("pc_xdp_icmp", 35_000),
    ("pc_tc_icmp", 35_000),
    ("pc_xdp_fragment", 55_000),
    ("pc_tc_fragment", 55_000),
    ("pc_xdp_refuse", 7_000),
    ("pc_tc_refuse", 25_000),
    ("pc_xdp_entry6", 50_000),
    ("pc_tc_entry6", 50_000),
    ("pc_xdp_classify6", 140_000),
    ("pc_tc_classify6", 140_000),
    ("pc_xdp_claim6", 195_000),
    ("pc_tc_claim6", 195_000),
    ("pc_xdp_fragment6", 67_000),
    ("pc_tc_fragment6", 67_000),
    ("pc_xdp_refuse6", 9_000),
    ("pc_tc_refuse6", 9_000),
    ("pc_xdp_icmp6", 61_000),
    ("pc_tc_icmp6", 61_000),
    ("pc_xdp_nd", 13_000),
    ("pc_tc_nd", 13_000),
    ("pc_xdp_adopt", 114_000),
    ("pc_tc_adopt", 114_000),
    ("pc_xdp_adopt6", 128_000),
    ("pc_tc_adopt6", 128_000),
    ("pc_xdp_relieve", 2_500),
    ("pc_tc_relieve", 2_500),
    ("pc_redirect_err", 150),
    ("pc_devmap_xmit", 150),
];

/// What any program may take before 6.12. The verifier of 6.1 takes every number of a program with functions for one that
/// matters, and so walks much twice that 6.3 walks once: the classifiers take 194,000, and IPv6's first stage under XDP
/// 528,000 (measured there with `cargo xtask test --kernel 6.1`).
const OLDER: u32 = 700_000;

/// Major and minor number of the running kernel.
fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn every_program_stays_within_its_budget_of_verified_instructions() {
    let bpffs = BpfFs::mount().unwrap();
    let datapath = Datapath::open(&bpffs.path().join("portcullis"), &LoadOptions::default()).unwrap();
    let programs = datapath.program_info().unwrap();
    let older = kernel() < (6, 12);
    assert!(programs.len() == BUDGET.len(), "{} programs", programs.len());
    for program in programs {
        let verified = program.verified_instructions.expect("the kernel says so since 5.16");
        println!("{:18} {verified:>7}", program.name);
        let budget = BUDGET.iter().find(|(name, _)| *name == program.name);
        let (_, budget) = budget.unwrap_or_else(|| panic!("{} has no budget: give it one", program.name));
        let budget = if older { OLDER.max(*budget) } else { *budget };
        assert!(
            verified <= budget,
            "{} took {verified} verified instructions, its budget is {budget}",
            program.name
        );
    }
}
