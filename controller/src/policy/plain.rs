//! The YAML that policies are written in, read without asking what else YAML can be: block mappings and lists, flow
//! collections, scalars that stand in one line. 200,000 rules are read in a tenth of the time that a whole YAML parser
//! takes (docs/performance.md).
//!
//! Whatever is not plainly of that kind (anchors, tags, escapes, block scalars, several documents, a tab, a character
//! beyond ASCII, and every mistake) makes it give up: [`read`] answers nothing, and the whole text is read by the YAML
//! parser, which then also says what is wrong. What it does answer is what the parser would have answered; where two
//! rules of YAML would have to be weighed against each other it gives up rather than weigh them.

use std::borrow::Cow;

use super::source::Span;
use super::tree::{self, Node, Value};

/// A policy's own shape is 8 deep.
const MAX_DEPTH: u32 = 16;
/// Half of what `tree` takes, so that nothing is read here that is refused there.
const MAX_NODES: u32 = 16_000_000;
/// A rule has nine fields; room for these is made at once.
const FIELDS: usize = 9;
/// Words that may be something else than text, in any case.
const WORDS: [&str; 11] = ["null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan"];

/// Reads a text; nothing if that is better left to the YAML parser.
pub fn read(text: &str) -> Option<Node<'_>> {
    if !text.bytes().all(|b| matches!(b, b' '..=b'~' | b'\n')) {
        return None;
    }
    let mut reader = Reader { text, at: 0, indent: None, nodes: 0, depth: 0 };
    reader.line(0)?;
    let root = reader.block()?;
    // What is left stands further left than the first line.
    reader.indent.is_none().then_some(root)
}

struct Reader<'s> {
    text: &'s str,
    /// Where the content of the line at hand begins, or that of a list's item in it.
    at: usize,
    /// The column of [`Reader::at`]; nothing at the end of the text.
    indent: Option<usize>,
    nodes: u32,
    depth: u32,
}

impl<'s> Reader<'s> {
    fn byte(&self, at: usize) -> Option<u8> {
        self.text.as_bytes().get(at).copied()
    }

    fn node(&mut self, start: usize, end: usize, value: Value<'s>) -> Option<Node<'s>> {
        self.nodes += 1;
        (self.nodes <= MAX_NODES).then(|| Node { span: Span::new(start, end), value })
    }

    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth == MAX_DEPTH {
            return None;
        }
        self.depth += 1;
        let value = read(self)?;
        self.depth -= 1;
        Some(value)
    }

    fn skip_spaces(&self, mut at: usize) -> usize {
        while self.byte(at) == Some(b' ') {
            at += 1;
        }
        at
    }

    fn line_end(&self, at: usize) -> usize {
        let rest = &self.text.as_bytes()[at..];
        at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
    }

    /// Goes to the first line with content from the one that begins at `start`.
    fn line(&mut self, mut start: usize) -> Option<()> {
        loop {
            let content = self.skip_spaces(start);
            match self.byte(content) {
                None => {
                    self.indent = None;
                    return Some(());
                }
                Some(b'\n') => start = content + 1,
                Some(b'#') => start = self.line_end(content) + 1,
                Some(_) => {
                    let rest = &self.text[content..];
                    let column = content - start;
                    // Directives, and what begins and ends a document.
                    if column == 0 && ["---", "...", "%"].iter().any(|mark| rest.starts_with(mark)) {
                        return None;
                    }
                    self.at = content;
                    self.indent = Some(column);
                    return Some(());
                }
            }
        }
    }

    /// Goes to the next line with content; behind `at` only a comment may stand in its own.
    fn next_line(&mut self, at: usize) -> Option<()> {
        let content = self.skip_spaces(at);
        match self.byte(content) {
            None | Some(b'\n') => self.line(content + 1),
            Some(b'#') if content > at => self.line(self.line_end(content) + 1),
            Some(_) => None,
        }
    }

    fn is_item(&self) -> bool {
        self.byte(self.at) == Some(b'-') && self.byte(self.at + 1) == Some(b' ')
    }

    /// A collection in lines of its own, of which the first is at hand.
    fn block(&mut self) -> Option<Node<'s>> {
        let indent = self.indent?;
        self.deeper(|this| if this.is_item() { this.block_list(indent) } else { this.block_map(indent) })
    }

    /// Mapping whose keys stand in this column.
    fn block_map(&mut self, indent: usize) -> Option<Node<'s>> {
        let start = self.at;
        let mut entries = Vec::with_capacity(FIELDS);
        while self.indent == Some(indent) {
            let (key, colon) = self.key(self.at)?;
            let value = self.value(colon, indent)?;
            entries.push((key, value));
        }
        self.ends(indent)?;
        self.node(start, start, Value::Map(entries))
    }

    /// List whose items' signs stand in this column.
    fn block_list(&mut self, indent: usize) -> Option<Node<'s>> {
        let start = self.at;
        let mut items = Vec::new();
        while self.indent == Some(indent) && self.is_item() {
            let content = self.skip_spaces(self.at + 1);
            let column = indent + (content - self.at);
            let item = match self.byte(content)? {
                b'\n' | b'#' => return None,
                b'-' if self.byte(content + 1) == Some(b' ') => return None,
                _ if self.key(content).is_some() => {
                    (self.at, self.indent) = (content, Some(column));
                    self.deeper(|this| this.block_map(column))?
                }
                _ => self.inline(content, indent)?,
            };
            items.push(item);
        }
        self.ends(indent)?;
        self.node(start, start, Value::List(items))
    }

    /// A line further right would go on with what was just read, or be a mistake.
    fn ends(&self, indent: usize) -> Option<()> {
        self.indent.is_none_or(|next| next <= indent).then_some(())
    }

    /// A field's name and the place of its colon.
    fn key(&mut self, start: usize) -> Option<(Node<'s>, usize)> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let mut end = start;
        while self.byte(end).is_some_and(word) {
            end += 1;
        }
        let ends = matches!(self.byte(end + 1), None | Some(b' ' | b'\n'));
        if end == start || end - start > 100 || self.byte(end) != Some(b':') || !ends {
            return None;
        }
        let value = plain(&self.text[start..end])?;
        Some((self.node(start, end, value)?, end))
    }

    /// What stands behind the colon of a key in this column, be it in the lines below.
    fn value(&mut self, colon: usize, indent: usize) -> Option<Node<'s>> {
        let content = self.skip_spaces(colon + 1);
        match self.byte(content) {
            None | Some(b'\n' | b'#') => {
                self.next_line(colon + 1)?;
                match self.indent {
                    Some(next) if next > indent => self.block(),
                    Some(next) if next == indent && self.is_item() => {
                        self.deeper(|this| this.block_list(indent))
                    }
                    _ => self.node(colon, colon, Value::Null),
                }
            }
            Some(_) => self.inline(content, indent),
        }
    }

    /// A value that begins here and does not go on in lines of its own.
    fn inline(&mut self, start: usize, indent: usize) -> Option<Node<'s>> {
        let (node, end) = match self.byte(start)? {
            b'[' | b'{' => self.deeper(|this| this.flow(start, indent))?,
            b'\'' | b'"' => self.quoted(start)?,
            _ => {
                let line = &self.text[start..self.line_end(start)];
                let line = line.find(" #").map_or(line, |comment| &line[..comment]).trim_end_matches(' ');
                if !begins_plain(line.as_bytes()) || line.contains(": ") || line.ends_with(':') {
                    return None;
                }
                let end = start + line.len();
                (self.node(start, end, plain(line)?)?, end)
            }
        };
        self.next_line(end)?;
        self.ends(indent)?;
        Some(node)
    }

    /// A text in quotes without escapes, and where it ends.
    fn quoted(&mut self, start: usize) -> Option<(Node<'s>, usize)> {
        let quote = self.byte(start)?;
        let rest = &self.text[start + 1..];
        let length = rest.bytes().position(|b| b == quote || b == b'\n' || b == b'\\')?;
        let end = start + 1 + length;
        if self.byte(end) != Some(quote) || self.byte(end + 1) == Some(quote) {
            return None;
        }
        Some((self.node(start, end + 1, Value::Text(Cow::Borrowed(&rest[..length])))?, end + 1))
    }

    /// A flow collection and where it ends. Its further lines stand to the right of this column.
    fn flow(&mut self, start: usize, indent: usize) -> Option<(Node<'s>, usize)> {
        let is_map = self.byte(start)? == b'{';
        let close = if is_map { b'}' } else { b']' };
        let mut entries = Vec::with_capacity(if is_map { FIELDS } else { 0 });
        let mut items = Vec::new();
        let mut at = self.within(start + 1, indent)?;
        while self.byte(at)? != close {
            if is_map {
                let (key, colon) = self.key(at)?;
                let (value, end) = self.flow_value(self.skip_spaces(colon + 1), indent)?;
                entries.push((key, value));
                at = end;
            } else {
                let (item, end) = self.flow_value(at, indent)?;
                items.push(item);
                at = end;
            }
            at = self.within(at, indent)?;
            match self.byte(at)? {
                b',' => at = self.within(at + 1, indent)?,
                other if other == close => {}
                _ => return None,
            }
        }
        let value = if is_map { Value::Map(entries) } else { Value::List(items) };
        Some((self.node(start, start + 1, value)?, at + 1))
    }

    /// A value in a flow collection and where it ends.
    fn flow_value(&mut self, start: usize, indent: usize) -> Option<(Node<'s>, usize)> {
        match self.byte(start)? {
            b'[' | b'{' => self.deeper(|this| this.flow(start, indent)),
            b'\'' | b'"' => self.quoted(start),
            _ => {
                let rest = &self.text[start..];
                let length = rest.bytes().position(|b| ENDS_FLOW[usize::from(b)])?;
                let word = rest[..length].trim_end_matches(' ');
                let ends = matches!(self.byte(start + length)?, b',' | b']' | b'}');
                if !ends || !begins_plain(word.as_bytes()) || word.contains(": ") || word.ends_with(':') {
                    return None;
                }
                let end = start + word.len();
                Some((self.node(start, end, plain(word)?)?, end))
            }
        }
    }

    /// The next sign within a flow collection.
    fn within(&self, at: usize, indent: usize) -> Option<usize> {
        let mut at = self.skip_spaces(at);
        while self.byte(at)? == b'\n' {
            let content = self.skip_spaces(at + 1);
            // Not in the columns of what is around.
            if self.byte(content)? != b'\n' && content - (at + 1) <= indent {
                return None;
            }
            at = content;
        }
        Some(at)
    }
}

/// What ends a plain scalar in a flow collection, or makes us give up.
const ENDS_FLOW: [bool; 256] = {
    let mut ends = [false; 256];
    let mut i = 0;
    while i < b",[]{}\n#".len() {
        ends[b",[]{}\n#"[i] as usize] = true;
        i += 1;
    }
    ends
};

/// May a plain scalar begin so, and with nothing that has a meaning of its own?
fn begins_plain(text: &[u8]) -> bool {
    match text {
        [] | [b'-' | b'?' | b':'] => false,
        [b'-' | b'?' | b':', next, ..] => *next != b' ' && text[0] == b'-',
        [first, ..] => !b",[]{}#&*!|>'\"%@`".contains(first),
    }
}

/// What a plain scalar is. Texts and decimal numbers are told at sight, whatever else by the parser.
fn plain(text: &str) -> Option<Value<'_>> {
    let bytes = text.as_bytes();
    let count = |sign: u8| bytes.iter().filter(|&&b| b == sign).count();
    let is_text = match bytes[0] {
        b'a'..=b'z' | b'A'..=b'Z' => !WORDS.iter().any(|word| word.eq_ignore_ascii_case(text)),
        b'0'..=b'9' => {
            let range = || bytes.iter().all(|&b| b.is_ascii_digit() || b == b'-') && count(b'-') > 0;
            bytes.contains(&b'/') || count(b'.') > 1 || count(b':') > 1 || range()
        }
        b'~' => false,
        // By itself `---` or `...` would be the mark of a document.
        _ if bytes.get(1).is_some_and(u8::is_ascii_digit) => false,
        _ => return None,
    };
    if is_text {
        return Some(Value::Text(Cow::Borrowed(text)));
    }
    let is_number = bytes.iter().all(u8::is_ascii_digit) && bytes.len() < 18;
    if is_number && (bytes[0] != b'0' || bytes.len() == 1) {
        return Some(Value::Bare(text));
    }
    match tree::parse(text).ok()?.value {
        Value::Null => Some(Value::Null),
        Value::Bare(_) => Some(Value::Bare(text)),
        Value::Text(Cow::Borrowed(same)) if same == text => Some(Value::Text(Cow::Borrowed(text))),
        _ => None,
    }
}

#[cfg(test)]
#[path = "plain_tests.rs"]
mod tests;
