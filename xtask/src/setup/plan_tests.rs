//! Machines as people have them, and what setup would do to each.

use super::*;

/// Debian 12 with stable Rust from rustup, run as root, and nothing of ours.
fn fresh_debian() -> Machine {
    Machine {
        privilege: Privilege::Root,
        builds_ebpf: false,
        compilers: Vec::new(),
        rustup: true,
        llvm: BTreeSet::new(),
        apt: Some(Apt { updated: false, compiler: true, llvm: BTreeSet::from([19, 22]) }),
        missing_tools: vec!["nft", "ip", "tc"],
        failed: BTreeSet::new(),
    }
}

fn steps(machine: &Machine) -> Vec<Step> {
    let (steps, by_hand) = machine.whole_plan();
    assert_eq!(by_hand, [""; 0]);
    steps
}

#[test]
fn a_fresh_debian_gets_the_nightly_then_llvm_then_the_linker_then_the_tools() {
    assert_eq!(
        steps(&fresh_debian()),
        [
            Step::RefreshApt,
            Step::RustupNightly,
            Step::LlvmDev(22),
            Step::BpfLinker(22),
            Step::Tools(vec!["iproute2", "nftables"]),
        ]
    );
}

#[test]
fn where_rustup_cannot_download_debians_compiler_takes_its_place() {
    let machine = Machine { failed: BTreeSet::from([Step::RustupNightly]), ..fresh_debian() };
    assert_eq!(steps(&machine)[1], Step::DebianCompiler);
}

#[test]
fn a_rustup_without_a_default_toolchain_is_left_alone() {
    let machine = Machine { rustup: false, ..fresh_debian() };
    assert_eq!(steps(&machine)[1], Step::DebianCompiler);
}

#[test]
fn a_machine_that_has_everything_is_ready() {
    let machine = Machine { builds_ebpf: true, missing_tools: Vec::new(), ..fresh_debian() };
    assert_eq!(machine.next(), Next::Ready);
}

#[test]
fn a_suitable_compiler_is_used_and_only_the_linker_is_added() {
    let machine = Machine {
        compilers: vec![22],
        llvm: BTreeSet::from([22]),
        apt: None,
        missing_tools: Vec::new(),
        ..fresh_debian()
    };
    assert_eq!(steps(&machine), [Step::BpfLinker(22)]);
}

#[test]
fn a_missing_tool_alone_brings_only_its_package() {
    let machine = Machine { builds_ebpf: true, missing_tools: vec!["bridge"], ..fresh_debian() };
    assert_eq!(steps(&machine), [Step::RefreshApt, Step::Tools(vec!["iproute2"])]);
}

#[test]
fn a_nightly_whose_llvm_nobody_packages_does_not_keep_another_compiler_from_being_installed() {
    let machine = Machine { compilers: vec![24], ..fresh_debian() };
    assert_eq!(steps(&machine)[1..4], [Step::RustupNightly, Step::LlvmDev(22), Step::BpfLinker(22)]);
}

#[test]
fn empty_package_lists_do_not_make_the_dry_run_give_up() {
    let machine = Machine { apt: Some(Apt::default()), ..fresh_debian() };
    assert!(steps(&machine).contains(&Step::BpfLinker(22)));
}

#[test]
fn without_apt_the_person_is_told_everything_that_is_missing() {
    let machine = Machine { apt: None, rustup: false, ..fresh_debian() };
    let Next::ByHand(wanted) = machine.next() else { panic!("nothing can be installed here") };
    let wanted = wanted.join("\n");
    for name in ["rust-src", "bpf-linker", "llvm-22-dev", "nft", "iproute2"] {
        assert!(wanted.contains(name), "{name} is missing from: {wanted}");
    }
}

#[test]
fn without_root_or_sudo_nothing_is_asked_of_apt() {
    let machine = Machine { privilege: Privilege::None, ..fresh_debian() };
    let (steps, by_hand) = machine.whole_plan();
    assert_eq!(steps, []);
    assert!(!by_hand.is_empty());
}

#[test]
fn a_step_that_failed_is_not_tried_again() {
    let mut machine = fresh_debian();
    for _ in 0..10 {
        match machine.next() {
            Next::Take(step) => assert!(machine.failed.insert(step.clone()), "{step:?} came twice"),
            Next::Ready => panic!("nothing was installed"),
            Next::ByHand(_) => return,
        }
    }
    panic!("the plan does not end");
}

#[test]
fn commands_never_touch_the_default_toolchain_and_never_remove_a_package() {
    let machine = Machine { failed: BTreeSet::from([Step::RustupNightly]), ..fresh_debian() };
    for step in steps(&fresh_debian()).into_iter().chain(steps(&machine)) {
        let line = step.command(Privilege::Sudo).to_string();
        assert!(!line.contains("default "), "{line}");
        assert!(!line.contains("apt-get install") || line.contains("--no-remove"), "{line}");
    }
}

#[test]
fn a_user_with_sudo_installs_packages_through_it_but_builds_the_linker_as_themselves() {
    assert_eq!(
        Step::LlvmDev(22).command(Privilege::Sudo).to_string(),
        "sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-remove llvm-22-dev"
    );
    assert_eq!(
        Step::BpfLinker(22).command(Privilege::Sudo).to_string(),
        "LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version =0.13.0 --no-default-features \
         --features llvm-22 --locked --force"
    );
}

#[test]
fn the_stun_server_that_is_installed_does_not_run_as_a_service() {
    let line = Step::Tools(vec!["coturn", "iproute2"]).command(Privilege::Root).to_string();
    assert!(
        line.contains("'DPkg::Post-Invoke::=") && line.contains("disable --quiet --now coturn"),
        "{line}"
    );
    let line = Step::Tools(vec!["iproute2"]).command(Privilege::Root).to_string();
    assert!(!line.contains("coturn"), "who has coturn keeps it as it is: {line}");
}
