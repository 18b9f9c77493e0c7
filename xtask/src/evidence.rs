//! Documents name tests as evidence. Which they name, and whether each has passed in the run that has just ended: the test
//! `documents` checks that they exist, the last step of `cargo xtask test` that they ran.

use std::collections::{BTreeMap, BTreeSet};
use std::{fs, io, path::Path};

/// The documents that name tests.
pub const DOCUMENTS: [&str; 7] = [
    "docs/azure-nsg.md",
    "docs/azure-outbound.md",
    "docs/deviations.md",
    "docs/performance.md",
    "docs/operations.md",
    "docs/pitfalls.md",
    "docs/rfc-compliance.md",
];

/// Words in backticks that read like a test's name: a sentence of small letters with underscores.
pub fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|word| {
        word.matches('_').count() >= 4
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    })
}

/// The tests that are named, each with the first document that does.
///
/// # Errors
/// If a document cannot be read.
pub fn named(root: &Path) -> io::Result<BTreeMap<String, &'static str>> {
    let mut named = BTreeMap::new();
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join(document))
            .map_err(|error| io::Error::new(error.kind(), format!("{document}: {error}")))?;
        for sentence in sentences(&text) {
            named.entry(sentence.to_owned()).or_insert(document);
        }
    }
    Ok(named)
}

/// One line for each named test that is not among those that passed. They are compared without their modules.
pub fn unshown(named: &BTreeMap<String, &str>, passed: &BTreeSet<String>) -> Vec<String> {
    let passed: BTreeSet<&str> = passed.iter().filter_map(|path| path.rsplit("::").next()).collect();
    named
        .iter()
        .filter(|(test, _)| !passed.contains(test.as_str()))
        .map(|(test, document)| format!("{document} names `{test}`, which did not run and pass"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_small_letters_and_many_underscores() {
        let text =
            "`a_test_that_is_named` and `tcp_half_open`, `Not_A_Test_At_All`, plain_words_outside_of_ticks";
        assert_eq!(sentences(text).collect::<Vec<_>>(), ["a_test_that_is_named"]);
    }

    #[test]
    fn a_named_test_counts_as_shown_only_if_it_passed_whatever_module_it_is_in() {
        let named = [("it_ran_and_it_passed", "a.md"), ("it_was_never_run_here", "b.md")]
            .map(|(t, d)| (t.to_owned(), d));
        let passed = ["flows::tests::it_ran_and_it_passed", "other"].map(str::to_owned);
        let said = unshown(&named.into(), &passed.into());
        assert_eq!(said, ["b.md names `it_was_never_run_here`, which did not run and pass"]);
    }
}
