//! `portcullis check` as a person runs it: no root, no kernel, exit codes that mean something.

use std::path::Path;
use std::process::Command;

fn check(file: &Path) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_portcullis")).arg("check").arg(file).output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn every_wrong_policy_ends_with_exit_code_2_and_shows_file_line_and_caret() {
    let mut seen = 0;
    for entry in std::fs::read_dir("tests/policies").unwrap() {
        let file = entry.unwrap().path();
        let (code, text) = check(&file);
        assert_eq!(code, Some(2), "{}: {text}", file.display());
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(text.contains(&format!("{name}:")), "{name}: its name and line are shown: {text}");
        assert!(text.contains('^'), "{name}: a caret: {text}");
        assert!(text.contains("help"), "{name}: what to do: {text}");
        seen += 1;
    }
    assert!(seen >= 18, "{seen} wrong policies");
}

#[test]
fn the_examples_end_with_exit_code_0() {
    for file in ["../examples/quickstart.yaml", "../examples/minimal.yaml", "../examples/two-networks.yaml"] {
        let (code, text) = check(Path::new(file));
        assert_eq!(code, Some(0), "{file}: {text}");
    }
}
