//! Finds bpf-linker and tells which LLVM it was built with.
//!
//! rustc hands bpf-linker LLVM bitcode, and LLVM reads bitcode of its own and older versions only. A linker older
//! than the compiler therefore fails late and obscurely ("Unknown attribute kind"), so the finder pairs them.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use object::{Object as _, ObjectSection as _};

/// A bpf-linker that runs on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linker {
    pub path: PathBuf,
    /// LLVM's major version, or `None` where LLVM is linked in statically and nothing tells.
    pub llvm: Option<u32>,
}

impl Linker {
    /// Whether it can read what a compiler with this LLVM writes. A static one is given the benefit of the doubt.
    pub fn reads(&self, compiler_llvm: u32) -> bool {
        self.llvm.is_none_or(|own| own >= compiler_llvm)
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.llvm {
            Some(llvm) => write!(f, "{} (LLVM {llvm})", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

/// Every bpf-linker in these directories that starts; one whose shared LLVM was uninstalled does not, and counts as
/// absent.
pub fn linkers_in(directories: &[PathBuf]) -> Vec<Linker> {
    let mut found: Vec<Linker> = Vec::new();
    for directory in directories {
        let path = directory.join("bpf-linker");
        if !path.is_file() || found.iter().any(|known| known.path == path) || !starts(&path) {
            continue;
        }
        let llvm = llvm_of(&path);
        found.push(Linker { path, llvm });
    }
    found
}

fn starts(linker: &Path) -> bool {
    Command::new(linker)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// LLVM's version from the name of the shared library the executable asks for.
fn llvm_of(executable: &Path) -> Option<u32> {
    let bytes = std::fs::read(executable).ok()?;
    let file = object::File::parse(&*bytes).ok()?;
    let names = file.section_by_name(".dynstr")?.data().ok()?;
    names.split(|byte| *byte == 0).find_map(|name| llvm_in_soname(std::str::from_utf8(name).ok()?))
}

/// `libLLVM.so.22.1` since LLVM 19, `libLLVM-18.so.1` before.
fn llvm_in_soname(name: &str) -> Option<u32> {
    let rest = name.strip_prefix("libLLVM.so.").or_else(|| name.strip_prefix("libLLVM-"))?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_version_is_read_from_either_form_of_the_library_name() {
        assert_eq!(llvm_in_soname("libLLVM.so.22.1"), Some(22));
        assert_eq!(llvm_in_soname("libLLVM-18.so.1"), Some(18));
        assert_eq!(llvm_in_soname("libc.so.6"), None);
    }

    #[test]
    fn a_linker_reads_bitcode_of_its_own_and_older_llvm_but_not_of_newer() {
        let linker = Linker { path: PathBuf::from("bpf-linker"), llvm: Some(22) };
        assert!(linker.reads(21) && linker.reads(22));
        assert!(!linker.reads(23));
        assert!(Linker { llvm: None, ..linker }.reads(23));
    }
}
