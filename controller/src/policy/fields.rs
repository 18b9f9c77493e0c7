//! Takes a mapping of the tree apart by its shape, and reports whatever does not fit.

use std::cell::Cell;

use super::diagnostics::Problems;
use super::names::nearest;
use super::shape::{NOT_AVAILABLE, Shape};
use super::source::{At, Span, Text};
use super::tree::{Node, Value};

/// What is wrong with a single value, and what to do; the caller knows the place.
#[derive(Debug, PartialEq, Eq)]
pub struct Complaint {
    pub message: String,
    pub help: Option<String>,
}

impl Complaint {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Reports it at a place.
    pub fn report(self, span: Span, problems: &mut Problems) {
        let found = problems.error(span, self.message);
        if let Some(help) = self.help {
            found.help(help);
        }
    }
}

/// One object of the policy, open for reading.
pub struct Fields<'n, 's> {
    shape: &'static Shape,
    /// Where to point when something is missing: the name, or the first key.
    pub span: Span,
    /// `security rule \`AllowSsh\``, or without a name `this security rule`.
    pub title: String,
    found: Vec<Option<&'n Node<'s>>>,
    keys: Vec<Span>,
    /// Which fields the reader asked for; in tests, leaving one out is a failure.
    asked: Cell<u64>,
}

impl<'n, 's> Fields<'n, 's> {
    /// Opens a mapping: reports unknown, repeated and missing fields. Nothing if it is not a mapping.
    pub fn open(node: &'n Node<'s>, shape: &'static Shape, problems: &mut Problems) -> Option<Self> {
        let entries: &'n [(Node<'s>, Node<'s>)] = match &node.value {
            Value::Map(entries) => entries,
            // `hostAccess:` with nothing behind it is the section with its defaults.
            Value::Null if shape.required.is_empty() => &[],
            _ => {
                let message = format!(
                    "expected {} with named fields, found \
                        {}",
                    with_article(shape.what),
                    node.kind()
                );
                let fields = shape.fields.join(", ");
                problems.error(node.head(), message).help(format!("its fields are: {fields}"));
                return None;
            }
        };
        let count = shape.fields.len();
        let mut this = Self {
            shape,
            span: node.head(),
            title: format!("this {}", shape.what),
            found: vec![None; count],
            keys: vec![Span::default(); count],
            asked: Cell::new(0),
        };
        let mut slips = Vec::new();
        for (key, value) in entries {
            let Some(text) = key.scalar() else {
                problems
                    .error(key.head(), format!("{} cannot be a field name", key.kind()))
                    .help("use a plain word");
                continue;
            };
            match shape.fields.iter().position(|field| *field == text) {
                None => slips
                    .extend(unknown_field(key, text, shape, problems).map(|meant| (meant, key.span, value))),
                Some(at) if this.found[at].is_some() => {
                    problems
                        .error(key.span, format!("`{text}` is given twice"))
                        .also(this.keys[at], "first given here")
                        .help("remove one of them");
                }
                Some(at) => {
                    this.found[at] = Some(value);
                    this.keys[at] = key.span;
                }
            }
        }
        // Reading on as if the slip were corrected spares the reader what only follows from it ("lacks ...").
        for (meant, key, value) in slips {
            if this.found[meant].is_none() {
                (this.found[meant], this.keys[meant]) = (Some(value), key);
            }
        }
        for field in ["name", "device"] {
            if let Some(name) = this.peek(field)
                && let Some(text) = name.scalar()
            {
                this.title = format!("{} `{text}`", shape.what);
                this.span = name.span;
                break;
            }
        }
        for field in shape.required {
            match this.peek(field) {
                None => this.missing(field, problems),
                Some(node) if node.is_null() => {
                    let key = this.key(field);
                    problems.error(key, format!("`{field}` has no value")).help("write it after the colon");
                }
                Some(_) => {}
            }
        }
        Some(this)
    }

    fn missing(&self, field: &str, problems: &mut Problems) {
        problems
            .error(self.span, format!("{} lacks `{field}`", self.title))
            .help(format!("add `{field}: ...`"));
    }

    fn index(&self, field: &str) -> usize {
        let at = self.shape.fields.iter().position(|known| *known == field);
        at.unwrap_or_else(|| panic!("the shape of a {} has no field {field}", self.shape.what))
    }

    fn peek(&self, field: &str) -> Option<&'n Node<'s>> {
        self.shape.fields.iter().position(|known| *known == field).and_then(|at| self.found[at])
    }

    /// The value of a field, unless it is absent or empty.
    pub fn node(&self, field: &str) -> Option<&'n Node<'s>> {
        let at = self.index(field);
        self.asked.set(self.asked.get() | 1 << at);
        self.found[at].filter(|node| !node.is_null())
    }

    /// Is it a list without items?
    pub fn is_empty_list(&self, field: &str) -> bool {
        self.node(field).is_some_and(|node| matches!(&node.value, Value::List(items) if items.is_empty()))
    }

    /// Where the field's name stands.
    pub fn key(&self, field: &str) -> Span {
        self.keys[self.index(field)]
    }

    /// A text: names and references. Numbers are texts too here, a name may be `80`.
    pub fn text(&self, field: &str, problems: &mut Problems) -> Option<Text> {
        self.node(field).and_then(|node| text_of(node, field, problems))
    }

    /// A whole number within limits.
    pub fn number(&self, field: &str, low: u32, high: u32, problems: &mut Problems) -> Option<At<u32>> {
        let node = self.node(field)?;
        let range = format!("write a whole number from {low} to {high}");
        let Value::Bare(text) = node.value else {
            let quoted = node.scalar().is_some_and(|text| text.parse::<u32>().is_ok());
            let found = node.scalar().map_or(node.kind().to_owned(), |text| format!("`{text}`"));
            let help = if quoted { "remove the quotes".to_owned() } else { range };
            problems.error(node.head(), format!("`{field}` must be a number, found {found}")).help(help);
            return None;
        };
        // A leading zero would be octal to one reader and decimal to another.
        let octal = text.len() > 1 && text.starts_with('0');
        let plain = text.bytes().all(|b| b.is_ascii_digit()) && !octal;
        match text.parse::<u32>() {
            Ok(value) if plain && (low..=high).contains(&value) => Some(At::new(value, node.span)),
            _ => {
                let digits = text.trim_start_matches(['-', '+']).bytes().all(|b| b.is_ascii_digit());
                let message = if digits && !octal {
                    format!("`{field}` is {text}, outside {low}..={high}")
                } else {
                    format!("`{field}` must be a whole number, found `{text}`")
                };
                problems.error(node.span, message).help(range);
                None
            }
        }
    }

    /// `true` or `false`.
    pub fn flag(&self, field: &str, problems: &mut Problems) -> Option<At<bool>> {
        let node = self.node(field)?;
        let value = match node.value {
            Value::Bare("true" | "True" | "TRUE") => true,
            Value::Bare("false" | "False" | "FALSE") => false,
            _ => {
                let found = node.scalar().map_or(node.kind().to_owned(), |text| format!("`{text}`"));
                let message = format!("`{field}` must be true or false, found {found}");
                problems.error(node.head(), message).help("write true or false, without quotes");
                return None;
            }
        };
        Some(At::new(value, node.span))
    }

    /// One of several words, without regard to case.
    pub fn choice<T: Copy>(
        &self,
        field: &str,
        options: &[(&str, T)],
        problems: &mut Problems,
    ) -> Option<At<T>> {
        let text = self.text(field, problems)?;
        let found = options.iter().find(|(word, _)| word.eq_ignore_ascii_case(&text.value));
        if let Some((_, value)) = found {
            return Some(At::new(*value, text.span));
        }
        let words: Vec<_> = options.iter().map(|(word, _)| *word).collect();
        let help = match nearest(&text.value, words.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => {
                let word = |w: &&str| if *w == "*" { "'*'".to_owned() } else { format!("`{w}`") };
                format!("use one of: {}", words.iter().map(word).collect::<Vec<_>>().join(", "))
            }
        };
        problems.error(text.span, format!("`{field}` cannot be `{}`", text.value)).help(help);
        None
    }

    /// A value with its own way of being written.
    pub fn parsed<T>(
        &self,
        field: &str,
        parse: impl Fn(&str) -> Result<T, Complaint>,
        problems: &mut Problems,
    ) -> Option<At<T>> {
        let text = self.text(field, problems)?;
        parse_text(text, parse, problems)
    }

    /// The items of a list; none if it is absent.
    pub fn list(&self, field: &str, problems: &mut Problems) -> &'n [Node<'s>] {
        let Some(node) = self.node(field) else { return &[] };
        match &node.value {
            Value::List(items) => items,
            _ => {
                let message = format!("`{field}` must be a list, found {}", node.kind());
                let help = match node.scalar() {
                    Some(text) => format!("write `{field}: [{text}]`"),
                    None => "begin each item with `- `".to_owned(),
                };
                problems.error(node.head(), message).help(help);
                &[]
            }
        }
    }

    /// A list of texts.
    pub fn texts(&self, field: &str, problems: &mut Problems) -> Vec<Text> {
        let items = self.list(field, problems);
        items.iter().filter_map(|item| text_of(item, field, problems)).collect()
    }

    /// Azure's pairs such as `addressPrefix` and `addressPrefixes`: one of the two, not both, and not an empty list.
    /// Nothing when it is absent (reported if `required`) or wrong (always reported).
    pub fn one_or_many(
        &self,
        single: &str,
        plural: &str,
        required: bool,
        problems: &mut Problems,
    ) -> Option<OneOrMany> {
        let (one, many) = (self.node(single), self.node(plural));
        match (one, many) {
            (Some(_), Some(_)) => {
                problems
                    .error(self.key(plural), format!("`{single}` and `{plural}` are given together"))
                    .also(self.key(single), "the other one")
                    .help(format!("put all of them into `{plural}` and remove `{single}`"));
                None
            }
            (None, None) => {
                if required {
                    let message = format!("{} lacks `{single}` or `{plural}`", self.title);
                    problems.error(self.span, message).help(format!("add `{single}: ...`"));
                }
                None
            }
            (Some(node), None) => {
                if let Value::List(_) = node.value {
                    problems
                        .error(self.key(single), format!("`{single}` takes a single value, found a list"))
                        .help(format!("rename it to `{plural}`"));
                    return None;
                }
                let text = text_of(node, single, problems)?;
                Some(OneOrMany { items: vec![text], many: false, span: self.key(single) })
            }
            (None, Some(node)) => {
                let items = self.texts(plural, problems);
                if items.is_empty() && matches!(&node.value, Value::List(list) if list.is_empty()) {
                    problems
                        .error(self.key(plural), format!("`{plural}` is empty"))
                        .help("add at least one value");
                }
                (!items.is_empty()).then_some(OneOrMany { items, many: true, span: self.key(plural) })
            }
        }
    }
}

impl Drop for Fields<'_, '_> {
    /// The reader and the shape must name the same fields; this is what holds them together under test.
    fn drop(&mut self) {
        if cfg!(debug_assertions) && !std::thread::panicking() {
            for (at, field) in self.shape.fields.iter().enumerate() {
                assert!(
                    self.asked.get() & 1 << at != 0,
                    "the reader of {} ignores `{field}`",
                    self.shape.what
                );
            }
        }
    }
}

/// The values of a single or plural field.
pub struct OneOrMany {
    pub items: Vec<Text>,
    /// Was the plural form used?
    pub many: bool,
    /// The field's name.
    pub span: Span,
}

/// Applies a value's own syntax.
pub fn parse_text<T>(
    text: Text,
    parse: impl Fn(&str) -> Result<T, Complaint>,
    problems: &mut Problems,
) -> Option<At<T>> {
    match parse(&text.value) {
        Ok(value) => Some(At::new(value, text.span)),
        Err(complaint) => {
            complaint.report(text.span, problems);
            None
        }
    }
}

fn text_of(node: &Node<'_>, field: &str, problems: &mut Problems) -> Option<Text> {
    match node.scalar() {
        Some(text) => Some(At::new(text.to_owned(), node.span)),
        None => {
            let message = format!("`{field}` takes a single value, found {}", node.kind());
            let help = if node.is_null() {
                "remove the empty item, or fill it in"
            } else {
                "write one value, not a collection"
            };
            problems.error(node.head(), message).help(help);
            None
        }
    }
}

/// Reports a field the shape does not have; the index of the one that was probably meant.
fn unknown_field(key: &Node<'_>, text: &str, shape: &Shape, problems: &mut Problems) -> Option<usize> {
    let what = with_article(shape.what);
    if let Some((_, why)) = NOT_AVAILABLE.iter().find(|(field, _)| *field == text) {
        problems.error(key.span, format!("`{text}` in {what}: {why}")).help("remove it");
        return None;
    }
    let near = nearest(text, shape.fields.iter().copied());
    let help = match near {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("its fields are: {}", shape.fields.join(", ")),
    };
    problems.error(key.span, format!("{what} has no field `{text}`")).help(help);
    near.and_then(|near| shape.fields.iter().position(|field| *field == near))
}

fn with_article(what: &str) -> String {
    let article = if what.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {what}")
}
