//! One number of the report: what it is, beside what it stands, and whether it is enough.

use serde::{Deserialize, Serialize};

use super::statistics::{median, paired_ratio, spread};

/// Which of a figure's numbers `must` and `goal` are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// [`Figure::value`], in the figure's unit.
    Value,
    /// [`Figure::ratio_to_limit`].
    RatioToLimit,
    /// [`Figure::ratio_to_nftables`].
    RatioToNftables,
}

/// Which way is the good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// At least as much as `must` is accepted.
    More,
    /// At most as much as `must` is accepted.
    Less,
}

/// What was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Met {
    /// What is aimed at.
    Goal,
    /// What has to be, but not what is aimed at.
    Must,
    /// Not even that.
    Missed,
}

/// One figure of the report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// Such as `established_64k`; unique in a report.
    pub name: String,
    /// The section that measured it.
    #[serde(default)]
    pub section: String,
    /// Median of the rounds.
    pub value: f64,
    /// Of `value` and `samples`: `Mpps`, `ns`, `B`, `ms`.
    pub unit: String,
    /// How many rounds.
    pub rounds: usize,
    /// From the smallest to the largest, as a share of the median.
    pub spread: f64,
    /// Median of each round's share of the limit of the same round; [`Figure::limit`] says what that is.
    pub ratio_to_limit: Option<f64>,
    /// The same for nftables.
    pub ratio_to_nftables: Option<f64>,
    /// The least (or most) that is accepted.
    pub must: Option<f64>,
    /// What is aimed at.
    pub goal: Option<f64>,
    /// What `must` is compared with; null where neither `must` nor `goal` is given.
    pub by: Option<By>,
    /// What `goal` is compared with: nearly always the same.
    pub goal_by: Option<By>,
    /// Whether more or less of it is better.
    pub better: Option<Better>,
    /// What was reached; null where there is nothing to reach, or its ratio could not be measured.
    pub met: Option<Met>,
    /// What `ratio_to_limit` is a share of, for people.
    pub limit: Option<String>,
    /// Nanoseconds that a packet takes longer than under the limit of the same round.
    pub extra_ns: Option<f64>,
    /// Share of the time that the gateway's thread was running.
    pub busy: Option<f64>,
    /// Each round.
    pub samples: Vec<f64>,
}

impl Figure {
    /// The median of the rounds' values.
    pub fn from_samples(name: impl Into<String>, unit: &str, samples: &[f64]) -> Self {
        Self {
            name: name.into(),
            section: String::new(),
            value: median(samples).unwrap_or_default(),
            unit: unit.to_owned(),
            rounds: samples.len(),
            spread: spread(samples),
            ratio_to_limit: None,
            ratio_to_nftables: None,
            must: None,
            goal: None,
            by: None,
            goal_by: None,
            better: None,
            met: None,
            limit: None,
            extra_ns: None,
            busy: None,
            samples: samples.to_vec(),
        }
    }

    /// What was measured or counted once.
    pub fn once(name: impl Into<String>, unit: &str, value: f64) -> Self {
        Self::from_samples(name, unit, &[value])
    }

    /// Beside the limit's rounds, which `limit` names; of none there is no ratio.
    #[must_use]
    pub fn ratio_to_limit_of(mut self, limit: &str, samples: &[f64]) -> Self {
        self.ratio_to_limit = paired_ratio(&self.samples, samples);
        self.limit = Some(limit.to_owned());
        self.judged()
    }

    /// Beside nftables' rounds; of none there is no ratio.
    #[must_use]
    pub fn ratio_to_nftables_of(mut self, samples: &[f64]) -> Self {
        self.ratio_to_nftables = paired_ratio(&self.samples, samples);
        self.judged()
    }

    /// What has to be reached and what is aimed at.
    #[must_use]
    pub fn must(mut self, by: By, better: Better, must: f64, goal: f64) -> Self {
        (self.must, self.goal) = (Some(must), Some(goal));
        (self.by, self.goal_by, self.better) = (Some(by), Some(by), Some(better));
        self.judged()
    }

    /// The goal where it is compared with something else than `must`.
    #[must_use]
    pub fn goal(mut self, by: By, goal: f64) -> Self {
        (self.goal, self.goal_by) = (Some(goal), Some(by));
        self.judged()
    }

    fn judged(mut self) -> Self {
        self.met = self.judge();
        self
    }

    fn judge(&self) -> Option<Met> {
        let better = self.better?;
        let reaches = |by: Option<By>, wanted: Option<f64>| -> Option<bool> {
            let (is, wanted) = (self.number(by?)?, wanted?);
            Some(match better {
                Better::More => is >= wanted,
                Better::Less => is <= wanted,
            })
        };
        Some(match (reaches(self.by, self.must)?, reaches(self.goal_by, self.goal)) {
            (true, Some(true)) => Met::Goal,
            (true, _) => Met::Must,
            (false, _) => Met::Missed,
        })
    }

    /// The number that `by` is about.
    pub fn number(&self, by: By) -> Option<f64> {
        match by {
            By::Value => (self.rounds > 0).then_some(self.value),
            By::RatioToLimit => self.ratio_to_limit,
            By::RatioToNftables => self.ratio_to_nftables,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_judged_by_what_its_must_and_goal_are_about() {
        let figure = |samples: &[f64]| Figure::from_samples("f", "Mpps", samples);
        let shared = |of: f64| {
            figure(&[of, of, of])
                .must(By::RatioToLimit, Better::More, 0.65, 0.8)
                .ratio_to_limit_of("bare redirect", &[1.0, 1.0, 1.0])
        };
        assert_eq!(
            [0.64, 0.65, 0.8].map(|of| shared(of).met),
            [Some(Met::Missed), Some(Met::Must), Some(Met::Goal)]
        );
        let cost = |ms: f64| figure(&[ms]).must(By::Value, Better::Less, 200.0, 50.0).met;
        assert_eq!([201.0, 200.0, 50.0].map(cost), [Some(Met::Missed), Some(Met::Must), Some(Met::Goal)]);
    }

    #[test]
    fn must_and_goal_may_be_about_different_ratios_and_without_its_ratio_nothing_is_met() {
        let denied = Figure::from_samples("f", "Mpps", &[1.0])
            .must(By::RatioToLimit, Better::More, 0.9, 1.0)
            .goal(By::RatioToNftables, 100.0);
        assert_eq!(denied.met, None);
        let denied = denied.ratio_to_limit_of("the same with one rule", &[1.05]);
        assert_eq!(denied.met, Some(Met::Must));
        assert_eq!(denied.ratio_to_nftables_of(&[0.005]).met, Some(Met::Goal));
    }

    #[test]
    fn json_says_what_must_and_goal_are_compared_with() {
        let figure = Figure::once("reaper", "ms", 60.0).must(By::Value, Better::Less, 200.0, 50.0);
        let json = serde_json::to_value(&figure).expect("serialises");
        assert_eq!((&json["by"], &json["better"]), (&"value".into(), &"less".into()));
        assert_eq!((&json["met"], &json["ratio_to_limit"]), (&"must".into(), &serde_json::Value::Null));
    }
}
