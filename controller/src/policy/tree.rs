//! YAML to a tree of places.
//!
//! serde's derive stops at the first unknown field or wrong type; an operator wants all of a file's mistakes at once.
//! So YAML is read into this tree, which accepts anything, and `fields` takes it apart and collects what is wrong.
//! Only broken YAML syntax is reported alone: behind it nothing can be told.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Error, Spanned};

use super::diagnostics::Problems;
use super::plain;
use super::source::{Position, Source, Span};

/// 200 groups of 4,000 rules written out are about 200 MB; more than this is not a policy.
pub const MAX_BYTES: usize = 512 * 1024 * 1024;
const MAX_NODES: usize = 32_000_000;
/// What aliases may add in total. A list of 250 prefixes can be used by 1,000 rules; a bomb ends here.
const MAX_REPLAYED: usize = 250_000;
/// The policy's own shape is 8 deep.
const MAX_DEPTH: usize = 32;

/// A YAML node with its place.
#[derive(Debug)]
pub struct Node<'s> {
    pub span: Span,
    pub value: Value<'s>,
}

#[derive(Debug)]
pub enum Value<'s> {
    Null,
    /// A number or boolean by YAML's rules, as it is written. `0x10` and `yes` are in here too.
    Bare(&'s str),
    /// Any other text, quoted or not.
    Text(Cow<'s, str>),
    List(Vec<Node<'s>>),
    Map(Vec<(Node<'s>, Node<'s>)>),
}

impl<'s> Node<'s> {
    /// The text of a scalar.
    pub fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Bare(text) => Some(text),
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// What this is, in the reader's words.
    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bare(_) | Value::Text(_) => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }

    /// A place to point at: a scalar itself, of a collection its first scalar (in block style it has no sign of its own).
    pub fn head(&self) -> Span {
        match &self.value {
            Value::Map(entries) => entries.first().map_or(self.span, |(key, _)| key.head()),
            Value::List(items) => items.first().map_or(self.span, Node::head),
            _ => self.span,
        }
    }

    /// Scalars that YAML took for numbers or booleans arrive without their spelling; it is in the source.
    fn spell(&mut self, source: &'s str) {
        match &mut self.value {
            Value::Bare(text) => *text = &source[self.span.start as usize..self.span.end as usize],
            Value::List(items) => items.iter_mut().for_each(|item| item.spell(source)),
            Value::Map(entries) => entries.iter_mut().for_each(|(key, value)| {
                key.spell(source);
                value.spell(source);
            }),
            Value::Null | Value::Text(_) => {}
        }
    }
}

fn node(spanned: Spanned<Value<'_>>) -> Node<'_> {
    let range = |location: serde_saphyr::Location| {
        let span = location.span();
        let start = span.byte_offset().unwrap_or(0) as u32;
        (start, start + span.byte_len().unwrap_or(0) as u32)
    };
    let (start, end) = range(spanned.defined);
    let used = range(spanned.referenced);
    Node { span: Span { start, end, used }, value: spanned.value }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Anything)
    }
}

struct Anything;

impl<'de> Visitor<'de> for Anything {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_i128<E>(self, _: i128) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_u128<E>(self, _: u128) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Value::Bare(""))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Value::Null)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(node(item));
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = access.next_entry()? {
            entries.push((node(key), node(value)));
        }
        Ok(Value::Map(entries))
    }
}

/// Reads the source; on broken YAML reports it and returns nothing.
pub fn read<'s>(source: &'s Source, problems: &mut Problems) -> Option<Node<'s>> {
    if source.text.len() > MAX_BYTES {
        let message = format!("the file is larger than {} MiB", MAX_BYTES >> 20);
        problems.file_error(message).help("a policy is far smaller: is this the right file?");
        return None;
    }
    if let Some(root) = plain::read(&source.text) {
        return Some(root);
    }
    match parse(&source.text) {
        Ok(root) => Some(root),
        Err(error) => {
            report(&error, source, problems);
            None
        }
    }
}

/// Reads any YAML.
pub(super) fn parse(text: &str) -> Result<Node<'_>, Error> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 4 * MAX_NODES,
            max_nodes: MAX_NODES,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_total_scalar_bytes: MAX_BYTES,
            max_aliases: 100_000,
            max_anchors: 100_000,
            max_recorded_anchor_events: 4 * MAX_REPLAYED,
            // One anchor used by every rule is a normal way to write a policy; what it may cost is limited below.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_REPLAYED,
            max_replay_stack_depth: MAX_DEPTH,
        },
        // Long runs of comment lines count against a small budget otherwise.
        emit_comments: false,
        // Both places are shown by `fields`.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let mut root = node(serde_saphyr::from_str_with_options::<Spanned<Value<'_>>>(text, options)?);
    root.spell(text);
    Ok(root)
}

/// Turns the parser's error into a finding that says what to do.
fn report(error: &Error, source: &Source, problems: &mut Problems) {
    let span = match error.location() {
        Some(at) if at.line() > 0 => {
            source.span_at(Position { line: at.line() as usize, column: at.column() as usize })
        }
        _ => Span::default(),
    };
    // An error found behind an alias comes wrapped in the alias' place.
    let error = match error.without_snippet() {
        Error::AliasError { error, .. } => error.without_snippet(),
        error => error,
    };
    let text = error.to_string();
    let text = text.find(" at line ").map_or(text.as_str(), |end| &text[..end]);
    match error {
        Error::AliasReplayCounterOverflow { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => alias_bomb(span, problems),
        Error::Budget { breach, .. } => match breach {
            BudgetBreach::Aliases { .. }
            | BudgetBreach::Anchors { .. }
            | BudgetBreach::MergeKeys { .. }
            | BudgetBreach::RecordedAnchorEvents { .. }
            | BudgetBreach::RecordedAnchorBytes { .. } => alias_bomb(span, problems),
            BudgetBreach::Depth { .. } => too_deep(span, problems),
            _ => {
                let help = "split the policy, or check that this is the right file";
                problems.error(span, format!("the policy is too large: {text}")).help(help);
            }
        },
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            problems.error(span, "an alias contains itself").help("write the value out");
        }
        Error::MultipleDocuments { .. } => {
            let help = "keep one policy per file and remove this `---` and what follows";
            problems.error(span, "a second YAML document begins here").help(help);
        }
        Error::UnsupportedTag { .. } => {
            problems.error(span, text).help("a policy needs no YAML tags: remove it");
        }
        _ if text.contains("recursion limit") => too_deep(span, problems),
        _ => {
            let found = problems.error(span, format!("not valid YAML: {text}"));
            if let Some(help) = syntax_help(source, span, text) {
                found.help(help);
            }
        }
    }
}

fn alias_bomb(span: Span, problems: &mut Problems) {
    let message = format!("YAML aliases expand to too much here (limit: {MAX_REPLAYED} nodes in a file)");
    problems
        .error(span, message)
        .help("aliases of aliases multiply: write the values out, or have one level of `*name` only");
}

fn too_deep(span: Span, problems: &mut Problems) {
    let message = format!("nested deeper than {MAX_DEPTH} levels");
    problems.error(span, message).help("no part of a policy is nested this deep: check the brackets");
}

/// What people usually did when the parser says what it says.
fn syntax_help(source: &Source, span: Span, text: &str) -> Option<String> {
    let at = source.position(span.start);
    let line = &source.text[source.lines(at.line, at.line)];
    let before: String = line.chars().take(at.column).collect();
    if before.ends_with('*') && text.contains("anchor or alias") {
        return Some("in YAML a bare `*` begins an alias: quote it, '*'".to_owned());
    }
    if text.contains("unknown anchor") {
        return Some(
            "no `&name` before this place defines it; a `*` that is meant literally needs quotes: '*'"
                .to_owned(),
        );
    }
    let indents_with_tab = |line: &str| line.trim_start_matches(' ').starts_with('\t');
    let next = source.lines(at.line, (at.line + 1).min(source.line_count()));
    if text.contains("tab") || source.text[next].lines().any(indents_with_tab) {
        return Some("YAML is indented with spaces only: replace the tab".to_owned());
    }
    if text.contains("mapping values are not allowed") {
        return Some("check the indentation, and quote a value that contains `: `".to_owned());
    }
    if text.contains("quoted") {
        return Some("check that every quote is closed".to_owned());
    }
    if text.contains("flow") || text.contains("illegal placement") {
        return Some("check that every `[` and `{` before this place is closed".to_owned());
    }
    Some("check the indentation and the quotes of this line and the one before".to_owned())
}
