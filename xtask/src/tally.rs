//! Reads what libtest prints: how many tests passed, which failed.

/// The sums over any number of test binaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    /// What libtest calls ignored. Tests a filter leaves out are not counted at all.
    pub skipped: u64,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl std::ops::AddAssign<&Self> for Tally {
    fn add_assign(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Tally {
    /// "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s".
    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let count = |word: &str| {
            counts.split(';').find_map(|part| {
                let (number, name) = part.trim().split_once(' ')?;
                (name == word).then(|| number.parse().ok())?
            })
        };
        Some(Self { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }
}

/// How many results one run prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Results {
    /// A test binary prints one, at its very end; an earlier line of that form is some test's own output.
    Last,
    /// Documentation tests print one for every crate.
    All,
}

/// Follows a run's output line by line.
#[derive(Debug)]
pub struct Reader {
    results: Results,
    tally: Option<Tally>,
    /// The names in the list before each result; the output of the failed tests, which comes earlier, is under the same
    /// heading.
    listed: Vec<String>,
    in_list: bool,
    failures: Vec<String>,
}

impl Reader {
    pub fn new(results: Results) -> Self {
        Self { results, tally: None, listed: Vec::new(), in_list: false, failures: Vec::new() }
    }

    /// Reads a piece of output, which need not end with a line; `line` is the one that has begun.
    pub fn bytes(&mut self, piece: &[u8], line: &mut Vec<u8>) {
        for byte in piece {
            if *byte == b'\n' {
                self.line(&String::from_utf8_lossy(line));
                line.clear();
            } else {
                line.push(*byte);
            }
        }
    }

    pub fn line(&mut self, line: &str) {
        if line == "failures:" {
            self.in_list = true;
            self.listed.clear();
        } else if let Some(tally) = Tally::parse(line) {
            if self.results == Results::Last {
                self.tally = None;
                self.failures.clear();
            }
            *self.tally.get_or_insert_default() += &tally;
            if tally.failed > 0 {
                self.failures.append(&mut self.listed);
            }
            self.listed.clear();
            self.in_list = false;
        } else if self.in_list
            && let Some(name) = line.strip_prefix("    ")
        {
            self.listed.push(name.to_owned());
        }
    }

    /// The counts, or `None` if the run ended without a result, and the failed tests' names.
    pub fn finish(self) -> (Option<Tally>, Vec<String>) {
        (self.tally, self.failures)
    }
}

/// The names in the output of `--list --format terse`.
pub fn listed_tests(output: &str) -> Vec<String> {
    output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(results: Results, output: &str) -> (Option<Tally>, Vec<String>) {
        let mut reader = Reader::new(results);
        output.lines().for_each(|line| reader.line(line));
        reader.finish()
    }

    #[test]
    fn passed_failed_and_ignored_are_read_and_filtered_tests_are_not_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 90 filtered out; finished in 0.5s";
        assert_eq!(Tally::parse(line), Some(Tally { passed: 12, failed: 3, skipped: 4 }));
        assert_eq!(Tally::parse("test flows::a_flow ... ok"), None);
    }

    #[test]
    fn the_total_is_printed_in_the_plain_form() {
        let mut total = Tally { passed: 1, failed: 0, skipped: 2 };
        total += &Tally { passed: 10, failed: 1, skipped: 0 };
        assert_eq!(total.to_string(), "11 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn failed_tests_are_named_and_their_output_is_not_mistaken_for_names() {
        let output = "\
test a ... ok
test b::c ... FAILED

failures:

---- b::c stdout ----
    indented output

failures:
    b::c

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let (tally, failures) = read(Results::Last, output);
        assert_eq!(tally, Some(Tally { passed: 1, failed: 1, skipped: 0 }));
        assert_eq!(failures, ["b::c"]);
    }

    #[test]
    fn a_result_line_printed_by_a_test_does_not_count() {
        let output = "\
test result: ok. 500 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        assert_eq!(read(Results::Last, output).0, Some(Tally { passed: 1, failed: 0, skipped: 0 }));
        assert_eq!(read(Results::All, output).0, Some(Tally { passed: 501, failed: 0, skipped: 0 }));
    }

    #[test]
    fn a_run_without_a_result_has_no_tally() {
        assert_eq!(read(Results::Last, "test a ... "), (None, Vec::new()));
    }

    #[test]
    fn tests_are_listed_and_benchmarks_and_totals_are_not() {
        assert_eq!(listed_tests("a::b: test\nc: benchmark\n\n1 test, 1 benchmark\n"), ["a::b"]);
    }
}
