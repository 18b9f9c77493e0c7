//! `import`: Azure's JSON becomes a policy. The policy goes to a file or to standard output, what could not be carried
//! over to standard error.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::output::{err, json as to_json, out};
use super::table::Table;
use super::{BAD_INPUT, DONE, FAILED, ImportArguments, NOT_CARRIED_OVER, OutputFormat, WIDER};
use crate::compile::{self, HostFacts, Ownership, Registry};
use crate::policy::import::report::{Level, Report};
use crate::policy::import::{self, Imported, Input, MAX_BYTES, Options, TagFile};
use crate::policy::{self, Diagnostics};

/// Imports; the exit code.
pub fn import(arguments: &ImportArguments, format: OutputFormat) -> u8 {
    match run(arguments, format) {
        Ok(code) => code,
        Err((code, message)) => {
            err(&format!("error: {message}\n"));
            code
        }
    }
}

type Failure = (u8, String);

fn run(arguments: &ImportArguments, format: OutputFormat) -> Result<u8, Failure> {
    let bad = |message: String| (BAD_INPUT, message);
    let target = (arguments.to != Path::new("-")).then_some(arguments.to.as_path());
    let mut inputs = Vec::new();
    for file in &arguments.files {
        let name = file.display().to_string();
        let bytes = read(file).map_err(|error| bad(format!("cannot read {name}: {error}")))?;
        inputs.push(Input { name, bytes });
    }
    let tag_file = match &arguments.service_tags {
        Some(file) => {
            let written =
                seen_from(target, file).map_err(|error| bad(format!("{}: {error}", file.display())))?;
            Some(TagFile::read(file, written).map_err(bad)?)
        }
        None => None,
    };
    let options = Options {
        device_prefix: arguments.device_prefix.clone(),
        uplink: arguments.uplink.clone(),
        tag_file,
    };
    let imported = import::import(&inputs, &options).map_err(bad)?;
    verify(&imported.yaml, target)?;
    let report = match format {
        OutputFormat::Table => text(&imported),
        OutputFormat::Json => to_json(&json!({
            "found": imported.found,
            "notes": imported.report.count(Level::Note),
            "warnings": imported.report.count(Level::Warning),
            "errors": imported.report.count(Level::Error),
            "items": imported.report.items,
            "ignored": imported.report.ignored,
        })),
    };
    let failed =
        |path: &Path, error: std::io::Error| (FAILED, format!("cannot write {}: {error}", path.display()));
    if let Some(path) = &arguments.report {
        std::fs::write(path, &report).map_err(|error| failed(path, error))?;
    }
    match target {
        Some(path) => write(path, &imported.yaml).map_err(|error| failed(path, error))?,
        None => out(&imported.yaml),
    }
    err(&report);
    Ok(code(&imported.report))
}

/// What the worst finding means for a script.
fn code(report: &Report) -> u8 {
    match report.worst() {
        Level::Note => DONE,
        Level::Warning => NOT_CARRIED_OVER,
        Level::Error => WIDER,
    }
}

fn read(file: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reader: Box<dyn Read> = match file == Path::new("-") {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(std::fs::File::open(file)?),
    };
    // One byte more than `import` takes; the path may be a device without an end.
    reader.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a new policy, and replaces none: somebody may have worked on it.
fn write(path: &Path, yaml: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| {
        match error.kind() {
            ErrorKind::AlreadyExists => {
                std::io::Error::new(error.kind(), "it exists already; name another file, or remove it")
            }
            _ => error,
        }
    })?;
    file.write_all(yaml.as_bytes())
}

/// How a policy written to `target` names a file: relative to its folder where the file is below that, else absolute.
fn seen_from(target: Option<&Path>, file: &Path) -> std::io::Result<String> {
    let absolute = std::fs::canonicalize(file)?;
    let folder = match target.and_then(Path::parent) {
        Some(parent) if !parent.as_os_str().is_empty() => std::fs::canonicalize(parent)?,
        _ => std::fs::canonicalize(".")?,
    };
    let named: PathBuf = absolute.strip_prefix(&folder).map(Path::to_path_buf).unwrap_or(absolute.clone());
    named.to_str().map(str::to_owned).ok_or_else(|| std::io::Error::other("its path is not UTF-8"))
}

/// The result is checked as `check` does before anybody sees it.
fn verify(yaml: &str, target: Option<&Path>) -> Result<(), Failure> {
    let name = target.map_or_else(|| "policy.yaml".to_owned(), |path| path.display().to_string());
    let broken = |findings: Diagnostics| {
        let help = "this is a defect of the import: please report it with the input";
        (
            FAILED,
            format!("the policy made of the input is not in order ({help}):\n{}", findings.render(false)),
        )
    };
    let loaded = policy::parse(&name, yaml).map_err(broken)?;
    let compiled = compile::compile(
        &loaded.network,
        &HostFacts::default(),
        &mut Registry::default(),
        &Ownership::default(),
        1,
    );
    match compiled {
        Ok(_) => Ok(()),
        Err(errors) => Err(broken(crate::daemon::explain_compile_errors(&loaded, &errors))),
    }
}

/// The report as a table, the gravest first.
fn text(imported: &Imported) -> String {
    let found: Vec<String> = imported.found.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let report = &imported.report;
    let mut table = Table::new(&["LEVEL", "RESOURCE", "PROPERTY", "WHY", "WHAT TO DO", "WHERE"]);
    let mut items: Vec<_> = report.items.iter().collect();
    items.sort_by_key(|item| std::cmp::Reverse(item.level));
    for item in items {
        let place = format!("{} {}", item.file, item.path).trim().to_owned();
        let cells = [item.level.word(), &item.resource, &item.property, &item.why, &item.what_to_do, &place];
        table.row(cells.map(printable));
    }
    format!(
        "read {}\n{}{} not carried over, {} of them may let through what Azure did not; {} notes\n",
        found.join(", "),
        table.render("everything was carried over"),
        report.count(Level::Warning) + report.count(Level::Error),
        report.count(Level::Error),
        report.count(Level::Note),
    )
}

/// Text of the input on a terminal: no escape sequences.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
