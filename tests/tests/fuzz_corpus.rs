//! What the fuzzer once found, and what it began with, replayed without it: no byte that anybody may send makes a panic or breaks
//! a promise. `fuzz/README.md` says how to look for more.

use std::fs;
use std::path::Path;

use portcullis_tests::hostile::TARGETS;

#[test]
fn every_file_of_the_fuzzers_corpus_passes_its_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let folder = root.join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        assert!(paths.len() >= 5, "{}: {} files are no corpus", folder.display(), paths.len());
        for path in paths {
            let bytes = fs::read(&path).unwrap();
            let result = std::panic::catch_unwind(|| target(&bytes));
            assert!(result.is_ok(), "{} breaks target `{name}`", path.display());
        }
    }
}
