//! Builds an eBPF crate of this workspace into an object file, from a build script.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{
    elf_lint,
    toolchain::{self, Core, RUSTC_VARIABLE, TARGET, Toolchain},
    workspace_root,
};

/// Crates that may use unstable features when the compiler is not a nightly; every other crate stays on stable
/// rules, so that build scripts which probe for a nightly (proc-macro2, for one) do not believe to be on one.
const BOOTSTRAP: &str = "aya_ebpf,portcullis_common,portcullis_ebpf,portcullis_tests_ebpf";

/// What the outer cargo sets for its own compiler and must not reach the inner one: clippy's wrapper, the host's
/// flags and target, and rustup's choice of toolchain.
const NOT_INHERITED: [&str; 14] = [
    "CARGO",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "RUSTC_BOOTSTRAP",
    "RUSTC_LINKER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// All of a build script: builds the object and gives its path to the crate as environment variable `variable`, for
/// `aya::include_bytes_aligned!(env!(..))`.
pub fn embed(package: &str, bin: &str, variable: &str) -> ExitCode {
    let built = env::var_os("OUT_DIR")
        .context("OUT_DIR is not set, although cargo sets it for build scripts")
        .and_then(|out_dir| build_ebpf(package, bin, Path::new(&out_dir)));
    match built {
        Ok(object) => {
            println!("cargo:rustc-env={variable}={}", object.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Not returned from main: with RUST_BACKTRACE set a page of backtrace would bury the message.
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds binary `bin` of workspace member `package` for BPF and returns the object's path, below `out_dir`.
///
/// For build scripts: prints cargo's `rerun-if` lines. A prebuilt object named by the package's variable
/// (`PORTCULLIS_EBPF_OBJECT` for `portcullis-ebpf`, `PORTCULLIS_TESTS_EBPF_OBJECT` for `portcullis-tests-ebpf`) is
/// taken as it is and needs no compiler. Either way the object has passed [`elf_lint`].
pub fn build_ebpf(package: &str, bin: &str, out_dir: &Path) -> anyhow::Result<PathBuf> {
    let root = workspace_root();
    let variable = prebuilt_variable(package);
    println!("cargo:rerun-if-env-changed={variable}");
    if let Some(prebuilt) = env::var_os(&variable).filter(|value| !value.is_empty()) {
        // A build script runs in its package's directory; people write paths relative to the workspace.
        let object = root.join(prebuilt);
        println!("cargo:rerun-if-changed={}", object.display());
        elf_lint::check(&object).with_context(|| format!("the object named by {variable}"))?;
        return Ok(object);
    }

    println!("cargo:rerun-if-env-changed={RUSTC_VARIABLE}");
    for source in sources(package)? {
        println!("cargo:rerun-if-changed={}", root.join(source).display());
    }
    let toolchain = toolchain::find()?;
    // A compiler or linker upgraded in place makes another object.
    println!("cargo:rerun-if-changed={}", toolchain.compiler.rustc.display());
    println!("cargo:rerun-if-changed={}", toolchain.linker.path.display());

    let object = compile(&root, &toolchain, package, bin, &out_dir.join("ebpf"))?;
    elf_lint::check(&object)?;
    Ok(object)
}

/// `PORTCULLIS_EBPF_OBJECT` for `portcullis-ebpf`.
pub fn prebuilt_variable(package: &str) -> String {
    format!("{}_OBJECT", package.to_uppercase().replace('-', "_"))
}

/// What the object is made of, relative to the workspace root.
fn sources(package: &str) -> anyhow::Result<Vec<String>> {
    let directory = match package {
        "portcullis-ebpf" => "dataplane-ebpf",
        "portcullis-tests-ebpf" => "tests/ebpf",
        other => bail!("{other} is not an eBPF crate of this workspace"),
    };
    // The shared manifests count too: they pin aya-ebpf and set the profile.
    let mut sources = vec!["Cargo.toml".to_owned(), "Cargo.lock".to_owned()];
    for directory in [directory, "dataplane-common"] {
        sources.extend([format!("{directory}/Cargo.toml"), format!("{directory}/src")]);
    }
    Ok(sources)
}

/// Runs the inner cargo. It has a target directory of its own, because the outer cargo holds the lock on its own
/// while the build script runs (rust-lang/cargo#6412).
fn compile(
    root: &Path,
    toolchain: &Toolchain,
    package: &str,
    bin: &str,
    target_dir: &Path,
) -> anyhow::Result<PathBuf> {
    let mut cargo = Command::new(&toolchain.compiler.cargo);
    // --locked: the lock file covers this build too, and with everything in it downloaded cargo asks no network.
    cargo
        .current_dir(root)
        .args(["build", "--release", "--locked", "--target", TARGET, "--package", package, "--bin", bin])
        .arg("--target-dir")
        .arg(target_dir)
        // A build script's stdout is read by cargo as instructions.
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    for variable in NOT_INHERITED {
        cargo.env_remove(variable);
    }
    cargo.env("RUSTC", &toolchain.compiler.rustc).env("CARGO_ENCODED_RUSTFLAGS", flags(toolchain));
    match (toolchain.compiler.core, toolchain.compiler.nightly) {
        (Core::Prebuilt, true) => {}
        (Core::Prebuilt, false) => {
            cargo.env("RUSTC_BOOTSTRAP", BOOTSTRAP);
        }
        (Core::BuildStd, true) => {
            cargo.args(["-Z", "build-std=core"]);
        }
        (Core::BuildStd, false) => {
            // Core itself is made of unstable features, and cargo accepts -Z only from "1".
            cargo.env("RUSTC_BOOTSTRAP", "1").args(["-Z", "build-std=core"]);
        }
    }

    eprintln!("building {package} with {} and {}", toolchain.compiler, toolchain.linker);
    let status =
        cargo.status().with_context(|| format!("cannot run {}", toolchain.compiler.cargo.display()))?;
    if !status.success() {
        bail!("{package} does not build for {TARGET} (the compiler's messages are above)");
    }
    Ok(target_dir.join(TARGET).join("release").join(bin))
}

/// The compiler's flags, separated as CARGO_ENCODED_RUSTFLAGS wants them.
fn flags(toolchain: &Toolchain) -> OsString {
    // Which registers a kprobe or tracepoint finds its arguments in depends on the machine, not on BPF. Build
    // scripts are told the machine the outer build is for.
    let machine = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_else(|_| env::consts::ARCH.to_owned());
    let mut flags = OsString::from("-Clinker=");
    flags.push(&toolchain.linker.path);
    for flag in [
        // BTF is made from debug information.
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // v3 brings compare-and-exchange, fetching and 32-bit atomics; v4 would shut out kernels before 6.6.
        "-Ctarget-cpu=v3",
        &format!("--cfg=bpf_target_arch=\"{machine}\""),
    ] {
        flags.push("\x1f");
        flags.push(flag);
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_has_its_own_variable_for_a_prebuilt_object() {
        assert_eq!(prebuilt_variable("portcullis-ebpf"), "PORTCULLIS_EBPF_OBJECT");
        assert_eq!(prebuilt_variable("portcullis-tests-ebpf"), "PORTCULLIS_TESTS_EBPF_OBJECT");
    }

    #[test]
    fn every_source_the_build_script_watches_exists() {
        // A path that does not exist would make cargo run the build script every time.
        for package in ["portcullis-ebpf", "portcullis-tests-ebpf"] {
            for source in sources(package).expect("a known package") {
                assert!(workspace_root().join(&source).exists(), "{source}");
            }
        }
    }
}
