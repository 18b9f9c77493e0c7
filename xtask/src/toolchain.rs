//! Finds a Rust compiler that can compile for `bpfel-unknown-none`, and a bpf-linker that fits it.
//!
//! That target has no std and rustup ships no core for it. A compiler qualifies if its core for BPF comes prebuilt
//! (Debian's `libstd-rust-web-dev-bpf`) or if it has rust-src, to build core from. Being a nightly is not enough: a
//! nightly without rust-src is refused like any other.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::linker::{Linker, linkers_in};

/// The target of every program; the machines we run on are little-endian.
pub const TARGET: &str = "bpfel-unknown-none";

/// Names the compiler to use, whatever else is installed.
pub const RUSTC_VARIABLE: &str = "PORTCULLIS_EBPF_RUSTC";

/// Where the compiler's core library for BPF comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// Installed beside the compiler.
    Prebuilt,
    /// Built from rust-src by `-Z build-std`.
    BuildStd,
}

/// A compiler that can produce BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// The real rustc, never a rustup proxy: a proxy picks another toolchain as soon as the environment changes.
    pub rustc: PathBuf,
    /// The cargo that came with it.
    pub cargo: PathBuf,
    pub core: Core,
    pub nightly: bool,
    /// As rustc prints it, "1.96.0" or "1.97.0-nightly".
    pub release: String,
    /// LLVM's major version, which the linker must match.
    pub llvm: u32,
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            Core::Prebuilt => "prebuilt core",
            Core::BuildStd => "rust-src",
        };
        write!(f, "{} {} (LLVM {}, {core})", self.rustc.display(), self.release, self.llvm)
    }
}

/// A compiler and a linker that understand each other.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub compiler: Compiler,
    pub linker: Linker,
}

/// Where to look, as data so that a test can point it at a directory of its own.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// What [`RUSTC_VARIABLE`] names. An explicit wish that cannot be met is an error, not a hint.
    pub explicit: Option<PathBuf>,
    /// The directories of PATH.
    pub path: Vec<PathBuf>,
    /// Looked at even where PATH leaves it out, or rustup's proxies come first in it.
    pub system_rustc: Option<PathBuf>,
    /// `$RUSTUP_HOME`, with a `toolchains` directory in it.
    pub rustup_home: Option<PathBuf>,
    /// Where `cargo install` puts binaries.
    pub cargo_bin: Vec<PathBuf>,
}

impl Places {
    pub fn of_this_machine() -> Self {
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = env::home_dir();
        let below_home = |name: &str| home.as_ref().map(|home| home.join(name));
        Self {
            explicit: variable(RUSTC_VARIABLE),
            path: env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default(),
            system_rustc: Some(PathBuf::from("/usr/bin/rustc")),
            rustup_home: variable("RUSTUP_HOME").or_else(|| below_home(".rustup")),
            cargo_bin: [variable("CARGO_HOME"), below_home(".cargo")]
                .into_iter()
                .flatten()
                .map(|cargo_home| cargo_home.join("bin"))
                .collect(),
        }
    }

    /// Compilers worth a look, best first, each file once.
    fn candidates(&self) -> Vec<PathBuf> {
        if let Some(explicit) = &self.explicit {
            return vec![explicit.clone()];
        }
        let mut candidates: Vec<PathBuf> =
            self.path.iter().map(|directory| directory.join("rustc")).collect();
        candidates.extend(self.system_rustc.clone());
        if let Some(toolchains) = self.rustup_home.as_ref().map(|home| home.join("toolchains")) {
            let mut installed: Vec<PathBuf> = toolchains
                .read_dir()
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path().join("bin/rustc"))
                .collect();
            installed.sort();
            candidates.extend(installed);
        }
        // `/bin` is `/usr/bin` on today's systems and rustup links one toolchain under several names. A proxy is
        // told apart from `rustup` itself only by its name, so what counts is the real directory, not the real file.
        let mut seen = Vec::new();
        candidates.retain(|rustc| {
            let directory = rustc.parent().and_then(|directory| directory.canonicalize().ok());
            let new =
                rustc.is_file() && directory.as_ref().is_some_and(|directory| !seen.contains(directory));
            seen.extend(directory);
            new
        });
        candidates
    }

    /// Directories that may hold bpf-linker.
    fn linker_directories(&self) -> Vec<PathBuf> {
        self.path.iter().chain(&self.cargo_bin).cloned().collect()
    }

    pub fn linkers(&self) -> Vec<Linker> {
        linkers_in(&self.linker_directories())
    }

    /// Every compiler that qualifies, best first, and for each of the others why it does not.
    pub fn compilers(&self) -> (Vec<Compiler>, Vec<Refusal>) {
        let (mut compilers, mut refusals) = (Vec::new(), Vec::new());
        for rustc in self.candidates() {
            match probe(&rustc) {
                Ok(compiler) => compilers.push(compiler),
                Err(reason) => refusals.push(Refusal { rustc, reason: format!("{reason:#}") }),
            }
        }
        (compilers, refusals)
    }

    /// The first compiler that qualifies and whose bitcode a linker here can read.
    pub fn find(&self) -> anyhow::Result<Toolchain> {
        let linkers = self.linkers();
        let mut refusals = Vec::new();
        for rustc in self.candidates() {
            let reason = match probe(&rustc) {
                Ok(compiler) => match linkers.iter().find(|linker| linker.reads(compiler.llvm)) {
                    Some(linker) => return Ok(Toolchain { compiler, linker: linker.clone() }),
                    None if linkers.is_empty() => "qualifies, but bpf-linker is not installed".to_owned(),
                    None => format!(
                        "qualifies, but no bpf-linker here reads LLVM {} bitcode (found {})",
                        compiler.llvm,
                        linkers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                    ),
                },
                Err(reason) => format!("{reason:#}"),
            };
            refusals.push(Refusal { rustc, reason });
        }
        let looked_at: String = refusals.iter().map(|refusal| format!("\n  {refusal}")).collect();
        let wish = match &self.explicit {
            Some(explicit) => format!(" ({RUSTC_VARIABLE} asks for {})", explicit.display()),
            None => String::new(),
        };
        bail!(
            "no toolchain for the eBPF programs{wish}: run `cargo xtask setup`, which finds or installs one\n\
             looked at:{}",
            if looked_at.is_empty() { "\n  nothing: no rustc found at all" } else { &looked_at }
        )
    }
}

/// A compiler that was looked at and why it will not do.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub rustc: PathBuf,
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rustc.display(), self.reason)
    }
}

/// The toolchain this machine builds eBPF with.
pub fn find() -> anyhow::Result<Toolchain> {
    Places::of_this_machine().find()
}

/// Asks a compiler what it is and what it can do.
fn probe(rustc: &Path) -> anyhow::Result<Compiler> {
    let version = ask(rustc, &["-vV"])?;
    let field = |name: &str| {
        version.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    let release = field("release:").context("its -vV names no release")?;
    let llvm = field("LLVM version:")
        .and_then(|llvm| llvm.split('.').next()?.parse().ok())
        .context("its -vV names no LLVM version")?;
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    if minor_version(&release) < minor_version(wanted) {
        bail!("is {release}, this workspace needs {wanted} or newer");
    }

    let directories = ask(rustc, &["--print", "sysroot", "--print", "target-libdir", "--target", TARGET])?;
    let mut directories = directories.lines().map(PathBuf::from);
    let (Some(sysroot), Some(libdir)) = (directories.next(), directories.next()) else {
        bail!("does not say where its libraries are");
    };
    let behind_proxy = sysroot.join("bin/rustc");
    let rustc = if behind_proxy.exists() { behind_proxy } else { rustc.to_owned() };
    let cargo = rustc.with_file_name("cargo");
    if !cargo.exists() {
        bail!("has no cargo beside it");
    }

    let has_core = libdir.read_dir().is_ok_and(|mut entries| {
        entries.any(|entry| {
            entry.is_ok_and(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with("libcore-") && name.ends_with(".rlib")
            })
        })
    });
    let core = if has_core {
        Core::Prebuilt
    } else if sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists() {
        Core::BuildStd
    } else {
        bail!("is {release}, with neither a core library for {TARGET} nor rust-src");
    };
    Ok(Compiler { nightly: release.contains("nightly"), rustc, cargo, core, release, llvm })
}

/// (1, 95) of "1.95.0-nightly"; what cannot be read sorts below everything.
fn minor_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn ask(rustc: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(rustc)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("does not run ({})", arguments.join(" ")))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "does not answer {}: {}",
            arguments.join(" "),
            complaint.lines().next().unwrap_or("no reason given")
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
#[path = "toolchain_tests.rs"]
mod tests;
