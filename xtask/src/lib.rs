//! The one way to build Portcullis' eBPF objects, shared by the build scripts (`controller/build.rs`,
//! `tests/build.rs`) and by the `cargo xtask` command.
//!
//! It exists because aya-build cannot pass `-Ctarget-cpu` and insists on a rustup nightly even where another
//! compiler would do. Everything here builds on bare stable Rust; only the eBPF crates themselves need more.

pub mod ebpf;
pub mod elf_lint;
pub mod evidence;
pub mod linker;
pub mod toolchain;

use std::path::{Path, PathBuf};

/// The root of the workspace this crate was compiled in.
pub fn workspace_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}
