//! Printing that survives a closed pipe.

use std::io::{ErrorKind, Write, stderr, stdout};

use serde::Serialize;

use super::{FAILED, OutputFormat};

/// Prints to standard output. If nobody reads any more (`portcullis flows | head`) the program ends, quietly.
pub fn out(text: &str) {
    let mut stdout = stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            err(&format!("error: cannot write the answer: {error}\n"));
            std::process::exit(i32::from(FAILED));
        }
        Ok(()) => {}
    }
}

/// Prints to standard error, if it can be.
pub fn err(text: &str) {
    let _ = stderr().lock().write_all(text.as_bytes());
}

/// Prints an answer as asked for.
pub fn answer<T: Serialize>(format: OutputFormat, answer: &T, text: impl Fn(&T) -> String) {
    match format {
        OutputFormat::Table => out(&text(answer)),
        OutputFormat::Json => out(&json(answer)),
    }
}

/// The answer as indented JSON.
pub fn json<T: Serialize>(answer: &T) -> String {
    match serde_json::to_string_pretty(answer) {
        Ok(mut text) => {
            text.push('\n');
            text
        }
        Err(error) => format!("{{\"error\": \"cannot be written as JSON: {error}\"}}\n"),
    }
}

/// Prints an error; the exit code to end with.
pub fn fail(error: &anyhow::Error) -> u8 {
    err(&format!("error: {error:#}\n"));
    FAILED
}
