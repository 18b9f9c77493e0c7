//! The verifier is a colleague: what every program may cost it, and that no program exceeds it (ADR 0002).

use portcullis::datapath::{Datapath, LoadOptions};
use portcullis_tests::lab::BpfFs;

/// Verified instructions, about a third above what was measured on 6.18 when the budget was set. The kernel refuses at a million;
/// kernels differ by a factor of two or three, so nothing here may come near it.
const BUDGET: [(&str, u32); 35] = [
    ("pc_xdp", 45_000),
    ("pc_tc", 45_000),
    ("pc_tc_loop", 45_000),
    ("pc_host", 47_000),
    ("pc_guard", 1_500),
    ("pc_xdp_classify", 125_000),
    ("pc_tc_classify", 125_000),
    ("pc_xdp_claim", 155_000),
    ("pc_tc_claim", 155_000),
    ("pc_xdp_icmp", 35_000),
    ("pc_tc_icmp", 35_000),
    ("pc_xdp_fragment", 37_000),
    ("pc_tc_fragment", 37_000),
    ("pc_xdp_refuse", 7_000),
    ("pc_tc_refuse", 7_000),
    ("pc_xdp_entry6", 50_000),
    ("pc_tc_entry6", 50_000),
    ("pc_xdp_classify6", 140_000),
    ("pc_tc_classify6", 140_000),
    ("pc_xdp_claim6", 195_000),
    ("pc_tc_claim6", 195_000),
    ("pc_xdp_fragment6", 47_000),
    ("pc_tc_fragment6", 47_000),
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
    ("pc_redirect_err", 150),
    ("pc_devmap_xmit", 150),
];

#[test]
fn every_program_stays_within_its_budget_of_verified_instructions() {
    let bpffs = BpfFs::mount().unwrap();
    let datapath = Datapath::open(&bpffs.path().join("portcullis"), &LoadOptions::default()).unwrap();
    let programs = datapath.program_info().unwrap();
    assert!(programs.len() == BUDGET.len(), "{} programs", programs.len());
    for program in programs {
        let verified = program.verified_instructions.expect("the kernel says so since 5.16");
        println!("{:18} {verified:>7}", program.name);
        let budget = BUDGET.iter().find(|(name, _)| *name == program.name);
        let (_, budget) = budget.unwrap_or_else(|| panic!("{} has no budget: give it one", program.name));
        assert!(
            verified <= *budget,
            "{} took {verified} verified instructions, its budget is {budget}",
            program.name
        );
    }
}
