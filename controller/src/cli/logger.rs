//! Log lines on standard error: time, level, message.

use std::io::Write as _;
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};

use crate::observe::time::rfc3339;

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What netlink's crates have to say is for their authors.
        metadata.target().starts_with("portcullis") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{} {:5} {}\n", rfc3339(SystemTime::now()), record.level(), record.args());
            // One write, so that lines of several threads do not mix; a closed standard error ends nothing.
            let _ = std::io::stderr().lock().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

static STDERR: Stderr = Stderr;

/// Starts logging. Calling it again changes the level only.
pub fn init(level: LevelFilter) {
    let _ = log::set_logger(&STDERR);
    log::set_max_level(level);
}
