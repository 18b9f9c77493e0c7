//! What is wrong with a policy, where, and what to do about it.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::network::Places;
use super::source::{Position, Source, Span};

/// Does the finding stop the policy from being used?
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    Error,
    Warning,
}

impl Severity {
    /// The word that stands before the message.
    pub fn word(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// A second place that has to do with a finding.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Label {
    pub span: Span,
    pub message: String,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Diagnostic {
    pub severity: Severity,
    pub message: String,
    /// Where; `None` when it is about the file as a whole (it does not exist, say).
    pub span: Option<Span>,
    /// What to write beside the caret.
    pub label: Option<String>,
    pub secondary: Vec<Label>,
    /// What to do.
    pub help: Vec<String>,
}

impl Diagnostic {
    /// Adds what to do.
    pub fn help(&mut self, text: impl Into<String>) -> &mut Self {
        self.help.push(text.into());
        self
    }

    /// Says something beside the caret.
    pub fn label(&mut self, text: impl Into<String>) -> &mut Self {
        self.label = Some(text.into());
        self
    }

    /// Shows a second place. Two uses of one aliased value are shown as the two aliases.
    pub fn also(&mut self, mut span: Span, text: impl Into<String>) -> &mut Self {
        if let Some(primary) = self.span
            && (primary.start, primary.end) == (span.start, span.end)
        {
            self.span = Some(primary.as_used());
            span = span.as_used();
        }
        self.secondary.push(Label { span, message: text.into() });
        self
    }
}

/// Collects findings while a policy is read.
#[derive(Debug, Default)]
pub struct Problems {
    entries: Vec<Diagnostic>,
}

impl Problems {
    /// Reports an error; the returned finding can be given a label, second places and help.
    pub fn error(&mut self, span: Span, message: impl Into<String>) -> &mut Diagnostic {
        self.push(Severity::Error, Some(span), message.into())
    }

    /// Reports something that is allowed but hardly meant.
    pub fn warning(&mut self, span: Span, message: impl Into<String>) -> &mut Diagnostic {
        self.push(Severity::Warning, Some(span), message.into())
    }

    /// Reports an error about the whole file.
    pub fn file_error(&mut self, message: impl Into<String>) -> &mut Diagnostic {
        self.push(Severity::Error, None, message.into())
    }

    fn push(&mut self, severity: Severity, span: Option<Span>, message: String) -> &mut Diagnostic {
        self.entries.push(Diagnostic {
            severity,
            message,
            span,
            label: None,
            secondary: Vec::new(),
            help: Vec::new(),
        });
        let last = self.entries.len() - 1;
        &mut self.entries[last]
    }

    /// Takes over the findings of another reader.
    pub fn absorb(&mut self, other: Problems) {
        self.entries.extend(other.entries);
    }

    /// Has an error been reported?
    pub fn has_errors(&self) -> bool {
        self.entries.iter().any(|entry| entry.severity == Severity::Error)
    }

    /// All findings in the order of the file, each once: a mistake inside an anchor is found at every alias.
    pub fn finish(self, source: &Arc<Source>) -> Diagnostics {
        let mut seen = HashSet::new();
        let key = |d: &Diagnostic| (d.severity, d.span.map(|s| (s.start, s.end)), d.message.clone());
        let mut entries: Vec<_> = self.entries.into_iter().filter(|entry| seen.insert(key(entry))).collect();
        entries.sort_by_key(|entry| entry.span.map(|span| span.start));
        Diagnostics { source: Arc::clone(source), entries }
    }
}

/// The findings of one file. `Display` renders them as rustc does, without colour; see `render` and `to_json`.
#[derive(Debug, Clone)]
pub struct Diagnostics {
    pub(super) source: Arc<Source>,
    entries: Vec<Diagnostic>,
}

impl Diagnostics {
    /// No findings, for a file that later stages may still find something in (see `error_at`).
    pub(super) fn none(source: &Arc<Source>) -> Self {
        Self { source: Arc::clone(source), entries: Vec::new() }
    }

    /// The file's name as it was given.
    pub fn file(&self) -> &str {
        &self.source.name
    }

    /// All findings in the order of the file.
    pub fn entries(&self) -> &[Diagnostic] {
        &self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn has_errors(&self) -> bool {
        self.entries.iter().any(|entry| entry.severity == Severity::Error)
    }

    /// Number of errors and of warnings.
    pub fn counts(&self) -> (usize, usize) {
        let errors = self.entries.iter().filter(|entry| entry.severity == Severity::Error).count();
        (errors, self.entries.len() - errors)
    }

    /// Line and column of a finding.
    pub fn position(&self, entry: &Diagnostic) -> Option<Position> {
        entry.span.map(|span| self.source.position(span.start))
    }

    /// Line and column of a span, for the second places of a finding.
    pub fn position_of(&self, span: Span) -> Position {
        self.source.position(span.start)
    }

    /// Splits off the warnings.
    pub(super) fn warnings(mut self) -> Self {
        self.entries.retain(|entry| entry.severity == Severity::Warning);
        self
    }

    /// Adds an error that a later stage (compile, plan) found, at a place that `Places` knows; about the whole file
    /// when it does not.
    pub fn error_at(
        &mut self,
        places: &Places,
        path: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let span = places.get(path).map(|(_, line, column)| {
            let at = Position { line: *line, column: *column };
            let start = self.source.offset(at);
            let rest = &self.source.text[start..];
            let word = rest.find(|c: char| c.is_whitespace() || ",]}".contains(c)).unwrap_or(rest.len());
            Span::new(start, start + word)
        });
        self.entries.push(Diagnostic {
            severity: Severity::Error,
            message: message.into(),
            span,
            label: None,
            secondary: Vec::new(),
            help: vec![help.into()],
        });
        self.entries.sort_by_key(|entry| entry.span.map(|span| span.start));
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}
