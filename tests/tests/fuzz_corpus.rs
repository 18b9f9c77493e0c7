//! What the fuzzer once found, and what it began with, replayed without it: no byte that anybody may send makes a panic or breaks
//! a promise. `fuzz/README.md` says how to look for more.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use portcullis_tests::hostile::TARGETS;
use portcullis_tests::random::Random;

/// Changed files that each target is given; `PORTCULLIS_MUTATE_SECONDS` asks for as many as that time allows instead.
const MUTATIONS: u64 = 300;

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = files
        .map(|file| file.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{}: {} files are no corpus", folder.display(), files.len());
    files
}

#[test]
fn every_file_of_the_fuzzers_corpus_passes_its_target() {
    for (name, target) in TARGETS {
        for (path, bytes) in corpus(name) {
            let result = std::panic::catch_unwind(|| target(&bytes));
            assert!(result.is_ok(), "{path} breaks target `{name}`");
        }
    }
}

/// The bytes with a few things done to them that people and networks do not do.
fn mutated(random: &mut Random, files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = files[random.below(files.len())].1.clone();
    for _ in 0..1 + random.below(6) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = [0, 0xff, 0x7f, 0x80, b'9', b'"', b'\n'][random.below(7)],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let other = &files[random.below(files.len())].1;
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => bytes.insert(at, random.next() as u8),
        }
    }
    bytes
}

#[test]
fn what_the_corpus_becomes_when_it_is_damaged_passes_its_target_too() {
    let seconds = std::env::var("PORTCULLIS_MUTATE_SECONDS").ok().and_then(|n| n.parse().ok());
    let seed = if seconds.is_some() { u64::from(std::process::id()) << 20 | 1 } else { 1 };
    for (name, target) in TARGETS {
        let files = corpus(name);
        let mut random = Random(seed);
        let began = Instant::now();
        let mut number = 0;
        let goes_on = |number| match seconds {
            Some(seconds) => began.elapsed() < Duration::from_secs(seconds),
            None => number < MUTATIONS,
        };
        while goes_on(number) {
            number += 1;
            let bytes = mutated(&mut random, &files);
            let result = std::panic::catch_unwind(|| target(&bytes));
            if result.is_err() {
                let file = std::env::temp_dir().join(format!("pc-{name}-{seed:x}-{number}"));
                fs::write(&file, &bytes).unwrap();
                panic!("{} breaks target `{name}`", file.display());
            }
        }
        println!("{name}: {number} inputs, seed {seed:#x}");
    }
}
