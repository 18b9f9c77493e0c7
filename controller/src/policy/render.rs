//! Findings for people (rustc's look, by rustc's own renderer) and for programs (JSON).

use annotate_snippets::{AnnotationKind, Element, Level, Origin, Renderer, Snippet};
use serde_json::{Value, json};

use super::diagnostics::{Diagnostic, Diagnostics, Severity};
use super::source::Span;

/// A person reads the first screens; a file with more findings than this usually has one cause. JSON has them all.
const SHOWN: usize = 200;

/// Places further apart than this are shown as separate snippets: the renderer is handed all lines in between.
const NEAR: usize = 40;

struct Mark<'d> {
    lines: (usize, usize),
    span: Span,
    label: Option<&'d str>,
    primary: bool,
}

impl Diagnostics {
    /// The findings with source lines and carets, and a closing line with their number.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut out = String::new();
        for entry in self.entries().iter().take(SHOWN) {
            out.push_str(&self.render_one(entry, &renderer));
            out.push_str("\n\n");
        }
        let hidden = self.entries().len().saturating_sub(SHOWN);
        if hidden > 0 {
            out.push_str(&format!("... and {hidden} more (all of them with --output json)\n\n"));
        }
        let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
        match self.counts() {
            (0, 0) => {}
            (0, w) => out.push_str(&format!("{}: {}\n", self.file(), plural(w, "warning"))),
            (e, 0) => out.push_str(&format!("{}: {}\n", self.file(), plural(e, "error"))),
            (e, w) => {
                out.push_str(&format!("{}: {}, {}\n", self.file(), plural(e, "error"), plural(w, "warning")))
            }
        }
        out
    }

    fn render_one(&self, entry: &Diagnostic, renderer: &Renderer) -> String {
        let level = match entry.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut elements: Vec<Element<'_>> = Vec::new();
        match entry.span {
            None => elements.push(Origin::path(self.file()).into()),
            Some(span) => {
                let mut marks = vec![self.mark(span, entry.label.as_deref(), true)];
                let second = entry.secondary.iter();
                marks.extend(second.map(|label| self.mark(label.span, Some(&label.message), false)));
                elements.extend(self.snippets(marks));
            }
        }
        elements.extend(entry.help.iter().map(|text| Level::HELP.message(text.as_str()).into()));
        renderer.render(&[level.primary_title(entry.message.as_str()).elements(elements)])
    }

    fn mark<'d>(&self, span: Span, label: Option<&'d str>, primary: bool) -> Mark<'d> {
        let first = self.source.position(span.start).line;
        let last = self.source.position(span.end.max(span.start)).line;
        Mark { lines: (first, last), span, label, primary }
    }

    /// One snippet per neighbourhood; the one with the caret first, since its place heads the report.
    fn snippets<'a>(&'a self, mut marks: Vec<Mark<'a>>) -> Vec<Element<'a>> {
        let mut elements = Vec::new();
        while !marks.is_empty() {
            let head = &marks[0];
            let (mut first, mut last) = head.lines;
            let near = |m: &Mark<'_>| m.lines.0 + NEAR > head.lines.0 && m.lines.1 < head.lines.1 + NEAR;
            let (here, rest): (Vec<_>, Vec<_>) = marks.iter().partition::<Vec<&Mark<'_>>, _>(|m| near(m));
            for mark in &here {
                first = first.min(mark.lines.0);
                last = last.max(mark.lines.1);
            }
            let lines = self.source.lines(first, last);
            let mut snippet =
                Snippet::source(&self.source.text[lines.clone()]).line_start(first).path(self.file());
            for mark in &here {
                let kind = if mark.primary { AnnotationKind::Primary } else { AnnotationKind::Context };
                let start = (mark.span.start as usize).clamp(lines.start, lines.end) - lines.start;
                let end = (mark.span.end as usize).clamp(lines.start, lines.end) - lines.start;
                let annotation = kind.span(start..end);
                snippet = snippet.annotation(match mark.label {
                    Some(label) => annotation.label(label),
                    None => annotation,
                });
            }
            elements.push(snippet.into());
            let rest: Vec<_> = rest
                .iter()
                .map(|m| Mark { lines: m.lines, span: m.span, label: m.label, primary: m.primary })
                .collect();
            marks = rest;
        }
        elements
    }

    /// `{"file", "errors", "warnings", "diagnostics": [{"severity", "message", "line", "column", "endLine",
    /// "endColumn", "label", "help": [..], "related": [{"line", "column", "message"}]}]}`; places are `null` for a
    /// finding about the whole file.
    pub fn to_json(&self) -> Value {
        let (errors, warnings) = self.counts();
        let entries: Vec<Value> = self.entries().iter().map(|entry| self.entry_json(entry)).collect();
        json!({ "file": self.file(), "errors": errors, "warnings": warnings, "diagnostics": entries })
    }

    fn entry_json(&self, entry: &Diagnostic) -> Value {
        let start = entry.span.map(|span| self.source.position(span.start));
        let end = entry.span.map(|span| self.source.position(span.end.max(span.start)));
        let related: Vec<Value> = entry
            .secondary
            .iter()
            .map(|label| {
                let at = self.position_of(label.span);
                json!({ "line": at.line, "column": at.column, "message": label.message })
            })
            .collect();
        json!({
            "severity": entry.severity.word(),
            "message": entry.message,
            "line": start.map(|at| at.line),
            "column": start.map(|at| at.column),
            "endLine": end.map(|at| at.line),
            "endColumn": end.map(|at| at.column),
            "label": entry.label,
            "help": entry.help,
            "related": related,
        })
    }
}
