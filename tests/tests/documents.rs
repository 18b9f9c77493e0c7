//! The documents name tests as evidence; every one of them must exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file below.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Names of all functions marked as tests.
fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    for room in ["controller", "dataplane-common", "tests/src", "tests/tests", "xtask"] {
        sources(&root().join(room), &mut files);
    }
    let mut names = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let mut marked = false;
        for line in text.lines().map(str::trim) {
            marked |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            let function = line.strip_prefix("fn ").or_else(|| line.strip_prefix("async fn "));
            if let (true, Some(function)) = (marked, function) {
                names.extend(function.split('(').next().map(str::to_owned));
                marked = false;
            }
        }
    }
    names
}

/// Words in backticks that read like a test's name: a sentence of small letters with underscores.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|word| {
        word.matches('_').count() >= 4
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    })
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let tests = tests();
    assert!(tests.len() > 300, "{} tests found", tests.len());
    let mut named = 0;
    for document in [
        "docs/azure-nsg.md",
        "docs/azure-outbound.md",
        "docs/deviations.md",
        "docs/performance.md",
        "docs/operations.md",
        "docs/pitfalls.md",
        "docs/rfc-compliance.md",
    ] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for sentence in sentences(&text) {
            assert!(tests.contains(sentence), "{document} names `{sentence}`, which is no test");
            named += 1;
        }
    }
    assert!(named > 100, "{named} tests named");
}
