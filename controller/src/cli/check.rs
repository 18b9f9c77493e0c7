//! `check`: is a policy in order? Reads files and computes, no more.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::output::out;
use super::{BAD_INPUT, DONE, OutputFormat};
use crate::compile::{self, HostFacts, Ownership, Registry};
use crate::policy::{self, Diagnostics};

/// Checks files and prints what was found; the exit code.
pub fn check(files: &[PathBuf], format: OutputFormat) -> u8 {
    let all: Vec<Diagnostics> = files.iter().map(|file| findings(file)).collect();
    let code = if all.iter().any(Diagnostics::has_errors) { BAD_INPUT } else { DONE };
    match format {
        OutputFormat::Json => {
            let (errors, warnings) = all
                .iter()
                .map(Diagnostics::counts)
                .fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1));
            let files: Vec<_> = all.iter().map(Diagnostics::to_json).collect();
            out(&super::output::json(&json!({ "errors": errors, "warnings": warnings, "files": files })));
        }
        OutputFormat::Table => {
            for findings in &all {
                out(&findings.render(false));
                if !findings.has_errors() {
                    out(&format!("{}: in order\n", findings.file()));
                }
            }
        }
    }
    code
}

/// Everything that can be said of a policy without looking at a host: what the file says, and whether it fits into
/// the tables on a host with the kernel's default port range.
fn findings(file: &Path) -> Diagnostics {
    let loaded = match policy::load(file) {
        Ok(loaded) => loaded,
        Err(findings) => return findings,
    };
    let compiled = compile::compile(
        &loaded.network,
        &HostFacts::default(),
        &mut Registry::default(),
        &Ownership::default(),
        1,
    );
    match compiled {
        Ok(_) => loaded.warnings,
        Err(errors) => crate::daemon::explain_compile_errors(&loaded, &errors),
    }
}
