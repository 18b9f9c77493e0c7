//! Names: what they may look like, who has which, and what was probably meant.

use std::collections::HashMap;

use super::diagnostics::Problems;
use super::source::Text;

/// Azure's limit for resource and rule names.
const MAX_NAME: usize = 80;

/// Checks Azure's rule for names; `what` names the object in the message.
pub fn check_name(name: &Text, what: &str, problems: &mut Problems) {
    let text = &name.value;
    let word = |c: char| c.is_ascii_alphanumeric();
    let count = text.chars().count();
    let wrong = if text.is_empty() {
        Some("is empty".to_owned())
    } else if count > MAX_NAME {
        Some(format!("is {count} characters long"))
    } else if let Some(bad) = text.chars().find(|c| !(word(*c) || "._-".contains(*c))) {
        Some(format!("contains {bad:?}"))
    } else if !text.starts_with(|c| word(c) || c == '_') {
        Some("begins with a punctuation mark".to_owned())
    } else if !text.ends_with(|c| word(c) || c == '_') {
        Some("ends with a punctuation mark".to_owned())
    } else {
        None
    };
    if let Some(wrong) = wrong {
        problems.error(name.span, format!("the name of this {what} {wrong}")).help(format!(
            "a name has 1 to {MAX_NAME} of the characters A-Z a-z 0-9 . _ - and begins with a \
                letter, digit or `_` and ends with one"
        ));
    }
}

/// The names of one kind of object, compared without regard to case as Azure does.
#[derive(Debug)]
pub struct Names {
    what: &'static str,
    by_key: HashMap<String, (usize, Text)>,
}

impl Names {
    pub fn new(what: &'static str) -> Self {
        Self { what, by_key: HashMap::new() }
    }

    /// Takes a name for an object; reports a bad or a second one.
    pub fn declare(&mut self, name: &Text, index: usize, problems: &mut Problems) {
        check_name(name, self.what, problems);
        if let Some((_, first)) = self.by_key.get(&name.value.to_ascii_lowercase()) {
            problems
                .error(name.span, format!("a second {} is named `{}`", self.what, name.value))
                .also(first.span, "the first one")
                .help("names are compared without regard to case: rename one of them");
        } else {
            self.by_key.insert(name.value.to_ascii_lowercase(), (index, name.clone()));
        }
    }

    /// Index of a name, without a report.
    pub fn get(&self, name: &str) -> Option<usize> {
        self.by_key.get(&name.to_ascii_lowercase()).map(|(index, _)| *index)
    }

    /// Index of a name that something refers to; reports an unknown one with the one that was probably meant.
    /// `section` is where such objects are defined.
    pub fn find(&self, reference: &Text, section: &str, problems: &mut Problems) -> Option<usize> {
        let found = self.get(&reference.value);
        if found.is_none() {
            let message = format!("no {} is named `{}`", self.what, reference.value);
            let help = self.help(&reference.value, section);
            problems.error(reference.span, message).help(help);
        }
        found
    }

    fn help(&self, wanted: &str, section: &str) -> String {
        let names = || self.by_key.values().map(|(_, name)| name.value.as_str());
        if let Some(near) = nearest(wanted, names()) {
            return format!("did you mean `{near}`?");
        }
        if self.by_key.is_empty() {
            return format!("define it under `{section}`");
        }
        let mut known: Vec<_> = names().collect();
        known.sort_unstable();
        let more = if known.len() > 8 { ", ..." } else { "" };
        known.truncate(8);
        format!("define it under `{section}`, or use one of: {}{more}", known.join(", "))
    }
}

/// The candidate nearest to what was written, if it is near enough to be a slip.
pub fn nearest<'c>(wanted: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let wanted = wanted.to_lowercase();
    let allowed = (wanted.chars().count() / 3).clamp(1, 3);
    candidates
        .map(|candidate| (distance(&wanted, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits between two words: insertion, deletion, replacement, swap of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 3 {
        return usize::MAX;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replace = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replace.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::super::source::{At, Span};
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_a_different_word_is_not() {
        let known = ["web-nsg", "db-nsg", "priority", "destinationPortRange"];
        assert_eq!(nearest("wbe-nsg", known.into_iter()), Some("web-nsg"));
        assert_eq!(nearest("Priorty", known.into_iter()), Some("priority"));
        assert_eq!(nearest("destinationportrange", known.into_iter()), Some("destinationPortRange"));
        assert_eq!(nearest("mailserver", known.into_iter()), None);
    }

    #[test]
    fn names_follow_azures_rule() {
        let ok = |name: &str| {
            let mut problems = Problems::default();
            check_name(&At::new(name.to_owned(), Span::default()), "thing", &mut problems);
            !problems.has_errors()
        };
        for good in ["a", "web-nsg", "A.b_c-1", "_x", "tail_", &"n".repeat(80)] {
            assert!(ok(good), "{good}");
        }
        for bad in ["", "-a", ".a", "a-", "a.", "a b", "a/b", "ü", &"n".repeat(81)] {
            assert!(!ok(bad), "{bad}");
        }
    }
}
