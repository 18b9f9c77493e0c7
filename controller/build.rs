//! Builds the datapath's eBPF object, so that the library can embed it. `cargo check`, clippy and rust-analyzer need it
//! as much as `cargo build` does, which is why this is a build script and not a step of xtask.

use std::process::ExitCode;

fn main() -> ExitCode {
    portcullis_xtask::ebpf::embed("portcullis-ebpf", "portcullis-ebpf", "PORTCULLIS_EBPF_OBJECT_PATH")
}
