//! The finder against toolchains made of shell scripts.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicU32, Ordering},
};

use super::*;

/// A directory of its own for one test, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("portcullis-xtask-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a scratch directory");
        Self(path)
    }

    fn script(&self, path: &str, body: &str) -> PathBuf {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("the script's directory");
        // Written under another name and moved: a parallel test that forks while the file is open for writing would
        // make the kernel refuse to execute it (ETXTBSY).
        let draft = path.with_extension("draft");
        fs::write(&draft, format!("#!/bin/sh\n{body}\n")).expect("the script");
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).expect("the script's mode");
        let copied = std::process::Command::new("cp").arg("-p").arg(&draft).arg(&path).status().expect("cp");
        assert!(copied.success());
        path
    }

    /// A sysroot whose rustc and cargo are scripts, with neither core nor rust-src yet.
    fn toolchain(&self, name: &str, release: &str, llvm: &str) -> PathBuf {
        let sysroot = self.0.join(name);
        let libdir = sysroot.join("lib/rustlib").join(TARGET).join("lib");
        self.script(
            &format!("{name}/bin/rustc"),
            &format!(
                "case \"$1\" in\n-vV) echo 'release: {release}'; echo 'LLVM version: {llvm}';;\n\
                 *) echo '{}'; echo '{}';;\nesac",
                sysroot.display(),
                libdir.display()
            ),
        );
        self.script(&format!("{name}/bin/cargo"), "exit 0");
        sysroot
    }

    fn touch(&self, path: &Path) {
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, "").expect("an empty file");
    }

    fn give_core(&self, sysroot: &Path) {
        self.touch(&sysroot.join("lib/rustlib").join(TARGET).join("lib/libcore-0123.rlib"));
    }

    fn give_rust_src(&self, sysroot: &Path) {
        self.touch(&sysroot.join("lib/rustlib/src/rust/library/Cargo.lock"));
    }

    /// Looks only into this directory's `path` and `rustup`, with a linker in `cargo/bin`.
    fn places(&self) -> Places {
        Places {
            rustup_home: Some(self.0.join("rustup")),
            cargo_bin: vec![self.0.join("cargo/bin")],
            ..Places::default()
        }
    }

    fn linker(&self) {
        self.script("cargo/bin/bpf-linker", "echo bpf-linker 0.13.0");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_nightly_with_neither_core_nor_rust_src_is_refused_and_the_reason_told() {
    let scratch = Scratch::new();
    scratch.linker();
    scratch.toolchain("rustup/toolchains/nightly", "1.97.0-nightly", "22.1.4");
    let error = scratch.places().find().expect_err("nothing qualifies").to_string();
    assert!(error.contains("cargo xtask setup"), "{error}");
    assert!(error.contains("neither a core library for bpfel-unknown-none nor rust-src"), "{error}");
}

#[test]
fn a_prebuilt_core_is_preferred_over_building_it_from_rust_src() {
    let scratch = Scratch::new();
    scratch.linker();
    let sysroot = scratch.toolchain("rustup/toolchains/both", "1.96.0", "22.1.8");
    scratch.give_core(&sysroot);
    scratch.give_rust_src(&sysroot);
    let found = scratch.places().find().expect("it qualifies");
    assert_eq!(found.compiler.core, Core::Prebuilt);
    assert_eq!((found.compiler.nightly, found.compiler.llvm), (false, 22));
}

#[test]
fn rust_src_alone_qualifies() {
    let scratch = Scratch::new();
    scratch.linker();
    let sysroot = scratch.toolchain("rustup/toolchains/nightly", "1.97.0-nightly", "22.1.4");
    scratch.give_rust_src(&sysroot);
    let found = scratch.places().find().expect("it qualifies");
    assert_eq!(found.compiler.core, Core::BuildStd);
    assert!(found.compiler.nightly);
}

#[test]
fn the_compiler_on_path_wins_over_rustup_and_an_unfit_one_there_is_passed_over() {
    let scratch = Scratch::new();
    scratch.linker();
    let unfit = scratch.toolchain("unfit", "1.95.0", "22.1.2");
    let fit = scratch.toolchain("fit", "1.96.0", "22.1.8");
    let rustup = scratch.toolchain("rustup/toolchains/nightly", "1.97.0-nightly", "22.1.4");
    scratch.give_core(&fit);
    scratch.give_rust_src(&rustup);
    let places = Places { path: vec![unfit.join("bin"), fit.join("bin")], ..scratch.places() };
    assert_eq!(places.find().expect("one qualifies").compiler.rustc, fit.join("bin/rustc"));
}

#[test]
fn an_explicitly_named_compiler_that_does_not_qualify_is_an_error_even_where_another_would() {
    let scratch = Scratch::new();
    scratch.linker();
    let unfit = scratch.toolchain("unfit", "1.95.0", "22.1.2");
    let fit = scratch.toolchain("rustup/toolchains/fit", "1.96.0", "22.1.8");
    scratch.give_core(&fit);
    let places = Places { explicit: Some(unfit.join("bin/rustc")), ..scratch.places() };
    let error = places.find().expect_err("the wish cannot be met").to_string();
    assert!(error.contains(RUSTC_VARIABLE), "{error}");
}

#[test]
fn a_compiler_older_than_the_workspace_needs_is_refused() {
    let scratch = Scratch::new();
    scratch.linker();
    let old = scratch.toolchain("rustup/toolchains/old", "1.85.0", "19.1.7");
    scratch.give_core(&old);
    let error = scratch.places().find().expect_err("too old").to_string();
    assert!(error.contains("is 1.85.0, this workspace needs"), "{error}");
}

#[test]
fn a_proxy_is_resolved_to_the_compiler_behind_it() {
    let scratch = Scratch::new();
    scratch.linker();
    let real = scratch.toolchain("real", "1.96.0", "22.1.8");
    scratch.give_core(&real);
    scratch.script("proxy/rustc", &format!("exec '{}' \"$@\"", real.join("bin/rustc").display()));
    let places = Places { path: vec![scratch.0.join("proxy")], ..scratch.places() };
    assert_eq!(places.find().expect("it qualifies").compiler.rustc, real.join("bin/rustc"));
}

#[test]
fn without_bpf_linker_the_error_says_that_it_is_what_is_missing() {
    let scratch = Scratch::new();
    let sysroot = scratch.toolchain("rustup/toolchains/fit", "1.96.0", "22.1.8");
    scratch.give_core(&sysroot);
    let error = scratch.places().find().expect_err("no linker").to_string();
    assert!(error.contains("bpf-linker is not installed"), "{error}");
}

#[test]
fn a_linker_that_does_not_start_counts_as_absent() {
    let scratch = Scratch::new();
    scratch.script("cargo/bin/bpf-linker", "exit 127");
    assert_eq!(scratch.places().linkers(), []);
}
