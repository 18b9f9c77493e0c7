//! Inputs of the import tests, and the check that every result has to pass.
#![allow(dead_code, reason = "each test file uses its part of it")]

use std::path::{Path, PathBuf};

use portcullis::compile::{self, HostFacts, Ownership, Registry};
use portcullis::policy::import::report::{Item, Level};
use portcullis::policy::import::{Imported, Input, Options, import};
use portcullis::policy::{self, Loaded};
use serde_json::Value;

/// A folder of real inputs; nothing, with a reason printed, where it is absent.
pub fn data(folder: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(folder);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

/// Every JSON file of a folder, by name.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap()))
        .collect();
    all.sort();
    all
}

pub fn run(name: &str, bytes: &[u8]) -> Result<Imported, String> {
    with(name, bytes, &Options::default())
}

pub fn with(name: &str, bytes: &[u8], options: &Options) -> Result<Imported, String> {
    import(&[Input { name: name.to_owned(), bytes: bytes.to_vec() }], options)
}

/// Imports a value that must be importable, and checks the result.
pub fn imported(value: &Value) -> (Imported, Loaded) {
    let imported = run("input.json", value.to_string().as_bytes()).unwrap();
    let loaded = checked("input.json", &imported.yaml);
    (imported, loaded)
}

/// What `portcullis check` does.
pub fn checked(name: &str, yaml: &str) -> Loaded {
    let loaded =
        policy::parse("policy.yaml", yaml).unwrap_or_else(|findings| panic!("{name}: {findings}\n{yaml}"));
    let (facts, ownership) = (HostFacts::default(), Ownership::default());
    if let Err(errors) = compile::compile(&loaded.network, &facts, &mut Registry::default(), &ownership, 1) {
        panic!("{name}: {errors:?}\n{yaml}");
    }
    loaded
}

pub fn at_level(imported: &Imported, level: Level) -> Vec<&Item> {
    imported.report.items.iter().filter(|item| item.level == level).collect()
}
