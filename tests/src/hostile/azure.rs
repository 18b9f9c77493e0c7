//! Azure's JSON: what `import` is given, and the file of service tags.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};
use portcullis::compile::{HostFacts, Ownership, Registry, compile};
use portcullis::policy;
use portcullis::policy::import::{self, Input, Options, TagFile};

/// Reads the bytes as an export of Azure's and as its tag file. A policy that comes of it is in order: the import promises
/// that, and calls anything else a defect.
///
/// # Panics
/// If it is not, or if something is refused without a word.
pub fn azure(bytes: &[u8]) {
    let input = Input { name: "fuzz.json".to_owned(), bytes: bytes.to_vec() };
    // The tag file of a policy is named by its path, and this one has none: it is read for itself.
    tag_file(bytes);
    match import::import(&[input], &Options::default()) {
        Ok(imported) => {
            let loaded = policy::parse("imported.yaml", &imported.yaml)
                .unwrap_or_else(|findings| panic!("{findings}\n{}", imported.yaml));
            let facts = HostFacts::default();
            compile(&loaded.network, &facts, &mut Registry::default(), &Ownership::default(), 1)
                .unwrap_or_else(|errors| panic!("{errors:?}\n{}", imported.yaml));
        }
        Err(why) => assert!(!why.is_empty(), "refused without a word"),
    }
}

/// The bytes as a file that lives in memory.
fn tag_file(bytes: &[u8]) {
    let mut file = File::from(memfd_create(c"tags", MFdFlags::MFD_CLOEXEC).expect("room for a file"));
    file.write_all(bytes).expect("memory takes it");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if let Err(why) = TagFile::read(&path, "tags.json".to_owned()) {
        assert!(!why.is_empty(), "refused without a word");
    }
}
