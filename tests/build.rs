//! Builds the eBPF object of the bench (packet generator, bare redirect, counters), so that the lab can embed it.

use std::process::ExitCode;

fn main() -> ExitCode {
    portcullis_xtask::ebpf::embed(
        "portcullis-tests-ebpf",
        "portcullis-tests-ebpf",
        "PORTCULLIS_TESTS_EBPF_OBJECT_PATH",
    )
}
