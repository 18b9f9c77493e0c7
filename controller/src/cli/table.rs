//! Aligned columns of text.

/// On which side of a column its text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    /// Numbers.
    Right,
}

/// A table under construction. The last column is never padded, so no line ends in blanks.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings. A heading that ends in `>` stands over a column of numbers.
    pub fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| match heading.strip_suffix('>') {
            Some(heading) => (heading, Align::Right),
            None => (*heading, Align::Left),
        };
        Self { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones are left out.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| cell.replace(['\n', '\t'], " ")).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// Has it no rows?
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table, a heading line first; `empty` and a newline when there are no rows.
    pub fn render(&self, empty: &str) -> String {
        if self.rows.is_empty() {
            return format!("{empty}\n");
        }
        let heading: Vec<String> = self.columns.iter().map(|(text, _)| text.to_string()).collect();
        let width = |i: usize| {
            let cells = std::iter::once(&heading).chain(&self.rows);
            cells.map(|row| row[i].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut out = String::new();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, (_, align)), width) in row.iter().zip(&self.columns).zip(&widths) {
                let pad = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => line.extend([cell.as_str(), &pad, "  "]),
                    Align::Right => line.extend([pad.as_str(), cell, "  "]),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_left_and_numbers_right() {
        let mut table = Table::new(&["NAME", "HITS>", "WHY"]);
        table.row(["a".into(), "12345".into(), "first".into()]);
        table.row(["longer".into(), "7".into(), String::new()]);
        assert_eq!(table.render("none"), "NAME     HITS  WHY\na       12345  first\nlonger      7\n");
    }

    #[test]
    fn a_table_without_rows_says_so() {
        assert_eq!(Table::new(&["NAME"]).render("no flows"), "no flows\n");
    }

    #[test]
    fn widths_are_counted_in_characters_and_no_cell_breaks_its_line() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["über".into(), "x\ny".into()]);
        table.row(["u".into()]);
        assert_eq!(table.render(""), "A     B\nüber  x y\nu\n");
    }
}
