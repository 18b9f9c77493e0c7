//! The text of a policy file and places in it.

/// A stretch of the source, in bytes.
///
/// A value reached through a YAML alias has two places: where it is written, which is what has to be corrected, and
/// where it is used, which is what tells two uses of the same value apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span {
    pub start: u32,
    pub end: u32,
    /// Start and end of the alias; the same as `start` and `end` for a value written in place.
    pub used: (u32, u32),
}

impl Span {
    /// A stretch written in place.
    pub fn new(start: usize, end: usize) -> Self {
        // Files are limited to `tree::MAX_BYTES`, far below 4 GiB.
        let (start, end) = (start as u32, end as u32);
        Self { start, end, used: (start, end) }
    }

    /// The same value seen as the alias that uses it.
    pub fn as_used(self) -> Self {
        Self { start: self.used.0, end: self.used.1, used: self.used }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub struct At<T> {
    pub value: T,
    pub span: Span,
}

impl<T> At<T> {
    pub fn new(value: T, span: Span) -> Self {
        Self { value, span }
    }
}

/// Text with its place: names and references.
pub type Text = At<String>;

/// A line and a column, both from 1; columns count characters, as editors do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// A file's name and text. A byte order mark is dropped: it is not part of the first line.
#[derive(Debug)]
pub struct Source {
    pub name: String,
    pub text: String,
    line_starts: Vec<u32>,
}

impl Source {
    pub fn new(name: &str, text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).to_owned();
        let mut line_starts = vec![0];
        line_starts.extend(text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(i, _)| i as u32 + 1));
        Self { name: name.to_owned(), text, line_starts }
    }

    /// Line and column of a byte offset.
    pub fn position(&self, offset: u32) -> Position {
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = self.line_starts[line - 1] as usize;
        let end = (offset as usize).min(self.text.len());
        Position { line, column: self.text[start..end].chars().count() + 1 }
    }

    /// Byte offset of a line and column, clipped to the text.
    pub fn offset(&self, at: Position) -> usize {
        let line = at.line.clamp(1, self.line_starts.len());
        let start = self.line_starts[line - 1] as usize;
        self.text[start..]
            .char_indices()
            .nth(at.column.saturating_sub(1))
            .map_or(self.text.len(), |(i, _)| start + i)
    }

    /// A span of one character at a line and column.
    pub fn span_at(&self, at: Position) -> Span {
        let start = self.offset(at);
        let width = self.text[start..].chars().next().filter(|c| *c != '\n').map_or(0, char::len_utf8);
        Span::new(start, start + width)
    }

    /// Byte range of whole lines `first..=last` (from 1), without the last line break.
    pub fn lines(&self, first: usize, last: usize) -> std::ops::Range<usize> {
        let start = self.line_starts[first - 1] as usize;
        let end = self.line_starts.get(last).map_or(self.text.len(), |next| *next as usize - 1);
        start..end
    }

    /// Number of lines; a text that ends in a line break has an empty last line.
    pub fn line_count(&self) -> usize {
        self.line_starts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters_and_the_byte_order_mark_does_not_count() {
        let source = Source::new("p", "\u{feff}é: ü\nb: 1\n");
        assert_eq!(source.position(4), Position { line: 1, column: 4 });
        assert_eq!(source.position(10), Position { line: 2, column: 4 });
        assert_eq!(source.offset(Position { line: 2, column: 4 }), 10);
        assert_eq!(source.offset(Position { line: 9, column: 9 }), source.text.len());
        assert_eq!(&source.text[source.lines(2, 2)], "b: 1");
    }
}
