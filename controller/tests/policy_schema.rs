//! The committed JSON Schema is the one the code generates, and every example is a policy without a finding.

use std::path::{Path, PathBuf};

use portcullis::policy;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn examples() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(repository().join("examples")).expect("examples/ exists");
    let paths = entries.map(|entry| entry.expect("a readable directory").path());
    let examples: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "yaml")).collect();
    assert!(examples.len() >= 2, "{examples:?}");
    examples
}

#[test]
fn the_committed_schema_is_the_generated_one() {
    let path = repository().join("docs/policy.schema.json");
    let generated = policy::json_schema();
    if std::env::var_os("PORTCULLIS_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("docs/ is writable");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "docs/policy.schema.json is not what the code generates: run this test with PORTCULLIS_BLESS=1 and commit the result"
    );
}

#[test]
fn every_example_is_accepted_without_a_warning() {
    for path in examples() {
        match policy::load(&path) {
            Ok(loaded) => assert!(loaded.warnings.is_empty(), "{}", loaded.warnings),
            Err(findings) => panic!("{findings}"),
        }
    }
}
