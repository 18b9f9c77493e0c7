//! The lint against objects compiled on the spot: host objects by the C compiler (rustc needs one to link anyway),
//! BPF objects by the toolchain the finder picks.

use std::{path::PathBuf, process::Command};

use super::*;
use crate::toolchain::{self, Core, TARGET};

fn scratch(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("portcullis-lint-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a scratch directory");
    directory
}

fn host_object(name: &str, source: &str) -> Vec<u8> {
    let directory = scratch(name);
    let (c, o) = (directory.join("a.c"), directory.join("a.o"));
    std::fs::write(&c, source).expect("the source");
    let status = Command::new("cc").arg("-c").arg(&c).arg("-o").arg(&o).status().expect("a C compiler");
    assert!(status.success());
    let bytes = std::fs::read(&o).expect("the object");
    std::fs::remove_dir_all(&directory).expect("the scratch directory goes");
    bytes
}

#[test]
fn an_object_without_panics_or_undefined_symbols_passes() {
    let object = host_object("clean", "int xdp_main(void) { return 2; }");
    assert_eq!(lint(&object).expect("an object"), []);
}

#[test]
fn a_panic_function_is_flagged_by_name() {
    let object = host_object("panic", "void core_panicking_panic(void) {}");
    let findings = lint(&object).expect("an object");
    let [Finding::Panic { symbol, .. }] = &*findings else { panic!("{findings:?}") };
    assert_eq!(symbol, "core_panicking_panic");
}

#[test]
fn an_undefined_symbol_is_flagged_by_name() {
    let object = host_object("undefined", "void missing(void); void f(void) { missing(); }");
    let findings = lint(&object).expect("an object");
    assert!(findings.contains(&Finding::Undefined { symbol: "missing".to_owned() }), "{findings:?}");
}

#[test]
fn something_that_is_not_an_object_is_an_error() {
    assert!(lint(b"fn main() {}").is_err());
}

#[test]
fn the_shortest_chain_from_a_program_to_the_panic_is_told() {
    let call =
        |from: &str, to: &[&str]| (from.to_owned(), to.iter().map(|name| (*name).to_owned()).collect());
    let calls = Calls {
        programs: vec!["gw_tc".to_owned(), "gw_xdp".to_owned()],
        callees: HashMap::from([
            call("gw_xdp", &["parse", "rewrite"]),
            call("parse", &["slow"]),
            call("slow", &["parse", "panic"]),
            call("rewrite", &["panic"]),
        ]),
    };
    assert_eq!(calls.chain_to("panic"), ["gw_xdp", "rewrite", "panic"]);
    assert_eq!(calls.chain_to("unrelated"), [""; 0]);
}

/// The real thing: the verifier's most baffling rejection is caught at build time, with the program named.
#[test]
fn a_bpf_program_that_may_panic_is_named_and_its_neighbour_is_not() {
    let toolchain = toolchain::find().expect("a BPF toolchain (`cargo xtask setup`)");
    if toolchain.compiler.core == Core::BuildStd {
        // Core would have to be built first, by cargo; the finding itself does not depend on where core came from.
        return;
    }
    let directory = scratch("bpf");
    let source = directory.join("programs.rs");
    std::fs::write(
        &source,
        r#"
        #![no_std]
        #![no_main]
        #[panic_handler] fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
        static TABLE: [u32; 4] = [3, 1, 4, 1];
        #[unsafe(no_mangle)] #[unsafe(link_section = "xdp")]
        pub fn gw_sound(ctx: *const usize) -> u32 { TABLE.get(ctx as usize).copied().unwrap_or(0) }
        #[unsafe(no_mangle)] #[unsafe(link_section = "classifier")]
        pub fn gw_careless(ctx: *const usize) -> u32 { TABLE[ctx as usize] }
        "#,
    )
    .expect("the source");
    let object = directory.join("programs.o");
    let output = Command::new(&toolchain.compiler.rustc)
        .args(["--edition=2024", "--crate-type=bin", "--target", TARGET, "-Copt-level=3", "-Cpanic=abort"])
        .args(["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"])
        .arg(format!("-Clinker={}", toolchain.linker.path.display()))
        .arg("-o")
        .arg(&object)
        .arg(&source)
        .output()
        .expect("rustc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let complaint = check(&object).expect_err("gw_careless may panic").to_string();
    std::fs::remove_dir_all(&directory).expect("the scratch directory goes");
    assert!(complaint.contains("a panic is reachable from gw_careless"), "{complaint}");
    assert!(complaint.contains("panic_bounds_check"), "{complaint}");
    assert!(!complaint.contains("gw_sound"), "{complaint}");
}
