//! What is compared is measured in turns.

use super::options::Options;

/// Rounds in which each candidate is measured [`Options::turns`] times; for each candidate the rounds, each with the mean of its
/// turns, value by value. Beside what was measured before an error: that one.
pub(super) fn in_turns<C, const N: usize>(
    options: &Options,
    what: &str,
    candidates: &mut [C],
    mut measure: impl FnMut(&mut C) -> anyhow::Result<[f64; N]>,
) -> (Vec<Vec<[f64; N]>>, anyhow::Result<()>) {
    let mut all = vec![Vec::new(); candidates.len()];
    let outcome = options.each_round(what, |_| {
        let mut sums = vec![[0.0; N]; candidates.len()];
        let turns = options.turns.max(1);
        for turn in 0..turns {
            // Every turn begins with another one, so that nobody always comes after the same neighbour.
            for place in 0..candidates.len() {
                let at = (turn + place) % candidates.len();
                let values = measure(&mut candidates[at])?;
                sums[at].iter_mut().zip(values).for_each(|(sum, value)| *sum += value / turns as f64);
            }
        }
        all.iter_mut().zip(sums).for_each(|(rounds, round)| rounds.push(round));
        Ok(())
    });
    (all, outcome)
}

/// One of the values of each round.
pub(super) fn column<const N: usize>(rounds: &[[f64; N]], value: usize) -> Vec<f64> {
    rounds.iter().map(|round| round[value]).collect()
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn each_candidate_has_as_many_turns_and_an_error_leaves_whole_rounds() {
        let options = Options { rounds: 3, turns: 2, progress: false, ..Options::default() };
        let mut calls = Vec::new();
        let mut measure = |name: &mut f64| {
            calls.push(*name);
            if calls.len() > 6 { bail!("enough") } else { Ok([*name, calls.len() as f64]) }
        };
        let (all, outcome) = in_turns(&options, "test", &mut [10.0, 20.0], &mut measure);
        assert_eq!(outcome.expect_err("the seventh").to_string(), "enough");
        // The first turn begins with the first, the second with the second.
        assert_eq!(all, [vec![[10.0, 2.5]], vec![[20.0, 2.5]]]);
        assert_eq!(calls[..4], [10.0, 20.0, 20.0, 10.0]);
        assert_eq!(column(&all[1], 1), [2.5]);
    }
}
